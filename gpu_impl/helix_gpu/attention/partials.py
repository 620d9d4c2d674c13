"""Partials as bytes: the layout in which ranks send them to each other."""

from __future__ import annotations

import torch
from torch import Tensor


def pack(output: Tensor, lse: Tensor, ranks: int, wire: torch.dtype) -> Tensor:
    """Return the bytes for each rank: its heads' outputs, then their log-sum-exps.

    Parameters
    ----------
    output : Tensor, float32 [n, heads, head_dim]
    lse : Tensor, float32 [n, heads]
    ranks : int
        Rank d is sent heads [d * heads / ranks, (d + 1) * heads / ranks).
    wire : torch.dtype
        Type in which outputs travel. Log-sum-exps travel in float32.

    Returns
    -------
    Tensor, uint8 [ranks, bytes]

    Examples
    --------
    >>> message = pack(torch.ones(1, 4, 2), torch.zeros(1, 4), ranks=2, wire=torch.bfloat16)
    >>> message.shape  # two heads of two elements of two bytes, and two log-sum-exps of four
    torch.Size([2, 16])
    >>> outputs, lses = unpack(message, n=1, heads=2, head_dim=2, wire=torch.bfloat16)
    >>> outputs.shape, lses.shape
    (torch.Size([2, 1, 2, 2]), torch.Size([2, 1, 2]))
    """
    n, heads, head_dim = output.shape
    outputs = output.to(wire).view(n, ranks, heads // ranks, head_dim).transpose(0, 1)
    lses = lse.view(n, ranks, heads // ranks).transpose(0, 1)
    parts = [part.contiguous().view(ranks, -1).view(torch.uint8) for part in (outputs, lses)]
    return torch.cat(parts, dim=1)


def unpack(
    received: Tensor, n: int, heads: int, head_dim: int, wire: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the partials in the messages that a rank has received; it undoes `pack`.

    Parameters
    ----------
    received : Tensor, uint8 [ranks, bytes]
        Row s from rank s.
    n : int
        Rows of the batch.
    heads : int
        Heads of the receiver.
    head_dim : int
        Elements of an output. Even, so that the float32 part is aligned.
    wire : torch.dtype
        Type in which outputs travel.

    Returns
    -------
    outputs : Tensor, `wire` [ranks, n, heads, head_dim]
    lses : Tensor, float32 [ranks, n, heads]
    """
    border = n * heads * head_dim * wire.itemsize
    outputs = received[:, :border].view(wire).view(-1, n, heads, head_dim)
    lses = received[:, border:].view(torch.float32).view(-1, n, heads)
    return outputs, lses
