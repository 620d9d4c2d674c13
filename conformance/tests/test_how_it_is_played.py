"""What must not matter: when state is looked at, what objects have played before, how often.

Each way of playing is part of a trace, so that a failure that needs it can be played again.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

import msgspec
import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.opening import open_driver
from helix_conformance.drive.process import StdioDriver
from helix_conformance.judge import play
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.play import check_trace
from helix_conformance.report.text import circumstances
from helix_conformance.session import layout_traces, random_traces
from helix_mutants.on_runs import LookedIntoShape, StartedAgainWithLess
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config
from helix_spec.engine import RankView
from helix_spec.events import Admit, Decode
from helix_spec.trace import Earlier, Trace, Watch, dump_trace, load_trace

CONFIG = Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=40)
EVENTS = [Admit(0, 3), Decode([0], [1])]
PLAIN = Trace(config=CONFIG, events=EVENTS)


class Bookkeeping(ReferenceEngine):
    """The reference, without caches."""

    profiles: ClassVar = ReferenceEngine.profiles - {"cache", "attention"}


def failure_of(engine: type, trace: Trace) -> Failure | None:
    """What one trace shows."""
    return check_trace(LocalDriver(engine), trace, engine.profiles)


def found(engine: type) -> Failure:
    """The failure that random traces find."""
    driver = LocalDriver(engine)
    draw = layout_traces(driver, "pr9757", driver.profiles, cp_sizes=[1, 2])
    failure = random_traces(driver, draw, driver.profiles, examples=400, seed=0, tally=Tally())
    assert failure is not None
    return failure


@pytest.mark.holds("PAGE-3")
def test_objects_that_have_played_before_are_started_again() -> None:
    """What is left of an earlier trace is found, and the failing trace holds what it needs."""
    assert failure_of(StartedAgainWithLess, PLAIN) is None
    failure = found(StartedAgainWithLess)
    assert failure.invariants == {"PAGE-3"}
    assert len(failure.trace.before) + failure.trace.times > 1
    assert "".join(circumstances(failure.trace))
    assert failure_of(StartedAgainWithLess, failure.trace) is not None


@pytest.mark.holds("LEN-2")
def test_a_look_must_not_be_needed() -> None:
    """Who is right only where somebody looks after each event is found, and told when it shows."""
    assert failure_of(LookedIntoShape, PLAIN) is None
    failure = found(LookedIntoShape)
    assert failure.invariants == {"LEN-2"}
    assert failure.trace.watch != Watch()
    assert "It depends on when state is looked at" in "".join(circumstances(failure.trace))


def test_a_look_is_taken_twice() -> None:
    """The second one counts."""

    class Counting(Bookkeeping):
        looks = 0

        def observe(self, ids: Sequence[int] | None = None) -> RankView:
            Counting.looks += 1
            return super().observe(ids)

    assert failure_of(Counting, msgspec.structs.replace(PLAIN, watch=Watch(twice=True))) is None
    ranks, at_the_end = 2, 1
    assert Counting.looks == ranks * (2 * len(EVENTS) + at_the_end)


def test_the_way_of_playing_is_stored(tmp_path: Path) -> None:
    """A file says it, and a plain trace has no word of it."""
    path = tmp_path / "trace.json"
    whole = msgspec.structs.replace(
        PLAIN, watch=Watch(every=3, twice=True), before=[Earlier(CONFIG, EVENTS)], times=2
    )
    for trace in (whole, PLAIN):
        path.write_bytes(dump_trace(trace))
        assert load_trace(path) == trace
    assert not any(name in path.read_text() for name in ("watch", "before", "times", "chunk"))


def test_traces_of_version_1_are_read(tmp_path: Path) -> None:
    """As they were written."""
    path = tmp_path / "trace.json"
    path.write_text(dump_trace(PLAIN).decode().replace("helix-trace/2", "helix-trace/1"))
    assert load_trace(path).events == EVENTS


def test_what_came_before_must_be_legal(tmp_path: Path) -> None:
    """Like the trace itself; the message names the place."""
    path = tmp_path / "trace.json"
    illegal = msgspec.structs.replace(CONFIG, pages=[1])
    path.write_bytes(dump_trace(msgspec.structs.replace(PLAIN, before=[Earlier(illegal, EVENTS)])))
    with pytest.raises(ValueError, match=r"field \$\.before\[0\]\.config"):
        load_trace(path)


def test_a_served_engine_is_started_again() -> None:
    """Over pipes too the same object plays on."""
    driver = StdioDriver("helix_mutants.on_runs:StartedAgainWithLess")
    try:
        again = msgspec.structs.replace(PLAIN, before=[Earlier(CONFIG, EVENTS)])
        assert check_trace(driver, PLAIN, driver.profiles) is None
        failure = check_trace(driver, again, driver.profiles)
    finally:
        driver.close()
    assert failure is not None
    assert failure.invariants == {"PAGE-3"}


@pytest.mark.holds("PAGE-3")
@pytest.mark.parametrize("kind", ["stdio", "local"])
def test_a_failure_that_new_processes_do_not_show_is_handed_over_with_what_it_needs(
    kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The traces before it, which the file holds; played again on new processes it fails."""
    monkeypatch.setattr(play, "REDUCTION_LIMIT_S", 1.0)
    driver = open_driver("suite_testing.broken:Haunted", kind)
    try:
        draw = layout_traces(driver, "pr9757", driver.profiles, cp_sizes=[1])
        failure = random_traces(driver, draw, driver.profiles, examples=100, seed=0, tally=Tally())
        assert failure is not None
        assert failure.trace.before
        assert "It depends on earlier traces" in "".join(circumstances(failure.trace))
        assert driver.renew()
        assert check_trace(driver, failure.trace, driver.profiles) is not None
    finally:
        driver.close()
