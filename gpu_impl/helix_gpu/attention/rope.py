"""Rotary position embedding on pairs (d, d + dim/2), by global position (POS-2)."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor


def rope_table(
    positions: Tensor, dim: int, base: float, out: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """Return the cosines and sines of the angles by which positions are rotated.

    The angle position * base ** (-2 d / dim) is taken in float64, since a float32 angle is off by a
    tenth of a radian at a million tokens; cosine and sine are rounded once.

    Parameters
    ----------
    positions : Tensor, int64 [n]
        Global positions.
    dim : int
        Elements that are rotated; 0 for none.
    base : float
    out : tuple of Tensor, optional
        What is returned, written into these.

    Returns
    -------
    cos, sin : Tensor, float32 [n, 1, dim / 2]
    """
    angles = positions[:, None, None] * _inv_freq(dim, base, positions.device)
    cos, sin = out or torch.empty(2, *angles.shape, dtype=torch.float32, device=angles.device)
    return torch.cos(angles, out=cos), torch.sin(angles, out=sin)


@cache
def _inv_freq(dim: int, base: float, device: torch.device) -> Tensor:
    """The frequencies on a device, where they stay: a copy from the host would wait for it.

    Powers come from the host, so that a GPU's own pow cannot tell the ranks' tables apart.
    """
    frequencies = [base ** (-2 * d / dim) for d in range(dim // 2)]
    return torch.tensor(frequencies, dtype=torch.float64, device=device)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return `x` with the last elements rotated by the table of its positions.

    The table says how many; those before them stay. Products and sums are float32, rounded once to
    x's own type: an entry is within u|x| + 3 * 2**-24 (|a| + |b|) of the exact rotation of its pair
    (a, b), u being the rounding unit of the type.

    Parameters
    ----------
    x : Tensor, any float type [..., n, heads, dim]
    cos, sin : Tensor, float32 [n, 1, half]
        As `rope_table` returns them.

    Returns
    -------
    Tensor, as `x`

    Examples
    --------
    >>> x = torch.tensor([[[1.0, 0.0]]])  # one token at position 1, one head, one pair
    >>> rotate(x, *rope_table(torch.tensor([1]), dim=2, base=10000.0))
    tensor([[[0.5403, 0.8415]]])
    """
    if not cos.shape[-1]:
        return x
    still = x.shape[-1] - 2 * cos.shape[-1]
    a, b = x[..., still:].float().chunk(2, dim=-1)
    turned = torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)
    return torch.cat((x[..., :still], turned), dim=-1) if still else turned
