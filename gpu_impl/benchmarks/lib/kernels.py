"""Kernels that only benchmarks launch."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def read_kernel(x, out, blocks, BLOCK: tl.constexpr, UNROLL: tl.constexpr):
    """Reads everything, 16 bytes a thread at a time; writes a sum for each program."""
    total = tl.zeros([BLOCK], tl.int32)
    # `blocks` is a multiple of UNROLL; offsets stay below 2**31 elements.
    for block in range(tl.program_id(0) * UNROLL, blocks, tl.num_programs(0) * UNROLL):
        for i in tl.static_range(UNROLL):
            total += tl.load(x + (block + i) * BLOCK + tl.arange(0, BLOCK))
    tl.store(out + tl.program_id(0), tl.sum(total, 0))


@triton.jit
def reduce_without_lse_kernel(
    partial_out, partial_lse2, out, out_split, lse_split, splits,
    PADDED_SPLITS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """`reduce_pack_kernel` for one rank, without the log-sum-exp: what it costs to give it."""
    item = tl.program_id(0).to(tl.int64) * tl.num_programs(1) + tl.program_id(1)
    split, dim = tl.arange(0, PADDED_SPLITS).to(tl.int64), tl.arange(0, DIM)
    lse2 = tl.load(
        partial_lse2 + split * lse_split + item, mask=split < splits, other=float("-inf")
    )
    at = split[:, None] * out_split + item * DIM + dim[None, :]
    outputs = tl.load(partial_out + at, mask=(split < splits)[:, None], other=0.0)
    weights = tl.exp2(lse2 - tl.max(lse2, 0))
    weights = weights / tl.sum(weights, 0)
    kept = tl.where((weights != 0)[:, None], outputs * weights[:, None], 0.0)
    tl.store(out + item * DIM + dim, tl.sum(kept, 0).to(out.dtype.element_ty))
