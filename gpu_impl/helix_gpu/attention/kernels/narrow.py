"""8-bit caches read two elements at a time: parts of the attention kernels.

Elements 2d and 2d + 1 of a key are one 16-bit number. It travels as bfloat16 does, by copies and
loads that 8 bits do not have, and becomes two elements of float16 on its way to the matrix units,
which holds every e4m3 number, subnormals included; NaN stays NaN. Products are of float16 whatever
the query's type is: a query of bfloat16 is scaled row by row to the top of float16's range, where
what is lost of an element is at most 2**-40 of the row's largest.
"""

from __future__ import annotations

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION, LOG2_E, interpreted, power_of_2
from helix_gpu.attention.kernels.paging import key_pointers, read_pages, split_bounds
from helix_gpu.attention.kernels.results import as_stored, pointers, store_output
from helix_gpu.attention.kernels.settings import DecodeSettings


def pairs(pool: Tensor, product: torch.dtype) -> Tensor | None:
    """Return a pool of e4m3 as 16-bit pairs, or None where it is none or cannot be read so.

    Parameters
    ----------
    pool : Tensor, any float type [..., dim]
    product : torch.dtype
        Type of the products.

    Returns
    -------
    Tensor, int16 [..., dim / 2], or None
    """
    if pool.dtype != torch.float8_e4m3fn or product not in (torch.bfloat16, torch.float16):
        return None
    if any(size % 2 for size in (pool.storage_offset(), pool.shape[-1], *pool.stride()[:-1])):
        return None
    return pool.view(torch.int16)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def unpaired(pair, INTERPRETED: tl.constexpr):  # type: ignore[no-untyped-def]
    """Even and odd elements in float16."""
    if INTERPRETED:
        even, odd = _element(pair), _element(pair >> 8)
    else:
        # Two pairs a register: bytes 0 and 2 side by side, then bytes 1 and 3.
        even, odd = tl.inline_asm_elementwise(
            """
            {
            .reg .b32 bytes;
            .reg .b16 low, high;
            prmt.b32 bytes, $2, 0, 0x3120;
            mov.b32 {low, high}, bytes;
            cvt.rn.f16x2.e4m3x2 $0, low;
            cvt.rn.f16x2.e4m3x2 $1, high;
            }
            """,
            "=r,=r,r", [pair], (tl.float16, tl.float16), True, 2,
        )  # fmt: skip
    return even, odd


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def _element(pair):  # type: ignore[no-untyped-def]
    """The low element of each pair; the interpreter's own conversion makes NaN 480."""
    bits = pair.to(tl.int32) & 0xFF
    sign, number = bits >> 7, bits & 0x7F
    number = tl.where(number == 0x7F, 0x7F80, number << 7)
    element = ((sign << 15) | number).to(tl.int16).to(tl.float16, bitcast=True)
    return element * 256.0  # what the biases differ


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def power(exponent):  # type: ignore[no-untyped-def]
    """2 ** exponent in float32, for integers from -126 to 127."""
    return ((exponent + 127) << 23).to(tl.float32, bitcast=True)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def exponent_of(q_even, q_odd):  # type: ignore[no-untyped-def]
    """Exponent of each row's largest element, at least -111."""
    larger = tl.maximum(tl.abs(q_even.to(tl.float32)), tl.abs(q_odd.to(tl.float32)))
    exponent = (tl.max(larger, 1).to(tl.int32, bitcast=True) >> 23) - 127
    return tl.minimum(tl.maximum(exponent, -111), 127)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def narrow_kernel(  # type: ignore[no-untyped-def]
    q, pool, tables, lengths,
    partial_out, partial_lse2,
    scale_log2e,
    q_row, q_head,
    pool_page, pool_part, pool_token, pool_head,
    table_row,
    out_part, lse_part, heads_of_part,
    group, head_blocks,
    DIM: tl.constexpr, PADDED_DIM: tl.constexpr, ROPE: tl.constexpr, LATENT: tl.constexpr,
    TOKENS_PER_PAGE: tl.constexpr, BLOCK: tl.constexpr, BLOCK_HEADS: tl.constexpr,
    PACKED: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """One program: what `decode_kernel` does, or `mla_kernel` where LATENT, with pairs of elements.

    Queries and outputs are kept in two parts, of the even and of the odd elements. DIM counts those
    of a value; a key has ROPE more behind it.
    """
    HALF: tl.constexpr = PADDED_DIM // 2
    kv_head, first_head = tl.program_id(0) // head_blocks, tl.program_id(0) % head_blocks
    row = tl.program_id(2).to(tl.int64)

    in_group = first_head * BLOCK_HEADS + tl.arange(0, BLOCK_HEADS)
    head = kv_head * group + in_group
    head_there = in_group < group
    dim, pair = tl.arange(0, PADDED_DIM), tl.arange(0, HALF)
    there = head_there[:, None] & (dim < DIM)[None, :]
    lse_at = pointers(partial_lse2, row, head, lse_part, heads_of_part, 1, PACKED)

    begin, end = split_bounds(0, tl.load(lengths + row).to(tl.int32), BLOCK)
    if begin >= end:
        tl.store(lse_at, tl.full([BLOCK_HEADS], float("-inf"), tl.float32), mask=head_there)
        if PACKED:
            zeros = tl.zeros([BLOCK_HEADS, PADDED_DIM], tl.float32)
            store_output(
                partial_out, zeros, row, head, dim, there, out_part, heads_of_part, DIM, PACKED
            )
        return

    q_at = q + row * q_row + head[:, None] * q_head + 2 * pair[None, :]
    inside = (pair < DIM // 2)[None, :]
    even = tl.load(q_at, mask=head_there[:, None] & inside, other=0.0)
    odd = tl.load(q_at + 1, mask=head_there[:, None] & inside, other=0.0)
    exponent = exponent_of(even, odd)
    if ROPE > 0:
        rope = tl.arange(0, ROPE // 2)
        rope_at = q + row * q_row + head[:, None] * q_head + DIM + 2 * rope[None, :]
        rope_even = tl.load(rope_at, mask=head_there[:, None], other=0.0)
        rope_odd = tl.load(rope_at + 1, mask=head_there[:, None], other=0.0)
        exponent = tl.maximum(exponent, exponent_of(rope_even, rope_odd))
    grown = power(15 - exponent)[:, None]
    even, odd = scaled(even, grown), scaled(odd, grown)
    if ROPE > 0:
        rope_even, rope_odd = scaled(rope_even, grown), scaled(rope_odd, grown)
    row_scale = power(exponent - 15)[:, None]

    top = tl.full([BLOCK_HEADS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_HEADS], tl.float32)
    output_even = tl.zeros([BLOCK_HEADS, HALF], tl.float32)
    output_odd = tl.zeros([BLOCK_HEADS, HALF], tl.float32)

    table = tables + row * table_row
    keys_of_head = pool + kv_head.to(tl.int64) * pool_head
    pages = read_pages(table, begin, end, TOKENS_PER_PAGE, BLOCK)
    for start in range(begin, end, BLOCK):
        keys_at = key_pointers(
            keys_of_head, pages, start, pool_page, pool_token, TOKENS_PER_PAGE, BLOCK
        )
        pages = read_pages(table, start + BLOCK, end, TOKENS_PER_PAGE, BLOCK)

        # As in `decode_kernel`: what is not this row's is 0, and every block has a key.
        seen = start + tl.arange(0, BLOCK) < end
        readable = seen[:, None] & inside
        keys = tl.load(keys_at + pair[None, :], mask=readable, other=0)
        keys_even, keys_odd = unpaired(keys, INTERPRETED)
        scores = tl.dot(even, tl.trans(keys_even), input_precision="ieee")
        scores = tl.dot(odd, tl.trans(keys_odd), scores, input_precision="ieee")
        if ROPE > 0:
            turned = tl.load(keys_at + DIM // 2 + rope[None, :], mask=seen[:, None], other=0)
            turned_even, turned_odd = unpaired(turned, INTERPRETED)
            scores = tl.dot(rope_even, tl.trans(turned_even), scores, input_precision="ieee")
            scores = tl.dot(rope_odd, tl.trans(turned_odd), scores, input_precision="ieee")
        scores = scores * scale_log2e * row_scale
        scores = tl.where(seen[None, :], scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        weights = tl.exp2(scores - new_top[:, None])
        fade = tl.exp2(top - new_top)
        total = total * fade + tl.sum(weights, 1)

        values = keys
        if not LATENT:
            values = tl.load(keys_at + pool_part + pair[None, :], mask=readable, other=0)
        values_even, values_odd = unpaired(values, INTERPRETED)
        # 2 ** 15 times, so that many small ones are not rounded to 0 together.
        weights = (weights * 32768.0).to(tl.float16)
        output_even = tl.dot(
            weights, values_even, output_even * fade[:, None], input_precision="ieee"
        )
        output_odd = tl.dot(weights, values_odd, output_odd * fade[:, None], input_precision="ieee")
        top = new_top

    share = 1.0 / 32768.0 / total
    output = tl.interleave(output_even * share[:, None], output_odd * share[:, None])
    store_output(partial_out, output, row, head, dim, there, out_part, heads_of_part, DIM, PACKED)
    tl.store(lse_at, as_stored(top + tl.log2(total), PACKED), mask=head_there)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def scaled(query, factor):  # type: ignore[no-untyped-def]
    """A query times powers of 2, in float16."""
    return (query.to(tl.float32) * factor).to(tl.float16)


def decode_narrow(
    q: Tensor,
    pool: Tensor,
    tables: Tensor,
    lengths: Tensor,
    partial_out: Tensor,
    partial_lse2: Tensor,
    *,
    scale: float,
    packed: bool,
    settings: DecodeSettings,
) -> None:
    """Do what `decode`, or for a single part of the pool `decode_latent`, does with such arguments.

    Parameters
    ----------
    q : Tensor, float16 or bfloat16 [n, q_heads, key_dim]
    pool : Tensor, int16 [pages, parts, tokens_per_block, kv_heads, key_dim / 2]
        As `pairs` makes it. K, then V; or one part, a latent and what is rotated of it.
    tables, lengths, partial_out, partial_lse2, scale, packed, settings
        As `decode` takes them.
    """
    n, q_heads, key_dim = q.shape
    group, dim = q_heads // pool.shape[3], partial_out.shape[3]
    block_heads = settings.heads_of(group)
    head_blocks = -(-group // block_heads)
    splits = 1 if packed else partial_out.shape[0]
    narrow_kernel[(pool.shape[3] * head_blocks, splits, n)](
        q, pool, tables, lengths, partial_out, partial_lse2,
        scale * LOG2_E,
        q.stride(0), q.stride(1),
        pool.stride(0), pool.stride(1), pool.stride(2), pool.stride(3),
        tables.stride(0),
        partial_out.stride(0), partial_lse2.stride(0), partial_out.shape[2],
        group, head_blocks,
        DIM=dim, PADDED_DIM=max(32, power_of_2(dim)), ROPE=key_dim - dim,
        LATENT=pool.shape[1] == 1, TOKENS_PER_PAGE=pool.shape[2],
        BLOCK=settings.block, BLOCK_HEADS=block_heads,
        PACKED=packed, INTERPRETED=interpreted(narrow_kernel),
        num_warps=settings.warps, num_stages=settings.stages, enable_fp_fusion=FUSION,
    )  # fmt: skip
