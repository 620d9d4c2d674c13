"""Attention of new tokens over this rank's pages."""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

TOKENS_AT_ONCE: Final = 512
"""Slots of each token gathered at a time. It bounds the scratch memory, and does not depend
on the batch, so that dummy requests leave the order of summation alone."""


def attend_pages(
    q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor
) -> tuple[Tensor, Tensor]:
    """Partial attention of each new token over the first `lengths[i]` slots of its request.

    `q` [n, q_heads, head_dim]; `pages` [pages, 2, tokens_per_block, kv_heads, head_dim], K then
    V, of q's type; `tables` int64 [n, width] page numbers, any existing page where there is none
    to see; `lengths` int64 [n]. Scores are scaled by 1 / sqrt(head_dim).

    Returns the output [n, q_heads, head_dim] and its natural log-sum-exp [n, q_heads], both
    float32; a token without keys gives (0, -inf). Everything is float32 whatever the type;
    on CUDA that needs torch's default, matrix products without TF32.
    """
    _, _, t, kv_heads, head_dim = pages.shape
    # A group of query heads shares a KV head: it becomes the rows of one matrix product.
    query = q.float().reshape(len(q), kv_heads, -1, head_dim)
    top = query.new_full((*query.shape[:3], 1), -torch.inf)
    total = torch.zeros_like(top)
    output = torch.zeros_like(query)

    pages_at_once = max(1, TOKENS_AT_ONCE // t)
    for first in range(0, tables.shape[1], pages_at_once):
        table = tables[:, first : first + pages_at_once]
        slots = first * t + torch.arange(table.shape[1] * t, device=q.device)
        seen = (slots < lengths[:, None])[:, None, None]
        # Unseen slots may hold NaN, which a zero weight would not silence.
        keys, values = (
            pages[table, part]
            .flatten(1, 2)
            .transpose(1, 2)
            .to(torch.float32, memory_format=torch.contiguous_format)
            .masked_fill_(~seen.mT, 0)
            for part in (0, 1)
        )
        scores = (query @ keys.mT).mul_(head_dim**-0.5).masked_fill_(~seen, -torch.inf)

        # Online softmax: what was summed so far fades as the largest score rises.
        new_top = top.maximum(scores.amax(-1, keepdim=True))
        base = _finite(new_top)
        weights = (scores - base).exp()
        fade = (top - base).exp()
        total = total * fade + weights.sum(-1, keepdim=True)
        output = output * fade + weights @ values
        top = new_top

    output = output / total.where(total > 0, 1)
    lse = _finite(top) + total.log()
    return output.flatten(1, 2), lse.flatten(1)


def _finite(top: Tensor) -> Tensor:
    """The largest score, or 0 where there is none: -inf - -inf would be NaN."""
    return top.where(top != -torch.inf, 0)
