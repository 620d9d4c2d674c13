"""What a user sees: a table, failures that explain themselves, and one JSON stream.

Everything that is shown is in the stream first; the table and the texts are views of it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from helix_conformance import __version__
from helix_conformance.judge.coverage import SITUATIONS, Coverage
from helix_conformance.judge.failure import Failure, Violation
from helix_conformance.judge.xfail import Difference, Known
from helix_conformance.report.show import event_text, trace_text
from helix_conformance.report.stream import (
    CoverageLine,
    FailureLine,
    KnownDifference,
    Line,
    Row,
    Settings,
    Summary,
    Verdict,
    append_line,
)
from helix_conformance.session import Tally
from helix_spec.engine import LADDER, PROFILES
from helix_spec.invariants import sentence
from helix_spec.trace import dump_trace


class Stream:
    """Writes the JSON lines of a run; without a path they go nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []
        self.dead = False
        """Whether an engine did not start, so that nothing of it was played."""
        self.coverage: list[Coverage] = []
        if path is not None:
            path.write_bytes(b"")

    def write(self, line: Line) -> None:
        """One line, on disk at once: a run that is cut off leaves what it knew."""
        if self.path is not None:
            append_line(self.path, line)

    def settings(
        self, command: str, engine: str, restrictions: Sequence[str] = (), **options: Any
    ) -> None:
        """The first line: everything that was set, and the machine."""
        self.write(
            Settings(
                command=command,
                engine=engine,
                suite_version=__version__,
                started=datetime.now(UTC).isoformat(timespec="seconds"),
                python=platform.python_version(),
                machine=platform.machine(),
                options={k: str(v) if isinstance(v, Path) else v for k, v in options.items()},
                restrictions=list(restrictions),
            )
        )

    def row(self, row: Row) -> None:
        """A layout is done."""
        self.rows.append(row)
        self.write(row)

    def failure(self, row: Row, failure: Failure, path: Path) -> None:
        """A layout is red."""
        self.write(
            FailureLine(
                layout=row.layout,
                engine=row.engine,
                driver=row.driver,
                event=failure.event,
                violations=failure.violations,
                engine_failure=failure.engine_failure,
                rank=failure.rank,
                trace=failure.trace,
                trace_file=str(path),
                declared=row.declared,
                answers=failure.answers,
            )
        )

    def covered(self, engine: str, driver: str, coverage: Coverage) -> None:
        """All traces of one driver were played."""
        self.coverage.append(coverage)
        counts, missed, impossible = coverage.counts, coverage.missed, coverage.impossible
        self.write(
            CoverageLine(
                engine=engine, driver=driver, counts=counts, missed=missed, impossible=impossible
            )
        )

    def summary(self, engine: str, known: Known | None = None, seed: int | None = None) -> Verdict:
        """The last line; returns the verdict: a ledger that is no longer true fails a run."""
        known = known or Known()
        verdict = worst_verdict([row.verdict for row in self.rows])
        if self.dead:
            verdict = "error"
        if verdict == "pass" and not known.holds:
            verdict = "fail"
        checked = {profile for row in self.rows for profile in row.profiles}
        events, seconds = sum(r.events for r in self.rows), sum(r.seconds for r in self.rows)
        self.write(
            Summary(
                engine=engine,
                verdict=verdict,
                layouts=list(dict.fromkeys(row.layout for row in self.rows)),
                profiles_checked=[p for p in PROFILES if p in checked],
                profiles_not_checked=[p for p in PROFILES if p not in checked],
                traces=sum(row.traces for row in self.rows),
                events=events,
                events_per_s=round(events / seconds, 1) if seconds else None,
                known_differences=msgspec.convert(known.summary(), list[KnownDifference]),
                coverage=total_counts(self.coverage),
                missed=missed_by_all(self.coverage),
                seed=seed,
            )
        )
        return verdict


def make_row(
    layout: str,
    engine: str,
    driver: str,
    cp_sizes: Sequence[int],
    profiles: frozenset[str],
    declared: frozenset[str],
    tally: Tally,
    failure: Failure | None,
    known: Sequence[Difference] = (),
    settings: Mapping[str, str] | None = None,
) -> Row:
    """The row of a finished layout."""
    return Row(
        layout=layout,
        engine=engine,
        driver=driver,
        cp_sizes=sorted(set(cp_sizes)),
        profiles=[profile for profile in PROFILES if profile in profiles],
        declared=[profile for profile in PROFILES if profile in declared],
        identifiers=sorted(tally.layouts),
        traces=tally.traces,
        events=tally.events,
        seconds=round(tally.seconds, 3),
        verdict="pass" if failure is None else failure.verdict,
        known=[difference.subject for difference in known],
        settings=dict(settings or {}),
    )


def total_counts(coverage: Sequence[Coverage]) -> dict[str, int]:
    """How often each situation was visited, by the traces of all drivers."""
    return {name: sum(one.counts[name] for one in coverage) for name in SITUATIONS}


def missed_by_all(coverage: Sequence[Coverage]) -> list[str]:
    """Situations that no driver's traces visited, though some could have."""
    visited = {name for one in coverage for name, count in one.counts.items() if count}
    return list(dict.fromkeys(m for one in coverage for m in one.missed if m not in visited))


def restrictions(options: Mapping[str, Any], *, examples: int, layouts: int) -> list[str]:
    """Why a run with these options is not a whole one, a sentence each.

    A whole one plays so many layouts, and of each so many random traces.
    """
    found = []
    named, cp_sizes, asked = options["layouts"], options["cp_sizes"], options["asked"]
    if options["workload"]:
        found.append("A workload was replayed; no random traces were played.")
    elif named and len(set(named)) < layouts:
        played = list(dict.fromkeys(named))
        found.append(f"Only {len(played)} of {layouts} layouts were played: {', '.join(played)}.")
    if cp_sizes:
        found.append(f"Not every cp_size was played, but {', '.join(map(str, cp_sizes))}.")
    if asked:
        found.append(f"Not every profile was asked for, but {', '.join(asked)}.")
    if options["examples"] and options["examples"] < examples:
        found.append(
            f"Only {options['examples']} random traces were played of each layout; "
            f"a whole run plays {examples}."
        )
    return found


def worst_verdict(verdicts: Sequence[Verdict]) -> Verdict:
    """`error` before `fail` before `pass`; a run of nothing is an error."""
    ranked: tuple[Verdict, ...] = ("error", "fail", "pass")
    return min(verdicts, key=ranked.index, default="error")


def print_table(console: Console, rows: Sequence[Row]) -> None:
    """The table of a run."""
    table = Table("layout", "driver", "cp_size", "profiles", box=None, pad_edge=False)
    table.columns[0].no_wrap = True
    for column in ("traces", "events", "events/s"):
        table.add_column(column, justify="right")
    table.add_column("verdict")
    colour = {"pass": "green", "fail": "red", "error": "red"}
    for row in rows:
        speed = f"{row.events / row.seconds:,.0f}" if row.seconds else "-"
        table.add_row(
            row.layout,
            row.driver,
            " ".join(map(str, row.cp_sizes)),
            " ".join(deepest(row.profiles)),
            f"{row.traces:,}",
            f"{row.events:,}",
            speed,
            f"[{colour[row.verdict]}]{row.verdict}[/]" + _but(row.known),
        )
    console.print(table)


def _but(known: Sequence[str]) -> str:
    return f", [yellow]{len(known)} known[/]" if known else ""


def deepest(profiles: Sequence[str]) -> list[str]:
    """The deepest profile of the ladder, which includes those before it, and the features."""
    ladder = [profile for profile in LADDER if profile in profiles]
    return ladder[-1:] + [profile for profile in profiles if profile not in LADDER]


def print_coverage(
    console: Console, drivers: Sequence[str], coverage: Sequence[Coverage], *, red: bool
) -> None:
    """How often each situation was visited, a column for each driver; then what was missed."""
    console.print()
    if red:
        console.print("Coverage ends where a layout failed; what was missed is in the JSON stream.")
        return
    table = Table("situation", *drivers, box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for name in SITUATIONS:
        table.add_row(name, *(_count(one, name) for one in coverage))
    console.print(table)
    for driver, one in zip(drivers, coverage, strict=True):
        for line in coverage_text(driver, one):
            console.print(line, markup=False, highlight=False, soft_wrap=True)


def _count(coverage: Coverage, name: str) -> str:
    if name in coverage.impossible:
        return "[dim]impossible[/]"
    count = coverage.counts[name]
    return f"{count:,}" if count else "[yellow]missed[/]"


def coverage_text(driver: str, coverage: Coverage) -> Iterator[str]:
    """What the traces of a driver missed, and what they could not have met, a line each."""
    if coverage.missed:
        names = [
            f"{name} ({', '.join(SITUATIONS[name])})" if SITUATIONS[name] else name
            for name in coverage.missed
        ]
        yield f"Missed by the traces of {driver}: {'; '.join(names)}."
    lacking: dict[str, list[str]] = {}
    for name, need in coverage.impossible.items():
        lacking.setdefault(need, []).append(name)
    for need, names in lacking.items():
        yield f"Impossible there without {need}: {'; '.join(names)}."


def print_failure(console: Console, failure: Failure, path: Path, replay: str) -> None:
    """A red layout: the minimal trace, each invariant with its sentence, expected, observed."""
    for line in failure_text(failure):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"The trace is in {path}; replay it with:", markup=False, soft_wrap=True)
    console.print(f"  {replay}", markup=False, highlight=False, soft_wrap=True)


def failure_text(failure: Failure | FailureLine) -> Iterator[str]:
    """A failure in lines."""
    events = failure.trace.events
    if failure.event is None:
        where = "at the start" if not events else "at the end of the trace"
    else:
        where = f"at event {failure.event}, {event_text(events[failure.event])}"
    yield ""
    if failure.engine_failure is not None:
        yield f"{failure.engine_failure} {sentence('LIVE-1')}"
    else:
        numbers = ", ".join(dict.fromkeys(v.invariant for v in failure.violations))
        yield f"{numbers} violated {where}."
    yield from (f"  {line}" for line in trace_text(failure.trace))
    shown: set[str] = set()
    for violation in failure.violations:
        if violation.invariant not in shown:
            yield sentence(violation.invariant)
            shown.add(violation.invariant)
        yield from _violation_text(violation)


def _violation_text(violation: Violation) -> Iterator[str]:
    where = "all ranks" if violation.rank is None else f"rank {violation.rank}"
    yield f"  {where}: {violation.message}"
    yield f"    expected {_short(violation.expected)}"
    yield f"    observed {_short(violation.observed)}"


def _short(value: Any) -> str:
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= 300 else text[:300] + " ..."


def save_failure(folder: Path, row: Row, failure: Failure) -> Path:
    """Write the failing trace; returns where."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{row.layout.replace('/', '-').replace(':', '-')}-{row.driver}.json"
    path.write_bytes(dump_trace(failure.trace))
    return path
