"""What a failing run is made of: the trace, and the invariants that failed."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from helix_conformance.drive.driver import Answer, EngineFailure
from helix_spec import invariants
from helix_spec.trace import Trace


class Violation(msgspec.Struct, frozen=True):
    """One invariant that failed: where, what was expected, what was observed."""

    invariant: str
    message: str
    expected: Any = None
    observed: Any = None
    rank: int | None = None
    request: int | None = None


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """What a failing run shows: the trace up to where it fails, and what is wrong there."""

    trace: Trace
    event: int | None
    """Index of the event that was answered wrongly; None at start or at the end."""
    violations: list[Violation] = []
    answers: list[Answer] = []
    """What each rank answered to that event, outputs and cached rows left out."""
    engine_failure: str | None = None
    """How an engine died, timed out or gave a malformed answer (LIVE-1); then no more is known."""
    rank: int | None = None
    """The rank that did."""
    drawn: Trace | None = None
    """The random trace that failed first, of which `trace` is what was left."""

    @property
    def verdict(self) -> Literal["fail", "error"]:
        """Return `fail` for a difference, `error` for an engine that failed."""
        return "fail" if self.engine_failure is None else "error"

    @property
    def invariants(self) -> set[str]:
        """Return the invariants that it names; LIVE-1 alone when the engine failed."""
        if self.engine_failure is not None:
            return {"LIVE-1"}
        return {violation.invariant for violation in self.violations}


def engine_failure(trace: Trace, error: EngineFailure) -> Failure:
    """Return the failure of an engine that did not answer.

    Parameters
    ----------
    trace
        The trace up to the event that was not answered.
    error
        How the engine failed, on which rank and at which event.

    Returns
    -------
    Failure
        A failure of verdict `error`, without violations; its trace notes the traceback.
    """
    noted = msgspec.structs.replace(trace, note=error.traceback or trace.note)
    return Failure(trace=noted, event=error.event, engine_failure=str(error), rank=error.rank)


def shown(answer: Answer) -> Answer:
    """Return an answer without its arrays, as a report shows it.

    Parameters
    ----------
    answer
        What one rank answered; it is left as it is.
    """
    outcome = msgspec.structs.replace(answer.outcome, output=None)
    view = answer.view and msgspec.structs.replace(answer.view, keys={}, values={})
    return Answer(outcome, view)


def in_order(violations: Iterable[Violation]) -> list[Violation]:
    """Return the violations as SPEC.md numbers them, ranks rising.

    Parameters
    ----------
    violations
        Violations of one event, in any order; those of no rank come before those of rank 0.

    Examples
    --------
    >>> late, early = Violation("POS-1", "", rank=1), Violation("POS-1", "", rank=0)
    >>> found = [late, Violation("OWN-2", ""), early]
    >>> [(violation.invariant, violation.rank) for violation in in_order(found)]
    [('OWN-2', None), ('POS-1', 0), ('POS-1', 1)]
    """
    return sorted(
        violations,
        key=lambda v: (invariants.NUMBERS.index(v.invariant), -1 if v.rank is None else v.rank),
    )
