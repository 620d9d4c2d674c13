"""Views of a stream for other programs: JUnit, certificate, badge; and the verdict of each cell."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import msgspec

from helix_conformance.judge.xfail import LAYOUTS
from helix_conformance.prove import CONFIRMED
from helix_conformance.prove import Report as ProofReport
from helix_conformance.report.stream import (
    CoverageLine,
    FailureLine,
    KnownDifference,
    MutationRun,
    Proofs,
    Record,
    Row,
    Run,
)
from helix_conformance.report.text import failure_text
from helix_spec.engine import PROFILES
from helix_spec.events import MERGE, Merge
from helix_spec.invariants import profiles_of

State = Literal["pass", "fail", "error", "unsettled", "not checked", "not declared"]


class Cell(NamedTuple):
    """One profile of one row."""

    profile: str
    state: State
    why: str


def cells(row: Row, failure: FailureLine | None) -> list[Cell]:
    """What a row says of each profile.

    A failure settles the profiles that its invariants belong to; of the others a row that ended
    there says nothing.
    """
    named = set() if failure is None else {v.invariant for v in failure.violations}
    to_blame = {p for number in named for p in profiles_of(number)} & set(row.profiles)
    if failure is not None and failure.event is not None:
        merging = isinstance(failure.trace.events[failure.event], Merge)
        to_blame = {p for p in to_blame if (p == MERGE) == merging} or to_blame
    return [Cell(profile, *_state(profile, row, named, to_blame)) for profile in PROFILES]


def _state(profile: str, row: Row, named: set[str], to_blame: set[str]) -> tuple[State, str]:
    if profile not in row.profiles:
        if profile in row.declared:
            return "not checked", "the engine declares it; this run did not check it"
        return "not declared", "the engine does not declare it"
    if row.verdict == "pass":
        return "pass", f"{row.traces} traces, {row.events} events"
    if row.verdict == "error":
        return "error", "the engine died, hung or answered garbage"
    if profile in to_blame or not to_blame:
        return "fail", ", ".join(sorted(named))
    return "unsettled", "the run of this layout ended at a failure of another profile"


def failure_of(run: Run, row: Row) -> FailureLine | None:
    """The failure of a red row."""
    key = (row.layout, row.engine, row.driver)
    return next((f for f in run.failures if (f.layout, f.engine, f.driver) == key), None)


def verdict(record: Record) -> Literal["pass", "partial", "fail", "error"]:
    """Of everything in a stream: `pass` only of a whole one without a problem."""
    if any(run.verdict == "error" for run in record.runs):
        return "error"
    if record.problems:
        return "fail"
    return "partial" if record.shortcomings else "pass"


# JUnit


def junit(record: Record) -> bytes:
    """A JUnit file: a case for each layout and profile, each theorem and each wrong engine.

    A partial run has a case of its own that is skipped, one that was cut off or ended in an
    error a case with an error: no view of them is all green.
    """
    from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite

    Result = Error | Failure | Skipped

    def case(
        suite: TestSuite, name: str, group: str, result: Result | None = None, seconds: float = 0.0
    ) -> None:
        one = TestCase(name, f"helix.{group}", seconds)
        if result is not None:
            one.result = [result]
        suite.add_testcase(one)

    def add_run(run: Run) -> TestSuite:
        suite = TestSuite(f"helix-conformance {run.settings.command} {run.settings.engine}")
        for key in ("engine", "suite_version", "started", "python", "machine"):
            suite.add_property(key, getattr(run.settings, key))
        for row in run.rows:
            failure = failure_of(run, row)
            text = "" if failure is None else _plain("\n".join(failure_text(failure)))
            settled = [cell for cell in cells(row, failure) if cell.state != "not declared"]
            for cell in settled:
                name, group = f"{row.layout} {cell.profile}", f"{row.engine}.{row.driver}"
                case(suite, name, group, of_cell(cell, text), row.seconds / len(settled))
        case(suite, "the run is whole", run.settings.engine, of_run(run))
        return suite

    def of_cell(cell: Cell, text: str) -> Result | None:
        if cell.state == "pass":
            return None
        why = f"{cell.state}: {cell.why}"
        if cell.state not in ("fail", "error"):
            return Skipped(why)
        result = Failure(why) if cell.state == "fail" else Error(why)
        result.text = text
        return result

    def of_run(run: Run) -> Result | None:
        if run.shortcomings:
            broken = run.verdict == "error"
            return (Error if broken else Skipped)(_plain(" ".join(run.shortcomings)))
        if run.verdict == "fail" and all(row.verdict == "pass" for row in run.rows):
            return Failure("The ledger of known differences is no longer true.")
        return None

    def of_proofs(report: ProofReport) -> Result | None:
        if report.verdict == "partial":
            return Skipped("Only some theorems were tried.")
        return Failure(_plain("; ".join(report.problems))) if report.problems else None

    document = JUnitXml("helix-conformance")
    for run in record.runs:
        document.add_testsuite(add_run(run))
    if not record.runs:
        suite = TestSuite("helix-conformance")
        case(suite, "the run is whole", "none", Error(" ".join(record.shortcomings)))
        document.add_testsuite(suite)
    if record.proofs is not None:
        suite, proofs = TestSuite("helix-conformance prove"), record.proofs.report
        for theorem in proofs.theorems:
            wrong = None if theorem.verdict == CONFIRMED else Failure(_plain(theorem.verdict))
            case(suite, theorem.id, "proofs", wrong, theorem.seconds)
        case(suite, "the manifest is whole", "proofs", of_proofs(proofs))
        document.add_testsuite(suite)
    if record.zoo is not None:
        suite = TestSuite(f"helix-conformance zoo {record.zoo.tier}")
        for kill in record.zoo.mutants:
            by = ", ".join(kill.by) or "nothing"
            survived = None if kill.killed else Failure(f"Not killed by name; named: {by}.")
            case(suite, kill.name, "zoo", survived, kill.seconds)
        for name, wrongly in record.zoo.controls.items():
            accused = Failure(f"Wrongly named: {', '.join(wrongly)}.") if wrongly else None
            case(suite, name, "zoo.unmutated", accused)
        document.add_testsuite(suite)
    document.update_statistics()  # type: ignore[no-untyped-call]
    text: bytes = document.tostring()  # type: ignore[no-untyped-call]
    return text


def _plain(text: str) -> str:
    """Text without the control characters that XML cannot hold."""
    return "".join(c if c.isprintable() or c in "\n\t" else "\ufffd" for c in text)


# Certificate


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


class MutationScore(msgspec.Struct, frozen=True, kw_only=True):
    """How the suite did against engines that are wrong on purpose."""

    suite_version: str
    tier: str
    score: str


class Certificate(msgspec.Struct, frozen=True, kw_only=True):
    """What a whole green run shows, and what it does not. Null: was not run."""

    format: Literal["helix-certificate/1"] = "helix-certificate/1"
    verdict: Literal["pass"] = "pass"
    engine: str
    settings: dict[str, str]
    """What the engine says about how it is set up."""
    suite_version: str
    started: str
    layouts: list[LayoutChecked]
    layouts_not_checked: list[str]
    profiles_checked: list[str]
    profiles_not_checked: list[str]
    known_differences: list[KnownDifference]
    proofs: ProofsChecked | None
    zoo: MutationScore | None
    coverage: list[CoverageLine]
    situations_missed: list[str]


def certificate(record: Record) -> Certificate:
    """The certificate of the last whole run in a stream.

    Raises CertificateRefused when anything in the stream failed or was cut off, when no run in
    it is whole, or when its runs are of several engines.
    """
    reasons = [*record.problems, *record.shortcomings]
    engines = list(dict.fromkeys(run.settings.engine for run in record.runs))
    if len(engines) > 1:
        reasons.append(f"The stream is of several engines: {', '.join(engines)}.")
    if verdict(record) != "pass" or reasons:
        raise CertificateRefused(f"There is no certificate of this stream. {' '.join(reasons)}")
    run = next(run for run in reversed(record.runs) if not run.shortcomings)
    assert run.summary is not None
    layouts = list(_layouts(run))
    played = {layout.layout for layout in layouts}
    return Certificate(
        engine=run.settings.engine,
        settings={name: text for row in run.rows for name, text in row.settings.items()},
        suite_version=run.settings.suite_version,
        started=run.settings.started,
        layouts=layouts,
        layouts_not_checked=[name for name in LAYOUTS if name not in played],
        profiles_checked=run.summary.profiles_checked,
        profiles_not_checked=run.summary.profiles_not_checked,
        known_differences=run.summary.known_differences,
        proofs=None if record.proofs is None else _proofs(record.proofs),
        zoo=None if record.zoo is None else _zoo(record.zoo),
        coverage=run.coverage,
        situations_missed=run.summary.missed,
    )


def _layouts(run: Run) -> Iterator[LayoutChecked]:
    for name in dict.fromkeys(row.layout for row in run.rows):
        rows = [row for row in run.rows if row.layout == name]
        checked = {profile for row in rows for profile in row.profiles}
        yield LayoutChecked(
            layout=name,
            identifiers=sorted({one for row in rows for one in row.identifiers}),
            cp_sizes=sorted({size for row in rows for size in row.cp_sizes}),
            drivers=list(dict.fromkeys(row.driver for row in rows)),
            profiles=[profile for profile in PROFILES if profile in checked],
            traces=sum(row.traces for row in rows),
            events=sum(row.events for row in rows),
        )


def _proofs(proofs: Proofs) -> ProofsChecked:
    theorems = [theorem.id for theorem in proofs.report.theorems]
    return ProofsChecked(
        suite_version=proofs.suite_version, confirmed=len(theorems), theorems=theorems
    )


def _zoo(zoo: MutationRun) -> MutationScore:
    return MutationScore(suite_version=zoo.suite_version, tier=zoo.tier, score=zoo.score)


# Badge


def badge(record: Record) -> dict[str, Any]:
    """The JSON that a shields.io endpoint badge reads."""
    whole = verdict(record)
    layouts = len({row.layout for run in record.runs for row in run.rows})
    cut_off = any(run.summary is None for run in record.runs)
    known = any(run.summary and run.summary.known_differences for run in record.runs)
    message = {
        "pass": f"pass, {layouts} layouts" + (", known differences" if known else ""),
        "partial": "partial" + (f": {layouts} of {len(LAYOUTS)} layouts" if layouts else ""),
        "fail": "fail",
        "error": "cut off" if cut_off else "error",
    }[whole]
    colour = {"pass": "brightgreen", "partial": "yellow", "fail": "red", "error": "red"}[whole]
    return {
        "schemaVersion": 1,
        "label": "helix conformance",
        "message": message,
        "color": colour,
        "isError": whole in ("fail", "error"),
    }
