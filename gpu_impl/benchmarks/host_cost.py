"""What a decode step costs on the host: ledger, allocator, block tables, slots; no tensors.

`PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/host_cost.py [--json FILE]`, for 1 to 8,192
live requests at contexts up to 10 million tokens; C=8, T=64, this rank's view. Where vLLM 0.33.0
is installed (in the environment that `make conform-vllm` makes), its KVCacheManager and BlockTable
do the same work in turn with ours, at contexts that its Python objects fit: a page for a request
that needs one, the slot of each new token.

Then the same for three cache groups together, in turn with one cache of all layers, and with each
of the three as the only group.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from collections.abc import Callable, Sequence
from importlib import metadata
from pathlib import Path

from lib.report import write_json
from lib.timing import in_turn

import msgspec

from helix_gpu.bookkeeping.group_book import GroupBook
from helix_gpu.bookkeeping.rank_book import RankBook
from helix_spec.config import CacheGroup, Config, ModelShape
from helix_spec.events import Admit

CP_SIZE, PAGE, STEPS = 8, 64, 200
SIZES = (
    (1, 1_000), (1, 1_000_000), (1, 10_000_000),
    (64, 1_000), (64, 1_000_000), (64, 10_000_000),
    (1024, 1_000), (1024, 100_000), (1024, 10_000_000),
    (8192, 1_000), (8192, 100_000), (8192, 1_000_000),
)  # fmt: skip
"""Live requests and the context of each: up to 20 million pages on this rank."""
BESIDE_VLLM = ((1, 1_000), (64, 1_000), (64, 10_000), (1024, 1_000), (1024, 10_000))
GROUPED = ((1, 1_000), (1, 100_000), (64, 1_000), (64, 100_000), (1024, 10_000))
"""Where three cache groups are compared with one."""
THREE = (
    CacheGroup(name="all", layers=[0]),
    CacheGroup(name="near", layers=[0], placement="replicated", window=512),
    CacheGroup(name="wide", layers=[0], window=4096),
)
"""Two of them have a window; the replicated one takes a page CP_SIZE times as often as others."""
Step = Callable[[], object]


def config_of(requests: int, context: int) -> Config:
    """Room for so many requests that grow from this context."""
    pages = requests * (context // (CP_SIZE * PAGE) + 4)
    return Config(
        layout=f"vllm_dcp/1:C={CP_SIZE},T={PAGE},I=1",
        pages=[pages] * CP_SIZE,
        max_len=context + PAGE + 2 * STEPS,  # the width of vLLM's tables
        model=ModelShape(q_heads=CP_SIZE, kv_heads=1),
    )


def our_step(requests: int, context: int) -> Step:
    """One step of all requests, which hold about `context` tokens each."""
    book = RankBook(config_of(requests, context), 0)
    for id in range(requests):
        book.admit(id, context + id % PAGE)  # pages open in different steps
    ids = list(range(requests))
    return lambda: book.decode_step(ids)


def groups_step(requests: int, context: int, groups: Sequence[CacheGroup]) -> Step:
    """The same for cache groups in one pool."""
    one = config_of(requests, context)
    pages = [3 * CP_SIZE * size for size in one.pages]
    book = GroupBook(msgspec.structs.replace(one, pages=pages, groups=list(groups)), 0)
    for id in range(requests):
        book.admit(id, context + id % PAGE)
    ids = list(range(requests))
    return lambda: book.decode_step(ids)


def of_groups(requests: int, context: int) -> dict[str, float]:
    """Median microseconds of a step: of one cache of all layers, of three groups, of each alone."""
    steps = {"one": our_step(requests, context), "three": groups_step(requests, context, THREE)}
    steps |= {group.name: groups_step(requests, context, [group]) for group in THREE}
    times = in_turn(steps, STEPS).items()
    return {name: statistics.median(1e6 * one for one in seconds) for name, seconds in times}


def vllm_step(requests: int, context: int) -> Step:
    """The same by vLLM's own manager and table, but for the slots: its GPU computes them."""
    from helix_vllm import engines as vllm

    vllm.MAX_REQUESTS = requests
    config = config_of(requests, context)
    engine = vllm.VllmV1(0)
    engine.start(config, engine.profiles)
    for id in range(requests):
        engine.apply(Admit(id, context + id % PAGE))
    table, manager = engine.tables.tables, engine.manager

    def step() -> None:
        for row in range(requests):
            request = engine.requests[row]
            (blocks,) = manager.allocate_slots(request, 1).get_block_ids()
            if blocks:
                table.append_row((blocks,), row)
            request.num_computed_tokens += 1
        table.commit_block_table(requests)

    return step


def has_vllm() -> bool:
    """Whether the vLLM is installed whose code this measures."""
    try:
        return metadata.version("vllm") == "0.33.0"
    except metadata.PackageNotFoundError:
        return False


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    figures = []
    machine = f"{platform.machine()}, Python {platform.python_version()}"
    print(f"{machine}; C={CP_SIZE}, T={PAGE}, {STEPS} steps, microseconds a step")
    headings = ("requests", "context", "median", "5 %", "95 %", "a request")
    print(f"{'':<8}" + "".join(f"{heading:>11}" for heading in headings))
    with_vllm = has_vllm()
    for requests, context in BESIDE_VLLM if with_vllm else SIZES:
        steps = {"ours": our_step(requests, context)}
        if with_vllm:
            steps["vLLM"] = vllm_step(requests, context)
        for name, seconds in in_turn(steps, STEPS).items():
            times = [1e6 * one for one in seconds]
            low, high = (statistics.quantiles(times, n=20)[i] for i in (0, -1))
            middle = statistics.median(times)
            print(
                f"{name:<8}{requests:>11}{context:>11}{middle:>11.1f}{low:>11.1f}{high:>11.1f}"
                f"{middle / requests:>11.2f}"
            )
            figures.append(
                {"name": name, "requests": requests, "context": context, "median_us": middle,
                 "q05_us": low, "q95_us": high}
            )  # fmt: skip
    columns = ["one", "three", "times", "each alone"]
    print(f"\n{'':<8}" + "".join(f"{heading:>11}" for heading in (*headings[:2], *columns)))
    for requests, context in GROUPED:
        medians = of_groups(requests, context)
        one, three = medians["one"], medians["three"]
        alone = sum(medians[group.name] for group in THREE)
        print(
            f"{'groups':<8}{requests:>11}{context:>11}{one:>11.1f}{three:>11.1f}"
            f"{three / one:>11.2f}{alone:>11.1f}"
        )
        figures.append(
            {"name": "three groups", "requests": requests, "context": context,
             "one_us": one, "median_us": three, "each_alone_us": alone}
        )  # fmt: skip
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
