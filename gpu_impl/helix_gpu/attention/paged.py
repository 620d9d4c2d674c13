"""Attention of new tokens over this rank's pages, on the CPU."""

from __future__ import annotations

from math import prod
from typing import Final

import torch
from torch import Tensor

from helix_gpu.attention.merge import merge

TOKENS_AT_ONCE: Final = 512
"""Slots of each token gathered at a time. It bounds the scratch memory, and does not depend
on the batch, so that dummy requests leave the order of summation alone."""
BYTES_AT_ONCE: Final = 2**23
"""Keys and values gathered at a time, for as many tokens as they suffice for: they should still be
in the caches when they are used, and memory of this size is not fetched anew for each call."""

VECTOR: Final = 16
"""Torch's operation takes so many scores at a time; of the odd ones at the end it is less exact,
so there must be none (2.13, AVX-512: 6 units of roundoff in the output)."""


def attend_pages(
    q: Tensor,
    pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    scale: float | None = None,
    value_dim: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the partial attention of each new token over the slots of its request on this rank.

    Everything is float32 whatever the type. All tensors are on the CPU.

    Parameters
    ----------
    q : Tensor, any float type [n, q_heads, key_dim]
    pages : Tensor, any float type [pages, parts, tokens_per_block, kv_heads, key_dim]
        K is the first part. The values are the first `value_dim` elements of the last part, which
        with a latent cache is the same.
    tables : Tensor, int64 [n, width]
        Page numbers; any existing page where there is none to see.
    lengths : Tensor, int64 [n]
        Slots that each token sees.
    scale : float, optional
        Of the scores; 1 / sqrt(key_dim) unless given.
    value_dim : int, optional
        Elements of a value; key_dim unless given.

    Returns
    -------
    output : Tensor, float32 [n, q_heads, value_dim]
    lse : Tensor, float32 [n, q_heads]
        Natural log-sum-exp; a token without keys gives (0, -inf).

    Examples
    --------
    >>> pages = torch.arange(16.0).view(2, 2, 4, 1, 1)  # two pages of K and V, four tokens each
    >>> q, tables = torch.zeros(1, 1, 1), torch.tensor([[1, 0]])
    >>> output, lse = attend_pages(q, pages, tables, torch.tensor([5]))
    >>> output.item()  # the mean of the values 12 to 15 of page 1 and the first one of page 0, 4
    11.600000381469727
    """
    t, kv_heads, key_dim = pages.shape[2:]
    scale, value_dim = scale or key_dim**-0.5, value_dim or key_dim
    # A group of query heads shares a KV head: it becomes the rows of one matrix product.
    query = q.float().reshape(len(q), kv_heads, -1, key_dim)
    output = query.new_zeros((*query.shape[:3], value_dim))
    lse = query.new_full(query.shape[:3], -torch.inf)
    pages_at_once = max(1, TOKENS_AT_ONCE // t)
    most = min(pages_at_once, tables.shape[1])
    of_a_row = most * prod(pages.shape[1:]) * torch.float32.itemsize
    rows_at_once = max(1, BYTES_AT_ONCE // max(1, of_a_row))
    gather = _Gather(pages, min(rows_at_once, len(q)), most)
    for first in range(0, tables.shape[1], pages_at_once):
        # Torch's operation ends the process when it is given no keys: such rows are left out.
        seeing = (lengths > first * t).nonzero()[:, 0]
        for begin in range(0, len(seeing), rows_at_once):
            rows = seeing[begin : begin + rows_at_once]
            seen = (lengths[rows] - first * t).clamp(max=pages_at_once * t)
            width = -(-int(seen.max()) // t)
            table = tables[rows, first : first + width]
            keys, values, hidden = gather(table, seen)
            piece, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query[rows], keys, values, attn_mask=hidden, scale=scale
            )
            piece = piece[..., :value_dim]
            if first:
                piece, piece_lse = merge(
                    torch.stack((output[rows], piece)), torch.stack((lse[rows], piece_lse))
                )
            output[rows], lse[rows] = piece, piece_lse
    return output.flatten(1, 2), lse.flatten(1)


class _Gather:
    """Gathers K and V of up to `rows` tokens, `width` pages each, into memory that it keeps.

    Fresh memory for every piece would cost as much as reading the pages does.
    """

    def __init__(self, pages: Tensor, rows: int, width: int) -> None:
        t, kv_heads, dim = pages.shape[2:]
        self.parts = pages.unbind(1)
        slots = -(-width * t // VECTOR) * VECTOR
        self.found = [part.new_empty(rows * width, t, kv_heads, dim) for part in self.parts]
        # Where nothing is converted or filled up, what was found is used as it lies.
        as_it_lies = pages.dtype == torch.float32 and t % VECTOR == 0
        size = rows * slots * kv_heads * dim
        self.wide = [None if as_it_lies else torch.empty(size) for _ in self.parts]

    def __call__(self, table: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """K and V of the first `seen[i]` slots of these pages: float32 [n, kv_heads, slots, dim].

        What lies behind them is 0, for it may be NaN, and gets -inf from the mask [n, 1, 1,
        slots]; there is none where every row is full.
        """
        n, (t, kv_heads, dim) = len(table), self.found[0].shape[1:]
        numbers, there = table.flatten(), table.shape[1] * t
        slots = -(-there // VECTOR) * VECTOR
        hidden = torch.arange(slots) >= seen[:, None]
        full = not hidden.any()
        gathered = []
        for part, found, wide in zip(self.parts, self.found, self.wide, strict=True):
            rows = torch.index_select(part, 0, numbers, out=found[: len(numbers)])
            rows = rows.view(n, there, kv_heads, dim)
            if wide is not None:
                room = wide[: n * slots * kv_heads * dim].view(n, slots, kv_heads, dim)
                room[:, :there] = rows
                rows = room
            if not full:
                rows.masked_fill_(hidden[..., None, None], 0)
            gathered.append(rows.transpose(1, 2))
        mask = None
        if not full:
            mask = torch.zeros(n, slots).masked_fill_(hidden, -torch.inf)[:, None, None]
        return gathered[0], gathered[-1], mask
