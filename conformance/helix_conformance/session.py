"""Random traces, stored traces and workloads through a driver."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Final

import msgspec

from helix_conformance.drive.asking import ill_typed
from helix_conformance.drive.driver import Answer, Driver, EngineFailure, Watch
from helix_conformance.expect.expectation import Expectation
from helix_conformance.expect.recorder import Recorder
from helix_conformance.expect.vectors import Vector, expectations
from helix_conformance.generate.choices import Choices, Seeded
from helix_conformance.generate.configs import draw_config
from helix_conformance.generate.traces import draw_merge_trace, draw_trace
from helix_conformance.generate.workload import Request, schedule
from helix_conformance.judge.causes import tried
from helix_conformance.judge.coverage import Coverage
from helix_conformance.judge.failure import Failure, MalformedAnswer, engine_failure, shown
from helix_conformance.judge.judge import Judge, wrong_reasons
from helix_conformance.judge.shrink import gone_on, reduced, with_room
from helix_conformance.judge.xfail import Known, parted
from helix_spec.config import Config, config_problem
from helix_spec.engine import LADDER, PROFILES
from helix_spec.events import FEATURES, MERGE, Event, Reason, Release
from helix_spec.invariants import NUMBERS
from helix_spec.layouts import layout_name
from helix_spec.trace import Trace

REDUCTION_LIMIT_S: Final = 120.0
"""How long an engine that fails is started again for a smaller trace; a difference has no limit."""
EVERYTHING = Watch()
"""All state is looked at after every event."""


class Needed(msgspec.Struct, frozen=True):
    """Traces played until one failed, that one included, and the seconds until then."""

    traces: int
    seconds: float


class Tally(msgspec.Struct):
    """How much was played."""

    traces: int = 0
    events: int = 0
    seconds: float = 0.0
    layouts: set[str] = set()
    """Identifiers of the layouts that were played."""
    cut: int = 0
    """Traces that ended early, at a known difference or before what must not be run."""
    needed: Needed | None = None
    """What it took to find the first failure; all after that was spent on a smaller one."""


def check_trace(
    driver: Driver,
    trace: Trace,
    profiles: frozenset[str],
    *,
    watch: Watch = EVERYTHING,
    tally: Tally | None = None,
    coverage: Coverage | None = None,
    known: Known | None = None,
) -> Failure | None:
    """Play one trace and judge every answer; the first event that is wrong ends it.

    A configuration with which no engine may start must be refused; its events are not played.
    What the engine's ledger of known differences covers is not wrong.
    """
    tally, known = tally or Tally(), known or Known()
    failure = _judged(driver, trace, profiles, tally, known, watch, coverage)
    return failure and _made_sure(driver, failure, profiles, tally, known)


def _judged(
    driver: Driver,
    trace: Trace,
    profiles: frozenset[str],
    tally: Tally,
    known: Known,
    watch: Watch = EVERYTHING,
    coverage: Coverage | None = None,
) -> Failure | None:
    allowed = known.runnable(trace, driver.profiles)
    tally.cut += allowed != trace
    if allowed is None:
        return None
    if config_problem(trace.config) is not None:
        return _check_bad_config(driver, trace.config, profiles, tally, known)
    recorder = Recorder(trace.config, driver.profiles)
    judge = Judge(trace.config, profiles)
    return _played(driver, judge, allowed.events, recorder.next, watch, tally, known, coverage)


def _made_sure(
    driver: Driver, failure: Failure, profiles: frozenset[str], tally: Tally, known: Known
) -> Failure:
    """The failure, its suspicions tried."""
    if failure.engine_failure is not None:
        return failure

    def named_by(trace: Trace) -> set[str]:
        again = _judged(driver, trace, profiles, tally, known)
        return set() if again is None else again.invariants

    violations = tried(failure.trace, failure.violations, named_by)
    return msgspec.structs.replace(failure, violations=violations)


def _check_bad_config(
    driver: Driver, config: Config, profiles: frozenset[str], tally: Tally, known: Known
) -> Failure | None:
    tally.traces += 1
    trace = Trace(config=config, events=[])
    try:
        _, answers = next(iter(driver.play(config, profiles, [], EVERYTHING)))
    except EngineFailure as error:
        return engine_failure(trace, error)
    outcomes = [answer.outcome for answer in answers]
    found = wrong_reasons(Reason.BAD_CONFIG, outcomes)
    found = known.unknown(layout_name(config.layout), found)
    told = list(map(shown, answers))
    return Failure(trace=trace, event=None, violations=found, answers=told) if found else None


def _played(
    driver: Driver,
    judge: Judge,
    events: Iterable[Event],
    expect: Callable[[Event], Expectation],
    watch: Watch,
    tally: Tally,
    known: Known,
    coverage: Coverage | None = None,
) -> Failure | None:
    """Judge events as they are played; None when all answers were right, or wrong as is known."""
    config, seen, began = judge.config, list[Event](), time.perf_counter()
    drawn = list[Event]()
    """Events that the driver has asked for: the one that an engine does not survive is not seen."""

    def drawing() -> Iterator[Event]:
        for event in events:
            drawn.append(event)
            yield event

    try:
        for event, answers in driver.play(config, judge.profiles, drawing(), watch):
            with typed(answers):
                if event is not None:
                    seen.append(event)
                    expected = expect(event)
                    violations = judge.event(expected, answers)
                    if coverage is not None:
                        coverage.saw(config, expected)
                else:
                    violations = judge.finished(answers) if seen else judge.started(answers)
                if violations:
                    check_types(answers)
            if not violations:
                continue
            unknown = known.unknown(layout_name(config.layout), violations)
            if unknown:
                return Failure(
                    trace=Trace(config=config, events=seen),
                    event=None if event is None else len(seen) - 1,
                    violations=unknown,
                    answers=list(map(shown, answers)),
                )
            if parted(violations):
                tally.cut += 1
                return None
        return None
    except EngineFailure as error:
        lived = drawn if error.event is None else drawn[: error.event + 1]
        return engine_failure(Trace(config=config, events=lived), error)
    except MalformedAnswer as error:
        at = len(seen) - 1 if seen else None
        died = EngineFailure(error.rank, at, f"gave a malformed answer: {error}")
        return engine_failure(Trace(config=config, events=seen), died)
    finally:
        tally.traces += 1
        tally.events += len(seen)
        tally.layouts.add(str(config.layout))
        tally.seconds += time.perf_counter() - began


@contextmanager
def typed(answers: Sequence[Answer]) -> Iterator[None]:
    """While answers are judged: what fails because of their types is the engine's fault."""
    try:
        yield
    except MalformedAnswer:
        raise
    except Exception:
        check_types(answers)
        raise


def check_types(answers: Sequence[Answer]) -> None:
    """Raises MalformedAnswer when an answer holds values of types that it must not hold."""
    found = ill_typed(answers)
    if found is not None:
        raise MalformedAnswer(*found)


def random_traces(
    driver: Driver,
    draw: Callable[[Choices], Trace],
    profiles: frozenset[str],
    *,
    examples: int,
    seed: int | str,
    tally: Tally,
    progress: Callable[[], None] = lambda: None,
    coverage: Coverage | None = None,
    known: Known | None = None,
) -> Failure | None:
    """Play random traces until one fails.

    Parameters
    ----------
    driver
        The engine under test.
    draw
        What makes a trace of choices, such as `layout_traces` returns.
    profiles
        Profiles to check.
    examples
        Number of traces.
    seed
        Trace n depends on this text and on n alone.
    tally, coverage
        What was played is added to them.
    progress
        Called after each trace.
    known
        Differences that are not failures.

    Returns
    -------
    Failure | None
        The first failure, its trace made small where the engine can be asked again.
    """
    known = known or Known()
    began = time.perf_counter()
    for number in range(examples):
        trace = draw(Seeded(f"{seed} {number}"))
        failure = _judged(driver, trace, profiles, tally, known, coverage=coverage)
        progress()
        if failure is not None:
            if tally.needed is None:
                tally.needed = Needed(tally.traces, time.perf_counter() - began)
            return _explained(driver, trace, failure, profiles, tally, known)
    return None


def _explained(
    driver: Driver,
    trace: Trace,
    failure: Failure,
    profiles: frozenset[str],
    tally: Tally,
    known: Known,
) -> Failure:
    """Return the failure of a random trace, made small and sure if it repeats."""
    if failure.verdict == "error" and not driver.survives_failure:
        return failure  # the engine cannot be asked again
    again = _judged(driver, trace, profiles, tally, known)
    if again is None:
        note = "This failure did not repeat when the same trace was played again."
        noted = msgspec.structs.replace(failure.trace, note=note)
        return msgspec.structs.replace(failure, trace=noted)
    if again.verdict == "error" and not driver.survives_failure:
        return again
    small = _made_small(driver, trace, again, profiles, tally, known)
    return _made_sure(driver, small, profiles, tally, known)


def _made_small(
    driver: Driver,
    whole: Trace,
    failure: Failure,
    profiles: frozenset[str],
    tally: Tally,
    known: Known,
) -> Failure:
    """The failure with the smallest trace that shows some of the same violations."""
    smallest, alive = failure, True
    until = time.perf_counter() + REDUCTION_LIMIT_S

    def fails(trace: Trace, named: Collection[str]) -> Trace | None:
        nonlocal smallest, alive
        again = _judged(driver, trace, profiles, tally, known) if alive else None
        if again is not None and again.verdict == "error":
            alive = driver.survives_failure and time.perf_counter() < until
        if again is None or not again.invariants.intersection(named):
            return None
        smallest = again
        return again.trace

    # What also fails where no pool runs dry is told without refusals, whatever else it breaks:
    # ranks that disagree about room alone may disagree about more, a few tokens on.
    roomy = with_room(whole)
    untold = fails(roomy, NUMBERS) is None and config_problem(roomy.config) is None
    if untold and failure.invariants <= {"REF-1", "REF-2"}:
        fails(gone_on(roomy), NUMBERS)
    named = smallest.invariants
    reduced(smallest.trace, lambda trace: fails(trace, named))
    return smallest


def layout_traces(
    driver: Driver,
    name: str,
    profiles: Collection[str],
    *,
    cp_sizes: Sequence[int],
    tp_sizes: Sequence[int] = (1,),
) -> Callable[[Choices], Trace]:
    """Return a function that draws traces of one layout, for the features among these profiles.

    With `merge` one trace in four merges supplied partials, or all without `placement`.
    """
    features = [feature for feature in FEATURES if feature in profiles]
    contents = not {"cache", MERGE}.isdisjoint(profiles)

    def draw(choices: Choices) -> Trace:
        config = draw_config(
            choices,
            names=[name],
            cp_sizes=cp_sizes,
            tp_sizes=tp_sizes,
            max_world=driver.largest_world,
            features=features,
            contents=contents,
        )
        if "placement" not in profiles or (MERGE in profiles and choices.one_in(4)):
            return draw_merge_trace(choices, config)
        return draw_trace(
            choices,
            config,
            features=features,
            undeclared={*FEATURES, MERGE} - driver.profiles,
            contents="cache" in profiles,
        )

    return draw


def layout_run(
    driver: Driver,
    name: str,
    asked: Collection[str],
    *,
    cp_sizes: Sequence[int],
    tp_sizes: Sequence[int] = (1,),
    examples: int,
    seed: int | str,
    tally: Tally,
    known: Known,
    progress: Callable[[], None] = lambda: None,
    coverage: Coverage | None = None,
) -> tuple[frozenset[str], Failure | None]:
    """Random traces of one layout: the profiles that were checked, and the failure.

    Profiles that the ledger says are answered wrongly are left out, and then checked apart: each
    must still fail.
    """

    def played(
        profiles: frozenset[str], tally: Tally, coverage: Coverage | None = None
    ) -> Failure | None:
        return random_traces(
            driver,
            layout_traces(driver, name, profiles, cp_sizes=cp_sizes, tp_sizes=tp_sizes),
            profiles,
            examples=examples,
            seed=f"{seed} {name}",  # other traces for each layout
            tally=tally,
            progress=progress,
            known=known,
            coverage=coverage,
        )

    if not known.runs(name):
        return frozenset(), None
    wanted = profiles_to_check(driver.profiles, asked)
    profiles = wanted - known.left_out(name)
    failure = played(profiles, tally, coverage) if profiles else None
    if failure is not None:
        return profiles, failure
    known.played(name, profiles, void=0 < tally.traces and tally.events <= tally.cut)
    for difference in known.suspended(name):
        if difference.profile in wanted:
            alone = profiles_to_check(driver.profiles, {*profiles, difference.profile})
            wrong = played(alone, Tally())
            if wrong is not None and wrong.verdict == "error":
                return alone, wrong
            known.confirmed(difference, failed=wrong is not None)
    return profiles, None


def workload(
    driver: Driver,
    config: Config,
    requests: Sequence[Request],
    profiles: frozenset[str],
    *,
    batch_limit: int,
    max_steps: int,
    tally: Tally,
    released: Callable[[], None] = lambda: None,
    coverage: Coverage | None = None,
) -> Failure | None:
    """Play a workload through the scheduler; state is looked at every 100 events."""
    recorder, judge = Recorder(config, driver.profiles), Judge(config, profiles)
    # A driver that draws ahead of the answers needs a recorder of its own to draw with.
    ahead = recorder if driver.streams else Recorder(config, driver.profiles)
    reason: Reason | None = None

    def expect(event: Event) -> Expectation:
        nonlocal reason
        expected = recorder.next(event)
        reason = expected.refused
        return expected

    def events() -> Iterator[Event]:
        schedule_of = schedule(requests, batch_limit=batch_limit, max_steps=max_steps)
        event = next(schedule_of)
        while True:
            if isinstance(event, Release):
                released()
            refused = None if ahead is recorder else ahead.next(event).refused
            yield event
            try:
                event = schedule_of.send(reason if ahead is recorder else refused)
            except StopIteration:
                return

    watch = Watch(every=100, touched=False)
    return _played(driver, judge, events(), expect, watch, tally, Known(), coverage)


def check_vector(
    driver: Driver, vector: Vector, tally: Tally, profiles: frozenset[str] | None = None
) -> Failure | None:
    """Play a vector and judge every answer by what it expects.

    `profiles` are those that are to be checked, all that the engine declares when None.
    """
    profiles = profiles_of_vector(vector, driver.profiles if profiles is None else profiles)
    if vector.refused is not None:
        return _check_bad_config(driver, vector.config, profiles, tally, Known())
    stored, events = expectations(vector), vector.trace.events
    judge = Judge(vector.config, profiles)
    expect = lambda _: next(stored)  # noqa: E731
    failure = _played(driver, judge, events, expect, EVERYTHING, tally, Known())
    return failure and _made_sure(driver, failure, profiles, tally, Known())


def profiles_of_vector(vector: Vector, profiles: frozenset[str]) -> frozenset[str]:
    """Those of the profiles by which a vector checks: what it asks for, and as deep as it goes."""
    if vector.profiles == [MERGE]:
        return frozenset(vector.profiles)
    depth = ["placement", "lengths", "pages"]
    if vector.rows:
        depth.append("cache")
    if any(step.decoded and step.decoded.output for step in vector.steps):
        depth = list(LADDER)
    return profiles & {*depth, *vector.profiles}


def profiles_to_check(declared: Collection[str], asked: Collection[str]) -> frozenset[str]:
    """What is checked: the declared profiles, or those of them that were asked for.

    A profile of the ladder brings those before it.
    """
    wanted = set(asked or declared)
    for profile in LADDER:
        if profile in wanted:
            wanted |= set(LADDER[: LADDER.index(profile)])
    return frozenset(profile for profile in PROFILES if profile in wanted and profile in declared)
