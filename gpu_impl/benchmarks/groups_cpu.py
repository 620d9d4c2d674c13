"""A decode step of Gemma 3's shape on the CPU: five layers of a window to one of all tokens.

`PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/groups_cpu.py [--tokens N] [--json FILE]`:
Gemma 3 1B's attention (4 query heads, 1 KV head of 256, window 512, one period of 6 layers) in
bfloat16, two requests, in turn with a cache that keeps all tokens for all layers. The time is that
of the whole step, bookkeeping too; `bytes` are the K and V that must be read.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from pathlib import Path
from typing import Any

from lib.report import write_json
from lib.timing import in_turn

import msgspec
import torch
from torch import Tensor

from helix_gpu.attention import native
from helix_gpu.cache import HelixCache
from helix_gpu.group_cache import GroupCache
from helix_spec.config import CacheGroup, Config, ModelShape

LAYERS, WINDOW, PAGE, BATCH = 6, 512, 64, 2
MODEL = ModelShape(layers=LAYERS, q_heads=4, kv_heads=1, head_dim=256, dtype="bfloat16")
GROUPS = [
    CacheGroup(name="near", layers=list(range(LAYERS - 1)), placement="replicated", window=WINDOW),
    CacheGroup(name="all", layers=[LAYERS - 1]),
]


def caches(tokens: int) -> dict[str, HelixCache]:
    """A cache with groups and one without, which hold the same requests."""
    pages = BATCH * (-(-tokens // PAGE) + 2)
    plain = Config(
        layout=f"vllm_dcp/1:C=1,T={PAGE},I=1", pages=[pages], max_len=2 * tokens, model=MODEL
    )
    grouped = msgspec.structs.replace(plain, pages=[2 * pages], groups=GROUPS)
    backend: Any = native.attend_pages if native.available() else "torch"
    of_groups = GroupCache(grouped, rank=0, rope=None, backend=backend)
    made = {
        "groups": of_groups,
        "all tokens": HelixCache(plain, rank=0, rope=None, backend=backend),
    }
    for id in range(BATCH):
        # Prompts of values alone: keys of 0 weigh all alike.
        def kv(layers: int) -> Any:
            def of(positions: Tensor) -> tuple[Tensor, Tensor]:
                v = torch.randn(layers, len(positions), 1, 256).bfloat16()
                return torch.zeros_like(v), v

            return of

        prompts: Any = {group.name: kv(len(group.layers)) for group in GROUPS}
        of_groups.admit(id, tokens, prompts)
        made["all tokens"].admit(id, tokens, kv(LAYERS))
    return made


def step(cache: HelixCache) -> None:
    """One token for each request."""
    begun = cache.begin(range(BATCH))
    q, k = torch.ones(BATCH, 4, 256).bfloat16(), torch.ones(BATCH, 1, 256).bfloat16()
    for layer in range(LAYERS):
        cache.attend(begun, layer, q, k, k)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, action="append", help="context (8192 and 32768)")
    parser.add_argument("--rounds", type=int, default=15, help="in which each has a turn (15)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(2)
    backend = "C++" if native.available() else "torch"
    print(f"{platform.machine()}, torch {torch.__version__}, 2 threads, {backend}; ms a step")
    print(f"{'tokens':>8}{'all tokens':>12}{'groups':>10}{'time':>8}{'bytes':>8}")
    figures = []
    for tokens in options.tokens or (8192, 32768):
        made = caches(tokens)
        runs = {name: lambda cache=cache: step(cache) for name, cache in made.items()}  # type: ignore[misc]
        taken = in_turn(runs, options.rounds, warm_up=2)
        medians = {name: 1e3 * statistics.median(times) for name, times in taken.items()}
        time = medians["groups"] / medians["all tokens"]
        size = ((LAYERS - 1) * min(WINDOW, tokens) + tokens) / (LAYERS * tokens)
        print(
            f"{tokens:>8}{medians['all tokens']:>12.2f}{medians['groups']:>10.2f}{time:>8.2f}"
            f"{size:>8.2f}"
        )
        figures.append({"tokens": tokens, "ms": medians, "bytes_share": size})
    write_json(options.json, figures)


if __name__ == "__main__":
    main()
