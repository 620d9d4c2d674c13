"""Moving a prompt's KV between ranks that split it differently: N ranks to M, or from a single one.

Both sides deal the prompt by the same rules (`dealing.deal_prompt`), each with its own layout, so
that a plan needs nothing but the two layouts and the prompt's length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from helix_gpu.bookkeeping.dealing import PromptShard


@dataclass(frozen=True, slots=True)
class Move:
    """Consecutive tokens of a prompt, in local order on both sides."""

    source: int
    """Rank that has them, and `source_index` the local index of the first one there."""
    target: int
    """Rank that gets them, and `target_index` the local index of the first one there."""
    position: int
    """Global position of the first one."""
    tokens: int
    source_index: int
    target_index: int


def transfer(source: Sequence[PromptShard], target: Sequence[PromptShard]) -> list[Move]:
    """Return the moves that turn one split of a prompt into another, by rising position.

    A target rank finds its tokens in local order.

    Parameters
    ----------
    source, target : sequence of PromptShard
        Prompt shard of each rank on either side, of the same prompt; see `dealing.deal_prompt`.

    Returns
    -------
    list of Move

    Raises
    ------
    ValueError
        For two prompt lengths.

    Examples
    --------
    >>> one = [PromptShard(range(2), chunk_tokens=2, prompt_len=4)]
    >>> two = [PromptShard(range(1), 2, 4), PromptShard(range(1, 2), 2, 4)]
    >>> [(move.target, move.position, move.tokens) for move in transfer(one, two)]
    [(0, 0, 2), (1, 2, 2)]
    """
    if source[0].prompt_len != target[0].prompt_len:
        raise ValueError(
            f"The source deals {source[0].prompt_len} tokens and the target "
            f"{target[0].prompt_len}; they must deal the same prompt."
        )
    moves = list[Move]()
    giving, taking = _pieces(source), _pieces(target)
    while giving:
        position, source_rank, source_index, given = giving[-1]
        _, target_rank, target_index, taken = taking[-1]
        tokens = min(given, taken)
        moves.append(Move(source_rank, target_rank, position, tokens, source_index, target_index))
        for pieces in (giving, taking):
            start, rank, index, left = pieces.pop()
            if left > tokens:
                pieces.append((start + tokens, rank, index + tokens, left - tokens))
    return moves


def _pieces(shards: Sequence[PromptShard]) -> list[tuple[int, int, int, int]]:
    """The chunks of all shards: position, rank, local index, tokens; by falling position."""
    pieces = [
        (
            chunk * shard.chunk_tokens,
            rank,
            place * shard.chunk_tokens,
            min(shard.chunk_tokens, shard.prompt_len - chunk * shard.chunk_tokens),
        )
        for rank, shard in enumerate(shards)
        for place, chunk in enumerate(shard.chunks)
    ]
    return sorted(pieces, reverse=True)
