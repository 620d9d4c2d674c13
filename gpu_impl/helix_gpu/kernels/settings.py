"""How the kernels are launched: block sizes, warps, pipeline stages and splits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

import torch

from helix_gpu.kernels.common import power_of_2

MAX_SPLITS: Final = 128
"""Joining more splits than this costs more than the idle multiprocessors did."""


@dataclass(frozen=True, slots=True)
class DecodeSettings:
    """One way to compile a decode kernel.

    `block` keys are taken at a time by `warps` warps, and `stages - 1` blocks of K and V are on
    their way from memory while one is worked on. A program takes up to `heads` query heads that
    share a KV head.
    """

    block: int
    warps: int
    stages: int
    heads: int = 64

    def heads_of(self, group: int) -> int:
        """Query heads a program has room for, in a group of `group`: matrix units want 16."""
        return min(self.heads, max(16, power_of_2(group)))


def decode_settings(head_dim: int, dtype: torch.dtype) -> DecodeSettings:
    """Settings of `decode` for queries of `dtype`; K and V may be narrower.

    Chosen by occupancy on sm_90 (three programs a multiprocessor at 128 dimensions, 64 KiB each
    in flight, where 30 KiB cover the latency), not yet by timing: see benchmarks/README.md.
    """
    if dtype == torch.float32:
        # No matrix unit multiplies float32 exactly: small blocks keep operands in registers.
        return DecodeSettings(block=16, warps=4, stages=2)
    return DecodeSettings(block=32 if head_dim > 128 else 64, warps=4, stages=3)


def latent_settings(dtype: torch.dtype) -> DecodeSettings:
    """Settings of `decode_latent` for queries of `dtype`.

    A program keeps [heads, 512] sums in registers, which bounds `heads`: 64 spill under Triton
    3.9, though not under 3.6.
    """
    if dtype == torch.float32:
        return DecodeSettings(block=16, warps=8, stages=1, heads=16)
    return DecodeSettings(block=64, warps=8, stages=2, heads=32)


def splits_for(rows: int, kv_heads: int, longest: int, *, multiprocessors: int = 132) -> int:
    """Splits that fill the device once with `rows` requests of up to `longest` local keys.

    It belongs to a captured graph, so it depends on the bucket and never on the lengths: those
    are divided on the device.
    """
    programs = 3 * multiprocessors // max(1, rows * kv_heads)
    return max(1, min(programs, MAX_SPLITS, -(-longest // 64)))
