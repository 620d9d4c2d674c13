"""Joining the splits, straight into the buffer that is sent to the other ranks."""

from __future__ import annotations

from typing import Final

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION, check_layout, power_of_2

MOST_AT_ONCE: Final = 2**12
"""Elements of all splits that a program holds; sixteen times as many spill."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def reduce_pack_kernel(  # type: ignore[no-untyped-def]
    partial_out, partial_lse2, send_out, send_lse,
    out_split, lse_split, send_out_rank, send_lse_rank,
    splits, heads_per_rank,
    PADDED_SPLITS: tl.constexpr, DIM: tl.constexpr, BLOCK_DIM: tl.constexpr,
):  # fmt: skip
    """One program joins the splits of BLOCK_DIM elements of one head of one row."""
    row, head, heads = tl.program_id(0), tl.program_id(1), tl.num_programs(1)
    split = tl.arange(0, PADDED_SPLITS).to(tl.int64)
    dim = tl.program_id(2) * BLOCK_DIM + tl.arange(0, BLOCK_DIM)
    item = row.to(tl.int64) * heads + head
    lse2 = tl.load(
        partial_lse2 + split * lse_split + item, mask=split < splits, other=float("-inf")
    )
    outputs = tl.load(
        partial_out + split[:, None] * out_split + item * DIM + dim[None, :],
        mask=(split < splits)[:, None] & (dim < DIM)[None, :], other=0.0,
    )  # fmt: skip

    top = tl.max(lse2, 0)
    top = tl.where(top == float("-inf"), 0.0, top)
    weights = tl.exp2(lse2 - top)
    total = tl.sum(weights, 0)
    # Written so that a NaN, which only a NaN in q, K or V can bring, stays visible.
    weights = weights / tl.where(total == 0, 1.0, total)
    # An empty split's output was never written, and NaN * 0 is NaN.
    kept = tl.where((weights != 0)[:, None], outputs * weights[:, None], 0.0)
    output = tl.sum(kept, 0)

    rank = head // heads_per_rank
    sent_item = row.to(tl.int64) * heads_per_rank + head % heads_per_rank
    out_at = send_out + rank.to(tl.int64) * send_out_rank + sent_item * DIM + dim
    tl.store(out_at, output.to(send_out.dtype.element_ty), mask=dim < DIM)
    # From base 2 to e; log2(0) is -inf.
    lse = (top + tl.log2(total)) * 0.6931471805599453
    lse_at = send_lse + rank.to(tl.int64) * send_lse_rank + sent_item
    tl.store(lse_at, lse, mask=tl.program_id(2) == 0)


def reduce_pack(partial_out: Tensor, partial_lse2: Tensor, send: Tensor, wire: torch.dtype) -> None:
    """Join the splits that `decode` wrote and pack them for each rank, as `partials.pack` does.

    A row without keys gives (0, -inf). With one rank and `wire` float32 this is the local result.

    Parameters
    ----------
    partial_out : Tensor, float32 [S, n, heads, head_dim], contiguous
        head_dim is even.
    partial_lse2 : Tensor, float32 [S, n, heads], contiguous
        To base 2.
    send : Tensor, uint8 [ranks, bytes], contiguous
        Row d gets the outputs of heads [d * heads / ranks, (d + 1) * heads / ranks), then their
        float32 *natural* log-sum-exps.
    wire : torch.dtype
        Type of the outputs in `send`.

    Raises
    ------
    ValueError
        For tensors that are not contiguous.
    """
    check_layout(
        rows={},
        whole={"partial_out": partial_out, "partial_lse2": partial_lse2, "send": send},
    )
    splits, n, heads, head_dim = partial_out.shape
    ranks = send.shape[0]
    border = n * (heads // ranks) * head_dim * wire.itemsize
    send_out, send_lse = send[:, :border].view(wire), send[:, border:].view(torch.float32)
    padded_splits = power_of_2(splits)
    block_dim = min(power_of_2(head_dim), MOST_AT_ONCE // padded_splits)
    reduce_pack_kernel[(n, heads, -(-head_dim // block_dim))](
        partial_out, partial_lse2, send_out, send_lse,
        partial_out.stride(0), partial_lse2.stride(0), send_out.stride(0), send_lse.stride(0),
        splits, heads // ranks,
        PADDED_SPLITS=padded_splits, DIM=head_dim, BLOCK_DIM=block_dim,
        num_warps=min(8, max(1, padded_splits * block_dim // 1024)), enable_fp_fusion=FUSION,
    )  # fmt: skip
