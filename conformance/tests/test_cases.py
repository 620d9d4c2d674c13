"""The cases that vectors are made of, and the notation of their traces."""

from __future__ import annotations

import re

import pytest

from helix_conformance.expect.cases import CASES
from helix_conformance.expect.notation import parse_events
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Preempt,
    Release,
    Resume,
    Sampled,
    Skip,
)


@pytest.mark.parametrize(
    ("text", "events"),
    [
        ("admit 0 13", [Admit(0, 13)]),
        ("admit 9007199254740992 -1", [Admit(2**53, -1)]),
        ("decode 0", [Decode([0], [1])]),
        ("decode 0:4 1 pad 3", [Decode([0, 1], [4, 1], 3)]),
        ("decode 0:-1 pad -1", [Decode([0], [-1], -1)]),
        ("decode 0: 1", [Decode([0, 1], [1])]),
        ("decode", [Decode([], [])]),
        ("skip 0:2 1", [Skip([0, 1], [2, 1])]),
        ("accept 7 2", [Accept(7, 2)]),
        ("sampled 0 1", [Sampled([0, 1])]),
        ("sampled", [Sampled([])]),
        ("fork 0 1", [Fork(parent=0, child=1)]),
        ("release 0", [Release(0)]),
        ("preempt 2", [Preempt(2)]),
        ("resume 2", [Resume(2)]),
        ("merge 0,3 null,-1", [Merge([[0, 3], [None, -1]], [0, 1])]),
        ("merge 0 null order 1 0", [Merge([[0], [None]], [1, 0])]),
    ],
)
def test_each_kind_of_event_can_be_written(text: str, events: list[Event]) -> None:
    """Wrong counts and malformed batches too: traces carry them, and engines must refuse them."""
    assert parse_events(text) == events


def test_events_are_separated_by_semicolons_and_repeated_by_a_star() -> None:
    """Spaces around them say nothing, and neither does an empty part."""
    assert parse_events("admit 0 2; decode 0 *2 ;release 0;") == [
        Admit(0, 2),
        Decode([0], [1]),
        Decode([0], [1]),
        Release(0),
    ]
    assert parse_events("") == []


KINDS = "events are of the kinds admit, decode, accept, sampled, skip, fork, release, preempt, "


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("walk 1", KINDS + "resume, merge."),
        ("*2", KINDS + "resume, merge."),
        ("admit 0", "admit takes id and prompt_len."),
        ("release 0 1", "release takes id."),
        ("fork 0 b", "Expected `int`, got `str` - at `$.child`."),
        ("admit -1 3", "Expected `int` >= 0 - at `$.id`."),
        ("decode 0 pad", "Expected `int`, got `str` - at `$.ids[1]`."),
        ("decode 0:x", "Expected `int`, got `str` - at `$.query_lens[0]`."),
        ("merge 0 none", "Expected `int | null`, got `str` - at `$.levels[1][0]`."),
        ("merge 0 1 order 1", "The order of a merge must name each of its 2 partials once."),
        ("merge", "Every partial of a merge must name a level for each of its tokens."),
        ("resume 0 *0", "Expected `int` >= 1."),
        ("resume 0 *", "Expected `int`, got `str`."),
    ],
)
def test_a_text_that_is_no_event_is_named_with_the_reason(text: str, error: str) -> None:
    """Only the part at fault is named."""
    with pytest.raises(ValueError, match=f"^{re.escape(f'`{text}` is no event: {error}')}$"):
        parse_events(f"admit 0 2; {text}; release 0")


def test_every_case_has_a_name_of_its_own() -> None:
    """Otherwise one file of the set would hide another."""
    names = [case.name for case in CASES]
    assert sorted(set(names)) == sorted(names)
