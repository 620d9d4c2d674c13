"""How tokens are split over ranks: the prompt's shards, and the owner of each decoded token.

A *logical rank* (`role` in the code) is a rank as the layout's rules name it, before the start
shift: logical rank i is rank (i + shift) mod cp_size.
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
class PromptShard:
    """The prompt shard of one rank, as rising chunk numbers.

    Only the prompt's last chunk may be cut short, and it is the last of whichever shard holds it.

    Parameters
    ----------
    chunks : range
        Numbers of the chunks, from the prompt's first one on.
    chunk_tokens : int
        Tokens of a chunk.
    prompt_len : int
        Tokens of the whole prompt.
    """

    chunks: range
    chunk_tokens: int
    prompt_len: int

    @property
    def tokens(self) -> int:
        """Return the number of tokens in the shard."""
        if not self.chunks:
            return 0
        end = (self.chunks[-1] + 1) * self.chunk_tokens
        return len(self.chunks) * self.chunk_tokens - max(0, end - self.prompt_len)

    def positions(self) -> NDArray[np.int64]:
        """Return the global positions of the shard's tokens, in local order.

        Returns
        -------
        ndarray, int64 [tokens]

        Examples
        --------
        >>> PromptShard(range(1, 4, 2), chunk_tokens=2, prompt_len=7).positions().tolist()
        [2, 3, 6]
        """
        first = np.arange(self.chunks.start, self.chunks.stop, self.chunks.step) * self.chunk_tokens
        return (first[:, None] + np.arange(self.chunk_tokens)).ravel()[: self.tokens]


def deal_prompt(layout: Layout, prompt_len: int, shift: int) -> list[PromptShard]:
    """Return the prompt shard of each rank.

    `contiguous` gives the logical ranks one after the other an equal share, rounded up, of what is
    left (TensorRT-LLM pull request 9757). The other splits give out chunk by chunk, round-robin
    (pull request 13180, and vLLM's interleave). Ranges keep shards small at any length.

    Parameters
    ----------
    layout : Layout
    prompt_len : int
        Tokens of the prompt.
    shift : int
        Rank that logical rank 0 is.

    Returns
    -------
    list of PromptShard
        One for each rank.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr9757/1:C=2,T=4")
    >>> [shard.positions().tolist() for shard in deal_prompt(layout, prompt_len=9, shift=0)]
    [[0, 1, 2, 3, 4, 5, 6, 7], [8]]
    """
    c = layout.cp_size
    chunk_tokens = layout.prompt_interleave or layout.tokens_per_block
    chunks = range(-(-prompt_len // chunk_tokens))
    if layout.prompt == "contiguous":
        roles = []
        for waiting in range(c, 0, -1):
            share = -(-len(chunks) // waiting)
            roles.append(chunks[:share])
            chunks = chunks[share:]
    else:
        roles = [chunks[role::c] for role in range(c)]
    return [PromptShard(roles[(rank - shift) % c], chunk_tokens, prompt_len) for rank in range(c)]


def goes_on(layout: Layout) -> bool:
    """Return whether decoding goes on as the prompt was dealt, so that its length does not matter.

    Parameters
    ----------
    layout : Layout
    """
    if layout.prompt == "contiguous" or layout.owner not in ("position", "interleave"):
        return False
    return (layout.prompt_interleave or layout.tokens_per_block) == owner_chunk(layout)


def tokens_before(
    layout: Layout,
    positions: NDArray[np.int64],
    prompt_lens: NDArray[np.int64],
    ranks: NDArray[np.int64] | int,
) -> NDArray[np.int64]:
    """Return how many of a request's tokens before a position are on a rank; arrays broadcast.

    Parameters
    ----------
    layout : Layout
    positions : ndarray, int64
        Global ones.
    prompt_lens : ndarray, int64
        Tokens of the request's prompt.
    ranks : ndarray, int64, or int
        Logical ranks.

    Returns
    -------
    ndarray, int64

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> layout = parse_layout("pr9757/1:C=2,T=4")
    >>> tokens_before(layout, np.array([9, 12, 14]), np.array(9), np.array([[0], [1]])).tolist()
    [[8, 11, 12], [1, 1, 2]]
    """
    c, t = layout.cp_size, layout.tokens_per_block
    prompt_chunk, chunk = layout.prompt_interleave or t, owner_chunk(layout)
    if goes_on(layout):
        return _taken(positions, chunk, ranks, c)
    of_prompt = np.minimum(positions, prompt_lens)
    decoded = positions - of_prompt
    if layout.prompt == "contiguous":
        share, more = np.divmod(-(-prompt_lens // t), c)
        first = ranks * share + np.minimum(ranks, more)
        held = _between(of_prompt - first * t, (share + (ranks < more)) * t)
    else:
        held = _taken(of_prompt, prompt_chunk, ranks, c)
    if layout.owner == "last_rank":
        held = held + decoded * (ranks == c - 1)
    elif layout.owner == "step":
        held = held + _taken(decoded, chunk, ranks, c)
    else:
        held = held + _taken(prompt_lens + decoded, chunk, ranks, c)
        held = held - _taken(prompt_lens, chunk, ranks, c)
    return held


def _taken(
    tokens: NDArray[np.int64], chunk: int, ranks: NDArray[np.int64] | int, cp_size: int
) -> NDArray[np.int64]:
    """Tokens that each rank has of these, when ranks take turns of `chunk` tokens."""
    rounds = tokens // (chunk * cp_size)
    rest = tokens - rounds * (chunk * cp_size)
    taken: NDArray[np.int64] = rounds * chunk + _between(rest - ranks * chunk, chunk)
    return taken


def _between(tokens: NDArray[np.int64], most: NDArray[np.int64] | int) -> NDArray[np.int64]:
    """Tokens from 0 to `most`; numpy's clip takes several times as long."""
    return np.minimum(np.maximum(tokens, 0), most)


def owner_chunk(layout: Layout) -> int:
    """Return the tokens that one rank takes in a row during decode.

    Parameters
    ----------
    layout : Layout

    Returns
    -------
    int
        FOREVER where the last rank takes all of them.
    """
    if layout.owner == "last_rank":
        return FOREVER
    return layout.owner_interleave or layout.tokens_per_block


def first_turn(layout: Layout, prompt_len: int, shift: int) -> tuple[int, int]:
    """Return the owner of the first decoded token, and how many it takes before the next rank does.

    `step` starts a new round after the prompt (pull request 9757); the position rules go on as if
    the owner rule had split the prompt too (pull request 17866).

    Parameters
    ----------
    layout : Layout
    prompt_len : int
        Tokens of the prompt.
    shift : int
        Rank that logical rank 0 is.

    Returns
    -------
    owner : int
        The rank.
    left : int
        Tokens until the next rank owns them.
    """
    c, chunk = layout.cp_size, owner_chunk(layout)
    if layout.owner == "last_rank":
        return (c - 1 + shift) % c, chunk
    turns, begun = divmod(0 if layout.owner == "step" else prompt_len, chunk)
    return (turns + shift) % c, chunk - begun
