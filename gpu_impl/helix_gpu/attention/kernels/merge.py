"""Merging the partials that the ranks sent: `attention.merge.merge` as one kernel."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION, check_layout, power_of_2


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def merge_kernel(  # type: ignore[no-untyped-def]
    received_out, received_lse, out, lse_out,
    out_rank, lse_rank,
    RANKS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr,
):  # fmt: skip
    """One program merges one head of one row, adding the ranks in their order."""
    item = tl.program_id(0).to(tl.int64)
    dim = tl.arange(0, PADDED_DIM)
    # Ranks are unrolled, so that all loads are on their way before the first is waited for.
    top = tl.load(received_lse + item)
    for rank in tl.static_range(1, RANKS):
        top = tl.maximum(top, tl.load(received_lse + rank * lse_rank + item))
    top = tl.where(top == float("-inf"), 0.0, top)
    total = 0.0
    for rank in tl.static_range(RANKS):
        total += tl.exp(tl.load(received_lse + rank * lse_rank + item) - top)
    divisor = tl.where(total == 0, 1.0, total)
    merged = tl.zeros([PADDED_DIM], tl.float32)
    for rank in tl.static_range(RANKS):
        share = tl.exp(tl.load(received_lse + rank * lse_rank + item) - top) / divisor
        partial = tl.load(
            received_out + rank * out_rank + item * DIM + dim, mask=dim < DIM, other=0.0
        ).to(tl.float32)
        # A partial without keys may hold anything, and NaN * 0 is NaN. A NaN share, from a
        # log-sum-exp that no partial may have, is not 0: it stays visible.
        merged += tl.where(share != 0, partial * share, 0.0)
    tl.store(out + item * DIM + dim, merged.to(out.dtype.element_ty), mask=dim < DIM)
    tl.store(lse_out + item, top + tl.log(total))


def merge_received(received: Tensor, out: Tensor, lse_out: Tensor, wire: torch.dtype) -> None:
    """Merge the partials over disjoint keys that the ranks sent in `partials.pack`'s layout.

    All partials without keys give (0, -inf). Ranks are added in order, in float32, so that every
    run rounds alike.

    Parameters
    ----------
    received : Tensor, uint8 [ranks, bytes]
        Row s from rank s: outputs, then float32 natural log-sum-exps.
    out : Tensor, any float type [n, heads, head_dim], contiguous
        Where the merged output is written.
    lse_out : Tensor, float32 [n, heads], contiguous
        Where its natural log-sum-exp is written.
    wire : torch.dtype
        Type of the outputs in `received`.

    Raises
    ------
    ValueError
        For other strides.
    """
    check_layout(rows={"received": received}, whole={})
    border = out.numel() * wire.itemsize
    merge_partials(
        received[:, :border].view(wire), received[:, border:].view(torch.float32), out, lse_out
    )


def merge_partials(outputs: Tensor, lses: Tensor, out: Tensor, lse_out: Tensor) -> None:
    """Merge partials as `merge_received` does, from two tensors.

    Parameters
    ----------
    outputs : Tensor, any float type [ranks, n * heads * head_dim]
    lses : Tensor, float32 [ranks, n * heads]
    out, lse_out
        As `merge_received` takes them.
    """
    check_layout(rows={"outputs": outputs, "lses": lses}, whole={"out": out, "lse_out": lse_out})
    n, heads, head_dim = out.shape
    merge_kernel[(n * heads,)](
        outputs, lses, out, lse_out,
        outputs.stride(0), lses.stride(0),
        RANKS=outputs.shape[0], DIM=head_dim, PADDED_DIM=power_of_2(head_dim),
        num_warps=1, enable_fp_fusion=FUSION,
    )  # fmt: skip
