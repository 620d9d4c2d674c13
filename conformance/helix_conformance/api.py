"""The public Python API: `check` an engine, and the `Report` of what was found."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from helix_conformance.foreign import shown_lines
from helix_conformance.judge.xfail import Known
from helix_conformance.report.stream import FailureLine, Settings, Summary, encode_line
from helix_conformance.report.text import failure_text
from helix_conformance.session import Session, refuse_below_one, refuse_unknown
from helix_spec.engine import Engine


class ReportedFailure:
    """One failing layout of a report.

    Attributes
    ----------
    layout, driver : str
        Where it failed.
    trace : Trace
        The random trace that failed first.
    minimal : Trace
        What is left of it: the smallest trace found that still fails.
    event : int or None
        Index in `minimal` of the event that is answered wrongly; None at the start or the end.
    violations : list of Violation
        What is wrong there.
    engine_failure : str or None
        How the engine died, timed out or gave a malformed answer; then there are no violations.
    text : str
        The failure as the command line prints it.
    """

    def __init__(self, found: FailureLine) -> None:
        self.layout, self.driver = found.layout, found.driver
        self.trace, self.minimal = found.drawn or found.trace, found.trace
        self.event, self.violations = found.event, found.violations
        self.engine_failure = found.engine_failure
        self.text = shown_lines(failure_text(found))


class Report:
    """What a run found.

    Attributes
    ----------
    verdict : {"pass", "fail", "error"}
        `fail` for a difference, `error` when the engine died, timed out or did not start.
    failures : list of ReportedFailure
        One for each layout that failed.
    coverage : dict of str to int
        How often each situation was visited in which engines go wrong.
    restrictions : list of str
        Why this was a part of a run and not a whole one, a sentence each.
    not_started : str or None
        Why the engine did not start, when it did not.
    """

    def __init__(self, session: Session) -> None:
        [settings], [summary] = session.stream.of(Settings), session.stream.of(Summary)
        self.verdict = summary.verdict
        self.failures = [ReportedFailure(found) for found in session.failures]
        self.coverage = summary.coverage
        self.restrictions = settings.restrictions
        self.not_started = session.not_started and str(session.not_started)
        self._lines = session.stream.lines

    def to_json(self) -> str:
        """Return the run as JSON lines, the format `helix-run/1` of `run --json`."""
        return b"".join(map(encode_line, self._lines)).decode()

    def __repr__(self) -> str:
        failed = ", ".join(f"{one.layout} ({one.driver})" for one in self.failures)
        return f"<Report: {self.verdict}{': ' if failed else ''}{failed}>"


def check(
    engine: str | type[Engine],
    *,
    layouts: Sequence[str] = (),
    cp: Sequence[int] = (),
    profiles: Sequence[str] = (),
    examples: int | None = None,
    seed: int = 0,
    driver: str | None = None,
    known: Path | str | None = None,
    ranks: int = 4,
    deadline_s: float = 30.0,
) -> Report:
    """Play random traces on an engine, and judge every answer of every rank.

    Parameters
    ----------
    engine
        A class, or what `helix-conformance run --engine` takes: a name, `module:Class`,
        `stdio:COMMAND`.
    layouts
        Names of layouts; all, and `custom` ones, when empty.
    cp
        cp_sizes to draw from; those that the driver can hold when empty.
    profiles
        Those to check, with those they build on; all that the engine declares when empty.
    examples
        Random traces of each layout: 400 in this process and 40 elsewhere when None.
    seed
        Of the random traces: the same seed plays the same ones anywhere.
    driver
        `local`, `stdio` or `pool`; what the engine needs when None.
    known
        A TOML file of the engine's expected failures.
    ranks
        Processes of a pool.
    deadline_s
        Seconds after which a silent rank has timed out.

    Returns
    -------
    Report
        The verdict, the failures with their smallest traces, and coverage.

    Raises
    ------
    ValueError
        When a name stands for nothing, a count is below 1, or the engine does not declare a
        profile; nothing has run.

    Examples
    --------
    >>> from helix_conformance import check
    >>> check("reference", layouts=["pr9757"], cp=[2], profiles=["pages"], examples=5).verdict
    'pass'
    """
    refuse_unknown(layouts, profiles, driver)
    refuse_below_one({"examples": [examples], "cp": cp, "ranks": [ranks]})
    ledger = Known.read(Path(known)) if known else Known()
    session = Session(engine, driver, profiles, ranks=ranks, deadline_s=deadline_s, known=ledger)
    options = {
        "layouts": list(layouts),
        "cp_sizes": list(cp),
        "asked": list(profiles),
        "examples": examples,
        "workload": None,
        "seed": seed,
    }
    session.begin("check", options)
    session.random(layouts, cp, examples)
    session.summary()
    return Report(session)
