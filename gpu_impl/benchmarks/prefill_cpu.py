"""A prompt that is computed here, beside torch's SDPA over the same tokens, on the CPU.

`PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/prefill_cpu.py [--tokens N]... [--chunk N]` for
one rank, under `torchrun --nproc-per-node=4` for several, which share a sequence. What is compared
is processor time, for ranks share few cores: of `HelixCache.prefill` and `attend` for LAYERS
layers, with Q and K rotated already, apart from the exchange (packing, sending, merging), and of as
many causal SDPAs over all tokens: divided by the ranks, and by the rank's own share of the pairs of
query and key, which the pages decide (of 1,000 tokens in pages of 64, rank 0 of 4 has 1.2 times a
quarter). Figures are of one layer, of the slowest rank.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lib.report import write_json

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from helix_gpu.bookkeeping.dealing import deal_prompt
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_spec.config import Config, ModelShape

SHAPES = {"9 / 3 heads of 64": (9, 3, 64), "32 / 8 heads of 128": (32, 8, 128)}
"""SmolLM2-135M's heads (12 of them where they must divide by 4), and Llama 3's."""
LAYERS = 4
"""Models have more: a step is begun once for all of them."""


class Exchanging(HelixCache):
    """A cache that counts the processor time of its exchanges."""

    exchanging = 0.0

    def combine(self, *given: Any, **how: Any) -> Any:
        """Do what the class does, in time that is counted."""
        begun = time.process_time()
        try:
            return super().combine(*given, **how)
        finally:
            self.exchanging += time.process_time() - begun


def prompt_times(cache: Exchanging, chunk: int, given: list[Tensor]) -> tuple[float, float]:
    """Seconds of a prompt's layers apart from their exchange, and of the exchange."""
    cache.exchanging = 0.0
    begun = time.process_time()
    for step in cache.prefill(0, len(given[0]), chunk):
        first, end = int(step.tokens.firsts[0]), int(step.tokens.ends[0])
        for layer in range(LAYERS):
            cache.attend(step, layer, *(x[first:end] for x in given))
    taken = time.process_time() - begun
    cache.release(0)
    return taken - cache.exchanging, cache.exchanging


def sdpa_time(run: Callable[[], object]) -> float:
    """Seconds of processor time of as many layers."""
    begun = time.process_time()
    for _ in range(LAYERS):
        run()
    return time.process_time() - begun


def share_of(config: Config, rank: int, tokens: int) -> float:
    """The part of all pairs of a query and a key before it whose key is on this rank."""
    positions = deal_prompt(config.layout, tokens, 0)[rank].positions()
    return float((tokens - positions).sum() / (tokens * (tokens + 1) / 2))


def slowest(value: float) -> float:
    """The largest of all ranks."""
    worst = torch.tensor(value, dtype=torch.float64)
    if dist.is_initialized():
        dist.all_reduce(worst, dist.ReduceOp.MAX)
    return float(worst)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, action="append", help="1000, 2000 and 4000")
    parser.add_argument("--chunk", type=int, default=4096, help="tokens of a step (4096)")
    parser.add_argument("--page", type=int, default=64, help="tokens in a page (64)")
    parser.add_argument("--rounds", type=int, default=7, help="in which each has a turn (7)")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    torch.set_num_threads(1)
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        dist.init_process_group("gloo")
    figures = []
    for name, (q_heads, kv_heads, dim) in SHAPES.items():
        q_heads += -q_heads % (ranks * kv_heads)
        model = ModelShape(layers=LAYERS, q_heads=q_heads, kv_heads=kv_heads, head_dim=dim)
        for tokens in options.tokens or (1000, 2000, 4000):
            config = Config(
                layout=f"pr13180/1:C={ranks},T={options.page}",
                pages=[tokens // options.page + 2] * ranks, max_len=tokens, model=model,
            )  # fmt: skip
            torch.manual_seed(0)
            q, k, v = (torch.randn(tokens, heads, dim) for heads in (q_heads, kv_heads, kv_heads))
            by_head = [
                x.transpose(0, 1).repeat_interleave(q_heads // x.shape[1], 0)[None]
                for x in (q, k, v)
            ]
            times: dict[str, list[float]] = {"sdpa": [], "prompt": [], "exchange": []}
            with (
                Exchanging.on(config, helix_mesh(config), rope=None)
                if ranks > 1
                else Exchanging(config, rank=0, rope=None)
            ) as cache:
                for turn in range(-1, options.rounds):
                    of_sdpa = sdpa_time(
                        lambda x=by_head: scaled_dot_product_attention(*x, is_causal=True)
                    )
                    of_prompt, of_exchange = prompt_times(cache, options.chunk, [q, k, v])
                    if turn >= 0:
                        for what, taken in zip(
                            times, (of_sdpa, of_prompt, of_exchange), strict=True
                        ):
                            times[what].append(taken)
            own = share_of(config, dist.get_rank() if dist.is_initialized() else 0, tokens)
            medians = [statistics.median(x) for x in times.values()]
            by_pairs = slowest(medians[1] / (medians[0] * own))
            sdpa, prompt, exchange = map(slowest, medians)
            sdpa, prompt, exchange = (x / LAYERS for x in (sdpa, prompt, exchange))
            ratio = prompt / (sdpa / ranks)
            figures.append(
                {
                    "shape": name,
                    "tokens": tokens,
                    "ranks": ranks,
                    "ratio": ratio,
                    "by_pairs": by_pairs,
                    **times,
                }
            )
            if not dist.is_initialized() or dist.get_rank() == 0:
                print(
                    f"{ranks} ranks, {q_heads} / {kv_heads} heads of {dim}, {tokens} tokens: SDPA "
                    f"{1e3 * sdpa:.1f} ms, a rank's prompt {1e3 * prompt:.1f} ms, ratio to its "
                    f"share {ratio:.2f}, by its pairs {by_pairs:.2f}; its exchange "
                    f"{1e3 * exchange:.1f} ms",
                    flush=True,
                )
    if not dist.is_initialized() or dist.get_rank() == 0:
        write_json(options.json, figures)
    if dist.is_initialized():
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
