"""Closed forms: which rank, page and slot hold which position (SPEC.md section 3).

The first half is arithmetic over plain integers. The second half applies it to a `Layout` and a
request, which is described by three numbers:

- `prompt_len`: its prompt length L, in tokens;
- `steps`: how many tokens were decoded since its admission or resume;
- `shift`: its start shift s, 0 under `rank_zero`.

Positions, lengths and steps count tokens; ranks are cp_ranks. A rule names logical ranks: cp_rank
r has the logical rank (r - s) mod C.
"""

from __future__ import annotations

from collections.abc import Sequence

from helix_spec.layouts import Layout

# Arithmetic over integers. c: cp_size, t: tokens_per_block, i: tokens in a chunk.
#
# The lines `pre:` and `post:` are contracts (PEP 316; _ is the result). `helix-conformance prove`
# has CrossHair confirm each for all integers, on these very functions. Divisions are chained
# (x // i // c, never x // (i * c)): equal, and CrossHair confirms only the chained form.


def chunk_owner(position: int, c: int, i: int) -> int:
    """Return the rank of a token when chunks are dealt to the ranks round-robin.

    Parameters
    ----------
    position
        The token's number, from 0.
    c
        Number of ranks.
    i
        Tokens in a chunk.

    Notes
    -----
    pre: position >= 0 and c > 0 and i > 0
    post: 0 <= _ < c
    post: (position // i - _) % c == 0

    Examples
    --------
    >>> [chunk_owner(position, c=3, i=2) for position in range(8)]
    [0, 0, 1, 1, 2, 2, 0, 0]
    """
    return position // i % c


def chunk_local_len(length: int, rank: int, c: int, i: int) -> int:
    """Return how many of the first tokens fall to a rank when chunks are dealt round-robin.

    The full rounds give i tokens each; what is left of the last round is clamped to the rank's
    chunk.

    Parameters
    ----------
    length
        How many tokens are dealt.
    rank
        The rank, below `c`.
    c
        Number of ranks.
    i
        Tokens in a chunk.

    Notes
    -----
    pre: length >= 0 and 0 <= rank < c and i > 0
    post: 0 <= _ <= length
    post: _ + (chunk_owner(length, c, i) == rank) == chunk_local_len(length + 1, rank, c, i)

    Examples
    --------
    >>> [chunk_local_len(7, rank, c=3, i=2) for rank in range(3)]
    [3, 2, 2]
    """
    rounds = length // i // c
    return rounds * i + max(0, min(length - rounds * c * i - rank * i, i))


def chunk_position(local_index: int, rank: int, c: int, i: int) -> int:
    """Return the position of a rank's token when chunks are dealt round-robin.

    Parameters
    ----------
    local_index
        How many earlier tokens the rank has.
    rank
        The rank, below `c`.
    c
        Number of ranks.
    i
        Tokens in a chunk.

    Notes
    -----
    pre: local_index >= 0 and 0 <= rank < c and i > 0
    post: chunk_owner(_, c, i) == rank
    post: chunk_local_len(_, rank, c, i) == local_index

    Examples
    --------
    >>> [chunk_position(index, rank=1, c=3, i=2) for index in range(4)]
    [2, 3, 8, 9]
    """
    return joined(joined(local_index // i, rank, c), local_index % i, i)


def contiguous_blocks_before(blocks: int, rank: int, c: int) -> int:
    """Return the number of blocks before a rank when the first blocks mod c ranks take one more.

    Parameters
    ----------
    blocks
        Blocks of the prompt.
    rank
        The rank, at most `c`.
    c
        Number of ranks.

    Notes
    -----
    pre: blocks >= 0 and 0 <= rank <= c and c > 0
    post: rank > 0 or _ == 0
    post: rank < c or _ == blocks

    Examples
    --------
    >>> [contiguous_blocks_before(7, rank, c=4) for rank in range(5)]
    [0, 2, 4, 6, 7]
    """
    return rank * (blocks // c) + min(rank, blocks % c)


def contiguous_start(length: int, rank: int, c: int, t: int) -> int:
    """Return the first position of a rank in a contiguous split; `length` when it has none.

    Parameters
    ----------
    length
        Tokens of the prompt.
    rank
        The rank, at most `c`.
    c
        Number of ranks.
    t
        Tokens in a block.

    Notes
    -----
    pre: length >= 0 and 0 <= rank <= c and c > 0 and t > 0
    post: 0 <= _ <= length
    post: rank < c or _ == length
    post: _ == length or _ % t == 0

    Examples
    --------
    >>> [contiguous_start(13, rank, c=4, t=2) for rank in range(5)]
    [0, 4, 8, 12, 13]
    """
    return min(length, contiguous_blocks_before(ceil_div(length, t), rank, c) * t)


def contiguous_owner(position: int, length: int, c: int, t: int) -> int:
    """Return the rank of a prompt position in a contiguous split.

    Parameters
    ----------
    position
        The position, below `length`.
    length
        Tokens of the prompt.
    c
        Number of ranks.
    t
        Tokens in a block.

    Notes
    -----
    pre: 0 <= position < length and c > 0 and t > 0
    post: 0 <= _ < c
    post: contiguous_start(length, _, c, t) <= position
    post: position < contiguous_start(length, _ + 1, c, t)

    Examples
    --------
    >>> [contiguous_owner(position, 13, c=4, t=2) for position in (0, 4, 11, 12)]
    [0, 1, 2, 3]
    """
    share, larger = divmod(ceil_div(length, t), c)
    block = position // t
    if block < larger * (share + 1):
        return block // (share + 1)
    return larger + (block - larger * (share + 1)) // share


def joined(high: int, low: int, base: int) -> int:
    """Return the number whose last digit in a base is `low`, with `high` before it.

    Notes
    -----
    pre: high >= 0 and 0 <= low < base
    post: _ // base == high
    post: _ % base == low

    Examples
    --------
    >>> joined(4, 2, base=10)
    42
    """
    return high * base + low


def ceil_div(a: int, b: int) -> int:
    """Return the quotient rounded up.

    Notes
    -----
    pre: b > 0
    post: (_ - 1) * b < a <= _ * b

    Examples
    --------
    >>> ceil_div(7, 3)
    3
    """
    return -(-a // b)


# The same for a layout.


def prompt_local_len(layout: Layout, prompt_len: int, rank: int, shift: int = 0) -> int:
    """Return how many tokens of a prompt are on a rank.

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr9757/1:C=4,T=2")
    >>> [prompt_local_len(layout, 13, rank) for rank in range(4)]
    [4, 4, 4, 1]
    """
    logical = (rank - shift) % layout.cp_size
    if layout.prompt == "contiguous":
        c, t = layout.cp_size, layout.tokens_per_block
        start = contiguous_start(prompt_len, logical, c, t)
        return contiguous_start(prompt_len, logical + 1, c, t) - start
    return chunk_local_len(prompt_len, logical, layout.cp_size, _prompt_chunk(layout))


def decode_owner(layout: Layout, prompt_len: int, step: int, shift: int = 0) -> int:
    """Return the rank that owns the token of a step, at global position prompt_len + step.

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    step
        The step index of the token, from 0.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> [decode_owner(parse_layout("pr17866/1:C=4,T=2"), 13, step) for step in range(4)]
    [2, 3, 3, 0]
    """
    c = layout.cp_size
    if layout.owner == "last_rank":
        logical = c - 1
    else:
        logical = chunk_owner(_decode_origin(layout, prompt_len) + step, c, _owner_chunk(layout))
    return (logical + shift) % c


def decode_local_len(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Return how many decoded tokens are on a rank.

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    steps
        Tokens decoded so far.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr9757/1:C=4,T=2")
    >>> [decode_local_len(layout, 13, 5, rank) for rank in range(4)]
    [2, 2, 1, 0]
    """
    c, logical = layout.cp_size, (rank - shift) % layout.cp_size
    if layout.owner == "last_rank":
        return steps if logical == c - 1 else 0
    i, origin = _owner_chunk(layout), _decode_origin(layout, prompt_len)
    return chunk_local_len(origin + steps, logical, c, i) - chunk_local_len(origin, logical, c, i)


def local_len(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Return how many tokens of a request are on a rank: of its prompt and decoded (LEN-1).

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    steps
        Tokens decoded so far.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr9757/1:C=4,T=2")
    >>> [local_len(layout, 13, 2, rank) for rank in range(4)]
    [6, 4, 4, 1]
    """
    return prompt_local_len(layout, prompt_len, rank, shift) + decode_local_len(
        layout, prompt_len, steps, rank, shift
    )


def owner(layout: Layout, prompt_len: int, position: int, shift: int = 0) -> int:
    """Return the rank that holds a global position, of the prompt or decoded (OWN-1, OWN-3).

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    position
        A global position, from 0.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> [owner(parse_layout("pr9757/1:C=4,T=2"), 13, position) for position in (3, 12, 13)]
    [0, 3, 0]
    """
    if position >= prompt_len:
        return decode_owner(layout, prompt_len, position - prompt_len, shift)
    c = layout.cp_size
    if layout.prompt == "contiguous":
        logical = contiguous_owner(position, prompt_len, c, layout.tokens_per_block)
    else:
        logical = chunk_owner(position, c, _prompt_chunk(layout))
    return (logical + shift) % c


def visible_len(layout: Layout, prompt_len: int, position: int, rank: int, shift: int = 0) -> int:
    """Return how many keys on a rank the query at a decoded position sees (LEN-3).

    These are the rank's keys up to and including that position.

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    position
        The global position of the query, at least `prompt_len`.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr17866/1:C=4,T=2")
    >>> [visible_len(layout, 13, 14, rank) for rank in (0, 3)]  # example 11.3
    [4, 3]
    """
    return local_len(layout, prompt_len, position + 1 - prompt_len, rank, shift)


def tokens_before(layout: Layout, prompt_len: int, position: int, rank: int, shift: int = 0) -> int:
    """Return how many of the tokens at earlier positions are on a rank.

    A rank stores its tokens by rising position, so these are its first local indexes.

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    position
        A global position, of the prompt or decoded.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr9757/1:C=4,T=2")
    >>> [tokens_before(layout, 13, position, rank=1) for position in (4, 6, 13, 16)]
    [0, 2, 4, 5]
    """
    if position >= prompt_len:
        return local_len(layout, prompt_len, position - prompt_len, rank, shift)
    logical = (rank - shift) % layout.cp_size
    if layout.prompt == "contiguous":
        c, t = layout.cp_size, layout.tokens_per_block
        end = contiguous_start(prompt_len, logical + 1, c, t)
        return max(0, min(position, end) - contiguous_start(prompt_len, logical, c, t))
    return chunk_local_len(position, logical, layout.cp_size, _prompt_chunk(layout))


def local_index(layout: Layout, prompt_len: int, position: int, shift: int = 0) -> int:
    """Return how many earlier tokens of the request its rank holds of a global position.

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    position
        A global position, from 0.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr17866/1:C=4,T=2")
    >>> [local_index(layout, 13, position) for position in (6, 7, 14)]  # example 11.3
    [0, 1, 2]
    """
    rank = owner(layout, prompt_len, position, shift)
    return tokens_before(layout, prompt_len, position, rank, shift)


def position(layout: Layout, prompt_len: int, rank: int, index: int, shift: int = 0) -> int | None:
    """Return the global position of the token with a local index on a rank, once it is there.

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    rank
        A cp_rank.
    index
        The local index, from 0.
    shift
        The request's start shift.

    Returns
    -------
    int or None
        None when the rank never gets that many tokens: under `last_rank` only the last one
        decodes.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr17866/1:C=4,T=2")
    >>> [position(layout, 13, 3, index) for index in range(3)]  # example 11.3
    [6, 7, 14]
    """
    c, logical = layout.cp_size, (rank - shift) % layout.cp_size
    in_prompt = prompt_local_len(layout, prompt_len, rank, shift)
    if index < in_prompt:
        if layout.prompt == "contiguous":
            return contiguous_start(prompt_len, logical, c, layout.tokens_per_block) + index
        return chunk_position(index, logical, c, _prompt_chunk(layout))
    if layout.owner == "last_rank":
        return prompt_len + index - in_prompt if logical == c - 1 else None
    i, origin = _owner_chunk(layout), _decode_origin(layout, prompt_len)
    before = chunk_local_len(origin, logical, c, i)
    return prompt_len - origin + chunk_position(before + index - in_prompt, logical, c, i)


def page_and_offset(index: int, tokens_per_block: int) -> tuple[int, int]:
    """Return the local page of a local index, and the offset in it.

    Notes
    -----
    pre: index >= 0 and tokens_per_block > 0
    post: joined(_[0], _[1], tokens_per_block) == index
    post: _[0] >= 0 and 0 <= _[1] < tokens_per_block

    Examples
    --------
    >>> page_and_offset(7, tokens_per_block=4)
    (1, 3)
    """
    return index // tokens_per_block, index % tokens_per_block


def slot(block_table: Sequence[int], index: int, tokens_per_block: int) -> int:
    """Return the slot of a local index: physical page * tokens_per_block + offset.

    Parameters
    ----------
    block_table
        Physical page numbers of the request on the rank, in local order.
    index
        The local index, from 0.
    tokens_per_block
        Tokens in a page.

    Raises
    ------
    IndexError
        When the block table does not reach that far.

    Examples
    --------
    >>> [slot([5, 1], index, tokens_per_block=2) for index in range(3)]  # example 11.3
    [10, 11, 2]
    """
    page, offset = page_and_offset(index, tokens_per_block)
    return block_table[page] * tokens_per_block + offset


def pages_needed(layout: Layout, prompt_len: int, steps: int, rank: int, shift: int = 0) -> int:
    """Return how many pages a rank holds for a request, shared ones included (PAGE-1).

    Parameters
    ----------
    layout
        A legal layout.
    prompt_len
        Tokens of the prompt.
    steps
        Tokens decoded so far.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> pages_needed(parse_layout("pr17866/1:C=4,T=32"), 1, 400, rank=0)  # example 11.4
    4
    """
    t = layout.tokens_per_block
    if layout.pages == "lockstep":
        return ceil_div(prompt_len + steps, t * layout.cp_size)
    return ceil_div(local_len(layout, prompt_len, steps, rank, shift), t)


def capacity(layout: Layout, pages: Sequence[int], prompt_len: int, shift: int = 0) -> int:
    """Return how many global tokens a request can reach when it has all pools for itself.

    Parameters
    ----------
    layout
        A legal layout.
    pages
        Pool size of each cp_rank, in pages; length C.
    prompt_len
        Tokens of the prompt.
    shift
        The request's start shift.

    Returns
    -------
    int
        A number of tokens; below `prompt_len` when the prompt itself does not fit.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> capacity(parse_layout("pr17866/1:C=4,T=32"), [3, 3, 3, 3], prompt_len=1)  # example 11.4
    384
    """
    t = layout.tokens_per_block
    if layout.pages == "lockstep":
        return min(pages) * t * layout.cp_size
    first_without_page = [
        position(layout, prompt_len, rank, held * t, shift) for rank, held in enumerate(pages)
    ]
    return min(end for end in first_without_page if end is not None)


# Windows of a cache group (SPEC.md sections 4.2 and 5.7). `layout` is that of the group, with C = 1
# where it is replicated (`Config.layout_of`).


def visible_range(
    layout: Layout, prompt_len: int, position: int, window: int, rank: int, shift: int = 0
) -> tuple[int, int]:
    """Return the local indexes that the query at a position sees on a rank (WIN-1).

    Parameters
    ----------
    layout
        The layout of the cache group.
    prompt_len
        Tokens of the prompt.
    position
        The global position of the query.
    window
        Tokens that it sees on all ranks together, itself included, from 1.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Returns
    -------
    tuple of two int
        The first index, and the one after the last; equal when the rank has nothing to see.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr17866/1:C=4,T=2")
    >>> [visible_range(layout, 13, 14, 6, rank) for rank in range(4)]  # positions 9 to 14
    [(3, 4), (2, 4), (2, 4), (2, 3)]
    """
    first = max(0, position - window + 1)
    return (
        tokens_before(layout, prompt_len, first, rank, shift),
        tokens_before(layout, prompt_len, position + 1, rank, shift),
    )


def next_query(total: int, open_len: int) -> int:
    """Return the smallest position at which a query may still come, m of SPEC.md section 5.7.

    Parameters
    ----------
    total
        Tokens of the request, those of the open group included.
    open_len
        Tokens of the open group; 0 when none is open.

    Examples
    --------
    >>> next_query(7, 0), next_query(7, 1), next_query(7, 2)
    (7, 7, 6)
    """
    return total - max(0, open_len - 1)


def pages_dropped(
    layout: Layout, prompt_len: int, query: int, window: int, rank: int, shift: int = 0
) -> int:
    """Return how many pages of a request have gone back from a window: its first ones (WIN-2).

    Parameters
    ----------
    layout
        The layout of the cache group.
    prompt_len
        Tokens of the prompt.
    query
        The smallest position at which a query may still come (`next_query`).
    window
        Tokens that a query sees, from 1.
    rank
        A cp_rank.
    shift
        The request's start shift.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> near = parse_layout("pr17866/1:C=1,T=2")  # `near` of example 11.12
    >>> [pages_dropped(near, 5, next_query(*state), 3, rank=0) for state in ((5, 0), (7, 2))]
    [1, 2]
    """
    t, unseen = layout.tokens_per_block, max(0, query - window + 1)
    if layout.pages == "lockstep":
        return unseen // (t * layout.cp_size)
    return tokens_before(layout, prompt_len, unseen, rank, shift) // t


def most_window_pages(layout: Layout, window: int, query_len: int) -> int:
    """Return the most pages that a request ever holds on a rank for a window.

    It is attained under `lockstep` and by a replicated group; under `lazy` it is a bound. Where
    prompt and decoded tokens are not dealt in one turn, a window may lie on one rank. The event
    that places a prompt holds more for its time: pages of all its tokens.

    Parameters
    ----------
    layout
        The layout of the cache group.
    window
        Tokens that a query sees, from 1.
    query_len
        Tokens of the longest open group, from 1. For what is held while the next decode is
        placed, before pages go back, add the tokens of that one.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> most_window_pages(parse_layout("pr17866/1:C=1,T=16"), window=128, query_len=1)
    9
    >>> most_window_pages(parse_layout("vllm_dcp/1:C=4,T=16,I=1"), window=128, query_len=1)
    3
    """
    span = layout.tokens_per_block
    dealt_in_turn = layout.prompt != "contiguous" and layout.owner in ("position", "interleave")
    if dealt_in_turn and _prompt_chunk(layout) == _owner_chunk(layout):
        span *= layout.cp_size
    return ceil_div(span - 1 + window + query_len - 2, span)


def shared_capacity(pages: int, long: int, short: int) -> int:
    """Return how many tokens a request reaches in a pool that two cache groups share.

    The groups have no window, and the request has the pool for itself. Pages are taken as the
    tokens come, one for each span that is begun: that is `lockstep`, or one rank.

    Parameters
    ----------
    pages
        Pages of the pool on a rank.
    long, short
        Tokens that a page of each group spans: T*C of a sharded one, T of a replicated one. The
        second divides the first.

    Examples
    --------
    >>> shared_capacity(10, long=4 * 16, short=16)  # sharded over four ranks, and replicated
    128
    >>> shared_capacity(12, long=4 * 16, short=16)
    144
    """
    rounds, rest = divmod(pages, long // short + 1)
    return rounds * long + max(0, rest - 1) * short


def _prompt_chunk(layout: Layout) -> int:
    """Return the tokens in a chunk of a round-robin prompt split."""
    return layout.prompt_interleave or layout.tokens_per_block


def _owner_chunk(layout: Layout) -> int:
    """Return the tokens in a chunk of a round-robin owner rule."""
    return layout.owner_interleave or layout.tokens_per_block


def _decode_origin(layout: Layout, prompt_len: int) -> int:
    """Return how many tokens the owner rule counts before the first step."""
    return 0 if layout.owner == "step" else prompt_len
