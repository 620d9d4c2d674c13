"""Storing the new tokens' K and V in their slots."""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION, check_layout, power_of_2


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def append_kernel(  # type: ignore[no-untyped-def]
    k, v, pool, slots,
    k_row, k_head, v_row, v_head,
    pool_page, pool_part, pool_token, pool_head,
    HEADS: tl.constexpr, DIM: tl.constexpr, PADDED_DIM: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    TOKENS_PER_PAGE: tl.constexpr,
):  # fmt: skip
    """One program stores BLOCK_HEADS heads of one row: of K where program 2 is 0, else of V."""
    row = tl.program_id(0).to(tl.int64)
    slot = tl.load(slots + row).to(tl.int64)
    if slot < 0:
        return
    head = tl.program_id(1) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    dim = tl.arange(0, PADDED_DIM)
    there = (head < HEADS)[:, None] & (dim < DIM)[None, :]
    # int64: a pool may hold more than 2**31 elements.
    page, offset = slot // TOKENS_PER_PAGE, slot % TOKENS_PER_PAGE
    target = pool + page * pool_page + offset * pool_token
    target += head[:, None] * pool_head + dim[None, :]
    if tl.program_id(2) == 0:
        new = tl.load(k + row * k_row + head[:, None] * k_head + dim[None, :], mask=there)
        tl.store(target, new.to(pool.dtype.element_ty), mask=there)
    else:
        new = tl.load(v + row * v_row + head[:, None] * v_head + dim[None, :], mask=there)
        tl.store(target + pool_part, new.to(pool.dtype.element_ty), mask=there)


def append(k: Tensor, v: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Store row i of K and V at slot `slots[i]` of the pool, in the pool's type; one launch.

    Parameters
    ----------
    k, v : Tensor, any float type [n, kv_heads, head_dim]
        K rotated. Any strides, the last 1.
    pool : Tensor, any float type [pages, 2, tokens_per_block, kv_heads, head_dim]
        K, then V. Any strides, the last 1.
    slots : Tensor, int32 or int64 [n], contiguous
        Page * tokens_per_block + offset. A row whose slot is negative is another rank's: nothing is
        written.

    Raises
    ------
    ValueError
        For other strides.
    """
    _launch(k, v, pool, slots, parts=2)


def append_latent(latent: Tensor, pool: Tensor, slots: Tensor) -> None:
    """Store latent rows in a latent cache, as `append` does.

    Parameters
    ----------
    latent : Tensor, any float type [n, dim]
    pool : Tensor, any float type [pages, tokens_per_block, dim]
    slots : Tensor, int32 or int64 [n], contiguous
    """
    rows = latent[:, None]
    _launch(rows, rows, pool[:, None, :, None], slots, parts=1)


def _launch(k: Tensor, v: Tensor, pool: Tensor, slots: Tensor, parts: int) -> None:
    check_layout(rows={"k": k, "v": v, "pool": pool}, whole={"slots": slots})
    n, heads, dim = k.shape
    padded = power_of_2(dim)
    block = min(power_of_2(heads), max(1, 2048 // padded))
    append_kernel[(n, -(-heads // block), parts)](
        k, v, pool, slots,
        k.stride(0), k.stride(1), v.stride(0), v.stride(1),
        pool.stride(0), pool.stride(1), pool.stride(2), pool.stride(3),
        HEADS=heads, DIM=dim, PADDED_DIM=padded, BLOCK_HEADS=block, TOKENS_PER_PAGE=pool.shape[2],
        num_warps=4, enable_fp_fusion=FUSION,
    )  # fmt: skip
