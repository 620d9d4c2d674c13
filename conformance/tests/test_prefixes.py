"""Profile prefix: what may be found, and each wrong hit by the invariant that it breaks."""

from __future__ import annotations

import msgspec
import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines import load_engine
from helix_conformance.expect.recorder import Recorder
from helix_conformance.judge.play import check_trace
from helix_mutants.on_prefixes import (
    FindsPagesGivenAway,
    FindsTheLastToken,
    FindsWhatWasDealtOtherwise,
    ForgetsSalts,
    HashesOtherBlocks,
    OverHits,
    RanksLookAlone,
    SkipsInOtherBlocks,
)
from helix_spec.config import Config
from helix_spec.events import Admit, Decode, Event, Fork, Preempt, Prefix, Reason, Release, Resume
from helix_spec.trace import Trace

PROFILES = frozenset({"placement", "lengths", "pages", "prefix", "speculative", "fork", "preempt"})
LOCKSTEP = Config(layout="pr17866/1:C=2,T=2", pages=[6, 6], max_len=99)
STEP = Config(layout="pr13180/1:C=2,T=2", pages=[9, 9], max_len=99)
PREFILL = msgspec.structs.replace(LOCKSTEP, admission="prefill")
FOUND: list[Event] = [Admit(0, 9), Admit(1, 10, prefix=Prefix(0, 9))]
WHOLE: list[Event] = [Admit(0, 8), Admit(1, 8, prefix=Prefix(0, 8))]
GIVEN_AWAY: list[Event] = [
    Admit(0, 8), Release(0), Admit(1, 24), Release(1), Admit(2, 9, prefix=Prefix(0, 8)),
]  # fmt: skip
DECODED: list[Event] = [Admit(0, 3), *[Decode([0], [1])] * 7, Admit(1, 9, prefix=Prefix(0, 8))]
SALTED: list[Event] = [Admit(0, 9), Admit(1, 10, prefix=Prefix(0, 9), salt=1)]


def hits(config: Config, events: list[Event]) -> list[int | None]:
    """What the reference finds, event by event."""
    recorder = Recorder(config, PROFILES)
    found = [recorder.next(event) for event in events]
    return [expected.hit and expected.hit.taken for expected in found]


@pytest.mark.parametrize(
    ("config", "events", "hit"),
    [
        (LOCKSTEP, FOUND, 8),
        (LOCKSTEP, WHOLE, 8),
        (PREFILL, WHOLE, 4),
        (LOCKSTEP, [Admit(0, 9), Release(0), Admit(1, 9, prefix=Prefix(0, 7))], 4),
        (LOCKSTEP, GIVEN_AWAY, 0),
        (LOCKSTEP, DECODED, 8),
        (STEP, DECODED, 0),
        (LOCKSTEP, SALTED, 0),
        (LOCKSTEP, [Admit(0, 8), Fork(0, 1), Preempt(0), Resume(0, 8)], 8),
        (LOCKSTEP, [Admit(0, 8), Decode([0], [9]), Admit(1, 9, prefix=Prefix(0, 9))], 8),
    ],
)
def test_the_hit_is_what_the_specification_says(config, events, hit):
    """The last event of each finds so many tokens."""
    assert hits(config, events)[-1] == hit


@pytest.mark.parametrize(
    ("event", "reason"),
    [
        (Admit(1, 9, prefix=Prefix(5, 3)), Reason.UNKNOWN_REQUEST),
        (Admit(0, 9, prefix=Prefix(5, 3)), Reason.DUPLICATE_REQUEST),
        (Admit(1, 2, prefix=Prefix(0, 3)), Reason.BAD_COUNT),
        (Admit(1, 9, prefix=Prefix(0, 0)), Reason.BAD_COUNT),
        (Admit(1, 9, prefix=Prefix(0, 4)), Reason.BAD_COUNT),
        (Resume(0, 4), Reason.BAD_COUNT),
        (Resume(0, 3), Reason.NOT_PREEMPTED),
    ],
)
def test_a_prefix_is_refused_for_the_first_reason(event, reason):
    """Request 0 has three tokens."""
    recorder = Recorder(LOCKSTEP, PROFILES)
    recorder.next(Admit(0, 3))
    assert recorder.next(event).refused == reason


@pytest.mark.holds("HIT-1", "HIT-2", "HIT-3", "HIT-4", "HIT-5", "HIT-6", "SHARE-1")
@pytest.mark.parametrize(
    ("engine", "config", "events", "number"),
    [
        (HashesOtherBlocks, LOCKSTEP, FOUND, "HIT-5"),
        (SkipsInOtherBlocks, LOCKSTEP, FOUND, "HIT-2"),
        (FindsTheLastToken, PREFILL, WHOLE, "HIT-1"),
        (RanksLookAlone, LOCKSTEP, FOUND, "HIT-3"),
        (FindsPagesGivenAway, LOCKSTEP, GIVEN_AWAY, "HIT-4"),
        (ForgetsSalts, LOCKSTEP, SALTED, "HIT-6"),
        (FindsWhatWasDealtOtherwise, STEP, DECODED, "SHARE-1"),
    ],
)
def test_a_wrong_hit_is_named(engine, config, events, number):
    """The unmutated engine passes the same trace."""
    trace = Trace(config=config, events=events)
    failure = check_trace(LocalDriver(engine), trace, PROFILES)
    assert (number in failure.invariants, check_trace(LocalDriver(OverHits), trace, PROFILES)) == (
        True,
        None,
    )


@pytest.mark.parametrize("events", [FOUND, WHOLE, GIVEN_AWAY, DECODED, SALTED])
@pytest.mark.parametrize("config", [LOCKSTEP, STEP, PREFILL])
def test_the_index_of_helix_gpu_finds_what_is_there(config, events):
    """Its ledger, without tensors."""
    driver = LocalDriver(load_engine("gpu-ledger"))
    assert check_trace(driver, Trace(config=config, events=events), PROFILES) is None
