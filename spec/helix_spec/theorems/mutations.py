"""Wrong formulas that the theorems must refute: each stands in for a right one.

Many are bugs that engines really had (`source` says where). Every function here has the
parameters of the function that it stands in for, and a docstring that names its mistake. That a
theorem refutes the result of a closed form plus one needs no entry here (`Theorem.about`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from helix_spec import placement
from helix_spec.layouts import Layout
from helix_spec.theorems.base import Wrong, prose


def instead_of(function: str, source: str = "") -> Callable[[Callable[..., Any]], Wrong]:
    """Make a wrong formula of a function that stands in for `function`.

    Parameters
    ----------
    function
        Module and function, below `helix_spec`.
    source
        The engine or pull request that had it.
    """

    def make(formula: Callable[..., Any]) -> Wrong:
        return Wrong(prose(formula).rstrip("."), formula, function, source)

    return make


def truncated(a: int, b: int) -> int:
    """Return the quotient as C and CUDA have it, rounded towards zero."""
    return -(-a // b) if a < 0 else a // b


def int32(value: int) -> int:
    """Return what a signed 32-bit integer keeps of a value."""
    return (value + 2**31) % 2**32 - 2**31


# Owners.


@instead_of("placement.chunk_owner")
def owner_by_token(position: int, c: int, i: int) -> int:
    """Owner by token."""
    return position % c


@instead_of("placement.chunk_owner")
def owner_of_the_next_token(position: int, c: int, i: int) -> int:
    """Owner of the next token."""
    return (position + 1) // i % c


@instead_of("placement.chunk_owner")
def owner_one_rank_on(position: int, c: int, i: int) -> int:
    """Owner one rank on."""
    return (position // i + 1) % c


@instead_of("placement.chunk_owner")
def owner_without_wrapping(position: int, c: int, i: int) -> int:
    """Owner without wrapping."""
    return position // i


@instead_of("placement.chunk_owner", "an interleave larger than a page, vllm-ascend #10442")
def owner_by_chunks_of_all_ranks(position: int, c: int, i: int) -> int:
    """Owner by chunks of all ranks."""
    return position // (i * c) % c


@instead_of("placement.decode_owner", "TensorRT-LLM before #9757")
def always_the_last_rank(layout: Layout, prompt_len: int, step: int, shift: int = 0) -> int:
    """Always the last rank."""
    return layout.cp_size - 1


@instead_of("placement.decode_owner")
def shift_of_the_owner_forgotten(layout: Layout, prompt_len: int, step: int, shift: int = 0) -> int:
    """Shift of the owner forgotten."""
    return _decode_owner(layout, prompt_len, step)


@instead_of("placement._decode_origin", "TensorRT-LLM #9757 against #17866")
def step_where_position_is_meant(layout: Layout, prompt_len: int) -> int:
    """Step where position is meant."""
    return 0


@instead_of("placement._decode_origin", "TensorRT-LLM #9757 against #17866")
def position_where_step_is_meant(layout: Layout, prompt_len: int) -> int:
    """Position where step is meant."""
    return prompt_len


@instead_of("placement._owner_chunk", "vLLM 0.33.0 without a KV connector")
def interleave_ignored(layout: Layout) -> int:
    """Interleave ignored."""
    return 1 if layout.owner == "interleave" else layout.tokens_per_block


@instead_of("placement.contiguous_owner")
def contiguous_owner_by_equal_shares(position: int, length: int, c: int, t: int) -> int:
    """Contiguous owner by equal shares."""
    return position // t // placement.ceil_div(placement.ceil_div(length, t), c)


@instead_of("placement.contiguous_owner")
def larger_shares_last(position: int, length: int, c: int, t: int) -> int:
    """Larger shares last."""
    share, larger = divmod(placement.ceil_div(length, t), c)
    block = position // t
    smaller = (c - larger) * share
    if block < smaller:
        return block // share
    return c - larger + (block - smaller) // (share + 1)


# Lengths.


@instead_of("placement.chunk_local_len")
def no_clamp_from_below(length: int, rank: int, c: int, i: int) -> int:
    """No clamp from below."""
    rounds = length // i // c
    return rounds * i + min(length - rounds * c * i - rank * i, i)


@instead_of("placement.chunk_local_len")
def no_clamp_from_above(length: int, rank: int, c: int, i: int) -> int:
    """No clamp from above."""
    rounds = length // i // c
    return rounds * i + max(0, length - rounds * c * i - rank * i)


@instead_of("placement.chunk_local_len", "vLLM #27518")
def at_most_where_below_is_meant(length: int, rank: int, c: int, i: int) -> int:
    """`r <= (L - 1) mod C` in place of `r < L mod C`, on chunks."""
    chunks, rest = divmod(length, i)
    mine = chunks // c + (rank <= (chunks - 1) % c)
    return mine * i + (rest if chunks % c == rank else 0)


@instead_of("placement.chunk_local_len", "vLLM #29449")
def equal_shares_rounded_up(length: int, rank: int, c: int, i: int) -> int:
    """Equal shares rounded up."""
    return placement.ceil_div(length, c)


@instead_of("placement.chunk_local_len", "vLLM #25438: slots interleave I, lengths 1")
def lengths_interleave_one(length: int, rank: int, c: int, i: int) -> int:
    """Lengths interleave one."""
    return length // c + (rank < length % c)


@instead_of("placement.chunk_local_len")
def last_chunk_taken_as_full(length: int, rank: int, c: int, i: int) -> int:
    """Last chunk taken as full."""
    chunks = placement.ceil_div(length, i)
    return (chunks // c + (rank < chunks % c)) * i


@instead_of("placement.chunk_local_len", "a 32-bit sum of all ranks' tokens")
def length_in_32_bits(length: int, rank: int, c: int, i: int) -> int:
    """Length in 32 bits."""
    length = int32(length)
    rounds = truncated(truncated(length, i), c)
    return int32(rounds * i + max(0, min(length - int32(rounds * c * i) - rank * i, i)))


@instead_of("placement.visible_len", "TensorRT-LLM #11507 family")
def inactive_ranks_see_the_new_token(
    layout: Layout, prompt_len: int, position: int, rank: int, shift: int = 0
) -> int:
    """Inactive ranks see the new token."""
    return placement.local_len(layout, prompt_len, position - prompt_len, rank, shift) + 1


@instead_of("placement.visible_len")
def new_token_is_never_seen(
    layout: Layout, prompt_len: int, position: int, rank: int, shift: int = 0
) -> int:
    """New token is never seen."""
    return placement.local_len(layout, prompt_len, position - prompt_len, rank, shift)


@instead_of("placement.decode_local_len")
def shift_forgotten(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Shift forgotten."""
    return _decode_local_len(layout, prompt_len, steps, rank)


@instead_of("placement.decode_local_len")
def shift_in_the_wrong_direction(
    layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0
) -> int:
    """Shift in the wrong direction."""
    return _decode_local_len(layout, prompt_len, steps, rank, -shift)


@instead_of("placement.decode_local_len", "C's % of a negative number is negative")
def shift_taken_back_as_in_c(
    layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0
) -> int:
    """Shift taken back as in c."""
    logical = rank - shift  # C: (rank - shift) % cp_size with |rank - shift| < cp_size
    chunk = layout.owner_interleave or layout.tokens_per_block
    c, origin = layout.cp_size, 0 if layout.owner == "step" else prompt_len
    if layout.owner == "last_rank":
        return steps if logical == c - 1 else 0
    return placement.chunk_local_len(origin + steps, logical, c, chunk) - placement.chunk_local_len(
        origin, logical, c, chunk
    )


@instead_of("placement.contiguous_start")
def prompt_in_equal_shares(length: int, rank: int, c: int, t: int) -> int:
    """Prompt in equal shares."""
    return min(length, rank * placement.ceil_div(placement.ceil_div(length, t), c) * t)


@instead_of("placement.contiguous_start", "TensorRT-LLM #13180 era")
def padding_stripped_from_the_last_rank(length: int, rank: int, c: int, t: int) -> int:
    """Padding stripped from the last rank."""
    padded = placement.ceil_div(length, t * c) * t
    return rank * padded if rank < c else length


@instead_of("placement.contiguous_blocks_before")
def no_rank_takes_one_more(blocks: int, rank: int, c: int) -> int:
    """No rank takes one more."""
    return rank * (blocks // c)


@instead_of("placement.ceil_div", "C's division rounds towards zero")
def negated_division_truncated(a: int, b: int) -> int:
    """Negated division truncated."""
    return -truncated(-a, b)


@instead_of("placement.ceil_div")
def rounded_up_always(a: int, b: int) -> int:
    """Rounded up always."""
    return a // b + 1


# Positions, indices, slots.


@instead_of("placement.local_index", "an interleave only in the owner")
def index_by_global_block(layout: Layout, prompt_len: int, position: int, shift: int = 0) -> int:
    """Index by global block."""
    return position // layout.cp_size


@instead_of("placement.local_index")
def index_starts_anew_with_decode(
    layout: Layout, prompt_len: int, position: int, shift: int = 0
) -> int:
    """Index starts anew with decode."""
    rank = placement.owner(layout, prompt_len, position, shift)
    if position >= prompt_len:
        return placement.decode_local_len(layout, prompt_len, position - prompt_len, rank, shift)
    return _local_index(layout, prompt_len, position, shift)


@instead_of("placement.chunk_position", "TensorRT-LLM #8104, #9369")
def position_is_the_local_index(local_index: int, rank: int, c: int, i: int) -> int:
    """Position is the local index."""
    return local_index


@instead_of("placement.chunk_position")
def position_by_rounds_only(local_index: int, rank: int, c: int, i: int) -> int:
    """Position by rounds only."""
    return local_index // i * c * i + rank * i


@instead_of("placement.page_and_offset")
def pages_of_all_ranks(index: int, tokens_per_block: int) -> tuple[int, int]:
    """Pages of all ranks."""
    return index // (2 * tokens_per_block), index % tokens_per_block


@instead_of("placement.page_and_offset")
def offset_without_wrapping(index: int, tokens_per_block: int) -> tuple[int, int]:
    """Offset without wrapping."""
    return index // tokens_per_block, index


@instead_of("placement.slot")
def slot_without_offset(block_table: Sequence[int], index: int, tokens_per_block: int) -> int:
    """Slot without offset."""
    return block_table[index // tokens_per_block] * tokens_per_block


@instead_of("placement.slot", "kernels that index slots with 32-bit integers")
def slot_in_32_bits(block_table: Sequence[int], index: int, tokens_per_block: int) -> int:
    """Slot in 32 bits."""
    page, offset = placement.page_and_offset(index, tokens_per_block)
    return int32(block_table[page] * tokens_per_block + offset)


# Pages.


@instead_of("placement.pages_needed", "vLLM #48003")
def pages_from_the_global_length(
    layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0
) -> int:
    """Pages from the global length."""
    return placement.ceil_div(prompt_len + steps, layout.tokens_per_block)


@instead_of("placement.pages_needed", "TensorRT-LLM #9342 design")
def every_rank_takes_a_page_at_each_block(
    layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0
) -> int:
    """Every rank takes a page at each block."""
    t = layout.tokens_per_block
    return placement.ceil_div(
        placement.prompt_local_len(layout, prompt_len, rank, shift), t
    ) + placement.ceil_div(steps, t)


@instead_of("placement.pages_needed")
def full_pages_only(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Full pages only."""
    t = layout.tokens_per_block
    if layout.pages == "lockstep":
        return (prompt_len + steps) // (t * layout.cp_size)
    return placement.local_len(layout, prompt_len, steps, rank, shift) // t


@instead_of("placement.pages_needed")
def lockstep_by_single_blocks(
    layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0
) -> int:
    """Lockstep by single blocks."""
    return placement.ceil_div(
        placement.ceil_div(prompt_len + steps, layout.cp_size), layout.tokens_per_block
    ) + (layout.cp_size > 1)


@instead_of("placement.capacity", "TensorRT-LLM #17866: 100 slots, T=32, C=4 taken as 400 tokens")
def capacity_in_local_tokens(
    layout: Layout, pages: Sequence[int], prompt_len: int, shift: int = 0
) -> int:
    """Capacity in local tokens."""
    return min(pages) * layout.tokens_per_block


@instead_of("placement.capacity")
def capacity_of_the_largest_pool(
    layout: Layout, pages: Sequence[int], prompt_len: int, shift: int = 0
) -> int:
    """Capacity of the largest pool."""
    return _capacity(layout, [max(pages)] * len(pages), prompt_len, shift)


# Windows and pools of cache groups.


@instead_of("placement.visible_range")
def window_without_the_query(
    layout: Layout, prompt_len: int, position: int, window: int, rank: int, shift: int = 0
) -> tuple[int, int]:
    """A window of w tokens before the query."""
    return _visible_range(layout, prompt_len, position, window + 1, rank, shift)


@instead_of("placement.visible_range", "a kernel given the global window beside a local length")
def window_of_local_tokens(
    layout: Layout, prompt_len: int, position: int, window: int, rank: int, shift: int = 0
) -> tuple[int, int]:
    """The last w of a rank's own tokens."""
    end = placement.tokens_before(layout, prompt_len, position + 1, rank, shift)
    return max(0, end - window), end


@instead_of("placement.visible_range")
def window_in_equal_shares(
    layout: Layout, prompt_len: int, position: int, window: int, rank: int, shift: int = 0
) -> tuple[int, int]:
    """The last w / C of a rank's own tokens."""
    end = placement.tokens_before(layout, prompt_len, position + 1, rank, shift)
    return max(0, end - placement.ceil_div(window, layout.cp_size)), end


@instead_of("placement.next_query")
def open_group_forgotten(total: int, open_len: int) -> int:
    """Open group forgotten: total - w in place of m - w."""
    return total


@instead_of("placement.next_query")
def whole_group_taken_back(total: int, open_len: int) -> int:
    """Whole group taken back."""
    return total - open_len


@instead_of("placement.pages_dropped")
def dropped_with_the_first_token(
    layout: Layout, prompt_len: int, query: int, window: int, rank: int, shift: int = 0
) -> int:
    """Dropped with the first token that leaves the window."""
    t, unseen = layout.tokens_per_block, max(0, query - window + 1)
    return placement.ceil_div(placement.tokens_before(layout, prompt_len, unseen, rank, shift), t)


@instead_of("placement.pages_dropped")
def dropped_one_query_late(
    layout: Layout, prompt_len: int, query: int, window: int, rank: int, shift: int = 0
) -> int:
    """Dropped one query late."""
    return _pages_dropped(layout, prompt_len, query, window + 1, rank, shift)


@instead_of("placement.pages_dropped", "block size times C for a group that is not sharded")
def dropped_by_global_blocks(
    layout: Layout, prompt_len: int, query: int, window: int, rank: int, shift: int = 0
) -> int:
    """Dropped by blocks of T, whatever C."""
    return max(0, query - window + 1) // layout.tokens_per_block


@instead_of("placement.most_window_pages")
def window_on_page_edges(layout: Layout, window: int, query_len: int) -> int:
    """A window that starts on a page edge."""
    span = layout.tokens_per_block * (layout.cp_size if layout.pages == "lockstep" else 1)
    return placement.ceil_div(window + query_len - 2, span)


@instead_of("placement.most_window_pages", "speculative tokens left out of a window's pages")
def window_of_single_tokens(layout: Layout, window: int, query_len: int) -> int:
    """A window of single tokens."""
    return _most_window_pages(layout, window, 1)


@instead_of("placement.shared_capacity")
def one_page_a_round(pages: int, long: int, short: int) -> int:
    """Both groups begin a page together."""
    return pages // 2 * long


@instead_of("placement.shared_capacity")
def whole_rounds_only(pages: int, long: int, short: int) -> int:
    """Whole rounds only."""
    return pages // (long // short + 1) * long


_capacity = placement.capacity
_decode_local_len = placement.decode_local_len
_decode_owner = placement.decode_owner
_local_index = placement.local_index
_most_window_pages = placement.most_window_pages
_pages_dropped = placement.pages_dropped
_visible_range = placement.visible_range
