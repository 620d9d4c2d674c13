"""Ranks that are killed, stopped or slowed in a step: the rank is named, in time, nothing hangs."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from helix_conformance.drive.process import PoolDriver
from helix_conformance.drive.serve import as_message
from helix_conformance.judge.play import check_trace
from helix_spec.trace import Trace, Watch, dump_trace, load_trace
from suite_testing.sabotage import (
    DEADLINE_S,
    kill,
    long_trace,
    once_it_is_at,
    slow,
    stop,
    where,
    worker,
)

AT = 30
"""The event in which it happens."""


def final_state(driver: PoolDriver, trace: Trace) -> bytes:
    """What all ranks hold at the end of a trace, cached rows included, as bytes."""
    played = driver.play(trace.config, driver.profiles, trace.events, Watch(every=10**6))
    *_, (_, answers) = played
    return msgspec.json.encode(list(answers), enc_hook=as_message)


@pytest.mark.parametrize(("act", "words"), [(kill, "SIGKILL"), (stop, "timed out")])
@pytest.mark.parametrize("rank", [0, 2])
def test_a_rank_that_dies_or_stops_is_named(
    pool: PoolDriver, rank: int, act: Callable[[int], None], words: str
) -> None:
    """Its peers wait in a collective; the failure names the rank and the event, in time."""
    with once_it_is_at(rank, AT, act) as acted:
        failure = check_trace(pool, long_trace(), pool.profiles)
    ended = time.monotonic()
    assert failure is not None
    assert failure.engine_failure is not None
    began, at = acted[0], where(rank)
    print(f"\n{act.__name__} rank {rank} in event {at - 1}: {failure.engine_failure[:100]!r}, "
          f"{ended - began:.1f} s later, deadline {DEADLINE_S:g} s")  # fmt: skip
    assert f"Rank {rank} " in failure.engine_failure
    assert words in failure.engine_failure
    assert failure.event in (at - 1, at)
    with pytest.raises(AssertionError, match="0 workers"):
        worker(rank)  # none is left behind, the stopped one neither


def test_a_slow_rank_is_no_failure(pool: PoolDriver) -> None:
    """A rank that gets a tenth of its time is waited for, and every answer is right."""
    with once_it_is_at(1, AT, slow) as acted:
        assert check_trace(pool, long_trace(), pool.profiles) is None
    assert acted


def test_a_resumed_run_reaches_the_same_state(pool: PoolDriver, tmp_path: Path) -> None:
    """The trace of a run that was killed, saved and played again, ends where the whole one did."""
    trace = long_trace()
    expected = final_state(pool, trace)
    with once_it_is_at(3, AT, kill):
        failure = check_trace(pool, trace, pool.profiles)
    assert failure is not None
    assert failure.event is not None
    saved = tmp_path / "killed.json"
    saved.write_bytes(dump_trace(failure.trace))
    again = load_trace(saved)
    begun = len(again.events)
    assert AT <= begun < len(trace.events)
    assert trace.events[:begun] == again.events
    part = Trace(config=trace.config, events=trace.events[:begun])
    assert final_state(pool, part) == final_state(pool, again)
    rest = Trace(config=again.config, events=[*again.events, *trace.events[begun:]])
    assert final_state(pool, rest) == expected
    assert check_trace(pool, again, pool.profiles) is None


@pytest.mark.parametrize(("act", "words"), [(kill, "SIGKILL"), (stop, "timed out")])
def test_under_torchrun(
    pool: PoolDriver, act: Callable[[int], None], words: str, tmp_path: Path
) -> None:
    """The supervisors end in order, and the command's status and last line say what happened."""
    pool.close()  # there shall be one rank 1
    saved = tmp_path / "trace.json"
    saved.write_bytes(dump_trace(long_trace()))
    command = [
        *(sys.executable, "-m", "helix_conformance", "replay", str(saved)),
        *("--engine", "suite_testing.faulty:Beacon", "--driver", "torchrun"),
        *("--ranks", "4", "--deadline", str(DEADLINE_S)),
    ]
    with once_it_is_at(1, AT, act) as acted:
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert acted, done.stdout + done.stderr
    assert done.returncode == 3, done.stdout + done.stderr
    assert "Rank 1" in done.stdout
    assert words in done.stdout
