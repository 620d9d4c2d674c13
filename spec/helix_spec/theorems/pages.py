"""Pages and slots: what a rank's pages are, and when they are enough (PAGE-1, GROW-1, capacity)."""

from __future__ import annotations

from collections.abc import Sequence

from helix_spec import placement
from helix_spec.layouts import Layout, layout_problem
from helix_spec.theorems import mutations as m
from helix_spec.theorems.base import Natural, Size, assume, implies, lemma, theorem
from helix_spec.theorems.lengths import (
    decode_slots_dense,
    lengths_never_negative,
)
from helix_spec.theorems.shapes import DEALING, EVERY_OWNER, EVERY_PAIR, PROMPT, Pair

# Pages and slots of a local index.


@theorem(
    "page-and-offset",
    proves="GROW-1 PAGE-1",
    witness={"index": 7, "t": 3},
    about=["placement.page_and_offset"],
    kills=[m.pages_of_all_ranks, m.offset_without_wrapping],
)
def page_and_offset(index: Natural, t: Size) -> bool:
    """Page and offset are the digits of a local index in base T: they give it back, and the offset
    is from 0 to T-1; so two indices never share both.
    """
    page, offset = placement.page_and_offset(index, t)
    return (page * t + offset == index) & (page >= 0) & (offset >= 0) & (offset < t)


@theorem(
    "slots-differ",
    proves="GROW-1",
    witness={"one": 3, "other": 5, "page": 9, "other_page": 4, "t": 3},
    kills=[m.pages_of_all_ranks, m.slot_without_offset],
)
def slots_differ(one: Natural, other: Natural, page: Natural, other_page: Natural, t: Size) -> bool:
    """Two local indices of a rank have different slots, whatever the block table, as long as it has
    no physical page twice.
    """
    assume(one != other, page != other_page)
    table = _TwoPages(one // t, page, other_page)
    return placement.slot(table, one, t) != placement.slot(table, other, t)


class _TwoPages(Sequence[int]):
    """As much of a block table as two indices need: one page, and another everywhere else."""

    def __init__(self, where: int, page: int, elsewhere: int) -> None:
        self.where, self.page, self.elsewhere = where, page, elsewhere

    def __getitem__(self, page: int) -> int:  # type: ignore[override]  # no slices
        return self.page if page == self.where else self.elsewhere

    def __len__(self) -> int:
        raise TypeError("as long as it has to be")


@theorem(
    "slot-is-page-and-offset",
    proves="GROW-1",
    witness={"index": 7, "page": 4, "t": 3},
    about=["placement.slot"],
    kills=[m.slot_without_offset, m.slot_in_32_bits.at(index=0, page=2**26, t=32)],
)
def slot_is_page_and_offset(index: Natural, page: Natural, t: Size) -> bool:
    """A slot divides back into its physical page and the offset of the local index."""
    slot = placement.slot(_TwoPages(index // t, page, page), index, t)
    return (slot // t == page) & (slot % t == index % t)


@theorem(
    "ceil-div",
    proves="PAGE-1",
    witness={"a": 7, "b": 3},
    about=["placement.ceil_div"],
    kills=[m.negated_division_truncated, m.rounded_up_always],
)
def ceil_div(a: Natural, b: Size) -> bool:
    """The quotient rounded up is the least number of parts of b that hold a."""
    parts = placement.ceil_div(a, b)
    return (parts >= 0) & (parts * b >= a) & ((parts - 1) * b < a)


# PAGE-1.


@theorem(
    "lazy-pages",
    proves="PAGE-1",
    witness={"prompt": 5, "total": 8, "rank": 1, "shift": 1, "c": 2, "t": 2, "i": 1},
    about=["placement.pages_needed"],
    kills=[
        m.pages_from_the_global_length,
        m.every_rank_takes_a_page_at_each_block,
        m.full_pages_only,
        m.negated_division_truncated,
    ],
    cases=EVERY_OWNER,
    free=["placement.local_len"],
)
def lazy_pages(
    pair: Pair,
    prompt: Size,
    total: Size,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """Under lazy, in every layout, a rank's pages hold its tokens, and one page fewer would not; a
    rank without tokens has none.
    """
    assume(prompt <= total, rank < c, shift < c)
    layout = pair.layout(c, t, owner_interleave=i)
    length = placement.local_len(layout, prompt, total - prompt, rank, shift)
    assume(length >= 0)  # by lengths-never-negative
    pages = placement.pages_needed(layout, prompt, total - prompt, rank, shift)
    return (pages * t >= length) & ((pages - 1) * t < length) & implies(length == 0, pages == 0)


@theorem(
    "lazy-page-taken",
    proves="PAGE-1",
    witness={"length": 6, "t": 3},
    kills=[m.rounded_up_always],
)
def lazy_page_taken(length: Natural, t: Size) -> bool:
    """Under lazy, one more token on a rank takes a page exactly when its last page is full, and
    then one; a rank whose length stays takes none.
    """
    before = placement.ceil_div(length, t)
    return placement.ceil_div(length + 1, t) == before + (length % t == 0)


@lazy_page_taken.wrong()
def taken_one_token_early(length: Natural, t: Size) -> bool:
    """A page is taken one token early."""
    before = placement.ceil_div(length, t)
    return placement.ceil_div(length + 1, t) == before + ((length + 1) % t == 0)


@theorem(
    "lockstep-pages",
    proves="PAGE-1",
    witness={"prompt": 5, "total": 8, "rank": 1, "shift": 1, "c": 2, "t": 2},
    about=["placement.pages_needed"],
    kills=[m.full_pages_only, m.lockstep_by_single_blocks, m.pages_from_the_global_length],
)
def lockstep_pages(
    prompt: Size, total: Size, rank: Natural, shift: Natural, c: Size, t: Size
) -> bool:
    """Under lockstep, all ranks have as many pages as super-blocks of T*C tokens are begun,
    whatever rank and shift.
    """
    assume(prompt <= total, rank < c, shift < c)
    layout = Pair("round_robin", "position").layout(c, t, pages="lockstep")
    pages = placement.pages_needed(layout, prompt, total - prompt, rank, shift)
    return (pages * t * c >= total) & ((pages - 1) * t * c < total)


@theorem(
    "super-blocks-hold-chunks",
    proves="PAGE-1",
    witness={"length": 7, "rank": 1, "c": 2, "k": 3, "i": 2},
    kills=[m.no_clamp_from_above, m.negated_division_truncated],
)
def super_blocks_hold_chunks(length: Natural, rank: Natural, c: Size, k: Size, i: Size) -> bool:
    """Dealing chunks of I in turn, where I divides T, no rank holds more of the first g tokens than
    ceil(g / (T*C)) pages.
    """
    assume(rank < c)
    t = k * i
    super_blocks = placement.ceil_div(placement.ceil_div(length, t), c)
    return placement.chunk_local_len(length, rank, c, i) <= super_blocks * t


@theorem(
    "super-blocks-chained",
    proves="PAGE-1",
    witness={"length": 7, "c": 2, "t": 3},
    kills=[m.rounded_up_always],
)
def super_blocks_chained(length: Natural, c: Size, t: Size) -> bool:
    """ceil(g / (T*C)) = ceil(ceil(g / T) / C)."""
    chained = placement.ceil_div(placement.ceil_div(length, t), c)
    return placement.ceil_div(length, t * c) == chained


@theorem(
    "lockstep-sound",
    proves="PAGE-1",
    witness={"prompt": 5, "total": 8, "rank": 1, "shift": 1, "c": 2, "k": 2, "i": 1},
    kills=[m.full_pages_only, m.step_where_position_is_meant],
    cases=[Pair("round_robin", "position"), Pair("interleave", "interleave")],
    free=DEALING,
)
def lockstep_sound(
    pair: Pair,
    prompt: Size,
    total: Size,
    rank: Natural,
    shift: Natural,
    c: Size,
    k: Size,
    i: Size,
) -> bool:
    """Lockstep is sound for round_robin + position and for interleave(I) + interleave(I): no rank
    ever holds more than its pages.
    """
    assume(prompt <= total, rank < c, shift < c)
    t, steps = k * i, total - prompt
    layout = pair.layout(c, t, i, i, pages="lockstep")
    lemma(super_blocks_chained, total, c, t)
    if pair.owner == "interleave":
        lemma(super_blocks_hold_chunks, total, (rank - shift) % c, c, k, i)
    else:
        lemma(super_blocks_hold_chunks, total, (rank - shift) % c, c, 1, t)
    pages = placement.pages_needed(layout, prompt, steps, rank, shift)
    return placement.local_len(layout, prompt, steps, rank, shift) <= pages * t


@theorem(
    "lockstep-refused",
    proves="PAGE-1",
    witness={"c": 2, "k": 2, "i": 3},
    cases=[*EVERY_PAIR, "interleaves differ"],
)
def lockstep_refused(pair: Pair | str, c: Size, k: Size, i: Size) -> bool:
    """Of all pairs of rules exactly these two may start with lockstep, the second only with the
    same I; layout_problem refuses every other.
    """
    legal = pair in (Pair("round_robin", "position"), Pair("interleave", "interleave"))
    if isinstance(pair, str):
        assume(k >= 2)
        layout = Pair("interleave", "interleave").layout(c, k * i, i, k * i, "lockstep")
    else:
        layout = pair.layout(c, k * i, i, i, "lockstep")
    return (layout_problem(layout) is None) == legal


@lockstep_refused.wrong()
def lockstep_with_steps(pair: Pair | str, c: Size, k: Size, i: Size) -> bool:
    """The step rule may, too."""
    return layout_problem(Pair("round_robin", "step").layout(c, k * i, pages="lockstep")) is None


_UNSOUND = [
    pair
    for pair in EVERY_PAIR
    if (pair.prompt, pair.owner) not in {("round_robin", "position"), ("interleave", "interleave")}
]


@theorem(
    "lockstep-unsound",
    proves="PAGE-1",
    witness={"c": 2, "k": 2, "i": 3},
    kills=[m.pages_from_the_global_length],
    cases=_UNSOUND,
)
def lockstep_unsound(pair: Pair, c: Size, k: Size, i: Size) -> bool:
    """Under lockstep every other pair of rules leaves some rank with more tokens than its pages
    hold, for every C >= 2: under last_rank and step for every T, for a contiguous prompt with
    position or interleave for every T >= 2, and for the other pairs for every I < T. (With I = T
    interleave deals as the block rule does, so those pairs are as sound as that one; with T = 1
    so is the contiguous prompt. They are refused all the same.)
    """
    t = k * i
    assume(c >= 2)
    if pair.owner in ("position", "interleave"):
        assume(t >= 2 if pair.prompt == "contiguous" else k >= 2)
    prompt, total, rank = _overfull(pair, c, k, i)
    return _overflows(pair.layout(c, t, i, i, "lockstep"), prompt, total, rank)


def _overfull(pair: Pair, c: int, k: int, i: int) -> tuple[int, int, int]:
    """A prompt length, a total and a rank that has too few pages then; T = k*I."""
    t = k * i
    if pair.owner == "last_rank":
        return 1, 3 * t * c, c - 1
    if pair.owner == "step":
        prompt = i if pair.prompt == "interleave" else t
        return prompt, prompt + t, 0
    if pair.prompt == "contiguous":
        by_token = pair.owner == "interleave" and bool(k >= 2)
        return c * t + 1, c * t + 1 + (c * i if by_token else 1), 0
    if pair.prompt == "round_robin":
        return t, t * c, 0
    return 2 * i, 2 * t, 1


def _overflows(layout: Layout, prompt: int, total: int, rank: int) -> bool:
    lazily = placement.local_len(layout, prompt, total - prompt, rank)
    pages = placement.pages_needed(layout, prompt, total - prompt, rank)
    return lazily > pages * layout.tokens_per_block


@theorem(
    "lockstep-unsound-for-two-interleaves",
    proves="PAGE-1",
    witness={"c": 2, "k": 2, "i": 1, "j": 3},
    kills=[m.pages_from_the_global_length],
)
def lockstep_unsound_for_two_interleaves(c: Size, k: Size, i: Size, j: Size) -> bool:
    """The same for interleave(I) + interleave(J) with I and J different, J dividing T."""
    assume(c >= 2, i != j)
    t = k * j
    assume(i <= t)
    layout = Pair("interleave", "interleave").layout(c, t, i, j, "lockstep")
    if i < j:
        return _overflows(layout, 2 * i, t * c, 1)
    return _overflows(layout, i, t * c, 0)


# Capacity.


@theorem(
    "capacity-under-lockstep",
    proves="PAGE-1",
    witness={"slots": 100, "c": 4, "t": 32},
    about=["placement.capacity"],
    kills=[m.capacity_in_local_tokens, m.lockstep_by_single_blocks],
)
def capacity_under_lockstep(slots: Natural, c: Size, t: Size) -> bool:
    """A pool of S slots a rank is floor(S/T) pages and holds floor(S/T)*T*C tokens of one request
    under lockstep: that many need no more pages, one more needs one more. With S = 100, T = 32
    and C = 4 it holds 384 tokens, not 400.
    """
    layout = Pair("round_robin", "position").layout(c, t, pages="lockstep")
    pages = slots // t
    most = placement.capacity(layout, [pages, pages + 1], 1)
    return (
        (most == pages * t * c)
        & (placement.pages_needed(layout, 0, most, 0) == pages)
        & (placement.pages_needed(layout, 0, most + 1, 0) == pages + 1)
    )


@theorem(
    "capacity-under-lazy",
    proves="PAGE-1",
    witness={"prompt": 5, "total": 8, "pages": 2, "rank": 1, "shift": 1, "c": 2, "t": 2, "i": 1},
    about=["placement.position", "placement.pages_needed"],
    kills=[m.full_pages_only],
    cases=EVERY_OWNER,
    free=[*PROMPT, *DEALING],
)
def capacity_under_lazy(
    pair: Pair,
    prompt: Size,
    total: Size,
    pages: Natural,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """Under lazy a rank with p pages that hold its prompt part serves a request up to the position
    of its local index p*T, and no further; under last_rank all ranks but C-1 serve any number of
    steps. The least of these over the ranks is the capacity.
    """
    assume(prompt <= total, rank < c, shift < c)
    layout = pair.layout(c, t, owner_interleave=i)
    share = placement.prompt_local_len(layout, prompt, rank, shift)
    assume(share >= 0, share <= pages * t)  # the first by prompt-count
    lemma(lengths_never_negative, pair, prompt, total, 0, rank, shift, c, t, i)
    lemma(decode_slots_dense, pair, pages * t - share, prompt, total, rank, shift, c, t, i)
    enough = placement.pages_needed(layout, prompt, total - prompt, rank, shift) <= pages
    end = placement.position(layout, prompt, rank, pages * t, shift)
    return enough == (True if end is None else total <= end)


@theorem(
    "capacity-is-the-least",
    proves="PAGE-1",
    witness={"prompt": 5, "pages": 4, "other": 3, "t": 2},
    about=["placement.capacity"],
    kills=[m.capacity_of_the_largest_pool],
    free=["placement.position"],
)
def capacity_is_the_least(prompt: Size, pages: Size, other: Size, t: Size) -> bool:
    """The capacity of unequal pools is that of the rank that runs out first (shown for two ranks,
    whatever their positions).
    """
    layout = Pair("round_robin", "position").layout(2, t)
    most = placement.capacity(layout, [pages, other], prompt)
    first = placement.position(layout, prompt, 0, pages * t, 0)
    second = placement.position(layout, prompt, 1, other * t, 0)
    assert first is not None
    assert second is not None  # only last_rank has ranks that never run out
    return (most <= first) & (most <= second) & ((most == first) | (most == second))


# 32 bits.


@theorem(
    "fits-32-bits",
    proves="LEN-1",
    witness={"length": 2**31 - 1, "rank": 1, "c": 4, "i": 32},
)
def fits_32_bits(length: Natural, rank: Natural, c: Size, i: Size) -> bool:
    """Up to 2^31-1 tokens, with T*C at most 2^31-1, every value that chunk_local_len works out fits
    a signed 32-bit integer; so 32-bit kernels may use it as it is.
    """
    assume(length < _2_31, rank < c, c * i < _2_31)
    return _all_fit(length, rank, c, i)


@fits_32_bits.wrong(point={"length": 2**31, "rank": 0, "c": 1, "i": 1})
def fits_one_token_more(length: Natural, rank: Natural, c: Size, i: Size) -> bool:
    """2^31 tokens fit, too."""
    return _all_fit(length, rank, c, i)


_2_31 = 2**31


def _all_fit(length: int, rank: int, c: int, i: int) -> bool:
    rounds = length // i // c
    dealt = rounds * c * i
    left = length - dealt - rank * i
    values = (length, rounds * i, rounds * c, dealt, rank * i, length - dealt, left)
    fits = True
    for value in (*values, placement.chunk_local_len(length, rank, c, i)):
        fits = fits & (value < _2_31) & (-_2_31 <= value)
    return fits
