"""Attention and FFN of a transformer block on many ranks, against float64 on one."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gpu_testing.block import Experts, OnRanks, Setting, config
from helix_gpu.block import AttentionBlock, FeedForward, FeedForwardWeights
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh, repurposed
from helix_spec.config import DType, LatentShape


@pytest.mark.holds("ATT-1", "MAP-1")
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
