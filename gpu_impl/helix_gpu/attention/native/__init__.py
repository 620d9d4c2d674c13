"""`paged.attend_pages` in C++: for a CPU that serves, where there is a compiler.

Torch's own operation reads a cache at a third of the memory's bandwidth; this one is bound by it.
It is built at first use with torch's extension tools and kept in their cache. Nothing requires it:
`available` says whether it is there.
"""

from __future__ import annotations

import ctypes
import functools
import os
import shutil
import subprocess
from hashlib import sha256
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor

from helix_gpu.attention import paged

NAMES: Final = {
    torch.float32: "attend_float32",
    torch.bfloat16: "attend_bfloat16",
    torch.float16: "attend_float16",
}
"""Cache types that the operation reads."""
LANES: Final = 16
"""Head dimensions must divide by it."""


class _Sizes(ctypes.Structure):
    """As in attend_pages.cpp; strides in elements."""

    _fields_ = (
        *(
            (name, ctypes.c_int64)
            for name in (
                "rows", "width", "q_heads", "kv_heads", "group", "key_dim", "value_dim",
                "tokens_per_block", "page_stride", "part_stride", "token_stride",
            )
        ),
        ("scale", ctypes.c_float),
        ("softcap", ctypes.c_float),
    )  # fmt: skip


@functools.cache
def available() -> bool:
    """Return whether the operation is built, or can be.

    It takes ninja, a C++ compiler with OpenMP, and a folder for torch's extensions; where one of
    them is missing or fails, `paged.attend_pages` does its work.
    """
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if compiler is None or shutil.which("ninja") is None:
        return False
    try:
        _library()
    except (ImportError, OSError, RuntimeError, subprocess.CalledProcessError):
        return False
    return True


def attend_pages(
    q: Tensor,
    pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    value_dim: int | None = None,
    layer: int | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return what `paged.attend_pages` returns, for the same arguments and with the same errors.

    It calls that function for types and head dimensions that it does not know.

    Parameters
    ----------
    q, pages, tables, lengths, starts, scale, softcap, value_dim
        As `paged.attend_pages` takes them.
    layer, positions
        Not looked at: all layers attend alike, to all positions.

    Returns
    -------
    output : Tensor, float32 [n, q_heads, value_dim]
    lse : Tensor, float32 [n, q_heads]
    """
    n, q_heads, key_dim = q.shape
    value_dim = value_dim or key_dim
    name = NAMES.get(pages.dtype)
    if name is None or key_dim % LANES or value_dim % LANES or not available():
        return paged.attend_pages(
            q, pages, tables, lengths,
            starts=starts, scale=scale, softcap=softcap, value_dim=value_dim,
        )  # fmt: skip
    if pages.stride()[-2:] != (key_dim, 1):
        pages = pages.contiguous()
    parts, t, kv_heads = pages.shape[1:4]
    if q.dtype == pages.dtype == torch.bfloat16:
        name += "_alike"  # a processor may multiply them as they are
    else:
        q = q.float()
    q = q.contiguous()
    starts = torch.zeros_like(lengths) if starts is None else starts
    given = (q, pages, *(x.contiguous() for x in (tables, starts, lengths)))
    output = torch.empty((n, q_heads, value_dim), dtype=torch.float32)
    lse = torch.empty((n, q_heads), dtype=torch.float32)
    sizes = _Sizes(
        n, tables.shape[1], q_heads, kv_heads, q_heads // kv_heads, key_dim, value_dim, t,
        pages.stride(0), pages.stride(1) * (parts - 1), pages.stride(2),
        scale or key_dim**-0.5, softcap or 0,
    )  # fmt: skip
    addresses = (ctypes.c_void_p(x.data_ptr()) for x in (*given, output, lse))
    getattr(_library(), name)(ctypes.byref(sizes), *addresses)
    return output, lse


@functools.cache
def _library() -> Any:
    from torch.utils.cpp_extension import load

    source = Path(__file__).with_name("attend_pages.cpp")
    # Another version of the source, whose arguments are others, may be built in the same folder.
    path = load(
        f"helix_gpu_native_{_processor()}_{sha256(source.read_bytes()).hexdigest()[:8]}",
        [str(source)],
        extra_cflags=["-O3", "-march=native", "-std=c++20", "-fopenmp"],
        is_python_module=False,
    )
    return ctypes.CDLL(path)


def _processor() -> str:
    """A name for this very processor: the folder of extensions may be shared."""
    compiler = os.environ.get("CXX", "c++")
    macros = subprocess.run(
        [compiler, "-march=native", "-dM", "-E", "-x", "c++", os.devnull],
        capture_output=True,
        check=True,
    ).stdout
    return sha256(macros).hexdigest()[:8]
