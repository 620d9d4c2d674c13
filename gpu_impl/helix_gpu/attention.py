"""Attention of new tokens over this rank's pages, on the CPU."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

from helix_gpu.merge import merge

TOKENS_AT_ONCE: Final = 512
"""Slots of each token gathered at a time. It bounds the scratch memory, and does not depend
on the batch, so that dummy requests leave the order of summation alone."""

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
    """Partial attention of each new token over the first `lengths[i]` slots of its request.

    `q` [n, q_heads, key_dim]; `pages` [pages, parts, tokens_per_block, kv_heads, key_dim] of any
    float type, K in the first part; the values are the first `value_dim` elements (all of them by
    default) of the last part, which with a latent cache is the same. `tables` int64 [n, width]
    page numbers, any existing page where there is none to see; `lengths` int64 [n]. Scores are
    scaled by `scale`, 1 / sqrt(key_dim) by default. All on the CPU.

    Returns the output [n, q_heads, value_dim] and its natural log-sum-exp [n, q_heads], both
    float32; a token without keys gives (0, -inf). Everything is float32 whatever the type.
    """
    t, kv_heads, key_dim = pages.shape[2:]
    scale, value_dim = scale or key_dim**-0.5, value_dim or key_dim
    # A group of query heads shares a KV head: it becomes the rows of one matrix product.
    query = q.float().reshape(len(q), kv_heads, -1, key_dim)
    output = query.new_zeros((*query.shape[:3], value_dim))
    lse = query.new_full(query.shape[:3], -torch.inf)
    pages_at_once = max(1, TOKENS_AT_ONCE // t)
    for first in range(0, tables.shape[1], pages_at_once):
        # Torch's operation ends the process when it is given no keys: such rows are left out.
        rows = (lengths > first * t).nonzero()[:, 0]
        if not len(rows):
            break
        table = tables[rows, first : first + pages_at_once]
        seen = (lengths[rows] - first * t).clamp(max=table.shape[1] * t)
        keys, values, hidden = _gathered(pages, table, seen)
        piece, piece_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query[rows], keys, values, attn_mask=hidden, scale=scale
        )
        if first:
            earlier = output[rows], lse[rows]
            piece, piece_lse = merge(
                torch.stack((earlier[0], piece[..., :value_dim])),
                torch.stack((earlier[1], piece_lse)),
            )
        output[rows], lse[rows] = piece[..., :value_dim], piece_lse
    return output.flatten(1, 2), lse.flatten(1)


def _gathered(pages: Tensor, table: Tensor, seen: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """K and V of the first `seen[i]` slots of these pages: float32 [n, kv_heads, slots, dim].

    What lies behind them is 0, for it may be NaN, and gets -inf from the mask [n, 1, 1, slots];
    there is none where every row is full.
    """
    n, (t, kv_heads, dim) = len(table), pages.shape[2:]
    numbers, there = table.flatten(), table.shape[1] * t
    slots = -(-there // VECTOR) * VECTOR
    hidden = torch.arange(slots) >= seen[:, None]
    full = not hidden.any()
    parts = []
    for part in pages.unbind(1):
        found = part.index_select(0, numbers).view(n, there, kv_heads, dim)
        rows = found.new_empty((n, slots, kv_heads, dim), dtype=torch.float32)
        rows[:, :there] = found
        if not full:
            rows[hidden] = 0
        parts.append(rows.transpose(1, 2))
    mask = None if full else torch.zeros(n, slots).masked_fill_(hidden, -torch.inf)[:, None, None]
    return parts[0], parts[-1], mask
