"""Which rank gets which token, by dealing pieces of the prompt (SPEC.md section 3).

Ranks here are the rule's; `rotated` layouts turn the result by the request's shift.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from helix_reference.tokens import Positions
from helix_spec.layouts import Layout


def deal_prompt(layout: Layout, prompt_len: int, shift: int) -> list[Positions]:
    """Return the prompt's positions on each cp_rank, in local order (SPEC.md section 3.1).

    Parameters
    ----------
    layout
        The layout; its prompt split is `contiguous`, `round_robin` or `interleave(I)`.
    prompt_len
        Tokens of the prompt.
    shift
        The request's shift, from 0 to C - 1 (SPEC.md section 3.5): logical rank x is cp_rank
        (x + shift) mod C.

    Returns
    -------
    list of Positions
        For each of the C cp_ranks, rising global positions from 0 to prompt_len - 1. Each position
        is on one rank.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> deal_prompt(parse_layout("pr9757/1:C=2,T=2"), prompt_len=7, shift=0)  # contiguous
    [[0, 1, 2, 3], [4, 5, 6]]
    >>> deal_prompt(parse_layout("pr13180/1:C=2,T=2"), prompt_len=7, shift=0)  # round_robin
    [[0, 1, 4, 5], [2, 3, 6]]
    >>> deal_prompt(parse_layout("balanced/1:C=2,T=2"), prompt_len=7, shift=1)
    [[2, 3, 6], [0, 1, 4, 5]]
    """
    positions = range(prompt_len)
    if layout.prompt == "contiguous":
        hands = _consecutive(_chunks(positions, layout.tokens_per_block), layout.cp_size)
    elif layout.prompt == "round_robin":
        hands = _in_turn(_chunks(positions, layout.tokens_per_block), layout.cp_size)
    else:
        assert layout.prompt_interleave is not None
        hands = _in_turn(_chunks(positions, layout.prompt_interleave), layout.cp_size)
    return [Positions(hands[(rank - shift) % layout.cp_size]) for rank in range(layout.cp_size)]


def decode_owner(layout: Layout, prompt_len: int, step: int, shift: int) -> int:
    """Return the cp_rank that owns the token of a decode step (SPEC.md section 3.2).

    Parameters
    ----------
    layout
        The layout; its decode owner is `last_rank`, `step`, `position` or `interleave(I)`.
    prompt_len
        Tokens of the prompt, or of a resumed request when it was resumed.
    step
        Tokens decoded before this one, from 0.
    shift
        The request's shift, from 0 to C - 1 (SPEC.md section 3.5).

    Returns
    -------
    int
        A cp_rank, from 0 to C - 1.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> by_step, by_position = parse_layout("pr9757/1:C=2,T=2"), parse_layout("pr17866/1:C=2,T=2")
    >>> [decode_owner(by_step, 7, step, 0) for step in range(6)]
    [0, 0, 1, 1, 0, 0]
    >>> [decode_owner(by_position, 7, step, 0) for step in range(6)]
    [1, 0, 0, 1, 1, 0]
    """
    c, t = layout.cp_size, layout.tokens_per_block
    if layout.owner == "last_rank":
        rank = c - 1
    elif layout.owner == "step":
        rank = (step // t) % c
    elif layout.owner == "position":
        rank = ((prompt_len + step) // t) % c
    else:
        assert layout.owner_interleave is not None
        rank = ((prompt_len + step) // layout.owner_interleave) % c
    return (rank + shift) % c


def _chunks(positions: range, size: int) -> list[range]:
    """The positions cut into pieces of `size`; the last may be shorter."""
    return [positions[first : first + size] for first in range(0, len(positions), size)]


def _consecutive(blocks: Sequence[range], ranks: int) -> list[Iterable[range]]:
    """Neighbouring blocks stay together; the first ranks take one more where it does not divide."""
    share, larger = divmod(len(blocks), ranks)
    hands, first = list[Iterable[range]](), 0
    for rank in range(ranks):
        count = share + (1 if rank < larger else 0)
        hands.append(blocks[first : first + count])
        first += count
    return hands


def _in_turn(chunks: Sequence[range], ranks: int) -> list[Iterable[range]]:
    """One chunk for each rank in turn."""
    return [chunks[rank::ranks] for rank in range(ranks)]
