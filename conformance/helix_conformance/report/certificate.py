"""The certificate and the badge of a stream."""

from __future__ import annotations

from typing import Any, Literal

import msgspec

from helix_conformance.report.stream import CoverageLine, KnownDifference, Proofs, Record, Row
from helix_spec.capabilities import Box, Freedoms
from helix_spec.engine import PROFILES
from helix_spec.layouts import LAYOUT_NAMES


class CertificateRefused(ValueError):
    """What a stream holds is not certified; the message says why."""


class LayoutChecked(msgspec.Struct, frozen=True, kw_only=True):
    """What was played of one layout."""

    layout: str
    identifiers: list[str]
    cp_sizes: list[int]
    drivers: list[str]
    profiles: list[str]
    traces: int
    events: int


class ProofsChecked(msgspec.Struct, frozen=True, kw_only=True):
    """Proofs of the same suite, beside the run."""

    suite_version: str
    confirmed: int
    theorems: list[str]


class ZooScore(msgspec.Struct, frozen=True, kw_only=True):
    """How the suite did against engines that are wrong on purpose."""

    suite_version: str
    tier: str
    score: str


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What a whole passing run shows, and what it does not. Null: was not run."""

    format: Literal["helix-certificate/1"] = "helix-certificate/1"
    verdict: Literal["pass"] = "pass"
    engine: str
    settings: dict[str, str]
    """What the engine says about how it is set up."""
    capabilities: list[Box]
    """Where the engine says that it works: nothing is certified elsewhere. Empty: everywhere."""
    freedoms: Freedoms
    """In what the engine says that it differs rightly."""
    suite_version: str
    started: str
    layouts: list[LayoutChecked]
    layouts_not_checked: list[str]
    profiles_checked: list[str]
    profiles_not_checked: list[str]
    known_differences: list[KnownDifference]
    """Expected failures (xfail) of the engine."""
    proofs: ProofsChecked | None
    zoo: ZooScore | None
    coverage: list[CoverageLine]
    situations_missed: list[str]


def certificate(record: Record) -> Certificate:
    """Return the certificate of the last whole run in a stream.

    Parameters
    ----------
    record : Record
        What `read_stream` returns.

    Returns
    -------
    Certificate
        To be written as JSON.

    Raises
    ------
    CertificateRefused
        When anything in the stream failed or was cut off, when no run in it is whole, or when
        its runs are of several engines.
    """
    reasons = [*record.problems, *record.shortcomings]
    engines = list(dict.fromkeys(run.settings.engine for run in record.runs))
    if len(engines) > 1:
        reasons.append(f"The stream is of several engines: {', '.join(engines)}.")
    if record.verdict != "pass" or reasons:
        raise CertificateRefused(f"There is no certificate of this stream. {' '.join(reasons)}")
    run = next(run for run in reversed(record.runs) if not run.shortcomings)
    assert run.summary is not None
    return Certificate(
        engine=run.settings.engine,
        settings={name: text for row in run.rows for name, text in row.settings.items()},
        capabilities=run.summary.capabilities,
        freedoms=run.summary.freedoms,
        suite_version=run.settings.suite_version,
        started=run.settings.started,
        layouts=[_layout(name, rows) for name, rows in run.by_layout.items()],
        layouts_not_checked=[name for name in LAYOUT_NAMES if name not in run.by_layout],
        profiles_checked=run.summary.profiles_checked,
        profiles_not_checked=run.summary.profiles_not_checked,
        known_differences=run.summary.known_differences,
        proofs=None if record.proofs is None else _proofs(record.proofs),
        zoo=msgspec.convert(record.zoo, ZooScore | None, from_attributes=True),
        coverage=run.coverage,
        situations_missed=run.summary.missed,
    )


def _layout(name: str, rows: list[Row]) -> LayoutChecked:
    checked = {profile for row in rows for profile in row.profiles}
    return LayoutChecked(
        layout=name,
        identifiers=sorted({one for row in rows for one in row.identifiers}),
        cp_sizes=sorted({size for row in rows for size in row.cp_sizes}),
        drivers=list(dict.fromkeys(row.driver for row in rows)),
        profiles=[profile for profile in PROFILES if profile in checked],
        traces=sum(row.traces for row in rows),
        events=sum(row.events for row in rows),
    )


def _proofs(proofs: Proofs) -> ProofsChecked:
    ids = [theorem.id for theorem in proofs.report.theorems]
    return ProofsChecked(suite_version=proofs.suite_version, confirmed=len(ids), theorems=ids)


def badge(record: Record) -> dict[str, Any]:
    """Return what a shields.io endpoint badge reads.

    Parameters
    ----------
    record : Record
        What `read_stream` returns.

    Returns
    -------
    dict
        The JSON object of the endpoint; it is bright green for a whole passing run alone.
    """
    verdict = record.verdict
    layouts = len({row.layout for run in record.runs for row in run.rows})
    cut_off = any(run.summary is None for run in record.runs)
    known = any(run.summary and run.summary.known_differences for run in record.runs)
    message = {
        "pass": f"pass, {layouts} layouts" + (", expected failures" if known else ""),
        "partial": "partial" + (f": {layouts} of {len(LAYOUT_NAMES)} layouts" if layouts else ""),
        "fail": "fail",
        "error": "cut off" if cut_off else "error",
    }
    colour = {"pass": "brightgreen", "partial": "yellow"}.get(verdict, "red")
    return {
        "schemaVersion": 1,
        "label": "helix conformance",
        "message": message[verdict],
        "color": colour,
        "isError": verdict in ("fail", "error"),
    }
