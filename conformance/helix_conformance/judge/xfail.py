"""The ledger of an engine's expected failures: what it answers wrongly, what must not be run.

The ledger is a TOML file that the engine's own repository keeps, a table for each difference:

    [[difference]]
    invariant = "PAGE-1"        # or profile = "fork", or reason = "too_long"
    layout = "pr17866"          # optional: only there
    kind = "answers_wrongly"    # or "must_not_run"
    does = "takes the prompt's pages from its global length"
    link = "https://github.com/someone/engine/issues/12"

A difference that is known does not fail a run, and is named in its summary. One that no longer
shows does fail it, so that no entry outlives its cause. A trace ends at an expected failure after
which tokens or pages lie elsewhere than in the reference; after others it is judged on.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self

import msgspec

from helix_conformance.expect.recorder import Recorder
from helix_conformance.judge.failure import Violation
from helix_spec.capabilities import STRICT, Freedoms
from helix_spec.config import config_problem
from helix_spec.engine import CUMULATIVE, PROFILES, features_of_config
from helix_spec.events import Event, Reason, features_of
from helix_spec.invariants import NUMBERS, profiles_of
from helix_spec.layouts import LAYOUT_NAMES, layout_name
from helix_spec.trace import Trace

MAX_FILE_BYTES: Final = 2**20
MAX_LINE_BYTES: Final = 2**12
"""In bytes: Python's TOML parser takes a time that grows with the square of a line."""
Text = Annotated[str, msgspec.Meta(min_length=1)]
Link = Annotated[str, msgspec.Meta(pattern=r"^https?://\S+$")]


class LedgerError(ValueError):
    """A file that is no list of expected failures; the message names file, entry and field."""


class Difference(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One expected failure. Without `layout` it is one of every layout.

    `answers_wrongly` is played, and expected to fail. `must_not_run` is never played: events of a
    profile, events that would be refused for a reason, or a whole layout.
    """

    kind: Literal["answers_wrongly", "must_not_run"]
    does: Text
    """What the engine does, in a sentence."""
    link: Link
    """Where that is tracked."""
    invariant: str | None = None
    profile: str | None = None
    reason: Reason | None = None
    layout: str | None = None

    def __post_init__(self) -> None:
        of = [part for part in (self.invariant, self.profile, self.reason) if part is not None]
        alone = self.kind == "must_not_run" and self.layout is not None
        if len(of) > 1 or (not of and not alone):
            raise ValueError(
                "a difference is of one `invariant`, one `profile` or one `reason`; only a layout "
                "that must not be run may stand alone"
            )
        _one_of("invariant", self.invariant, NUMBERS)
        _one_of("profile", self.profile, PROFILES)
        _one_of("layout", self.layout, LAYOUT_NAMES)
        if self.profile == "placement":
            raise ValueError(
                "field `profile` cannot be placement: every other builds on it, so that nothing "
                "would be checked; name the invariants"
            )
        if self.invariant is not None and self.kind == "must_not_run":
            raise ValueError(
                "field `invariant` does not go with must_not_run: an invariant is not run; name "
                "the profile, reason or layout that breaks it"
            )
        if self.invariant == "EQ-1":
            raise ValueError("field `invariant` cannot be EQ-1: it is a theorem, of no engine")
        if self.invariant in ("REF-1", "REF-2"):
            raise ValueError(
                f"field `invariant` cannot be {self.invariant}: it would hide every wrong refusal; "
                "name the `reason`, and declare in `capabilities` where the engine works"
            )
        if self.invariant == "LIVE-1":
            raise ValueError(
                "field `invariant` cannot be LIVE-1: what kills an engine must not be run; name "
                "its profile, reason or layout with must_not_run"
            )

    @property
    def subject(self) -> str:
        """Return what it is a difference of, in few words."""
        of = self.invariant or self.profile or self.reason
        where = "" if self.layout is None else f"layout {self.layout}"
        return f"{of}, {where}".strip(", ") if of else where

    def covers(self, layout: str) -> bool:
        """Return whether it is a difference of a layout.

        Parameters
        ----------
        layout
            The layout's name.
        """
        return self.layout in (None, layout)


def _one_of(field: str, value: str | None, allowed: Sequence[str]) -> None:
    if value is not None and value not in allowed:
        raise ValueError(f"field `{field}` is {value!r}; it must be one of {', '.join(allowed)}")


class _File(msgspec.Struct, forbid_unknown_fields=True):
    difference: list[Difference] = []


class Known:
    """The expected failures of one engine, and which of them a run has met.

    Parameters
    ----------
    differences
        The entries of the ledger, in its order; none unless given.

    Examples
    --------
    >>> link = "https://example.org/1"
    >>> entry = Difference(kind="answers_wrongly", does="errs", link=link, invariant="PAGE-1")
    >>> known = Known([entry])
    >>> found = [Violation("PAGE-1", "pages"), Violation("LEN-1", "tokens")]
    >>> [violation.invariant for violation in known.unknown("pr9757", found)]
    ['LEN-1']
    >>> known.met == {entry}
    True
    """

    def __init__(self, differences: Iterable[Difference] = ()) -> None:
        self.differences = list(differences)
        self.met: set[Difference] = set()
        """Differences that have shown."""
        self.tried: set[Difference] = set()
        """Differences that a layout and the profiles of a run could have shown."""
        self.void: list[str] = []
        """Layouts of which nothing was judged but expected failures."""
        self.found: set[str] = set()
        """Invariants that this very run has found already, so that it can look for others."""

    @classmethod
    def read(cls, path: Path) -> Self:
        """Return the ledger in a TOML file.

        Parameters
        ----------
        path
            The file.

        Raises
        ------
        LedgerError
            When it cannot be read, is too large or no ledger; the message says where.
        """
        try:
            with path.open("rb") as file:
                data = file.read(MAX_FILE_BYTES + 1)
        except OSError as error:
            raise LedgerError(f"{path}: cannot be read: {error.strerror}.") from error
        longest = max(map(len, data.splitlines()), default=0)
        if len(data) > MAX_FILE_BYTES or longest > MAX_LINE_BYTES:
            raise LedgerError(
                f"{path}: has {len(data)} bytes or more and a line of {longest}; a ledger has at "
                f"most {MAX_FILE_BYTES} and lines of {MAX_LINE_BYTES}."
            )
        try:
            return cls(msgspec.toml.decode(data, type=_File).difference)
        except msgspec.ValidationError as error:
            raise LedgerError(f"{path}{_where(str(error))}.") from error
        except (msgspec.DecodeError, UnicodeDecodeError, ValueError, RecursionError) as error:
            raise LedgerError(f"{path}: is not TOML: {error}.") from error

    # Before a layout is played

    def runs(self, layout: str) -> bool:
        """Return whether anything may be run on a layout.

        Parameters
        ----------
        layout
            The layout's name.
        """
        return not any(d.subject == f"layout {layout}" for d in self._of(layout, "must_not_run"))

    def left_out(self, layout: str) -> frozenset[str]:
        """Return the profiles that are not checked with the others, and those that build on them.

        Parameters
        ----------
        layout
            The layout's name.
        """
        named = {d.profile for d in self._of(layout) if d.profile is not None}
        depth = min(
            (CUMULATIVE.index(p) for p in named if p in CUMULATIVE), default=len(CUMULATIVE)
        )
        return frozenset(named - set(CUMULATIVE)) | frozenset(CUMULATIVE[depth:])

    def suspended(self, layout: str) -> list[Difference]:
        """Return the differences whose profile is checked apart: each must still fail by itself.

        Parameters
        ----------
        layout
            The layout's name.
        """
        return [d for d in self._of(layout, "answers_wrongly") if d.profile is not None]

    def played(self, layout: str, profiles: frozenset[str], *, void: bool) -> None:
        """Take in that a layout was played: what it can show should have shown.

        Parameters
        ----------
        layout
            The layout's name.
        profiles
            Profiles that were checked.
        void
            Whether every trace ended at an expected failure before anything was judged.
        """
        if void:
            self.void.append(layout)
        for d in self._of(layout, "answers_wrongly"):
            holders = profiles_of(d.invariant) if d.invariant else profiles
            if d.profile is None and profiles.intersection(holders):
                self.tried.add(d)

    def add(self, other: Known) -> None:
        """Take in what a job with the same entries has met and tried.

        Parameters
        ----------
        other
            The job's own.
        """
        self.met |= other.met
        self.tried |= other.tried
        self.void += other.void

    def confirmed(self, difference: Difference, *, failed: bool) -> None:
        """Take in that a profile was checked apart.

        Parameters
        ----------
        difference
            The entry that names the profile.
        failed
            Whether it failed, as the entry says.
        """
        self.tried.add(difference)
        if failed:
            self.met.add(difference)

    # While it is played

    def runnable(
        self, trace: Trace, declared: frozenset[str], freedoms: Freedoms = STRICT
    ) -> Trace | None:
        """Return the trace up to the first event that must not be run.

        Parameters
        ----------
        trace
            The trace to play.
        declared
            Profiles that the engine declares.
        freedoms
            Those that it takes.

        Returns
        -------
        Trace or None
            The trace, or its first events; None when it may not even start.
        """
        layout = layout_name(trace.config.layout)
        forbidden = list(self._of(layout, "must_not_run"))
        if not forbidden:
            return trace
        reasons = {d.reason for d in forbidden if d.reason is not None}
        profiles = {d.profile for d in forbidden if d.profile is not None}
        if not self.runs(layout):
            return None
        if config_problem(trace.config) is not None:
            return None if Reason.BAD_CONFIG in reasons else trace
        if features_of_config(trace.config) & profiles:
            return None
        recorder = Recorder(trace.config, declared, freedoms)
        events: list[Event] = []
        for event in trace.events:
            if features_of(event) & profiles or recorder.next(event).refused in reasons:
                break
            events.append(event)
        return msgspec.structs.replace(trace, events=events)

    def unknown(self, layout: str, violations: Sequence[Violation]) -> list[Violation]:
        """Return those of the violations that no entry covers; mark the entries that are met.

        Parameters
        ----------
        layout
            Name of the layout that was played.
        violations
            What is wrong with the answers to one event.

        Returns
        -------
        list of Violation
            What is left. DUM-1 and ATT-3 go with the known violation that they explain.
        """
        rest = []
        for violation in violations:
            entries = [
                d
                for d in self._of(layout, "answers_wrongly")
                if d.invariant == violation.invariant or d.reason in _reasons(violation)
            ]
            self.met.update(entries)
            if not entries and violation.invariant not in self.found:
                rest.append(violation)
        # These blame padding or an empty rank for another violation of the same event.
        if len(rest) < len(violations) and {v.invariant for v in rest} <= {"DUM-1", "ATT-3"}:
            return []
        return rest

    # When all is played

    @property
    def holds(self) -> bool:
        """Return whether the ledger is true of what was played."""
        return not self.stale and not self.void

    @property
    def stale(self) -> list[Difference]:
        """Return the differences that should have shown and have not."""
        return [d for d in self.differences if d in self.tried - self.met]

    def of_layout(self, layout: str) -> list[Difference]:
        """Return the differences that this run has met, or has not run, on a layout.

        Parameters
        ----------
        layout
            The layout's name.
        """
        return [d for d in self._of(layout) if d in self.met or d.kind == "must_not_run"]

    def summary(self) -> list[dict[str, Any]]:
        """Return every difference with what became of it, for the JSON stream."""
        return [msgspec.to_builtins(d) | {"status": self._status(d)} for d in self.differences]

    def sentences(self) -> Iterator[str]:
        """Yield the same for people, one line each; what is wrong with the ledger last."""
        for d in self.differences:
            if self._status(d) != "no longer fails":
                yield f"known ({self._status(d)}): {d.subject}: {d.does} ({d.link})"
        for d in self.stale:
            yield (
                f"The expected failure of {d.subject} no longer fails: no trace of this run broke "
                f"it; take its entry ({d.link}) out of the ledger."
            )
        yield from map(void_sentence, self.void)

    def _status(self, difference: Difference) -> str:
        if difference.kind == "must_not_run":
            return "not run"
        if difference in self.met:
            return "still fails"
        return "no longer fails" if difference in self.tried else "not tried"

    def _of(self, layout: str, kind: str | None = None) -> Iterator[Difference]:
        """The differences of this layout, and of this kind."""
        for d in self.differences:
            if d.covers(layout) and kind in (None, d.kind):
                yield d


def void_sentence(layout: str) -> str:
    """Return what is wrong with a ledger that leaves nothing of a layout to judge.

    Parameters
    ----------
    layout
        The layout's name.
    """
    return (
        f"Every trace of layout {layout} ended at an expected failure before anything else was "
        "judged; say that the layout must_not_run."
    )


PARTING: Final = frozenset(
    {"OWN-1", "OWN-2", "OWN-3", "GROW-1", "PAGE-1", "PAGE-2", "REF-1", "REF-2"}
)
"""After these, tokens or pages lie elsewhere than in the reference."""


def parted(violations: Sequence[Violation]) -> bool:
    """Return whether engine and reference went different ways: all that follows follows from that.

    Parameters
    ----------
    violations
        What is wrong with the answers to one event.
    """
    return any(violation.invariant in PARTING for violation in violations)


def _reasons(violation: Violation) -> set[Any]:
    """The reasons that a difference about a refusal is between."""
    if violation.invariant not in ("REF-1", "REF-2"):
        return set()
    told = zip(violation.expected, violation.observed, strict=False)
    return {
        reason for pair in told if pair[0] != pair[1] for reason in pair if isinstance(reason, str)
    }


def _where(problem: str) -> str:
    """What is wrong, behind the entry and the field that it is wrong in."""
    message, _, path = problem.partition(" - at ")
    entry = re.search(r"difference\[(\d+)\]", path)
    field = re.search(r"\]\.(\w+)", path) or re.search(r"field `(\w+)`", message)
    where = "" if entry is None else f", difference {int(entry[1]) + 1}"
    return where + ("" if field is None else f", field {field[1]}") + f": {message}"
