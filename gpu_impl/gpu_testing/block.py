"""A transformer layer and its FFN, in float64 and on many ranks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from gpu_testing.exact import U32, UNIT
from gpu_testing.roundings import Roundings
from helix_gpu.block import AttentionBlock, AttentionWeights, FeedForward, FeedForwardWeights
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh, repurposed
from helix_spec.config import Config, DType, ModelShape

OnRanks = Callable[[int, Callable[[int], Any]], list[Any]]
HIDDEN, DIM, PROMPT, STEPS = 16, 8, 7, 4
EXPERTS, WIDTH = 4, 16


def config(tp: int, cp: int, dtype: DType, wire: DType = "float32") -> Config:
    """Eight query and four KV heads."""
    model = ModelShape(q_heads=8, kv_heads=4, head_dim=DIM, dtype=dtype, partial_dtype=wire)
    return Config(
        layout=f"pr9757/1:C={cp},T=2", pages=[20] * cp, max_len=50, model=model, tp_size=tp
    )


def random(*shape: int, seed: int, dtype: torch.dtype, scale: float = 1.0) -> Tensor:
    """The same on every rank."""
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * scale).to(dtype)


class Setting:
    """A layer's weights and the hidden states of two requests, alike for all ranks."""

    def __init__(self, config: Config) -> None:
        self.config, self.model = config, config.model
        self.dtype: torch.dtype = getattr(torch, config.model.dtype)
        self.unit = UNIT[self.dtype]
        q, kv = (heads * DIM for heads in (self.model.q_heads, self.model.kv_heads))
        shapes = {"q": (HIDDEN, q), "k": (HIDDEN, kv), "v": (HIDDEN, kv), "o": (q, HIDDEN)}
        self.weights = AttentionWeights(
            **{
                name: random(*shape, seed=seed, dtype=self.dtype, scale=shape[0] ** -0.5)
                for seed, (name, shape) in enumerate(shapes.items())
            }
        )
        self.x = random(2, PROMPT + STEPS, HIDDEN, seed=9, dtype=self.dtype)

    @property
    def expected(self) -> tuple[Tensor, Tensor]:
        """Every decoded token's output on one rank, and its bound: [requests, STEPS, hidden]."""
        return _expected(self.model.dtype, self.model.partial_dtype, self.config.world_size)

    def request(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """The same of one request."""
        roundings, unit, positions = Roundings(), self.unit, torch.arange(len(x))
        q, k, v = (
            roundings.rounded(roundings.product(x.double(), w.double()), unit).view(len(x), -1, DIM)
            for w in (self.weights.q, self.weights.k, self.weights.v)
        )
        q, k = (roundings.rotated(y, positions, self.model.rope_base, unit) for y in (q, k))
        wire = UNIT[getattr(torch, self.model.partial_dtype)]
        rows = torch.stack(
            [
                roundings.attention(q[p], k[: p + 1], v[: p + 1], wire, unit).flatten()
                for p in range(PROMPT, len(x))
            ]
        )
        ranks = self.config.world_size
        parts = [
            roundings.product(row, w)
            for row, w in zip(
                rows.chunk(ranks, 1), self.weights.o.double().chunk(ranks), strict=True
            )
        ]
        output = roundings.summed(torch.stack(parts), unit)
        return output.detach(), roundings.bound(output)

    def played(
        self, change: Callable[[AttentionBlock], AttentionBlock] = lambda block: block
    ) -> Tensor:
        """This rank's outputs [requests, STEPS, hidden]; prompts are computed chunk by chunk."""
        mesh = helix_mesh(self.config)
        cache = HelixCache.on(self.config, mesh)
        block = change(AttentionBlock(cache, 0, self.weights.shard(mesh), mesh))
        for id, x in enumerate(self.x):
            for step in cache.prefill(id, PROMPT, chunk=4):
                block(step, x[torch.from_numpy(step.book.position_ids)])
        outputs = []
        for n in range(STEPS):
            step = cache.begin([1, 0], pad=n % 2)
            x = self.x[[1, 0], PROMPT + n]
            outputs.append(block(step, torch.cat((x, x.new_full((n % 2, HIDDEN), torch.nan)))))
        return torch.stack(outputs, 1)[[1, 0]]

    def right(self, outputs: list[Tensor]) -> bool:
        """Whether every rank's output is within the bound of float64, and all are the same."""
        expected, bound = self.expected
        near = [bool(((o - expected).abs() <= bound).all()) for o in outputs]
        return all(near) and all(torch.equal(outputs[0], o) for o in outputs)


@cache
def _expected(dtype: DType, wire: DType, ranks: int) -> tuple[Tensor, Tensor]:
    setting = Setting(config(1, ranks, dtype, wire))
    outputs, bounds = zip(*map(setting.request, setting.x), strict=True)
    return torch.stack(outputs), torch.stack(bounds)


class Experts:
    """Four gated FFNs, and tokens of which each goes to two of them with a weight."""

    def __init__(self, dtype: DType, experts: int = EXPERTS) -> None:
        self.dtype: torch.dtype = getattr(torch, dtype)
        shapes = [(experts, HIDDEN, WIDTH), (experts, HIDDEN, WIDTH), (experts, WIDTH, HIDDEN)]
        self.weights = FeedForwardWeights(
            *(
                random(*shape, seed=seed, dtype=self.dtype, scale=shape[1] ** -0.5)
                for seed, shape in enumerate(shapes)
            )
        )
        self.x = random(9, HIDDEN, seed=9, dtype=self.dtype)
        scores = random(9, experts, seed=10, dtype=torch.float32)
        kept = scores >= scores.topk(min(2, experts)).values[:, -1:]
        self.routing = scores.where(kept, -torch.inf).softmax(-1)

    def expected(self, tp_size: int, ep_size: int) -> tuple[Tensor, Tensor]:
        """On one rank in float64, and the bound for a run on ep_size x tp_size ranks."""
        roundings, unit, x = Roundings(), UNIT[self.dtype], self.x.double()
        parts = torch.zeros(ep_size, tp_size, *x.shape, dtype=torch.float64)
        for expert, weights in enumerate(zip(*dataclasses.astuple(self.weights), strict=True)):
            gate, up, down = (w.double() for w in weights)
            gated = F.silu(roundings.rounded(roundings.product(x, gate), unit))
            # An exponential, a sum and a division in float32, then rounded.
            gated = roundings.rounded(roundings.rounded(gated, 8 * U32), unit)
            raised = roundings.rounded(roundings.product(x, up), unit)
            inner = roundings.rounded(gated * raised, unit)
            share = self.routing[:, expert, None].double()
            for rank, (mine, w) in enumerate(
                zip(inner.chunk(tp_size, 1), down.chunk(tp_size), strict=True)
            ):
                part = share * roundings.rounded(roundings.product(mine, w), unit)
                part = roundings.rounded(part, 2 * U32)
                place = torch.zeros(ep_size, tp_size, 1, 1, dtype=torch.float64)
                place[expert * ep_size // len(self.weights.gate), rank] = 1
                parts = parts + place * part
        output = roundings.summed(parts.flatten(0, 1), unit)
        return output.detach(), roundings.bound(output)

    def on_this_rank(self, config: Config, ep: int) -> Tensor:
        """The output here, on the ranks of an attention mesh used anew."""
        mesh = repurposed(helix_mesh(config), ep)
        return FeedForward(self.weights.shard(mesh), mesh)(self.x, self.routing)

    def answers(self, tp: int, cp: int, ep: int, on_ranks: OnRanks) -> list[Tensor]:
        """Every rank's output."""
        setting = config(tp, cp, "float32")
        return on_ranks(tp * cp, lambda rank: self.on_this_rank(setting, ep))
