"""Balance: how far the local lengths of two ranks can be apart, at worst (BAL-1 to BAL-3).

Each bound comes with a theorem that it is attained, for every C >= 2 and every T: it cannot be
made smaller. Where a bound on a sum is the sum of bounds, the parts are theorems of their own.
"""

from __future__ import annotations

from helix_spec import placement
from helix_spec.layouts import Layout
from helix_spec.theorems import mutations as m
from helix_spec.theorems.base import Natural, Size, assume, implies, lemma, theorem
from helix_spec.theorems.lengths import chunk_count_base
from helix_spec.theorems.shapes import DEALING, EVERY_OWNER, EVERY_PAIR, SPLITTING, Pair

_SIZES = {"c": 2, "t": 3}


# The parts.


@theorem(
    "spread-of-dealing",
    proves="BAL-1",
    witness={"length": 7, "ahead": 0, "behind": 1, "c": 2, "i": 3},
    kills=[m.no_clamp_from_above, m.no_clamp_from_below],
)
def spread_of_dealing(length: Natural, ahead: Natural, behind: Natural, c: Size, i: Size) -> bool:
    """Dealing chunks of I in turn, no rank is ever more than I tokens ahead of another."""
    assume(ahead < c, behind < c)
    more = placement.chunk_local_len(length, ahead, c, i)
    return more - placement.chunk_local_len(length, behind, c, i) <= i


@theorem(
    "spread-of-a-window",
    proves="BAL-2",
    witness={"start": 4, "end": 11, "ahead": 0, "behind": 1, "c": 2, "i": 3},
    kills=[m.no_clamp_from_above],
)
def spread_of_a_window(
    start: Natural, end: Natural, ahead: Natural, behind: Natural, c: Size, i: Size
) -> bool:
    """Of any tokens dealt in a row, wherever the row starts, no rank gets more than I more than
    another.
    """
    assume(start <= end, ahead < c, behind < c)
    return _window(start, end, ahead, c, i) - _window(start, end, behind, c, i) <= i


@spread_of_a_window.wrong()
def window_below_a_chunk(
    start: Natural, end: Natural, ahead: Natural, behind: Natural, c: Size, i: Size
) -> bool:
    """Less than I."""
    assume(start <= end, ahead < c, behind < c)
    return _window(start, end, ahead, c, i) - _window(start, end, behind, c, i) < i


def _window(start: int, end: int, rank: int, c: int, i: int) -> int:
    before = placement.chunk_local_len(start, rank, c, i)
    return placement.chunk_local_len(end, rank, c, i) - before


@theorem(
    "spread-of-a-contiguous-prompt",
    proves="BAL-1",
    witness={"prompt": 7, "ahead": 0, "behind": 1, **_SIZES},
    kills=[m.prompt_in_equal_shares, m.padding_stripped_from_the_last_rank],
)
def spread_of_a_contiguous_prompt(
    prompt: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """In a contiguous split no rank holds more than 2T-1 prompt tokens more than another."""
    assume(ahead < c, behind < c)
    return _contiguous_part(prompt, ahead, c, t) - _contiguous_part(prompt, behind, c, t) < 2 * t


def _contiguous_part(prompt: int, rank: int, c: int, t: int) -> int:
    start = placement.contiguous_start(prompt, rank, c, t)
    return placement.contiguous_start(prompt, rank + 1, c, t) - start


@theorem(
    "contiguous-near-dealing",
    proves="BAL-1",
    witness={"prompt": 7, "rank": 1, **_SIZES},
    kills=[m.prompt_in_equal_shares, m.no_clamp_from_above, m.no_rank_takes_one_more],
)
def contiguous_near_dealing(prompt: Size, rank: Natural, c: Size, t: Size) -> bool:
    """A rank's part of a contiguous split is within T-1 tokens of what dealing the same blocks in
    turn would give it: both give a rank equally many blocks, and at most one block is not full.
    """
    assume(rank < c)
    apart = _contiguous_part(prompt, rank, c, t) - placement.chunk_local_len(prompt, rank, c, t)
    return (apart < t) & (-apart < t)


@contiguous_near_dealing.wrong()
def contiguous_is_dealing(prompt: Size, rank: Natural, c: Size, t: Size) -> bool:
    """Both are the same."""
    assume(rank < c)
    part = _contiguous_part(prompt, rank, c, t)
    return part == placement.chunk_local_len(prompt, rank, c, t)


# BAL-1: the bounds of the layouts, and that they are attained.


def _spread(pair: Pair, prompt: int, total: int, ahead: int, behind: int, c: int, t: int) -> int:
    """How many more tokens of the request one rank holds than another."""
    return _spread_of(pair.layout(c, t), prompt, total, ahead, behind)


def _spread_of(layout: Layout, prompt: int, total: int, ahead: int, behind: int) -> int:
    more = placement.local_len(layout, prompt, total - prompt, ahead)
    return more - placement.local_len(layout, prompt, total - prompt, behind)


_BALANCED = Pair("round_robin", "position")
_RESTARTING = Pair("round_robin", "step")
_DEFAULT = Pair("contiguous", "step")
_CONTINUED = Pair("contiguous", "position")
_INTERLEAVED = Pair("interleave", "interleave")
_WITNESS = {"prompt": 4, "total": 6, "ahead": 0, "behind": 1, **_SIZES}


@theorem(
    "bound-round-robin-position",
    proves="BAL-1",
    witness=_WITNESS,
    kills=[m.no_clamp_from_above, m.step_where_position_is_meant],
    free=DEALING,
)
def bound_round_robin_position(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """round_robin + position: no rank is more than T tokens ahead of another."""
    assume(prompt <= total, ahead < c, behind < c)
    lemma(spread_of_dealing, total, ahead, behind, c, t)
    return _spread(_BALANCED, prompt, total, ahead, behind, c, t) <= t


@theorem(
    "bound-round-robin-position-attained",
    proves="BAL-1",
    witness=_SIZES,
)
def bound_round_robin_position_attained(c: Size, t: Size) -> bool:
    """... and T is attained: L = T, before any step."""
    assume(c >= 2)
    return _spread(_BALANCED, t, t, 0, 1, c, t) == t


@theorem(
    "bound-round-robin-step",
    proves="BAL-1",
    witness=_WITNESS,
    kills=[m.no_clamp_from_above],
    free=DEALING,
)
def bound_round_robin_step(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """round_robin + step: no rank is more than 2T tokens ahead of another."""
    assume(prompt <= total, ahead < c, behind < c)
    lemma(spread_of_dealing, prompt, ahead, behind, c, t)
    lemma(spread_of_dealing, total - prompt, ahead, behind, c, t)
    lemma(chunk_count_base, ahead, c, t)
    lemma(chunk_count_base, behind, c, t)
    return _spread(_RESTARTING, prompt, total, ahead, behind, c, t) <= 2 * t


@bound_round_robin_step.wrong()
def t_is_enough(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """T is enough."""
    assume(prompt <= total, ahead < c, behind < c)
    return _spread(_RESTARTING, prompt, total, ahead, behind, c, t) <= t


@theorem(
    "bound-round-robin-step-attained",
    proves="BAL-1",
    witness=_SIZES,
)
def bound_round_robin_step_attained(c: Size, t: Size) -> bool:
    """... and 2T is attained: L = T, after T steps."""
    assume(c >= 2)
    return _spread(_RESTARTING, t, 2 * t, 0, 1, c, t) == 2 * t


@theorem(
    "bound-contiguous-step",
    proves="BAL-1",
    witness=_WITNESS,
    kills=[m.no_clamp_from_above, m.prompt_in_equal_shares],
    free=[*DEALING, *SPLITTING],
)
def bound_contiguous_step(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """Contiguous + step: no rank is more than 3T-1 tokens ahead of another."""
    assume(prompt <= total, ahead < c, behind < c)
    lemma(spread_of_a_contiguous_prompt, prompt, ahead, behind, c, t)
    lemma(spread_of_dealing, total - prompt, ahead, behind, c, t)
    lemma(chunk_count_base, ahead, c, t)
    lemma(chunk_count_base, behind, c, t)
    return _spread(_DEFAULT, prompt, total, ahead, behind, c, t) <= 3 * t - 1


@bound_contiguous_step.wrong()
def three_blocks_less_two_is_enough(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """3T-2 is enough."""
    assume(prompt <= total, ahead < c, behind < c)
    return _spread(_DEFAULT, prompt, total, ahead, behind, c, t) <= 3 * t - 2


@theorem(
    "bound-contiguous-step-attained",
    proves="BAL-1",
    witness=_SIZES,
)
def bound_contiguous_step_attained(c: Size, t: Size) -> bool:
    """... and 3T-1 is attained: L = C*T + 1, after T steps, rank 0 against rank C-1."""
    assume(c >= 2)
    prompt = c * t + 1
    return _spread(_DEFAULT, prompt, prompt + t, 0, c - 1, c, t) == 3 * t - 1


@theorem(
    "bound-contiguous-position",
    proves="BAL-1",
    witness=_WITNESS,
    kills=[m.no_clamp_from_above, m.prompt_in_equal_shares],
    free=[*DEALING, *SPLITTING],
)
def bound_contiguous_position(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """Contiguous + position: no rank is more than 3T-2 tokens ahead of another: the whole would be
    T as dealt in turn, and each of the two prompt parts is T-1 off at most.
    """
    assume(prompt <= total, ahead < c, behind < c)
    lemma(contiguous_near_dealing, prompt, ahead, c, t)
    lemma(contiguous_near_dealing, prompt, behind, c, t)
    lemma(spread_of_dealing, total, ahead, behind, c, t)
    return _spread(_CONTINUED, prompt, total, ahead, behind, c, t) <= 3 * t - 2


@bound_contiguous_position.wrong()
def two_blocks_are_enough(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size
) -> bool:
    """2T is enough."""
    assume(prompt <= total, ahead < c, behind < c)
    return _spread(_CONTINUED, prompt, total, ahead, behind, c, t) <= 2 * t


@theorem(
    "bound-contiguous-position-attained",
    proves="BAL-1",
    witness=_SIZES,
)
def bound_contiguous_position_attained(c: Size, t: Size) -> bool:
    """... and 3T-2 is attained: L = C*T + 1, after T-1 steps, rank 0 against rank C-1."""
    assume(c >= 2)
    prompt = c * t + 1
    return _spread(_CONTINUED, prompt, prompt + t - 1, 0, c - 1, c, t) == 3 * t - 2


@theorem(
    "bound-interleave",
    proves="BAL-1",
    witness={**_WITNESS, "i": 1},
    kills=[m.no_clamp_from_above],
    free=DEALING,
)
def bound_interleave(
    prompt: Size, total: Size, ahead: Natural, behind: Natural, c: Size, t: Size, i: Size
) -> bool:
    """interleave(I) + interleave(I): no rank is more than I tokens ahead of another."""
    assume(prompt <= total, ahead < c, behind < c)
    lemma(spread_of_dealing, total, ahead, behind, c, i)
    layout = _INTERLEAVED.layout(c, t, i, i)
    return _spread_of(layout, prompt, total, ahead, behind) <= i


@theorem(
    "bound-interleave-attained",
    proves="BAL-1",
    witness={**_SIZES, "i": 3},
)
def bound_interleave_attained(c: Size, t: Size, i: Size) -> bool:
    """... and I is attained: L = I, before any step."""
    assume(c >= 2)
    return _spread_of(_INTERLEAVED.layout(c, t, i, i), i, i, 0, 1) == i


@bound_round_robin_position_attained.wrong()
def single_rank_position(c: Size, t: Size) -> bool:
    """A single rank is ahead of itself."""
    return _spread(_BALANCED, t, t, 0, c - 1, c, t) == t


@bound_round_robin_step_attained.wrong()
def one_step_short(c: Size, t: Size) -> bool:
    """One step fewer attains it too."""
    assume(c >= 2)
    return _spread(_RESTARTING, t, 2 * t - 1, 0, 1, c, t) == 2 * t


@bound_contiguous_step_attained.wrong()
def full_blocks_step(c: Size, t: Size) -> bool:
    """A prompt of C full blocks attains 3T-1."""
    assume(c >= 2)
    return _spread(_DEFAULT, c * t, c * t + t, 0, c - 1, c, t) == 3 * t - 1


@bound_contiguous_position_attained.wrong()
def full_blocks_position(c: Size, t: Size) -> bool:
    """A prompt of C full blocks attains 3T-2."""
    assume(c >= 2)
    return _spread(_CONTINUED, c * t, c * t + t - 1, 0, c - 1, c, t) == 3 * t - 2


@bound_interleave_attained.wrong()
def less_than_a_chunk(c: Size, t: Size, i: Size) -> bool:
    """Less than a chunk attains it."""
    assume(c >= 2, i >= 2)
    return _spread_of(_INTERLEAVED.layout(c, t, i, i), i - 1, i - 1, 0, 1) == i


# BAL-2 and BAL-3.


@theorem(
    "spread-of-decode",
    proves="BAL-2",
    witness={**_WITNESS, "i": 1},
    kills=[m.no_clamp_from_above],
    cases=EVERY_OWNER,
    free=DEALING,
)
def spread_of_decode(
    pair: Pair,
    prompt: Size,
    total: Size,
    ahead: Natural,
    behind: Natural,
    c: Size,
    t: Size,
    i: Size,
) -> bool:
    """The decoded tokens alone never spread by more than the chunk of the owner rule (T for step
    and position, I for interleave); under last_rank, C >= 2, they spread by n: rank C-1 has all n,
    the others none.
    """
    assume(prompt <= total, ahead < c, behind < c)
    layout, steps = pair.layout(c, t, owner_interleave=i), total - prompt
    more = placement.decode_local_len(layout, prompt, steps, ahead)
    spread = more - placement.decode_local_len(layout, prompt, steps, behind)
    if pair.owner == "last_rank":
        apart = (ahead == c - 1) & (behind != c - 1)
        return (spread <= steps) & implies(apart, spread == steps)
    chunk = pair.chunk(t, i)
    start = pair.counted(prompt)
    lemma(spread_of_a_window, start, start + steps, ahead, behind, c, chunk)
    return spread <= chunk


@theorem(
    "rotation-moves-on",
    proves="BAL-3",
    witness={"admission": 5, "prompt": 4, "total": 6, "rank": 1, "c": 2, "t": 3, "i": 1, "j": 3},
    kills=[m.shift_forgotten, m.shift_in_the_wrong_direction],
    cases=EVERY_PAIR,
    free=[*DEALING, *SPLITTING],
)
def rotation_moves_on(
    pair: Pair,
    admission: Natural,
    prompt: Size,
    total: Size,
    rank: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """Under rotated starts, the next admission gives the next rank what this one gives a rank, for
    requests of equal lengths.
    """
    assume(prompt <= total, rank < c)
    layout, steps = pair.layout(c, t, i, j), total - prompt
    here = placement.local_len(layout, prompt, steps, rank, admission % c)
    following = placement.local_len(layout, prompt, steps, (rank + 1) % c, (admission + 1) % c)
    return here == following


@theorem(
    "rotation-comes-round",
    proves="BAL-3",
    witness={"admission": 5, "k": 3, "c": 2},
)
def rotation_comes_round(admission: Natural, k: Natural, c: Size) -> bool:
    """After k*C admissions the start shift is the same again. With rotation-moves-on: over k*C
    admissions in a row, what rank r+1 gets is what rank r gets, moved on by one admission, so the
    two totals differ by the first admission's part less that of admission k*C, which are equal.
    That a sum moved on by one differs by its ends is said here, not machine-checked.
    """
    return (admission + k * c) % c == admission % c


@rotation_comes_round.wrong()
def after_any_number(admission: Natural, k: Natural, c: Size) -> bool:
    """After any number of admissions."""
    return (admission + k) % c == admission % c
