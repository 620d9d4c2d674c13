"""Whether what a FINDINGS.md says still shows: `python -m helix_adapters.findings FOLDER`.

FOLDER is an adapter's: its `findings.toml` names for each finding a stored trace, the engine on
which it fails, and the invariants that it must still be named by. One that no longer fails so ends
the command with status 1: then the text is out of date.
"""

from __future__ import annotations

import argparse
import sys
import tomllib
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path

import msgspec
from rich.console import Console
from rich.table import Table

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import PoolDriver
from helix_conformance.engines import load_engine
from helix_conformance.judge.play import check_trace
from helix_spec.trace import load_trace


class Finding(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A stored trace, the engine on which it fails, and what it must still be named by."""

    number: int
    """Its heading in FINDINGS.md; it is never given to another."""
    engine: str
    trace: str
    named_by: frozenset[str]
    deadline_s: float = 30.0
    """How long a rank may take, on which it fails by taking longer."""


def findings_of(folder: Path) -> list[Finding]:
    """Return the findings of an adapter, in the order in which they are played."""
    table = tomllib.loads((folder / "findings.toml").read_text(encoding="utf-8"))
    return msgspec.convert(table["finding"], list[Finding])


def still_shown(folder: Path, findings: Sequence[Finding]) -> Iterator[tuple[Finding, set[str]]]:
    """Yield each finding with the invariants that its trace fails by now; none when it passes."""
    for (engine, deadline_s), mine in groupby(findings, key=lambda f: (f.engine, f.deadline_s)):
        needs_processes = load_engine(engine).needs_processes
        driver: Driver = (
            PoolDriver(engine, deadline_s=deadline_s)
            if needs_processes
            else LocalDriver(load_engine(engine))
        )
        try:
            for finding in mine:
                trace = load_trace(folder / "findings" / f"{finding.trace}.json")
                failure = check_trace(driver, trace, frozenset(driver.profiles))
                yield finding, set() if failure is None else failure.invariants
        finally:
            driver.close()


def main(folder: Path) -> int:
    """Print a table of the findings in this folder; return 0 when all of them still show."""
    table = Table("", "finding", "engine", "named by", "now", "still shows", box=None)
    all_show = True
    for finding, names in still_shown(folder, findings_of(folder)):
        shows = finding.named_by <= names
        all_show = all_show and shows
        table.add_row(
            str(finding.number),
            finding.trace,
            finding.engine.rpartition(":")[2],
            " ".join(sorted(finding.named_by)),
            " ".join(sorted(names)) or "-",
            "yes" if shows else "no",
        )
    Console(width=140).print(table)
    return 0 if all_show else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="the adapter's")
    sys.exit(main(parser.parse_args().folder))
