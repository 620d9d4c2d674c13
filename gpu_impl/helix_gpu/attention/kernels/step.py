"""One layer of a decode step over persistent buffers: everything but the exchange itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from helix_gpu.attention.kernels.append import append, append_latent
from helix_gpu.attention.kernels.decode import decode
from helix_gpu.attention.kernels.merge import merge_received
from helix_gpu.attention.kernels.mla import decode_latent
from helix_gpu.attention.kernels.reduce_pack import reduce_pack
from helix_gpu.attention.kernels.settings import DecodeSettings, splits_for
from helix_gpu.attention.partials import unpack


@dataclass(frozen=True, slots=True)
class StepBuffers:
    """The memory that one captured step writes, allocated before capture and kept with its graph.

    The layers of a step share it.
    """

    partial_out: Tensor
    """float32 [splits, rows, q_heads, value_dim], between `decode` and `reduce_pack`."""
    partial_lse2: Tensor
    """float32 [splits, rows, q_heads], to base 2."""
    send: Tensor
    """uint8 [ranks, bytes], the layout of `partials.pack`."""
    received: Tensor
    """uint8 [ranks, bytes], row s from rank s."""
    output: Tensor
    """[rows, q_heads / ranks, value_dim], the merged result."""
    lse: Tensor
    """float32 [rows, q_heads / ranks], its natural log-sum-exp."""
    wire: torch.dtype

    @classmethod
    def allocate(
        cls,
        rows: int,
        q_heads: int,
        kv_heads: int,
        value_dim: int,
        *,
        ranks: int,
        longest: int,
        dtype: torch.dtype,
        wire: torch.dtype,
        device: torch.device | str,
        splits: int | None = None,
        resident: int = 1,
    ) -> StepBuffers:
        """Return buffers for steps of `rows` rows.

        Parameters
        ----------
        rows, q_heads : int
        kv_heads : int
            Used to choose `splits`; with a latent cache, programs that share a row and split.
        value_dim : int
            head_dim, or the latent's 512.
        ranks : int
            Ranks of the exchange.
        longest : int
            Keys on a rank that a row sees, at most.
        dtype : torch.dtype
            Type of the output.
        wire : torch.dtype
            Type in which partial outputs travel.
        device : torch.device or str
        splits : int, optional
            `splits_for` chooses unless given.
        resident : int
            Of the settings that `decode` will use; used to choose `splits`.

        Returns
        -------
        StepBuffers
        """
        splits = splits or splits_for(rows, kv_heads, longest, resident=resident)
        heads = q_heads // ranks
        row_bytes = rows * heads * (value_dim * wire.itemsize + 4)

        def empty(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=device)

        return cls(
            partial_out=empty(splits, rows, q_heads, value_dim, dtype=torch.float32),
            partial_lse2=empty(splits, rows, q_heads, dtype=torch.float32),
            send=empty(ranks, row_bytes, dtype=torch.uint8),
            received=empty(ranks, row_bytes, dtype=torch.uint8),
            output=empty(rows, heads, value_dim, dtype=dtype),
            lse=empty(rows, heads, dtype=torch.float32),
            wire=wire,
        )


def attend_shard(
    buffers: StepBuffers,
    q: Tensor,
    k: Tensor,
    v: Tensor | None,
    pool: Tensor,
    slots: Tensor,
    tables: Tensor,
    lengths: Tensor,
    settings: DecodeSettings | None = None,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    wide: bool = False,
) -> None:
    """Store K and V where this rank owns them, attend over its pages, fill `buffers.send`.

    Three launches, or two where keys are not split. The exchange from `send` to `received` comes
    next, then `merge_shards`.

    Parameters
    ----------
    buffers : StepBuffers
    q, k : Tensor
        As `decode` and `append` take them, rotated. Without `v`, `k` is [n, 1, latent + rope].
    v : Tensor or None
        As `append` takes it; None where the cache is one of latents.
    pool : Tensor
        As `append` takes it. Without `v`, [pages, 1, tokens_per_block, 1, latent + rope].
    slots, tables : Tensor
        As `append` and `decode` take them.
    lengths : Tensor
        As `decode` takes it; the new tokens count.
    settings : DecodeSettings, optional
    starts : Tensor, optional
        As `decode` takes it.
    scale : float, optional
        Of the scores; needed without `v`.
    wide : bool
        As `decode` takes it.
    """
    how: Any = {"starts": starts, "scale": scale, "wide": wide, "settings": settings}
    if v is None:
        latents = pool[:, 0, :, 0]
        append_latent(k[:, 0], latents, slots)
        _attend(decode_latent, buffers, q, latents, tables, lengths, **how)
    else:
        append(k, v, pool, slots)
        _attend(decode, buffers, q, pool, tables, lengths, **how)


def _attend(by: Callable[..., None], buffers: StepBuffers, *given: Tensor, **how: Any) -> None:
    """Fill `buffers.send` by `decode` or `decode_latent`, which writes a single split there."""
    partials = buffers.partial_out, buffers.partial_lse2
    splits, n, q_heads, value_dim = buffers.partial_out.shape
    if splits == 1:
        heads = q_heads // len(buffers.send)
        sent = unpack(buffers.send, n, heads, value_dim, buffers.wire)
        by(*given, *sent, packed=True, **how)
    else:
        by(*given, *partials, **how)
        reduce_pack(*partials, buffers.send, buffers.wire)


def merge_shards(buffers: StepBuffers) -> Tensor:
    """Merge `buffers.received` into `buffers.output`, which is returned; one launch.

    Parameters
    ----------
    buffers : StepBuffers

    Returns
    -------
    Tensor [rows, q_heads / ranks, value_dim]
    """
    merge_received(buffers.received, buffers.output, buffers.lse, buffers.wire)
    return buffers.output


def attend_pages(
    q: Tensor,
    pool: Tensor,
    tables: Tensor,
    lengths: Tensor,
    splits: int | None = None,
    *,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `paged.attend_pages` returns, by these kernels.

    It allocates, so it is not for a captured step.

    Parameters
    ----------
    q : Tensor, any float type [n, q_heads, head_dim]
    pool, tables, lengths : Tensor
        As `decode` takes them.
    splits : int, optional
        `splits_for` chooses unless given.
    starts : Tensor, optional
        As `decode` takes it.

    Returns
    -------
    output : Tensor, float32 [n, q_heads, head_dim]
    lse : Tensor, float32 [n, q_heads]
        Natural log-sum-exp.
    """
    n, q_heads, head_dim = q.shape
    longest = max(1, tables.shape[1] * pool.shape[2])
    buffers = StepBuffers.allocate(
        n, q_heads, pool.shape[3], head_dim, ranks=1, longest=longest,
        dtype=q.dtype, wire=torch.float32, device=q.device, splits=splits,
    )  # fmt: skip
    _attend(decode, buffers, q, pool, tables, lengths, starts=starts)
    output, lse = unpack(buffers.send, n, q_heads, head_dim, torch.float32)
    return output[0], lse[0]
