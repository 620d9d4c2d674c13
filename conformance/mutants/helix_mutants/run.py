"""The suite against every mutant, at the cheapest tier on which it can show."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from contextlib import contextmanager
from itertools import repeat
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Final

import msgspec
from rich.progress import track
from rich.table import Table

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import PoolDriver
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines import load_engine
from helix_conformance.generate.choices import Choices, Seeded
from helix_conformance.generate.configs import draw_config
from helix_conformance.generate.groups import with_groups
from helix_conformance.generate.traces import draw_trace, far_trace
from helix_conformance.judge.coverage import Needed, Tally
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.play import profiles_to_check
from helix_conformance.report.stream import MutantKill, MutationRun, append_line
from helix_conformance.report.text import stdout
from helix_conformance.session import random_traces
from helix_conformance.version import __version__
from helix_mutants.parts import MUTANTS, Mutant, Stored
from helix_spec.capabilities import UNLIMITED, Box, Span
from helix_spec.engine import PROFILES
from helix_spec.events import FEATURES, MERGE, PREFIX
from helix_spec.invariants import NUMBERS
from helix_spec.trace import Trace

for _module in (
    "ledger",
    "model",
    "cache",
    "corners",
    "edges",
    "runs",
    "reports",
    "groups",
    "prefixes",
):
    importlib.import_module(f"helix_mutants.on_{_module}")

ONE_PROCESS: Final = ("bookkeeping", "contents", "threads")
TIERS: Final = {
    "sample": ONE_PROCESS,
    "one-process": ONE_PROCESS,
    "corners": ONE_PROCESS,
    "pool": ("pool",),
    "all": (*ONE_PROCESS, "pool"),
}
"""What a mutation run may be asked for, and the tiers of mutants that this takes in.

Mutants that show in corners only are in `corners` and `all`; `sample` has one mutant for each
invariant that some of ONE_PROCESS break, of the cheapest tier.
"""


class _Play(msgspec.Struct, frozen=True):
    """How a tier is played."""

    cp_sizes: tuple[int, ...]
    world: int
    mutant_traces: int
    """After so many a mutant has survived."""
    control_traces: int


_PLAYS: Final = {
    "bookkeeping": _Play((1, 2, 3, 4, 8), 8, 1000, 150),
    "contents": _Play((1, 2, 3, 4), 8, 400, 15),
    "threads": _Play((1, 2, 3, 4), 4, 400, 40),
    "pool": _Play((1, 2, 3, 4), 4, 100, 10),
}
_SMALL: Final = Box(head_dim=[16], q_heads=Span(max=8), layers=Span(max=2), max_len=[24, 9])
"""Of cache groups with contents: the reference computes them, naively."""
_CORNER: Final = 4
"""For a mutant that shows in a corner only: so many times as many traces."""
_MUTANT_DEADLINE_S: Final = 5.0
"""A mutant that hangs is waited for no longer; an unmutated engine may be on a busy machine."""
_CONTROL_DEADLINE_S: Final = 60.0

CONTROLS: Final = (
    ("gpu-ledger", "bookkeeping"),
    ("reference", "bookkeeping"),
    (f"{Stored.__module__}:{Stored.__name__}", "contents"),
    ("gpu", "threads"),
    ("gpu", "pool"),
)
"""Unmutated engines, with the tier on which they must pass."""


def play_mutant(mutant: Mutant, *, seed: int) -> MutantKill:
    """Return how the suite fares against one mutant.

    It plays until a failure names an expected invariant or the mutant's traces are used up. A
    failure that names something else has caught the mutant, and said less of what is wrong: the
    run goes on with other traces.
    """
    left = _PLAYS[mutant.tier].mutant_traces * (_CORNER if mutant.corner else 1)
    failure: Failure | None = None
    failures, examples, seconds = 0, 0, 0.0
    with _driver(mutant.engine, mutant.tier, _MUTANT_DEADLINE_S) as driver:
        while examples < left and (not failures or driver.survives_failure):
            tally, other = Tally(), f"{seed}, {failures}" if failures else seed
            found = _played(driver, mutant, left - examples, other, tally)
            needed = tally.needed or Needed(tally.traces, tally.seconds)
            examples, seconds = examples + needed.traces, seconds + needed.seconds
            if found is None:
                break
            failure, failures = found, failures + 1
            if _is_named(mutant, failure):
                break
    return MutantKill(
        name=mutant.name,
        source=mutant.source,
        killed=_is_named(mutant, failure),
        by=_named(failure),
        events=0 if failure is None else len(failure.trace.events),
        examples=examples,
        seconds=round(seconds, 3),
        failures=failures,
    )


def play_control(engine: str, tier: str, *, seed: int, share: float = 1.0) -> list[str]:
    """Return the invariants that a run wrongly names for an unmutated engine.

    `share` of its traces are played.
    """
    deep = PROFILES if tier != "bookkeeping" else [p for p in PROFILES if p not in _DEEP]
    unmutated = Mutant(
        name=engine, source="", engine=engine, expected=(), tier=tier, profiles=tuple(deep),
        tp_sizes=(1, 2),
    )  # fmt: skip
    with _driver(engine, tier, _CONTROL_DEADLINE_S) as driver:
        traces = int(share * _PLAYS[tier].control_traces)
        return _named(_played(driver, unmutated, traces, seed, Tally()))


_DEEP: Final = ("cache", "attention")


def _played(
    driver: Driver, mutant: Mutant, examples: int, seed: int | str, tally: Tally
) -> Failure | None:
    profiles = profiles_to_check(driver.profiles, mutant.profiles)
    features = [feature for feature in FEATURES if feature in profiles]
    play, grouped = _PLAYS[mutant.tier], "groups" in profiles
    found = PREFIX in profiles
    box = _SMALL if grouped and "cache" in profiles else UNLIMITED

    def draw(choices: Choices) -> Trace:
        config = draw_config(
            choices,
            names=mutant.layouts,
            cp_sizes=play.cp_sizes,
            tp_sizes=mutant.tp_sizes,
            max_world=play.world,
            features=features,
            contents="cache" in profiles,
            box=box,
        )
        if grouped and choices.one_in(2):
            config = with_groups(choices, config, profiles, box)
        finds = found and not config.groups
        return draw_trace(
            choices,
            config,
            features=[*features, PREFIX] if finds and choices.one_in(2) else features,
            undeclared={*FEATURES, MERGE} - driver.profiles,
            contents="cache" in profiles,
        )

    first = list[Trace]()
    if mutant.far:
        choices = Seeded(f"{seed} far")
        name = choices.pick(mutant.layouts)
        far = far_trace(choices, name, play.cp_sizes, features, UNLIMITED)
        first = [] if far is None else [far]
    return random_traces(
        driver, draw, profiles, examples=examples, seed=seed, tally=tally, first=first
    )


def _is_named(mutant: Mutant, failure: Failure | None) -> bool:
    return not set(mutant.expected).isdisjoint(_named(failure))


def _named(failure: Failure | None) -> list[str]:
    return [] if failure is None else [name for name in NUMBERS if name in failure.invariants]


@contextmanager
def _driver(engine: str, tier: str, deadline_s: float) -> Iterator[Driver]:
    driver: Driver
    if tier == "pool":
        driver = PoolDriver(engine, deadline_s=deadline_s)
    elif tier == "threads":
        driver = ThreadDriver(load_engine(engine))
    else:
        driver = LocalDriver(load_engine(engine))
    try:
        yield driver
    finally:
        driver.close()


def mutants_of(tier: str) -> list[Mutant]:
    """Return the mutants that a run of this tier plays."""
    corners = {"corners": {True}, "all": {True, False}}.get(tier, {False})
    found = [
        mutant for mutant in MUTANTS if mutant.tier in TIERS[tier] and mutant.corner in corners
    ]
    if tier != "sample":
        return found
    found.sort(key=lambda mutant: ONE_PROCESS.index(mutant.tier))
    firsts = (next((m for m in found if number in m.expected), None) for number in NUMBERS)
    return [m for m in dict.fromkeys(firsts) if m is not None]


def mutation_run(
    tier: str, seed: int, progress: Callable[[Iterator[MutantKill]], Iterable[MutantKill]] = iter
) -> MutationRun:
    """Play every mutant and control of one of TIERS."""
    with _workers() as pool:
        controls = {
            f"{engine.rpartition(':')[2]} ({on})": pool.submit(
                play_control, engine, on, seed=seed, share=0.2 if tier == "sample" else 1.0
            )
            for engine, on in CONTROLS
            if on in TIERS[tier] and tier != "corners"
        }
        kills = list(progress(_kills(pool, mutants_of(tier), seed)))
        return MutationRun(
            suite_version=__version__,
            tier=tier,
            seed=seed,
            score=f"{sum(kill.killed for kill in kills)}/{len(kills)}",
            mutants=kills,
            controls={name: verdict.result() for name, verdict in controls.items()},
        )


def _workers() -> Executor:
    """Return as many processes as a small machine has cores; each plays one mutant at a time."""
    return ProcessPoolExecutor(2, get_context("spawn"))


def _kills(pool: Executor, mutants: Sequence[Mutant], seed: int) -> Iterator[MutantKill]:
    return pool.map(_play_by_name, [mutant.name for mutant in mutants], repeat(seed))


def _play_by_name(name: str, seed: int) -> MutantKill:
    return play_mutant(next(mutant for mutant in MUTANTS if mutant.name == name), seed=seed)


def score(json_path: Path | None, tier: str, seed: int, stream_path: Path | None = None) -> int:
    """Play a tier, print a table, write what is asked for; return 0 when all is as expected."""
    console = stdout()
    total = len(mutants_of(tier))
    seen = mutation_run(
        tier, seed, lambda kills: track(kills, "Mutants", total=total, console=console)
    )
    console.print(_table(seen))
    examples, seconds = (
        median([getattr(kill, name) for kill in seen.mutants]) for name in ("examples", "seconds")
    )
    small = sum(kill.events <= 6 for kill in seen.mutants)
    console.print(
        f"score {seen.score}, {_at_once(seen.mutants)} by the first failure; median {examples:g} "
        f"examples, {seconds:.2f} s; {small} of {len(seen.mutants)} minimal traces have at most 6 "
        "events"
    )
    if json_path is not None:
        whole = {"mutants": seen.mutants, "controls": seen.controls, "score": seen.score}
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(whole)))
    if stream_path is not None:
        append_line(stream_path, seen)
    return 0 if seen.clean else 1


def _table(seen: MutationRun) -> Table:
    table = Table("mutant", "source", "killed by", "events", "examples", "seconds")
    for column in table.columns[3:]:
        column.justify = "right"
    for name, wrongly in seen.controls.items():
        verdict = f"[red]{', '.join(wrongly)}[/]" if wrongly else "[green]passes, as it should[/]"
        table.add_row(name, "unmutated", verdict)
    table.add_section()
    for kill in seen.mutants:
        by = ", ".join(kill.by) or "survived"
        table.add_row(
            kill.name,
            kill.source,
            by if kill.killed else f"[red]{by}[/]",
            str(kill.events),
            str(kill.examples),
            f"{kill.seconds:.2f}",
        )
    return table


def sweep(tier: str = "one-process", seeds: Sequence[int] = range(10)) -> int:
    """Print the worst of each mutant under these seeds, and the worst seed; 0 when all die."""
    console = stdout()
    mutants = mutants_of(tier)
    with _workers() as pool:
        kills = dict[int, list[MutantKill]]()
        for seed in track(seeds, "Seeds", console=console):
            kills[seed] = list(_kills(pool, mutants, seed))
            console.print(f"seed {seed}: {_said_of(kills[seed])}")
    table = Table(
        "mutant", "killed", "most examples", "most seconds", "most events", "most failures"
    )
    for place, mutant in enumerate(mutants):
        of_mutant = [found[place] for found in kills.values()]
        killed = sum(kill.killed for kill in of_mutant)
        table.add_row(
            mutant.name,
            f"{killed}/{len(of_mutant)}" if killed == len(of_mutant) else f"[red]{killed}[/]",
            str(max(kill.examples for kill in of_mutant)),
            f"{max(kill.seconds for kill in of_mutant):.2f}",
            str(max(kill.events for kill in of_mutant)),
            str(max(kill.failures for kill in of_mutant)),
        )
    console.print(table)
    worst = min(seeds, key=lambda seed: _strength(kills[seed]))
    console.print(f"worst seed {worst}: {_said_of(kills[worst])}")
    return 0 if all(kill.killed for found in kills.values() for kill in found) else 1


def _said_of(found: Sequence[MutantKill]) -> str:
    """Return how a seed fared, in one line."""
    survived = [kill.name for kill in found if not kill.killed]
    return (
        f"{len(found) - len(survived)}/{len(found)} killed by name, "
        f"{_at_once(found)} by the first failure, {sum(kill.examples for kill in found)} examples "
        f"in all{'; not: ' if survived else ''}{', '.join(survived)}"
    )


def _at_once(found: Sequence[MutantKill]) -> int:
    """How many were killed by name by the first failure that was seen of them."""
    return sum(kill.killed and kill.failures == 1 for kill in found)


def _strength(found: Sequence[MutantKill]) -> tuple[int, int, int]:
    killed, examples = sum(kill.killed for kill in found), sum(kill.examples for kill in found)
    return killed, _at_once(found), -examples
