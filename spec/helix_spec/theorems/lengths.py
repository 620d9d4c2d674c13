"""Local lengths: the closed forms count what they should (LEN-1 to LEN-3, POS-1, GROW-1).

Two inductions are done by hand. Z3 confirms their base and their step, for all sizes; that base
and step together give the claim for every number of tokens, or of ranks, is the principle of
induction, which no machine checks here.

- Over tokens: `count-base` and `count-step` say that a closed form is 0 for no token and grows by
  one exactly for the tokens that a rank owns. So it is the number of tokens that the rank owns
  among the first n (`chunk-...` for dealing in turn, `layout-...` for decoded tokens of every
  layout, `contiguous-...` for a contiguous prompt).
- Over ranks: `sum-base`, `sum-step` and `sum-end` say that a sum over the first k ranks, given as
  a closed form of k, is 0 for no rank, grows by the local length of rank k, and is the number of
  all tokens for k = C.
"""

from __future__ import annotations

from helix_spec import placement
from helix_spec.theorems import mutations as m
from helix_spec.theorems.base import Natural, Size, assume, lemma, theorem
from helix_spec.theorems.ownership import (
    contiguous_ends,
    contiguous_split_tiles,
    contiguous_starts_rise,
    owner_in_range,
    owner_of_a_contiguous_split,
)
from helix_spec.theorems.shapes import (
    DEALING,
    EVERY_OWNER,
    EVERY_PAIR,
    EVERY_PROMPT,
    PROMPT,
    SPLITTING,
    Pair,
)

# Over tokens.


@theorem(
    "chunk-count-base",
    proves="LEN-1",
    witness={"rank": 1, "c": 2, "i": 3},
    about=["placement.chunk_local_len"],
    kills=[m.no_clamp_from_below],
)
def chunk_count_base(rank: Natural, c: Size, i: Size) -> bool:
    """Of no tokens, no rank holds any."""
    assume(rank < c)
    return placement.chunk_local_len(0, rank, c, i) == 0


@theorem(
    "chunk-count-step",
    proves="LEN-1",
    witness={"length": 5, "rank": 0, "c": 2, "i": 3},
    about=["placement.chunk_owner"],
    kills=[
        m.no_clamp_from_above,
        m.at_most_where_below_is_meant,
        m.equal_shares_rounded_up,
        m.lengths_interleave_one,
        m.last_chunk_taken_as_full,
    ],
)
def chunk_count_step(length: Natural, rank: Natural, c: Size, i: Size) -> bool:
    """One more token makes the share of its owner, and no other, one larger."""
    assume(rank < c)
    before = placement.chunk_local_len(length, rank, c, i)
    owner = placement.chunk_owner(length, c, i)
    return placement.chunk_local_len(length + 1, rank, c, i) == before + (owner == rank)


@theorem(
    "chunk-count-grows",
    proves="LEN-1 GROW-1",
    witness={"length": 5, "more": 2, "rank": 0, "c": 2, "i": 3},
    about=["placement.chunk_local_len"],
    kills=[m.no_clamp_from_below],
)
def chunk_count_grows(length: Natural, more: Natural, rank: Natural, c: Size, i: Size) -> bool:
    """More tokens never leave a rank with fewer, nor with more than all of them."""
    assume(rank < c)
    before = placement.chunk_local_len(length, rank, c, i)
    after = placement.chunk_local_len(length + more, rank, c, i)
    return (before >= 0) & (before <= length) & (before <= after)


@theorem(
    "contiguous-count",
    proves="LEN-1",
    witness={"position": 5, "length": 13, "rank": 1, "c": 4, "t": 2},
    about=["placement.contiguous_owner"],
    kills=[m.larger_shares_last],
    free=SPLITTING,
)
def contiguous_count(position: Natural, length: Size, rank: Natural, c: Size, t: Size) -> bool:
    """Of the first p prompt tokens of a contiguous split, a rank holds as many as lie between its
    first position and the next rank's: none for p = 0, one more where it owns p.
    """
    assume(position < length, rank < c)
    start = placement.contiguous_start(length, rank, c, t)
    end = placement.contiguous_start(length, rank + 1, c, t)

    def count(tokens: int) -> int:
        return max(0, min(tokens, end) - start)

    owner = placement.contiguous_owner(position, length, c, t)
    lemma(owner_of_a_contiguous_split, position, length, c, t)
    lemma(contiguous_ends, length, rank, c, t)
    lemma(contiguous_split_tiles, length, rank, c, t)
    if owner < rank:
        lemma(contiguous_starts_rise, length, owner + 1, rank, c, t)
    elif owner > rank:
        lemma(contiguous_starts_rise, length, rank + 1, owner, c, t)
    return (count(0) == 0) & (count(position + 1) == count(position) + (owner == rank))


@theorem(
    "layout-count-base",
    proves="LEN-1 LEN-2",
    witness={"prompt": 5, "rank": 1, "shift": 1, "c": 2, "t": 2, "i": 1},
    about=["placement.local_len", "placement.decode_local_len"],
    cases=EVERY_OWNER,
    free=[*PROMPT, *DEALING],
)
def layout_count_base(
    pair: Pair, prompt: Size, rank: Natural, shift: Natural, c: Size, t: Size, i: Size
) -> bool:
    """Before any step, a rank holds its part of the prompt, whatever the prompt split."""
    assume(rank < c, shift < c)
    layout = pair.layout(c, t, owner_interleave=i)
    in_prompt = placement.prompt_local_len(layout, prompt, rank, shift)
    return placement.local_len(layout, prompt, 0, rank, shift) == in_prompt


@theorem(
    "layout-count-step",
    proves="LEN-1 LEN-2 LEN-3",
    witness={"prompt": 5, "total": 8, "rank": 1, "shift": 1, "c": 2, "t": 2, "i": 1},
    about=["placement.decode_owner", "placement.visible_len"],
    kills=[
        m.shift_forgotten,
        m.shift_in_the_wrong_direction,
        m.shift_taken_back_as_in_c,
        m.inactive_ranks_see_the_new_token,
        m.new_token_is_never_seen,
    ],
    cases=EVERY_OWNER,
    free=[*PROMPT, *DEALING],
)
def layout_count_step(
    pair: Pair,
    prompt: Size,
    total: Size,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """Under every owner rule, whatever the prompt split, step n makes the local length of its
    owner, and of no other rank, one larger; so past_len, taken as the length after the step less
    one where active, is the length before it. A query sees the length after its step.
    """
    assume(rank < c, shift < c, prompt <= total)
    layout, step = pair.layout(c, t, owner_interleave=i), total - prompt
    if pair.owner != "last_rank":
        counted = pair.counted(prompt) + step
        lemma(owner_in_range, counted, c, pair.chunk(t, i))
        lemma(chunk_count_step, counted, (rank - shift) % c, c, pair.chunk(t, i))
    before = placement.local_len(layout, prompt, step, rank, shift)
    owner = placement.decode_owner(layout, prompt, step, shift)
    after = placement.local_len(layout, prompt, step + 1, rank, shift)
    visible = placement.visible_len(layout, prompt, total, rank, shift)
    return (after == before + (owner == rank)) & (visible == after)


@theorem(
    "prompt-count",
    proves="LEN-1",
    witness={"prompt": 13, "logical": 1, "shift": 3, "c": 4, "t": 2, "i": 1},
    about=["placement.prompt_local_len"],
    kills=[m.no_clamp_from_below],
    cases=EVERY_PROMPT,
    free=[*DEALING, *SPLITTING],
)
def prompt_count(
    pair: Pair, prompt: Size, logical: Natural, shift: Natural, c: Size, t: Size, i: Size
) -> bool:
    """A rank's part of the prompt is what contiguous-count or chunk-count-step count up to the
    prompt length, for the logical rank that the start shift gives it.
    """
    assume(logical < c, shift < c)
    layout = pair.layout(c, t, prompt_interleave=i)
    if pair.prompt == "contiguous":
        start = placement.contiguous_start(prompt, logical, c, t)
        share = placement.contiguous_start(prompt, logical + 1, c, t) - start
        lemma(contiguous_split_tiles, prompt, logical, c, t)
    else:
        chunk = pair.prompt_chunk(t, i)
        share = placement.chunk_local_len(prompt, logical, c, chunk)
        lemma(chunk_count_grows, prompt, 0, logical, c, chunk)
    rank = (logical + shift) % c
    return (share >= 0) & (placement.prompt_local_len(layout, prompt, rank, shift) == share)


@theorem(
    "lengths-never-negative",
    proves="LEN-2",
    witness={"prompt": 5, "total": 8, "more": 1, "rank": 1, "shift": 1, "c": 2, "t": 2, "i": 1},
    kills=[m.no_clamp_from_below],
    cases=EVERY_OWNER,
    free=[*PROMPT, *DEALING],
)
def lengths_never_negative(
    pair: Pair,
    prompt: Size,
    total: Size,
    more: Natural,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """No rank's past length is negative, and decoding never makes it smaller (its part of the
    prompt is not negative, by prompt-count).
    """
    assume(rank < c, shift < c, prompt <= total)
    layout = pair.layout(c, t, owner_interleave=i)
    assume(placement.prompt_local_len(layout, prompt, rank, shift) >= 0)
    if pair.owner != "last_rank":
        logical, origin = (rank - shift) % c, pair.counted(prompt)
        lemma(chunk_count_grows, origin, total - prompt, logical, c, pair.chunk(t, i))
        lemma(chunk_count_grows, origin + total - prompt, more, logical, c, pair.chunk(t, i))
    before = placement.local_len(layout, prompt, total - prompt, rank, shift)
    after = placement.local_len(layout, prompt, total + more - prompt, rank, shift)
    return (before >= 0) & (before <= after)


# Over ranks.


@theorem(
    "chunk-sum-base",
    proves="LEN-1",
    witness={"length": 13, "c": 4, "i": 2},
)
def chunk_sum_base(length: Natural, c: Size, i: Size) -> bool:
    """The sum over no ranks is 0, by its closed form (see chunk-sum-step)."""
    return _chunk_sum(length, 0, c, i) == 0


@theorem(
    "chunk-sum-step",
    proves="LEN-1",
    witness={"length": 13, "k": 2, "c": 4, "i": 2},
    about=["placement.chunk_local_len"],
    kills=[m.no_clamp_from_above, m.last_chunk_taken_as_full, m.at_most_where_below_is_meant],
)
def chunk_sum_step(length: Natural, k: Natural, c: Size, i: Size) -> bool:
    """The sum over the first k ranks is k full rounds, the chunks of the last round that lie before
    rank k, and the rest: with one rank more it grows by that rank's share.
    """
    assume(k < c)
    share = placement.chunk_local_len(length, k, c, i)
    return _chunk_sum(length, k + 1, c, i) == _chunk_sum(length, k, c, i) + share


@theorem(
    "chunk-sum-end",
    proves="LEN-1",
    witness={"length": 13, "c": 4, "i": 2},
)
def chunk_sum_end(length: Natural, c: Size, i: Size) -> bool:
    """The sum over all C ranks is the number of tokens."""
    return _chunk_sum(length, c, c, i) == length


@chunk_sum_base.wrong()
def rest_before_the_first_rank(length: Natural, c: Size, i: Size) -> bool:
    """The rest counts before the first rank."""
    return _chunk_sum(length, 0, c, i) + length % i == 0


@chunk_sum_end.wrong()
def without_the_last_rank(length: Natural, c: Size, i: Size) -> bool:
    """Without the last rank."""
    return _chunk_sum(length, c - 1, c, i) == length


def _chunk_sum(length: int, k: int, c: int, i: int) -> int:
    """Tokens on the first k ranks, in closed form."""
    rounds, full = divmod(length // i, c)
    return rounds * k * i + min(full, k) * i + (length % i if k > full else 0)


@theorem(
    "prompt-sum",
    proves="LEN-1",
    witness={"prompt": 13, "k": 2, "c": 4, "t": 2},
    about=["placement.prompt_local_len"],
)
def prompt_sum(prompt: Size, k: Natural, c: Size, t: Size) -> bool:
    """A contiguous prompt: the parts of the ranks are differences of the ranks' first positions, so
    the sum over the first k ranks is the first position of rank k: 0 for none, the prompt length
    for all (contiguous-split-tiles).
    """
    assume(k < c)
    layout = Pair("contiguous", "step").layout(c, t)
    before = placement.contiguous_start(prompt, k, c, t)
    after = placement.contiguous_start(prompt, k + 1, c, t)
    return after == before + placement.prompt_local_len(layout, prompt, k)


@theorem(
    "decode-sum",
    proves="LEN-1",
    witness={"prompt": 13, "total": 20, "k": 2, "c": 4, "t": 2, "i": 1},
    about=["placement.decode_local_len"],
    kills=[m.position_where_step_is_meant, m.step_where_position_is_meant],
    cases=EVERY_OWNER,
    free=DEALING,
)
def decode_sum(
    pair: Pair, prompt: Size, total: Size, k: Natural, c: Size, t: Size, i: Size
) -> bool:
    """Decoded tokens: the part of rank k is the difference of two chunk shares that chunk-sum-...
    sum up, to (origin + n) - origin = n over all ranks; under last_rank it is n for rank C-1 and 0
    for the others.
    """
    assume(k < c, prompt <= total)
    steps = total - prompt
    part = placement.decode_local_len(pair.layout(c, t, owner_interleave=i), prompt, steps, k)
    if pair.owner == "last_rank":
        return part == (steps if k == c - 1 else 0)
    origin, chunk = pair.counted(prompt), pair.chunk(t, i)
    until = placement.chunk_local_len(origin + steps, k, c, chunk)
    return part == until - placement.chunk_local_len(origin, k, c, chunk)


@theorem(
    "shift-moves-lengths",
    proves="LEN-1 BAL-3",
    witness={"prompt": 13, "total": 20, "logical": 2, "shift": 3, "c": 4, "t": 2, "i": 1, "j": 2},
    kills=[m.shift_forgotten, m.shift_in_the_wrong_direction, m.shift_taken_back_as_in_c],
    cases=EVERY_PAIR,
    free=[*DEALING, *SPLITTING],
)
def shift_moves_lengths(
    pair: Pair,
    prompt: Size,
    total: Size,
    logical: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """A start shift s gives rank (x + s) mod C what rank x has without it; with
    shift-is-a-permutation the sum over the ranks stays the same.
    """
    assume(logical < c, shift < c, prompt <= total)
    layout, steps = pair.layout(c, t, i, j), total - prompt
    shifted = placement.local_len(layout, prompt, steps, (logical + shift) % c, shift)
    return shifted == placement.local_len(layout, prompt, steps, logical)


# Positions and local indices.


@theorem(
    "chunk-position-of-index",
    proves="GROW-1",
    witness={"index": 5, "rank": 1, "length": 13, "c": 4, "i": 2},
    about=["placement.chunk_position", "placement.chunk_local_len", "placement.joined"],
    kills=[m.position_is_the_local_index, m.no_clamp_from_above],
)
def chunk_position_of_index(
    index: Natural, rank: Natural, length: Natural, c: Size, i: Size
) -> bool:
    """Dealing in turn: position and local index undo each other, and the tokens of a rank below a
    length are exactly those of index below its share.
    """
    assume(rank < c)
    position = placement.chunk_position(index, rank, c, i)
    below = position < length
    counted = index < placement.chunk_local_len(length, rank, c, i)
    return (
        (placement.chunk_owner(position, c, i) == rank)
        & (placement.chunk_local_len(position, rank, c, i) == index)
        & (below == counted)
    )


@theorem(
    "chunk-index-of-position",
    proves="GROW-1",
    witness={"position": 5, "c": 4, "i": 2},
    about=["placement.chunk_position", "placement.chunk_local_len"],
    kills=[m.owner_one_rank_on],
)
def chunk_index_of_position(position: Natural, c: Size, i: Size) -> bool:
    """The other way round: the token of the index that a position has is at it."""
    rank = placement.chunk_owner(position, c, i)
    index = placement.chunk_local_len(position, rank, c, i)
    return placement.chunk_position(index, rank, c, i) == position


@theorem(
    "prompt-index-round-trip",
    proves="GROW-1",
    witness={"position": 7, "prompt": 13, "shift": 1, "c": 4, "t": 2, "i": 1},
    about=["placement.local_index", "placement.position"],
    kills=[m.index_by_global_block],
    cases=EVERY_PROMPT,
    free=[*DEALING, *SPLITTING],
)
def prompt_index_round_trip(
    pair: Pair, position: Natural, prompt: Size, shift: Natural, c: Size, t: Size, i: Size
) -> bool:
    """A prompt position is found again from its rank and local index, in every split; and the index
    is below the rank's part of the prompt.
    """
    assume(position < prompt, shift < c)
    layout = pair.layout(c, t, prompt_interleave=i)
    if pair.prompt == "contiguous":
        lemma(owner_of_a_contiguous_split, position, prompt, c, t)
    else:
        chunk = pair.prompt_chunk(t, i)
        logical = placement.chunk_owner(position, c, chunk)
        lemma(owner_in_range, position, c, chunk)
        lemma(chunk_index_of_position, position, c, chunk)
        lemma(chunk_count_step, position, logical, c, chunk)
        lemma(chunk_count_grows, position, 0, logical, c, chunk)
        lemma(chunk_count_grows, position + 1, prompt - position - 1, logical, c, chunk)
    rank = placement.owner(layout, prompt, position, shift)
    index = placement.local_index(layout, prompt, position, shift)
    found = placement.position(layout, prompt, rank, index, shift)
    share = placement.prompt_local_len(layout, prompt, rank, shift)
    return (found == position) & (index >= 0) & (index < share)


@theorem(
    "decode-index-round-trip",
    proves="GROW-1 POS-1",
    witness={"prompt": 13, "total": 20, "shift": 1, "c": 4, "t": 2, "i": 1},
    about=["placement.local_index", "placement.position"],
    kills=[m.index_starts_anew_with_decode, m.position_is_the_local_index],
    cases=EVERY_OWNER,
    free=[*PROMPT, *DEALING],
)
def decode_index_round_trip(
    pair: Pair, prompt: Size, total: Size, shift: Natural, c: Size, t: Size, i: Size
) -> bool:
    """A decoded token is found again from its rank and local index: the token of step n has
    position L + n, and its index is the rank's length before the step.
    """
    assume(shift < c, prompt <= total)
    layout = pair.layout(c, t, owner_interleave=i)
    if pair.owner != "last_rank":
        origin, chunk = pair.counted(prompt), pair.chunk(t, i)
        logical = placement.chunk_owner(origin + total - prompt, c, chunk)
        lemma(owner_in_range, origin + total - prompt, c, chunk)
        lemma(chunk_index_of_position, origin + total - prompt, c, chunk)
        lemma(chunk_count_grows, origin, total - prompt, logical, c, chunk)
    rank = placement.owner(layout, prompt, total, shift)
    index = placement.local_index(layout, prompt, total, shift)
    past = placement.local_len(layout, prompt, total - prompt, rank, shift)
    return (index == past) & (placement.position(layout, prompt, rank, index, shift) == total)


@theorem(
    "prompt-slots-dense",
    proves="OWN-1 GROW-1",
    witness={"index": 1, "prompt": 13, "rank": 2, "shift": 1, "c": 4, "t": 2, "i": 1},
    about=["placement.position", "placement.local_index"],
    kills=[m.index_by_global_block],
    cases=EVERY_PROMPT,
    free=[*DEALING, *SPLITTING],
)
def prompt_slots_dense(
    pair: Pair,
    index: Natural,
    prompt: Size,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """Every local index below a rank's part of the prompt is the index of exactly one prompt
    position, and that position is on the rank.
    """
    layout = pair.layout(c, t, prompt_interleave=i)
    assume(rank < c, shift < c)
    assume(index < placement.prompt_local_len(layout, prompt, rank, shift))
    position = placement.position(layout, prompt, rank, index, shift)
    assert position is not None  # a prompt position always is
    logical = (rank - shift) % c
    if pair.prompt == "contiguous":
        lemma(contiguous_ends, prompt, logical, c, t)
        lemma(contiguous_ends, prompt, logical + 1, c, t)
        lemma(owner_of_a_contiguous_split, position, prompt, c, t)
        found = placement.contiguous_owner(position, prompt, c, t)
        if found < logical:
            lemma(contiguous_starts_rise, prompt, found + 1, logical, c, t)
        if found > logical:
            lemma(contiguous_starts_rise, prompt, logical + 1, found, c, t)
    else:
        lemma(chunk_position_of_index, index, logical, prompt, c, pair.prompt_chunk(t, i))
    return (
        (position < prompt)
        & (placement.owner(layout, prompt, position, shift) == rank)
        & (placement.local_index(layout, prompt, position, shift) == index)
    )


@theorem(
    "decode-slots-dense",
    proves="OWN-1 GROW-1",
    witness={"more": 1, "prompt": 13, "total": 20, "rank": 2, "shift": 1, "c": 4, "t": 2, "i": 1},
    about=["placement.position", "placement.local_index"],
    kills=[m.index_starts_anew_with_decode, m.position_is_the_local_index],
    cases=EVERY_OWNER,
    free=[*PROMPT, *DEALING],
)
def decode_slots_dense(
    pair: Pair,
    more: Natural,
    prompt: Size,
    total: Size,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """Every local index from a rank's part of the prompt on is the index of exactly one decoded
    position, on that rank; it is decoded by step n exactly when the index is below the length after
    it. Under last_rank only rank C-1 has such indices.
    """
    assume(rank < c, shift < c, prompt <= total)
    layout = pair.layout(c, t, owner_interleave=i)
    index = placement.prompt_local_len(layout, prompt, rank, shift) + more
    logical = (rank - shift) % c
    if pair.owner != "last_rank":
        origin, chunk = pair.counted(prompt), pair.chunk(t, i)
        before = placement.chunk_local_len(origin, logical, c, chunk)
        lemma(chunk_count_grows, origin, 0, logical, c, chunk)
        lemma(chunk_position_of_index, before + more, logical, origin, c, chunk)
        lemma(chunk_position_of_index, before + more, logical, origin + total - prompt, c, chunk)
    position = placement.position(layout, prompt, rank, index, shift)
    if position is None:
        return logical != c - 1
    length = placement.local_len(layout, prompt, total - prompt, rank, shift)
    return (
        (position >= prompt)
        & ((position < total) == (index < length))
        & (placement.owner(layout, prompt, position, shift) == rank)
        & (placement.local_index(layout, prompt, position, shift) == index)
    )


@theorem(
    "positions-rise-on-a-rank",
    proves="GROW-1",
    witness={"index": 5, "rank": 1, "c": 4, "i": 2},
    kills=[m.position_by_rounds_only],
)
def positions_rise_on_a_rank(index: Natural, rank: Natural, c: Size, i: Size) -> bool:
    """The next local index of a rank is a later position, so RoPE positions rise along a rank's
    cache: in a prompt part dealt in turn and among decoded tokens here; a contiguous part is
    consecutive, and every decoded position lies after every one of the prompt.
    """
    assume(rank < c)
    here = placement.chunk_position(index, rank, c, i)
    return here < placement.chunk_position(index + 1, rank, c, i)


@theorem(
    "appended-tokens-come-last",
    proves="GROW-1",
    witness={"prompt": 5, "earlier": 6, "later": 10, "shift": 1, "c": 2, "t": 2, "i": 1},
    kills=[m.index_by_global_block],
    cases=EVERY_OWNER,
    free=["placement.local_len", "placement.decode_owner", *PROMPT],
)
def appended_tokens_come_last(
    pair: Pair,
    prompt: Size,
    earlier: Size,
    later: Size,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """Of two decoded tokens on one rank the later has the larger local index. An index depends on
    nothing that comes later (local_index takes no step), so appending changes none.
    """
    assume(shift < c, prompt <= earlier, earlier < later)
    layout = pair.layout(c, t, owner_interleave=i)
    rank = placement.owner(layout, prompt, earlier, shift)
    assume(rank == placement.owner(layout, prompt, later, shift), rank >= 0, rank < c)
    assume(placement.prompt_local_len(layout, prompt, rank, shift) >= 0)  # by prompt-count
    lemma(layout_count_step, pair, prompt, earlier, rank, shift, c, t, i)
    more = later - earlier - 1
    lemma(lengths_never_negative, pair, prompt, earlier + 1, more, rank, shift, c, t, i)
    index = placement.local_index(layout, prompt, earlier, shift)
    return index < placement.local_index(layout, prompt, later, shift)
