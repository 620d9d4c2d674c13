"""The numbered invariants (SPEC.md section 7): their sentences, and predicates of plain numbers.

`sentence` reads the normative text of a number. A predicate says whether one invariant holds of
numbers that ranks reported. Only invariants that can be judged from such numbers alone have one;
the others are judged against an expected state.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Final

from helix_spec.layouts import Layout

NUMBERS: Final = (
    *("OWN-1", "OWN-2", "OWN-3"),
    *("LEN-1", "LEN-2", "LEN-3"),
    *("POS-1", "POS-2"),
    *("BAL-1", "BAL-2", "BAL-3"),
    *("GROW-1", "EQ-1"),
    *("PAGE-1", "PAGE-2", "PAGE-3", "PAGE-4", "PAGE-5"),
    *("REP-1", "POOL-1", "WIN-1", "WIN-2"),
    *("HIT-1", "HIT-2", "HIT-3", "HIT-4", "HIT-5", "HIT-6", "SHARE-1"),
    *("ATT-1", "ATT-2", "ATT-3", "ATT-4"),
    *("DUM-1", "MAP-1", "REF-1", "REF-2", "LIVE-1"),
)
"""Every invariant, in the order in which a report names those that fail."""


@cache
def sentence(number: str) -> str:
    """Return the paragraph of SPEC.md that defines an invariant, on one line.

    Parameters
    ----------
    number
        The number of an invariant, such as `OWN-2`.

    Raises
    ------
    KeyError
        When SPEC.md defines no such invariant.

    Examples
    --------
    >>> sentence("OWN-2").endswith("For each new token exactly one rank must be active.")
    True
    """
    text = files("helix_spec").joinpath("SPEC.md").read_text(encoding="utf-8")
    match = re.search(rf"^\*\*{re.escape(number)}\*\*.*?(?=\n\n|\Z)", text, re.M | re.S)
    if match is None:
        raise KeyError(f"SPEC.md defines no invariant {number}.")
    return " ".join(match[0].replace("**", "").split())


@cache
def profiles_of(number: str) -> tuple[str, ...]:
    """Return the profiles that check an invariant, in the order of its paragraph.

    Parameters
    ----------
    number
        The number of an invariant, such as `OWN-1`.

    Returns
    -------
    tuple of str
        Names of profiles; `("every",)` when all check it, `("none",)` when no trace can.

    Raises
    ------
    KeyError
        When SPEC.md defines no such invariant, or its paragraph names no profile.

    Examples
    --------
    >>> profiles_of("OWN-1")
    ('placement', 'cache')
    """
    named = re.search(r"\(profile ([^;)]*);", sentence(number))
    if named is None:
        raise KeyError(f"The paragraph of {number} in SPEC.md names no profile.")
    return tuple(named[1].split(", "))


def own_2(active: Sequence[bool]) -> bool:
    """Return whether exactly one rank is active for a new token (OWN-2).

    Parameters
    ----------
    active
        Whether each cp_rank reported that it owns the token; length C.

    Examples
    --------
    >>> own_2([False, True]), own_2([True, True]), own_2([False, False])
    (True, False, False)
    """
    return sum(active) == 1


def spread_bound(layout: Layout) -> int | None:
    """Return the largest spread of local_len over the ranks that BAL-1 allows.

    Parameters
    ----------
    layout
        A legal layout.

    Returns
    -------
    int or None
        A number of tokens: 0 for one rank, None when BAL-1 names no bound for the layout.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> spread_bound(parse_layout("pr9757/1:C=4,T=32"))
    95
    """
    t = layout.tokens_per_block
    if layout.cp_size == 1:
        return 0
    match layout.prompt, layout.owner:
        case "round_robin", "position":
            return t
        case "round_robin", "step":
            return 2 * t
        case "contiguous", "step":
            return 3 * t - 1
        case "contiguous", "position":
            return 3 * t - 2
        case "interleave", "interleave" if layout.prompt_interleave == layout.owner_interleave:
            return layout.owner_interleave
        case _:
            return None


def bal_1(layout: Layout, local_lens: Sequence[int]) -> bool:
    """Return whether the spread of local_len over the ranks stays within its bound (BAL-1).

    Parameters
    ----------
    layout
        A legal layout.
    local_lens
        Tokens of one request on each cp_rank; length C.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("balanced/1:C=4,T=2")
    >>> bal_1(layout, [4, 4, 3, 2]), bal_1(layout, [5, 4, 3, 2])
    (True, False)
    """
    bound = spread_bound(layout)
    return bound is None or max(local_lens) - min(local_lens) <= bound


def bal_2(layout: Layout, decoded: Sequence[int]) -> bool:
    """Return whether decoded tokens alone spread by at most one chunk (BAL-2).

    Parameters
    ----------
    layout
        A legal layout.
    decoded
        Decoded tokens of one request on each rank, before the start shift; length C. Under
        `last_rank` all of them must be on the last.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr9757/1:C=4,T=2")
    >>> bal_2(layout, [2, 2, 1, 0]), bal_2(layout, [3, 0, 0, 0])
    (True, False)
    """
    if layout.owner == "last_rank":
        return all(count == 0 for count in decoded[:-1])
    chunk = layout.owner_interleave or layout.tokens_per_block
    return max(decoded) - min(decoded) <= chunk


def bal_3(local_lens: Sequence[Sequence[int]]) -> bool:
    """Return whether every rank holds the same number of tokens of these requests (BAL-3).

    Parameters
    ----------
    local_lens
        Tokens of each request on each cp_rank, shape (requests, C). BAL-3 is about k*C requests
        that were admitted in a row under `rotated` and have equal lengths.

    Examples
    --------
    >>> bal_3([[2, 0], [0, 2]]), bal_3([[2, 0], [1, 1]])
    (True, False)
    """
    totals = {sum(lens) for lens in zip(*local_lens, strict=True)}
    return len(totals) <= 1


def page_3(free: int, tables: Mapping[int, Sequence[int]], pool: int) -> bool:
    """Return whether free pages and distinct pages in use sum to the pool size (PAGE-3).

    Parameters
    ----------
    free
        Free pages of one rank.
    tables
        Block table (physical page numbers) of each live request on that rank, by request id.
    pool
        Pages of that rank's pool.

    Examples
    --------
    >>> page_3(3, {0: [1], 1: [1, 2]}, pool=5)  # page 1 is shared
    True
    """
    return free + len({page for table in tables.values() for page in table}) == pool
