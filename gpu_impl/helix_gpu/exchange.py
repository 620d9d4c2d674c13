"""The exchange of partial attentions: one all-to-all of packed bytes along the heads.

Each rank attends with all query heads of its tensor-parallel shard and ends up with the
C partials of its own slice of them. One collective carries outputs and log-sum-exps together,
since decode exchanges are bound by latency (arXiv 2507.07120; vLLM pull request 41160).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

Exchange = Callable[[Tensor], Tensor]
"""From uint8 [C, bytes], row d for rank d, to uint8 [C, bytes], row s from rank s."""


def all_to_all(group: dist.ProcessGroup) -> Exchange:
    """The exchange among the ranks of a process group."""

    def exchange(send: Tensor) -> Tensor:
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=group)
        return receive

    return exchange


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
