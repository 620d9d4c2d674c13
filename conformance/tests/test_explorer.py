"""The explorer: its closed forms in JavaScript are those of helix_spec, and it is one file."""

import json
import re

import pytest
from click.testing import CliRunner
from py_mini_racer import MiniRacer

from helix_conformance.cli import main
from helix_conformance.report.html import explore_page
from suite_testing.explored import explored

SETTINGS = list(explored(400))
FORMS = re.search(r"const NAMED.*?(?=// What the fields say)", explore_page(), re.S)[0]
ASKED = """(cases) => cases.map(({ layout, promptLen, steps, pool, shift }) => {
  const ranks = [...Array(layout.c).keys()], total = promptLen + steps;
  const at = (rank) => [...Array(localLen(layout, promptLen, steps, rank, shift)).keys()];
  return {
    positions: ranks.map((r) => at(r).map((i) => positionOf(layout, promptLen, r, i, shift))),
    owners: [...Array(total + 1).keys()].map((p) => ownerOf(layout, promptLen, p, shift)),
    pages: ranks.map((r) => pagesNeeded(layout, promptLen, steps, r, shift)),
    capacity: capacity(layout, pool, promptLen, shift),
    text: layoutText(layout), legal: layoutProblem(layout) === "",
  };
})"""


def by_javascript(forms):
    """What these closed forms say of all settings."""
    cases = [
        {
            "layout": {part: getattr(one.layout, part) for part in ("prompt", "owner", "pages")}
            | {"start": one.layout.start, "i": one.interleave}
            | {"c": one.layout.cp_size, "t": one.layout.tokens_per_block},
            "promptLen": one.prompt_len,
            "steps": one.steps,
            "pool": one.pool,
            "shift": one.shift,
        }
        for one in SETTINGS
    ]
    return json.loads(MiniRacer().eval(f"{forms}JSON.stringify(({ASKED})({json.dumps(cases)}))"))


@pytest.fixture(scope="module")
def right():
    """What helix_spec says of all settings."""
    return [one.answers() for one in SETTINGS]


def test_its_closed_forms_are_those_of_the_specification(right):
    """Positions, owners, pages, capacity, identifier and legality of 400 settings."""
    assert {True, False} == {one["legal"] for one in right}
    assert by_javascript(FORMS) == right


@pytest.mark.parametrize(
    ("form", "wrong"),
    [
        ("return (own + shift) % c;", "return own;"),
        ('layout.owner === "step" ? 0 : promptLen', "promptLen"),
        ("Math.min(rank, blocks % c)", "0"),
        ('pages === "lockstep" && !inTurn', 'pages === "lockstep" && inTurn'),
        ("length - rounds * c * i - rank * i", "length - rounds * c * i"),
    ],
)
def test_a_wrong_form_differs(right, form, wrong):
    """Each mistake in the JavaScript shows in some setting."""
    assert FORMS.count(form) == 1
    assert by_javascript(FORMS.replace(form, wrong)) != right


def test_explore_writes_one_file_that_loads_nothing(tmp_path, monkeypatch):
    """The command writes the page, and opens it where it is asked to."""
    opened = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["explore", "--open"])
    assert (result.exit_code, result.output) == (0, "wrote explorer.html\n")
    page = (tmp_path / "explorer.html").read_text()
    assert opened == [(tmp_path / "explorer.html").as_uri()]
    assert page == explore_page()
    assert re.findall(r"<(?:link|img|iframe)\b|\bsrc=|https?:", page) == []
