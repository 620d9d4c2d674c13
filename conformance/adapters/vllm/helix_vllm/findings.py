"""Whether what FINDINGS.md says of vLLM still shows: `python -m helix_vllm.findings FOLDER`.

Each trace that is stored in FOLDER must still fail, by the invariants that its finding names. One
that no longer does ends with status 1: then the text is out of date.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

from rich.console import Console
from rich.table import Table

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import PoolDriver
from helix_conformance.engines import load_engine
from helix_conformance.judge.play import check_trace
from helix_spec.trace import load_trace


class Finding(NamedTuple):
    """A stored trace, the engine on which it fails, and what it must still be named by."""

    engine: str
    trace: str
    names: frozenset[str]


HERE = "helix_vllm.engines"
FINDINGS = [
    Finding(f"{HERE}:VllmOldFlag", "vllm-old-interleave-flag", frozenset({"OWN-3", "LEN-1"})),
    Finding(
        f"{HERE}:VllmV1Strict", "vllm-rejected-tokens-keep-pages", frozenset({"PAGE-1", "PAGE-3"})
    ),
    Finding(
        f"{HERE}:VllmV2Strict", "vllm-rejected-tokens-keep-pages", frozenset({"PAGE-1", "PAGE-3"})
    ),
    Finding(
        f"{HERE}:VllmPrefixReuse", "vllm-prefix-reuse-shares-pages", frozenset({"PAGE-2", "PAGE-3"})
    ),
    Finding("vllm-ag-rs", "vllm-ag-rs-one-rank", frozenset({"LIVE-1"})),
    Finding("vllm-ag-rs", "vllm-ag-rs-one-rank-two-tokens", frozenset({"ATT-1"})),
    Finding("vllm-ag-rs", "vllm-ag-rs-three-ranks", frozenset({"LIVE-1"})),
    Finding("vllm-ag-rs", "vllm-ag-rs-bfloat16", frozenset({"ATT-1", "ATT-4"})),
    Finding("vllm-a2a", "vllm-a2a-one-rank-empty", frozenset({"ATT-1", "ATT-3", "ATT-4"})),
]


def still_shown(folder: Path, findings: Sequence[Finding]) -> Iterator[tuple[Finding, set[str]]]:
    """Yield each finding with the invariants that its trace fails by now; none when it passes."""
    for engine, mine in groupby(findings, key=lambda finding: finding.engine):
        needs_processes = load_engine(engine).needs_processes
        driver: Driver = PoolDriver(engine) if needs_processes else LocalDriver(load_engine(engine))
        try:
            for finding in mine:
                trace = load_trace(folder / f"{finding.trace}.json")
                failure = check_trace(driver, trace, frozenset(driver.profiles))
                yield finding, set() if failure is None else failure.invariants
        finally:
            driver.close()


def main(folder: Path) -> int:
    """Print a table of the findings in this folder; return 0 when all of them still show."""
    table = Table("finding", "engine", "named by", "now", "still shows", box=None)
    all_show = True
    for finding, names in still_shown(folder, FINDINGS):
        shows = finding.names <= names
        all_show = all_show and shows
        table.add_row(
            finding.trace,
            finding.engine.rpartition(":")[2],
            " ".join(sorted(finding.names)),
            " ".join(sorted(names)) or "-",
            "yes" if shows else "no",
        )
    Console().print(table)
    return 0 if all_show else 1


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="where the traces are stored")
    sys.exit(main(parser.parse_args().folder))
