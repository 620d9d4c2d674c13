"""The numbered invariants as predicates over observations (SPEC.md section 7).

Each says whether one invariant holds of plain numbers that ranks reported; `r` indexes cp_ranks.
`sentence` reads the normative text of a number.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from typing import Final

from helix_spec import placement
from helix_spec.layouts import Layout

NUMBERS: Final = (
    *("OWN-1", "OWN-2", "OWN-3"),
    *("LEN-1", "LEN-2", "LEN-3"),
    *("POS-1", "POS-2"),
    *("BAL-1", "BAL-2", "BAL-3"),
    *("GROW-1", "EQ-1"),
    *("PAGE-1", "PAGE-2", "PAGE-3", "PAGE-4", "PAGE-5"),
    *("ATT-1", "ATT-2", "ATT-3", "ATT-4"),
    *("DUM-1", "MAP-1", "REF-1", "REF-2", "LIVE-1"),
)
"""Every invariant, in the order in which a report names those that fail."""


@cache
def sentence(number: str) -> str:
    """The paragraph of SPEC.md that defines an invariant, on one line."""
    text = files("helix_spec").joinpath("SPEC.md").read_text(encoding="utf-8")
    match = re.search(rf"^\*\*{re.escape(number)}\*\*.*?(?=\n\n|\Z)", text, re.M | re.S)
    if match is None:
        raise KeyError(f"SPEC.md defines no invariant {number}.")
    return " ".join(match[0].replace("**", "").split())


@cache
def profiles_of(number: str) -> tuple[str, ...]:
    """The profiles that check an invariant, as its paragraph names them; `every` and `none` too."""
    named = re.search(r"\(profile ([^;)]*);", sentence(number))
    if named is None:
        raise KeyError(f"The paragraph of {number} in SPEC.md names no profile.")
    return tuple(named[1].split(", "))


def own_1(positions: Sequence[Sequence[int]], total: int) -> bool:
    """Every global position 0 .. total-1 is on exactly one rank; positions[r] lists rank r's."""
    held = Counter(position for mine in positions for position in mine)
    return held == Counter(range(total))


def own_2(active: Sequence[bool]) -> bool:
    """Exactly one rank is active for a new token."""
    return sum(active) == 1


def own_3(layout: Layout, prompt_len: int, step: int, shift: int, active: Sequence[bool]) -> bool:
    """The rank that claims a step's token is the one the layout names."""
    owner = placement.decode_owner(layout, prompt_len, step, shift)
    return all(claims == (rank == owner) for rank, claims in enumerate(active))


def len_1(
    layout: Layout, prompt_len: int, steps: int, shift: int, local_lens: Sequence[int]
) -> bool:
    """Each rank holds as many tokens as its layout gives it; together they are all tokens."""
    expected = [
        placement.local_len(layout, prompt_len, steps, rank, shift)
        for rank in range(layout.cp_size)
    ]
    return list(local_lens) == expected and sum(local_lens) == prompt_len + steps


def len_2(past_len: Sequence[int], local_lens_before: Sequence[int]) -> bool:
    """past_len is what each rank held before the event."""
    return list(past_len) == list(local_lens_before)


def len_3(
    layout: Layout, prompt_len: int, position: int, shift: int, visible: Sequence[int]
) -> bool:
    """The query at a position sees on each rank that rank's tokens up to and including it."""
    return list(visible) == [
        placement.visible_len(layout, prompt_len, position, rank, shift)
        for rank in range(layout.cp_size)
    ]


def pos_1(position_ids: Sequence[int], first: int) -> bool:
    """Position ids go on by one from `first`."""
    return list(position_ids) == list(range(first, first + len(position_ids)))


def spread_bound(layout: Layout) -> int | None:
    """The worst spread of local_len over ranks that BAL-1 allows; None where it names none."""
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
    """The spread of local_len over ranks stays within its bound."""
    bound = spread_bound(layout)
    return bound is None or max(local_lens) - min(local_lens) <= bound


def bal_2(layout: Layout, decoded: Sequence[int]) -> bool:
    """The decoded tokens alone spread by one chunk at most under a rule that takes turns."""
    if layout.owner == "last_rank":
        return all(count == 0 for count in decoded[:-1])
    chunk = layout.owner_interleave or layout.tokens_per_block
    return max(decoded) - min(decoded) <= chunk


def bal_3(local_lens: Sequence[Sequence[int]]) -> bool:
    """C equal requests admitted in a row, starts rotated: every rank holds the same total."""
    totals = {sum(lens) for lens in zip(*local_lens, strict=True)}
    return len(totals) <= 1


def grow_1(before: Sequence[int], after: Sequence[int]) -> bool:
    """A block table only grows at its end; the pages it had stay where they are."""
    return list(after[: len(before)]) == list(before)


def page_1(
    layout: Layout, prompt_len: int, steps: int, shift: int, rank: int, table: Sequence[int]
) -> bool:
    """A rank holds exactly as many pages for a request as the page policy says."""
    return len(table) == placement.pages_needed(layout, prompt_len, steps, rank, shift)


def page_2(tables: Mapping[int, Sequence[int]]) -> bool:
    """No physical page stands twice in the block tables of requests that share nothing."""
    pages = [page for table in tables.values() for page in table]
    return len(set(pages)) == len(pages)


def page_3(free: int, tables: Mapping[int, Sequence[int]], pool: int) -> bool:
    """Free pages and distinct used ones are the whole pool."""
    return free + len({page for table in tables.values() for page in table}) == pool


def page_4(active: bool, slot: int) -> bool:
    """A rank names a slot for a token exactly when it owns the token."""
    return (slot >= 0) == active
