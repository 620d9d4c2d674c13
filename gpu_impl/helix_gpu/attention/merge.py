"""Merging the ranks' partial attentions into the exact result (arXiv 2507.07120, section 2.1)."""

from __future__ import annotations

import torch
from torch import Tensor


def merge(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the attention over all keys, from C attentions over disjoint keys.

    A partial without keys (-inf) counts for nothing, whatever its output holds; all of them without
    keys give (0, -inf). Ranks are added in order, so every run rounds alike.

    Parameters
    ----------
    outputs : Tensor, any float type [C, ..., head_dim]
    lses : Tensor, float32 [C, ...]
        Their natural log-sum-exps.

    Returns
    -------
    output : Tensor, float32 [..., head_dim]
    lse : Tensor, float32 [...]

    Examples
    --------
    >>> outputs = torch.tensor([[1.0], [4.0], [torch.nan]])
    >>> output, lse = merge(outputs, torch.tensor([2.0, 1.0, 0.0]).log())
    >>> output.tolist(), lse.exp().round().tolist()
    ([2.0], 3.0)
    """
    weights, lse = shares(lses)
    merged = weighted(outputs[0], weights[0])
    for output, share in zip(outputs[1:].unbind(), weights[1:].unbind(), strict=True):
        merged += weighted(output, share)
    return merged, lse


def beside_sinks(output: Tensor, lse: Tensor, sinks: Tensor | None) -> Tensor:
    """Return merged outputs as they are when each head's softmax has a sink too.

    A sink is a logit without a value: its head's output loses exp(sink) / (exp(sink) + exp(lse)).
    It counts once, so it joins what is merged and not what each rank has.

    Parameters
    ----------
    output : Tensor, float32 [..., heads, head_dim]
    lse : Tensor, float32 [..., heads]
        Natural log-sum-exp over all keys, without the sinks.
    sinks : Tensor, float32 [heads], or None
        None for heads without sinks, whose output is as it is.

    Returns
    -------
    Tensor, float32 [..., heads, head_dim]

    Examples
    --------
    >>> beside_sinks(torch.tensor([[2.0]]), torch.zeros(1), torch.zeros(1)).tolist()
    [[1.0]]
    """
    return output if sinks is None else output * (lse - sinks).sigmoid()[..., None]


def shares(lses: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight of each partial's output, and the log-sum-exp over all keys.

    With M = max lse_r and w_r = exp(lse_r - M): share_r = w_r / sum w, lse = M + ln(sum w). A NaN
    log-sum-exp, which no partial may have, stays visible.

    Parameters
    ----------
    lses : Tensor, float32 [C, ...]
        Natural log-sum-exps.

    Returns
    -------
    shares : Tensor, float32 [C, ...]
        They sum to 1, or are all 0 where no partial has a key.
    lse : Tensor, float32 [...]
        -inf where no partial has a key.
    """
    top = lses.amax(0)
    top = top.where(top != -torch.inf, 0)
    weights = (lses - top).exp()
    total = torch.zeros_like(top)
    for weight in weights.unbind():
        total = total + weight
    return weights / total.clamp(min=1), top + total.log()  # the largest weight is 1, or none is


def weighted(output: Tensor, share: Tensor) -> Tensor:
    """Return an output times its share, 0 where the share is 0.

    An output without keys may be NaN, and NaN * 0 is NaN.

    Parameters
    ----------
    output : Tensor, any float type [..., head_dim]
    share : Tensor, float32 [...]

    Returns
    -------
    Tensor, float32 [..., head_dim]
    """
    share = share[..., None]
    return (share * output.float()).where(share != 0, 0)
