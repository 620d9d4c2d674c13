"""Attention of new tokens over this rank's pages, split along the keys."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION, LOG2_E, check_layout, interpreted, power_of_2
from helix_gpu.attention.kernels.narrow import decode_narrow, pairs
from helix_gpu.attention.kernels.paging import converted, key_pointers, read_pages, split_bounds
from helix_gpu.attention.kernels.results import as_stored, pointers, store_output
from helix_gpu.attention.kernels.settings import (
    DecodeSettings,
    decode_settings,
    narrow_settings,
)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def decode_kernel(  # type: ignore[no-untyped-def]
    q, pool, tables, starts, lengths, groups,
    partial_out, partial_lse2,
    scale_log2e,
    q_row, q_head,
    pool_page, pool_part, pool_token, pool_head,
    table_row,
    out_part, lse_part, heads_of_part,
    group, head_blocks,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr,
    BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr, TOKENS: tl.constexpr, PACKED: tl.constexpr,
    UPCAST: tl.constexpr, WIDE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program: up to BLOCK_HEADS query heads of one KV head, one split, one row.

    With TOKENS above 1 it is a group of so many rows at most, whose heads stand row after row. KV
    heads run fastest over the grid, since the heads of a token lie side by side in memory.
    """
    ITEMS: tl.constexpr = TOKENS * BLOCK_HEADS
    kv_head, first_head = tl.program_id(0) // head_blocks, tl.program_id(0) % head_blocks
    item = tl.arange(0, ITEMS)
    in_group = first_head * BLOCK_HEADS + item % BLOCK_HEADS
    head = kv_head * group + in_group
    head_there = in_group < group
    if TOKENS > 1:
        first_row = tl.load(groups + tl.program_id(2)).to(tl.int64)
        row = first_row + item // BLOCK_HEADS
        head_there &= row < tl.load(groups + tl.program_id(2) + 1)
        length = tl.load(lengths + row, mask=head_there, other=0).to(tl.int32)
        longest = tl.max(length, 0)
    else:
        first_row = tl.program_id(2).to(tl.int64)
        row = first_row
        longest = tl.load(lengths + row).to(tl.int32)
    dim = tl.arange(0, PADDED_DIM)
    there = head_there[:, None] & (dim < DIM)[None, :]
    lse_at = pointers(partial_lse2, row, head, lse_part, heads_of_part, 1, PACKED)

    first = 0
    if WINDOWED:
        first = tl.load(starts + row).to(tl.int32)
    begin, end = split_bounds(first, longest, BLOCK)
    # A split without keys says so, and its output is never read; a row without keys gives 0.
    if begin >= end:
        tl.store(lse_at, tl.full([ITEMS], float("-inf"), tl.float32), mask=head_there)
        if PACKED:
            zeros = tl.zeros([ITEMS, PADDED_DIM], tl.float32)
            store_output(
                partial_out, zeros, row, head, dim, there, out_part, heads_of_part, DIM, PACKED
            )
        return

    q_at = q + row * q_row + head * q_head
    query = tl.load(q_at[:, None] + dim[None, :], mask=there, other=0.0)
    if UPCAST:
        query = query.to(tl.float32)
    top = tl.full([ITEMS], float("-inf"), tl.float32)
    total = tl.zeros([ITEMS], tl.float32)
    output = tl.zeros([ITEMS, PADDED_DIM], tl.float32)

    table = tables + first_row * table_row
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
        # silence.
        key = start + tl.arange(0, BLOCK)
        seen = key < end
        if WINDOWED:
            seen = seen & (key >= first)
        readable = seen[:, None] & (dim < DIM)[None, :]
        keys = converted(tl.load(keys_at, mask=readable, other=0.0), q.dtype.element_ty)
        if UPCAST:
            keys = keys.to(tl.float32)
        scores = tl.dot(query, tl.trans(keys), input_precision="ieee") * scale_log2e
        if TOKENS > 1:
            scores = tl.where(key[None, :] < length[:, None], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            # An earlier row of the group may have no key in this block, nor in this split.
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        else:
            # Every block has at least one key, so `new_top` is finite.
            scores = tl.where(seen[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            reference = new_top
        weights = tl.exp2(scores - reference[:, None])
        fade = tl.exp2(top - reference)
        total = total * fade + tl.sum(weights, 1)

        values = tl.load(keys_at + pool_part, mask=readable, other=0.0)
        values = converted(values, q.dtype.element_ty)
        if UPCAST or WIDE:
            values = values.to(tl.float32)
        weights = weights.to(values.dtype)
        output = tl.dot(weights, values, output * fade[:, None], input_precision="ieee")
        top = new_top

    output = output / tl.where(total == 0, 1.0, total)[:, None]
    store_output(partial_out, output, row, head, dim, there, out_part, heads_of_part, DIM, PACKED)
    tl.store(lse_at, as_stored(top + tl.log2(total), PACKED), mask=head_there)


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
    packed: bool = False,
    groups: Tensor | None = None,
    tokens: int = 1,
    settings: DecodeSettings | None = None,
) -> None:
    """Write the attention of `q` over slots `starts[i]` to `lengths[i]` of each row, in S splits.

    What a row sees is divided, and no page before it is read. The splits are for `reduce_pack`
    alone: one without keys has the log-sum-exp -inf and an output that was never written. A single
    one needs no joining: with `packed` it is written as `reduce_pack` would.

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
    packed : bool
        Whether `partial_out` and `partial_lse2` are instead what `partials.unpack` makes of a send
        buffer, [ranks, n, q_heads / ranks, head_dim] and [ranks, n, q_heads / ranks], in any float
        type and with natural log-sum-exps. Keys are not split then.
    groups : Tensor, integers [groups + 1], contiguous, optional
        First row of each group, and behind the last one n. The rows of a group are consecutive
        tokens of one request, each of which sees no less than the one before it; they read each key
        together. Groups may be empty.
    tokens : int
        Rows of a group, at most; needed with `groups`.
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
            "partial_out": partial_out[0], "partial_lse2": partial_lse2[0],
        } | ({} if groups is None else {"groups": groups}),
    )  # fmt: skip
    n, q_heads, head_dim = q.shape
    kv_heads = pool.shape[3]
    group, splits = q_heads // kv_heads, 1 if packed else partial_out.shape[0]
    product = torch.float32 if wide else q.dtype
    scale = head_dim**-0.5 if scale is None else scale
    # Rows that see keys from one on are read one by one, 8 bits by elements.
    groups = None if windowed else groups
    paired = pairs(pool, product) if groups is None and not windowed else None
    if paired is not None:
        decode_narrow(
            q, paired, tables, lengths, partial_out, partial_lse2,
            scale=scale, packed=packed, settings=settings or narrow_settings(head_dim),
        )  # fmt: skip
        return
    settings = settings or decode_settings(head_dim, product, pool.dtype)
    tokens = 1 if groups is None else power_of_2(tokens)
    block_heads = settings.heads_of(group, tokens)
    head_blocks = -(-group // block_heads)
    decode_kernel[(kv_heads * head_blocks, splits, n if groups is None else len(groups) - 1)](
        q, pool, tables, starts, lengths, groups,
        partial_out, partial_lse2,
        scale * LOG2_E,
        q.stride(0), q.stride(1),
        pool.stride(0), pool.stride(1), pool.stride(2), pool.stride(3),
        tables.stride(0),
        partial_out.stride(0), partial_lse2.stride(0), partial_out.shape[2],
        group, head_blocks,
        DIM=head_dim, PADDED_DIM=max(16, power_of_2(head_dim)), TOKENS_PER_PAGE=pool.shape[2],
        BLOCK=settings.block, BLOCK_HEADS=block_heads, TOKENS=tokens, PACKED=packed,
        # The interpreter multiplies the bit patterns of bfloat16 (Triton 3.6 and 3.9).
        UPCAST=interpreted(decode_kernel) and q.dtype == torch.bfloat16, WIDE=wide,
        WINDOWED=windowed,
        num_warps=settings.warps, num_stages=settings.stages, enable_fp_fusion=FUSION,
    )  # fmt: skip
