"""Coverage: what a run visited, and what it missed."""

from __future__ import annotations

from helix_conformance.coverage import SITUATIONS, Coverage
from helix_conformance.drivers.local import LocalDriver
from helix_conformance.runs import Tally, check_trace, profiles_to_check, random_traces
from helix_conformance.strategies import configs, traces
from helix_reference.engine import ReferenceEngine
from helix_spec.configs import Config
from helix_spec.events import FEATURES, Admit, Decode, Fork, Preempt, Release, Resume, Skip
from helix_spec.traces import Trace

PROFILES = profiles_to_check(ReferenceEngine.profiles, ["pages", *FEATURES])


def visited(events, *, layout="pr9757/1:C=2,T=2", pages=9, overlap=False) -> set[str]:
    """The situations that one trace visits."""
    config = Config(layout=layout, pages=[pages, pages], max_len=8, overlap=overlap)
    coverage = Coverage(FEATURES)
    trace = Trace(config=config, events=events)
    assert None is check_trace(LocalDriver(ReferenceEngine), trace, PROFILES, coverage=coverage)
    return {name for name, count in coverage.counts.items() if count}


def test_random_traces_visit_every_situation() -> None:
    """Three hundred traces of all layouts have been everywhere that matters."""
    coverage, driver = Coverage(FEATURES), LocalDriver(ReferenceEngine)
    strategy = traces(configs=configs(contents=False))
    failure = random_traces(
        driver, strategy, PROFILES, examples=300, seed=1, tally=Tally(), coverage=coverage
    )
    assert (None, []) == (failure, coverage.missed)


def test_a_run_that_misses_a_situation_says_so() -> None:
    """Nothing is visited by nothing; what needs a feature is not missed without it."""
    assert set(SITUATIONS) == set(Coverage(FEATURES).missed)
    missed = Coverage([]).missed
    assert {"empty rank", "refused: out_of_pages"} <= set(missed)
    assert not {"copy on write", "padded batch", "resumed"} & set(missed)


def test_each_situation_is_known_when_it_occurs() -> None:
    """Short traces that are in one situation and not in its neighbours."""
    assert "empty rank" in visited([Admit(0, 1), Decode([0], [1])])
    assert "empty rank" not in visited([Admit(0, 3), Decode([0], [1])])
    assert "page boundary" in visited([Admit(0, 2), Decode([0], [1])])
    assert "page boundary" not in visited([Admit(0, 1), Decode([0], [1])])
    assert "ownership wrap" in visited([Admit(0, 1), *[Decode([0], [1])] * 5])
    assert "ownership wrap" not in visited([Admit(0, 1), *[Decode([0], [1])] * 4])
    assert "boundary inside a group" in visited([Admit(0, 1), Decode([0], [3])])
    assert "boundary inside a group" not in visited([Admit(0, 1), Decode([0], [2])])
    assert "skip, then decode" in visited([Admit(0, 1), Skip([0], [1]), Decode([0], [1])])
    assert "copy on write" in visited([Admit(0, 1), Fork(0, 1), Decode([0], [1])])
    assert "copy on write" not in visited([Admit(0, 2), Fork(0, 1), Decode([0], [1])])
    assert "released page used again" in visited([Admit(0, 1), Release(0), Admit(1, 1)])
    assert "id admitted again" in visited([Admit(0, 1), Release(0), Admit(0, 1)])
    assert "resumed" in visited([Admit(0, 1), Preempt(0), Resume(0)])
    assert "max_len reached" in visited([Admit(0, 7), Decode([0], [1])])
    full = [Admit(0, 3), Admit(1, 1), Release(0), Admit(1, 1), Admit(1, 1)]
    assert "refused: duplicate_request" in visited(full)
    retried = [Admit(0, 2), Admit(1, 1), Release(0), Admit(1, 1)]
    assert {"refusal, then retry", "one pool exhausted alone"} <= visited(retried, pages=1)
    assert "two decodes outstanding" in visited(
        [Admit(0, 1), Decode([0], [1]), Decode([0], [1])], overlap=True
    )
