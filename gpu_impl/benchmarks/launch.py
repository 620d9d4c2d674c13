"""`HelixCache`'s own launch path on one GPU: its step graphs, and exchanges that are captured.

    PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/launch.py
    PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/launch.py --dry-run   # CPU, interpreted

Prints tables, and writes them as JSON to `--out`. README.md beside this file says how to read them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from lib import DRY
from lib.device import DEVICE, again, device_time, strict, wait
from lib.exchanges import exchanged
from lib.models import models
from lib.report import show, write_json

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.cache import HelixCache
from helix_gpu.comm.exchange import MakeExchange, all_to_all
from helix_gpu.comm.push import push
from helix_gpu.graphs import StepGraph, cuda_graph
from helix_spec.config import Config, ModelShape

REPLAYS = 8 if DRY else 1000
LEAVING = 4 if DRY else 40
"""Steps from one request that leaves, and comes back half as many later, to the next."""
PROMPTS = [1, 3, 5, 9] if DRY else [1, 15, 16, 17, 500, 1000, 2047, 4000]


class Twins:
    """Two caches of one history: the steps of one are replayed, those of the other launched."""

    def __init__(self, model: ModelShape) -> None:
        # One row is always a dummy, and more are where requests have left.
        self.model, self.rows, page = model, len(PROMPTS) + 1, 2 if DRY else 64
        longest = max(PROMPTS) + REPLAYS
        config = Config(
            layout=f"pr9757/1:C=1,T={page}",
            pages=[len(PROMPTS) * -(-longest // page)],
            max_len=longest,
            model=model,
        )
        self.replayed, self.launched = (
            HelixCache(config, rank=0, device=DEVICE, backend="triton") for _ in range(2)
        )
        for cache in (self.replayed, self.launched):
            cache.pool.zero_()  # slots that are never used are to be equal too
        self.graph = StepGraph(self.replayed, self.rows, again if DRY else cuda_graph)
        # The same buffers, and so the same splits: results must not differ by a bit.
        self.launched.reserve(self.rows)
        for id in range(len(PROMPTS)):
            self.admit(id)

    def admit(self, id: int) -> None:
        """Both caches take a prompt, of the same random K and V."""
        _, k, v = self.drawn(PROMPTS[id])
        for cache in (self.replayed, self.launched):
            cache.admit(id, PROMPTS[id], lambda _: (k, v))

    def release(self, id: int) -> None:
        """Both caches forget a request."""
        for cache in (self.replayed, self.launched):
            cache.release(id)

    def drawn(self, tokens: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """Random Q, K and V [layers, tokens, heads, dim]; no V for a latent cache."""
        model, dtype = self.model, self.replayed.dtype
        heads = [model.q_heads, self.replayed.kv_heads, self.replayed.kv_heads]
        dims = [model.key_dim, model.key_dim, model.value_dim]
        q, k, v = (
            torch.randn(model.layers, tokens, h, d, dtype=dtype, device=DEVICE)
            for h, d in zip(heads, dims, strict=True)
        )
        return q, k, None if model.latent else v


def replays(name: str, model: ModelShape) -> dict[str, Any]:
    """Many steps replayed and launched; requests leave, and come back as prompts."""
    twins, host, launch_host = Twins(model), list[float](), list[float]()
    differing = torch.zeros((), dtype=torch.int64, device=DEVICE)
    live, gone = list(range(len(PROMPTS))), list[int]()
    for step in range(REPLAYS):
        if step % LEAVING == LEAVING // 2:
            gone.append(live.pop(0))
            twins.release(gone[-1])
        if step % LEAVING == LEAVING - 1:
            live.append(gone.pop())
            twins.admit(live[-1])
        q, k, v = twins.drawn(len(live))
        wait()
        strict(True)
        begun = time.perf_counter()
        output = twins.graph.decode(live, q, k, v)
        host.append((time.perf_counter() - begun) * 1e6)
        strict(False)
        wait()
        begun = time.perf_counter()
        want = launched(twins, live, q, k, v)
        launch_host.append((time.perf_counter() - begun) * 1e6)
        differing += (output != want).sum() + output.isnan().sum()
    a, b = (cache.pool.view(torch.uint8) for cache in (twins.replayed, twins.launched))
    return {
        "model": name,
        "layers": model.layers,
        "replays": REPLAYS,
        "elements that differ": int(differing),
        "caches equal": torch.equal(a, b),
        "us host, replayed": statistics.median(host),
        "us host, launched": statistics.median(launch_host),
        "us of the graph": device_time(lambda: twins.graph.replay(q, k, v)),
    }


def launched(twins: Twins, live: list[int], q: Tensor, k: Tensor, v: Tensor | None) -> Tensor:
    """The step without a graph, dummies of zeros behind it."""

    def padded(rows: Tensor) -> Tensor:
        return torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, pad))

    pad = twins.rows - len(live)
    return twins.launched.decode(
        live, padded(q), padded(k), None if v is None else padded(v), pad=pad
    )


def main() -> None:
    """Replay the models' steps and the exchanges; exit status 1 if anything differs."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on the CPU")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    found = {"steps": [replays(name, model) for name, model in models().items()]}
    show("steps of all layers: replayed and launched", found["steps"])
    with tempfile.TemporaryDirectory() as folder:
        store = dist.FileStore(f"{folder}/store", 1)
        dist.init_process_group("gloo" if DRY else "nccl", store=store, rank=0, world_size=1)
        makers: dict[str, MakeExchange] = {"packed all-to-all": all_to_all, "push": push}
        found["exchanges"] = [exchanged(name, make, REPLAYS) for name, make in makers.items()]
        dist.destroy_process_group()
    show("exchanges of one rank with itself", found["exchanges"])
    write_json(arguments.out, found)
    wrong = any(row["elements that differ"] or not row["caches equal"] for row in found["steps"])
    sys.exit(wrong or any(row["wrong bytes"] for row in found["exchanges"]))


if __name__ == "__main__":
    main()
