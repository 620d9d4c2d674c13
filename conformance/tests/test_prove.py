"""The gate of `prove`: all theorems once as they are, and what must make it fail."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

import helix_spec
from helix_conformance import prove as proving
from helix_conformance.prove import Catalog, ProveError, gate, prove
from helix_conformance.report.stream import Kill, TheoremResult

pytest.importorskip("z3")
pytest.importorskip("crosshair")

from helix_spec.theorems.catalog import theorems  # after the check that z3 is there

SPEC = Path(helix_spec.__file__).parent


def run(json_path: Path, **settings: object) -> tuple[int, str]:
    """The exit status and what was shown."""
    shown = io.StringIO()
    console = Console(file=shown, width=200)
    status = prove(json_path, console=console, **settings)
    return status, shown.getvalue()


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of the specification, to be spoiled."""
    shutil.copytree(SPEC, tmp_path / "helix_spec", ignore=shutil.ignore_patterns("__pycache__"))
    return tmp_path


@pytest.fixture
def spoil(copy: Path) -> Callable[[str, str, str], None]:
    """Replaces a text that occurs once in a file of the copy."""

    def replace(file: str, right: str, wrong: str) -> None:
        path = copy / "helix_spec" / file
        text = path.read_text()
        assert text.count(right) == 1, right
        path.write_text(text.replace(right, wrong))

    return replace


@pytest.mark.holds(*{number: None for one in theorems().values() for number in one.proves})
@pytest.mark.slow
@pytest.mark.timeout(240)
def test_every_theorem_is_confirmed(tmp_path: Path) -> None:
    """The whole manifest; the JSON file, the table and the exit status say the same."""
    status, shown = run(tmp_path / "proof.json")
    report = json.loads((tmp_path / "proof.json").read_text())
    assert report["problems"] == []
    assert (status, report["verdict"]) == (0, "pass")
    manifest = (SPEC / "theorems" / "manifest.txt").read_text().splitlines()
    listed = [line for line in manifest if line and not line.startswith("#")]
    assert [theorem["id"] for theorem in report["theorems"]] == listed
    assert {theorem["method"] for theorem in report["theorems"]} == {"z3", "crosshair"}
    for theorem in report["theorems"]:
        assert theorem["verdict"] == "confirmed"
        assert theorem["witness"]
        assert theorem["kills"]
        assert theorem["id"] in shown
    assert f"{len(listed)} of {len(listed)} theorems confirmed" in shown


# A specification that is wrong in one place, and the theorems that say so.


@pytest.mark.parametrize(
    ("right", "wrong", "theorem"),
    [
        ("return position // i % c\n", "return position // i % c + 1\n", "owner-in-range"),
        ("return position // i % c\n", "return position // i % c + 1\n", "contract-chunk-owner"),
        ("    return -(-a // b)\n", "    return a // b + 1\n", "contract-ceil-div"),
        ("    return -(-a // b)\n", "    return a // b + 1\n", "ceil-div"),
        ("* c * i - rank * i, i))", "* c * i - rank * i, i + 1))", "chunk-count-step"),
        (
            "    return index // tokens_per_block, index % tokens_per_block\n",
            "    return index // tokens_per_block, index % tokens_per_block + 1\n",
            "slot-is-page-and-offset",
        ),
    ],
)
def test_a_closed_form_that_is_off_by_one_is_named(
    copy: Path,
    spoil: Callable[[str, str, str], None],
    right: str,
    wrong: str,
    theorem: str,
) -> None:
    """Exit status 1, and the theorem is named with what stands against it."""
    spoil("placement.py", right, wrong)
    status, shown = run(copy / "proof.json", spec_root=copy, only=[theorem])
    assert status == 1
    assert f"not proved {theorem}: " in shown
    assert json.loads((copy / "proof.json").read_text())["verdict"] == "fail"


def test_a_theorem_that_vanished_fails(copy: Path, spoil: Callable[[str, str, str], None]) -> None:
    """Also when only others are asked for: the manifest counts."""
    spoil("theorems/ownership.py", '    "owner-starts-at-zero",\n', '    "owner-starts",\n')
    status, shown = run(copy / "proof.json", spec_root=copy, only=["owner-in-range"])
    assert status == 1
    assert "owner-starts-at-zero: is in the manifest, but there is no such theorem" in shown
    assert "owner-starts: is not in the manifest" in shown


def test_a_contract_that_nobody_confirms_fails(
    copy: Path, spoil: Callable[[str, str, str], None]
) -> None:
    """A contract in a docstring has to be reached."""
    spoil(
        "placement.py",
        '    """Return how many pages a rank holds for a request, shared ones included (PAGE-1).\n',
        '    """Return the pages of a rank.\n\n    post: _ >= 0\n',
    )
    status, shown = run(copy / "proof.json", spec_root=copy, only=["owner-in-range"])
    assert status == 1
    assert "placement.pages_needed: has a contract that no theorem is about" in shown


def test_a_contract_that_is_false_fails(copy: Path, spoil: Callable[[str, str, str], None]) -> None:
    """CrossHair's counterexample is shown."""
    spoil("placement.py", "    post: _ % base == low\n", "    post: _ % base == low + 1\n")
    status, shown = run(copy / "proof.json", spec_root=copy, only=["contract-joined"])
    assert status == 1
    assert "not proved contract-joined: " in shown


def test_a_precondition_that_nothing_meets_fails(
    copy: Path, spoil: Callable[[str, str, str], None]
) -> None:
    """CrossHair alone would exit with 0; the witness tells."""
    spoil("placement.py", "    pre: b > 0\n", "    pre: b > 0 and b < 0\n")
    status, shown = run(copy / "proof.json", spec_root=copy, only=["contract-ceil-div"])
    assert status == 1
    assert "contract-ceil-div: its assumptions are not met by its witness" in shown


def test_a_wrong_formula_that_survives_fails(
    copy: Path, spoil: Callable[[str, str, str], None]
) -> None:
    """Here the wrong formula is the right one."""
    spoil("theorems/mutations.py", "return (position // i + 1) % c", "return position // i % c")
    status, shown = run(copy / "proof.json", spec_root=copy, only=["owner-starts-at-zero"])
    assert status == 1
    assert "owner-starts-at-zero: survived by a wrong formula: Owner one rank on" in shown


def test_callers_hold_for_any_rule_only_as_far_as_its_contract_goes(
    copy: Path, spoil: Callable[[str, str, str], None]
) -> None:
    """Asked twice, a rule may answer differently: CrossHair takes the contract, not the body."""
    spoil(
        "theorems/callers.py",
        "    owner = any_owner(position, c)\n    return (owner == one) + (owner == other)\n",
        "    return (any_owner(position, c) == one) + (any_owner(position, c) == other)\n",
    )
    status, shown = run(copy / "proof.json", spec_root=copy, only=["contract-one-active-rank"])
    assert status == 1
    assert "contract-one-active-rank: not confirmed: CrossHair: false when calling" in shown


def test_a_run_of_some_theorems_is_never_a_whole_one(tmp_path: Path) -> None:
    """Nothing is missing among those asked for, yet the verdict is not `pass`."""
    status, _ = run(tmp_path / "proof.json", only=["ceil-div", "owner-in-range"])
    assert status == 0
    report = json.loads((tmp_path / "proof.json").read_text())
    assert report["verdict"] == "partial"
    assert [theorem["id"] for theorem in report["theorems"]] == ["ceil-div", "owner-in-range"]


def test_an_unknown_theorem_is_refused(tmp_path: Path) -> None:
    """Before anything is proved."""
    with pytest.raises(ProveError, match="no theorem nonsense"):
        run(tmp_path / "proof.json", only=["nonsense"])


def test_a_specification_that_does_not_load_is_told(
    copy: Path, spoil: Callable[[str, str, str], None]
) -> None:
    """No theorem could be listed: nothing is proved, and nothing is refuted either."""
    spoil("theorems/euclid.py", "from __future__ import annotations\n", "import nonsense\n")
    with pytest.raises(ProveError, match="No module named 'nonsense'"):
        run(copy / "proof.json", spec_root=copy)


# The gate itself.

GOOD = TheoremResult(id="a", verdict="confirmed", kills=[Kill("wrong", {"x": 1})])
CATALOG = Catalog(["a"], ["a"], [])


def test_the_gate_passes_what_is_whole() -> None:
    """One theorem, confirmed, with a wrong formula refuted."""
    assert gate(CATALOG, ["a"], [GOOD]) == []


@pytest.mark.parametrize(
    ("catalog", "results", "said"),
    [
        (CATALOG, [], "a: was not tried"),
        (Catalog(["a", "b"], ["a"], []), [GOOD], "b: is in the manifest, but"),
        (Catalog(["a"], ["a", "b"], []), [GOOD], "b: is not in the manifest"),
        (Catalog(["a", "a"], ["a"], []), [GOOD], "names a theorem twice"),
        (Catalog(["a"], ["a"], ["f"]), [GOOD], "f: has a contract that no theorem is about"),
        (CATALOG, [TheoremResult(id="a", verdict="Confirmed.")], "a: Confirmed."),
        (CATALOG, [TheoremResult(id="a", verdict="not confirmed: slow")], "a: not confirmed"),
        (CATALOG, [TheoremResult(id="a", verdict="confirmed")], "no wrong formula is refuted"),
        (
            CATALOG,
            [TheoremResult(id="a", verdict="confirmed", kills=[Kill("same", None)])],
            "a: survived by a wrong formula: same",
        ),
    ],
)
def test_the_gate_fails_what_is_not(
    catalog: Catalog, results: list[TheoremResult], said: str
) -> None:
    """Each way to be less than whole has its sentence."""
    problems = gate(catalog, catalog.manifest, results)
    assert len(problems) == 1
    assert said in problems[0]


def test_a_process_that_dies_is_no_confirmation(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is named, with its last words."""
    monkeypatch.setattr(proving.sys, "executable", str(_dying(tmp_path)))
    result = proving._confirm(tmp_path, "a")
    assert (result.id, result.verdict) == ("a", "not confirmed: its process failed: out of luck")


def _dying(folder: Path) -> Path:
    script = folder / "python"
    script.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    script.chmod(0o755)
    return script
