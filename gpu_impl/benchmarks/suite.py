"""The conformance suite's random traces on one GPU, their steps run by the Triton kernels.

Ranks are threads of this process. Each runs its shard's kernels in turn on the one device: append,
decode, reduction into the send buffer, and after an exchange by copy the merge of what it received.

    PYTHONPATH=spec:reference:gpu_impl:conformance python gpu_impl/benchmarks/suite.py
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import threading
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import helix_gpu.cache
from helix_conformance import runs
from helix_conformance.drivers.threads import ThreadDriver
from helix_conformance.engines import gpu
from helix_conformance.report import failure_text
from helix_conformance.strategies import LAYOUT_NAMES
from helix_gpu.cache import DecodeStep, HelixCache
from helix_gpu.kernels.step import StepBuffers, attend_shard, merge_shards
from helix_gpu.rope import rotate

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_TURN = threading.Lock()


class KernelCache(HelixCache):
    """`HelixCache` whose steps are the kernels'."""

    def attend(self, step: DecodeStep, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """As `HelixCache.attend`."""
        model, ranks, pool = self.config.model, self.book.layout.cp_size, self.pool[layer]
        rows, t = len(step.lengths), pool.shape[2]
        wire = getattr(torch, model.partial_dtype) if ranks > 1 else torch.float32
        slots = torch.full((rows,), -1, dtype=torch.int64, device=self.device)
        slots[step.own] = step.own_pages * t + step.own_offsets
        buffers = StepBuffers.allocate(
            rows, self.q_heads, self.kv_heads, model.head_dim, ranks=ranks, longest=512,
            dtype=self.dtype, wire=wire, device=self.device,
        )  # fmt: skip
        with IN_TURN:
            attend_shard(
                buffers, rotate(q, step.cos, step.sin), rotate(k, step.cos, step.sin), v, pool,
                slots, step.tables, step.lengths,
            )  # fmt: skip
        buffers = dataclasses.replace(buffers, received=self._exchange(buffers.send))
        with IN_TURN:
            return merge_shards(buffers)[: len(step.book.rows)]


def main() -> None:
    """Play traces of every layout on one shard and on several, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120, help="nothing is begun after these")
    parser.add_argument("--cp", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--out", type=Path, help="also write JSON here")
    arguments = parser.parse_args()
    helix_gpu.cache.HelixCache = KernelCache  # type: ignore[misc]
    gpu._device = lambda: DEVICE
    driver = ThreadDriver(gpu.GpuEngine)
    profiles = runs.profiles_to_check(driver.profiles, ())
    print(f"{DEVICE}; profiles {', '.join(sorted(profiles))}", flush=True)
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    for cp_size in arguments.cp:
        for name in LAYOUT_NAMES:
            row: dict[str, Any] = {"layout": name, "cp": cp_size}
            rows.append(row)
            if time.monotonic() - begun > arguments.seconds:
                row["verdict"] = "not run"
            else:
                tally = runs.Tally()
                failure = runs.random_traces(
                    driver,
                    runs.layout_traces(driver, name, profiles, cp_sizes=[cp_size]),
                    profiles,
                    examples=arguments.examples,
                    seed=f"0 {name}",  # type: ignore[arg-type,unused-ignore]
                    tally=tally,
                )
                row |= {"verdict": failure.verdict if failure else "pass"}
                row |= {"traces": tally.traces, "events": tally.events}
                row["seconds"] = round(tally.seconds, 1)
                if failure is not None:
                    row["failure"] = "\n".join(map(str, failure_text(failure)))
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            if arguments.out:
                arguments.out.write_text(json.dumps(rows, indent=1) + "\n")
    driver.close()
    raise SystemExit(any(row["verdict"] not in ("pass", "not run") for row in rows))


if __name__ == "__main__":
    main()
