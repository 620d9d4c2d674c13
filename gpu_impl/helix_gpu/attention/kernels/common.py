"""What every kernel module uses."""

from __future__ import annotations

from typing import Final

from torch import Tensor
from triton.runtime.jit import (  # type: ignore[import-untyped,import-not-found,unused-ignore]
    JITFunction,
)

FUSION: Final = True
"""Whether a * b + c may be one operation. Triton 3.9 warns unless it is told."""

LOG2_E: Final = 1.4426950408889634
"""Scores are multiplied by it once, so that the kernels' exponentials are powers of 2."""


def interpreted(kernel: object) -> bool:
    """Return whether a kernel was made under TRITON_INTERPRET=1, and so runs on the CPU."""
    return not isinstance(kernel, JITFunction)


def power_of_2(n: int) -> int:
    """Return the least power of 2 that is n or more."""
    return 1 << max(n - 1, 0).bit_length()


def check_layout(*, rows: dict[str, Tensor], whole: dict[str, Tensor]) -> None:
    """Raise unless tensors lie in memory as the kernels take for granted.

    Parameters
    ----------
    rows : dict of str to Tensor
        By name: the elements of the last axis must be side by side.
    whole : dict of str to Tensor
        By name: all elements must be.

    Raises
    ------
    ValueError
        With the name and the strides.
    """
    for name, tensor in rows.items():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(
                f"The last axis of {name} has stride {tensor.stride(-1)}; it must have stride 1."
            )
    for name, tensor in whole.items():
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous.")
