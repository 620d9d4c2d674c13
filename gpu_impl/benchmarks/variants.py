"""Decode's variants beside what they replace, on one GPU: right first, then timed in turn.

    PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/variants.py
    PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/variants.py --dry-run   # CPU, interpreted

A single split written as it is sent; tokens of a request that attend together; caches of 8 bits
read by pairs. Tables go to `--out`, or $OUT, as `variants.txt` and `variants.json`.
"""

from __future__ import annotations

import argparse
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from lib import DRY
from lib.device import DEVICE, TYPE, captured, machine, random, timed
from lib.report import Report

import torch
from torch import Tensor

from helix_gpu.attention.kernels import decode as decode_module
from helix_gpu.attention.kernels import mla as mla_module
from helix_gpu.attention.kernels.decode import decode
from helix_gpu.attention.kernels.mla import decode_latent
from helix_gpu.attention.kernels.reduce_pack import reduce_pack
from helix_gpu.attention.kernels.settings import DecodeSettings, splits_for
from helix_gpu.attention.partials import unpack

NARROW = torch.float8_e4m3fn
PAGE = 16 if DRY else 64
DIM, LATENT, ROPE = (16, 32, 16) if DRY else (128, 512, 64)
ROUNDS = 40


class Shape:
    """Random requests of equal lengths, their pages in random order, and room for the results."""

    def __init__(
        self, rows: int, length: int, heads: int, kv_heads: int, cache: torch.dtype = TYPE,
        *, tokens: int = 1, splits: int | None = None, resident: int = 1,
    ) -> None:  # fmt: skip
        self.rows, self.length, self.heads, self.tokens = rows, length, heads, tokens
        latent = kv_heads == 0
        self.dim = LATENT if latent else DIM
        pages = rows * -(-length // PAGE)
        shape = (pages, 1, PAGE, 1, LATENT + ROPE) if latent else (pages, 2, PAGE, kv_heads, DIM)
        self.pool = torch.empty(shape, dtype=cache, device=DEVICE)
        for one in self.pool.split(1024):
            one.copy_(random(*one.shape, dtype=torch.float32).to(cache))
        if latent:
            self.pool = self.pool[:, 0, :, 0]
        tables = torch.randperm(pages, device=DEVICE).view(rows, -1).to(torch.int32)
        self.tables = tables.repeat_interleave(tokens, 0)
        # Of several tokens the last one sees all.
        seen = torch.arange(length - tokens + 1, length + 1, dtype=torch.int32, device=DEVICE)
        self.lengths = seen.repeat(rows)
        self.q = random(rows * tokens, heads, shape[-1])
        programs = -(-heads // 64) if latent else kv_heads
        self.splits = splits or splits_for(rows, programs, length, resident=resident)
        self.groups = torch.arange(rows + 1, dtype=torch.int32, device=DEVICE) * tokens
        self.by = decode_latent if latent else decode
        self.given: dict[str, Any] = {"scale": 192**-0.5 if latent else DIM**-0.5}

    def run(
        self, *, packed: bool = False, together: bool = False,
        settings: DecodeSettings | None = None, splits: int | None = None,
    ) -> Callable[[], Tensor]:  # fmt: skip
        """Attention and, unless it is `packed`, reduction into a send buffer, which is returned."""
        n, splits = len(self.q), splits or self.splits
        out = torch.empty(splits, n, self.heads, self.dim, device=DEVICE)
        lse2 = torch.empty(splits, n, self.heads, device=DEVICE)
        size = n * self.heads * (self.dim * TYPE.itemsize + 4)
        send = torch.empty(1, size, dtype=torch.uint8, device=DEVICE)
        how = dict(self.given, settings=settings)
        if together:
            how |= {"groups": self.groups, "tokens": self.tokens}
        what = self.q, self.pool, self.tables, self.lengths

        def run() -> Tensor:
            if packed:
                sent = unpack(send, n, self.heads, self.dim, TYPE)
                self.by(*what, *sent, packed=True, **how)
            else:
                self.by(*what, out, lse2, **how)
                reduce_pack(out, lse2, send, TYPE)
            return send

        return run

    def outputs(self, send: Tensor) -> tuple[Tensor, Tensor]:
        """Outputs and log-sum-exps in a send buffer."""
        output, lse = unpack(send, len(self.q), self.heads, self.dim, TYPE)
        return output[0].float(), lse[0]


@contextmanager
def without_pairs() -> Iterator[None]:
    """8-bit caches read as others are: what `narrow` replaces."""
    modules: Any = (decode_module, mla_module)
    kept = decode_module.pairs
    for module in modules:
        module.pairs = lambda pool, product: None
    yield
    for module in modules:
        module.pairs = kept


def off(shape: Shape, one: Tensor, other: Tensor) -> dict[str, float]:
    """How far two results of the same attention are from each other."""
    (a, lse_a), (b, lse_b) = shape.outputs(one), shape.outputs(other)
    error = (a - b).norm(dim=-1) / b.norm(dim=-1)
    return {
        "output": float(error.max().nan_to_num(9)),
        "lse": float((lse_a - lse_b).abs().max().nan_to_num(9)),
    }


def one_split(found: dict[str, Any], report: Report) -> None:
    """A single split: two launches against one."""
    rows = []
    shapes = [(3, 40, 4, 2)] if DRY else [
        (32, 32768, 32, 8), (64, 4096, 32, 8), (128, 2048, 32, 8), (128, 2048, 64, 8),
        (64, 4096, 128, 0), (132, 2048, 16, 0),
    ]  # fmt: skip
    for given in shapes:
        shape = Shape(*given, splits=1)
        two, one = shape.run(), shape.run(packed=True)
        found["wrong"] = found.get("wrong") or not torch.equal(two(), one())
        us = timed({"two launches": captured(two), "one": captured(one)}, ROUNDS)
        rows.append(named(given) | {k: round(v["us"], 1) for k, v in us.items()})
        del shape, two, one
    report.table("one split: decode and reduce_pack, and decode alone, us", rows)
    found["rows"] = rows


def groups(found: dict[str, Any], report: Report) -> None:
    """Tokens of a request: one, several each by itself, several together."""
    rows = []
    shapes = [(2, 40, 4, 2)] if DRY else [
        (8, 32768, 32, 8), (1, 131072, 32, 8), (32, 8192, 64, 8), (8, 32768, 16, 1),
        (8, 32768, 8, 8),
    ]  # fmt: skip
    for given in shapes:
        alone = Shape(*given)
        times = {"1": captured(alone.run())}
        errors = []
        for tokens in (2, 4, 8):
            shape = Shape(*given, tokens=tokens)
            apart, together = shape.run(splits=7), shape.run(together=True)
            errors.append(off(shape, together(), apart()))
            times[str(tokens)] = captured(together)
            if tokens == 4:
                times["4 apart"] = captured(shape.run())
                with_splits = splits_for(4 * given[0], given[3], given[1])
                times["4 apart, own splits"] = captured(shape.run(splits=with_splits))
        us = {name: one["us"] for name, one in timed(times, ROUNDS).items()}
        worst = max(error["output"] for error in errors)
        found["wrong"] = found.get("wrong") or worst > 0.02
        rows.append(
            named(given)
            | {f"{name} tokens": round(value, 1) for name, value in us.items()}
            | {"4 over 1": round(us["4"] / us["1"], 3), "differs by": f"{worst:.1e}"}
        )
        del alone, shape, apart, together, times
    report.table("tokens of a request that attend together, us", rows)
    found["rows"] = rows


def narrow(found: dict[str, Any], report: Report) -> None:
    """8-bit caches: by elements, by pairs, and by pairs in other settings; 16 bits beside them."""
    rows = []
    options = [DecodeSettings(16, 4, 2)] if DRY else [
        DecodeSettings(64, 2, 3, resident=4), DecodeSettings(64, 4, 3, resident=4),
        DecodeSettings(64, 2, 4, resident=3), DecodeSettings(128, 4, 3, resident=2),
        DecodeSettings(64, 4, 4, resident=3), DecodeSettings(32, 2, 4, resident=4),
    ]  # fmt: skip
    latents = [DecodeSettings(16, 4, 2, 16)] if DRY else [
        DecodeSettings(64, 4, 3, 16, 2), DecodeSettings(32, 4, 3, 16, 2),
        DecodeSettings(64, 8, 3, 16, 1), DecodeSettings(64, 4, 2, 16, 2),
        DecodeSettings(32, 4, 4, 16, 3),
    ]  # fmt: skip
    plain = DecodeSettings(64, 4, 3, resident=4)
    plain_latent = DecodeSettings(64, 8, 3, heads=64)
    shapes = [(2, 40, 4, 2), (2, 40, 4, 0)] if DRY else [
        (8, 32768, 32, 8), (32, 8192, 64, 8), (1, 131072, 32, 8), (8, 8192, 32, 8),
        (8, 32768, 16, 0), (32, 32768, 16, 0), (1, 131072, 16, 0),
    ]  # fmt: skip
    for given in shapes:
        latent = given[3] == 0
        programs = 1 if latent else given[3]
        shape = Shape(*given, NARROW)

        def run(settings: DecodeSettings, shape: Shape = shape, programs: int = programs) -> Any:
            splits = splits_for(shape.rows, programs, shape.length, resident=settings.resident)
            return shape.run(settings=settings, splits=splits)

        with without_pairs():
            before = run(plain_latent if latent else plain)
            expected = before().clone()
            times = {"by elements": captured(before)}
        error = {"output": 0.0, "lse": 0.0}
        for settings in latents if latent else options:
            run_it = run(settings)
            one = off(shape, run_it(), expected)
            error = {key: max(error[key], one[key]) for key in error}
            name = f"({settings.block},{settings.warps},{settings.stages},{settings.resident})"
            times[name] = captured(run_it)
        wide = Shape(*given, TYPE) if given[0] * given[1] <= 2**18 else None
        if wide is not None:
            resident = 2 if latent else 1
            splits = splits_for(given[0], programs, given[1], resident=resident)
            times["16 bits"] = captured(wide.run(splits=splits))
        found["wrong"] = found.get("wrong") or error["output"] > 0.02
        us = {name: round(one["us"], 1) for name, one in timed(times, ROUNDS).items()}
        rows.append(named(given) | us | {"differs by": f"{error['output']:.1e}"})
        report.table(
            f"8 bits, {given}; settings are (block, warps, stages, resident), us", rows[-1:]
        )
        del shape, wide, times, before, run_it, run
    found["rows"] = rows


def numbers(found: dict[str, Any], report: Report) -> None:
    """Every e4m3 number exactly, NaN as NaN, queries of any size: on this device's own units."""
    every = torch.arange(256, dtype=torch.uint8, device=DEVICE).view(NARROW)
    kept = ~every.float().isnan()
    row = torch.where(kept, every.float(), 0.5).to(NARROW)
    table = torch.zeros(1, 1, dtype=torch.int32, device=DEVICE)
    length = torch.ones(1, dtype=torch.int32, device=DEVICE)
    rows = []
    types = (torch.float16,) if DRY else (torch.float16, torch.bfloat16)
    for dtype, latent in itertools.product(types, (False, True)):

        def attend(
            q: Tensor, k: Tensor, v: Tensor, scale: float, latent: bool = latent
        ) -> tuple[Tensor, float]:
            out = torch.full((1, 1, 1, 256), torch.nan, device=DEVICE)
            lse2 = torch.full((1, 1, 1), torch.nan, device=DEVICE)
            if latent:
                decode_latent(q, k.view(1, 1, 256), table, length, out, lse2, scale=scale)
            else:
                pool = torch.stack((k, v)).view(1, 2, 1, 1, 256)
                decode(q, pool, table, length, out, lse2, scale=scale)
            return out.flatten(), float(lse2) * 0.6931471805599453

        wrong = 0
        worst = 0.0
        sizes = [2.0**-14, 1.0, 2.0**15] + ([2.0**17, 2.0**90] if dtype == torch.bfloat16 else [])
        for size in sizes:
            q = torch.full((1, 1, 256), size, dtype=dtype, device=DEVICE)
            out, lse = attend(q, row, row, 2.0**-6)
            wrong += int((out != row.float()).sum())
            score = float(row.double().sum()) * size * 2**-6
            worst = max(worst, abs(lse - score) / abs(score))
            # Each number by itself: alone in K, so that a lost subnormal is not hidden by others.
            for number in row[:: 1 if size == 1 and not DRY else 37]:
                alone = torch.zeros(256, device=DEVICE)
                alone[77] = number.float()
                _, lse = attend(q, alone.to(NARROW), row, 1.0)
                score = float(number.float()) * size
                worst = max(worst, abs(lse - score) / max(abs(score), 1e-30))
        poisoned = row.clone()
        poisoned[5] = torch.nan
        q = torch.ones(1, 1, 256, dtype=dtype, device=DEVICE)
        of_k = attend(q, poisoned, row, 1.0)[0].isnan().sum()
        of_v = attend(q, row, poisoned, 1.0)[0].isnan().sum()
        nan = (int(of_k), int(of_v))
        right = nan == ((256, 0) if latent else (256, 1))  # a latent's K is its V
        found["wrong"] = found.get("wrong") or bool(wrong) or worst > 1e-6 or not right
        rows.append(
            {"dtype": str(dtype), "latent": latent, "numbers wrong": wrong,
             "score off by": f"{worst:.1e}", "NaN of K, of V": nan}
        )  # fmt: skip
    report.table("e4m3 numbers read by pairs", rows)
    found["rows"] = rows


def named(given: tuple[int, ...]) -> dict[str, int]:
    """A shape as columns; 0 KV heads are a latent."""
    return dict(zip(("rows", "keys", "heads", "kv_heads"), given, strict=False))


SECTIONS = {"numbers": numbers, "one split": one_split, "groups": groups, "narrow": narrow}


def main() -> None:
    """Run the sections; exit status 1 if any failed or found a wrong result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--out", type=Path, default=Path(os.environ.get("OUT", "runs/h200")))
    parser.add_argument("--only", nargs="*", choices=SECTIONS, default=list(SECTIONS))
    parser.add_argument("--commit", default="", help="what to write as this tree's commit")
    options = parser.parse_args()
    torch.manual_seed(0)
    report = Report(options.out, machine(options.commit), "variants")
    for name in options.only:
        report.section(name, lambda found, name=name: SECTIONS[name](found, report))
    sys.exit(report.end())


if __name__ == "__main__":
    main()
