"""The Triton kernels compile for sm_90 (H100, H200) into what was meant; no GPU is needed."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton has no wheel for this Python or platform", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: these kernels are interpreted", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from helix_gpu.attention.kernels.append import append_kernel
from helix_gpu.attention.kernels.decode import decode_kernel
from helix_gpu.attention.kernels.merge import merge_kernel
from helix_gpu.attention.kernels.mla import mla_kernel
from helix_gpu.attention.kernels.narrow import narrow_kernel
from helix_gpu.attention.kernels.reduce_pack import MOST_AT_ONCE, reduce_pack_kernel
from helix_gpu.attention.kernels.rope import rotate_kernel
from helix_gpu.attention.kernels.settings import decode_settings, latent_settings, narrow_settings
from helix_gpu.comm.push_kernels import BLOCK, PARTS, put_kernel, take_kernel

pytestmark = pytest.mark.slow

TOOL = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
ATTENTION = {
    "q": "*bf16", "pool": "*bf16", "tables": "*i32", "starts": "*i32", "lengths": "*i32",
    "groups": "*i32",
    "partial_out": "*fp32", "partial_lse2": "*fp32", "scale_log2e": "fp32",
}  # fmt: skip


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    *,
    warps: int,
    stages: int = 2,
    odd: tuple[str, ...] = (),
    fusion: bool = True,
) -> Any:
    """The kernel for sm_90 as launched with these types: PTX, machine code and metadata.

    Parameters that `types` does not name are strides: 32-bit integers, and like the pointers
    multiples of 16, except those in `odd`.
    """
    names = kernel.arg_names
    signature = {
        name: "constexpr" if name in constants else types.get(name, "i32") for name in names
    }
    attributes = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if signature[name] not in ("constexpr", "fp32") and name not in odd
    }
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)
    # Triton 3.9 warns of a coming change where enable_fp_fusion is not given.
    options = {"num_warps": warps, "num_stages": stages, "enable_fp_fusion": fusion}
    return triton.compile(source, target=GPUTarget("cuda", 90, 32), options=options)


def check_resources(kernel: Any, folder: Path, spilled: int = 0) -> str:
    """No more spilled bytes a thread, and shared memory, than there may be; the machine code."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(kernel.asm["cubin"])
    report = subprocess.run(
        [TOOL, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True
    ).stdout
    stack, local = map(int, re.findall(r"(?:STACK|LOCAL):(\d+)", report))
    assert stack <= spilled and local == 0, report
    code = subprocess.run(
        [TOOL, "--dump-sass", cubin], capture_output=True, text=True, check=True
    ).stdout
    assert spilled or not re.search(r"\b(LDL|STL)\b", code)
    assert kernel.metadata.shared <= 227 * 1024
    return code


BYTES = {"fp32": 4, "bf16": 2, "fp16": 2, "fp8e4nv": 1}


@pytest.mark.parametrize(
    ("dtype", "cached", "dim", "page", "wide", "packed", "tokens"),
    [
        ("bf16", "bf16", 128, 64, False, False, 1),
        ("bf16", "bf16", 128, 64, False, True, 1),
        ("bf16", "bf16", 128, 64, False, False, 4),
        ("bf16", "bf16", 128, 64, False, True, 8),
        ("bf16", "bf16", 64, 64, False, False, 1),
        ("bf16", "bf16", 256, 64, False, False, 1),
        ("fp16", "fp16", 80, 16, False, True, 1),
        ("fp32", "fp32", 256, 64, True, True, 1),
        ("bf16", "bf16", 128, 64, True, False, 1),
        ("bf16", "fp8e4nv", 128, 64, False, False, 1),
        ("bf16", "fp8e4nv", 256, 64, False, False, 1),
        ("bf16", "fp8e4nv", 128, 16, False, False, 1),
        ("fp16", "fp8e4nv", 64, 16, False, False, 1),
    ],
)
def test_decode(
    dtype: str, cached: str, dim: int, page: int, wide: bool, packed: bool, tokens: int,
    tmp_path: Path,
) -> None:  # fmt: skip
    """K and V travel in 16-byte asynchronous copies, several blocks of them at a time.

    From 16-bit and 8-bit caches; where probabilities meet V in float32 too (`wide`), and where the
    one split is written as it is sent (`packed`), and where `tokens` of a request share them.
    """
    check_decode(dtype, cached, dim, page, wide, packed, tokens, tmp_path, windowed=False)


def check_decode(
    dtype: str, cached: str, dim: int, page: int, wide: bool, packed: bool, tokens: int,
    tmp_path: Path, *, windowed: bool,
) -> None:  # fmt: skip
    """What `test_decode` says, of one kernel."""
    narrow = torch.float8_e4m3fn if cached == "fp8e4nv" else None
    out = dtype if packed else "fp32"
    settings = decode_settings(dim, torch.float32 if wide else torch.bfloat16, narrow)
    kernel = compiled(
        decode_kernel,
        ATTENTION | {"q": f"*{dtype}", "pool": f"*{cached}", "partial_out": f"*{out}"},
        {
            "DIM": dim, "PADDED_DIM": triton.next_power_of_2(dim), "TOKENS_PER_PAGE": page,
            "BLOCK": settings.block, "BLOCK_HEADS": settings.heads_of(4, tokens),
            "TOKENS": tokens, "PACKED": packed,
            "UPCAST": False, "WIDE": wide, "WINDOWED": windowed,
        }
        | ({"groups": None} if tokens == 1 else {}),
        warps=settings.warps, stages=settings.stages,
        odd=("group", "groups", "head_blocks", "table_row", "heads_of_part"),
    )  # fmt: skip
    code = check_resources(kernel, tmp_path)
    copies = re.findall(r"\bLDGSTS\.(\S+)", code)
    assert "F2F.BF16.F16" not in code, "8 bits are converted by one of Hopper's slow ways"
    # A warp's share of a small block of 8 bits is less than 16 bytes a thread.
    assert copies and all(copy.endswith((".128", ".64")[: 1 + bool(narrow)]) for copy in copies)
    # One block of K and V for every stage but the one that is worked on.
    block_bytes = 2 * settings.block * triton.next_power_of_2(dim) * BYTES[cached]
    assert kernel.metadata.shared >= (settings.stages - 1) * block_bytes


@pytest.mark.parametrize(
    ("heads", "dtype", "cached", "page", "wide"),
    [
        (16, "bf16", "bf16", 64, False),
        (16, "bf16", "bf16", 32, False),
        (16, "fp16", "fp16", 128, False),
        *((128, dtype, cached, page, False)
          for dtype, cached in (("bf16", "bf16"), ("bf16", "fp8e4nv"), ("fp16", "fp8e4nv"))
          for page in (16, 32, 64, 128)),
        (128, "fp16", "fp16", 64, False),
        (128, "fp32", "fp32", 64, True),
        (128, "fp32", "fp8e4nv", 64, True),
        (128, "bf16", "bf16", 64, True),
        (128, "bf16", "fp8e4nv", 64, True),
    ],
)  # fmt: skip
def test_decode_latent(
    heads: int, dtype: str, cached: str, page: int, wide: bool, tmp_path: Path
) -> None:
    """DeepSeek's 512 + 64: on matrix units, except where products are float32.

    Hopper's take 64 heads at a time; 16 go to those that it shares with its ancestors.
    """
    check_decode_latent(heads, dtype, cached, page, wide, tmp_path, windowed=False)


def check_decode_latent(
    heads: int, dtype: str, cached: str, page: int, wide: bool, tmp_path: Path, *, windowed: bool
) -> None:
    """What `test_decode_latent` says, of one kernel."""
    narrow = torch.float8_e4m3fn if cached == "fp8e4nv" else None
    settings = latent_settings(heads, torch.float32 if wide else torch.bfloat16, narrow)
    kernel = compiled(
        mla_kernel,
        ATTENTION | {"q": f"*{dtype}", "pool": f"*{cached}"},
        {
            "LATENT": 512, "ROPE": 64, "TOKENS_PER_PAGE": page, "POOL_TOKEN": 576,
            "BLOCK": settings.block, "BLOCK_HEADS": settings.heads, "PACKED": False,
            "UPCAST": False, "WIDE": wide, "WINDOWED": windowed,
        },
        warps=settings.warps, stages=settings.stages, odd=("table_row", "heads_of_part"),
    )  # fmt: skip
    code = check_resources(kernel, tmp_path)
    assert "F2F.BF16.F16" not in code, "8 bits are converted by one of Hopper's slow ways"
    assert wide or ("LDGSTS.E" in code and ("HGMMA" if heads > 16 else "HMMA") in code)


@pytest.mark.parametrize(("heads", "cached"), [(16, "bf16"), (128, "fp8e4nv")])
def test_windows(heads: int, cached: str, tmp_path: Path) -> None:
    """A row that sees its keys from one on keeps the copies, the matrix units and the registers."""
    for packed in (False, True):
        check_decode("bf16", cached, 128, 64, False, packed, 1, tmp_path, windowed=True)
    check_decode_latent(heads, "bf16", cached, 64, False, tmp_path, windowed=True)


@pytest.mark.parametrize(
    ("dtype", "dim", "rope", "page"),
    [
        ("bf16", 16, 0, 64),
        ("fp16", 32, 32, 64),
        ("bf16", 128, 0, 64),
        ("bf16", 128, 0, 16),
        ("fp16", 128, 0, 64),
        ("bf16", 256, 0, 64),
        ("bf16", 512, 64, 64),
    ],
)
def test_decode_narrow(dtype: str, dim: int, rope: int, page: int, tmp_path: Path) -> None:
    """8 bits travel and are loaded by pairs, K and V straight into the matrix units' order.

    Two numbers are converted at a time, by an instruction that keeps NaN.
    """
    latents = latent_settings(16, torch.bfloat16, torch.float8_e4m3fn)
    settings = latents if rope else narrow_settings(dim)
    kernel = compiled(
        narrow_kernel,
        ATTENTION | {"q": f"*{dtype}", "pool": "*i16"},
        {
            "DIM": dim, "PADDED_DIM": max(32, dim), "ROPE": rope, "LATENT": rope > 0,
            "TOKENS_PER_PAGE": page, "BLOCK": settings.block, "BLOCK_HEADS": 16,
            "PACKED": False, "INTERPRETED": False,
        },
        warps=settings.warps, stages=settings.stages,
        odd=("group", "head_blocks", "table_row", "heads_of_part"),
    )  # fmt: skip
    # Under Triton 3.9 some spill a little, and nothing under 3.6.
    code = check_resources(kernel, tmp_path, spilled=32 if rope else 8)
    assert "LDGSTS.E" in code and "HMMA" in code and "LDSM.16.MT88" in code
    assert "F2FP.F16.E4M3.UNPACK_B" in code and not re.search(r"LDS\.U(8|16)|F2F\.", code)


@pytest.mark.parametrize(("still", "half"), [(0, 64), (512, 32)])
def test_rotate(still: int, half: int, tmp_path: Path) -> None:
    """Products are rounded before they are added, as torch's are; stores are 16 bytes wide."""
    kernel = compiled(
        rotate_kernel,
        {"x": "*bf16", "cos": "*fp32", "sin": "*fp32", "turned": "*bf16"},
        {
            "HEADS": 32, "STILL": still, "PADDED_STILL": max(still, 1),
            "HALF": half, "PADDED_HALF": half, "BLOCK_HEADS": 16 if still == 0 else 2,
        },
        warps=4, fusion=False,
    )  # fmt: skip
    code = check_resources(kernel, tmp_path)
    assert "FFMA" not in code and "FMUL" in code
    assert "STG.E.128" in code


def test_append(tmp_path: Path) -> None:
    """Rows are read and written 16 bytes at a time."""
    kernel = compiled(
        append_kernel,
        {"k": "*bf16", "v": "*bf16", "pool": "*bf16", "slots": "*i64"},
        {"HEADS": 8, "DIM": 128, "PADDED_DIM": 128, "BLOCK_HEADS": 8, "TOKENS_PER_PAGE": 64},
        warps=4,
    )
    assert "STG.E.128" in check_resources(kernel, tmp_path)


@pytest.mark.parametrize(("splits", "dim"), [(4, 512), (64, 128), (128, 512)])
def test_reduce_pack(splits: int, dim: int, tmp_path: Path) -> None:
    """Joining a few splits, and many, of which a program takes a part of the elements."""
    block_dim = min(dim, MOST_AT_ONCE // splits)
    kernel = compiled(
        reduce_pack_kernel,
        {
            "partial_out": "*fp32", "partial_lse2": "*fp32",
            "send_out": "*bf16", "send_lse": "*fp32",
        },
        {"PADDED_SPLITS": splits, "DIM": dim, "BLOCK_DIM": block_dim},
        warps=splits * block_dim // 1024, odd=("splits", "heads_per_rank"),
    )  # fmt: skip
    check_resources(kernel, tmp_path)


def test_merge(tmp_path: Path) -> None:
    """A rank count and a head dim that are no powers of 2."""
    kernel = compiled(
        merge_kernel,
        {
            "received_out": "*bf16", "received_lse": "*fp32", "out": "*bf16", "lse_out": "*fp32"
        },
        {"RANKS": 6, "DIM": 80, "PADDED_DIM": 128},
        warps=1,
    )  # fmt: skip
    check_resources(kernel, tmp_path)


PUSH = {"SLOTS": 2, "PARTS": PARTS, "BLOCK": BLOCK}


def test_put(tmp_path: Path) -> None:
    """Stores to the peer are 16 bytes wide, and the signal releases them to the whole system."""
    kernel = compiled(
        put_kernel,
        {"send": "*i32", "windows": "*i64", "epoch": "*i64"},
        PUSH,
        warps=4, odd=("rank", "slots_at"),
    )  # fmt: skip
    assert "STG.E.128" in check_resources(kernel, tmp_path)
    stores, _, signal = kernel.asm["ptx"].rpartition("bar.sync")
    assert "st.global.v4" in stores and "st.global" not in signal
    assert re.search(r"(red|atom)\.global\.sys\.release\.add", signal)


def test_take(tmp_path: Path) -> None:
    """The wait acquires from the whole system before the first load of a message."""
    kernel = compiled(
        take_kernel,
        {"received": "*i32", "arrivals": "*i64", "slots": "*i32", "epoch": "*i64"},
        PUSH,
        warps=4,
    )
    check_resources(kernel, tmp_path)
    waits, _, copies = kernel.asm["ptx"].rpartition("bar.sync")
    assert "acquire" in waits and "acquire" not in copies
    assert "ld.global.cg.v4" in copies
