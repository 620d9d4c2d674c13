"""How a run draws its traces: the same ones from a seed, and each for itself."""

from __future__ import annotations

import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.generate.drawing import Evenly
from helix_conformance.generate.strategies import configs, traces
from helix_conformance.judge.coverage import Tally
from helix_conformance.session import profiles_to_check, random_traces
from helix_spec.engine import Outcome
from helix_spec.events import FEATURES, Event
from helix_spec.trace import Trace

PROFILES = profiles_to_check(LedgerEngine.profiles, [])


def drawn(seed: int) -> list[Trace]:
    """The traces that a run of this seed plays."""
    played: list[Trace] = []

    def seen(trace: Trace) -> Trace:
        played.append(trace)
        return trace

    strategy = traces(configs=configs(contents=False)).map(seen)
    driver = LocalDriver(LedgerEngine)
    assert None is random_traces(driver, strategy, PROFILES, examples=30, seed=seed, tally=Tally())
    return played


def test_a_seed_gives_the_same_traces_again() -> None:
    """Nothing but the seed decides, and another seed gives others."""
    assert drawn(3) == drawn(3)
    assert drawn(3) != drawn(4)


def test_traces_are_drawn_one_by_one() -> None:
    """No trace is a variation of the one before, from the very beginning."""
    layouts = [(trace.config.layout, trace.config.pages) for trace in drawn(0)]
    assert 25 <= len(set(map(str, layouts)))


def test_a_run_that_an_engine_ends_advises_nothing_of_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Hypothesis's advice to add a seed, which no user of the suite could, is not printed."""

    class Raises(LedgerEngine):
        def apply(self, event: Event) -> Outcome:
            raise RuntimeError("lost")

    driver, strategy = LocalDriver(Raises), traces(configs=configs(contents=False))
    driver.survives_failure = False
    failure = random_traces(driver, strategy, PROFILES, examples=30, seed=0, tally=Tally())
    assert failure is not None and "error" == failure.verdict
    assert ("", "") == capsys.readouterr()


def test_what_no_trace_holds_is_refused() -> None:
    """The backend says so when a strategy asks for what it does not draw."""
    evenly = Evenly(None)
    for draw in (evenly.draw_float, evenly.draw_string, evenly.draw_bytes, evenly.draw_integer):
        with pytest.raises(NotImplementedError):
            draw()


def test_features_are_all_drawn() -> None:
    """Ninety traces hold every kind of event that the features allow."""
    played = [trace for seed in (1, 2, 3) for trace in drawn(seed)]
    kinds = {type(event).__name__ for trace in played for event in trace.events}
    assert 9 == len(kinds) and 5 == len(FEATURES)
