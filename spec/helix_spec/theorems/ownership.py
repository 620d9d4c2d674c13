"""Owners: every token has exactly one, and every rank works out the same one (OWN-1 to OWN-3)."""

from __future__ import annotations

from helix_spec import placement
from helix_spec.theorems import mutations as m
from helix_spec.theorems.base import Natural, Size, assume, implies, lemma, theorem
from helix_spec.theorems.shapes import DEALING, EVERY_OWNER, EVERY_PAIR, SPLITTING, Pair


@theorem(
    "owner-in-range",
    proves="OWN-2",
    witness={"position": 5, "c": 3, "i": 2},
    about=["placement.chunk_owner"],
    kills=[m.owner_without_wrapping],
)
def owner_in_range(position: Natural, c: Size, i: Size) -> bool:
    """Dealing chunks in turn gives every position a rank from 0 to C-1."""
    owner = placement.chunk_owner(position, c, i)
    return (owner >= 0) & (owner < c)


@theorem(
    "owner-keeps-a-chunk",
    proves="OWN-2",
    witness={"position": 5, "c": 3, "i": 2},
    kills=[m.owner_by_token, m.owner_of_the_next_token, m.owner_by_chunks_of_all_ranks],
)
def owner_keeps_a_chunk(position: Natural, c: Size, i: Size) -> bool:
    """The owner changes only where a chunk ends, and then to the next rank."""
    here = placement.chunk_owner(position, c, i)
    following = placement.chunk_owner(position + 1, c, i)
    if (position + 1) % i == 0:
        return following == (here + 1) % c
    return following == here


@theorem(
    "owner-starts-at-zero",
    proves="OWN-2",
    witness={"c": 3, "i": 2},
    about=["placement.chunk_owner"],
    kills=[m.owner_one_rank_on],
)
def owner_starts_at_zero(c: Size, i: Size) -> bool:
    """Rank 0 owns the first token; so owner-keeps-a-chunk fixes all owners."""
    return placement.chunk_owner(0, c, i) == 0


@theorem(
    "owner-of-a-contiguous-split",
    proves="OWN-1",
    witness={"position": 5, "length": 13, "c": 4, "t": 2},
    about=["placement.contiguous_owner"],
    kills=[m.contiguous_owner_by_equal_shares, m.larger_shares_last, m.prompt_in_equal_shares],
)
def owner_of_a_contiguous_split(position: Natural, length: Size, c: Size, t: Size) -> bool:
    """A prompt position lies between the first position of its rank and that of the next rank, and
    its rank is from 0 to C-1.
    """
    assume(position < length)
    rank = placement.contiguous_owner(position, length, c, t)
    start = placement.contiguous_start(length, rank, c, t)
    end = placement.contiguous_start(length, rank + 1, c, t)
    return (rank >= 0) & (rank < c) & (start <= position) & (position < end)


@theorem(
    "contiguous-split-tiles",
    proves="OWN-1",
    witness={"length": 13, "rank": 1, "c": 4, "t": 2},
    about=["placement.contiguous_start", "placement.contiguous_blocks_before"],
    kills=[m.padding_stripped_from_the_last_rank, m.no_rank_takes_one_more],
)
def contiguous_split_tiles(length: Natural, rank: Natural, c: Size, t: Size) -> bool:
    """The first positions of the ranks rise from 0 to the prompt length: with
    owner-of-a-contiguous-split, every prompt position is on exactly one rank.
    """
    assume(rank < c)
    start = placement.contiguous_start(length, rank, c, t)
    end = placement.contiguous_start(length, rank + 1, c, t)
    return (start <= end) & implies(rank == 0, start == 0) & implies(rank + 1 == c, end == length)


@theorem(
    "contiguous-starts-rise",
    proves="OWN-1",
    witness={"length": 13, "rank": 1, "later": 3, "c": 4, "t": 2},
)
def contiguous_starts_rise(length: Size, rank: Natural, later: Natural, c: Size, t: Size) -> bool:
    """The first positions rise with the rank, over any distance."""
    assume(rank <= later, later <= c)
    start = placement.contiguous_start(length, rank, c, t)
    return start <= placement.contiguous_start(length, later, c, t)


@contiguous_starts_rise.wrong()
def every_rank_has_a_token(length: Size, rank: Natural, later: Natural, c: Size, t: Size) -> bool:
    """Strictly: every rank has a prompt token."""
    assume(rank < later, later <= c)
    start = placement.contiguous_start(length, rank, c, t)
    return start < placement.contiguous_start(length, later, c, t)


@theorem(
    "contiguous-ends",
    proves="OWN-1",
    witness={"length": 13, "rank": 4, "c": 4, "t": 2},
    about=["placement.contiguous_start"],
)
def contiguous_ends(length: Size, rank: Natural, c: Size, t: Size) -> bool:
    """No rank of a contiguous split starts beyond the prompt."""
    assume(rank <= c)
    start = placement.contiguous_start(length, rank, c, t)
    return (start >= 0) & (start <= length)


@theorem(
    "contiguous-shares",
    proves="OWN-1",
    witness={"length": 13, "rank": 2, "c": 4, "t": 2},
    kills=[m.no_rank_takes_one_more, m.rounded_up_always, m.negated_division_truncated],
)
def contiguous_shares(length: Size, rank: Natural, c: Size, t: Size) -> bool:
    """In a contiguous split the first B mod C ranks start after full shares of ceil(B/C) blocks
    each, the others after floor(B/C) more each; B = ceil(L/T).
    """
    assume(rank < c)
    blocks = placement.ceil_div(length, t)
    share = placement.contiguous_blocks_before(
        blocks, rank + 1, c
    ) - placement.contiguous_blocks_before(blocks, rank, c)
    expected = placement.ceil_div(blocks, c) if rank < blocks % c else blocks // c
    return (share == expected) & (length <= blocks * t) & (length > (blocks - 1) * t)


@theorem(
    "shift-is-a-permutation",
    proves="OWN-1 OWN-2",
    witness={"rank": 0, "shift": 2, "c": 3},
)
def shift_is_a_permutation(rank: Natural, shift: Natural, c: Size) -> bool:
    """Under a start shift s, rank r has the logical rank (r - s) mod C, and logical rank x is that
    of rank (x + s) mod C: each undoes the other, so every logical rank has exactly one rank.
    """
    assume(rank < c, shift < c)
    logical = (rank - shift) % c
    return (
        (logical >= 0)
        & (logical < c)
        & ((logical + shift) % c == rank)
        & (((rank + shift) % c - shift) % c == rank)
    )


@shift_is_a_permutation.wrong()
def no_mod(rank: Natural, shift: Natural, c: Size) -> bool:
    """The logical rank is rank - shift without mod C."""
    assume(rank < c, shift < c)
    return rank - shift >= 0


@theorem(
    "exactly-one-active-rank",
    proves="OWN-2 OWN-3",
    witness={"prompt": 3, "step": 4, "shift": 1, "c": 2, "t": 2, "i": 1},
    about=["placement.decode_owner"],
    kills=[m.shift_of_the_owner_forgotten],
    cases=EVERY_OWNER,
    free=DEALING,
)
def exactly_one_active_rank(
    pair: Pair, prompt: Size, step: Natural, shift: Natural, c: Size, t: Size, i: Size
) -> bool:
    """Every rank derives the owner of a step from prompt length, step and shift alone. It is a rank
    from 0 to C-1, and the shift moves it: so exactly one rank is active.
    """
    assume(shift < c)
    layout = pair.layout(c, t, owner_interleave=i)
    if pair.owner != "last_rank":
        lemma(owner_in_range, pair.counted(prompt) + step, c, pair.chunk(t, i))
    active = placement.decode_owner(layout, prompt, step, shift)
    unshifted = placement.decode_owner(layout, prompt, step)
    return (active >= 0) & (active < c) & (active == (unshifted + shift) % c)


@theorem(
    "decode-owner-is-its-rule",
    proves="OWN-2 OWN-3",
    witness={"prompt": 3, "step": 4, "c": 2, "t": 2, "i": 1},
    about=["placement.decode_owner"],
    kills=[
        m.always_the_last_rank,
        m.step_where_position_is_meant,
        m.position_where_step_is_meant,
    ],
    cases=EVERY_OWNER,
)
def decode_owner_is_its_rule(
    pair: Pair, prompt: Size, step: Natural, c: Size, t: Size, i: Size
) -> bool:
    """The owner of step n is C-1 (last_rank), (n // T) mod C (step), (L+n) // T mod C (position) or
    (L+n) // I mod C (interleave).
    """
    owner = placement.decode_owner(pair.layout(c, t, owner_interleave=i), prompt, step)
    if pair.owner == "last_rank":
        return owner == c - 1
    if pair.owner == "step":
        return owner == step // t % c
    return owner == (prompt + step) // (t if pair.owner == "position" else i) % c


@theorem(
    "every-position-has-an-owner",
    proves="OWN-1",
    witness={"prompt": 13, "position": 5, "shift": 1, "c": 4, "t": 2, "i": 1, "j": 2},
    about=["placement.owner"],
    kills=[m.shift_of_the_owner_forgotten],
    cases=EVERY_PAIR,
    free=[*DEALING, *SPLITTING],
)
def every_position_has_an_owner(
    pair: Pair,
    prompt: Size,
    position: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """In every layout, every position of the prompt or decoded has an owner from 0 to C-1, and one
    that the start shift moves along.
    """
    assume(shift < c)
    layout = pair.layout(c, t, i, j)
    if position >= prompt:
        if pair.owner != "last_rank":
            lemma(owner_in_range, pair.counted(prompt) + position - prompt, c, pair.chunk(t, j))
    elif pair.prompt == "contiguous":
        lemma(owner_of_a_contiguous_split, position, prompt, c, t)
    else:
        lemma(owner_in_range, position, c, pair.prompt_chunk(t, i))
    owner = placement.owner(layout, prompt, position, shift)
    unshifted = placement.owner(layout, prompt, position)
    return (owner >= 0) & (owner < c) & (owner == (unshifted + shift) % c)


@theorem(
    "step-and-position-agree",
    proves="EQ-1",
    witness={"rounds": 3, "step": 5, "c": 2, "t": 2},
)
def step_and_position_agree(rounds: Natural, step: Natural, c: Size, t: Size) -> bool:
    """Where L is a multiple of T*C, the step rule and the position rule own every step alike."""
    return _by_step(rounds * t * c, step, c, t) == _by_position(rounds * t * c, step, c, t)


@step_and_position_agree.wrong()
def agree_on_whole_blocks(blocks: Natural, step: Natural, c: Size, t: Size) -> bool:
    """Whole blocks are enough."""
    return _by_step(blocks * t, step, c, t) == _by_position(blocks * t, step, c, t)


@theorem(
    "step-and-position-differ",
    proves="EQ-1",
    witness={"prompt": 7, "c": 2, "t": 2},
)
def step_and_position_differ(prompt: Size, c: Size, t: Size) -> bool:
    """Where C >= 2 and L is no multiple of T*C, they differ at some step: at step 0 when the
    prompt's last block is not on rank C-1 or is full, else where that block is full.
    """
    blocks, rest = divmod(prompt, t)
    assume(c >= 2, (blocks % c != 0) | (rest != 0))
    step = t - rest if blocks % c == 0 else 0
    return _by_step(prompt, step, c, t) != _by_position(prompt, step, c, t)


@step_and_position_differ.wrong()
def differ_at_once(prompt: Size, c: Size, t: Size) -> bool:
    """They differ at step 0 already."""
    assume(c >= 2, prompt % (t * c) != 0)
    return _by_step(prompt, 0, c, t) != _by_position(prompt, 0, c, t)


def _by_step(prompt: int, step: int, c: int, t: int) -> int:
    return placement.decode_owner(Pair("round_robin", "step").layout(c, t), prompt, step)


def _by_position(prompt: int, step: int, c: int, t: int) -> int:
    return placement.decode_owner(Pair("round_robin", "position").layout(c, t), prompt, step)
