"""Rotary position embedding of a step's queries or keys in one launch."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import check_layout, power_of_2


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def rotate_kernel(  # type: ignore[no-untyped-def]
    x, cos, sin, turned,
    x_row, x_head, turned_row,
    HEADS: tl.constexpr, STILL: tl.constexpr, PADDED_STILL: tl.constexpr,
    HALF: tl.constexpr, PADDED_HALF: tl.constexpr, BLOCK_HEADS: tl.constexpr,
):  # fmt: skip
    """One program turns BLOCK_HEADS heads of one row."""
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    source = x + row * x_row + head[:, None] * x_head
    target = turned + row * turned_row + head[:, None] * (STILL + 2 * HALF)
    if STILL > 0:
        still = tl.arange(0, PADDED_STILL)
        there = (head < HEADS)[:, None] & (still < STILL)[None, :]
        tl.store(target + still, tl.load(source + still, mask=there), mask=there)
    half = tl.arange(0, PADDED_HALF)
    there = (head < HEADS)[:, None] & (half < HALF)[None, :]
    c = tl.load(cos + row * HALF + half, mask=half < HALF)[None, :]
    s = tl.load(sin + row * HALF + half, mask=half < HALF)[None, :]
    a = tl.load(source + STILL + half[None, :], mask=there).to(tl.float32)
    b = tl.load(source + STILL + HALF + half[None, :], mask=there).to(tl.float32)
    first, second = a * c - b * s, b * c + a * s
    tl.store(target + STILL + half, first.to(turned.dtype.element_ty), mask=there)
    tl.store(target + STILL + HALF + half, second.to(turned.dtype.element_ty), mask=there)


def rotated(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return what `attention.rope.rotate` returns, to the bit, in one launch where that has nine.

    Parameters
    ----------
    x : Tensor, any float type [n, heads, dim]
        Any strides, the last 1.
    cos, sin : Tensor, float32 [n, 1, half], contiguous

    Returns
    -------
    Tensor, as `x`

    Raises
    ------
    ValueError
        For other strides.
    """
    if not cos.shape[-1]:
        return x
    check_layout(rows={"x": x}, whole={"cos": cos, "sin": sin})
    n, heads, dim = x.shape
    half = cos.shape[-1]
    still = dim - 2 * half
    turned = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block = min(power_of_2(heads), max(1, 2048 // power_of_2(dim)))
    rotate_kernel[(n, -(-heads // block))](
        x, cos, sin, turned,
        x.stride(0), x.stride(1), turned.stride(0),
        HEADS=heads, STILL=still, PADDED_STILL=power_of_2(still),
        HALF=half, PADDED_HALF=power_of_2(half), BLOCK_HEADS=block,
        num_warps=4, enable_fp_fusion=False,  # products are rounded before they are added
    )  # fmt: skip
    return turned
