"""Closed forms: which rank, page and slot hold which position (SPEC.md section 3).

The first half is arithmetic over plain integers, one sentence each. The second half applies it
to a `Layout` and a request `(prompt_len, steps, shift)`: its prompt length L, the number of
tokens decoded so far, and its start shift s (0 under `rank_zero`). Positions, lengths and steps
count tokens; ranks are cp_ranks. A rule names ranks before the shift; rank r of the machine
plays rank (r - s) mod C of the rule.
"""

from __future__ import annotations

from collections.abc import Sequence

from helix_spec.layouts import Layout

# Arithmetic over integers. c: cp_size, t: tokens_per_block, i: tokens dealt at a time.
#
# The lines `pre:` and `post:` are contracts (PEP 316; _ is the result). `helix-conformance prove`
# has CrossHair confirm each for all integers, on these very functions. Divisions are chained
# (x // i // c, never x // (i * c)): equal, and CrossHair confirms only the chained form.


def chunk_owner(position: int, c: int, i: int) -> int:
    """Rank of a token when chunks of i tokens are dealt to c ranks in turn.

    pre: position >= 0 and c > 0 and i > 0
    post: 0 <= _ < c
    post: (position // i - _) % c == 0
    """
    return position // i % c


def chunk_local_len(length: int, rank: int, c: int, i: int) -> int:
    """How many of the first `length` tokens fall to `rank` when chunks of i are dealt in turn.

    The full rounds give i tokens each; what is left of the last round is clamped to this
    rank's chunk.

    pre: length >= 0 and 0 <= rank < c and i > 0
    post: 0 <= _ <= length
    post: _ + (chunk_owner(length, c, i) == rank) == chunk_local_len(length + 1, rank, c, i)
    """
    rounds = length // i // c
    return rounds * i + max(0, min(length - rounds * c * i - rank * i, i))


def chunk_position(local_index: int, rank: int, c: int, i: int) -> int:
    """Position of the rank's local_index-th token when chunks of i are dealt in turn.

    pre: local_index >= 0 and 0 <= rank < c and i > 0
    post: chunk_owner(_, c, i) == rank
    post: chunk_local_len(_, rank, c, i) == local_index
    """
    return joined(joined(local_index // i, rank, c), local_index % i, i)


def contiguous_blocks_before(blocks: int, rank: int, c: int) -> int:
    """Blocks on the ranks before `rank` when the first blocks mod c ranks take one more.

    pre: blocks >= 0 and 0 <= rank <= c and c > 0
    post: rank > 0 or _ == 0
    post: rank < c or _ == blocks
    """
    return rank * (blocks // c) + min(rank, blocks % c)


def contiguous_start(length: int, rank: int, c: int, t: int) -> int:
    """First position of `rank` in a contiguous split of `length` tokens (length if none).

    pre: length >= 0 and 0 <= rank <= c and c > 0 and t > 0
    post: 0 <= _ <= length
    post: rank < c or _ == length
    post: _ == length or _ % t == 0
    """
    return min(length, contiguous_blocks_before(ceil_div(length, t), rank, c) * t)


def contiguous_owner(position: int, length: int, c: int, t: int) -> int:
    """Rank of a prompt position in a contiguous split of `length` tokens.

    pre: 0 <= position < length and c > 0 and t > 0
    post: 0 <= _ < c
    post: contiguous_start(length, _, c, t) <= position
    post: position < contiguous_start(length, _ + 1, c, t)
    """
    share, larger = divmod(ceil_div(length, t), c)
    block = position // t
    if block < larger * (share + 1):
        return block // (share + 1)
    return larger + (block - larger * (share + 1)) // share


def joined(high: int, low: int, base: int) -> int:
    """The number whose last digit in this base is `low`, with `high` before it.

    pre: high >= 0 and 0 <= low < base
    post: _ // base == high
    post: _ % base == low
    """
    return high * base + low


def ceil_div(a: int, b: int) -> int:
    """The quotient rounded up.

    pre: b > 0
    post: (_ - 1) * b < a <= _ * b
    """
    return -(-a // b)


# The same for a layout.


def prompt_local_len(layout: Layout, prompt_len: int, rank: int, shift: int = 0) -> int:
    """Prompt tokens on `rank`."""
    role = (rank - shift) % layout.cp_size
    if layout.prompt == "contiguous":
        c, t = layout.cp_size, layout.tokens_per_block
        start = contiguous_start(prompt_len, role, c, t)
        return contiguous_start(prompt_len, role + 1, c, t) - start
    return chunk_local_len(prompt_len, role, layout.cp_size, _prompt_chunk(layout))


def decode_owner(layout: Layout, prompt_len: int, step: int, shift: int = 0) -> int:
    """Rank that owns the token of a step (global position prompt_len + step)."""
    c = layout.cp_size
    if layout.owner == "last_rank":
        role = c - 1
    else:
        role = chunk_owner(_decode_origin(layout, prompt_len) + step, c, _owner_chunk(layout))
    return (role + shift) % c


def decode_local_len(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Decoded tokens on `rank` after `steps` of them."""
    c, role = layout.cp_size, (rank - shift) % layout.cp_size
    if layout.owner == "last_rank":
        return steps if role == c - 1 else 0
    i, origin = _owner_chunk(layout), _decode_origin(layout, prompt_len)
    return chunk_local_len(origin + steps, role, c, i) - chunk_local_len(origin, role, c, i)


def local_len(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Tokens of the request on `rank`: its share of the prompt and of the decoded tokens."""
    return prompt_local_len(layout, prompt_len, rank, shift) + decode_local_len(
        layout, prompt_len, steps, rank, shift
    )


def owner(layout: Layout, prompt_len: int, position: int, shift: int = 0) -> int:
    """Rank that holds a global position, of the prompt or decoded."""
    if position >= prompt_len:
        return decode_owner(layout, prompt_len, position - prompt_len, shift)
    c = layout.cp_size
    if layout.prompt == "contiguous":
        role = contiguous_owner(position, prompt_len, c, layout.tokens_per_block)
    else:
        role = chunk_owner(position, c, _prompt_chunk(layout))
    return (role + shift) % c


def visible_len(layout: Layout, prompt_len: int, position: int, rank: int, shift: int = 0) -> int:
    """Keys on `rank` that the query at a decoded position sees: up to and including it (LEN-3)."""
    return local_len(layout, prompt_len, position + 1 - prompt_len, rank, shift)


def local_index(layout: Layout, prompt_len: int, position: int, shift: int = 0) -> int:
    """Number of earlier tokens of the request on the rank that holds this position."""
    rank = owner(layout, prompt_len, position, shift)
    if position >= prompt_len:
        return local_len(layout, prompt_len, position - prompt_len, rank, shift)
    role = (rank - shift) % layout.cp_size
    if layout.prompt == "contiguous":
        start = contiguous_start(prompt_len, role, layout.cp_size, layout.tokens_per_block)
        return position - start
    return chunk_local_len(position, role, layout.cp_size, _prompt_chunk(layout))


def position(layout: Layout, prompt_len: int, rank: int, index: int, shift: int = 0) -> int | None:
    """Global position of the rank's token with this local index, once it is there.

    None when the rank never gets that many tokens (only rank C-1 decodes under `last_rank`).
    """
    c, role = layout.cp_size, (rank - shift) % layout.cp_size
    in_prompt = prompt_local_len(layout, prompt_len, rank, shift)
    if index < in_prompt:
        if layout.prompt == "contiguous":
            return contiguous_start(prompt_len, role, c, layout.tokens_per_block) + index
        return chunk_position(index, role, c, _prompt_chunk(layout))
    if layout.owner == "last_rank":
        return prompt_len + index - in_prompt if role == c - 1 else None
    i, origin = _owner_chunk(layout), _decode_origin(layout, prompt_len)
    before = chunk_local_len(origin, role, c, i)
    return prompt_len - origin + chunk_position(before + index - in_prompt, role, c, i)


def page_and_offset(index: int, tokens_per_block: int) -> tuple[int, int]:
    """Local page and offset in it of a local index.

    pre: index >= 0 and tokens_per_block > 0
    post: joined(_[0], _[1], tokens_per_block) == index
    post: _[0] >= 0 and 0 <= _[1] < tokens_per_block
    """
    return index // tokens_per_block, index % tokens_per_block


def slot(block_table: Sequence[int], index: int, tokens_per_block: int) -> int:
    """Slot of a local index: physical page * tokens_per_block + offset.

    Raises IndexError when the block table does not reach that far.
    """
    page, offset = page_and_offset(index, tokens_per_block)
    return block_table[page] * tokens_per_block + offset


def pages_needed(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Pages that `rank` holds for a request (PAGE-1), shared ones included."""
    t = layout.tokens_per_block
    if layout.pages == "lockstep":
        return ceil_div(prompt_len + steps, t * layout.cp_size)
    return ceil_div(local_len(layout, prompt_len, steps, rank, shift), t)


def capacity(layout: Layout, pages: Sequence[int], prompt_len: int, shift: int = 0) -> int:
    """Global tokens a request of this prompt can reach alone in pools of these pages.

    Below prompt_len when the prompt itself does not fit.
    """
    t = layout.tokens_per_block
    if layout.pages == "lockstep":
        return min(pages) * t * layout.cp_size
    first_without_page = [
        position(layout, prompt_len, rank, held * t, shift) for rank, held in enumerate(pages)
    ]
    return min(end for end in first_without_page if end is not None)


def _prompt_chunk(layout: Layout) -> int:
    """Tokens that a dealt prompt split deals at a time."""
    return layout.prompt_interleave or layout.tokens_per_block


def _owner_chunk(layout: Layout) -> int:
    """Tokens that a dealt owner rule deals at a time."""
    return layout.owner_interleave or layout.tokens_per_block


def _decode_origin(layout: Layout, prompt_len: int) -> int:
    """Where the owner rule starts counting: at the prompt's end, or at the first position."""
    return 0 if layout.owner == "step" else prompt_len
