"""Merging the ranks' partial attentions into the exact result (arXiv 2507.07120, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from C attentions over disjoint keys.

    `outputs` [C, ..., head_dim] of any type; `lses` float32 [C, ...], their natural log-sum-exp.
    Returns the merged output and log-sum-exp, both float32. A partial without keys (-inf) counts
    for nothing, whatever its output holds; all of them without keys give (0, -inf).

    With M = max lse_r and w_r = exp(lse_r - M): output = sum of (w_r / sum w) output_r, lse = M
    + ln(sum w). Ranks are added in order, so every run rounds alike. The comparisons with zero
    are written so that a NaN log-sum-exp, which no partial may have, stays visible.
    """
    top = lses.amax(0)
    top = top.where(top != -torch.inf, 0)
    weights = (lses - top).exp()
    total = torch.zeros_like(top)
    for weight in weights:
        total = total + weight
    divisor = total.where(total != 0, 1)
    merged = torch.zeros_like(outputs[0], dtype=torch.float32)
    for output, weight in zip(outputs, weights, strict=True):
        share = (weight / divisor)[..., None]
        merged = merged + (share * output.float()).where(share != 0, 0)
    return merged, top + total.log()
