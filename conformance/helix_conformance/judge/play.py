"""Plays traces through a driver and judges every answer."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Final

import msgspec

from helix_conformance.drive.asking import MalformedAnswer, check_types, words
from helix_conformance.drive.driver import Driver, EngineFailure
from helix_conformance.expect.arrays import Array
from helix_conformance.expect.expectation import Expectation
from helix_conformance.expect.recorder import Recorder
from helix_conformance.expect.vectors import Vector, expectations
from helix_conformance.generate.actions import Scope
from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.soak import PROMPT_LENS, long_events
from helix_conformance.generate.traces import why_outside
from helix_conformance.generate.workload import Request, schedule
from helix_conformance.judge.causes import tried
from helix_conformance.judge.coverage import Coverage, Tally
from helix_conformance.judge.failure import Failure, engine_failure, shown
from helix_conformance.judge.judge import Judge, wrong_reasons
from helix_conformance.judge.shrink import gone_on, reduced, with_room
from helix_conformance.judge.xfail import Known, parted
from helix_spec.capabilities import UNLIMITED, Box, outside
from helix_spec.config import Config, config_problem
from helix_spec.engine import CUMULATIVE, PROFILES
from helix_spec.events import MERGE, Event, Reason, Release
from helix_spec.invariants import NUMBERS
from helix_spec.layouts import layout_name
from helix_spec.trace import EVERYTHING, Trace, Watch

NEVER: Final = Watch(every=2**53, touched=False)
"""Of what comes before a trace: state is looked at in the end alone."""
REDUCTION_LIMIT_S: Final = 10.0
"""How long a smaller trace is looked for; the smallest that was found until then is reported."""


@dataclass(frozen=True)
class Player:
    """Plays traces on one engine, and judges the answers.

    Parameters
    ----------
    driver
        The engine under test.
    profiles
        Profiles to check.
    tally
        What is played is added to it.
    known
        Differences that are not wrong.
    asked
        What was asked for: no trace is made small beyond it.
    """

    driver: Driver
    profiles: frozenset[str]
    tally: Tally
    known: Known = field(default_factory=Known)
    asked: Box = UNLIMITED

    def judged(
        self,
        trace: Trace,
        watch: Watch | None = None,
        coverage: Coverage | None = None,
        *,
        warm: bool = False,
    ) -> Failure | None:
        """Play and judge one trace, and leave its failure as it is seen first.

        Parameters
        ----------
        trace
            The trace; it is played up to the first event that must not be run.
        watch
            Which state is looked at, and when, in place of what the trace says.
        coverage
            Counts the situations that were visited, when given.
        warm
            Whether the ranks have just played the traces before.

        Returns
        -------
        Failure or None
            The first wrong event, or a configuration that was wrongly accepted; None when all is
            right, or wrong as known.
        """
        allowed = self.known.runnable(trace, self.driver.profiles, self.driver.freedoms)
        self.tally.cut += allowed != trace
        if allowed is None:
            return None
        before = [] if warm else self._runnable_before(trace)
        failure, turn = self._earlier(before, trace), 0
        outputs, again = list[Array](), warm or bool(before)
        while failure is None and turn < trace.times:
            if config_problem(trace.config) is not None:
                failure = self.refused(trace.config, again=again)
            else:
                recorder = Recorder(trace.config, self.driver.profiles, self.driver.freedoms)
                failure = self.played(
                    trace.config,
                    allowed.events,
                    recorder.next,
                    watch or trace.watch,
                    coverage if turn == 0 else None,
                    again=again,
                    outputs=outputs,
                )
            turn, again = turn + 1, True
        if failure is None:
            return None
        played = msgspec.structs.replace(
            failure.trace, watch=watch or trace.watch, before=trace.before, times=max(1, turn)
        )
        return msgspec.structs.replace(failure, trace=played)

    def _runnable_before(self, trace: Trace) -> list[Trace]:
        """What comes before a trace, as far as it may be run."""
        wholes = (Trace(config=one.config, events=one.events) for one in trace.before)
        driver = self.driver
        allowed = (self.known.runnable(one, driver.profiles, driver.freedoms) for one in wholes)
        return [one for one in allowed if one is not None]

    def _earlier(self, before: Sequence[Trace], trace: Trace) -> Failure | None:
        """Play what comes before a trace; return how the engine failed then, if it did."""
        for number, earlier in enumerate(before):
            legal = config_problem(earlier.config) is None
            events, again = earlier.events if legal else [], number > 0
            play = self.driver.play(earlier.config, self.profiles, events, NEVER, again=again)
            try:
                deque(play if legal else islice(play, 1), maxlen=0)
            except EngineFailure as error:
                error.event = None  # it is of none of the events that are judged
                return engine_failure(trace, error)
        return None

    def refused(self, config: Config, *, again: bool = False) -> Failure | None:
        """Judge the answers to a configuration with which no engine may start.

        Parameters
        ----------
        config
            The illegal configuration.
        again
            Whether the objects of the trace before are started again.

        Returns
        -------
        Failure or None
            A failure at the start; None when every rank refused it as `bad_config`.
        """
        self.tally.traces += 1
        trace = Trace(config=config, events=[])
        try:
            play = self.driver.play(config, self.profiles, [], EVERYTHING, again=again)
            _, answers = next(iter(play))
            check_types(answers)
        except EngineFailure as error:
            return engine_failure(trace, error)
        except MalformedAnswer as error:
            return engine_failure(trace, EngineFailure(error.rank, None, words(error)))
        found = wrong_reasons(Reason.BAD_CONFIG, [answer.outcome for answer in answers])
        found = self.known.unknown(layout_name(config.layout), found)
        told = list(map(shown, answers))
        return Failure(trace=trace, event=None, violations=found, answers=told) if found else None

    def played(
        self,
        config: Config,
        events: Iterable[Event],
        expect: Callable[[Event, object], Expectation],
        watch: Watch = EVERYTHING,
        coverage: Coverage | None = None,
        *,
        again: bool = False,
        outputs: list[Array] | None = None,
    ) -> Failure | None:
        """Judge events as they are played.

        Parameters
        ----------
        config
            A legal configuration.
        events
            The events; the next is drawn when the driver asks for it.
        expect
            Returns the expectation of the event that was played, and of the hit that was reported.
        watch
            Which state is looked at, and when.
        coverage
            Counts the situations that were visited, when given.
        again
            Whether the objects of the trace before are started again.
        outputs
            What each decode gave when the same was played before, bit for bit; where that is not
            known yet, it is appended.

        Returns
        -------
        Failure or None
            The first wrong event; None when all answers were right, or wrong as known.
        """
        judge = Judge(config, self.profiles, self.driver.freedoms, outputs)
        seen, began = list[Event](), time.perf_counter()
        drawn = list[Event]()
        """Events that the driver asked for: the one that an engine does not survive is not seen."""

        def drawing() -> Iterator[Event]:
            for event in events:
                drawn.append(event)
                yield event

        try:
            play = self.driver.play(config, self.profiles, drawing(), watch, again=again)
            for event, answers in play:
                try:
                    if event is not None:
                        seen.append(event)
                        expected = expect(event, answers[0].outcome.hit)
                        violations = judge.event(expected, answers)
                        if coverage is not None:
                            coverage.saw(config, expected)
                    else:
                        violations = judge.finished(answers) if seen else judge.started(answers)
                except MalformedAnswer:
                    raise
                except Exception:  # what fails because of the answers' types is the engine's fault
                    check_types(answers)
                    raise
                if not violations:
                    continue
                check_types(answers)
                unknown = self.known.unknown(layout_name(config.layout), violations)
                if unknown:
                    return Failure(
                        trace=self._trace(config, seen),
                        event=None if event is None else len(seen) - 1,
                        violations=unknown,
                        answers=list(map(shown, answers)),
                    )
                if parted(violations):
                    self.tally.cut += 1
                    return None
            return None
        except EngineFailure as error:
            lived = drawn if error.event is None else drawn[: error.event + 1]
            return engine_failure(self._trace(config, lived), error)
        except MalformedAnswer as error:
            at = len(seen) - 1 if seen else None
            died = EngineFailure(error.rank, at, words(error))
            return engine_failure(self._trace(config, seen), died)
        finally:
            self.tally.traces += 1
            self.tally.events += len(seen)
            self.tally.layouts.add(str(config.layout))
            self.tally.seconds += time.perf_counter() - began

    def _trace(self, config: Config, events: list[Event]) -> Trace:
        """A trace that was played on this engine."""
        return Trace(config=config, events=events, freedoms=self.driver.freedoms)

    def made_sure(self, failure: Failure) -> Failure:
        """Return a failure with its suspicions tried (see `causes`).

        Parameters
        ----------
        failure
            A failure of this engine; one of an engine that failed comes back as it is.
        """
        if failure.engine_failure is not None:
            return failure

        def named_by(trace: Trace) -> set[str]:
            again = self.judged(trace)
            return set() if again is None else again.invariants

        violations = tried(failure.trace, failure.violations, named_by)
        return msgspec.structs.replace(failure, violations=violations)

    def made_small(self, whole: Trace, failure: Failure) -> Failure:
        """Return the failure with the smallest trace that shows some of the same violations.

        Parameters
        ----------
        whole
            The trace that failed, with the events after the wrong one.
        failure
            Its failure.

        Returns
        -------
        Failure
            The failure of the smallest trace found within REDUCTION_LIMIT_S. An engine that fails
            ends the search when it cannot be asked again.
        """
        smallest, alive = failure, True

        def fails(trace: Trace, named: Collection[str]) -> Trace | None:
            nonlocal smallest, alive
            parts = [trace, *(Trace(config=b.config, events=b.events) for b in trace.before)]
            boxes = self.driver.capabilities
            if any(outside(self.asked, one.config) or why_outside(boxes, one) for one in parts):
                return None
            again = self.judged(trace) if alive else None
            if again is not None and again.verdict == "error":
                alive = self.driver.survives_failure
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
        reduced(smallest.trace, lambda trace: fails(trace, named), limit_s=REDUCTION_LIMIT_S)
        return smallest


def check_trace(
    driver: Driver,
    trace: Trace,
    profiles: frozenset[str],
    *,
    watch: Watch | None = None,
    tally: Tally | None = None,
    coverage: Coverage | None = None,
    known: Known | None = None,
) -> Failure | None:
    """Play one trace and judge every answer; the first event that is wrong ends it.

    A configuration with which no engine may start must be refused; its events are not played.

    Parameters
    ----------
    driver
        The engine under test.
    trace
        The trace to play.
    profiles
        Profiles to check.
    watch
        Which state is looked at, and when, in place of what the trace says.
    tally
        What is played is added to it, when given.
    coverage
        Counts the situations that were visited, when given.
    known
        Differences that are not wrong.

    Returns
    -------
    Failure or None
        What is wrong, its suspicions tried; None when nothing is.

    Examples
    --------
    >>> from helix_conformance.drive.in_process import LocalDriver
    >>> from helix_conformance.engines import load_engine
    >>> from helix_spec.events import Admit, Decode
    >>> config = Config(layout="pr9757/1:C=2,T=2", pages=[4, 4], max_len=9)
    >>> trace = Trace(config=config, events=[Admit(7, 3), Decode([7], [1])])
    >>> driver, tally = LocalDriver(load_engine("reference")), Tally()
    >>> check_trace(driver, trace, driver.profiles, tally=tally) is None, tally.events
    (True, 2)
    """
    player = Player(driver, profiles, tally or Tally(), known or Known())
    failure = player.judged(trace, watch, coverage)
    return failure and player.made_sure(failure)


def check_workload(
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
    """Play a workload through the scheduler; state is looked at every 100 events.

    Parameters
    ----------
    driver
        The engine under test.
    config
        A legal configuration.
    requests
        The workload, in the order of arrival.
    profiles
        Profiles to check.
    batch_limit
        The most live requests, at least 1.
    max_steps
        The most tokens that are decoded of one request, at least 1.
    tally
        What is played is added to it.
    released
        Called when a request is released.
    coverage
        Counts the situations that were visited, when given.

    Returns
    -------
    Failure or None
        The first wrong event, with the whole trace until then; None when all answers were right.

    Raises
    ------
    WorkloadError
        When a request does not fit an empty pool, and for any other refusal.
    ValueError
        When a limit is less than 1.
    """
    recorder, drawn = Recorder(config, driver.profiles, driver.freedoms), list[Expectation]()

    def events() -> Iterator[Event]:
        schedule_of = schedule(requests, batch_limit=batch_limit, max_steps=max_steps)
        event = next(schedule_of)
        while True:
            if isinstance(event, Release):
                released()
            drawn[:] = [recorder.next(event)]
            yield event
            try:
                event = schedule_of.send(drawn[0].refused)
            except StopIteration:
                return

    # A driver that draws ahead of the answers is judged by a recorder that does not.
    behind = Recorder(config, driver.profiles, driver.freedoms)
    expect = (lambda *_: drawn[0]) if driver.streams else behind.next
    player, watch = Player(driver, profiles, tally), Watch(every=100, touched=False)
    return player.played(config, events(), expect, watch, coverage)


def check_long(
    driver: Driver,
    config: Config,
    features: frozenset[str],
    profiles: frozenset[str],
    *,
    steps: int,
    seed: str,
    box: Box,
    tally: Tally,
    done: Callable[[], None],
) -> Failure | None:
    """Play one long trace of mixed events; state is looked at every 100 events.

    Parameters
    ----------
    driver
        The engine under test.
    config
        A legal configuration.
    features
        Features that events may need.
    profiles
        Profiles to check.
    steps
        Number of events.
    seed
        Decides what is drawn.
    box
        Where the engine works.
    tally
        What is played is added to it.
    done
        Called after each event.

    Returns
    -------
    Failure or None
        The first wrong event, with the whole trace until then; None when all answers were right.
    """
    ahead = Recorder(config, driver.profiles, driver.freedoms)
    scope = Scope(features, prompt_lens=PROMPT_LENS)

    def events() -> Iterator[Event]:
        for event in long_events(ahead, Seeded(seed), scope, steps, box):
            yield event
            done()

    judged_by = Recorder(config, driver.profiles, driver.freedoms)
    player, watch = Player(driver, profiles, tally), Watch(every=100, touched=False)
    return player.played(config, events(), judged_by.next, watch)


def check_vector(
    driver: Driver,
    vector: Vector,
    tally: Tally,
    profiles: frozenset[str] | None = None,
    known: Known | None = None,
) -> Failure | None:
    """Play a vector and judge every answer by what it expects.

    Parameters
    ----------
    driver
        The engine under test.
    vector
        The vector; what it expects is right. Suspicions alone are tried against the reference.
    tally
        What is played is added to it.
    profiles
        Profiles to check; all that the engine declares when None.
    known
        Differences that are not wrong; the vector is played up to what must not be run.

    Returns
    -------
    Failure or None
        What is wrong, its suspicions tried; None when nothing is.
    """
    profiles = profiles_of_vector(vector, driver.profiles if profiles is None else profiles)
    player = Player(driver, profiles, tally, known or Known())
    stored = expectations(vector)
    allowed = player.known.runnable(vector.trace, driver.profiles, driver.freedoms)
    if allowed is None:
        return None
    if vector.refused is not None:
        return player.refused(vector.config)
    failure = player.played(vector.config, allowed.events, lambda *_: next(stored))
    return failure and player.made_sure(failure)


def profiles_of_vector(vector: Vector, profiles: frozenset[str]) -> frozenset[str]:
    """Return the profiles by which a vector checks: what it asks for, and as deep as it goes.

    Parameters
    ----------
    vector
        The vector.
    profiles
        Profiles to choose from.
    """
    if vector.profiles == [MERGE]:
        return frozenset(vector.profiles)
    depth = ["placement", "lengths", "pages"]
    if vector.rows:
        depth.append("cache")
    if any(step.decoded and step.decoded.output for step in vector.steps):
        depth = list(CUMULATIVE)
    return profiles & {*depth, *vector.profiles}


def profiles_to_check(declared: Collection[str], asked: Collection[str]) -> frozenset[str]:
    """Return what is checked: the declared profiles, or those of them that were asked for.

    Parameters
    ----------
    declared
        Profiles that the engine declares.
    asked
        Profiles to check, each cumulative one with those before it; empty for all.

    Examples
    --------
    >>> sorted(profiles_to_check(["placement", "lengths", "fork"], asked=["lengths"]))
    ['lengths', 'placement']
    """
    wanted = set(asked or declared)
    for profile in CUMULATIVE:
        if profile in wanted:
            wanted |= set(CUMULATIVE[: CUMULATIVE.index(profile)])
    return frozenset(profile for profile in PROFILES if profile in wanted and profile in declared)
