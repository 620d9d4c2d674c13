"""What needs several GPUs of one host: the exchanges, and steps that are sharded over them.

    PYTHONPATH=spec:gpu_impl torchrun --nproc-per-node=4 gpu_impl/benchmarks/ranks.py --out DIR

README.md beside this file says how to read the tables. `--dry-run` does every section on CPU
ranks at toy sizes, its kernels interpreted. Results go to `--out` (or $OUT) after each section:
`ranks.json`, `ranks.txt`.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import math
import operator
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

# NVLink multicast stays off. All ranks are on this host, whatever its name resolves to.
os.environ |= {
    "NCCL_NVLS_ENABLE": "0",
    "TORCH_SYMM_MEM_DISABLE_MULTICAST": "1",
    "NVSHMEM_DISABLE_NVLS": "1",
    "GLOO_SOCKET_IFNAME": "lo",
}

from lib import DRY, device
from lib.balance import LAYOUTS, PAGE, config_for, grown, judged, share_memory
from lib.device import DEVICE, TYPE, again, captured, device_time, random
from lib.exchanges import MODEL as GROUPED
from lib.exchanges import Merges, exchanged, message_bytes, pushing
from lib.kernels import read_kernel
from lib.models import models
from lib.ranks import (
    PATIENCE,
    Found,
    More,
    Ranks,
    differing,
    goal,
    host_times,
    limited,
    of_all,
    tidy,
    times_of,
    world,
)
from lib.report import Report

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.attention.kernels.step import attend_shard
from helix_gpu.bookkeeping.rank_book import RankBook
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.cache import DecodeStep, HelixCache
from helix_gpu.comm import exchange as exchanges
from helix_gpu.comm import hop_b
from helix_gpu.comm.exchange import MakeExchange
from helix_gpu.comm.mesh import helix_mesh
from helix_gpu.comm.push import push
from helix_gpu.graphs import Replay, StepGraph, cuda_graph
from helix_spec.config import Config, ModelShape

PUSH = "--without-push" not in sys.argv
LATENT = models()["latents"]
BATCHES = (1, 2) if DRY else (1, 8, 64, 256)
EXCHANGES = 2 if DRY else 20
"""Exchanges one after another in a graph whose time is taken."""
REPLAYS = 8 if DRY else 1000
"""Of each captured exchange."""
FRACTIONS = (0.0, 1.0) if DRY else (0.0, 0.5, 1.0, 2.0)
READERS = [(1024, 4, 4, 4)] if DRY else [(1024, 4, 2112, 8), (2048, 2, 2112, 8), (2048, 2, 528, 8)]
"""The best of `h200.py`: block, unrolled, programs, warps."""
ALWAYS = hop_b.Costs(latency=0, exchange_speed=1, attention_speed=1, second_half=0)
"""Bytes cost much and all else nothing: halves always pay."""


# --- 1. The machine ----------------------------------------------------------------------------


def read_gb_s() -> float:
    """GB/s that the best of the reading kernels gets from this card's memory."""
    x = torch.zeros(2**14 if DRY else 2**30, dtype=torch.int32, device=DEVICE)
    best = 0.0
    for block, unroll, programs, warps in READERS:
        out = torch.zeros(programs, dtype=torch.int32, device=DEVICE)
        read = functools.partial(
            read_kernel[(programs,)], x, out, len(x) // block,
            BLOCK=block, UNROLL=unroll, num_warps=warps,
        )  # fmt: skip
        read()
        best = max(best, x.nbytes / device_time(read, 10) / 1e3)
    return best


def copy_gb_s(source: int, target: int) -> float:
    """GB/s of a copy from one card to another, launched by this process."""
    size = 2**12 if DRY else 2**30
    devices = ("cpu", "cpu") if DRY else (f"cuda:{source}", f"cuda:{target}")
    x, y = (torch.zeros(size, dtype=torch.uint8, device=device) for device in devices)
    with torch.cuda.device(-1 if DRY else source):
        y.copy_(x)
        return size / device_time(lambda: y.copy_(x), 5) / 1e3


def all_to_all_gb_s() -> float:
    """GB/s that a rank sends to the others in a large all-to-all."""
    ranks = dist.get_world_size()
    send = torch.zeros(ranks, 2**12 if DRY else 2**28, dtype=torch.uint8, device=DEVICE)
    exchange = exchanges.all_to_all(world(), GROUPED)
    us = times_of({"": lambda: exchange(send)})[""]["us"]
    return send[1:].nbytes / us / 1e3


def machine(report: Report, found: Found, more: More) -> None:
    """Section 1: cards, how they reach each other, and what memory and links give."""
    ranks = range(dist.get_world_size())
    found["nccl"] = "none" if DRY else ".".join(map(str, torch.cuda.nccl.version()))
    found["cards"] = [
        {"card": rank, "read GB/s": speed} for rank, speed in enumerate(of_all(read_gb_s()))
    ]
    if not DRY:
        for rank, row in enumerate(found["cards"]):
            card = torch.cuda.get_device_properties(rank)
            row |= {"name": card.name, "multiprocessors": card.multi_processor_count}
            row |= {"GiB": card.total_memory / 2**30}
    report.table(f"cards (NCCL {found['nccl']})", found["cards"])
    found["all_to_all_gb_s"] = sends = all_to_all_gb_s()
    report.say(f"a large all-to-all sends {sends:.1f} GB/s from a rank to the others")
    if dist.get_rank() == 0:  # the others wait for its word that the section has ended
        found["copies"] = [
            {"from": a} | {str(b): copy_gb_s(a, b) if reachable(a, b) else None for b in ranks}
            for a in ranks
        ]
        report.table("copies from card to card, GB/s; - where peers do not reach", found["copies"])


def reachable(source: int, target: int) -> bool:
    """Whether one card can access the memory of the other."""
    return DRY or (source != target and torch.cuda.can_device_access_peer(source, target))


# --- 2. Exchange and merge ---------------------------------------------------------------------


def exchange_and_merge(report: Report, found: Found, more: More) -> None:
    """Section 2: every exchange, over batches, captured and launched."""
    found["rows"] = rows = list[Found]()
    pushed = pushing(max(BATCHES), GROUPED)(world(), GROUPED) if PUSH else None
    try:
        for batch in limited(BATCHES, found, more):
            rows += merge_rows(batch, Merges(batch, pushed))
    finally:
        report.table("exchange and merge in a graph, us; launched: with the host's time", rows)
    found["wrong"] = sum(row["wrong"] or 0 for row in rows)
    few = {
        name: [row["us"] for row in rows if row["what"] == name and row["batch"] <= 64]
        for name in {row["what"] for row in rows}
    }

    def slower(name: str) -> float:
        return min(map(operator.truediv, few[name], few["all_to_all"]))

    found["goals"] = [
        goal("reduce_scatter over all_to_all", slower("reduce_scatter, float32"), 1.3, least=True),
        goal("two all-to-alls over it", slower("two all-to-alls"), 1.5, least=True),
        *(
            goal(f"{name} and merge, B <= 64, us", max(few[name]), bound, least=False)
            for name, bound in (("all_to_all", 30), ("push", 12))
            if name in few
        ),
    ]
    report.table("goals, meant for 4 ranks", found["goals"])


def merge_rows(batch: int, merges: Merges) -> list[Found]:
    """A row for each way."""
    graphs = {name: captured(repeated(run)) for name, run in merges.runs.items()}
    times, host = times_of(graphs), host_times(merges.runs)
    wrong = [merges.wrong(runs) for runs in (graphs, merges.runs)]
    return [
        {"batch": batch, "what": name}
        | {key: value / EXCHANGES for key, value in time_of.items()}
        | {"over_all_to_all": time_of["us"] / times["all_to_all"]["us"], "launched": host[name]}
        | {"wrong": sum(one[name] for one in wrong) if name in wrong[0] else None}
        for name, time_of in times.items()
    ]


def repeated(run: Replay) -> Replay:
    """It, EXCHANGES times."""

    def runs() -> None:
        for _ in range(EXCHANGES):
            run()

    return runs


# --- 3. Captured exchanges ---------------------------------------------------------------------


def captures(report: Report, found: Found, more: More) -> None:
    """Section 3: many replays of captured exchanges, each with other data."""
    makes = [exchanges.all_to_all, push] if PUSH else [exchanges.all_to_all]
    found["rows"] = rows = list[Found]()
    try:
        for make in makes:
            rows.append(exchanged(make.__name__, make, REPLAYS))
        # A mesh makes a group of its own, and so a communicator.
        config = config_for("pr9757", dist.get_world_size(), GROUPED, 1, PAGE, (0.0,))
        group = helix_mesh(config, DEVICE.type).get_group("cp")
        for make in makes:
            rows.append(exchanged(f"{make.__name__} in a mesh's group", make, REPLAYS, group))
    finally:
        report.table("captured exchanges, every message checked", rows)
    found["wrong"] = sum(row["wrong bytes"] for row in rows)


# --- 4. Steps, and what sharding gains ---------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A batch of requests with prompts of so many tokens."""

    name: str
    model: ModelShape
    batch: int
    prompt: int
    goal: float | None = None
    """How many times as fast 4 ranks are to be as one."""

    def __str__(self) -> str:
        return f"{self.name} B={self.batch} S={self.prompt}"

    def on(self, batch: int) -> Shape:
        """The same of another batch, and two layers."""
        return replace(self, batch=batch, model=msgspec.structs.replace(self.model, layers=2))


SHAPES = [
    Shape("GQA", GROUPED, 8, 2**15, 2.9),
    Shape("GQA", GROUPED, 1, 2**17, 2.3),
    Shape("GQA", GROUPED, 32, 2**15, 3.6),
    Shape("MLA", LATENT, 8, 2**17),
]
BALANCED = SHAPES[2]
"""Where layouts are compared: a step long enough that a turn of programs more does not show."""
if DRY:
    SHAPES = [replace(shape, batch=2, prompt=2 * PAGE) for shape in (SHAPES[0], SHAPES[-1])]
    BALANCED = SHAPES[0]
    hop_b.REPEATS = 1  # type: ignore[misc]


class Steps:
    """Decode steps of a shape on some ranks, with random K and V in pages of `pool` or their own.

    With `fractions` there is a batch for each, of that many decoded tokens for a prompt token.
    """

    def __init__(
        self,
        shape: Shape,
        ranks: int,
        layout: str = "pr9757",
        *,
        make: MakeExchange = exchanges.all_to_all,
        fractions: Sequence[float] = (0.0,),
        costs: hop_b.Costs | None = None,
        pool: Tensor | None = None,
    ) -> None:
        model, rows = shape.model, shape.batch
        self.cache = HelixCache(
            config_for(layout, ranks, model, rows, shape.prompt, fractions),
            rank=dist.get_rank() if ranks > 1 else 0,
            device=DEVICE,
            exchange=make(world(), model) if ranks > 1 else None,
            backend="triton",
            hop_b=costs,
        )
        if DRY:
            self.cache._lane = hop_b.SameLane()  # the interpreter runs one kernel at a time
        self.batches = grown(self.cache, rows, shape.prompt, fractions)
        self.cache.pool = self.cache.pool.normal_() if pool is None else pool
        torch.manual_seed(0)
        q = random(model.layers, rows, model.q_heads, model.key_dim)
        k, v = (random(model.layers, rows, model.kv_heads, model.key_dim) for _ in range(2))
        self.inputs = q, k, None if model.latent else v

    def capture(self) -> Steps:
        """Make the graph of a step; every rank does at once."""
        self.graph = StepGraph(self.cache, len(self.batches[0]), self._capture)
        return self

    def begin(self, place: int = 0) -> None:
        """A token more for the batch of a fraction: what `replay` does from now on."""
        self.cache.finish(self.cache.begin(self.batches[place]))

    def output(self) -> Tensor:
        """What the step that was begun gives."""
        return self.graph.replay(*self.inputs)

    def whole(self) -> None:
        """A whole step: ledger, copies, replay."""
        self.graph.decode(self.batches[0], *self.inputs)

    def launched(self) -> None:
        """A whole step without a graph."""
        self.cache.decode(self.batches[0], *self.inputs)

    def _capture(self, work: Replay) -> Replay:
        self.replay = again(work) if DRY else cuda_graph(work)
        return self.replay


def sharded_steps(report: Report, found: Found, more: More) -> None:
    """Section 4: steps of all ranks together against those of one that has all tokens."""
    found["rows"], found["times"] = list[Found](), dict[str, Found]()
    try:
        for shape in limited(SHAPES, found, more):
            row, found["times"][str(shape)] = sharded_step(shape)
            found["rows"].append(row)
    finally:
        title = "steps: us of a layer in a graph; whole: us of all layers and the host"
        report.table(f"{title}; goals are meant for 4 ranks", found["rows"])
    found["wrong"] = sum(row["push differs"] or 0 for row in found["rows"])


def sharded_step(shape: Shape) -> tuple[Found, Found]:
    """The row of a shape, and the quartiles behind it."""
    tidy()
    ranks, layers = dist.get_world_size(), shape.model.layers
    plain, pushed = Steps(shape, ranks).capture(), None
    ways = {"cp=1": Steps(shape, 1).capture(), "all_to_all": plain}
    if PUSH:
        make = pushing(shape.batch, shape.model)
        pushed = Steps(shape, ranks, make=make, pool=plain.cache.pool).capture()
        ways["push"] = pushed
    for steps in ways.values():
        steps.begin()
    times = times_of({name: steps.replay for name, steps in ways.items()}, alone={"cp=1"})
    wrong = None if pushed is None else differing(plain.output(), pushed.output())
    host = host_times({name: steps.whole for name, steps in ways.items()})
    one = times["cp=1"]["us"]
    row = {"step": str(shape)}
    row |= {name: time_of["us"] / layers for name, time_of in times.items()}
    row |= {f"cp=1 over {name}": one / times[name]["us"] for name in times if name != "cp=1"}
    row |= {"goal": shape.goal} | {f"whole, {name}": us for name, us in host.items()}
    return row | {"push differs": wrong}, times


# --- 5. Balance --------------------------------------------------------------------------------


def balance(report: Report, found: Found, more: More) -> None:
    """Section 5: where decoded tokens go, in time and in tokens until a pool is full."""
    ranks, shape = dist.get_world_size(), BALANCED.on(BALANCED.batch)
    layouts = {name: Steps(shape, ranks, name, fractions=FRACTIONS) for name in LAYOUTS}
    share_memory([steps.cache for steps in layouts.values()])
    for steps in layouts.values():
        steps.capture()
    figures = {name: list[float]() for name in LAYOUTS}
    found["quartiles"] = quartiles = list[Found]()
    for place in range(len(FRACTIONS)):
        for steps in layouts.values():
            steps.begin(place)
        quartiles.append(times_of({name: steps.replay for name, steps in layouts.items()}))
        for name, time_of in quartiles[-1].items():
            figures[name].append(time_of["us"] / shape.model.layers)
    found |= judged(figures, ranks, shape.prompt, FRACTIONS)
    rows = [
        {"x": x, "balanced, us": figures["balanced"][place], "closed form": found["closed"][place]}
        | {name: found["ratios"][name][place] for name in LAYOUTS}
        | {"off": found["off"][place]}
        for place, x in enumerate(FRACTIONS)
    ]
    report.table(f"{shape}: a layer over balanced's, x decoded for a prompt token", rows)
    one = until_refused("pr9757", 1)
    found["held"] = held = {name: until_refused(name, ranks) / one for name in LAYOUTS}
    report.table("tokens held at the first refusal, over those of one rank", [held])
    found["goals"] = [
        goal("before_9757 off its closed form", max(map(abs, found["off"])), 0.05, least=False),
        *(
            goal(f"tokens of {name} for a rank", held[name] / ranks, 0.97, least=True)
            for name in LAYOUTS[1:]
        ),
    ]
    report.table("goals", found["goals"])


def until_refused(layout: str, ranks: int) -> int:
    """Tokens of all requests when the first decode is refused, in equal pools."""
    pages, batch, prompt = 1024, 8, 1024
    config = Config(layout=f"{layout}/1:C={ranks},T={PAGE}", pages=[pages] * ranks, max_len=2**30)
    book, ids, tokens = RankBook(config, 0), range(batch), batch * prompt
    for id in ids:
        book.admit(id, prompt)
    for group in (PAGE, 1):
        with contextlib.suppress(Refused):
            while True:
                book.decode_step(ids, [group] * batch)
                tokens += group * batch
    return tokens


# --- 6. HOP-B ----------------------------------------------------------------------------------


def costs_of(shape: Shape) -> dict[str, hop_b.Costs]:
    """What attending and exchanging cost here, launched and in graphs."""
    steps, model, rows = Steps(shape, dist.get_world_size()), shape.model, shape.batch
    begun = dict[int, DecodeStep]()
    for n in (rows, rows // 2):
        begun[n] = steps.cache.begin(steps.batches[0][:n])
        steps.cache.cancel(begun[n])  # its tensors are all that is needed
    exchange = exchanges.all_to_all(world(), model)

    def attend(n: int) -> None:
        q, k, v = (None if x is None else x[0, :n] for x in steps.inputs)
        step = begun[n]
        attend_shard(
            step.buffers, q, k, v, steps.cache.pool[0], step.slots, step.tables, step.lengths,
            scale=model.softmax_scale, wide=model.product_dtype != model.dtype,
        )  # fmt: skip

    graphs = dict[int, Replay]()

    def replay(work: Callable[[], object], of: int) -> None:
        if of not in graphs:
            graphs[of] = captured(work)
        graphs[of]()

    def replayed_exchange(send: Tensor) -> Tensor:
        replay(lambda: exchange(send), send.data_ptr())
        return send

    cached = cached_bytes(shape, rows)
    ways = {
        "launched": (exchange, attend),
        "captured": (replayed_exchange, lambda n: replay(lambda: attend(n), n)),
    }
    return {
        how: hop_b.measure(exchanging, world(), model, attending, rows, cached, DEVICE)
        for how, (exchanging, attending) in ways.items()
    }


def cached_bytes(shape: Shape, batch: int) -> int:
    """Bytes of a layer's K and V on each rank."""
    model, parts = shape.model, 1 if shape.model.latent else 2
    token = parts * model.kv_heads * model.key_dim * TYPE.itemsize
    return batch * shape.prompt * token // dist.get_world_size()


def hop_b_steps(report: Report, found: Found, more: More) -> None:
    """Section 6: what HOP-B's gate says of measured costs, and a step with and without."""
    found["costs"], found["gate"] = list[Found](), list[Found]()
    others = dist.get_world_size() - 1
    best = -math.inf, SHAPES[0]
    for shape in (SHAPES[0], SHAPES[-1]):
        costs = costs_of(shape.on(shape.batch))
        for how, cost in costs.items():
            found["costs"].append({"shape": shape.name, "how": how, **asdict(cost)})
        for batch in (2, 4) if DRY else (8, 16, 32, 64, 128):
            work = cached_bytes(shape, batch), message_bytes(batch, shape.model) * others
            saved = {how: cost.saved(*work) * 1e6 for how, cost in costs.items()}
            wins = saved["captured"] > 0
            found["gate"].append({"step": str(shape.on(batch)), **saved, "halves": wins})
            best = max(best, (saved["captured"], shape.on(batch)), key=lambda pair: pair[0])
    report.table("costs, in seconds and bytes a second", found["costs"])
    report.table("us that two halves save in a layer, by these costs", found["gate"])
    for shape in limited([best[1]], found, more):
        found["steps"] = halves(shape)
        report.table(f"{shape}: us of a whole step", found["steps"])


def halves(shape: Shape) -> list[Found]:
    """A step whole and in halves: launched with the host's time, then captured."""
    tidy()
    ranks = dist.get_world_size()
    whole = Steps(shape, ranks)
    ways = {"whole": whole, "halves": Steps(shape, ranks, costs=ALWAYS, pool=whole.cache.pool)}
    launched = host_times({name: steps.launched for name, steps in ways.items()})
    for steps in ways.values():
        steps.capture().begin()
    times = times_of({name: steps.replay for name, steps in ways.items()})
    replayed = {name: time_of["us"] for name, time_of in times.items()}
    apart = (whole.output() - ways["halves"].output()).abs().max()
    found = {"launched": (launched, None), "captured": (replayed, max(of_all(float(apart))))}
    return [
        {"how": how, **us, "saved": us["whole"] - us["halves"], "outputs differ by": most}
        for how, (us, most) in found.items()
    ]


# --- The run -----------------------------------------------------------------------------------

SECTIONS: list[tuple[str, Callable[[Report, Found, More], None], float]] = [
    ("1 machine", machine, 40),
    ("2 exchange and merge", exchange_and_merge, 60),
    ("3 captures", captures, 40),
    ("4 steps", sharded_steps, 70),
    ("5 balance", balance, 60),
    ("6 hop-b", hop_b_steps, 60),
]
"""Names, bodies, and the seconds after which they begin nothing new."""


def run(arguments: argparse.Namespace) -> bool:
    """The sections in order; whether any was not as it should be."""
    ranks, rank = Ranks(), dist.get_rank()
    report = Report(arguments.out, device.machine(arguments.commit), name="ranks", silent=rank > 0)
    report.say(f"{dist.get_world_size()} ranks, {dist.get_backend()}")
    for name, body, seconds in SECTIONS:
        if not arguments.only or name[0] in arguments.only:
            report.section(name, ranks.section(report, body, 10 * seconds if DRY else seconds))
        if ranks.lost:
            report.end()
            os._exit(1)  # what a lost rank owes the others would be waited for
    bad = report.end()
    ranks.saying(bad)  # torchrun ends all when one has failed, so the files are written first
    tidy()
    return bad


def main() -> None:
    """Bind this rank to its card, and run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on CPU ranks")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "runs/ranks"))
    parser.add_argument("--only", nargs="*", help="sections by their first character")
    parser.add_argument("--without-push", action="store_true", help="where peers do not reach")
    parser.add_argument("--commit", default="", help="what to name where git cannot say")
    arguments = parser.parse_args()
    card = None
    if not DRY:
        card = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(card)
    dist.init_process_group("gloo" if DRY else "nccl", timeout=PATIENCE, device_id=card)
    bad = run(arguments)
    dist.destroy_process_group()
    sys.exit(bad)


if __name__ == "__main__":
    main()
