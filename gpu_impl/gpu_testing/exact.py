"""Attention in float64, with the distance within which a result equals it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
"""Half the distance from 1 to the next larger number of a type."""
U32 = UNIT[torch.float32]


def exact_attention(
    q: Tensor,
    shards: Sequence[tuple[Tensor, Tensor]],
    out: torch.dtype = torch.float32,
    wire: torch.dtype | None = None,
    *,
    product: torch.dtype = torch.float32,
    scale: float | None = None,
    softcap: float | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return float64 attention of one query over the keys of all shards, and its bound (ATT-4).

    Parameters
    ----------
    q : Tensor [q_heads, key_dim]
    shards : sequence of (Tensor [tokens, kv_heads, key_dim], Tensor [tokens, kv_heads, value_dim])
        K and V of each rank.
    out : torch.dtype
        Type of the output.
    wire : torch.dtype, optional
        Type in which partials travel; without it nothing travels.
    product : torch.dtype
        Type of the P·V product.
    scale : float, optional
        Of the scores; 1 / sqrt(key_dim) unless given.
    softcap : float, optional
        c of a score s that counts as c tanh(s / c); the bound grows by 4 roundings of it.

    Returns
    -------
    output : Tensor, float64 [q_heads, value_dim]
    lse : Tensor, float64 [q_heads]
    bound : Tensor, float64 [q_heads]
        The distance within which an output equals `output`.
    """
    query = q.double()
    groups = q.shape[0] // shards[0][0].shape[1]
    k, v = (
        torch.cat([shard[part] for shard in shards]).double().repeat_interleave(groups, 1)
        for part in (0, 1)
    )
    dim = q.shape[-1]
    scale = dim**-0.5 if scale is None else scale
    products = query * k
    scores = products.sum(-1) * scale
    ds = scale * dim**0.5 * products.norm(dim=-1) + ((dim / 3) ** 0.5 + 2) * scores.abs()
    if softcap is not None:
        bent = (scores / softcap).tanh()
        scores = softcap * bent
        ds = ds * (1 - bent**2) + 4 * scores.abs()
    ds = U32 * (ds + scores.abs().amax(0))
    lse = scores.logsumexp(0)
    p = (scores - lse).exp()
    o = (p[..., None] * v).sum(0)

    squares = ((p * (v - o).norm(dim=-1) * ds) ** 2).sum(0)
    squares += ((p * v.norm(dim=-1) * UNIT[product]) ** 2).sum(0)
    squares += (UNIT[out] * o.norm(dim=-1)) ** 2
    squares += (U32 * (len(k) ** 0.5 + 2) * (p[..., None] * v.abs()).sum(0).norm(dim=-1)) ** 2
    end = 0
    for keys, _ in shards if wire is not None else ():
        mine = slice(end, end := end + len(keys))
        if not len(keys):
            continue
        weight = p[mine].sum(0)
        o_r = (p[mine][..., None] * v[mine]).sum(0) / weight[:, None]
        lse_r = scores[mine].logsumexp(0)
        squares += (weight * o_r.norm(dim=-1) * UNIT[wire]) ** 2
        squares += (weight * (lse_r.abs() + 1) * 2 * U32 * (o_r - o).norm(dim=-1)) ** 2
    return o, lse, squares.sqrt()
