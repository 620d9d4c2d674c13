"""Confirm every theorem of the specification, each in a process of its own.

The gate is the manifest (`helix_spec/theorems/manifest.txt`): exactly these theorems must be
there, and each must be confirmed: its assumptions met by its witness, its proof found on all
paths, and every wrong formula it is set against refuted. Nothing is read from an exit status.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from importlib.util import find_spec
from pathlib import Path
from typing import Final, Literal

import msgspec
from rich.console import Console
from rich.progress import TextColumn
from rich.table import Column, Table
from rich.text import Text

import helix_spec
from helix_conformance.drive.processes import leashed, nothing_left
from helix_conformance.foreign import shown, shown_json, shown_lines
from helix_conformance.report.stream import (
    CONFIRMED,
    ProofReport,
    Proofs,
    TheoremResult,
    append_line,
    encoded,
)
from helix_conformance.report.text import progress_bar, stdout
from helix_conformance.version import __version__

INTERRUPTED: Final = 130
"""The exit status after Ctrl-C, as a shell has it."""
MAX_SECONDS: Final = 200
"""For one theorem. The proofs end by their own resource budgets; this is for one that does not."""


class ProveError(Exception):
    """Nothing could be proved or refuted: what the proofs need is not there."""


class Catalog(msgspec.Struct, frozen=True):
    """What there is to prove, as the specification lists it itself."""

    manifest: list[str]
    """Ids of the theorems that must be there."""
    theorems: list[str]
    """Ids of those that are."""
    contracts_without_theorem: list[str]
    """Functions with a contract that no theorem is about."""


def prove(
    json_path: Path | None = None,
    *,
    stream_path: Path | None = None,
    only: Sequence[str] = (),
    jobs: int = 2,
    spec_root: Path | None = None,
    console: Console | None = None,
) -> int:
    """Confirm all theorems, or `only` some, and print what became of them.

    Parameters
    ----------
    json_path : Path or None
        Where the `ProofReport` is written, as one JSON object.
    stream_path : Path or None
        A stream to which it is appended, as one line.
    only : sequence of str
        Ids of the theorems to confirm; the whole manifest when empty.
    jobs : int
        Processes at a time.
    spec_root : Path or None
        The folder that holds the package `helix_spec` whose theorems are meant; the imported
        one's when None.
    console : Console or None
        Where to print; standard output when None.

    Returns
    -------
    int
        The exit status: 0 when nothing is missing, 130 after Ctrl-C, else 1.

    Raises
    ------
    ProveError
        When z3 or CrossHair is not installed, or `only` names no theorem.
    """
    if find_spec("z3") is None or find_spec("crosshair") is None:
        raise ProveError("Proofs need z3 and CrossHair: pip install 'helix-conformance[prove]'.")
    console = console or stdout()
    root = spec_root or Path(helix_spec.__file__).parents[1]
    started = time.monotonic()
    catalog = _catalog(root)
    unknown = [identifier for identifier in only if identifier not in catalog.manifest]
    if unknown:
        raise ProveError(f"The manifest has no theorem {', '.join(unknown)}.")
    chosen = list(only) or catalog.manifest
    there = [identifier for identifier in chosen if identifier in catalog.theorems]
    found: dict[str, TheoremResult] = {}
    try:
        _confirm_all(root, there, jobs, console, found)
    except KeyboardInterrupt as interrupt:
        seconds = round(time.monotonic() - started, 1)
        _print(ProofReport([*found.values()], "partial", [], seconds), console)
        return getattr(interrupt, "status", INTERRUPTED)
    results = [found[identifier] for identifier in there]
    problems = gate(catalog, chosen, results)
    verdict: Literal["pass", "fail", "partial"] = (
        "fail" if problems else "partial" if only else "pass"
    )
    report = ProofReport(results, verdict, problems, round(time.monotonic() - started, 1))
    _print(report, console)
    if json_path is not None:
        json_path.write_bytes(shown_json(msgspec.json.format(encoded(report), indent=2)))
    if stream_path is not None:
        append_line(stream_path, Proofs(suite_version=__version__, report=report))
    return 1 if problems else 0


def gate(catalog: Catalog, chosen: Sequence[str], results: Sequence[TheoremResult]) -> list[str]:
    """Return what keeps the proof from being whole.

    Parameters
    ----------
    catalog : Catalog
        What there is to prove.
    chosen : sequence of str
        Ids of the theorems that were to be confirmed.
    results : sequence of TheoremResult
        What became of them.

    Returns
    -------
    list of str
        A sentence each; none when the proof is whole.
    """
    listed, there = catalog.manifest, catalog.theorems
    apart = {
        "is in the manifest, but there is no such theorem": [i for i in listed if i not in there],
        "is not in the manifest": [i for i in there if i not in listed],
        "has a contract that no theorem is about": catalog.contracts_without_theorem,
    }
    problems = [f"{name}: {what}" for what, names in apart.items() for name in names]
    if len(set(listed)) != len(listed):
        problems.append("the manifest names a theorem twice")
    by_id = {result.id: result for result in results}
    for identifier in (i for i in chosen if i in there):
        result = by_id.get(identifier)
        if result is None:
            problems.append(f"{identifier}: was not tried")
        elif result.verdict != CONFIRMED:
            problems.append(f"{identifier}: {result.verdict}")
        else:
            problems += _empty_proof(result)
    return problems


def _empty_proof(result: TheoremResult) -> list[str]:
    survivors = [kill.wrong for kill in result.kills if kill.refuted_by is None]
    if survivors:
        return [f"{result.id}: survived by a wrong formula: {', '.join(survivors)}"]
    if not result.kills:
        return [f"{result.id}: no wrong formula is refuted by it"]
    return []


def _confirm_all(
    root: Path,
    identifiers: Sequence[str],
    jobs: int,
    console: Console,
    found: dict[str, TheoremResult],
) -> None:
    """Put the results into `found` as they come; `jobs` processes at a time."""
    bar = progress_bar(console, TextColumn("{task.fields[last]}"))
    with bar as progress, ThreadPoolExecutor(jobs) as pool, nothing_left():
        task = progress.add_task("proving", total=len(identifiers), last="")
        # CrossHair takes longest, so its contracts go first: none is left over at the end.
        by_length = sorted(identifiers, key=lambda i: not i.startswith("contract-"))
        running: list[Future[TheoremResult]] = [pool.submit(_confirm, root, i) for i in by_length]
        try:
            for done in as_completed(running):
                result = done.result()
                found[result.id] = result
                progress.update(task, advance=1, last=result.id)
        except KeyboardInterrupt:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _confirm(root: Path, identifier: str) -> TheoremResult:
    """Try one theorem, in a process of its own."""
    started = time.monotonic()
    try:
        answer = _ask(root, identifier)
        return msgspec.json.decode(answer.stdout, type=TheoremResult)
    except subprocess.TimeoutExpired:
        verdict = f"not confirmed: no answer in {MAX_SECONDS} seconds"
    except msgspec.MsgspecError:
        verdict = f"not confirmed: its process failed: {_last_line(answer)}"
    return TheoremResult(
        id=identifier, verdict=verdict, seconds=round(time.monotonic() - started, 2)
    )


def _catalog(root: Path) -> Catalog:
    answer = _ask(root)
    try:
        return msgspec.json.decode(answer.stdout, type=Catalog)
    except msgspec.MsgspecError:
        raise ProveError(f"The theorems cannot be listed: {_last_line(answer)}.") from None


def _last_line(answer: subprocess.CompletedProcess[str]) -> str:
    """Return what a process that failed printed last, or else its exit status."""
    return (answer.stderr.strip().splitlines() or [f"exit status {answer.returncode}"])[-1]


def _ask(root: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    # An empty entry would be the current folder.
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.run(
        leashed([sys.executable, "-P", "-m", "helix_spec.theorems", *arguments]),
        capture_output=True,
        text=True,
        check=False,
        timeout=MAX_SECONDS,
        env=os.environ | {"PYTHONPATH": path, "PYTHONHASHSEED": "0"},
    )


def _print(report: ProofReport, console: Console) -> None:
    number, seconds = Column("number", style="bold"), Column("seconds", justify="right")
    table = Table(number, "statement", "method", "verdict", seconds, title="Theorems")
    for result in report.theorems:
        good = result.verdict == CONFIRMED and not _empty_proof(result)
        table.add_row(
            Text(shown_lines(result.proves) or "-"),
            Text.assemble((shown(result.id), "dim"), f"\n{shown(result.statement)}"),
            result.method,
            Text(shown(result.verdict), style="green" if good else "red"),
            f"{result.seconds:.2f}",
        )
    console.print(table)
    console.print(_wrong_formulas(report.theorems))
    for problem in report.problems:
        console.print(Text.assemble(("not proved", "red"), f" {shown(problem)}"))
    confirmed = sum(result.verdict == CONFIRMED for result in report.theorems)
    console.print(
        f"{confirmed} of {len(report.theorems)} theorems confirmed in {report.seconds} s: "
        f"[bold]{report.verdict}[/bold]",
        highlight=False,
    )


def _wrong_formulas(results: Sequence[TheoremResult]) -> Table:
    """Return each wrong formula once, with the first theorem that refutes it and where."""
    table = Table("wrong formula", "refuted by", "at", title="Wrong formulas")
    seen: set[str] = set()
    for result in results:
        for kill in result.kills:
            if kill.refuted_by is None or kill.wrong in seen:
                continue
            seen.add(kill.wrong)
            at = " ".join(f"{name}={value}" for name, value in kill.refuted_by.items())
            table.add_row(*(Text(shown(cell)) for cell in (kill.wrong, result.id, at)))
    return table
