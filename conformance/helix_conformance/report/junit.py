"""A stream as a JUnit file, for CI systems that show one."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from junitparser import Error, Failure, JUnitXml, Skipped, TestCase, TestSuite
from junitparser.junitparser import FinalResult

from helix_conformance.foreign import shown, shown_lines
from helix_conformance.report.stream import CONFIRMED, MutationRun, ProofReport, Record, Run
from helix_conformance.report.text import failure_text


def junit(record: Record) -> bytes:
    """Return a JUnit file: a case for each layout and profile, each theorem and wrong engine.

    A partial run has a case of its own that is skipped, one that was cut off or ended in an
    error a case with an error: no view of them passes in all cases.

    Parameters
    ----------
    record : Record
        What `read_stream` returns.

    Returns
    -------
    bytes
        XML.
    """
    document = JUnitXml("helix-conformance")

    def add(name: str, cases: Iterable[TestCase], **properties: str) -> None:
        suite = TestSuite(shown(" ".join(["helix-conformance", name]).strip()))
        for key, value in properties.items():
            suite.add_property(key, shown(value))
        suite.add_testcases(list(cases))
        document.add_testsuite(suite)

    for run in record.runs:
        keys = ("engine", "suite_version", "started", "python", "machine")
        properties = {key: getattr(run.settings, key) for key in keys}
        add(f"{run.settings.command} {run.settings.engine}", _of_run(run), **properties)
    if not record.runs:
        add("", [_case("the run is whole", "none", Error(shown(" ".join(record.shortcomings))))])
    if record.proofs is not None:
        add("prove", _of_proofs(record.proofs.report))
    if record.zoo is not None:
        add(f"zoo {record.zoo.tier}", _of_mutants(record.zoo))
    document.update_statistics()  # type: ignore[no-untyped-call]
    text: bytes = document.tostring()  # type: ignore[no-untyped-call]
    return text


def _case(
    name: str, group: str, result: FinalResult | None = None, seconds: float = 0.0
) -> TestCase:
    case = TestCase(shown(name), shown(f"helix.{group}"), seconds)
    if result is not None:
        case.result = [result]
    return case


def _of_run(run: Run) -> Iterator[TestCase]:
    for row in run.rows:
        failure = run.failure_of(row)
        text = "" if failure is None else shown_lines(failure_text(failure))
        found = {p: one for p, one in run.profile_states(row).items() if one[0] != "not declared"}
        for profile, (state, why) in found.items():
            result = None
            if state != "pass":
                kind = {"fail": Failure, "error": Error}.get(state, Skipped)
                result = kind(shown(f"{state}: {why}"))
                if state in ("fail", "error"):
                    result.text = text
            group = f"{row.engine}.{row.driver}"
            yield _case(f"{row.layout} {profile}", group, result, row.seconds / len(found))
    whole: FinalResult | None = None
    if run.shortcomings:
        kind = Error if run.verdict == "error" else Skipped
        whole = kind(shown(" ".join(run.shortcomings)))
    elif run.verdict == "fail" and all(row.verdict == "pass" for row in run.rows):
        whole = Failure("The expected failures (xfail) of the engine are no longer true.")
    yield _case("the run is whole", run.settings.engine, whole)


def _of_proofs(report: ProofReport) -> Iterator[TestCase]:
    for theorem in report.theorems:
        wrong = None if theorem.verdict == CONFIRMED else Failure(shown(theorem.verdict))
        yield _case(theorem.id, "proofs", wrong, theorem.seconds)
    whole: FinalResult | None = None
    if report.verdict == "partial":
        whole = Skipped("Only some theorems were tried.")
    elif report.problems:
        whole = Failure(shown("; ".join(report.problems)))
    yield _case("the manifest is whole", "proofs", whole)


def _of_mutants(zoo: MutationRun) -> Iterator[TestCase]:
    for kill in zoo.mutants:
        by = ", ".join(kill.by) or "nothing"
        survived = None if kill.killed else Failure(shown(f"Not killed by name; named: {by}."))
        yield _case(kill.name, "zoo", survived, kill.seconds)
    for name, wrongly in zoo.controls.items():
        accused = Failure(shown(f"Wrongly named: {', '.join(wrongly)}.")) if wrongly else None
        yield _case(name, "zoo.unmutated", accused)
