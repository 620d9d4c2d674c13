"""Partials as bytes: the layout in which ranks send them to each other."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(output: Tensor, lse: Tensor, ranks: int, wire: torch.dtype) -> Tensor:
    """Bytes for each rank: its heads' outputs in type `wire`, then their float32 log-sum-exps.

    `output` float32 [n, heads, head_dim], `lse` float32 [n, heads], rank d being sent heads
    [d * heads / ranks, (d + 1) * heads / ranks). Returns uint8 [ranks, bytes].
    """
    n, heads, head_dim = output.shape
    outputs = output.to(wire).view(n, ranks, heads // ranks, head_dim).transpose(0, 1)
    lses = lse.view(n, ranks, heads // ranks).transpose(0, 1)
    parts = [part.contiguous().view(ranks, -1).view(torch.uint8) for part in (outputs, lses)]
    return torch.cat(parts, dim=1)


def unpack(
    received: Tensor, n: int, heads: int, head_dim: int, wire: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Undo `pack` on the receiver, which holds `heads` heads.

    Returns outputs of type `wire` [ranks, n, heads, head_dim] and log-sum-exps float32
    [ranks, n, heads]. head_dim is even, so the float32 part is aligned.
    """
    border = n * heads * head_dim * wire.itemsize
    outputs = received[:, :border].view(wire).view(-1, n, heads, head_dim)
    lses = received[:, border:].view(torch.float32).view(-1, n, heads)
    return outputs, lses
