"""Ranks as threads: the real exchange, and nothing hangs."""

from __future__ import annotations

import pytest

from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines.gpu import GpuEngine
from helix_conformance.judge.play import check_trace
from helix_spec.config import Config, ModelShape
from helix_spec.events import Admit, Decode
from helix_spec.trace import Trace

MODEL = ModelShape(q_heads=8, kv_heads=2, layers=2)
CONFIG = Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=50, model=MODEL, tp_size=2)
TRACE = Trace(config=CONFIG, events=[Admit(0, 5), *[Decode([0], [1])] * 3])


class Raises(GpuEngine):
    """Rank 1 raises in its second decode, after its peers have sent."""

    steps = 0

    def apply(self, event):
        self.steps += isinstance(event, Decode)
        if self.rank == 1 and self.steps == 2:
            raise RuntimeError("lost")
        return super().apply(event)


class LeavesOut(GpuEngine):
    """Rank 3 answers its second decode without taking part in it."""

    steps = 0

    def apply(self, event):
        self.steps += isinstance(event, Decode)
        if self.rank == 3 and self.steps == 2:
            return super().apply(Decode([99], [1]))
        return super().apply(event)


@pytest.fixture
def driver_of():
    """Makes drivers, and ends their threads."""
    made = []

    def make(engine):
        made.append(ThreadDriver(engine))
        return made[-1]

    yield make
    for driver in made:
        driver.close()


def test_the_implementation_is_right_as_threads(driver_of) -> None:
    """Two groups of two ranks exchange and merge exactly, trace after trace."""
    driver = driver_of(GpuEngine)
    for _ in range(2):
        assert check_trace(driver, TRACE, driver.profiles) is None


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize(
    ("engine", "says"),
    [
        (Raises, "Rank 1 raised RuntimeError: lost (at event 2)."),
        (LeavesOut, "Rank 3 skipped a collective that rank 2 is blocked in (at event 2)."),
    ],
)
def test_a_rank_that_fails_is_named_and_its_peers_end(driver_of, engine, says) -> None:
    """The rank to blame is reported at once, with its event; the next trace plays."""
    driver = driver_of(engine)
    for _ in range(2):
        failure = check_trace(driver, TRACE, driver.profiles)
        assert (says, 3) == (failure.engine_failure, len(failure.trace.events))


def test_a_failure_is_an_engine_failure(driver_of) -> None:
    """`play` raises what every driver raises."""
    from helix_spec.trace import Watch

    driver = driver_of(Raises)
    with pytest.raises(EngineFailure):
        list(driver.play(CONFIG, driver.profiles, TRACE.events, Watch()))
