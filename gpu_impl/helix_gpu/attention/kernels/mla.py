"""Absorbed attention over a latent cache (MLA): one latent per token, all heads read it."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION, LOG2_E, check_layout, interpreted
from helix_gpu.attention.kernels.narrow import decode_narrow, pairs
from helix_gpu.attention.kernels.paging import converted, key_pointers, read_pages, split_bounds
from helix_gpu.attention.kernels.results import as_stored, pointers, store_output
from helix_gpu.attention.kernels.settings import DecodeSettings, latent_settings


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def mla_kernel(  # type: ignore[no-untyped-def]
    q, pool, tables, starts, lengths,
    partial_out, partial_lse2,
    scale_log2e,
    q_row, q_head, pool_page, table_row,
    out_part, lse_part, heads_of_part,
    heads,
    LATENT: tl.constexpr, ROPE: tl.constexpr, TOKENS_PER_PAGE: tl.constexpr,
    POOL_TOKEN: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    PACKED: tl.constexpr, UPCAST: tl.constexpr, WIDE: tl.constexpr, WINDOWED: tl.constexpr,
):  # fmt: skip
    """One program: BLOCK_HEADS query heads, one split, one row; see `decode_kernel`.

    It differs in that a key is (latent, rope) and its value the latent, read once for both.
    """
    row = tl.program_id(2).to(tl.int64)
    head = tl.program_id(0) * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head_there = head < heads
    in_latent = tl.arange(0, LATENT)
    lse_at = pointers(partial_lse2, row, head, lse_part, heads_of_part, 1, PACKED)

    first = 0
    if WINDOWED:
        first = tl.load(starts + row).to(tl.int32)
    begin, end = split_bounds(first, tl.load(lengths + row).to(tl.int32), BLOCK)
    if begin >= end:
        tl.store(lse_at, tl.full([BLOCK_HEADS], float("-inf"), tl.float32), mask=head_there)
        if PACKED:
            store_output(
                partial_out, tl.zeros([BLOCK_HEADS, LATENT], tl.float32), row, head, in_latent,
                head_there[:, None], out_part, heads_of_part, LATENT, PACKED,
            )  # fmt: skip
        return

    q_at = q + row * q_row + head[:, None] * q_head
    q_latent = tl.load(q_at + in_latent[None, :], mask=head_there[:, None], other=0.0)
    if UPCAST:
        q_latent = q_latent.to(tl.float32)
    if ROPE > 0:
        in_rope = tl.arange(0, ROPE)
        q_rope = tl.load(q_at + LATENT + in_rope[None, :], mask=head_there[:, None], other=0.0)
        if UPCAST:
            q_rope = q_rope.to(tl.float32)
    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    output = tl.zeros([BLOCK_HEADS, LATENT], tl.float32)

    table = tables + row * table_row
    pages = read_pages(table, begin, end, TOKENS_PER_PAGE, BLOCK)
    # The sums leave few registers. What is the same in every turn of the loop, the addresses of q's
    # tiles above all, would take them and spill, were it computed before (Triton 3.9, 280 bytes a
    # thread); so would one address for each key, were the stride between keys not known.
    for start in tl.range(begin, end, BLOCK, disable_licm=True):
        keys_at = key_pointers(pool, pages, start, pool_page, POOL_TOKEN, TOKENS_PER_PAGE, BLOCK)
        pages = read_pages(table, start + BLOCK, end, TOKENS_PER_PAGE, BLOCK)
        seen = start + tl.arange(0, BLOCK) < end
        if WINDOWED:
            seen = seen & (start + tl.arange(0, BLOCK) >= first)
        latent = tl.load(keys_at + in_latent[None, :], mask=seen[:, None], other=0.0)
        latent = converted(latent, q.dtype.element_ty)
        values = latent
        if UPCAST:
            latent = latent.to(tl.float32)
        scores = tl.dot(q_latent, tl.trans(latent), input_precision="ieee")
        if ROPE > 0:
            rope = tl.load(keys_at + LATENT + in_rope[None, :], mask=seen[:, None], other=0.0)
            rope = converted(rope, q.dtype.element_ty)
            if UPCAST:
                rope = rope.to(tl.float32)
            scores = tl.dot(q_rope, tl.trans(rope), scores, input_precision="ieee")
        scores = scores * scale_log2e
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)
        if UPCAST or WIDE:
            values = values.to(tl.float32)
        weights = weights.to(values.dtype)
        output = tl.dot(weights, values, output * fade[:, None], input_precision="ieee")
        top = new_top

    store_output(
        partial_out, output / total[:, None], row, head, in_latent,
        head_there[:, None], out_part, heads_of_part, LATENT, PACKED,
    )  # fmt: skip
    tl.store(lse_at, as_stored(top + tl.log2(total), PACKED), mask=head_there)


def decode_latent(
    q: Tensor,
    pool: Tensor,
    tables: Tensor,
    lengths: Tensor,
    partial_out: Tensor,
    partial_lse2: Tensor,
    *,
    scale: float,
    starts: Tensor | None = None,
    wide: bool = False,
    packed: bool = False,
    settings: DecodeSettings | None = None,
) -> None:
    """Write the attention of `q` over a latent cache, as `decode` does.

    Parameters
    ----------
    q : Tensor, any float type [n, heads, latent + rope]
        The absorbed query, then its rotated part; both sizes powers of 2 (512 + 64); the
        second may be 0.
    pool : Tensor, q's type or 8 bits [pages, tokens_per_block, latent + rope]
    tables, lengths
        As `decode` takes them.
    partial_out : Tensor, float32 [S, n, heads, latent], contiguous
        Over the latent.
    partial_lse2 : Tensor, float32 [S, n, heads], contiguous
    scale : float
        The model's, 1 / sqrt(128 + 64) for DeepSeek, since the absorbed width does not tell it.
    starts, wide, packed
        As `decode` takes them.
    settings : DecodeSettings, optional
        How it is launched; `latent_settings` unless given.

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
        },
    )  # fmt: skip
    n, heads, dim = q.shape
    latent = partial_out.shape[3]
    settings = settings or latent_settings(heads, torch.float32 if wide else q.dtype, pool.dtype)
    paired = pairs(pool[:, None, :, None], torch.float32 if wide else q.dtype)
    # Matrix units take 16 dims at a time, and pairs are halves of what is rotated.
    if paired is not None and not windowed and heads <= 16 and not 0 < dim - latent < 32:
        decode_narrow(
            q, paired, tables, lengths, partial_out, partial_lse2,
            scale=scale, packed=packed, settings=settings,
        )  # fmt: skip
        return
    block_heads = settings.heads_of(heads)
    mla_kernel[(-(-heads // block_heads), 1 if packed else partial_out.shape[0], n)](
        q, pool, tables, starts, lengths,
        partial_out, partial_lse2,
        scale * LOG2_E,
        q.stride(0), q.stride(1), pool.stride(0), tables.stride(0),
        partial_out.stride(0), partial_lse2.stride(0), partial_out.shape[2],
        heads,
        LATENT=latent, ROPE=dim - latent, TOKENS_PER_PAGE=pool.shape[1],
        POOL_TOKEN=pool.stride(1), BLOCK=settings.block, BLOCK_HEADS=block_heads,
        PACKED=packed, UPCAST=interpreted(mla_kernel) and q.dtype == torch.bfloat16, WIDE=wide,
        WINDOWED=windowed,
        num_warps=settings.warps, num_stages=settings.stages, enable_fp_fusion=FUSION,
    )  # fmt: skip
