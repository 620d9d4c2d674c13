"""The load-balance claim on real decode steps of several ranks, against the closed form.

`torchrun --nproc-per-node=4 gpu_impl/benchmarks/skew.py [--json FILE]`, all of ours installed.

Where ranks share cores their attention would take turns anyway, so it is made to: each rank attends
alone while the others wait, and a step takes what its slowest rank takes, attention and all else.
A fixed cost f and a cost a for each cached token come from `balanced`, from its emptiest and its
fullest cache. Then the closed form of a step before pull request 9757 is f + a*S/C*(1 + C*x), that
of an even spread f + a*S/C*(1 + x), for prompts of S tokens and x decoded ones for each of them;
`helix-conformance plan` must say so too when it is given these constants.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix_conformance.planning import Hardware, Load, ModelCard, plan
from helix_gpu import native
from helix_gpu.cache import HelixCache
from helix_gpu.mesh import helix_mesh
from helix_spec.configs import Config, ModelShape
from helix_spec.layouts import named_layout

LAYOUTS = ("before_9757", "pr9757", "pr17866", "balanced")
FRACTIONS = (0.0, 0.5, 1.0, 2.0)
BATCH, PROMPT, PAGE, STEPS = 4, 16384, 64, 25
MODEL = ModelShape(layers=1, q_heads=16, kv_heads=4, head_dim=64, dtype="float32")


class Turns:
    """Attention of one rank at a time; `seconds` is how long this rank's last one took."""

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0

    def __call__(self, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Attend when it is this rank's turn."""
        begun, partial = time.perf_counter(), None
        for rank in range(dist.get_world_size()):
            dist.barrier()
            if rank == dist.get_rank():
                alone = time.perf_counter()
                partial = native.attend_pages(*args, **options)
                self.seconds = time.perf_counter() - alone
        dist.barrier()
        self.waited = time.perf_counter() - begun
        assert partial is not None
        return partial


def step_seconds(cache: HelixCache, turns: Turns) -> float:
    """One token for each request: this rank's attention and all else of the step, waiting out."""
    q = torch.zeros(1, BATCH, MODEL.q_heads, MODEL.head_dim)
    kv = torch.zeros(1, BATCH, MODEL.kv_heads, MODEL.head_dim)
    begun = time.perf_counter()
    cache.decode(list(range(BATCH)), q, kv, kv)
    return time.perf_counter() - begun - turns.waited + turns.seconds


def slowest(name: str, fractions: tuple[float, ...]) -> list[float]:
    """Median seconds of a step on its slowest rank, at each decoded / prompt tokens."""
    c, turns = dist.get_world_size(), Turns()
    most = PROMPT * (1 + max(fractions)) + PAGE * c
    config = Config(
        layout=f"{name}/1:C={c},T={PAGE}",
        pages=[BATCH * int(most) // PAGE] * c,
        max_len=2**20,
        model=MODEL,
    )
    cache = HelixCache.on(config, helix_mesh(config), backend=turns)
    cache.pool.normal_()  # decoded tokens that no step wrote
    empty = torch.zeros(1, PROMPT, MODEL.kv_heads, MODEL.head_dim)
    for id in range(BATCH):
        cache.admit(id, PROMPT, lambda at: (empty[:, at], empty[:, at]))
    found, decoded = [], 0
    for x in fractions:
        while decoded < x * PROMPT:
            cache.begin(list(range(BATCH)), [PAGE] * BATCH)
            decoded += PAGE
        times = torch.tensor([step_seconds(cache, turns) for _ in range(STEPS + 2)][2:])
        dist.all_reduce(times, dist.ReduceOp.MAX)
        found.append(statistics.median(times.tolist()))
    return found


def planned_ratio(c: int, fixed: float, per_token: float, x: float) -> float:
    """What `helix-conformance plan` says, given this machine's own constants."""
    numbers = 2 * MODEL.kv_heads * MODEL.head_dim
    card = ModelCard(MODEL.layers, 0, MODEL.q_heads, MODEL.kv_heads, MODEL.head_dim, 0, 0)
    machine = Hardware(
        memory=1e12,
        memory_bandwidth=BATCH * numbers * 4 / per_token,
        link_bandwidth=math.inf,
        link_latency=0.0,
        step_overhead=fixed,
    )
    load = Load(batch=BATCH, prompt_len=PROMPT, decoded=int(x * PROMPT), kv_bytes=4)
    before, even = (
        plan(card, machine, named_layout(name, cp_size=c, tokens_per_block=PAGE), load, tp=1).step
        for name in ("before_9757", "balanced")
    )
    return before / even


def main() -> None:
    """Measure on all ranks, print on the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    c = dist.get_world_size()
    measured = {name: slowest(name, FRACTIONS) for name in LAYOUTS}
    share, even = PROMPT / c, measured["balanced"]
    a = (even[-1] - even[0]) / (share * (FRACTIONS[-1] - FRACTIONS[0]))
    f = even[0] - a * share * (1 + FRACTIONS[0])
    if dist.get_rank() == 0:
        print(f"{c} gloo ranks, {BATCH} requests of {PROMPT} tokens and x times as many decoded")
        print(f"slowest rank: fixed {f * 1e3:.2f} ms, {a * 1e9:.0f} ns for each token of a request")
        print(
            f"{'step / even, in closed form':<30}" + "".join(f"{f'x = {x}':>12}" for x in FRACTIONS)
        )
        closed = [(f + a * share * (1 + c * x)) / (f + a * share * (1 + x)) for x in FRACTIONS]
        planned = [planned_ratio(c, f, a, x) for x in FRACTIONS]
        print(f"{'before_9757':<30}" + "".join(f"{ratio:>12.3f}" for ratio in closed))
        print(f"{'the same by helix plan':<30}" + "".join(f"{ratio:>12.3f}" for ratio in planned))
        print(f"{'step / balanced, measured':<30}")
        for name, steps in measured.items():
            ratios = [step / base for step, base in zip(steps, even, strict=True)]
            print(f"{name:<30}" + "".join(f"{ratio:>12.3f}" for ratio in ratios))
        off = [
            step / base / ratio - 1
            for step, base, ratio in zip(measured["before_9757"], even, closed, strict=True)
        ]
        print(f"{'before_9757 off its form by':<30}" + "".join(f"{part:>12.1%}" for part in off))
        if options.json:
            figures = {"fixed": f, "per_token": a, "x": FRACTIONS, "seconds": measured, "off": off}
            options.json.write_text(json.dumps(figures, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
