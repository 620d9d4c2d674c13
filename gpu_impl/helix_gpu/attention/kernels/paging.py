"""Where the keys of a block lie, and how they are read: parts of the attention kernels."""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def split_bounds(first, length, BLOCK: tl.constexpr):  # type: ignore[no-untyped-def]
    """Where this program's split begins, and its end; no keys where the end is not beyond.

    Every split gets the same number of whole blocks of those in which this row sees a key; the last
    ones get fewer, or none. Of the first block the row may not see the keys before `first`.
    """
    seen_from = first // BLOCK * BLOCK
    length = tl.where(first < length, length, 0)
    share = tl.cdiv(tl.maximum(tl.cdiv(length - seen_from, BLOCK), 0), tl.num_programs(1)) * BLOCK
    begin = seen_from + tl.program_id(1) * share
    return begin, tl.minimum(begin + share, length)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def read_pages(  # type: ignore[no-untyped-def]
    table, start, end, TOKENS_PER_PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """Page number of the block of keys at `start`, or of each key where pages are smaller.

    Nothing is read at `end` or beyond.
    """
    if TOKENS_PER_PAGE % BLOCK == 0:
        pages = tl.load(table + start // TOKENS_PER_PAGE, mask=start < end, other=0)
    else:
        key = start + tl.arange(0, BLOCK)
        pages = tl.load(table + key // TOKENS_PER_PAGE, mask=key < end, other=0)
    return pages


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def key_pointers(  # type: ignore[no-untyped-def]
    pool, pages, start, pool_page, pool_token, TOKENS_PER_PAGE: tl.constexpr, BLOCK: tl.constexpr
):
    """[BLOCK, 1] pointers to the first element of each key; `pages` from `read_pages`."""
    # int64: a pool may hold more than 2**31 elements.
    key = tl.arange(0, BLOCK)
    if TOKENS_PER_PAGE % BLOCK == 0:
        first = pool + pages.to(tl.int64) * pool_page + start % TOKENS_PER_PAGE * pool_token
        pointers = first + key[:, None] * pool_token
    else:
        offset = pages.to(tl.int64) * pool_page + (start + key) % TOKENS_PER_PAGE * pool_token
        pointers = pool + offset[:, None]
    return pointers


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def converted(cached, DTYPE: tl.constexpr):  # type: ignore[no-untyped-def]
    """Cached elements in the query's type, exactly.

    8 bits become bfloat16 by way of float16 and float32: those conversions are among Hopper's fast
    ones, and the one from float16 to bfloat16 is not. It was more than a fifth of a step's time.
    """
    if cached.dtype.primitive_bitwidth == 8:
        cached = cached.to(tl.float16)
        if tl.bfloat16 == DTYPE:
            cached = cached.to(tl.float32)
    return cached.to(DTYPE)
