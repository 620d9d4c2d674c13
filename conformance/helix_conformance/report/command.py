"""`helix-conformance report`: every view of a stream, in files and on the terminal."""

from __future__ import annotations

from pathlib import Path

import click
import msgspec
from rich.console import Console

from helix_conformance.report.stream import Record, StreamError, read_stream
from helix_conformance.report.text import failure_text, print_table


class _Refused(click.ClickException):
    """A certificate that is not given; the other views have been written."""

    exit_code = 1


class _BadFile(click.ClickException):
    """A file that is no stream, or cannot be written."""

    exit_code = 2


def _file(name: str, what: str) -> click.Option:
    return click.Option(
        [f"--{name}", f"{name}_path"],
        type=click.Path(dir_okay=False, path_type=Path),
        help=what,
    )


@click.command(
    params=[
        click.Argument(
            ["streams"],
            metavar="STREAM.jsonl...",
            nargs=-1,
            required=True,
            type=click.Path(path_type=Path),
        ),
        _file("html", "A self-contained page: verdicts, failing traces drawn, proofs, zoo."),
        _file("junit", "A JUnit file."),
        _file("certificate", "A certificate (JSON). Refused of a partial or failed run."),
        _file("badge", "What a shields.io endpoint badge reads (JSON)."),
    ]
)
def report(
    streams: tuple[Path, ...],
    html_path: Path | None,
    junit_path: Path | None,
    certificate_path: Path | None,
    badge_path: Path | None,
) -> None:
    """Show what a run's JSON stream holds: as a table here, and in the files asked for.

    Several files are read one after another: runs, proofs (`prove --stream`) and a mutation run
    (`zoo --stream`) make one report. The exit status is 0 when all was written, 1 when a
    certificate was refused, 2 when a file is no stream or cannot be written.
    """
    from helix_conformance.report import views

    try:
        record = read_stream(streams)
    except StreamError as error:
        raise _BadFile(str(error)) from error
    _print(record)
    if html_path is not None:
        from helix_conformance.report.html import run_page

        write_file(html_path, run_page(record).encode())
    if junit_path is not None:
        write_file(junit_path, views.junit(record))
    if badge_path is not None:
        write_file(badge_path, _json(views.badge(record)))
    if certificate_path is not None:
        try:
            certificate = views.certificate(record)
        except views.CertificateRefused as refused:
            raise _Refused(str(refused)) from refused
        write_file(certificate_path, _json(certificate))


def write_file(path: Path, data: bytes) -> None:
    """Write a file that the user asked for; what stands in the way is a sentence."""
    try:
        path.write_bytes(data)
    except OSError as error:
        raise _BadFile(f"{path}: cannot be written: {error.strerror}.") from error


def _json(value: object) -> bytes:
    return msgspec.json.format(msgspec.json.encode(value), indent=1) + b"\n"


def _print(record: Record) -> None:
    console = Console()

    def line(text: str) -> None:
        console.print(text, markup=False, highlight=False, soft_wrap=True)

    for run in record.runs:
        what, of = run.settings, f"suite {run.settings.suite_version}"
        line(f"{what.command} of {what.engine}, {of}: {run.verdict}")
        if run.rows:
            print_table(console, run.rows)
        for failure in run.failures:
            for text in failure_text(failure):
                line(text)
        if run.summary is not None and run.summary.missed and run.verdict == "pass":
            line(f"Missed: {'; '.join(run.summary.missed)}.")
    if record.proofs is not None:
        found = record.proofs.report
        line(f"proofs: {found.verdict}, {len(found.theorems)} theorems")
    if record.zoo is not None:
        line(f"zoo ({record.zoo.tier}): {record.zoo.score}")
    for problem in record.problems:
        line(problem)
    if record.shortcomings:
        line(f"This is a part of a run, not a whole one. {' '.join(record.shortcomings)}")
