"""Suspicions are tried: DUM-1 and ATT-3 are named where the trace is right without the suspect."""

from __future__ import annotations

import pytest

from helix_conformance.judge.causes import tried
from helix_conformance.judge.failure import Violation
from helix_spec.config import Config
from helix_spec.events import Admit, Decode
from helix_spec.trace import Trace

CONFIG = Config(layout="pr9757/1:C=2,T=4", pages=[1, 1], max_len=10)
PADDED = Trace(config=CONFIG, events=[Admit(0, 1), Decode([0], [1], 2)])
PLAIN = Trace(config=CONFIG, events=[Admit(0, 1), Decode([0], [1])])


def names(trace, found, named_by) -> list[str]:
    """What is named after the trials."""
    return [v.invariant for v in tried(trace, [Violation(n, "") for n in found], named_by)]


@pytest.mark.holds("DUM-1")
def test_padding_is_to_blame_where_the_trace_is_right_without_it() -> None:
    """DUM-1 is named though the judge saw damage inside the batch only."""
    assert names(PADDED, ["OWN-1"], lambda trace: set()) == ["OWN-1", "DUM-1"]


@pytest.mark.holds("DUM-1")
def test_padding_is_not_to_blame_for_what_happens_without_it() -> None:
    """DUM-1 is withdrawn when the same invariant fails without dummies."""
    assert names(PADDED, ["OWN-1", "DUM-1"], lambda trace: {"OWN-1"}) == ["OWN-1"]


def test_the_trial_plays_the_trace_without_its_dummies() -> None:
    """Nothing but the padding differs."""
    played = []
    names(PADDED, ["OWN-1"], lambda trace: played.append(trace) or set())
    assert played == [PLAIN]


@pytest.mark.holds("ATT-3")
def test_an_empty_rank_is_not_to_blame_for_what_happens_without_one() -> None:
    """ATT-3 is withdrawn when outputs are wrong though every rank holds keys."""
    found = ["ATT-1", "ATT-3", "ATT-4"]
    assert found == names(PLAIN, found, lambda trace: set())
    assert names(PLAIN, found, lambda trace: {"ATT-1", "ATT-4"}) == ["ATT-1", "ATT-4"]


def test_the_trial_gives_every_rank_keys_and_room() -> None:
    """Each prompt is a super-block longer, and fits."""
    played = []
    names(PLAIN, ["ATT-1", "ATT-3"], lambda trace: played.append(trace) or set())
    assert played[0].events == [Admit(0, 9), Decode([0], [1])]
    assert (played[0].config.max_len, played[0].config.pages) == (18, [105, 105])
