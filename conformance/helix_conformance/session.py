"""One run: random traces, vectors, a stored trace or a workload, from options to a verdict."""

from __future__ import annotations

import gc
import os
import pickle
import platform
import subprocess
import sys
import time
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, field, replace
from datetime import UTC, datetime
from itertools import chain
from pathlib import Path
from typing import Any, Final

import msgspec

from helix_conformance.drive.driver import Driver, EngineFailure
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.launched import LAUNCHED
from helix_conformance.drive.opening import DRIVERS, default_driver, open_driver
from helix_conformance.drive.processes import end, leashed
from helix_conformance.engines import COMMAND, load_engine
from helix_conformance.expect.recorder import Recorder
from helix_conformance.expect.vectors import Vector, shipped_vectors
from helix_conformance.foreign import nearest
from helix_conformance.generate.actions import Scope
from helix_conformance.generate.choices import Choices, Seeded
from helix_conformance.generate.configs import draw_config, soaked_config
from helix_conformance.generate.groups import GROUPED, with_groups
from helix_conformance.generate.narrowing import NothingInsideError, within
from helix_conformance.generate.sizes import FEW_CP, RARE_CP, REAL_SHAPES, REAL_SHARE, both
from helix_conformance.generate.soak import LIVE, PROMPT_LENS, TOKENS, long_events
from helix_conformance.generate.traces import (
    PREFIXED,
    draw_merge_trace,
    draw_trace,
    far_trace,
    why_outside,
)
from helix_conformance.generate.workload import Request
from helix_conformance.judge.coverage import SITUATIONS, Coverage, Needed, Tally, at_hand
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.play import (
    Player,
    check_long,
    check_trace,
    check_vector,
    check_workload,
    profiles_of_vector,
    profiles_to_check,
)
from helix_conformance.judge.xfail import Known
from helix_conformance.report.stream import (
    CoverageLine,
    FailureLine,
    KnownDifference,
    Row,
    Settings,
    Stream,
    Summary,
    Verdict,
    restrictions,
    save_trace,
)
from helix_conformance.version import __version__
from helix_spec.capabilities import EVERYWHERE, STRICT, UNLIMITED, Box, in_words, outside
from helix_spec.config import Config
from helix_spec.engine import PROFILES, Engine
from helix_spec.events import FEATURES, MERGE, PREFIX, Accept, Admit, Fork
from helix_spec.layouts import LAYOUT_NAMES, layout_name
from helix_spec.trace import EVERYTHING, Earlier, Trace, Watch, dump_trace, load_trace, too_much

INSIDE: Final = [name for name in DRIVERS if name not in LAUNCHED]
"""Drivers that this process opens by itself; others are launched around the whole command."""
REMEMBERED: Final = 64
"""Traces that may be handed over with a failure that depends on them."""
LONG_TRACE: Final = 300
"""Events of the long trace that each layout begins with."""
AGAIN: Final = 8
"""One random trace in so many starts the objects anew that have played the one before it."""
LOOKED_AT: Final = 2**18
"""Requests of which a replay looks at all state, counted at each look. Of a longer trace it is
looked at less often: after each event what the event names, everything now and then and at the
end."""
Advance = Callable[[], None]
"""Called when one more trace was played, or one more request of a workload has ended."""


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
    asked: Box = UNLIMITED,
    first: Iterable[Trace] = (),
    last: Iterable[Trace] = (),
) -> Failure | None:
    """Play random traces until one fails, and make that one small and sure if it fails again.

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
    asked
        What was asked for: a failing trace is not made small beyond it.
    first, last
        Traces that are played before the random ones, and after them.

    Returns
    -------
    Failure or None
        The first failure, its trace made small where the engine can be asked again; None when no
        trace fails.

    Examples
    --------
    >>> from helix_conformance.engines import load_engine
    >>> driver, tally = LocalDriver(load_engine("reference")), Tally()
    >>> profiles = profiles_to_check(driver.profiles, ["lengths"])
    >>> draw = layout_traces(driver, "pr9757", profiles, cp_sizes=[2])
    >>> random_traces(driver, draw, profiles, examples=3, seed=0, tally=tally) is None
    True
    >>> tally.traces
    3
    """
    player = Player(driver, profiles, tally, known or Known(), asked)
    began = time.perf_counter()
    drawn = (draw(Seeded(f"{seed} {number}")) for number in range(examples))
    history = deque[Earlier](maxlen=REMEMBERED)
    for number, one in enumerate(chain(first, drawn, last)):
        trace, warm = one, False
        if history and Seeded(f"{seed} {number} again").one_in(AGAIN):
            trace, warm = msgspec.structs.replace(one, before=[history[-1]]), True
        failure = player.judged(trace, coverage=coverage, warm=warm)
        progress()
        if failure is not None:
            tally.needed = tally.needed or Needed(tally.traces, time.perf_counter() - began)
            return _in_new_processes(player, _explained(player, trace, failure), [*history])
        history.append(Earlier(one.config, one.events))
    return None


def _in_new_processes(player: Player, failure: Failure, history: Sequence[Earlier]) -> Failure:
    """Return the failure, with the traces before it where new processes do not show it alone."""
    noted, found = failure.trace, None
    if _is_lost(player.driver, failure) or noted.note or not player.driver.renew():
        return failure
    if player.judged(noted) is not None:
        return failure
    for alone in (noted, failure.drawn or noted):
        for count in (len(history), 1, 4, 16):  # all of them show it, or none does
            before = [*history[-count:], *alone.before] if count else alone.before
            player.driver.renew()
            again = player.judged(msgspec.structs.replace(alone, before=before))
            found = again or found
            if (again is None) == (count == len(history)):
                break
        if found is not None:
            return player.made_sure(found)
    note = "New processes do not show this failure, alone or after the traces before it."
    return msgspec.structs.replace(failure, trace=msgspec.structs.replace(noted, note=note))


def _explained(player: Player, trace: Trace, failure: Failure) -> Failure:
    """Return the failure of a random trace, made small and sure if it repeats."""
    if _is_lost(player.driver, failure):
        return failure
    again = player.judged(trace)
    if again is None:
        note = "This failure did not repeat when the same trace was played again."
        noted = msgspec.structs.replace(failure.trace, note=note)
        return msgspec.structs.replace(failure, trace=noted)
    if _is_lost(player.driver, again):
        return again
    sure = player.made_sure(player.made_small(trace, again))
    return msgspec.structs.replace(sure, drawn=trace)


def layout_traces(
    driver: Driver,
    name: str,
    profiles: Collection[str],
    *,
    cp_sizes: Sequence[int],
    tp_sizes: Sequence[int] = (1,),
    real: bool = False,
) -> Callable[[Choices], Trace]:
    """Return a function that draws traces of one layout, for the features among the profiles.

    With `merge` one trace in four merges supplied partials, or all without `placement`.

    Parameters
    ----------
    driver
        The engine under test: how many ranks it has, and which profiles it declares.
    name
        The layout's name.
    profiles
        Profiles to check; events of a feature are drawn where it is one of them.
    cp_sizes, tp_sizes
        The sizes to draw from.
    real
        Whether a share of the traces has shapes of real models.

    Returns
    -------
    callable
        Takes choices, and returns a trace, inside the capabilities of the engine.

    Raises
    ------
    NothingInsideError
        When the capabilities hold nothing of this layout.
    """
    asked = (driver, name, profiles, cp_sizes, tp_sizes)
    boxes = _usable(*asked, driver.capabilities)
    shapes = [both(box, shape) for box in boxes for shape in REAL_SHAPES if real]
    # Where no real shape fits what was asked for, such as --cp 3, the engine's own boxes stay.
    shapes_or_boxes = _usable(*asked, [shape for shape in shapes if shape is not None] + boxes)
    features = [feature for feature in FEATURES if feature in profiles]
    contents = not {"cache", MERGE}.isdisjoint(profiles)

    def draw(choices: Choices) -> Trace:
        box = choices.pick(boxes) if len(boxes) > 1 else boxes[0]
        if real and choices.one_in(REAL_SHARE):
            box = choices.pick(shapes_or_boxes)
        config = draw_config(
            choices,
            names=[name],
            cp_sizes=cp_sizes,
            tp_sizes=tp_sizes,
            max_world=driver.largest_world,
            features=features,
            contents=contents,
            box=box,
        )
        if "placement" not in profiles or (MERGE in profiles and choices.one_in(4)):
            return draw_merge_trace(choices, config)
        if "groups" in profiles and choices.one_in(GROUPED):
            config = with_groups(choices, config, profiles, box)
        finds = PREFIX in profiles and not config.groups and choices.one_in(PREFIXED)
        return draw_trace(
            choices,
            config,
            features=[*features, PREFIX] if finds else features,
            undeclared={*FEATURES, MERGE} - driver.profiles,
            contents="cache" in profiles,
            box=box,
        )

    return draw


def _usable(
    driver: Driver,
    name: str,
    profiles: Collection[str],
    cp_sizes: Sequence[int],
    tp_sizes: Sequence[int],
    boxes: Sequence[Box],
) -> list[Box]:
    """Those of these boxes that hold something of a layout. Raises NothingInsideError for none."""
    usable, problem = list[Box](), NothingInsideError("layouts", "no capabilities are left")
    for box in boxes:
        try:
            draw_config(
                Seeded("usable"),
                names=[name],
                cp_sizes=cp_sizes,
                tp_sizes=tp_sizes,
                max_world=driver.largest_world,
                features=[feature for feature in FEATURES if feature in profiles],
                contents=not {"cache", MERGE}.isdisjoint(profiles),
                box=box,
            )
            usable.append(box)
        except NothingInsideError as error:
            problem = error
    if not usable:
        raise problem
    return usable


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
    asked_for: Box = UNLIMITED,
    first: Sequence[Trace] = (),
    last: Sequence[Trace] = (),
    real: bool = False,
) -> tuple[frozenset[str], Failure | None]:
    """Play random traces of one layout; return the profiles that were checked, and the failure.

    Profiles that the ledger says are answered wrongly are left out, and then checked apart: each
    must still fail.

    Parameters
    ----------
    driver
        The engine under test.
    name
        The layout's name.
    asked
        Profiles to check, with those they build on; empty for all that the engine declares.
    cp_sizes, tp_sizes
        The sizes to draw from.
    examples
        Number of traces; as many again for each profile that is checked apart.
    seed
        With the layout's name and a trace's number, it decides what is drawn.
    tally, coverage
        What was played is added to them; not what is checked apart.
    known
        The ledger; what shows is marked in it.
    progress
        Called after each trace.
    asked_for
        No failing trace is made small beyond it.
    first, last
        Traces that are played before the random ones, and after them.
    real
        Whether a share of the traces has shapes of real models.

    Returns
    -------
    frozenset of str
        Profiles that were checked; empty when nothing of the layout may be run.
    Failure or None
        The first failure; None when there is none.
    """

    def played(
        profiles: frozenset[str], tally: Tally, coverage: Coverage | None = None
    ) -> Failure | None:
        return random_traces(
            driver,
            layout_traces(driver, name, profiles, cp_sizes=cp_sizes, tp_sizes=tp_sizes, real=real),
            profiles,
            examples=examples,
            seed=f"{seed} {name}",  # other traces for each layout
            tally=tally,
            progress=progress,
            known=known,
            coverage=coverage,
            asked=asked_for,
            first=first,
            last=last,
        )

    if not known.runs(name):
        return frozenset(), None
    wanted = profiles_to_check(driver.profiles, asked)
    profiles = wanted - known.left_out(name)
    failure = played(profiles, tally, coverage) if profiles else None
    if failure is not None:
        return profiles, failure
    known.played(name, profiles, void=0 < tally.cut >= tally.events)
    for difference in known.suspended(name):
        if difference.profile in wanted:
            alone = profiles_to_check(driver.profiles, {*profiles, difference.profile})
            wrong = played(alone, Tally())
            if wrong is not None and wrong.verdict == "error":
                return alone, wrong
            known.confirmed(difference, failed=wrong is not None)
    return profiles, None


class SessionError(ValueError):
    """What was asked for cannot be done; the message says why, and nothing was played."""


def no_progress(description: str, total: int) -> Advance:
    """Return what shows nothing, at each step.

    Parameters
    ----------
    description
        What is played.
    total
        Number of steps.
    """
    return lambda: None


@dataclass
class Plan:
    """What of an engine's layouts is played, the same for each of them.

    Parameters
    ----------
    layouts
        Names of the layouts, in order.
    cp_sizes, tp_sizes
        The sizes to draw from.
    asked_for
        No failing trace is made small beyond it.
    examples
        Random traces of each layout.
    needs
        What the situations to be counted need and the run has, as `at_hand` returns it.
    last
        Traces that are played after the random ones, by layout.
    """

    layouts: list[str]
    cp_sizes: list[int]
    tp_sizes: Sequence[int]
    asked_for: Box
    examples: int
    needs: Collection[str]
    last: Mapping[str, list[Trace]]


class LayoutPlayed(msgspec.Struct):
    """What came of one layout.

    Parameters
    ----------
    checked
        The profiles that were checked; none when nothing may be run.
    failure
        The first failure.
    lost
        Whether the engine has failed and cannot be asked again.
    tally, vectors, coverage
        How much was played, and what it visited.
    known
        The expected failures, as far as they were met.
    """

    checked: frozenset[str]
    failure: Failure | None
    lost: bool
    tally: Tally
    vectors: int
    coverage: Coverage
    known: Known


@dataclass
class Session:
    """One run of an engine: what is played on it, what was found, and the verdict.

    Parameters
    ----------
    given
        The engine: a class, or what `--engine` takes: a name, `module:Class`, `stdio:COMMAND`.
    driver
        Where the ranks live, as `--driver` says; None for what the engine needs.
    profiles
        Those to check, with those they build on; empty for all that the engine declares.
    ranks
        Processes of a pool.
    backend
        Of a process group that is launched: `gloo` or `nccl`.
    deadline_s
        Seconds after which a silent rank has timed out.
    known
        The engine's expected failures.
    stream
        Takes every line of the run.
    folder
        Where failing traces are written; None for nowhere.
    progress
        Called with a description and a total; returns what is called at each step.
    stop_at_first
        Whether the first failure ends the run.
    exchanges_done
        Where the engine's counter of exchanges starts.
    jobs
        Layouts that are played at a time, each by a process of its own when it is above 1.

    Raises
    ------
    EngineSpecError
        When the engine's name stands for none.
    """

    given: str | type[Engine]
    driver: str | None = None
    profiles: Sequence[str] = ()
    _: KW_ONLY
    ranks: int = 4
    backend: str = "gloo"
    deadline_s: float = 30.0
    known: Known = field(default_factory=Known)
    stream: Stream = field(default_factory=Stream)
    folder: Path | None = None
    progress: Callable[[str, int], Advance] = no_progress
    exchanges_done: int = 0
    jobs: int = 1
    stop_at_first: bool = False
    failures: list[FailureLine] = field(default_factory=list, init=False)
    not_started: EngineFailure | None = field(default=None, init=False)
    seed: int | None = field(default=None, init=False)
    unwritten: list[str] = field(default_factory=list, init=False)
    """Failing traces that could not be written, in lines, and why."""

    def __post_init__(self) -> None:
        self.tiers = self._tiers()
        for engine, _ in self.tiers:  # what cannot be loaded is said before anything is played
            if isinstance(self.given, str) and not engine.startswith(COMMAND):
                load_engine(engine)

    @property
    def engine(self) -> str:
        """Return the engine's name; of a class `module:Class`."""
        if isinstance(self.given, str):
            return self.given
        return f"{self.given.__module__}:{self.given.__qualname__}"

    def begin(
        self, command: str, options: Mapping[str, Any], played: str | None = None
    ) -> list[str]:
        """Write the first line of the stream; return why the run is not a whole one.

        Parameters
        ----------
        command
            The command's name, such as `run`.
        options
            All options of the command, by name.
        played
            What is played instead of random traces, in words; None for those.

        Returns
        -------
        list of str
            A sentence for each restriction; empty for a whole run.
        """
        if played is None:
            most = max(default_examples(driver) for _, driver in self.tiers)
            left_out = restrictions(options, most)
        else:
            left_out = [f"{played}; a whole run plays random traces of every layout."]
        told = {k: str(v) if isinstance(v, Path) else v for k, v in options.items()}
        self.seed = options.get("seed")
        self.stream.write(
            Settings(
                command=command,
                engine=self.engine,
                suite_version=__version__,
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                python=platform.python_version(),
                machine=platform.machine(),
                options={name: value for name, value in told.items() if name != "engine"},
                restrictions=left_out,
            )
        )
        return left_out

    def random(self, layouts: Sequence[str], cp_sizes: Sequence[int], examples: int | None) -> None:
        """Play random traces of each layout, on each driver.

        Parameters
        ----------
        layouts
            Names of the layouts; empty for all.
        cp_sizes
            The cp_sizes to draw from; empty for all that the driver can hold.
        examples
            Random traces of each layout; None for those of a whole run.

        Raises
        ------
        SessionError
            When the engine does not declare a profile that was asked for, or the driver has fewer
            ranks than a cp_size.
        """
        names = layouts or LAYOUT_NAMES
        for engine, driver in self.drivers():
            for cp_size in cp_sizes:
                check_world(driver, cp_size)
            sizes = drawn_sizes(driver, cp_sizes)
            tp_sizes = (1,) if cp_sizes else drawn_tp_sizes(driver)
            asked_for = Box(layouts=[*names], cp_size=[*cp_sizes] or None)
            played = self._inside(driver, names, sizes, tp_sizes, asked=bool(layouts))
            needs = at_hand(
                driver.profiles, layouts=played, cp_sizes=sizes, boxes=driver.capabilities
            )
            count = examples or default_examples(driver.name)
            far = self._far(driver, played, sizes)
            plan = Plan(played, sizes, tp_sizes, asked_for, count, needs, far)
            coverage = Coverage(needs)
            for name, one in zip(played, self._each(engine, driver, plan), strict=False):
                coverage.add(one.coverage)
                if one.checked:
                    row = (driver, engine, name, sizes, one.checked, one.tally, one.failure)
                    self._finish(*row, vectors=one.vectors)
                if one.lost or (one.failure and self.stop_at_first):
                    break
            self._cover(engine, driver, coverage)
            if self.stop_at_first and self.failures:
                break

    def _each(self, engine: str, driver: Driver, plan: Plan) -> Iterator[LayoutPlayed]:
        """Play each layout, on this driver or each in a job; yield what came of them in order."""
        if self.jobs == 1:
            yield from (self.layout(driver, name, plan) for name in plan.layouts)
            return
        alone = replace(self, stream=Stream(), progress=no_progress)
        alone.seed = self.seed
        advance = self.progress(f"layouts ({driver.name})", len(plan.layouts))
        jobs, threads = list[subprocess.Popen[bytes]](), ThreadPoolExecutor(self.jobs)

        def played(name: str) -> LayoutPlayed:
            jobs.append(_job())
            words = pickle.dumps((alone, engine, driver.name, plan, name))
            result, said = jobs[-1].communicate(words)
            return _result_of(engine, name, result, said)

        try:
            for one in threads.map(played, plan.layouts):
                advance()
                self.known.add(one.known)
                yield one
        finally:
            threads.shutdown(wait=False, cancel_futures=True)
            for job in jobs:
                if job.poll() is None:
                    end(job.pid)

    def layout(self, driver: Driver, name: str, plan: Plan) -> LayoutPlayed:
        """Play random traces and the shipped vectors of one layout.

        Parameters
        ----------
        driver
            The engine under test.
        name
            The layout's name.
        plan
            What is played.
        """
        tally, coverage, vectors = Tally(), Coverage(plan.needs), 0
        checked, failure = layout_run(
            driver,
            name,
            self.profiles,
            cp_sizes=plan.cp_sizes,
            tp_sizes=plan.tp_sizes,
            examples=plan.examples,
            seed=self.seed or 0,
            tally=tally,
            known=self.known,
            progress=self.progress(f"{name} ({driver.name})", plan.examples),
            coverage=coverage,
            asked_for=plan.asked_for,
            first=[
                *self._earlier(driver, name, plan.asked_for),
                *self._long(driver, name, plan.cp_sizes, mixed_in=plan.layouts),
            ],
            last=plan.last.get(name, []),
            real=True,
        )
        if failure is None:
            vectors, failure = self._stored(driver, name, checked, plan.asked_for)
        lost = _is_lost(driver, failure)
        coverage.trace = None  # of the reference, which is larger than all else
        return LayoutPlayed(checked, failure, lost, tally, vectors, coverage, self.known)

    def _stored(
        self, driver: Driver, layout: str, profiles: frozenset[str], asked_for: Box
    ) -> tuple[int, Failure | None]:
        """Play the shipped vectors of a layout as far as they are for this run.

        Returns how many, and the first failure.
        """
        played = 0
        for vector in shipped_vectors():
            config = vector.config
            if layout_name(config.layout) != layout or outside(asked_for, config):
                continue
            if not profiles or _why_not(driver, vector, profiles) is not None:
                continue
            failure = check_vector(driver, vector, Tally(), profiles, self.known)
            played += 1
            if failure is not None:
                note = f"Vector {vector.name}, which `helix-conformance vectors check` plays."
                trace = msgspec.structs.replace(failure.trace, note=note)
                return played, msgspec.structs.replace(failure, trace=trace)
        return played, None

    def _earlier(self, driver: Driver, layout: str, asked_for: Box) -> list[Trace]:
        """The traces of a layout that failed in earlier runs, as far as they can be played now."""
        paths = sorted(self.folder.glob(f"{layout}-*.json")) if self.folder else []
        traces = [load_trace(path) for path in paths]
        return [
            trace
            for trace in traces
            if layout_name(trace.config.layout) == layout
            and trace.config.world_size <= (driver.largest_world or trace.config.world_size)
            and not outside(asked_for, trace.config)
            and why_outside(driver.capabilities, trace) is None
            and not is_too_long(trace, profiles_to_check(driver.profiles, self.profiles))
        ]

    def _long(
        self, driver: Driver, name: str, cp_sizes: Sequence[int], *, mixed_in: Sequence[str]
    ) -> list[Trace]:
        """A long trace of a layout; with contents of one layout, for engines in a group alone.

        Others may be as slow as the reference, whose attention is plain Python.
        """
        profiles = profiles_to_check(driver.profiles, self.profiles)
        if "placement" not in profiles:
            return []
        if "cache" in profiles:
            chosen = mixed_in[int(self.seed or 0) % len(mixed_in)]
            if driver.name in ("local", "stdio") or name != chosen:
                return []
        features = frozenset(feature for feature in FEATURES if feature in profiles)
        box = _usable(driver, name, profiles, cp_sizes, (1,), driver.capabilities)[0]
        choices = Seeded(f"{self.seed or 0} {name} long")
        # Super-blocks of at most a dozen tokens: owners come round many times in one request.
        few = [size for size in cp_sizes if 1 < size <= 4] or cp_sizes
        box = both(box, Box(tokens_per_block=[1, 2, 3])) or box
        config = soaked_config(choices, name, few, features, profiles, box, LIVE * TOKENS)
        recorder = Recorder(config, {*features, "pages"})
        scope = Scope(features, prompt_lens=PROMPT_LENS)
        events = [*long_events(recorder, choices, scope, LONG_TRACE, box)]
        return [Trace(config=config, events=events, watch=Watch(every=50))]

    def _far(
        self, driver: Driver, names: Sequence[str], cp_sizes: Sequence[int]
    ) -> dict[str, list[Trace]]:
        """A trace at far positions, of one of the layouts; none where contents are looked at."""
        profiles = profiles_to_check(driver.profiles, self.profiles)
        if "placement" not in profiles or "cache" in profiles:
            return {}
        features = [feature for feature in FEATURES if feature in profiles]
        first = int(self.seed or 0) % len(names)
        for name in [*names[first:], *names[:first]]:
            for box in driver.capabilities:
                choices = Seeded(f"{self.seed or 0} {name} far")
                trace = far_trace(choices, name, cp_sizes, features, box)
                if trace is not None:
                    return {name: [trace]}
        return {}

    def _inside(
        self,
        driver: Driver,
        names: Sequence[str],
        cp_sizes: Sequence[int],
        tp_sizes: Sequence[int],
        *,
        asked: bool,
    ) -> list[str]:
        """The layouts of which the engine's capabilities hold something.

        Raises SessionError when that is none, or not one that was asked for by name.
        """
        inside, profiles = list[str](), profiles_to_check(driver.profiles, self.profiles)
        for name in names:
            try:
                _usable(driver, name, profiles, cp_sizes, tp_sizes, driver.capabilities)
                inside.append(name)
            except NothingInsideError as error:
                if asked or (name == names[-1] and not inside):
                    raise SessionError(
                        f"Of layout {name} nothing can be played inside the engine's capabilities "
                        f"({in_words(driver.capabilities)}): {error}"
                    ) from error
        return inside

    def workload(
        self, requests: Sequence[Request], configs: Sequence[Config], **limits: int
    ) -> None:
        """Play a workload with each of several configurations.

        Parameters
        ----------
        requests
            The workload, in the order of arrival.
        configs
            Legal configurations.
        **limits
            `batch_limit` and `max_steps` of `check_workload`.

        Raises
        ------
        WorkloadError
            When a request does not fit an empty pool, and for any other refusal.
        SessionError
            When the engine does not declare a profile that was asked for, or the driver has too few
            ranks.
        """
        # Playing makes no cycles; a collector that walks millions of tokens costs a quarter more.
        gc.set_threshold(1_000_000)
        for engine, driver in self.drivers():
            profiles = profiles_to_check(driver.profiles, self.profiles)
            layouts = [layout_name(config.layout) for config in configs]
            sizes = [config.layout.cp_size for config in configs]
            needs = at_hand(driver.profiles, layouts=layouts, cp_sizes=sizes, random=False)
            coverage = Coverage(needs)
            for config in configs:
                check_world(driver, config.world_size)
                check_inside(driver, Trace(config=config, events=[]))
                name, tally = str(config.layout), Tally()
                failure = check_workload(
                    driver,
                    config,
                    requests,
                    profiles,
                    **limits,
                    tally=tally,
                    released=self.progress(name, len(requests)),
                    coverage=coverage,
                )
                size = [config.layout.cp_size]
                self._finish(driver, engine, name, size, profiles, tally, failure)
                if _is_lost(driver, failure):
                    break
            self._cover(engine, driver, coverage)

    def soak(self, layouts: Sequence[str], cp_sizes: Sequence[int], steps: int) -> None:
        """Play one long trace on each driver, from one start; state is looked at now and then.

        Parameters
        ----------
        layouts
            Names of layouts, of which the first that the engine has is played; empty for any.
        cp_sizes
            The cp_sizes to choose from, the largest first; empty for what the driver can hold.
        steps
            Events.

        Raises
        ------
        SessionError
            When nothing of the layouts lies inside the engine's capabilities.
        """
        gc.set_threshold(1_000_000)  # as for workloads
        for engine, driver in self.drivers():
            for cp_size in cp_sizes:
                check_world(driver, cp_size)
            sizes = drawn_sizes(driver, cp_sizes)
            largest = [size for size in sizes if size <= 8][-1:] or sizes
            profiles = profiles_to_check(driver.profiles, self.profiles)
            [name, *_] = self._inside(
                driver, layouts or LAYOUT_NAMES, largest, (1,), asked=bool(layouts)
            )
            features = frozenset(feature for feature in FEATURES if feature in profiles)
            box = _usable(driver, name, profiles, largest, (1,), driver.capabilities)[0]
            config = soaked_config(
                Seeded(f"{self.seed or 0} soak"), name, largest, features, profiles, box,
                LIVE * TOKENS,
            )  # fmt: skip
            tally, done = Tally(), self.progress(f"{name} ({driver.name})", steps)
            failure = check_long(
                driver, config, features, profiles, steps=steps, seed=f"{self.seed or 0}", box=box,
                tally=tally, done=done,
            )  # fmt: skip
            self._finish(driver, engine, name, largest, profiles, tally, failure)

    def replay(self, trace: Trace, path: Path) -> None:
        """Play one stored trace.

        Parameters
        ----------
        trace
            The trace.
        path
            The file in which it lies; a failure names it.

        Raises
        ------
        SessionError
            When the engine does not declare a profile that was asked for, or the driver has too few
            ranks.
        """
        for engine, driver in self.drivers():
            check_world(driver, trace.config.world_size)
            check_inside(driver, trace)
            profiles, tally = profiles_to_check(driver.profiles, self.profiles), Tally()
            if is_too_long(trace, profiles):
                raise SessionError(
                    "The trace has requests that are too long for their contents to be compared; "
                    "give --profile pages."
                )
            requests = sum(isinstance(event, Admit | Fork) for event in trace.events)
            every = 1 + len(trace.events) * requests // LOOKED_AT
            watch = Watch(every=every) if trace.watch == EVERYTHING else trace.watch
            failure = check_trace(driver, trace, profiles, tally=tally, watch=watch)
            layout = trace.config.layout
            sizes = [layout.cp_size]
            self._finish(driver, engine, str(layout), sizes, profiles, tally, failure, path)

    def vectors(self, cases: Sequence[tuple[Path, Vector]]) -> list[str]:
        """Play vectors, a row for each layout's name; return why some were not played.

        Parameters
        ----------
        cases
            Vectors, each behind the file in which it lies.

        Returns
        -------
        list of str
            A line for each vector that was not checked; empty when all were.

        Raises
        ------
        SessionError
            When the engine does not declare a profile that was asked for.
        """
        left_out, by_layout = list[str](), defaultdict[str, list[tuple[Path, Vector]]](list)
        for path, vector in cases:
            by_layout[layout_name(vector.config.layout)].append((path, vector))
        for engine, driver in self.drivers():
            profiles, lost = profiles_to_check(driver.profiles, self.profiles), False
            for name, group in by_layout.items():
                expected = profiles & self.known.left_out(name)
                reasons = [
                    _why_not(driver, vector, profiles)
                    or self._known_failure(name, vector, expected)
                    for _, vector in group
                ]
                pairs = list(zip(group, reasons, strict=True))
                left_out += [f"not checked: {v.name}: {why}" for (_, v), why in pairs if why]
                meant = [case for case, why in pairs if why is None]
                played = 0
                if meant and not lost:
                    rest = profiles - expected
                    played, lost = self._vectors_of(driver, engine, name, meant, rest)
                left_out += [
                    f"not checked: {v.name}: the engine is gone" for _, v in meant[played:]
                ]
        return left_out

    def _known_failure(self, layout: str, vector: Vector, left_out: frozenset[str]) -> str | None:
        """Why the expected failures leave nothing of a vector to judge; None when they do not."""
        if not self.known.runs(layout):
            return f"layout {layout} must not be run"
        lost = [profile for profile in vector.profiles if profile in left_out]
        return f"{', '.join(lost)} is an expected failure" if lost else None

    def _vectors_of(
        self,
        driver: Driver,
        engine: str,
        layout: str,
        cases: Sequence[tuple[Path, Vector]],
        profiles: frozenset[str],
    ) -> tuple[int, bool]:
        """Play the vectors of one layout: how many were, and whether the engine was lost."""
        tally, found, lost = Tally(), list[Failure | None](), False
        for _, vector in cases:
            found.append(check_vector(driver, vector, tally, profiles, self.known))
            lost = _is_lost(driver, found[-1])
            if lost:
                break
        cases = cases[: len(found)]
        paths = [path for path, _ in cases]
        failed = [(f, path) for f, path in zip(found, paths, strict=True) if f is not None]
        checked = frozenset(p for _, v in cases for p in profiles_of_vector(v, profiles))
        sizes = [vector.config.layout.cp_size for _, vector in cases]
        failed.sort(key=lambda one: one[0].verdict)
        worst, path_of_worst = failed[0] if failed else (None, None)
        row = self._finish(driver, engine, layout, sizes, checked, tally, worst, path_of_worst)
        for failure, path in failed[1:]:
            self._found(row, failure, path)
        return len(cases), lost

    def summary(self) -> Verdict:
        """End the run, and return its verdict.

        It is `error` when an engine did not start or did not finish, and `fail` for a difference,
        or an expected failure that no longer fails.
        """
        rows, coverage = self.stream.of(Row), self.stream.of(CoverageLine)
        ranked: tuple[Verdict, ...] = ("error", "fail", "pass")
        verdict: Verdict = min((row.verdict for row in rows), key=ranked.index, default="error")
        if self.not_started is not None:
            verdict = "error"
        if verdict == "pass" and not self.known.holds:
            verdict = "fail"
        checked = {profile for row in rows for profile in row.profiles}
        events, seconds = sum(row.events for row in rows), sum(row.seconds for row in rows)
        counts = {name: sum(one.counts[name] for one in coverage) for name in SITUATIONS}
        missed = dict.fromkeys(name for one in coverage for name in one.missed)
        self.stream.write(
            Summary(
                engine=self.engine,
                verdict=verdict,
                layouts=list(dict.fromkeys(row.layout for row in rows)),
                profiles_checked=[p for p in PROFILES if p in checked],
                profiles_not_checked=[p for p in PROFILES if p not in checked],
                traces=sum(row.traces for row in rows),
                vectors=sum(row.vectors for row in rows),
                events=events,
                events_per_s=round(events / seconds, 1) if seconds else None,
                known_differences=msgspec.convert(self.known.summary(), list[KnownDifference]),
                coverage=counts,
                missed=[name for name in missed if not counts[name]],
                seed=self.seed,
                capabilities=next((row.capabilities for row in rows if row.capabilities), []),
                freedoms=next((row.freedoms for row in rows if row.freedoms != STRICT), STRICT),
            )
        )
        return verdict

    def _finish(
        self,
        driver: Driver,
        engine: str,
        layout: str,
        cp_sizes: Iterable[int],
        checked: frozenset[str],
        tally: Tally,
        failure: Failure | None,
        path: Path | None = None,
        *,
        vectors: int = 0,
    ) -> Row:
        """Write the row of what was played, and its failure, as soon as they are known."""
        row = Row(
            layout=layout,
            engine=engine,
            driver=driver.name,
            cp_sizes=sorted(set(cp_sizes)),
            profiles=[profile for profile in PROFILES if profile in checked],
            declared=[profile for profile in PROFILES if profile in driver.profiles],
            identifiers=sorted(tally.layouts),
            traces=tally.traces,
            events=tally.events,
            vectors=vectors,
            seconds=round(tally.seconds, 3),
            verdict="pass" if failure is None else failure.verdict,
            known=[difference.subject for difference in self.known.of_layout(layout)],
            settings=dict(driver.settings),
            capabilities=_limits(driver),
            freedoms=driver.freedoms,
        )
        self.stream.write(row)
        if failure is not None:
            self._found(row, failure, path)
        return row

    def _found(self, row: Row, failure: Failure, path: Path | None) -> None:
        if path is None:
            name = f"{row.layout}-{row.driver}"
            path = self._saved(name, failure.trace)
        line = FailureLine(
            layout=row.layout,
            engine=row.engine,
            driver=row.driver,
            declared=row.declared,
            trace_file=str(path),
            **msgspec.structs.asdict(failure),
        )
        self.failures.append(line)
        self.stream.write(msgspec.structs.replace(line, drawn=None))

    def _saved(self, name: str, trace: Trace) -> Path:
        """Write a failing trace; `-` when it is to go nowhere, or cannot be written."""
        if self.folder:
            try:
                return save_trace(self.folder, name, trace, apart=True)
            except OSError as error:
                why = f"{self.folder}: {error.strerror}"
                self.unwritten += [f"This trace could not be written ({why}):", *_lines_of(trace)]
        return Path("-")

    def _cover(self, engine: str, driver: Driver, coverage: Coverage) -> None:
        """Write what the traces of a driver visited, when all were played."""
        self.stream.write(
            CoverageLine(
                engine=engine,
                driver=driver.name,
                counts=coverage.counts,
                missed=coverage.missed,
                impossible=coverage.impossible,
                sizes=coverage.drawn(),
            )
        )

    def _tiers(self) -> list[tuple[str, str]]:
        """Which engine runs on which driver: `gpu` has its bookkeeping in this process, too."""
        driver = self.driver
        if self.engine != "gpu":
            if not isinstance(self.given, str) and not self.given.needs_processes:
                return [(self.engine, driver or "local")]
            return [(self.engine, driver or default_driver(self.engine))]
        bookkeeping, whole = ("gpu-ledger", "local"), ("gpu", driver or "pool")
        if driver is not None:
            return [bookkeeping] if driver == "local" else [whole]
        if self.profiles and not {"cache", "attention", MERGE}.intersection(self.profiles):
            return [bookkeeping]
        return [whole] if self.profiles else [bookkeeping, whole]

    def drivers(self) -> Generator[tuple[str, Driver]]:
        """Yield each engine with a driver that holds it, until one does not start.

        Yields
        ------
        str, Driver
            The engine's name, and a driver that is closed when the next one is asked for.

        Raises
        ------
        SessionError
            When the engine does not declare a profile that was asked for.
        """
        for engine, name in self.tiers:
            try:
                driver = self.open(engine, name)
            except EngineFailure as failure:
                self.not_started = failure
                return
            with closing(driver):
                if self.exchanges_done and not driver.takes_exchanges_done:
                    raise SessionError(
                        f"Engine {engine} takes no start value of its counter of exchanges; one "
                        "that does has an attribute `exchanges_done`, or says so in `ready`."
                    )
                driver.exchanges_done = self.exchanges_done
                missing = [profile for profile in self.profiles if profile not in driver.profiles]
                if missing:
                    declared = ", ".join(p for p in PROFILES if p in driver.profiles)
                    raise SessionError(
                        f"Engine {engine} does not declare {', '.join(missing)}; it declares "
                        f"{declared}."
                    )
                gc.freeze()  # what was imported stays: no collection need look through it again
                try:
                    yield engine, driver
                finally:
                    gc.unfreeze()  # at exit, nothing that is left frozen is released

    def open(self, engine: str, name: str) -> Driver:
        """Return a driver with an engine; whoever opens it closes it.

        Parameters
        ----------
        engine
            The engine's name; where a class was given, that is meant.
        name
            The driver's name.

        Raises
        ------
        EngineFailure
            When the engine does not start.
        """
        if not isinstance(self.given, str) and name == "local":
            return LocalDriver(self.given, deadline_s=self.deadline_s)
        return open_driver(
            engine, name, ranks=self.ranks, backend=self.backend, deadline_s=self.deadline_s
        )


def _job() -> subprocess.Popen[bytes]:
    """Start a process that plays one layout, and ends with this one."""
    code = f"from {__name__} import play_job; play_job()"
    return subprocess.Popen(
        leashed([sys.executable, "-P", "-c", code]),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the process that plays in jobs
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )


def play_job() -> None:
    """Play what stdin names, one layout on a driver of its own; what came of it is on stdout."""
    with os.fdopen(os.dup(1), "wb") as results:
        os.dup2(2, 1)  # what an engine prints
        session, engine, driver_name, plan, layout = pickle.load(sys.stdin.buffer)
        with closing(session.open(engine, driver_name)) as driver:
            driver.exchanges_done = session.exchanges_done
            pickle.dump(session.layout(driver, layout, plan), results)


def _result_of(engine: str, layout: str, result: bytes, said: bytes) -> LayoutPlayed:
    """Return what came of a layout. Raises SessionError when its job has ended without a result."""
    if result:
        played: LayoutPlayed = pickle.loads(result)
        return played
    end = said[-1000:].decode(errors="replace").strip()
    raise SessionError(
        f"The job that plays {layout} on engine {engine} has ended without a result, as when an "
        f"engine crashes its process; --driver stdio keeps engines apart. Its stderr ends: {end!r}"
    )


def drawn_sizes(driver: Driver, asked: Collection[int]) -> list[int]:
    """Return the cp_sizes to draw from: those asked for, else what the driver can hold.

    The smallest come first; a pool's own size counts for most examples. Sizes that the engine's
    capabilities list are among them.

    Parameters
    ----------
    driver
        The engine under test.
    asked
        Sizes that were asked for; empty for all.
    """
    if asked:
        return sorted(set(asked))
    world = driver.largest_world
    few = [*FEW_CP * 4, *RARE_CP] if driver.name == "local" else [*FEW_CP]
    sizes = few if world is None else [*range(1, world), *[world] * world]
    return _declared_sizes(driver, "cp_size", sizes)


def drawn_tp_sizes(driver: Driver) -> list[int]:
    """Return the tp_sizes to draw from where no cp_size was asked for.

    Parameters
    ----------
    driver
        The engine under test.
    """
    return _declared_sizes(driver, "tp_size", [*[1, 2] * 4, 4])


def _declared_sizes(driver: Driver, dimension: str, sizes: list[int]) -> list[int]:
    """Sizes, each as often as before, and those that boxes list, as far as there are ranks."""
    inside = {size for box in driver.capabilities for size in within(box, dimension, sizes)}
    most = driver.largest_world or max(inside)
    more = {size for size in inside.difference(sizes) if size <= most}
    return sorted([*(size for size in sizes if size in inside), *more]) or sizes


def refuse_unknown(
    layouts: Sequence[str],
    profiles: Sequence[str],
    driver: str | None,
    names: Sequence[str] = ("layouts", "profiles", "driver"),
) -> None:
    """Check that layouts, profiles and a driver stand for something.

    Parameters
    ----------
    layouts
        Names of layouts.
    profiles
        Names of profiles.
    driver
        Name of a driver that this process opens by itself; None for what the engine needs.
    names
        What the three options are called in the message.

    Raises
    ------
    SessionError
        When one of them stands for nothing.

    Examples
    --------
    >>> refuse_unknown(["pr9757"], ["lengths"], "gpu")
    Traceback (most recent call last):
        ...
    helix_conformance.session.SessionError: driver: 'gpu' is none of local, stdio, pool.
    """
    given = (layouts, profiles, [driver] if driver else [])
    for option, some, known in zip(names, given, (LAYOUT_NAMES, PROFILES, INSIDE), strict=True):
        for name in some:
            if name not in known:
                raise SessionError(
                    f"{option}: {name!r} is none of {', '.join(known)}.{nearest(name, known)}"
                )


def refuse_below_one(counts: Mapping[str, Iterable[int | None]]) -> None:
    """Check that what counts something is 1 or more.

    Parameters
    ----------
    counts
        Numbers that were given for each option; None where nothing was given.

    Raises
    ------
    SessionError
        When one is below 1.

    Examples
    --------
    >>> refuse_below_one({"examples": [None], "cp": [2, 0]})
    Traceback (most recent call last):
        ...
    helix_conformance.session.SessionError: cp: 0 is too small; it must be at least 1.
    """
    for option, given in counts.items():
        for count in given:
            if count is not None and count < 1:
                raise SessionError(f"{option}: {count} is too small; it must be at least 1.")


def default_examples(driver: str) -> int:
    """Return how many random traces of each layout a whole run plays on a driver.

    Parameters
    ----------
    driver
        The driver's name.
    """
    return 400 if driver == "local" else 40


def check_world(driver: Driver, world: int) -> None:
    """Check that a driver holds enough ranks.

    Parameters
    ----------
    driver
        The engine under test.
    world
        Number of ranks that are needed.

    Raises
    ------
    SessionError
        When it holds fewer.
    """
    if driver.largest_world is not None and world > driver.largest_world:
        raise SessionError(
            f"{world} ranks are needed, and the {driver.name} has {driver.largest_world}; "
            f"give --ranks {world}."
        )


def check_inside(driver: Driver, trace: Trace) -> None:
    """Check that an engine works where a trace plays.

    Parameters
    ----------
    driver
        The engine under test.
    trace
        The trace.

    Raises
    ------
    SessionError
        When it lies outside the engine's capabilities.
    """
    why = why_outside(driver.capabilities, trace)
    if why is not None:
        raise SessionError(f"The trace is not for this engine: {why}.")


def is_too_long(trace: Trace, profiles: Collection[str]) -> bool:
    """Return whether contents would be compared of more tokens than fit (SPEC.md, section 5).

    Parameters
    ----------
    trace
        The trace.
    profiles
        Profiles to check.
    """
    return "cache" in profiles and too_much(trace.config, trace.events, contents=True) is not None


def _lines_of(trace: Trace) -> list[str]:
    return dump_trace(trace).decode().splitlines()


def _limits(driver: Driver) -> list[Box]:
    """The capabilities of an engine; empty when there is no limit."""
    return [] if driver.capabilities == EVERYWHERE else list(driver.capabilities)


def _is_lost(driver: Driver, failure: Failure | None) -> bool:
    """Whether the engine has failed and cannot be asked again."""
    return failure is not None and failure.verdict == "error" and not driver.survives_failure


def _why_not(driver: Driver, vector: Vector, profiles: frozenset[str]) -> str | None:
    """Why a vector is not meant for an engine, or does not fit its driver."""
    missing = [profile for profile in vector.profiles if profile not in profiles]
    undeclared = [profile for profile in missing if profile not in driver.profiles]
    if undeclared:
        return f"the engine does not declare {', '.join(undeclared)}"
    if missing:
        return f"{', '.join(missing)} was not asked for"
    world = vector.config.world_size
    if driver.largest_world is not None and world > driver.largest_world:
        return f"it needs {world} ranks, and the {driver.name} has {driver.largest_world}"
    rewinds = any(isinstance(event, Accept) for event in vector.trace.events)
    if driver.freedoms.rewind_pages == "kept" and rewinds:
        return "it counts the pages that a rewind returns, and the engine keeps them"
    return why_outside(driver.capabilities, vector.trace)
