"""The recorder: what it adds to the reference, and how often a trace is played."""

from __future__ import annotations

import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.expect.expectation import Expectation
from helix_conformance.expect.recorder import Recorder
from helix_conformance.session import Tally, layout_traces, random_traces
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config
from helix_spec.engine import PROFILES
from helix_spec.events import (
    FEATURES,
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Preempt,
    Reason,
    Sampled,
)

CONFIG = Config(layout="pr9757/1:C=1,T=2", pages=[2], max_len=20)


@pytest.mark.holds("PAGE-5", "REF-2")
@pytest.mark.parametrize(
    "event",
    [
        Decode([0], [2]),
        Decode([0], [1], 1),
        Accept(0, 0),
        Fork(0, 1),
        Preempt(0),
        Sampled([0]),
        Merge([[0]], [0]),
    ],
)
def test_an_event_of_a_feature_that_is_not_declared_is_unsupported(event: Event) -> None:
    """It is refused before any other reason is looked for, and changes nothing but the index."""
    recorder = Recorder(CONFIG, {"placement"})
    assert recorder.next(event).refused == Reason.UNSUPPORTED
    assert (list(recorder.state.live), recorder.next(Admit(0, 3)).index) == ([], 1)


@pytest.mark.holds("OWN-1")
def test_tokens_are_told_apart_by_the_index_of_their_event() -> None:
    """An unsupported event counts: the tokens after it are of the next index."""
    recorder = Recorder(CONFIG, {"placement", "pages"})
    recorder.next(Fork(3, 4))
    recorder.next(Admit(0, 2))
    assert recorder.state.requests[0].tokens == [(1, 0), (1, 1)]


@pytest.mark.holds("REF-2")
def test_an_engine_without_pages_never_runs_out_of_them() -> None:
    """Its pools are endless; one that declares `pages` has those of the configuration."""
    refused = [Recorder(CONFIG, declared).next(Admit(0, 5)).refused for declared in ([], PROFILES)]
    assert refused == [None, Reason.OUT_OF_PAGES]


def test_a_random_trace_is_played_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A passing run plays each event once to draw what follows, and once to judge the answers."""
    played = list[Event]()
    play = Recorder.next

    def counted(self: Recorder, event: Event) -> Expectation:
        played.append(event)
        return play(self, event)

    monkeypatch.setattr(Recorder, "next", counted)
    driver, tally = LocalDriver(ReferenceEngine), Tally()
    profiles = frozenset({"placement", "lengths", "pages", *FEATURES})
    draw = layout_traces(driver, "pr9757", profiles, cp_sizes=[1, 2, 4])
    failure = random_traces(driver, draw, profiles, examples=20, seed=0, tally=tally)
    assert (failure, tally.traces, len(played)) == (None, 20, 2 * tally.events)
