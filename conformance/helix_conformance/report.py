"""What a user sees: a table, failures that explain themselves, and one JSON stream.

Everything that is shown is in the stream first; the table and the texts are views of it.
"""

from __future__ import annotations

import platform
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
from rich.console import Console
from rich.table import Table

from helix_conformance.known import Difference, Known
from helix_conformance.protocol import LADDER, PROFILES
from helix_conformance.runs import Failure, Tally
from helix_conformance.show import event_text, trace_text
from helix_conformance.violations import Violation
from helix_spec.invariants import sentence
from helix_spec.traces import dump_trace


class Row(msgspec.Struct, frozen=True, kw_only=True, tag_field="kind", tag="row"):
    """One line of the table: one layout, or one workload, through one driver."""

    layout: str
    engine: str
    driver: str
    cp_sizes: list[int]
    profiles: list[str]
    traces: int
    events: int
    seconds: float
    verdict: str
    known: list[str] = []
    """Known differences of the engine that showed here, or were not run."""


class Stream:
    """The JSON lines of a run; without a path they go nowhere."""

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.rows: list[Row] = []
        if path is not None:
            path.write_bytes(b"")

    def write(self, message: Any) -> None:
        """One line, on disk at once: a run that is cut off leaves what it knew."""
        if self.path is not None:
            with self.path.open("ab") as file:
                file.write(msgspec.json.encode(message) + b"\n")

    def settings(self, **settings: Any) -> None:
        """The first line: everything that was set, and the machine."""
        machine = {"python": platform.python_version(), "machine": platform.machine()}
        self.write({"kind": "settings", **settings, **machine})

    def row(self, row: Row) -> None:
        """A layout is done."""
        self.rows.append(row)
        self.write(row)

    def failure(self, row: Row, failure: Failure, path: Path) -> None:
        """A layout is red."""
        self.write(
            {
                "kind": "failure",
                "layout": row.layout,
                "driver": row.driver,
                "event": failure.event,
                "engine_failure": failure.engine_failure,
                "violations": failure.violations,
                "trace_file": str(path),
            }
        )

    def summary(self, known: Known | None = None, **more: Any) -> str:
        """The last line; returns the verdict: a ledger that is no longer true fails a run."""
        known = known or Known()
        verdict = worst_verdict([row.verdict for row in self.rows])
        if verdict == "pass" and not known.holds:
            verdict = "fail"
        checked = {profile for row in self.rows for profile in row.profiles}
        events, seconds = sum(r.events for r in self.rows), sum(r.seconds for r in self.rows)
        self.write(
            {
                "kind": "summary",
                "verdict": verdict,
                "layouts": list(dict.fromkeys(row.layout for row in self.rows)),
                "profiles_checked": [p for p in PROFILES if p in checked],
                "profiles_not_checked": [p for p in PROFILES if p not in checked],
                "traces": sum(row.traces for row in self.rows),
                "events": events,
                "events_per_s": round(events / seconds, 1) if seconds else None,
                "known_differences": known.summary(),
                **more,
            }
        )
        return verdict


def make_row(
    layout: str,
    engine: str,
    driver: str,
    cp_sizes: Sequence[int],
    profiles: frozenset[str],
    tally: Tally,
    failure: Failure | None,
    known: Sequence[Difference] = (),
) -> Row:
    """The row of a finished layout."""
    return Row(
        layout=layout,
        engine=engine,
        driver=driver,
        cp_sizes=sorted(set(cp_sizes)),
        profiles=[profile for profile in PROFILES if profile in profiles],
        traces=tally.traces,
        events=tally.events,
        seconds=round(tally.seconds, 3),
        verdict="pass" if failure is None else failure.verdict,
        known=[difference.subject for difference in known],
    )


def worst_verdict(verdicts: Sequence[str]) -> str:
    """`error` before `fail` before `pass`; a run of nothing is an error."""
    ranked = ("error", "fail", "pass")
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


def print_failure(console: Console, failure: Failure, path: Path, replay: str) -> None:
    """A red layout: the minimal trace, each invariant with its sentence, expected, observed."""
    for line in failure_text(failure):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    console.print(f"The trace is in {path}; replay it with:", markup=False, soft_wrap=True)
    console.print(f"  {replay}", markup=False, highlight=False, soft_wrap=True)


def failure_text(failure: Failure) -> Iterator[str]:
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
