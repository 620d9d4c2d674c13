"""Which rank to name when several fail at once, or when some are silent for too long."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

from helix_conformance.drive.driver import KINDS, EngineFailure, Kind


class Suspect(Protocol):
    """One rank in a process, of this machine or behind a supervisor elsewhere."""

    rank: int

    @property
    def at(self) -> int | None:
        """Index of the event that the rank is at; None outside any event."""

    @property
    def progress(self) -> float:
        """Number of the request that the rank is at; infinite when no answer is due."""

    def look(self) -> None:
        """Begin to find out where the rank is."""

    def waits_for_peers(self) -> bool:
        """Return, after `look`, whether the rank is blocked in a collective.

        Raises
        ------
        EngineFailure
            When it cannot be found out, since its supervisor has failed.
        """

    def failure(self, what: str, how: Kind = "raised") -> EngineFailure:
        """Return what went wrong with this rank, at the event that it is at.

        Parameters
        ----------
        what : str
            Verb and object, for a sentence that begins with the rank.
        how : Kind
            How it failed, one of `KINDS`.

        Returns
        -------
        EngineFailure
            The failure, to be raised or kept.
        """


def timed_out(limit_s: float) -> str:
    """Return what to say of a rank that has not answered within `limit_s` seconds.

    Examples
    --------
    >>> timed_out(30.0)
    'timed out: no answer within 30 s'
    """
    return f"timed out: no answer within {limit_s:g} s"


def skipped(blocked: Sequence[int]) -> str:
    """Return what to say of a rank for which these ranks wait in a collective.

    Parameters
    ----------
    blocked : sequence of int
        The ranks that wait, at least one.

    Returns
    -------
    str
        Verb and object, for a sentence that begins with the rank that is missing.

    Examples
    --------
    >>> skipped([0, 2, 3])
    'skipped a collective that ranks 0, 2 and 3 are blocked in'
    >>> skipped([1])
    'skipped a collective that rank 1 is blocked in'
    """
    verb = "are" if len(blocked) > 1 else "is"
    return f"skipped a collective that {_named(blocked)} {verb} blocked in"


def _named(ranks: Sequence[int]) -> str:
    *others, last = map(str, ranks)
    return f"ranks {', '.join(others)} and {last}" if others else f"rank {last}"


def first_cause(failures: Sequence[EngineFailure]) -> EngineFailure:
    """Return, of several failures, the one that brought about the others.

    Parameters
    ----------
    failures : sequence of EngineFailure
        At least one.

    Returns
    -------
    EngineFailure
        The one whose kind stands first in `KINDS`; of several, the first given.

    Examples
    --------
    >>> died = EngineFailure(2, 5, "died with signal SIGSEGV", "died")
    >>> first_cause([EngineFailure(0, 5, "raised RuntimeError: peer is gone"), died]) is died
    True
    """
    return min(failures, key=lambda failure: KINDS.index(failure.how))


def blame_silent(
    silent: Sequence[Suspect], ranks: Sequence[Suspect], limit_s: float
) -> EngineFailure:
    """Return whom to name when ranks stay silent: one that does not wait for its peers.

    When all of them are blocked in a collective, it is a rank that is further on than the slowest,
    and so has skipped the collective; when there is none either, it is the slowest.

    Parameters
    ----------
    silent : sequence of Suspect
        The ranks whose answers are missing, at least one.
    ranks : sequence of Suspect
        All ranks of the trace.
    limit_s : float
        Seconds that they have been silent for.

    Returns
    -------
    EngineFailure
        The failure of the rank to blame, to be raised.
    """
    for rank in silent:
        rank.look()
    try:
        to_blame = [rank for rank in silent if not rank.waits_for_peers()]
    except EngineFailure as failure:
        return failure
    if to_blame:
        nor = f", nor from {_named([rank.rank for rank in to_blame[1:]])}" if to_blame[1:] else ""
        return to_blame[0].failure(timed_out(limit_s) + nor, "timed out")
    behind = min(silent, key=lambda rank: rank.progress)
    for rank in ranks:
        if rank.progress > behind.progress:
            blocked = [other.rank for other in silent if other is not rank]
            return EngineFailure(rank.rank, behind.at, skipped(blocked), "timed out")
    what = f"is blocked in a collective that has not ended within {limit_s:g} s"
    return behind.failure(what, "timed out")


NOTHING_DUE = math.inf
"""The progress of a rank that owes no answer."""
