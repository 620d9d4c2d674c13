"""Attention of one query token per row over this rank's pages, split along the keys."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION, LOG2_E, check_layout, interpreted, power_of_2
from helix_gpu.attention.kernels.paging import converted, key_pointers, read_pages, split_bounds
from helix_gpu.attention.kernels.settings import DecodeSettings, decode_settings


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def decode_kernel(  # type: ignore[no-untyped-def]
    q, pool, tables, starts, lengths,
    partial_out, partial_lse2,
    scale_log2e,
    q_row, q_head,
    pool_page, pool_part, pool_token, pool_head,
    table_row,
    out_split, out_row, lse_split, lse_row,
    group, head_blocks,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr,
    WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_HEADS query heads of one KV head, one split, one row.

    KV heads run fastest over the grid, since the heads of a token lie side by side in memory.
    """
    kv_head, first_head = tl.program_id(0) // head_blocks, tl.program_id(0) % head_blocks
    split, row = tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)

    in_group = first_head * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head = kv_head * group + in_group
    head_there = in_group < group
    dim = tl.arange(0, PADDED_DIM)
    there = head_there[:, None] & (dim < DIM)[None, :]
    lse_at = partial_lse2 + split * lse_split + row * lse_row + head

    first = 0
    if WINDOWED:
        first = tl.load(starts + row).to(tl.int32)
    begin, end = split_bounds(first, tl.load(lengths + row).to(tl.int32), BLOCK)
    # A split without keys says so, and its output is never read.
    if begin >= end:
        tl.store(lse_at, tl.full([BLOCK_HEADS], float("-inf"), tl.float32), mask=head_there)
        return

    query = tl.load(q + row * q_row + head[:, None] * q_head + dim[None, :], mask=there, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    output = tl.zeros([BLOCK_HEADS, PADDED_DIM], tl.float32)

    table = tables + row * table_row
    keys_of_head = pool + kv_head.to(tl.int64) * pool_head
    # Page numbers are read one block ahead: were they read where they are used, the loads of K
    # and V would wait for them and the compiler would keep half as many in flight.
    pages = read_pages(table, begin, end, TOKENS_PER_PAGE, BLOCK)
    for start in range(begin, end, BLOCK):
        keys_at = dim[None, :] + key_pointers(
            keys_of_head, pages, start, pool_page, pool_token, TOKENS_PER_PAGE, BLOCK
        )
        pages = read_pages(table, start + BLOCK, end, TOKENS_PER_PAGE, BLOCK)

        # What is not this row's is read as 0: it may be NaN, which a weight of 0 would not
        # silence. Every block has at least one key, so `new_top` is finite.
        seen = start + tl.arange(0, BLOCK) < end
        if WINDOWED:
            seen = seen & (start + tl.arange(0, BLOCK) >= first)
        readable = seen[:, None] & (dim < DIM)[None, :]
        keys = converted(tl.load(keys_at, mask=readable, other=0.0), q.dtype.element_ty)
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2e
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)

        values = tl.load(keys_at + pool_part, mask=readable, other=0.0)
        values = converted(values, q.dtype.element_ty)
        if UPCAST or WIDE:
            values = values.to(tl.float32)
        weights = weights.to(values.dtype)
        output = tl.dot(weights, values, output * fade[:, None], input_precision="ieee")
        top = new_top

    out_at = partial_out + split * out_split + row * out_row
    tl.store(out_at + head[:, None] * DIM + dim[None, :], output / total[:, None], mask=there)
    tl.store(lse_at, top + tl.log2(total), mask=head_there)


def decode(
    q: Tensor,
    pool: Tensor,
    tables: Tensor,
    lengths: Tensor,
    partial_out: Tensor,
    partial_lse2: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    wide: bool = False,
    settings: DecodeSettings | None = None,
) -> None:
    """Write the attention of `q` over slots `starts[i]` to `lengths[i]` of each row, in S splits.

    What a row sees is divided, and no page before it is read. The splits are for `reduce_pack`
    alone: one without keys has the log-sum-exp -inf and an output that was never written.

    Parameters
    ----------
    q : Tensor, any float type [n, q_heads, head_dim]
    pool : Tensor, q's type or 8 bits [pages, 2, tokens_per_block, kv_heads, head_dim]
        K, then V. Any strides, the last 1.
    tables : Tensor, integers [n, width]
        Page numbers in local order, read no further than the length.
    lengths : Tensor, integers below 2**31 [n], contiguous
        The slot behind the last one that a row sees.
    partial_out : Tensor, float32 [S, n, q_heads, head_dim], contiguous
        The splits' normalised outputs.
    partial_lse2 : Tensor, float32 [S, n, q_heads], contiguous
        Their log-sum-exps *to base 2*.
    starts : Tensor, integers below 2**31 [n], contiguous, optional
        The first slot that a row sees; 0 unless given. One that is not below the length sees none.
    scale : float, optional
        Of the scores; 1 / sqrt(head_dim) unless given.
    wide : bool
        Whether the P·V product is in float32, which matrix units do not multiply, and not in q's
        type.
    settings : DecodeSettings, optional
        How it is launched; `decode_settings` unless given.

    Raises
    ------
    ValueError
        For other strides.
    """
    windowed, starts = starts is not None, lengths if starts is None else starts
    check_layout(
        rows={"q": q, "pool": pool, "tables": tables},
        whole={
            "lengths": lengths, "starts": starts,
            "partial_out": partial_out, "partial_lse2": partial_lse2,
        },
    )  # fmt: skip
    n, q_heads, head_dim = q.shape
    kv_heads = pool.shape[3]
    group, splits = q_heads // kv_heads, partial_out.shape[0]
    product = torch.float32 if wide else q.dtype
    settings = settings or decode_settings(head_dim, product, pool.dtype)
    block_heads = settings.heads_of(group)
    head_blocks = -(-group // block_heads)
    scale = head_dim**-0.5 if scale is None else scale
    decode_kernel[(kv_heads * head_blocks, splits, n)](
        q, pool, tables, starts, lengths,
        partial_out, partial_lse2,
        scale * LOG2_E,
        q.stride(0), q.stride(1),
        pool.stride(0), pool.stride(1), pool.stride(2), pool.stride(3),
        tables.stride(0),
        partial_out.stride(0), partial_out.stride(1),
        partial_lse2.stride(0), partial_lse2.stride(1),
        group, head_blocks,
        DIM=head_dim, PADDED_DIM=max(16, power_of_2(head_dim)), TOKENS_PER_PAGE=pool.shape[2],
        BLOCK=settings.block, BLOCK_HEADS=block_heads,
        # The interpreter multiplies the bit patterns of bfloat16 (Triton 3.6 and 3.9).
        UPCAST=interpreted(decode_kernel) and q.dtype == torch.bfloat16, WIDE=wide,
        WINDOWED=windowed,
        num_warps=settings.warps, num_stages=settings.stages, enable_fp_fusion=FUSION,
    )  # fmt: skip
