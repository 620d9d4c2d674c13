"""How the kernels are launched: block sizes, warps, pipeline stages and splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from helix_gpu.attention.kernels.common import power_of_2

MAX_SPLITS: Final = 128
"""Joining more splits than this costs more than the idle multiprocessors did."""
MIN_KEYS: Final = 128
"""One block: no split is meant to have fewer keys."""
START_KEYS: Final = 320
"""Keys that a program could have read in the time it takes to start and to end. Fitted to table 3
of benchmarks/results/h200.txt: what a turn more costs there is the time of 2 to 3.3 blocks."""


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """One way to compile a decode kernel.

    Parameters
    ----------
    block : int
        Keys that are taken at a time.
    warps : int
        Warps of a program.
    stages : int
        `stages - 1` blocks of K and V are on their way from memory while one is worked on.
    heads : int
        Query heads of a KV head that a program takes, at most.
    resident : int
        Programs that a multiprocessor is to hold at a time.
    """

    block: int
    warps: int
    stages: int
    heads: int = 64
    resident: int = 1

    def heads_of(self, group: int, tokens: int = 1) -> int:
        """Return the query heads that a program takes of a group; matrix units want 16 rows.

        Parameters
        ----------
        group : int
            Query heads that share a KV head.
        tokens : int
            Tokens whose heads a program takes together, a power of 2.
        """
        return min(self.heads, max(16, power_of_2(group) * tokens)) // tokens


def decode_settings(
    head_dim: int, dtype: torch.dtype, cached: torch.dtype | None = None
) -> DecodeSettings:
    """Return the settings of `decode`.

    Chosen by table 3 of benchmarks/results/h200.txt, for 128 dimensions: within 0.4 percent of the
    best of pages of 16, 64 and 128 each, with the splits that `splits_for` gives. It is one program
    a multiprocessor, with 128 KiB of K and V on their way; more dimensions keep to those bytes.
    Elements of 8 bits are converted first, which takes longer than to read them: four programs
    convert beside each other.

    Parameters
    ----------
    head_dim : int
    dtype : torch.dtype
        Type of the P·V product.
    cached : torch.dtype, optional
        Type in which K and V are cached.

    Returns
    -------
    DecodeSettings
    """
    if dtype == torch.float32:
        # No matrix unit multiplies float32 exactly: small blocks keep operands in registers.
        return DecodeSettings(block=16, warps=4, stages=2)
    if cached is not None and cached.itemsize == 1:
        block = 32 if head_dim > 128 else 64
        return DecodeSettings(block=block, warps=4, stages=3, resident=4)
    return DecodeSettings(block=64 if head_dim > 128 else 128, warps=8, stages=3)


def narrow_settings(head_dim: int) -> DecodeSettings:
    """Return the settings of `decode` for a cache of 8 bits that is read by pairs.

    As many programs are resident as by `decode_settings`, so that either may follow from one choice
    of splits.

    Parameters
    ----------
    head_dim : int

    Returns
    -------
    DecodeSettings
    """
    block, warps = (32, 4) if head_dim > 128 else (64, 2)
    return DecodeSettings(block, warps, stages=3, resident=4)


def latent_settings(
    heads: int, dtype: torch.dtype, cached: torch.dtype | None = None
) -> DecodeSettings:
    """Return the settings of `decode_latent`.

    Chosen by the MLA tables of benchmarks/results. A program keeps [heads, 512] sums in registers,
    which bounds its heads: 64 fit, and are by far the fastest where there are so many. Where 16
    hold all of them, their sums leave room for a second program.

    Parameters
    ----------
    heads : int
        Query heads of a tensor-parallel shard.
    dtype : torch.dtype
        Type of the P·V product.
    cached : torch.dtype, optional
        Type in which latents are cached.

    Returns
    -------
    DecodeSettings
    """
    if dtype == torch.float32:
        return DecodeSettings(block=16, warps=8, stages=1, heads=16)
    narrow = cached is not None and cached.itemsize == 1
    if heads <= 16 and narrow:
        return DecodeSettings(block=64, warps=4, stages=2, heads=16, resident=2)
    if narrow:
        return DecodeSettings(block=64, warps=8, stages=3, heads=64)
    if heads <= 16:
        return DecodeSettings(block=32, warps=4, stages=3, heads=16, resident=2)
    return DecodeSettings(block=64, warps=8, stages=2, heads=64)


def splits_for(
    rows: int, kv_heads: int, longest: int, *, resident: int = 1, multiprocessors: int = 132
) -> int:
    """Return the number of splits that takes least time.

    Programs run in turns of `resident` a multiprocessor, and each takes the time of its keys and of
    START_KEYS more. It belongs to a captured graph, so it depends on the bucket and never on the
    lengths: those are divided on the device.

    Parameters
    ----------
    rows : int
        Requests.
    kv_heads : int
        Programs of a row and split: for a latent cache, as many as its heads need.
    longest : int
        Local keys of a request, at most.
    resident : int
        Programs that a multiprocessor holds at a time.
    multiprocessors : int

    Returns
    -------
    int
    """
    most = min(MAX_SPLITS, max(1, -(-longest // MIN_KEYS)))

    def time(splits: int) -> float:
        turns = -(-rows * kv_heads * splits // (resident * multiprocessors))
        return turns * (longest / splits + START_KEYS)

    return min(range(1, most + 1), key=time)
