"""Dealing tokens to ranks: the prompt's chunks, and whose turn it is once they are dealt.

A *role* is a rank as the layout's rules name it, before the start shift: role i is played by
rank (i + shift) mod cp_size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from helix_spec.layouts import Layout

FOREVER: Final = 2**62
"""More tokens than any request may have: a turn that never ends."""


@dataclass(frozen=True, slots=True)
class Hand:
    """The prompt tokens dealt to one rank, as rising chunk numbers of `chunk_tokens` each.

    Only the prompt's last chunk may be cut short, and it is the last of whichever hand holds it.
    """

    chunks: range
    chunk_tokens: int
    prompt_len: int

    @property
    def tokens(self) -> int:
        """Number of tokens in the hand."""
        if not self.chunks:
            return 0
        end = (self.chunks[-1] + 1) * self.chunk_tokens
        return len(self.chunks) * self.chunk_tokens - max(0, end - self.prompt_len)

    def positions(self) -> NDArray[np.int64]:
        """Global positions of the tokens, in local order: int64 [tokens]."""
        first = np.arange(self.chunks.start, self.chunks.stop, self.chunks.step) * self.chunk_tokens
        return (first[:, None] + np.arange(self.chunk_tokens)).ravel()[: self.tokens]


def deal_prompt(layout: Layout, prompt_len: int, shift: int) -> list[Hand]:
    """Deal a prompt of `prompt_len` tokens; the hands by rank.

    `contiguous` serves the roles one after the other, each an equal share, rounded up, of what
    is left (TensorRT-LLM pull request 9757); the other splits deal chunk by chunk around the
    table (pull request 13180, and vLLM's interleave). Ranges keep hands small at any length.
    """
    c = layout.cp_size
    chunk_tokens = layout.prompt_interleave or layout.tokens_per_block
    deck = range(-(-prompt_len // chunk_tokens))
    if layout.prompt == "contiguous":
        roles = []
        for waiting in range(c, 0, -1):
            share = -(-len(deck) // waiting)
            roles.append(deck[:share])
            deck = deck[share:]
    else:
        roles = [deck[role::c] for role in range(c)]
    return [Hand(roles[(rank - shift) % c], chunk_tokens, prompt_len) for rank in range(c)]


def owner_chunk(layout: Layout) -> int:
    """Tokens that one rank takes in a row during decode."""
    if layout.owner == "last_rank":
        return FOREVER
    return layout.owner_interleave or layout.tokens_per_block


def first_turn(layout: Layout, prompt_len: int, shift: int) -> tuple[int, int]:
    """The rank that owns the first decoded token, and how many it takes before the turn passes.

    `step` starts a new round after the prompt (pull request 9757); the position rules go on as
    if the owner rule had dealt the prompt too (pull request 17866).
    """
    c, chunk = layout.cp_size, owner_chunk(layout)
    if layout.owner == "last_rank":
        return (c - 1 + shift) % c, chunk
    turns, begun = divmod(0 if layout.owner == "step" else prompt_len, chunk)
    return (turns + shift) % c, chunk - begun
