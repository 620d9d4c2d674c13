"""The load-balance claim on real decode steps of several ranks, against the closed form.

`torchrun --nproc-per-node=4 gpu_impl/benchmarks/skew.py [--json FILE]`, all of ours installed.

Ranks share cores here, and cores are shared with others. So each rank attends alone while the
others wait, and two clocks are read, both without that waiting: the processor time of the rank's
process for the whole step (bookkeeping, append, attention, exchange, merge), and the wall clock.
The claim is judged by processor time: what the step costs, wherever the system made it wait.

In every round each kind of batch has a step of every layout, in a random order and right after
each other, so that what comes and goes slows all of them. A step takes what its slowest rank takes,
and that is the one that holds most tokens, by the ledger; of several that hold as many it is their
mean. (The largest of four times that are equal but for noise is larger than any of them should be.)
What counts is the mean of the middle half of all rounds: neighbours slow a core by a fifth for a
while, and a median jumps between the two speeds. The interval is the one in which 95 of 100 results
lie when the rounds are drawn again from themselves; the verdict goes by its ends.

Thirty-two query heads share a KV head, so that arithmetic bounds a step and a cached token costs
the same wherever it lies. With four to one memory did, and a token cost up to half as much again in
a large batch as in a small one, as caches and neighbours had it; the closed form, whose tokens all
cost the same, was up to 11 percent off.

A fixed cost f and a cost a for each cached token are the line through the steps of `balanced`.
Then the closed form of a step before pull request 9757 is f + a*S/C*(1 + C*x), that of an even
spread f + a*S/C*(1 + x), for prompts of S tokens and x decoded ones for each of them;
`helix-conformance plan` must say so too when it is given these constants.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from pathlib import Path
from typing import Any

from lib.balance import LAYOUTS, PAGE, Figures, config_for, grown, judged, share_memory
from lib.report import write_json

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.attention import native
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_planner.plans import Hardware, Load, ModelCard, plan
from helix_spec.config import ModelShape
from helix_spec.layouts import named_layout

FRACTIONS = (0.0, 0.5, 1.0, 2.0)
BATCH, PROMPT, ROUNDS, WARM_UP = 4, 16384, 120, 2
MODEL = ModelShape(layers=1, q_heads=32, kv_heads=1, head_dim=64, dtype="float32")
RESAMPLED, GOAL = 1000, 0.1
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


class Steps:
    """Steps of one layout, for a batch at each of the FRACTIONS of decoded / prompt tokens."""

    def __init__(self, name: str) -> None:
        self.turns = Turns()
        config = config_for(
            name, dist.get_world_size(), MODEL, BATCH, PROMPT, FRACTIONS, WARM_UP + ROUNDS
        )
        self.cache = HelixCache.on(config, helix_mesh(config), backend=self.turns)
        self.batches = grown(self.cache, BATCH, PROMPT, FRACTIONS)

    def slowest(self, ids: list[int]) -> list[int]:
        """The ranks that hold most tokens of these requests."""
        held = self.cache.book.ledger.local_lens(ids).sum(0)
        found: list[int] = (held == held.max()).nonzero()[0].tolist()
        return found

    def seconds(self, ids: list[int]) -> Tensor:
        """One token for each of these: this rank's time on every clock, without waiting."""
        q = torch.zeros(1, BATCH, MODEL.q_heads, MODEL.head_dim)
        kv = torch.zeros(1, BATCH, MODEL.kv_heads, MODEL.head_dim)
        begun = read_clocks()
        self.cache.decode(ids, q, kv, kv)
        return read_clocks() - begun - self.turns.waited


def measure() -> dict[str, dict[str, Tensor]]:
    """By clock and layout: seconds [rounds, fractions] of each step's slowest rank."""
    layouts = {name: Steps(name) for name in LAYOUTS}
    share_memory([steps.cache for steps in layouts.values()])
    slowest = {n: [steps.slowest(ids) for ids in steps.batches] for n, steps in layouts.items()}
    mine = torch.zeros(ROUNDS, len(LAYOUTS), len(FRACTIONS), len(CLOCKS), dtype=torch.float64)
    for turn in range(-WARM_UP, ROUNDS):
        order = random.Random(turn)
        for fraction in order.sample(range(len(FRACTIONS)), len(FRACTIONS)):
            for place in order.sample(range(len(LAYOUTS)), len(LAYOUTS)):
                steps = layouts[LAYOUTS[place]]
                mine[max(turn, 0), place, fraction] = steps.seconds(steps.batches[fraction])
    ranks = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, mine)
    times = torch.stack(ranks)
    return {
        clock: {
            name: torch.stack(
                [times[of, :, place, i, kind].mean(0) for i, of in enumerate(slowest[name])], 1
            )
            for place, name in enumerate(LAYOUTS)
        }
        for kind, clock in enumerate(CLOCKS)
    }


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


def middle_means(steps: dict[str, Tensor]) -> Figures:
    """Means over the middle half of the rounds, which come first."""
    middle = slice(ROUNDS // 4, ROUNDS - ROUNDS // 4)
    return {name: of.sort(0).values[middle].mean(0).tolist() for name, of in steps.items()}


def with_interval(steps: dict[str, Tensor], c: int) -> dict[str, Any]:
    """One clock's steps judged, and between which ends `off` lies when rounds are drawn again."""
    draws = torch.randint(ROUNDS, (RESAMPLED, ROUNDS), generator=torch.Generator().manual_seed(0))
    again = [
        judged(middle_means({name: of[draw] for name, of in steps.items()}), c, PROMPT, FRACTIONS)
        for draw in draws
    ]
    off = torch.tensor([one["off"] for one in again], dtype=torch.float64)
    means = middle_means(steps)
    one = judged(means, c, PROMPT, FRACTIONS)
    return one | {
        "planned": [planned_ratio(c, one["fixed"], one["per_token"], x) for x in FRACTIONS],
        "least": off.quantile(0.025, 0).tolist(),
        "most": off.quantile(0.975, 0).tolist(),
        "seconds": means,
    }


def verdict(one: dict[str, Any]) -> str:
    """Whether the ratios are as near to the closed form as they should be."""
    intervals = list(zip(one["least"], one["most"], strict=True))
    if all(least >= -GOAL and most <= GOAL for least, most in intervals):
        return "yes"
    if any(most < -GOAL or least > GOAL for least, most in intervals):
        return "no"
    return f"not settled by {ROUNDS} rounds"


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
    found = {clock: with_interval(steps, c) for clock, steps in measure().items()}
    if dist.get_rank() == 0:
        print(f"{c} gloo ranks, {BATCH} requests of {PROMPT} tokens and x times as many decoded;")
        print(f"middle means of {ROUNDS} steps of the slowest rank, waiting for others left out")
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
            print(row("  at least", one["least"], ".1%"))
            print(row("  at most", one["most"], ".1%"))
        print(f"\nwithin {GOAL:.0%} by processor time: {verdict(found['processor'])}")
        write_json(options.json, {"x": FRACTIONS, "clocks": found})
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
