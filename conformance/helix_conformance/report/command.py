"""`helix-conformance report`: every view of a stream, in files and on the terminal."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from helix_conformance.foreign import nearest, shown, shown_json
from helix_conformance.report.certificate import CertificateRefused, badge, certificate
from helix_conformance.report.compare import compared
from helix_conformance.report.html import index_page, run_page
from helix_conformance.report.junit import junit
from helix_conformance.report.stream import Record, encoded, read_stream
from helix_conformance.report.text import failure_text, print_lines, print_table, stdout


class BadInput(click.ClickException):
    """Something the user gave cannot be used."""

    exit_code = 2

    def format_message(self) -> str:
        """Return the sentence; what it quotes is foreign."""
        return shown(self.message)


class OneOf(click.Choice[str]):
    """One of a few names; of another one the nearest is named."""

    def get_invalid_choice_message(self, value: Any, ctx: click.Context | None) -> str:
        """Return what is wrong with a value.

        Parameters
        ----------
        value : str
            What was given.
        ctx : click.Context
            Where.
        """
        return super().get_invalid_choice_message(value, ctx) + nearest(value, self.choices)


class OutputFile(click.Path):
    """A file that a command writes: one that cannot be is refused before any work."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """Return the path.

        Parameters
        ----------
        value : str
            What was given.
        param, ctx : click.Parameter, click.Context
            Where it was given, for the message of a refusal.
        """
        if value == "-":
            self.fail("'-' is no file: the table is on standard output. Give a name.", param, ctx)
        path = Path(os.fsdecode(super().convert(value, param, ctx)))
        there = path if path.exists() else path.absolute().parent
        if not there.exists():
            self.fail(f"{path}: cannot be written: there is no folder {there}.", param, ctx)
        if not os.access(there, os.W_OK):
            self.fail(f"{path}: cannot be written: Permission denied.", param, ctx)
        return path


def exit_statuses(meanings: Mapping[int, str]) -> str:
    """Return the end of a command's help: what each exit status means.

    Parameters
    ----------
    meanings : mapping of int to str
        In the order of the statuses.
    """
    lines = [f"  {status:<4} {meaning}" for status, meaning in meanings.items()]
    return "\n".join(["\b", "Exit status:", *lines])


VIEWS: Final[dict[str, tuple[str, Callable[[Record], object]]]] = {
    "html": ("A self-contained page: verdicts, failing traces drawn, proofs, mutants.", run_page),
    "index": ("A page of several engines: layout by profile, a table each.", index_page),
    "junit": ("A JUnit file.", junit),
    "badge": ("What a shields.io endpoint badge reads (JSON).", badge),
    "certificate": ("A certificate (JSON). Refused of a partial or failed run.", certificate),
}
"""Files that can be asked for: what each is, and its content. What may be refused comes last."""

_STREAMS = click.Argument(
    ["streams"], metavar="STREAM.jsonl...", nargs=-1, required=True, type=click.Path(path_type=Path)
)
FILE: Final = click.Path(dir_okay=False, path_type=Path)
"""A file that a command reads."""
OUTPUT: Final = OutputFile(dir_okay=False, path_type=Path)
"""A file that a command writes."""
_OPTIONS = [
    click.Option([f"--{name}"], type=OUTPUT, help=what) for name, (what, _) in VIEWS.items()
]
_STATUSES: Final = {
    0: "all was written, and nothing in the streams is wrong",
    1: "a run or what stands beside it failed, got worse, or a certificate was refused",
    2: "bad usage; a file is no stream, holds nothing, or cannot be written",
    3: "a run ended in an error or was cut off",
}


_COMPARE = click.Option(
    ["--compare"],
    is_flag=True,
    help="Say what differs between two streams, OLD and NEW; status 1 when something got worse.",
)


@click.command(params=[_STREAMS, *_OPTIONS, _COMPARE], epilog=exit_statuses(_STATUSES))
def report(streams: tuple[Path, ...], **options: Any) -> None:
    """Show what a run's JSON stream holds: as a table here, and in the files asked for.

    Several files are read one after another: runs, proofs (`prove --stream`) and mutation runs
    (`zoo --stream`) make one report.

    Parameters
    ----------
    streams : tuple of Path
        The files.
    compare : bool
        Whether two of them are compared: what was passing and is not, and the other way round.
    **paths : Path or None
        Where each view is written.
    """
    if options["compare"]:
        if len(streams) != 2 or any(options[name] for name in VIEWS):
            raise BadInput("--compare takes two streams, OLD and NEW, and writes no file.")
        lines, worse = compared(*(read_stream([path]) for path in streams))
        print_lines(stdout(), lines)
        sys.exit(worse)
    record = read_stream(streams)
    _print(record)
    for name, (_, view) in VIEWS.items():
        path = options[name]
        if path is not None:
            try:
                write_file(path, _data(view(record)))
            except CertificateRefused as refused:
                raise click.ClickException(shown(str(refused))) from refused
    sys.exit({"fail": 1, "error": 3}.get(record.verdict, 0))


def _data(view: object) -> bytes:
    """Return what is written: a text and bytes as they are, all else as JSON."""
    if isinstance(view, str | bytes):
        return view if isinstance(view, bytes) else view.encode()
    return shown_json(msgspec.json.format(encoded(view), indent=1)) + b"\n"


def write_file(path: Path, data: bytes) -> None:
    """Write a file that the user asked for.

    Parameters
    ----------
    path : Path
        Where to.
    data : bytes
        The content.

    Raises
    ------
    BadInput
        When it cannot be written: a sentence, and exit status 2.
    """
    try:
        path.write_bytes(data)
    except OSError as error:
        raise BadInput(f"{path}: cannot be written: {error.strerror}.") from error


def _print(record: Record) -> None:
    console = stdout()
    for run in record.runs:
        what, of = run.settings, f"suite {run.settings.suite_version}"
        print_lines(console, [f"{what.command} of {what.engine}, {of}: {run.verdict}"])
        if run.rows:
            print_table(console, run.rows)
        for failure in run.failures:
            print_lines(console, failure_text(failure))
        if run.summary is not None and run.summary.missed and run.verdict == "pass":
            print_lines(console, [f"Missed: {'; '.join(run.summary.missed)}."])
    print_lines(console, _beside(record))


def _beside(record: Record) -> Iterator[str]:
    """Yield what there is to say beside the runs."""
    if record.proofs is not None:
        found = record.proofs.report
        yield f"proofs: {found.verdict}, {len(found.theorems)} theorems"
    if record.zoo is not None:
        yield f"mutants ({record.zoo.tier}): {record.zoo.score} killed by name"
    yield from record.problems
    if record.shortcomings:
        yield f"This is a part of a run, not a whole one. {' '.join(record.shortcomings)}"
