"""Where the results of a program go: parts of the attention kernels.

They lie in parts of rows. A part is a split of all heads, or in a send buffer (`PACKED`), for which
keys are not split, what one rank is sent: `heads_of_part` heads of every row.
"""

from __future__ import annotations

import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def pointers(  # type: ignore[no-untyped-def]
    results, row, head, part_stride, heads_of_part, DIM: tl.constexpr, PACKED: tl.constexpr
):
    """[heads] pointers to the first of a row's DIM elements for each head."""
    first = results + row * heads_of_part * DIM
    # Only here are offsets of 64 bits: they take registers that the sums of a program need.
    if PACKED:
        part = (head // heads_of_part).to(tl.int64) * part_stride
        at = first + part + head % heads_of_part * DIM
    else:
        at = first + tl.program_id(1).to(tl.int64) * part_stride + head * DIM
    return at


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def store_output(  # type: ignore[no-untyped-def]
    outputs, output, row, head, dim, there, out_part, heads_of_part,
    DIM: tl.constexpr, PACKED: tl.constexpr,
):  # fmt: skip
    """Store [heads, dims] of a row where `there`."""
    at = pointers(outputs, row, head, out_part, heads_of_part, DIM, PACKED)[:, None]
    tl.store(at + dim[None, :], output.to(outputs.dtype.element_ty), mask=there)


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def as_stored(lse2, PACKED: tl.constexpr):  # type: ignore[no-untyped-def]
    """A log-sum-exp to base 2 as it is stored: natural in a send buffer."""
    return lse2 * 0.6931471805599453 if PACKED else lse2
