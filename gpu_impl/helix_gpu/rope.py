"""Rotary position embedding on pairs (d, d + head_dim/2), by global position (POS-2)."""

from __future__ import annotations

import torch
from torch import Tensor


def rope_table(positions: Tensor, head_dim: int, base: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines, each float32 [n, 1, head_dim / 2], of int64 `positions` [n].

    The angle position * base ** (-2 d / head_dim) is taken in float64, since a float32 angle is
    off by a tenth of a radian at a million tokens; cosine and sine are rounded once.
    """
    # Powers come from the host, so that a GPU's own pow cannot tell the ranks' tables apart.
    frequencies = [base ** (-2 * d / head_dim) for d in range(head_dim // 2)]
    inv_freq = torch.tensor(frequencies, dtype=torch.float64, device=positions.device)
    angles = positions.to(torch.float64)[:, None, None] * inv_freq
    return angles.cos().float(), angles.sin().float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x` [..., n, heads, head_dim] by the table of its n positions, in x's own type.

    Products and sums are float32, rounded once: an entry is within u|x| + 3 * 2**-24 (|a| + |b|)
    of the exact rotation of its pair (a, b), u being the rounding unit of the type.
    """
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
