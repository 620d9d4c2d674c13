"""Attention and FFN of a transformer block on many ranks, against float64 on one."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from helix_gpu.block import AttentionBlock, AttentionWeights, FeedForward, FeedForwardWeights
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh, repurposed
from helix_spec.config import Config, DType, LatentShape, ModelShape

sys.path.insert(0, str(Path(__file__).parent))
from roundings import U32, UNIT, Roundings

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


@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize(
    ("dtype", "wire"), [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")]
)
def test_a_block_on_many_ranks_is_the_block_on_one(
    tp: int, cp: int, dtype: DType, wire: DType, on_ranks: OnRanks
) -> None:
    """Projections, RoPE, attention, output projection and its sum: within the bound of float64."""
    setting = Setting(config(tp, cp, dtype, wire))
    assert setting.right(on_ranks(tp * cp, lambda rank: setting.played()))


# Wrong blocks: the test above would see each of them


def neighbours_projection(block: AttentionBlock) -> AttentionBlock:
    """The output projection's rows of the next slice of heads."""
    setting = Setting(block.cache.config)
    ranks = block.group.size()
    block.weights = dataclasses.replace(
        block.weights, o=setting.weights.o.chunk(ranks)[(block.group.rank() + 1) % ranks]
    )
    return block


def tp_varies_fastest(block: AttentionBlock) -> AttentionBlock:
    """The output projection is dealt as if cp_rank * tp_size + tp_rank were the slice (MAP-1)."""
    tp_size, cp_size = block.cache.config.tp_size, block.cache.config.layout.cp_size
    tp_rank, cp_rank = divmod(block.group.rank(), cp_size)
    rows = Setting(block.cache.config).weights.o.chunk(block.group.size())
    block.weights = dataclasses.replace(block.weights, o=rows[cp_rank * tp_size + tp_rank])
    return block


def reduced_over_cp(block: AttentionBlock) -> AttentionBlock:
    """The sum leaves out the other tp ranks."""
    ranks = [[0, 1], [2, 3]]
    block.group = [dist.new_group(r) for r in ranks][block.group.rank() // 2]
    return block


def one_rank_in_half_weight(block: AttentionBlock) -> AttentionBlock:
    """One rank's heads are projected with weights off by 2 percent."""
    if block.group.rank() == 3:
        block.weights = dataclasses.replace(block.weights, o=block.weights.o * 1.02)
    return block


@pytest.mark.parametrize(
    ("wrong", "dtype"),
    [
        (neighbours_projection, "float32"),
        (neighbours_projection, "bfloat16"),
        (tp_varies_fastest, "float32"),
        (tp_varies_fastest, "bfloat16"),
        (reduced_over_cp, "float32"),
        (reduced_over_cp, "bfloat16"),
        (one_rank_in_half_weight, "float32"),
    ],
)
def test_a_wrong_block_is_outside_the_bound(
    wrong: Callable[[AttentionBlock], AttentionBlock], dtype: DType, on_ranks: OnRanks
) -> None:
    """Each of these is seen in the outputs alone, in float32 and where it says so in bfloat16."""
    setting = Setting(config(2, 2, dtype))
    outputs = on_ranks(4, lambda rank: setting.played(wrong))
    expected, bound = setting.expected
    assert not all(((o - expected).abs() <= bound).all() for o in outputs)


def test_shares_of_another_rank_count(on_ranks: OnRanks) -> None:
    """Whole projections where a share belongs are refused with the shape that fits."""
    setting = Setting(config(2, 2, "float32"))

    def body(rank: int) -> None:
        mesh = helix_mesh(setting.config)
        cache = HelixCache.on(setting.config, mesh)
        with pytest.raises(ValueError, match=r"Projection q is .* \(16, 64\); this rank's share"):
            AttentionBlock(cache, 0, setting.weights, mesh)

    on_ranks(4, body)


def test_latents_are_not_projected(on_ranks: OnRanks) -> None:
    """A model with a latent cache is refused."""
    whole = config(1, 1, "float32")
    latent = LatentShape(latent_dim=16, rope_dim=8)
    model = msgspec.structs.replace(whole.model, kv_heads=1, latent=latent)

    def body(rank: int) -> None:
        mesh = helix_mesh(whole)
        cache = HelixCache.on(msgspec.structs.replace(whole, model=model), mesh)
        with pytest.raises(ValueError, match="this model caches latents"):
            AttentionBlock(cache, 0, Setting(whole).weights, mesh)

    on_ranks(1, body)


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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("tp", "cp", "ep"), [(1, 1, 1), (2, 2, 1), (2, 2, 2), (1, 4, 4), (4, 2, 2)]
)
def test_the_ffn_on_the_same_ranks_is_the_ffn_on_one(
    tp: int, cp: int, ep: int, dtype: DType, on_ranks: OnRanks
) -> None:
    """Experts over ep and widths over tp give what one rank with all weights gives."""
    experts = Experts(dtype)
    expected, bound = experts.expected(tp * cp // ep, ep)
    for output in experts.answers(tp, cp, ep, on_ranks):
        assert ((output - expected).abs() <= bound).all()


def test_a_dense_ffn(on_ranks: OnRanks) -> None:
    """One expert that every token goes to, its width over all ranks."""
    experts = Experts("float32", experts=1)
    assert torch.equal(torch.ones(9, 1), experts.routing)
    expected, bound = experts.expected(4, 1)
    for output in experts.answers(2, 2, 1, on_ranks):
        assert ((output - expected).abs() <= bound).all()


def test_experts_on_the_wrong_ranks_are_caught(on_ranks: OnRanks) -> None:
    """Experts shifted by one rank, and a rank that is left out, are outside the bound."""
    for wrong in ("shifted", "left out"):
        experts = Experts("bfloat16")
        expected, bound = experts.expected(2, 2)

        def body(rank: int, wrong: str = wrong, experts: Experts = experts) -> Tensor:
            mesh = repurposed(helix_mesh(config(2, 2, "float32")), 2)
            ffn = FeedForward(experts.weights.shard(mesh), mesh)
            if wrong == "shifted":
                ffn.first_expert = 1 - ffn.first_expert // 2
            elif rank == 3:
                ffn.weights = FeedForwardWeights(
                    *(torch.zeros_like(w) for w in dataclasses.astuple(ffn.weights))
                )
            return ffn(experts.x, experts.routing)

        outputs = on_ranks(4, body)
        assert not all(((o - expected).abs() <= bound).all() for o in outputs)


def test_experts_that_do_not_divide(on_ranks: OnRanks) -> None:
    """The sentence names both."""

    def body(rank: int) -> None:
        mesh = repurposed(helix_mesh(config(2, 2, "float32")), 4)
        with pytest.raises(ValueError, match="2 experts of width 16 do not divide over ep 4"):
            Experts("float32", experts=2).weights.shard(mesh)

    on_ranks(4, body)
