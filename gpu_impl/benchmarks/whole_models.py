"""Whole models on GPUs: tokens a second by ranks, against the same model unsharded.

`torchrun --nproc-per-node=N gpu_impl/benchmarks/whole_models.py`, for N of 1, 2, 4. Random weights
of the shape of Llama 3 8B, and of four layers of DeepSeek V3, in 16 bits, over caches of random
contents. Unsharded the model attends by its own attention over the library's static cache;
sharded, each operation is launched from the host, or the whole step is one CUDA graph. With
`--dry-run` small models on a CPU, where nothing is captured: their times mean nothing.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

from lib import DRY
from lib.device import DEVICE, machine, random, wait
from lib.report import Report
from lib.timing import in_turn

import torch
import torch.distributed as dist
from torch import Tensor
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    StaticCache,
)

from helix_gpu.bookkeeping.sizing import pages_for
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_gpu.graphs import cuda_graph
from helix_gpu.models import ModelCache, helix_config

ROUNDS = 2 if DRY else 30
PAGE = 4 if DRY else 64
DTYPE = torch.float32 if DRY else torch.bfloat16
WORK = [(40, 1), (12, 3)] if DRY else [(131072, 1), (32768, 8), (8192, 32)]
"""Keys of each request, and requests."""
Found = dict[str, Any]


def llama() -> Any:
    """The shape of Llama 3 8B."""
    shape: dict[str, Any] = {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256,
    }  # fmt: skip
    if DRY:
        shape = {
            "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2,
            "num_attention_heads": 8, "num_key_value_heads": 2, "vocab_size": 99,
        }  # fmt: skip
    return LlamaForCausalLM(LlamaConfig(**shape, max_position_embeddings=2**18))


def deepseek() -> Any:
    """Four layers of DeepSeek V3, the last of them with experts."""
    shape: dict[str, Any] = {"num_hidden_layers": 4, "first_k_dense_replace": 3}
    if DRY:
        shape |= {
            "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 8,
            "num_key_value_heads": 8, "vocab_size": 99, "q_lora_rank": 24, "kv_lora_rank": 16,
            "qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_group": 2,
            "topk_group": 1, "n_routed_experts": 8, "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
        }  # fmt: skip
    return DeepseekV3ForCausalLM(DeepseekV3Config(**shape, max_position_embeddings=2**18))


def made(make: Callable[[], Any]) -> Any:
    """The model on the device, in its type, alike on all ranks."""
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPE)
    try:
        with DEVICE:
            return make().eval()
    finally:
        torch.set_default_dtype(before)


class Unsharded:
    """The model by its own attention over a cache of random contents, launched or replayed."""

    def __init__(self, model: Any, keys: int, requests: int) -> None:
        model.set_attn_implementation("sdpa")
        self.model, shape = model, model.config
        self.cache = StaticCache(config=shape, max_cache_len=keys + 2 * ROUNDS + 16)
        latent = getattr(shape, "kv_lora_rank", None)
        heads, dims = shape.num_key_value_heads, (shape.head_dim, shape.head_dim)
        if latent:
            heads, dims = 1, (latent, shape.qk_rope_head_dim)
        for layer in self.cache.layers:
            layer.update(*(random(requests, heads, keys, dim, dtype=DTYPE) for dim in dims))
        named = "cache" in signature(model.forward).parameters
        self.argument = {"cache" if named else "past_key_values": self.cache}
        self.tokens = torch.ones(requests, 1, dtype=torch.int64, device=DEVICE)
        self.positions = torch.full_like(self.tokens, keys)
        self._replay: Callable[[], Any] | None = None

    def _forward(self) -> None:
        self.model(self.tokens, position_ids=self.positions, use_cache=True, **self.argument)
        self.positions += 1

    def launched(self) -> None:
        """A step whose every operation the host launches."""
        self._forward()
        wait()

    def replayed(self) -> None:
        """A step as one graph, captured at the first call."""
        if self._replay is None:
            self._replay = captured(self._forward)
        self._replay()
        wait()


class Sharded:
    """The model over a sharded cache of random contents, a step launched or replayed."""

    def __init__(self, model: Any, keys: int, requests: int) -> None:
        ranks = dist.get_world_size()
        layout = f"pr9757/1:C={ranks},T={PAGE}"
        steps = 2 * ROUNDS + 16
        config = helix_config(
            model,
            layout,
            pages=pages_for(layout, [keys] * requests, steps),
            max_len=keys + steps,
        )
        self.helix = HelixCache.on(config, helix_mesh(config, DEVICE.type), rope=None)
        self.model, self.cache = model, ModelCache(model, self.helix)
        self.ids = list(range(requests))
        self.tokens = torch.ones(1, requests, dtype=torch.int64, device=DEVICE)
        shape = config.model

        def prompt_kv(at: Tensor) -> tuple[Tensor, Tensor | None]:
            k, v = (
                random(shape.layers, len(at), self.helix.kv_heads, shape.key_dim, dtype=DTYPE)
                for _ in range(2)
            )
            return k, None if shape.latent else v

        for id in self.ids:
            self.helix.admit(id, keys, prompt_kv, rotated=True)
        self._replay: Callable[[], Any] | None = None

    def launched(self) -> None:
        """A step whose every operation the host launches."""
        step = self.helix.begin(self.ids)
        self._forward(step)
        wait()

    def replayed(self) -> None:
        """A step as one graph, captured at the first call."""
        if self._replay is None:
            self._replay = self._captured()
        step = self.helix.begin(self.ids)
        self._replay()
        self.helix.finish(step)
        wait()

    def _forward(self, step: Any) -> Tensor:
        self.cache.take(step)
        positions = step.positions[None]
        output = self.model(
            self.tokens, position_ids=positions, use_cache=True, **self.cache.argument
        )
        logits: Tensor = output.logits
        return logits

    def _captured(self) -> Callable[[], Any]:
        reserved = self.helix.reserve(len(self.ids))
        return captured(lambda: self._forward(reserved))


def captured(work: Callable[[], Any]) -> Callable[[], Any]:
    """The replay of what some work launches; the work itself where nothing can be captured."""
    return work if DRY else cuda_graph(work)


@torch.no_grad()
def measured(report: Report, make: Callable[[], Any], found: Found) -> None:
    """Every amount of work, by every way."""
    model = made(make)
    rows = []
    for keys, requests in WORK:
        times = dict[str, list[float]]()
        what = f"{keys} keys, {requests} requests"
        try:
            own = Unsharded(model, keys, requests)
            times |= in_turn({"own, launched": own.launched}, ROUNDS, warm_up=2)
            times |= in_turn({"own, one graph": own.replayed}, ROUNDS, warm_up=2)
        except RuntimeError as error:  # out of memory, or nothing to capture
            report.say(f"{what}, unsharded: {error}")
        own = None
        sharded = Sharded(model, keys, requests)
        times |= in_turn({"ours, launched": sharded.launched}, ROUNDS, warm_up=2)
        try:
            times |= in_turn({"ours, one graph": sharded.replayed}, ROUNDS, warm_up=2)
        except RuntimeError as error:  # an operation of the model that waits for the device, say
            found.setdefault("failure", f"{what}, one graph: {error}")
        for how, taken in times.items():
            middle = sorted(taken)[len(taken) // 2] if taken else None
            rows.append(
                {
                    "keys": keys, "requests": requests, "ranks": dist.get_world_size(),
                    "how": how, "ms": middle and 1e3 * middle,
                    "tokens a second": middle and requests / middle,
                }
            )  # fmt: skip
        sharded.helix.close()
    found["rows"] = rows
    report.table("Steps of the whole model", rows)


def main() -> None:
    """Both models."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dry-run", action="store_true", help="toy sizes, on CPU ranks")
    parser.add_argument("--out", type=Path, default=os.environ.get("OUT", "runs/whole_models"))
    parser.add_argument("--commit", default="", help="what to name where git cannot say")
    arguments = parser.parse_args()
    alone = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "localhost", "MASTER_PORT": "29555"}
    for name, value in alone.items():
        os.environ.setdefault(name, value)
    if not DRY:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    dist.init_process_group("gloo" if DRY else "nccl")
    name = f"whole_models_{dist.get_world_size()}"
    facts = machine(arguments.commit)
    report = Report(Path(arguments.out), facts, name, silent=dist.get_rank() > 0)
    for what, make in {"Llama 3 8B": llama, "DeepSeek V3, 4 layers": deepseek}.items():
        report.section(what, lambda found, make=make: measured(report, make, found))
    dist.destroy_process_group()
    sys.exit(report.end())


if __name__ == "__main__":
    main()
