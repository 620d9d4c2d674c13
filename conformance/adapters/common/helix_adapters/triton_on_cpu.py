"""What Triton's interpreter lacks for the kernels of engines; tried with triton 3.9.0."""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter


def mend() -> None:
    """Let interpreted kernels list their constexprs, load masks, and round as a GPU does.

    vLLM's launcher reads `constexprs` of a kernel, which the interpreter does not keep. A
    boolean that was loaded from memory stays int8 there, and numpy then takes it for an index.
    From float32 to bfloat16 the interpreter cuts bits off, where hardware rounds to nearest.
    """
    if getattr(mend, "done", False):
        return
    mend.done = True  # type: ignore[attr-defined]  # a second wrapping would do no harm, only cost
    function: Any = interpreter.InterpretedFunction
    if not hasattr(function, "constexprs"):
        function.constexprs = property(_constexprs)
    builder: Any = interpreter.InterpreterBuilder
    load, store = builder.create_masked_load, builder.create_masked_store
    builder.create_masked_load = lambda self, pointers, mask, *rest: load(
        self, pointers, _boolean(mask), *rest
    )
    builder.create_masked_store = lambda self, pointers, value, mask, *rest: store(
        self, pointers, value, _boolean(mask), *rest
    )
    convert = interpreter._convert_float

    def converted(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if (source, target) == (tl.float32, tl.bfloat16):
            return _to_bfloat16(values)
        return convert(values, source, target, rounding_mode)

    interpreter._convert_float = converted


def _to_bfloat16(values: Any) -> Any:
    """The bits of float32 numbers rounded to bfloat16, ties to even."""
    bits = np.ascontiguousarray(values).view(np.uint32).reshape(np.shape(values))
    even = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    quiet = (bits >> 16) | 0x40
    return np.where(np.isnan(values), quiet, even).astype(np.uint16)


def _constexprs(function: Any) -> list[int]:
    annotations = getattr(function.fn, "__annotations__", {})
    names = [name for name in function.arg_names if "constexpr" in str(annotations.get(name, ""))]
    return [function.arg_names.index(name) for name in names]


def _boolean(mask: Any) -> Any:
    if mask is not None and mask.data.dtype != np.bool_:
        mask.data = (mask.data & 1).astype(np.bool_)
    return mask
