"""The load-balance claim on real decode steps of several ranks, against the closed form.

`torchrun --nproc-per-node=4 gpu_impl/benchmarks/skew.py [--json FILE]`, all of ours installed.

Ranks share cores here, and cores are shared with others. So each rank attends alone while the
others wait, and two clocks are read, both without that waiting: the processor time of the rank's
process for the whole step (bookkeeping, append, attention, exchange, merge), and the wall clock. A
rank's time is its median over rounds, in each of which every layout, in a random order, has a step
of every kind; a step takes what its slowest rank takes. The claim is judged by processor time: what
the step costs, wherever the system made it wait.

A fixed cost f and a cost a for each cached token are the line through the steps of `balanced`.
Then the closed form of a step before pull request 9757 is f + a*S/C*(1 + C*x), that of an even
spread f + a*S/C*(1 + x), for prompts of S tokens and x decoded ones for each of them;
`helix-conformance plan` must say so too when it is given these constants.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu import native
from helix_gpu.cache import HelixCache
from helix_gpu.mesh import helix_mesh
from helix_spec.configs import Config, ModelShape
from helix_spec.layouts import named_layout
from helix_spec.placement import pages_needed

LAYOUTS = ("before_9757", "pr9757", "pr17866", "balanced")
FRACTIONS = (0.0, 0.5, 1.0, 2.0)
BATCH, PROMPT, PAGE, ROUNDS, WARM_UP = 4, 16384, 64, 60, 2
MODEL = ModelShape(layers=1, q_heads=16, kv_heads=4, head_dim=64, dtype="float32")
CLOCKS = {"processor": time.process_time, "wall": time.perf_counter}


def read_clocks() -> Tensor:
    """Seconds on every clock."""
    return torch.tensor([clock() for clock in CLOCKS.values()], dtype=torch.float64)


class Turns:
    """Attention of one rank at a time; `waited` is what the last one cost beyond attending."""

    def __init__(self) -> None:
        self.waited = read_clocks()

    def __call__(self, *args: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
        """Attend when it is this rank's turn."""
        begun, partial, alone = read_clocks(), None, read_clocks()
        for rank in range(dist.get_world_size()):
            dist.barrier()
            if rank == dist.get_rank():
                alone = read_clocks()
                partial = native.attend_pages(*args, **options)
                alone = read_clocks() - alone
        dist.barrier()
        self.waited = read_clocks() - begun - alone
        assert partial is not None
        return partial


def config_for(
    name: str, c: int, model: ModelShape, batch: int, prompt: int, fractions: Sequence[float]
) -> Config:
    """A layout of `c` ranks with room for what `grown` makes of these."""
    rules = named_layout(name, cp_size=c, tokens_per_block=PAGE)
    most = int(prompt * max(fractions))
    return Config(
        layout=f"{name}/1:C={c},T={PAGE}",
        # As many as the longest batch fills, and one that each request opens when measured.
        pages=[
            sum(
                pages_needed(rules, prompt, most, rank, id if name == "balanced" else 0)
                + len(fractions)
                for id in range(batch)
            )
            for rank in range(c)
        ],
        max_len=prompt + most + 2 * PAGE,
        model=model,
        poison=False,
    )


def grown(
    cache: HelixCache, batch: int, prompt: int, fractions: Sequence[float]
) -> list[list[int]]:
    """A batch of requests at each of the fractions of decoded / prompt tokens.

    Batches are forks of each other, so that they share their prompts and what was decoded first.
    Prompts are zeros, and nothing is cached of decoded tokens: they have lengths and pages.
    """
    model, none = cache.config.model, torch.zeros((), dtype=cache.dtype, device=cache.device)

    def zeros(positions: Tensor) -> tuple[Tensor, Tensor | None]:
        k = none.expand(model.layers, len(positions), cache.kv_heads, model.key_dim)
        return k, None if model.latent else k

    for id in range(batch):
        cache.admit(id, prompt, zeros, rotated=True)
    batches, ids, decoded = list[list[int]](), list(range(batch)), 0
    for place, x in enumerate(fractions):
        if place:
            parents, ids = ids, [id + batch for id in ids]
            for parent, child in zip(parents, ids, strict=True):
                cache.fork(parent, child)
        while decoded < x * prompt:
            cache.book.decode_step(ids, [PAGE] * batch)
            decoded += PAGE
        batches.append(ids)
    return batches


class Steps:
    """Steps of one layout, for a batch at each of the FRACTIONS of decoded / prompt tokens."""

    def __init__(self, name: str) -> None:
        self.turns = Turns()
        config = config_for(name, dist.get_world_size(), MODEL, BATCH, PROMPT, FRACTIONS)
        self.cache = HelixCache.on(config, helix_mesh(config), backend=self.turns)
        self.batches = grown(self.cache, BATCH, PROMPT, FRACTIONS)

    def seconds(self, ids: list[int]) -> Tensor:
        """One token for each of these: this rank's time on every clock, without waiting."""
        q = torch.zeros(1, BATCH, MODEL.q_heads, MODEL.head_dim)
        kv = torch.zeros(1, BATCH, MODEL.kv_heads, MODEL.head_dim)
        begun = read_clocks()
        self.cache.decode(ids, q, kv, kv)
        return read_clocks() - begun - self.turns.waited


Figures = dict[str, list[float]]
"""By layout, one for each of the FRACTIONS."""


def share_memory(caches: list[HelixCache]) -> None:
    """Let all caches read the same pages, of random numbers.

    In memory of their own one layout was up to 20 percent slower than another that holds as much,
    a whole run long: how a pool's memory lies is none of the layout's doing.
    """
    largest = max((cache.pool for cache in caches), key=lambda pool: pool.shape[1]).normal_()
    for cache in caches:
        cache.pool = largest[:, : cache.pool.shape[1]]


def measure() -> dict[str, tuple[Figures, Figures]]:
    """By clock: the largest of the ranks' median seconds, and the largest of their spreads.

    A spread is what lies between the quartiles, over the median.
    """
    layouts = [Steps(name) for name in LAYOUTS]
    share_memory([layout.cache for layout in layouts])
    times = torch.zeros(ROUNDS, len(LAYOUTS), len(FRACTIONS), len(CLOCKS), dtype=torch.float64)
    for turn in range(-WARM_UP, ROUNDS):
        for layout in random.Random(turn).sample(range(len(layouts)), len(layouts)):
            for fraction, ids in enumerate(layouts[layout].batches):
                times[max(turn, 0), layout, fraction] = layouts[layout].seconds(ids)
    low, slowest, high = times.quantile(torch.tensor([0.25, 0.5, 0.75], dtype=torch.float64), 0)
    spread = (high - low) / slowest
    for figures in (slowest, spread):
        dist.all_reduce(figures, dist.ReduceOp.MAX)
    return {
        clock: (
            dict(zip(LAYOUTS, slowest[..., place].tolist(), strict=True)),
            dict(zip(LAYOUTS, spread[..., place].tolist(), strict=True)),
        )
        for place, clock in enumerate(CLOCKS)
    }


def planned_ratio(c: int, fixed: float, per_token: float, x: float) -> float:
    """What `helix-conformance plan` says, given this machine's own constants."""
    # Only needed here: `ranks.py` takes the rest to machines without what the suite needs.
    from helix_conformance.planning import Hardware, Load, ModelCard, plan

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


def judged(steps: Figures, c: int, prompt: int, fractions: Sequence[float]) -> dict[str, Any]:
    """What the closed form says of one clock's steps, and how far the measured ones are off."""
    even, share = steps["balanced"], prompt / c
    a, f = statistics.linear_regression([share * (1 + x) for x in fractions], even)
    closed = [(f + a * share * (1 + c * x)) / (f + a * share * (1 + x)) for x in fractions]
    ratios = {
        name: [step / base for step, base in zip(of, even, strict=True)]
        for name, of in steps.items()
    }
    off = [r / form - 1 for r, form in zip(ratios["before_9757"], closed, strict=True)]
    return {"fixed": f, "per_token": a, "closed": closed, "ratios": ratios, "off": off}


def row(name: str, figures: list[float], form: str = ".3f") -> str:
    """A line of the table."""
    return f"{name:<30}" + "".join(f"{figure:>12{form}}" for figure in figures)


def main() -> None:
    """Measure on all ranks, print on the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    c = dist.get_world_size()
    found = {}
    for clock, (steps, spread) in measure().items():
        found[clock] = one = judged(steps, c, PROMPT, FRACTIONS)
        planned = [planned_ratio(c, one["fixed"], one["per_token"], x) for x in FRACTIONS]
        one |= {"planned": planned, "seconds": steps, "spread": spread}
    if dist.get_rank() == 0:
        print(f"{c} gloo ranks, {BATCH} requests of {PROMPT} tokens and x times as many decoded;")
        print(f"a step is its slowest rank's median of {ROUNDS}, waiting for others left out")
        print("spread: between the quartiles, over the median, of the rank that varies most")
        for clock, one in found.items():
            print(
                f"\n{clock} time: fixed {one['fixed'] * 1e3:.2f} ms, {one['per_token'] * 1e9:.0f} "
                "ns for each token of a request"
            )
            print(f"{'step / even, in closed form':<30}", end="")
            print("".join(f"{f'x = {x}':>12}" for x in FRACTIONS))
            print(row("before_9757", one["closed"]))
            print(row("the same by helix plan", one["planned"]))
            print("step / balanced, measured")
            for name, ratios in one["ratios"].items():
                print(row(name, ratios))
            print(row("before_9757 off its form by", one["off"], ".1%"))
            print(row("spread of before_9757", one["spread"]["before_9757"], ".1%"))
            print(row("spread of balanced", one["spread"]["balanced"], ".1%"))
        if options.json:
            options.json.write_text(json.dumps({"x": FRACTIONS, "clocks": found}, indent=1))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
