"""The normative text agrees with the code beside it."""

import re
from importlib.resources import files

import msgspec
import pytest

from helix_spec.events import Event, Reason
from helix_spec.invariants import NUMBERS, sentence
from helix_spec.layouts import NAMED_LAYOUTS, LayoutError, parse_layout
from helix_spec.theorems import catalog
from helix_spec.values import Tensor, entry, token_state

TEXT = files("helix_spec").joinpath("SPEC.md").read_text(encoding="utf-8")
PARAGRAPH = re.compile(r"^\*\*(\w+-\d)\*\* \(profile ([^;()]+); held by: ([^()]+)\) (.+)$")


def test_the_sections_are_the_ones_that_code_cites() -> None:
    """Section numbers and titles are fixed."""
    assert re.findall(r"^## (.+)$", TEXT, re.MULTILINE) == [
        "1 What this is",
        "2 Words",
        "3 Layouts",
        "4 Configuration",
        "5 Events",
        "6 Refusals",
        "7 Invariants",
        "8 Values",
        "9 Equality of attention outputs",
        "10 What an engine returns",
        "11 Worked examples",
        "12 How engines place cache groups",
        "13 How engines find prefixes",
    ]


def test_every_invariant_has_one_paragraph() -> None:
    """Each number starts exactly one paragraph, in the order in which failures are named."""
    paragraphs = [part for part in TEXT.split("\n\n") if part.startswith("**")]
    found = [PARAGRAPH.match(part) for part in paragraphs]
    assert None not in found
    sizes = {
        "OWN": 3, "LEN": 3, "POS": 2, "BAL": 3, "GROW": 1, "EQ": 1, "PAGE": 5, "REP": 1,
        "POOL": 1, "WIN": 2, "HIT": 6, "SHARE": 1, "ATT": 4,
        "DUM": 1, "MAP": 1, "REF": 2, "LIVE": 1,
    }  # fmt: skip
    expected = [f"{family}-{n}" for family, size in sizes.items() for n in range(1, size + 1)]
    assert [match[1] for match in found if match] == expected


def test_every_event_reason_and_layout_name_is_in_the_text() -> None:
    """No word of the vocabulary is left out."""
    words = [str(reason) for reason in Reason] + list(NAMED_LAYOUTS)
    assert [word for word in words if f"`{word}`" not in TEXT] == []
    events = [msgspec.inspect.type_info(event).tag for event in Event.__args__]  # type: ignore[attr-defined]
    assert [event for event in events if f"| `{event}(" not in TEXT] == []


def test_the_reasons_stand_in_their_order() -> None:
    """The table of refusals lists the reasons in the order of the code."""
    table = TEXT[TEXT.index("## 6 ") : TEXT.index("## 7 ")]
    listed = re.findall(r"^\| \d? ?\| `(\w+)` \|", table, re.MULTILINE)
    assert listed == [str(reason) for reason in Reason if reason != Reason.BAD_CONFIG]


def test_the_named_layouts_are_those_of_the_table() -> None:
    """Section 3.6 and the code give each name the same four parts."""
    for name, rule in NAMED_LAYOUTS.items():
        interleave = "(I)" if rule.prompt == "interleave" else ""
        parts = [rule.prompt + interleave, rule.owner + interleave, rule.pages, rule.start]
        assert f"| `{name}` | {' | '.join(parts)} |" in TEXT


@pytest.mark.parametrize("text", sorted(set(re.findall(r"\w+/1:[^`\s]*[TI]=\d+", TEXT))))
def test_every_identifier_in_the_text_is_one(text: str) -> None:
    """Examples can be copied."""
    try:
        parse_layout(text)
    except LayoutError as error:
        pytest.fail(str(error))


@pytest.mark.parametrize("tensor", ["q", "k", "v"])
def test_the_values_of_example_11_8(tensor: Tensor) -> None:
    """The printed states and entries are those of the code."""
    state = token_state(7, event=3, place=2, position=16, layer=1, tensor=tensor)
    heads = (", ".join(str(entry(state, head, dim)) for dim in range(4)) for head in range(2))
    assert f"| {tensor.upper()} | 0x{state:08x} | {' | '.join(heads)} |" in TEXT


def test_what_holds_each_invariant_is_said():
    """The text says of each invariant whether theorems prove it and whether traces check it."""
    proved = {number for theorem in catalog.theorems().values() for number in theorem.proves}
    for number in NUMBERS:
        held = sentence(number).partition("held by: ")[2].partition(")")[0]
        assert held.startswith("proved") == (number in proved), number
        assert (held == "proved") == (number == "EQ-1"), number
        assert held in ("proved", "checked on traces", "proved and checked on traces"), number
