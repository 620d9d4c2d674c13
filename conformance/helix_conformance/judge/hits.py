"""Profile `prefix`: what was found in the cache (HIT-1 to HIT-6, SHARE-1).

Whether the pages hold these tokens still is seen from their numbers (module `pages`), and from
their rows (module `cache`).
"""

from __future__ import annotations

from collections.abc import Sequence

from helix_conformance.expect.expectation import Hit
from helix_conformance.judge.failure import Violation


def wrong_hits(right: Hit, reported: Sequence[object]) -> list[Violation]:
    """Return what is wrong with the hits that the ranks report.

    Parameters
    ----------
    right
        What may be found.
    reported
        By global rank.

    Returns
    -------
    list of Violation
        Empty when all ranks report the same hit, and it is one that may be.

    Examples
    --------
    >>> right = Hit(taken=4, least=4, most=8, unit=4, limit=11, unsalted=8)
    >>> [[one.invariant for one in wrong_hits(right, [hit, hit])] for hit in (4, 0, 6, 16)]
    [[], ['HIT-5'], ['HIT-2'], ['HIT-1']]
    """
    told, found = list(reported), list[Violation]()
    if any(hit != told[0] for hit in told):
        found.append(Violation("HIT-3", "hits of the ranks", "all equal", told))
    broken = [one for one in (_broken(right, hit) for hit in told) if one is not None]
    for number, demand in broken[:1]:
        what = "tokens of the prefix that were found, rank by rank"
        found.append(Violation(number, what, demand, told))
    return found


def _broken(right: Hit, hit: object) -> tuple[str, str] | None:
    """The invariant that a hit breaks first, and what it demands; None for a right one."""
    if not isinstance(hit, int) or isinstance(hit, bool) or not 0 <= hit <= right.limit:
        return "HIT-1", f"a number from 0 to {right.limit}"
    if hit and not right.unit:
        return "SHARE-1", "0: this layout deals no two prompts alike"
    if hit and hit % right.unit:
        return "HIT-2", f"a multiple of {right.unit}"
    if right.most < hit <= right.unsalted:
        return "HIT-6", f"at most {right.most}, of requests with the same salt"
    if hit > right.most:
        return "SHARE-1", f"at most {right.most}, which were dealt as a prompt is"
    if hit < right.least:
        return "HIT-5", f"at least {right.least}, which a live request holds"
    return None
