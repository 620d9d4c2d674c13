"""Everything that has to be seen on one H200, in one run: right, and how fast.

Run as `PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/h200.py`; README.md beside this file
says how, and how to read the tables. `--dry-run` does every section on a CPU at toy sizes, its
kernels interpreted. Results go to $OUT (or --out) after each section: `h200.json`, `h200.txt`.
"""

from __future__ import annotations

import argparse
import dataclasses
import faulthandler
import functools
import importlib
import inspect
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from lib import DRY
from lib.device import DEVICE, TYPE, captured, machine, random, timed
from lib.kernels import read_kernel, reduce_without_lse_kernel
from lib.report import BEGUN, LIMIT, Report

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from helix_gpu.attention.kernels.append import append
from helix_gpu.attention.kernels.common import power_of_2
from helix_gpu.attention.kernels.decode import decode
from helix_gpu.attention.kernels.merge import merge_received
from helix_gpu.attention.kernels.mla import decode_latent
from helix_gpu.attention.kernels.reduce_pack import reduce_pack
from helix_gpu.attention.kernels.settings import DecodeSettings, decode_settings, splits_for
from helix_gpu.attention.kernels.step import StepBuffers, attend_pages, attend_shard, merge_shards
from helix_gpu.attention.merge import merge
from helix_gpu.attention.partials import pack, unpack

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
DIM = 16 if DRY else 128
NARROW = torch.float8_e4m3fn
"""The cache of 8 bits that is timed beside it."""
TO_COMPILE = 1 if DRY else 12
"""Threads that compile at once. The interpreter allows one."""


# --- What every section uses -------------------------------------------------------------------


def in_threads(work: Callable[[Any], Any], items: Iterable[Any]) -> list[Any]:
    """`work` of every item, several at a time: compiling is most of it."""
    with ThreadPoolExecutor(TO_COMPILE) as pool:
        return list(pool.map(work, items))


# --- 1. Kernels against float64 ----------------------------------------------------------------


def exact(
    q: Tensor, k: Tensor, v: Tensor, product: torch.dtype, scale: float, *, drift: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Float64 attention of q [heads, dim] over k, v [tokens, kv_heads, dim].

    Output, natural log-sum-exp, and per head the bound of ATT-4 for a float32 output. With
    `drift` it also has what that bound leaves out. A float32 dot product of D terms rounds each
    partial sum, P_i after i terms, by up to u |P_i|; independent roundings make an error of u
    sqrt(sum P_i^2). ATT-4 takes P_i for a random walk about 0. It ends at the score s, so it
    drifts by i/D s, which adds s^2 D/3 to the sum: little for 128 terms and random q and k, most
    of the error of the largest scores for 576 terms and the scale of DeepSeek.
    """
    group = q.shape[0] // k.shape[1]
    query, keys, values = q.double(), *(x.double().repeat_interleave(group, 1) for x in (k, v))
    products = query * keys
    scores = products.sum(-1) * scale
    lse = scores.logsumexp(0)
    p = (scores - lse).exp()
    o = (p[..., None] * values).sum(0)
    u32 = UNIT[torch.float32]
    ds = scale * q.shape[-1] ** 0.5 * products.norm(dim=-1) + 2 * scores.abs()
    ds += scores.abs().amax(0)
    if drift:
        ds += (q.shape[-1] / 3) ** 0.5 * scores.abs()
    ds *= u32
    squares = ((p * (values - o).norm(dim=-1) * ds) ** 2).sum(0)
    squares += ((p * values.norm(dim=-1) * UNIT[product]) ** 2).sum(0)
    squares += (u32 * o.norm(dim=-1)) ** 2
    sizes = (p[..., None] * values.abs()).sum(0).norm(dim=-1)
    squares += (u32 * (len(keys) ** 0.5 + 2) * sizes) ** 2
    return o, lse, squares.sqrt()


@dataclasses.dataclass(frozen=True)
class Case:
    """One shape of the correctness sweep."""

    dtype: torch.dtype
    cache: torch.dtype
    dim: int
    heads: int
    kv_heads: int
    page: int
    splits: int
    peaky: bool = False

    def lengths(self) -> list[int]:
        """Empty, one token, page edges, and some that need every split."""
        p = self.page
        return [0, 1, p - 1, p, p + 1, *((37,) if DRY else (1000, 3 * p + 5, 4097))]


def cases() -> Iterator[Case]:
    """Every type with every head dim and page size, and each grouping of heads."""
    dims, pages = ((64, 80), (16, 64)) if DRY else ((64, 80, 96, 128, 256), (16, 64, 128))
    groupings = itertools.cycle([(4, 4), (8, 2), (32, 8), (64, 8), (16, 1)])
    for dtype, dim, page in itertools.product(UNIT, dims, pages):
        heads, kv_heads = (4, 1) if DRY else next(groupings)
        yield Case(dtype, dtype, dim, heads, kv_heads, page, splits=2 if DRY else 7)
    yield Case(torch.float32, torch.float32, 64, 2, 1, 64, splits=3, peaky=True)
    if not DRY:
        for dtype in (torch.float16, torch.bfloat16):
            yield Case(dtype, dtype, 128, 8, 2, 64, splits=5, peaky=True)
            for dim, page in itertools.product(dims, pages):
                heads, kv_heads = next(groupings)
                yield Case(dtype, torch.float8_e4m3fn, dim, heads, kv_heads, page, splits=7)


def filled_pool(
    kv: Sequence[tuple[Tensor, Tensor]], page: int, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """K and V of each request in shuffled pages of a pool of NaN; tables and lengths."""
    counts = [-(-len(k) // page) for k, _ in kv]
    order = torch.randperm(sum(counts) + 2, generator=generator).tolist()
    first = kv[0][0]
    # 8-bit types cannot be filled or indexed everywhere: the pool is made wide, then narrowed.
    pool = torch.full((len(order), 2, page, *first.shape[1:]), torch.nan, device=DEVICE)
    tables = torch.full((len(kv), max(counts) + 1), order.pop(), dtype=torch.int32)
    for row, (k, v) in enumerate(kv):
        for column in range(counts[row]):
            tables[row, column] = order.pop()
            for part, x in enumerate((k, v)):
                chunk = x[column * page : (column + 1) * page]
                pool[int(tables[row, column]), part, : len(chunk)] = chunk.float()
    lengths = torch.tensor([len(k) for k, _ in kv], dtype=torch.int32)
    return pool, tables.to(DEVICE), lengths.to(DEVICE)


def check_decode(case: Case) -> dict[str, Any]:
    """Decode and reduce of one case: the worst error as a share of its bound."""
    generator = torch.Generator().manual_seed(case.dim * case.page + case.heads)

    def draw(*shape: int) -> Tensor:
        # Multiples of 1/16 within +-4: exact in every type but the 8-bit one, which rounds.
        x = (torch.randint(-64, 65, shape, generator=generator) / 16).to(DEVICE)
        return (x * 8 if case.peaky else x).to(case.cache).to(case.dtype)

    q = draw(len(case.lengths()), case.heads, case.dim)
    kv = [
        (draw(n, case.kv_heads, case.dim), draw(n, case.kv_heads, case.dim)) for n in case.lengths()
    ]
    pool, tables, lengths = filled_pool(kv, case.page, generator)
    output, lse = attend_pages(q, pool.to(case.cache), tables, lengths, case.splits)
    worst, worst_lse = 0.0, 0.0
    for row, (k, v) in enumerate(kv):
        if not len(k):
            good = not bool(output[row].any()) and bool((lse[row] == -torch.inf).all())
            worst = max(worst, 0.0 if good else float("inf"))
            continue
        o, exact_lse, bound = exact(q[row], k, v, case.dtype, case.dim**-0.5)
        share = ((o - output[row]).norm(dim=-1) / bound).max()
        worst = max(worst, float(share.nan_to_num(float("inf"))))
        error = (exact_lse - lse[row]).abs() / (1 + exact_lse.abs())
        worst_lse = max(worst_lse, float(error.max().nan_to_num(float("inf"))))
    shape = dataclasses.asdict(case) | {
        "dtype": short(case.dtype), "cache": short(case.cache)
    }  # fmt: skip
    return shape | {"error_over_bound": worst, "lse_error": worst_lse}


def short(dtype: torch.dtype) -> str:
    """`bfloat16` for torch.bfloat16."""
    return str(dtype).removeprefix("torch.")


def check_latent(dtype: torch.dtype, cached: torch.dtype, heads: int) -> dict[str, Any]:
    """The latent kernel at DeepSeek's size."""
    latent, rope, page = (64, 16, 16) if DRY else (512, 64, 64)
    lengths = [0, 1, page + 1, *(() if DRY else (1000,))]
    scale, n = 192**-0.5, len(lengths)
    generator = torch.Generator().manual_seed(0)
    q = random(n, heads, latent + rope, dtype=dtype)
    rows = [
        random(length, 1, latent + rope, dtype=dtype).to(cached).to(dtype) for length in lengths
    ]
    pool, tables, counts = filled_pool([(row, row) for row in rows], page, generator)
    buffers = StepBuffers.allocate(
        n, heads, 1, latent, ranks=1, longest=1000, dtype=dtype, wire=torch.float32,
        device=DEVICE, splits=3,
    )  # fmt: skip
    part = pool[:, 0, :, 0].to(cached).contiguous()
    decode_latent(q, part, tables, counts, buffers.partial_out, buffers.partial_lse2, scale=scale)
    reduce_pack(buffers.partial_out, buffers.partial_lse2, buffers.send, torch.float32)
    output, _ = unpack(buffers.send, n, heads, latent, torch.float32)
    worst = float(output[0][0].abs().max().nan_to_num(float("inf")))
    for row, key in list(enumerate(rows))[1:]:
        o, _, bound = exact(q[row], key, key[..., :latent], dtype, scale, drift=True)
        share = ((o - output[0][row]).norm(dim=-1) / bound).max()
        worst = max(worst, float(share.nan_to_num(float("inf"))))
    return {
        "dtype": short(dtype), "cache": short(cached), "heads": heads, "latent": latent,
        "error_over_bound": worst,
    }  # fmt: skip


def check_small_kernels() -> list[dict[str, Any]]:
    """Append to the bit; reduce_pack and merge against the plain merge."""
    found = []
    for dtype in UNIT:
        n, heads, dim, page = 5, 4, 80, 16
        pool = torch.full((4, 2, page, heads, dim), torch.nan, device=DEVICE).to(dtype)
        k, v = random(n, heads, dim, dtype=dtype), random(n, heads, dim, dtype=dtype)
        slots = torch.tensor([3, -1, page - 1, 2 * page + 5, -1], device=DEVICE)
        want, own = pool.clone(), slots >= 0
        want[slots[own] // page, 0, slots[own] % page] = k[own]
        want[slots[own] // page, 1, slots[own] % page] = v[own]
        append(k, v, pool, slots)
        same = (pool == want) | (pool.isnan() & want.isnan())
        found.append({"kernel": "append", "dtype": short(dtype), "error": float((~same).sum())})
        for ranks, dim in ((4, 128), (6, 80)):
            heads = 2 * ranks
            outputs = random(ranks, n, heads, dim, dtype=torch.float32)
            lses = 4 * random(ranks, n, heads, dtype=torch.float32)
            empty = torch.rand(ranks, n, heads, device=DEVICE) < 0.3
            empty[:, 0, 0] = True
            outputs[empty], lses[empty] = torch.nan, -torch.inf
            send = torch.full_like(pack(outputs[0], lses[0], ranks, dtype), 255)
            reduce_pack(outputs, lses / np.log(2), send, dtype)
            got = unpack(send, n, 2, dim, dtype)
            ought = unpack(pack(*merge(outputs, lses), ranks, dtype), n, 2, dim, dtype)
            error = max(distance(a, b) for a, b in zip(got, ought, strict=True)) / UNIT[dtype]
            found.append({"kernel": "reduce_pack", "dtype": short(dtype), "error": error})
            received = torch.cat([pack(o, s, 1, dtype) for o, s in zip(outputs, lses, strict=True)])
            out = torch.full((n, heads, dim), torch.nan, device=DEVICE)
            lse = torch.full((n, heads), torch.nan, device=DEVICE)
            merge_received(received, out, lse, dtype)
            want_out, want_lse = merge(outputs.to(dtype), lses)
            error = max(distance(out, want_out), distance(lse, want_lse)) / UNIT[torch.float32]
            found.append({"kernel": "merge", "dtype": short(dtype), "error": error})
    return found


def distance(a: Tensor, b: Tensor) -> float:
    """Largest difference of equal shapes over 1 + size; equal infinities count as 0."""
    a, b = a.float(), b.float()
    apart = ((a - b).abs() / (1 + b.abs())).where(a != b, 0)
    return float(apart.max().nan_to_num(float("inf")))


def correctness(report: Report, found: dict[str, Any]) -> None:
    """Section 1. Wrong is an error above its bound, or above 32 rounding units where none is given.

    Those units are the types' own; two ways to take exp(x), x up to 20, differ by about x units.
    """
    found["small"] = check_small_kernels()
    worst = {}
    for row in found["small"]:
        key = (row["kernel"], row["dtype"])
        worst[key] = max(worst.get(key, 0.0), row["error"])
    report.table(
        "append (elements that differ), reduce_pack and merge (rounding units)",
        [{"kernel": k, "dtype": d, "error": e} for (k, d), e in worst.items()],
    )
    caches = [(dtype, dtype) for dtype in UNIT] + [(TYPE, NARROW)]
    found["latent"] = [
        check_latent(dtype, cached, heads)
        for dtype, cached in caches
        for heads in ((16, 3) if DRY else (128, 16))
    ]
    report.table("latent decode: error over bound", found["latent"])
    found["decode"] = in_threads(check_decode, list(cases()))
    by_type: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in found["decode"]:
        by_type.setdefault((row["dtype"], row["cache"]), []).append(row)
    report.table(
        "decode: worst of each type",
        [
            {
                "queries": dtype, "cache": cache, "cases": len(rows),
                "error_over_bound": max(row["error_over_bound"] for row in rows),
                "lse_error": max(row["lse_error"] for row in rows),
            }
            for (dtype, cache), rows in by_type.items()
        ],
    )  # fmt: skip
    wrong = [row for row in found["decode"] + found["latent"] if not row["error_over_bound"] <= 1]
    wrong += [
        row
        for row in found["small"]
        if not row["error"] <= (0 if row["kernel"] == "append" else 32)
    ]
    wrong += [row for row in found["decode"] if not row["lse_error"] <= 4e-6]
    found["wrong"] = wrong
    report.say(f"wrong: {len(wrong)} {wrong[:5]}")


# --- 2. Ceilings -------------------------------------------------------------------------------


def ceilings(report: Report, found: dict[str, Any]) -> None:
    """Section 2: what the memory and the matrix units give at best."""
    size = 2**12 if DRY else 2**30  # int32: 4 GiB
    x = torch.randint(-1000, 1000, (size,), dtype=torch.int32, device=DEVICE)
    rows = []
    for gib in (1, 4):
        part = x[: size // 4 * gib]
        total = int(part.sum().to(torch.int32))
        for block, unroll, programs, warps in (
            [(512, 2, 2, 4)]
            if DRY
            else itertools.product((1024, 2048), (2, 4), (132 * 4, 132 * 8, 132 * 16), (4, 8))
        ):
            out = torch.zeros(programs, dtype=torch.int32, device=DEVICE)

            def read(
                part: Tensor = part, out: Tensor = out, block: int = block,
                unroll: int = unroll, programs: int = programs, warps: int = warps,
            ) -> None:  # fmt: skip
                read_kernel[(programs,)](
                    part, out, len(part) // block, BLOCK=block, UNROLL=unroll, num_warps=warps
                )

            us = timed({"read": captured(read)}, 5)["read"]["us"]
            if int(out.sum().to(torch.int32)) != total:
                raise AssertionError(f"the read kernel did not read everything: {block}, {unroll}")
            name = f"read {block} x {unroll}, {programs} programs of {warps} warps"
            rows.append({"what": name, "gib": gib, "us": us, "gb_s": part.nbytes / us / 1e3})
        us = timed({"sum": captured(lambda part=part: part.amax())}, 5)["sum"]["us"]
        rows.append({"what": "torch.amax", "gib": gib, "us": us, "gb_s": part.nbytes / us / 1e3})
    half = size // 2
    copy = captured(lambda: x[:half].copy_(x[half:]))
    us = timed({"copy": copy}, 10)["copy"]["us"]
    rows.append({"what": "copy (read + write)", "gib": 4, "us": us, "gb_s": x.nbytes / us / 1e3})
    n = 64 if DRY else 8192
    a, b = random(n, n), random(n, n)
    us = timed({"matmul": captured(lambda: a @ b)}, 10)["matmul"]["us"]
    found["bf16_tflop_s"] = 2 * n**3 / us / 1e6
    found["rows"] = rows
    found["read_gb_s"] = {
        gib: max(r["gb_s"] for r in rows if r["gib"] == gib and "copy" not in r["what"])
        for gib in (1, 4)
    }
    found["copy_gb_s"] = rows[-1]["gb_s"]
    best = sorted(rows[:-1], key=lambda row: -row["gb_s"])[:4]
    report.table("ceilings: the best readers, and the copy", [*best, rows[-1]])
    report.say(
        f"read ceiling at 1 and 4 GiB: {found['read_gb_s']} GB/s (the larger is used below); "
        f"bf16 matrix {found['bf16_tflop_s']:.0f} TFLOP/s"
    )


def read_ceiling(report: Report) -> float:
    """GB/s of the best reader, or the vendor's figure where section 2 did not finish."""
    measured = report.document.get("2 ceilings", {}).get("read_gb_s")
    return max(measured.values()) if measured else 4800.0


# --- 3. The decode kernel's settings -----------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """A batch of equal lengths."""

    rows: int
    tokens: int
    heads: int
    kv_heads: int

    @property
    def kv_bytes(self) -> int:
        """Bytes of 16-bit K and V that one step reads."""
        return self.rows * self.tokens * self.kv_heads * 2 * DIM * 2

    def __str__(self) -> str:
        return f"B={self.rows} S={self.tokens} {self.heads}/{self.kv_heads}"


SHAPES = (
    [Shape(2, 64, 4, 2), Shape(1, 128, 4, 2)]
    if DRY
    else [
        Shape(rows, tokens, heads, 8)
        for heads in (32, 64)
        for rows, tokens in ((8, 32768), (1, 131072), (32, 32768))
    ]
)
PAGES = (16, 64) if DRY else (64, 16, 128)


@functools.cache
def storage(cached: torch.dtype = TYPE) -> Tensor:
    """K and V for the largest shape, as one run of elements."""
    if cached != TYPE:
        return storage().to(cached)
    return random(max(shape.kv_bytes for shape in SHAPES) // 2)


def paged(
    shape: Shape, page: int, cached: torch.dtype = TYPE, *, in_order: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """Pool, tables and lengths of a shape over the common storage; pages in random order."""
    pages = shape.rows * shape.tokens // page
    pool = storage(cached)[: shape.kv_bytes // 2].view(pages, 2, page, shape.kv_heads, DIM)
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(page))
    if in_order:
        order = order.sort()[0]
    tables = order.view(shape.rows, -1).to(torch.int32).to(DEVICE)
    lengths = torch.full((shape.rows,), shape.tokens, dtype=torch.int32, device=DEVICE)
    return pool, tables, lengths


@functools.cache
def query(shape: Shape) -> Tensor:
    """The query that everyone gets, [rows, heads, DIM]."""
    return random(shape.rows, shape.heads, DIM)


def attention_run(
    shape: Shape,
    paging: tuple[Tensor, Tensor, Tensor],
    settings: DecodeSettings,
    splits: int,
    *,
    reduce: bool = True,
) -> Callable[[], Tensor]:
    """Decode and reduce of a shape, over buffers of its own; gives what would be sent."""
    q = query(shape)
    buffers = StepBuffers.allocate(
        shape.rows, shape.heads, shape.kv_heads, DIM, ranks=1, longest=shape.tokens,
        dtype=q.dtype, wire=q.dtype, device=DEVICE, splits=splits,
    )  # fmt: skip

    def run() -> Tensor:
        decode(q, *paging, buffers.partial_out, buffers.partial_lse2, settings=settings)
        if reduce:
            reduce_pack(buffers.partial_out, buffers.partial_lse2, buffers.send, buffers.wire)
        return buffers.send

    return run


def split_counts(shape: Shape) -> list[int]:
    """Splits that make about half a program to twelve for each multiprocessor."""
    units = shape.rows * shape.kv_heads
    wanted = (1, 2) if DRY else (0.5, 1, 2, 3, 4, 6, 8, 12)
    counts = {round(per * 132 / units) if not DRY else per for per in wanted}
    return sorted(min(128, max(1, count)) for count in counts)


def sweep(report: Report, found: dict[str, Any]) -> None:
    """Section 3: ways to compile and to split, for decode and for latents, 16 and 8 bits."""
    ceiling = read_ceiling(report)
    chosen = found["chosen"] = dict[int, Any]()
    for cached, pages, seconds in ((TYPE, PAGES, 110), (NARROW, PAGES[:1], 35)):
        points = found[f"points, {short(cached)}"] = list[dict[str, Any]]()
        decode_sweep(report, found, points, cached, pages, time.monotonic() + seconds)
        ranked = {page: best_overall([p for p in points if p["page"] == page]) for page in pages}
        report.table(
            f"sweep, {short(cached)} cache: settings best over all shapes (geometric mean of each "
            "shape's best split)",
            [{"page": page, "rank": i + 1} | row
             for page in pages for i, row in enumerate(ranked[page][:4])],
        )  # fmt: skip
        if cached == TYPE:
            chosen |= ranked
    for cached in (TYPE, NARROW):
        for heads in (16,) if DRY else (128, 16):
            latent_sweep(report, found, ceiling, cached, heads)


def decode_sweep(
    report: Report,
    found: dict[str, Any],
    points: list[dict[str, Any]],
    cached: torch.dtype,
    pages: Sequence[int],
    deadline: float,
) -> None:
    """Fill `points` until the deadline: every setting and number of splits, by page and shape."""
    ceiling = read_ceiling(report)
    options = (
        [DecodeSettings(16, 4, 2), DecodeSettings(32, 4, 2)]
        if DRY
        else [
            DecodeSettings(block, warps, stages)
            for block in (64, 32, 128)
            for warps in (4, 2, 8)
            for stages in (3, 2, 4, 5)
        ]
    )
    # Threads compile what the loop below launches: the same types and constants, and strides as
    # divisible, since Triton compiles anew where a 16 divides another argument.
    small = Shape(1, 64 if DRY else 4096, SHAPES[0].heads, SHAPES[0].kv_heads)
    refused: list[dict[str, Any]] = []

    def warm(option: tuple[DecodeSettings, int]) -> tuple[DecodeSettings, int] | None:
        settings, page = option
        try:
            attention_run(small, paged(small, page, cached), settings, 2)()
        except Exception as error:  # too much shared memory for some
            refused.append({"settings": str(settings), "page": page, "why": str(error)[:200]})
            return None
        return option

    begun = time.monotonic()
    storage(cached)
    compiled = in_threads(warm, [(option, page) for page in pages for option in options])
    usable = {page: [o[0] for o in compiled if o and o[1] == page] for page in pages}
    size = cached.itemsize / 2
    for page, shape in itertools.product(pages, SHAPES):
        paging = paged(shape, page, cached)
        for settings, splits in itertools.product(usable[page], split_counts(shape)):
            if time.monotonic() > deadline:
                found["not_run"] = f"out of time after {len(points)} points"
                break
            us = timed({"it": captured(attention_run(shape, paging, settings, splits))}, 4)
            rate = shape.kv_bytes * size / us["it"]["us"] / 1e3
            points.append(
                {
                    "shape": str(shape), "page": page, "block": settings.block,
                    "warps": settings.warps, "stages": settings.stages, "splits": splits,
                    "us": us["it"]["us"], "of_ceiling": rate / ceiling,
                }
            )  # fmt: skip
        report.save()
    report.say(
        f"{short(cached)} cache: {len(points)} points, {len(refused)} refused to compile or "
        f"launch, {time.monotonic() - begun:.0f} s"
    )
    found[f"refused, {short(cached)}"] = refused
    report.table(
        f"sweep, {short(cached)} cache: the best of each shape and page size (decode + reduce, "
        "coarse times)",
        [
            max(
                (p for p in points if p["shape"] == str(shape) and p["page"] == page),
                key=lambda p: p["of_ceiling"],
            )
            for shape, page in itertools.product(SHAPES, pages)
            if any(p["shape"] == str(shape) and p["page"] == page for p in points)
        ],
    )


def best_overall(points: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Settings by the mean of what they reach at every shape with its best split; best first."""
    reached: dict[tuple[int, int, int], dict[str, float]] = {}
    for p in points:
        shapes = reached.setdefault((p["block"], p["warps"], p["stages"]), {})
        shapes[p["shape"]] = max(shapes.get(p["shape"], 0.0), p["of_ceiling"])
    rows = [
        {
            "block": key[0], "warps": key[1], "stages": key[2],
            "of_ceiling": statistics.geometric_mean(shapes.values()),
            "least": min(shapes.values()), "shapes": len(shapes),
        }
        for key, shapes in reached.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: (-row["shapes"], -row["of_ceiling"]))


def latent_sweep(
    report: Report, found: dict[str, Any], ceiling: float, cached: torch.dtype, heads: int
) -> None:
    """MLA: with many heads bytes are few and products many, so both shares are given."""
    latent, dim, page = (64, 80, 4) if DRY else (512, 576, 64)
    shapes = [(2, 32)] if DRY else [(8, 32768), (32, 8192) if heads > 16 else (32, 32768)]
    options = (
        [DecodeSettings(16, 4, 1, 16)]
        if DRY
        else [
            DecodeSettings(block, warps, stages, of_heads)
            for of_heads, warps in ((64, 8), (32, 8), (32, 4), (16, 4), (16, 8))
            if of_heads < 2 * heads
            for block in (64, 32, 16)
            for stages in (2, 3, 1)
        ]
    )
    refused: list[str] = []

    def runner(rows: int, tokens: int, settings: DecodeSettings, splits: int) -> Callable[[], Any]:
        pool = storage(cached)[: rows * tokens * dim].view(-1, page, dim)
        tables = torch.randperm(len(pool)).view(rows, -1).to(torch.int32).to(DEVICE)
        lengths = torch.full((rows,), tokens, dtype=torch.int32, device=DEVICE)
        q = random(rows, heads, dim)
        b = StepBuffers.allocate(
            rows, heads, 1, latent, ranks=1, longest=tokens, dtype=q.dtype, wire=q.dtype,
            device=DEVICE, splits=splits,
        )  # fmt: skip

        def run() -> None:
            decode_latent(
                q, pool, tables, lengths, b.partial_out, b.partial_lse2,
                scale=192**-0.5, settings=settings,
            )  # fmt: skip
            reduce_pack(b.partial_out, b.partial_lse2, b.send, b.wire)

        return run

    def warm(settings: DecodeSettings) -> DecodeSettings | None:
        try:
            runner(1, 16 * page, settings, 2)()
        except Exception as error:
            refused.append(f"{settings}: {str(error)[:100]}")
            return None
        return settings

    usable = [s for s in in_threads(warm, options) if s]
    deadline = time.monotonic() + 20
    matrix = report.document.get("2 ceilings", {}).get("bf16_tflop_s", 800.0)
    points = []
    for (rows, tokens), settings in itertools.product(shapes, usable):
        blocks = rows * -(-heads // settings.heads)
        for per in (1,) if DRY else (1, 2, 4):
            if time.monotonic() > deadline:
                break
            splits = max(1, min(128, per * 132 // blocks))
            us = timed({"it": captured(runner(rows, tokens, settings, splits))}, 4)["it"]["us"]
            points.append(
                {
                    "rows": rows, "tokens": tokens, **dataclasses.asdict(settings),
                    "splits": splits, "us": us,
                    "of_read": rows * tokens * dim * cached.itemsize / us / 1e3 / ceiling,
                    "of_matrix": 2 * rows * tokens * heads * (dim + latent) / us / 1e6 / matrix,
                }
            )  # fmt: skip
    found[f"latent of {heads} heads, {short(cached)}"] = {"points": points, "refused": refused}
    report.table(
        f"MLA, {heads} heads, {latent} + {dim - latent}, {short(cached)} cache: the best three of "
        "each shape",
        [
            point
            for shape in shapes
            for point in sorted(
                (p for p in points if (p["rows"], p["tokens"]) == shape), key=lambda p: p["us"]
            )[:3]
        ],
    )


def best_settings(report: Report, shape: Shape, page: int) -> tuple[DecodeSettings, int]:
    """The settings best over all shapes, with this shape's best split; as shipped if not swept."""
    section = report.document.get("3 settings", {})
    ranked = section.get("chosen", {}).get(page)
    if not ranked:
        splits = splits_for(shape.rows, shape.kv_heads, shape.tokens)
        return decode_settings(DIM, TYPE), splits
    best = {key: ranked[0][key] for key in ("block", "warps", "stages")}
    fitting = [
        p for p in section[f"points, {short(TYPE)}"]
        if p["shape"] == str(shape) and p["page"] == page and best.items() <= p.items()
    ]  # fmt: skip
    top = max(fitting, key=lambda p: p["of_ceiling"])
    return DecodeSettings(**best), top["splits"]


# --- 4. Against peers --------------------------------------------------------------------------


def flashinfer_run(
    shape: Shape, paging: tuple[Tensor, Tensor, Tensor], *, tensor_cores: bool, lse: bool = True
) -> Callable[[], Any]:
    """FlashInfer's paged decode over the very same pool; its plan is made here, outside."""
    flashinfer = importlib.import_module("flashinfer")
    pool, tables, _ = paging
    page, width = pool.shape[2], tables.shape[1]
    workspace = torch.zeros(256 * 2**20, dtype=torch.uint8, device=DEVICE)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        workspace, "NHD", use_tensor_cores=tensor_cores
    )
    wrapper.plan(
        torch.arange(shape.rows + 1, dtype=torch.int32, device=DEVICE) * width,
        tables.flatten(),
        torch.full((shape.rows,), page, dtype=torch.int32, device=DEVICE),
        shape.heads, shape.kv_heads, DIM, page,
        q_data_type=TYPE, kv_data_type=TYPE,
    )  # fmt: skip
    q = query(shape)
    out, lses = torch.empty_like(q), torch.empty(q.shape[:2], device=DEVICE)
    if lse:
        return lambda: wrapper.run(q, pool, out=out, lse=lses, return_lse=True)
    return lambda: wrapper.run(q, pool, out=out)


def flex_run(shape: Shape, page: int, *, compiled: bool = True) -> Callable[[], Any]:
    """flex_attention over pages of its own layout, [1, kv_heads, pages * page, DIM], with LSE.

    All pages are full, so that it never evaluates the mask: its best case.
    """
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    pages, per_row = shape.rows * shape.tokens // page, shape.tokens // page
    half = storage()[: shape.kv_bytes // 2].view(2, 1, shape.kv_heads, pages * page, DIM)
    order = torch.randperm(pages)
    indices = torch.zeros(shape.rows, 1, 1, pages, dtype=torch.int32)
    indices[:, 0, 0, :per_row] = order.view(shape.rows, per_row)
    logical = torch.full((shape.rows, pages), -1, dtype=torch.int32)
    logical.scatter_(
        1, order.view(shape.rows, per_row), torch.arange(per_row, dtype=torch.int32).expand(
            shape.rows, per_row
        )
    )  # fmt: skip
    logical, indices = logical.to(DEVICE), indices.to(DEVICE)
    full = torch.full((shape.rows, 1, 1), per_row, dtype=torch.int32, device=DEVICE)

    def mask(b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        at = logical[b, kv // page]
        return (at >= 0) & (at * page + kv % page < shape.tokens)

    block_mask = flex.BlockMask.from_kv_blocks(
        torch.zeros_like(full), torch.zeros_like(indices), full, indices,
        BLOCK_SIZE=(128, page), mask_mod=mask, seq_lengths=(1, pages * page),
        **({"compute_q_blocks": False}
           if "compute_q_blocks" in inspect.signature(flex.BlockMask.from_kv_blocks).parameters
           else {}),
    )  # fmt: skip
    attention = flex.flex_attention
    if compiled:
        # It would give up compiling after eight shapes.
        torch._dynamo.reset()
        attention = torch.compile(attention, dynamic=False)
    q = query(shape)[:, :, None]
    return lambda: attention(
        q, half[0], half[1], block_mask=block_mask, enable_gqa=True,
        return_aux=flex.AuxRequest(lse=True),
    )  # fmt: skip


def sdpa_run(shape: Shape, *, folded: bool) -> Callable[[], Any]:
    """SDPA on contiguous keys, without LSE; `folded` makes the group the query's length."""
    k, v = storage()[: shape.kv_bytes // 2].view(2, shape.rows, shape.kv_heads, shape.tokens, DIM)
    q = query(shape)[:, :, None]
    if folded:
        q = q.view(shape.rows, shape.kv_heads, -1, DIM)
        return lambda: F.scaled_dot_product_attention(q, k, v)
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def without_lse_run(
    shape: Shape, paging: tuple[Tensor, Tensor, Tensor], settings: DecodeSettings, splits: int
) -> Callable[[], Tensor]:
    """`attention_run` that gives the output alone."""
    q = query(shape)
    out = torch.empty_like(q)
    partial = torch.empty(splits, *q.shape, dtype=torch.float32, device=DEVICE)
    lse2 = torch.empty(splits, *q.shape[:2], dtype=torch.float32, device=DEVICE)
    padded = power_of_2(splits)

    def run() -> Tensor:
        decode(q, *paging, partial, lse2, settings=settings)
        reduce_without_lse_kernel[q.shape[:2]](
            partial, lse2, out, partial.stride(0), lse2.stride(0), splits,
            PADDED_SPLITS=padded, DIM=DIM, num_warps=min(8, max(1, padded * DIM // 1024)),
        )  # fmt: skip
        return out

    return run


def peers(report: Report, found: dict[str, Any], flashinfer: Any) -> None:
    """Section 4: the same step by others, in turn, over random pages of 64 unless named.

    Each shape has a process of its own: an illegal access ends a process's use of the device.
    """
    deadline = time.monotonic() + (200 if not DRY else 60)
    found["flashinfer"] = wait_for(flashinfer)
    report.say(f"FlashInfer: {found['flashinfer'][-300:]}")
    rows: list[dict[str, Any]] = []
    found["rows"], found["failures"], found["at_size"] = rows, {}, []
    ratios: list[dict[str, Any]] = []
    found["goals"] = ratios
    without: list[str] = [] if found["flashinfer"] == "ready" else ["FlashInfer"]
    for index, shape in enumerate(SHAPES):
        settings, splits = best_settings(report, shape, 64)
        task = {
            "shape": index, "ceiling": read_ceiling(report), "without": without,
            "best": dataclasses.asdict(settings), "splits": splits,
        }  # fmt: skip
        while time.monotonic() < deadline:
            try:
                done = in_own_process(task, deadline - time.monotonic() + 30)
            except subprocess.TimeoutExpired:
                found["failures"][f"{shape}"] = "it did not end in time"
                break
            found["failures"] |= {f"{shape}: {k}": v for k, v in done.get("failures", {}).items()}
            if "rows" in done:
                rows += done["rows"]
                found["at_size"].append(done["at_size"])
                ratios.append(done["goals"])
                break
            culprit = done.get("doing", "starting")
            found["failures"][f"{shape}: {culprit}"] = f"ended its process: {done['log'][-600:]}"
            if culprit in without or culprit == "starting":
                break
            without.append(culprit)
        else:
            report.say(f"no time left for {shape}")
        report.save()
    report.table("peers: one step's attention with log-sum-exp", rows)
    report.table("the same shapes, checked: row 0 against float64, FlashInfer against ours",
                 found["at_size"])  # fmt: skip
    found["wrong"] = [row for row in found["at_size"] if not row["error_over_bound"] <= 1]
    report.table(
        "goals: of_ceiling >= 0.85 at 1 GiB and 0.70 at 512 MiB, flashinfer >= 1, flex >= 1.5, "
        "paging <= 0.03, lse <= 0.01",
        ratios,
    )
    for name, why in found["failures"].items():
        report.say(f"no figure for {name}: {why[:300]}")
    if not rows:
        raise RuntimeError("no shape was timed")


def in_own_process(task: dict[str, Any], limit: float) -> dict[str, Any]:
    """`time_peers` of this task in a new process: its findings, as far as it came, and its log."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "task.json"
        place.write_text(json.dumps(task))
        done = subprocess.run(
            [sys.executable, __file__, "--peers-of", str(place), *(["--dry-run"] if DRY else [])],
            capture_output=True, text=True, timeout=limit, check=False,
        )  # fmt: skip
        found: dict[str, Any] = json.loads(place.read_text())
    return found | {"log": done.stdout[-1000:] + done.stderr[-3000:]}


def time_peers(place: Path) -> None:
    """In a process of its own: what takes part in one shape; findings replace the task's file."""
    task: dict[str, Any] = json.loads(place.read_text())
    shape, ceiling = SHAPES[task["shape"]], task["ceiling"]
    found: dict[str, Any] = {"failures": {}}

    def note(**more: Any) -> None:
        found.update(more)
        place.write_text(json.dumps(found, default=str))

    def finish() -> None:
        if not DRY:
            torch.cuda.synchronize()

    runs, answers = {}, {}
    best = DecodeSettings(**task["best"]), task["splits"]
    for name, make in contenders(shape, *best).items():
        if any(name.startswith(left_out) for left_out in task["without"]):
            continue
        note(doing=name)
        try:
            call = make()
            answers[name] = call()
            finish()
            runs[name] = captured(call)
        except Exception as error:
            found["failures"][name] = f"{type(error).__name__}: {error}"[:600]
        else:
            runs[name]()
        # Where it was the device that failed, this ends the process, and `doing` is the culprit.
        finish()
    note(doing="checking", at_size=agreement(shape, answers))
    del answers
    note(doing="timing")
    times = timed(runs, 80)
    # The same version twice: a difference smaller than this is noise.
    again = timed({"ours": runs["ours"]}, 80)["ours"]["us"]
    ours = times["ours"]["us"]
    rows = [
        {
            "shape": str(shape), "mib": shape.kv_bytes >> 20, "who": name, **taken,
            "gb_s": bytes_read / taken["us"] / 1e3,
            "of_ceiling": bytes_read / taken["us"] / 1e3 / ceiling,
            "over_ours": taken["us"] / ours,
        }
        for name, taken in times.items()
        for bytes_read in [shape.kv_bytes // (2 if "8-bit" in name else 1)]
    ]  # fmt: skip
    note(rows=rows, goals=goals(shape, times, ceiling) | {"repeat": again / ours - 1})


def contenders(
    shape: Shape, best: DecodeSettings, best_splits: int
) -> dict[str, Callable[[], Callable[[], Any]]]:
    """What is compared, by name: calls that make a call. `ours` is as shipped."""
    page = 32 if DRY else 64
    paging = paged(shape, page)
    settings, narrow = decode_settings(DIM, TYPE), decode_settings(DIM, TYPE, NARROW)
    splits = splits_for(shape.rows, shape.kv_heads, shape.tokens)
    whole = paged(shape, shape.tokens, in_order=True)
    calls = {
        "ours": lambda: attention_run(shape, paging, settings, splits),
        "ours, decode alone": lambda: attention_run(
            shape, paging, settings, splits, reduce=False
        ),
        "ours, no LSE": lambda: without_lse_run(shape, paging, settings, splits),
        "ours, pages in order": lambda: attention_run(
            shape, paged(shape, page, in_order=True), settings, splits
        ),
        "ours, contiguous": lambda: attention_run(shape, whole, settings, splits),
        "ours, page 16": lambda: attention_run(
            shape, paged(shape, 16), settings, splits
        ),
        "ours, heads first": lambda: attention_run(
            shape, heads_first(paging), settings, splits
        ),
        "ours, 8-bit cache": lambda: attention_run(
            shape, paged(shape, page, NARROW), narrow,
            splits_for(shape.rows, shape.kv_heads, shape.tokens, resident=narrow.resident),
        ),
        "ours, best of section 3": lambda: attention_run(shape, paging, best, best_splits),
        "FlashInfer": lambda: flashinfer_run(shape, paging, tensor_cores=False),
        "FlashInfer, tensor cores": lambda: flashinfer_run(shape, paging, tensor_cores=True),
        "FlashInfer, no LSE": lambda: flashinfer_run(
            shape, paging, tensor_cores=True, lse=False
        ),
        "SDPA": lambda: sdpa_run(shape, folded=False),
        "SDPA, folded": lambda: sdpa_run(shape, folded=True),
        "flex_attention, page 128": lambda: flex_run(shape, 64 if DRY else 128, compiled=not DRY),
        "flex_attention, page 64": lambda: flex_run(shape, page, compiled=not DRY),
    }  # fmt: skip
    if shape != SHAPES[0]:
        del calls["flex_attention, page 64"]  # compiling takes ten seconds
    return calls


def agreement(shape: Shape, answers: dict[str, Any]) -> dict[str, Any]:
    """Our answer for the first KV head of row 0 against float64, and FlashInfer's against ours."""
    outputs, lses = unpack(answers["ours"], shape.rows, shape.heads, DIM, TYPE)
    ours, our_lse = outputs[0].float(), lses[0]
    page = 32 if DRY else 64
    pool, tables, _ = paged(shape, page)
    group = shape.heads // shape.kv_heads
    k, v = pool[tables[0].long(), :, :, :1].transpose(0, 1).flatten(1, 2)
    o, lse, bound = exact(query(shape)[0, :group], k, v, TYPE, DIM**-0.5)
    bound = (bound**2 + (UNIT[TYPE] * o.norm(dim=-1)) ** 2).sqrt()
    found = {
        "shape": str(shape),
        "error_over_bound": float(((o - ours[0, :group]).norm(dim=-1) / bound).max()),
        "lse_error": float((lse - our_lse[0, :group]).abs().max()),
    }
    if "FlashInfer" in answers:
        found |= adapted(shape, ours, our_lse)
    for name in ("FlashInfer", "FlashInfer, tensor cores"):
        if name in answers:
            out, lse2 = answers[name]
            found[name] = float((out.float() - ours).norm() / ours.norm())
            found[f"{name}, lse"] = float((lse2 * float(np.log(2)) - our_lse).abs().max())
    return found


def adapted(shape: Shape, ours: Tensor, our_lse: Tensor) -> dict[str, float]:
    """`attention.backends.flashinfer` against ours, behind the batch a row without keys."""
    from helix_gpu.attention.backends.flashinfer import FlashInfer
    from helix_spec.config import ModelShape

    types: dict[str, Any] = {"dtype": short(TYPE), "product_dtype": short(TYPE)}
    attends = FlashInfer(
        ModelShape(
            q_heads=shape.heads, kv_heads=shape.kv_heads, head_dim=DIM,
            partial_dtype=short(TYPE), **types,
        )
    )  # fmt: skip
    pool, tables, lengths = paged(shape, 64)
    q = query(shape)
    out, lse = attends(
        torch.cat([q, q[:1]]), pool,
        torch.cat([tables, tables[:1]]), torch.cat([lengths, lengths[:1] * 0]),
    )  # fmt: skip
    empty = bool((out[-1] == 0).all() and (lse[-1] == -torch.inf).all())
    return {
        "adapter": float((out[:-1] - ours).norm() / ours.norm()) if empty else float("inf"),
        "adapter, lse": float((lse[:-1] - our_lse).abs().max()),
    }


def heads_first(paging: tuple[Tensor, Tensor, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    """The same elements read as [pages, 2, kv_heads, page, DIM]."""
    pool, tables, lengths = paging
    pages, parts, page, kv_heads, dim = pool.shape
    return pool.view(pages, parts, kv_heads, page, dim).transpose(2, 3), tables, lengths


def goals(shape: Shape, times: dict[str, dict[str, float]], ceiling: float) -> dict[str, Any]:
    """The issue's goals as ratios: how many times as long a peer takes, and what a choice costs."""
    us = {name: time_["us"] for name, time_ in times.items()}
    ours = us["ours"]

    def best(prefix: str) -> float | None:
        found = [us[n] for n in us if n.startswith(prefix) and "no LSE" not in n]
        return min(found) / ours if found else None

    return {
        "shape": str(shape), "mib": shape.kv_bytes >> 20,
        "of_ceiling": shape.kv_bytes / ours / 1e3 / ceiling,
        "flashinfer": best("FlashInfer"), "flex": best("flex"), "sdpa": best("SDPA"),
        "paging": ours / us["ours, contiguous"] - 1 if "ours, contiguous" in us else None,
        "lse": ours / us["ours, no LSE"] - 1 if "ours, no LSE" in us else None,
    }  # fmt: skip


def start_flashinfer() -> Any:
    """Compile FlashInfer's kernels in a process of its own, while the other sections run."""
    if importlib.util.find_spec("flashinfer") is None:
        return "not importable: nothing to compare with"
    if DRY:
        return "importable, but it needs a GPU"
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 -- it is read when the process has ended
    process = subprocess.Popen(
        [sys.executable, __file__, "--warm-flashinfer"],
        stdout=log, stderr=subprocess.STDOUT, start_new_session=True,
        env=os.environ | {"MAX_JOBS": "6", "FLASHINFER_CUDA_ARCH_LIST": "9.0a"},
    )  # fmt: skip
    return process, log


def wait_for(flashinfer: Any) -> str:
    """`ready`, or why not."""
    if isinstance(flashinfer, str):
        return flashinfer
    process, log = flashinfer
    try:
        code = process.wait(timeout=max(1.0, min(60.0, LIMIT - 150 - (time.monotonic() - BEGUN))))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # the compilers too
        code = "it did not finish compiling"
    log.seek(0)
    return "ready" if code == 0 else f"not usable ({code}): {log.read()[-2000:]}"


def warm_flashinfer() -> None:
    """In the process of `start_flashinfer`: one small step of each of its two paths."""
    shape = Shape(1, 1024, 32, 8)
    pool = random(16, 2, 64, 8, DIM)
    tables = torch.arange(16, dtype=torch.int32, device=DEVICE)[None]
    lengths = torch.full((1,), 1024, device=DEVICE)
    for tensor_cores in (True, False):
        flashinfer_run(shape, (pool, tables, lengths), tensor_cores=tensor_cores)()
    torch.cuda.synchronize()


# --- 5. A whole step in one graph --------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Wired:
    """Step buffers of C ranks whose exchange is a copy between two tensors."""

    ranks: list[StepBuffers]
    send: Tensor
    """uint8 [from, to, bytes]."""
    received: Tensor
    """uint8 [to, from, bytes]."""


class Shards:
    """C ranks of one request batch on one device: their books, pools and step buffers.

    All inputs of a step are tensors that stay where they are: the books' answers are copied into
    them in place, which is what lets a captured step see this step's owners and lengths.
    """

    def __init__(
        self, cp_size: int, prompts: Sequence[int], steps: int, heads: int, kv_heads: int
    ) -> None:
        from helix_gpu.bookkeeping.rank_book import RankBook
        from helix_spec.config import Config, ModelShape

        self.page, self.cp_size, self.rows = 2 if DRY else 16, cp_size, len(prompts)
        self.longest = max(prompts) + steps
        self.width = -(-self.longest // self.page)
        pages = self.width * len(prompts)
        model = ModelShape(q_heads=heads, kv_heads=kv_heads, head_dim=DIM, dtype=short(TYPE))
        self.config = Config(
            layout=f"pr9757/1:C={cp_size},T={self.page}", pages=[pages] * cp_size,
            max_len=self.longest, model=model,
        )  # fmt: skip
        self.books = [RankBook(self.config, rank) for rank in range(cp_size)]
        self.prompts = list(prompts)

        def make(*shape: int, dtype: torch.dtype = TYPE) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=DEVICE)

        self.q = make(self.rows, heads, DIM)
        self.k, self.v = make(self.rows, kv_heads, DIM), make(self.rows, kv_heads, DIM)
        # Everything that was ever cached, by global position: what the outputs must attend to.
        self.past = make(2, self.rows, self.longest, kv_heads, DIM)
        # One tensor of inputs, so that a step is one copy from pinned memory.
        self.inputs = make(cp_size * self.rows * (self.width + 2), dtype=torch.int64)
        self.staging = torch.zeros(self.inputs.shape, dtype=torch.int64, pin_memory=not DRY)
        self.slots, self.lengths, self.tables = self.views(self.inputs)
        self.staged = [view.numpy() for view in self.views(self.staging)]
        self.pools = self.new_pools()
        self.admit()

    def views(self, inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Slots [C, rows], lengths [C, rows] and tables [C, rows, width] in the run of inputs."""
        few = self.cp_size * self.rows
        slots, lengths, tables = inputs.split([few, few, few * self.width])
        shape = (self.cp_size, self.rows)
        return slots.view(shape), lengths.view(shape), tables.view(*shape, self.width)

    def new_pools(self) -> Tensor:
        """Pools of NaN, one a rank."""
        model = self.config.model
        shape = (self.cp_size, self.config.pages[0], 2, self.page, model.kv_heads, DIM)
        return torch.full(shape, torch.nan, dtype=TYPE, device=DEVICE)

    def admit(self) -> None:
        """Place every prompt, with random K and V."""
        for id, length in enumerate(self.prompts):
            self.past[:, id, :length] = random(2, length, *self.past.shape[3:])
            for rank, book in enumerate(self.books):
                positions = torch.from_numpy(book.plan_admit(id, length).shards[rank].positions())
                book.admit(id, length)
                local = torch.arange(len(positions))
                pages = torch.tensor(book.block_table(id), dtype=torch.int64)[local // self.page]
                at = (pages.to(DEVICE), slice(None), (local % self.page).to(DEVICE))
                self.pools[rank][at] = self.past[:, id, positions.to(DEVICE)].transpose(0, 1)

    def buffers(self) -> Wired:
        """Step buffers of every rank, their send and receive buffers in one tensor each."""
        model = self.config.model
        made = [
            StepBuffers.allocate(
                self.rows, model.q_heads, model.kv_heads, DIM, ranks=self.cp_size,
                longest=self.longest, dtype=TYPE, wire=TYPE, device=DEVICE,
                splits=2 if DRY else None,
            )
            for _ in range(self.cp_size)
        ]  # fmt: skip
        send, received = (torch.empty(self.cp_size, *made[0].send.shape, dtype=torch.uint8,
                                      device=DEVICE) for _ in range(2))  # fmt: skip
        ranks = [
            dataclasses.replace(one, send=send[rank], received=received[rank])
            for rank, one in enumerate(made)
        ]
        return Wired(ranks, send, received)

    def prepare(self) -> set[int]:
        """Advance every book by a step and update the inputs in place; the owners of the step."""
        owners = set()
        ids = list(range(self.rows))
        slots, lengths, tables = self.staged
        for rank, book in enumerate(self.books):
            placed = book.decode_step(ids)
            slots[rank], lengths[rank] = placed.slots, placed.visible
            tables[rank] = book.tables.read(placed.rows, self.width)
            if placed.active.any():
                owners.add(rank)
        self.inputs.copy_(self.staging, non_blocking=True)
        return owners

    def run(self, pools: Tensor, wired: Wired) -> None:
        """One layer of a step on every rank, with the exchange as a copy."""
        for rank, mine in enumerate(wired.ranks):
            attend_shard(
                mine, self.q, self.k, self.v, pools[rank],
                self.slots[rank], self.tables[rank], self.lengths[rank],
            )  # fmt: skip
        wired.received.copy_(wired.send.transpose(0, 1))
        for mine in wired.ranks:
            merge_shards(mine)


def whole_step(report: Report, found: dict[str, Any]) -> None:
    """Section 5: replays equal eager and float64, across ownership boundaries, without a sync."""
    cp_size, heads, kv_heads = (2, 4, 2) if DRY else (4, 32, 8)
    steps = 6 if DRY else 1000
    prompts = [1, 3, 9] if DRY else [1, 15, 16, 17, 500, 1000, 2047, 4000]
    shards = Shards(cp_size, prompts, steps + 8, heads, kv_heads)
    eager_pools = shards.pools.clone()
    graph_buffers, eager_buffers = shards.buffers(), shards.buffers()
    # The warm-up before the capture runs the step too; with no slot it leaves no trace.
    shards.slots.fill_(-1)
    replay = captured(lambda: shards.run(shards.pools, graph_buffers))
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    checks: list[dict[str, Any]] = []
    seen: list[set[int]] = []
    book_us: list[float] = []
    replay_us: list[float] = []
    watched = {0, 1, 15, 16, 17, 63, 64, steps // 2, steps - 1}
    for step in range(steps):
        for x in (shards.q, shards.k, shards.v):
            x.normal_()
        for part, x in enumerate((shards.k, shards.v)):
            for id, length in enumerate(prompts):
                shards.past[part, id, length + step] = x[id]
        if not DRY:
            # The staging memory is reused: the last step's copy must have left it.
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        begun = time.perf_counter()
        seen.append(shards.prepare())
        between = time.perf_counter()
        replay()
        replay_us.append((time.perf_counter() - between) * 1e6)
        book_us.append((between - begun) * 1e6)
        if not DRY:
            torch.cuda.set_sync_debug_mode("default")
        shards.run(eager_pools, eager_buffers)
        for ours, theirs in zip(graph_buffers.ranks, eager_buffers.ranks, strict=True):
            differing += (ours.output != theirs.output).sum() + (ours.lse != theirs.lse).sum()
        if step in watched:
            error = step_error(shards, graph_buffers, step)
            checks.append({"step": step, "error_over_bound": error})
    pools_equal = bool(
        ((shards.pools == eager_pools) | (shards.pools.isnan() & eager_pools.isnan())).all()
    )
    changes = sum(a != b for a, b in itertools.pairwise(seen))
    found |= {
        "steps": steps, "differing_elements": int(differing), "pools_equal": pools_equal,
        "checks": checks, "steps_with_other_owners": changes,
        "wrong": int(differing) > 0 or not pools_equal
        or not all(check["error_over_bound"] <= 1 for check in checks),
        "host_us_books_and_copy": statistics.median(book_us),
        "host_us_replay": statistics.median(replay_us),
    }  # fmt: skip
    report.table(
        f"{steps} replays, {cp_size} shards, {len(prompts)} requests",
        [
            {
                "differing": found["differing_elements"], "pools equal": pools_equal,
                "owner changes": changes,
                "worst error/bound": max(c["error_over_bound"] for c in checks),
                "host µs, ledgers and copy": found["host_us_books_and_copy"],
                "host µs, replay": found["host_us_replay"],
            }
        ],
    )  # fmt: skip
    found["profile"] = profile(shards, replay)
    report.say(f"one step as the profiler sees it: {found['profile']}")
    found["times"] = step_times()
    report.table("a step of one shard (append, decode, reduce, merge)", found["times"])


def step_error(shards: Shards, wired: Wired, step: int) -> float:
    """The merged output against float64 over everything cached so far, as a share of its bound."""
    worst = 0.0
    heads = shards.q.shape[1] // shards.cp_size
    u, u32 = UNIT[TYPE], UNIT[torch.float32]
    for id, length in enumerate(shards.prompts):
        k, v = shards.past[:, id, : length + step + 1]
        o, lse, bound = exact(shards.q[id], k, v, TYPE, DIM**-0.5)
        for rank, mine in enumerate(wired.ranks):
            own = slice(rank * heads, (rank + 1) * heads)
            # What ATT-4 adds for partials that travel, and an output that leaves, in bfloat16. The
            # ranks' weights are their own: they scale the bound, and nothing else.
            outputs, lses = unpack(mine.received, shards.rows, heads, DIM, TYPE)
            weights = (lses[:, id].double() - lse[own]).exp()
            part = outputs[:, id].double().where(weights[..., None] > 0, o[own])
            squares = bound[own] ** 2 + (u * o[own].norm(dim=-1)) ** 2
            squares += ((weights * part.norm(dim=-1) * u) ** 2).sum(0)
            moved = weights * (lses[:, id].double().where(weights > 0, 0).abs() + 1) * 2 * u32
            squares += ((moved * (part - o[own]).norm(dim=-1)) ** 2).sum(0)
            error = (o[own] - mine.output[id].double()).norm(dim=-1) / squares.sqrt()
            worst = max(worst, float(error.max().nan_to_num(float("inf"))))
    return worst


def profile(shards: Shards, replay: Callable[[], Any]) -> dict[str, Any]:
    """Launches, copies and waits of a few steps, for each step."""
    if DRY:
        return {"not_run": "no GPU"}
    steps = 4
    torch.cuda.synchronize()
    kinds = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=kinds) as profiler:
        for _ in range(steps):
            shards.prepare()
            replay()
            # Only so that the staging memory may be written again; it waits once a step.
            torch.cuda.current_stream().synchronize()
    counts: dict[str, int] = {}
    for event in profiler.events():
        if event.name.startswith(("cuda", "Memcpy", "cuLaunch")):
            counts[event.name] = counts.get(event.name, 0) + 1
    return {name: count / steps for name, count in sorted(counts.items())}


def step_times() -> list[dict[str, Any]]:
    """Device and host time of a layer's step on one shard, captured and not."""
    rows = []
    sizes = [(2, 64)] if DRY else [(8, 1024), (8, 8192), (8, 32768)]
    heads, kv_heads = (4, 2) if DRY else (32, 8)
    for batch, tokens in sizes:
        shape = Shape(batch, tokens, heads, kv_heads)
        pool, tables, lengths = paged(shape, 64)
        q = random(batch, heads, DIM)
        k, v = random(batch, kv_heads, DIM), random(batch, kv_heads, DIM)
        slots = tables[:, -1].long() * 64 + 63
        buffers = StepBuffers.allocate(
            batch, heads, kv_heads, DIM, ranks=1, longest=tokens, dtype=q.dtype, wire=q.dtype,
            device=DEVICE,
        )  # fmt: skip

        alone = dataclasses.replace(buffers, received=buffers.send)

        def run(
            b: StepBuffers = alone,
            rest: tuple[Tensor, ...] = (q, k, v, pool, slots, tables, lengths),
        ) -> None:
            attend_shard(b, *rest)
            merge_shards(b)

        graph = captured(run)
        times = timed({"eager": run, "graph": graph}, 20)
        hosts = {}
        for name, call in (("eager", run), ("graph", graph)):
            begun = time.perf_counter()
            for _ in range(1 if DRY else 50):
                call()
            hosts[name] = (time.perf_counter() - begun) * 1e6 / (1 if DRY else 50)
            if not DRY:
                torch.cuda.synchronize()
        rows.append(
            {
                "shape": str(shape), "graph µs": times["graph"]["us"],
                "eager µs": times["eager"]["us"], "host µs, graph": hosts["graph"],
                "host µs, eager": hosts["eager"],
                "kv GB/s in graph": shape.kv_bytes / times["graph"]["us"] / 1e3,
            }
        )  # fmt: skip
    return rows


# --- The run -----------------------------------------------------------------------------------


def main() -> None:
    """Run the sections in order."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="folder for the results ($OUT, or runs/h200)")
    parser.add_argument("--only", nargs="*", help="sections by their first character")
    parser.add_argument("--commit", default="", help="what to name where git cannot say")
    parser.add_argument("--warm-flashinfer", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--peers-of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.warm_flashinfer:
        warm_flashinfer()
        return
    torch.manual_seed(0)
    if arguments.peers_of:
        time_peers(arguments.peers_of)
        return
    # A kernel that hangs ends the process before the machine's own limit does.
    faulthandler.dump_traceback_later(LIMIT + 60, exit=True)
    report = Report(
        arguments.out or Path(os.environ.get("OUT", "runs/h200")), machine(arguments.commit)
    )
    flashinfer = start_flashinfer()
    sections: list[tuple[str, Callable[[dict[str, Any]], None]]] = [
        ("1 correctness", functools.partial(correctness, report)),
        ("2 ceilings", functools.partial(ceilings, report)),
        ("3 settings", functools.partial(sweep, report)),
        # What others' kernels do cannot keep our own sections from running.
        ("5 whole step", functools.partial(whole_step, report)),
        ("4 peers", functools.partial(peers, report, flashinfer=flashinfer)),
    ]
    for name, body in sections:
        if not arguments.only or name[0] in arguments.only:
            report.section(name, body)
    bad = report.end()
    faulthandler.cancel_dump_traceback_later()
    sys.exit(1 if bad else 0)


if __name__ == "__main__":
    main()
