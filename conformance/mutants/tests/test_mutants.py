"""The suite against a sample of the mutants; `make zoo` plays them all."""

from __future__ import annotations

from statistics import median

import pytest

from helix_conformance.engines import load_engine
from helix_conformance.report.stream import MutationRun
from helix_conformance.session import Session
from helix_mutants.parts import MUTANTS, rebound
from helix_mutants.run import TIERS, mutants_of, mutation_run
from helix_spec.engine import PROFILES
from helix_spec.invariants import NUMBERS

SEED = 6
"""One whose first traces are short, for time; `make sweep` plays ten."""


@pytest.fixture(scope="module")
def seen() -> MutationRun:
    """One mutation run, for all tests."""
    return mutation_run("sample", SEED)


@pytest.mark.holds(*{number: None for mutant in mutants_of("sample") for number in mutant.expected})
def test_each_is_killed_by_name(seen: MutationRun) -> None:
    """The run fails and names an invariant that is expected of the mutant."""
    assert [(kill.name, kill.by) for kill in seen.mutants if not kill.killed] == []
    assert seen.score == f"{len(seen.mutants)}/{len(seen.mutants)}"


def test_unmutated_engines_stay_green(seen: MutationRun) -> None:
    """Under the same settings nothing is named for an engine that is right."""
    assert len(seen.controls) == 4
    assert not any(seen.controls.values())


def test_minimal_traces_have_at_most_six_events(seen: MutationRun) -> None:
    """At least nine in ten are told in six events or fewer."""
    small = [kill for kill in seen.mutants if kill.events <= 6]
    assert len(small) / len(seen.mutants) >= 0.9


def test_the_median_mutant_needs_few_examples(seen: MutationRun) -> None:
    """Half of them fall within a hundred random traces."""
    assert median(kill.examples for kill in seen.mutants) <= 100


def test_every_mutant_is_on_record() -> None:
    """Names differ, engines load, what is expected is of SPEC.md, and each says what is wrong."""
    assert len(MUTANTS) == len({mutant.name for mutant in MUTANTS})
    for mutant in MUTANTS:
        engine = load_engine(mutant.engine)
        assert f"Source: {mutant.source}." in engine.__doc__
        assert mutant.expected and set(mutant.expected) <= set(NUMBERS)
        assert set(mutant.profiles) <= set(PROFILES)
        assert mutant.tier in TIERS["all"]


@pytest.mark.slow
def test_what_shows_at_far_positions_alone_is_named_by_a_run(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The one trace that a run has there is enough; `make zoo` plays it to others of the kind."""
    monkeypatch.setattr("helix_conformance.judge.play.REDUCTION_LIMIT_S", 1.0)
    mutant = next(mutant for mutant in MUTANTS if mutant.name == "length_in_float32")
    session = Session(mutant.engine)
    session.random(["balanced"], [], 1)
    assert session.summary() == "fail"
    named = {violation.invariant for line in session.failures for violation in line.violations}
    assert not named.isdisjoint(mutant.expected)


def test_a_name_that_a_function_does_not_use_cannot_be_rebound() -> None:
    """A mutant whose part has moved is an error, not an engine that is right."""
    with pytest.raises(ValueError, match="does not use merge"):
        rebound(load_engine, merge=None)
