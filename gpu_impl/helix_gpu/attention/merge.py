"""Merging the ranks' partial attentions into the exact result (arXiv 2507.07120, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The attention over all keys, from C attentions over disjoint keys.

    `outputs` [C, ..., head_dim] of any type; `lses` float32 [C, ...], their natural log-sum-exp.
    Returns the merged output and log-sum-exp, both float32. A partial without keys (-inf) counts
    for nothing, whatever its output holds; all of them without keys give (0, -inf). Ranks are
    added in order, so every run rounds alike.
    """
    weights, lse = shares(lses)
    merged = torch.zeros_like(outputs[0], dtype=torch.float32)
    for output, share in zip(outputs.unbind(), weights.unbind(), strict=True):
        merged = merged + weighted(output, share)
    return merged, lse


def shares(lses: Tensor) -> tuple[Tensor, Tensor]:
    """What each partial's output counts for, and the log-sum-exp over all keys.

    `lses` float32 [C, ...], natural; so are the shares, which sum to 1, or are all 0 where no
    partial has a key. The log-sum-exp is [...], -inf there.

    With M = max lse_r and w_r = exp(lse_r - M): share_r = w_r / sum w, lse = M + ln(sum w). A NaN
    log-sum-exp, which no partial may have, stays visible.
    """
    top = lses.amax(0)
    top = top.where(top != -torch.inf, 0)
    weights = (lses - top).exp()
    total = torch.zeros_like(top)
    for weight in weights.unbind():
        total = total + weight
    return weights / total.clamp(min=1), top + total.log()  # the largest weight is 1, or none is


def weighted(output: Tensor, share: Tensor) -> Tensor:
    """An output [..., head_dim] times its share [...], float32; 0 where the share is 0.

    An output without keys may be NaN, and NaN * 0 is NaN.
    """
    share = share[..., None]
    return (share * output.float()).where(share != 0, 0)
