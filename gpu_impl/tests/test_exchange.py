"""What travels, and every way in which it travels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gpu_testing.exact import UNIT
from helix_gpu.attention.merge import merge
from helix_gpu.attention.partials import pack, unpack
from helix_gpu.comm.exchange import Exchange, MakeExchange, all_gather, all_to_all, reduce_scatter
from helix_gpu.comm.push import push
from helix_spec.config import DType, ModelShape

OnRanks = Callable[[int, Callable[[int], Any]], list[Any]]
INF = torch.inf
EXCHANGES: list[MakeExchange] = [all_to_all, all_gather, reduce_scatter, push]
IN_ORDER: list[MakeExchange] = [all_to_all, all_gather, push]
"""Those whose merge adds the ranks in their order, so that all of them round alike."""


@pytest.mark.holds("MAP-1")
@pytest.mark.parametrize("wire", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "heads", "dim", "ranks"), [(1, 2, 2, 2), (5, 12, 16, 3), (3, 4, 8, 4), (3, 4, 8, 1)]
)
def test_round_trip(wire: torch.dtype, n: int, heads: int, dim: int, ranks: int) -> None:
    """Rank d gets heads slice d of every rank's partials, in the order of the ranks."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(ranks, n, heads, dim, generator=generator)
    lses = torch.randn(ranks, n, heads, generator=generator)
    lses[0, 0, 0] = -INF
    sent = torch.stack([pack(o, s, ranks, wire) for o, s in zip(outputs, lses, strict=True)])
    own = heads // ranks
    for rank in range(ranks):
        got_outputs, got_lses = unpack(sent[:, rank], n, own, dim, wire)
        mine = slice(rank * own, (rank + 1) * own)
        assert torch.equal(outputs[:, :, mine].to(wire), got_outputs)
        assert torch.equal(lses[:, :, mine], got_lses)


def test_bytes_on_the_wire() -> None:
    """A rank sends each other head_dim elements and one float32 per row and head, no more."""
    sent = pack(torch.zeros(8, 64, 128), torch.zeros(8, 64), 4, torch.bfloat16)
    assert sent.shape == (4, 8 * 16 * (128 * 2 + 4))


@dataclass
class Partials:
    """The partial attentions of all ranks over disjoint keys, and what they merge to.

    `outputs` [ranks, n, heads, dim], `lses` [ranks, n, heads], float32 and taken as exact.
    """

    model: ModelShape
    outputs: Tensor
    lses: Tensor

    @classmethod
    def random(cls, ranks: int, wire: DType, *, n: int = 3, spread: float = 3.0) -> Partials:
        """Scores of all sizes; rank 0 has no key in row 0, nobody has one in row 1.

        What stands in the output where no key is, is NaN.
        """
        generator = torch.Generator().manual_seed(ranks)
        model = ModelShape(q_heads=2 * ranks, kv_heads=1, head_dim=16, partial_dtype=wire)
        outputs = torch.randn(ranks, n, 2 * ranks, 16, generator=generator)
        lses = torch.randn(ranks, n, 2 * ranks, generator=generator) * spread + 5
        lses[0, 0] = -INF
        lses[:, 1] = -INF
        outputs[lses == -INF] = torch.nan
        return cls(model, outputs, lses)

    @property
    def wire(self) -> torch.dtype:
        """The type in which outputs travel."""
        wire: torch.dtype = getattr(torch, self.model.partial_dtype)
        return wire

    def exact(self) -> tuple[Tensor, Tensor, Tensor]:
        """Float64 merge, its log-sum-exp, and the merge's terms of ATT-4's bound, by row and head.

        They are the rounding for the wire, the ranks' weights, the sum over ranks, the result's.
        """
        lses = self.lses.double()
        outputs = self.outputs.double().where((lses != -INF)[..., None], 0)
        lse = lses.logsumexp(0)
        weights = (lses - lse.where(lse != -INF, 0)).exp()
        parts = weights[..., None] * outputs
        merged = parts.sum(0)
        u32, ranks = UNIT[torch.float32], len(lses)
        apart = (outputs - merged).norm(dim=-1)
        known = lses.where(lses != -INF, 0).abs()
        squares = (parts.norm(dim=-1) * UNIT[self.wire]).square().sum(0)
        squares += (weights * (known + 1) * 2 * u32 * apart).square().sum(0)
        squares += (u32 * (ranks**0.5 + 2) * parts.abs().sum(0).norm(dim=-1)).square()
        squares += (u32 * merged.norm(dim=-1)).square()
        return merged, lse, squares.sqrt()

    def merged(self, rank: int, exchange: Exchange) -> tuple[Tensor, Tensor]:
        """What a rank ends up with: its slice of the heads, and their log-sum-exps."""
        ranks, n, heads, dim = self.outputs.shape
        sent = pack(self.outputs[rank], self.lses[rank], ranks, self.wire)
        return merge(*unpack(exchange(sent), n, heads // ranks, dim, self.wire))

    def right(self, answers: list[tuple[Tensor, Tensor]]) -> bool:
        """Whether the ranks' slices side by side are the exact merge, within its bound."""
        exact, exact_lse, bound = self.exact()
        output, lse = (torch.cat(parts, 1) for parts in zip(*answers, strict=True))
        near = torch.isclose(exact_lse.float(), lse, rtol=4e-7, atol=1e-6)
        return bool(((output - exact).norm(dim=-1) <= bound).all() and near.all())


def everywhere(
    on_ranks: OnRanks, make: MakeExchange, partials: Partials, times: int = 1
) -> list[Any]:
    """Every rank's answers, one for each of `times` exchanges in a row."""
    model, ranks = partials.model, len(partials.outputs)

    def body(rank: int) -> list[tuple[Tensor, Tensor]]:
        exchange = make(dist.group.WORLD, model)
        return [partials.merged(rank, exchange) for _ in range(times)]

    return on_ranks(ranks, body)


@pytest.mark.holds("ATT-1", "ATT-3", "MAP-1")
@pytest.mark.parametrize("make", EXCHANGES)
@pytest.mark.parametrize("ranks", [2, 3, 4])
@pytest.mark.parametrize("wire", ["float32", "float16", "bfloat16"])
def test_every_exchange_gives_the_exact_merge(
    make: MakeExchange, ranks: int, wire: DType, on_ranks: OnRanks
) -> None:
    """Also where a rank has no key and its memory is NaN; where nobody has one it is (0, -inf)."""
    if make is reduce_scatter:
        wire = "float32"
    partials = Partials.random(ranks, wire)
    answers = [answer for (answer,) in everywhere(on_ranks, make, partials)]
    assert partials.right(answers)
    for output, lse in answers:
        assert torch.equal(torch.zeros_like(output[1]), output[1])
        assert torch.equal(torch.full_like(lse[1], -INF), lse[1])


@pytest.mark.holds("ATT-1", "ATT-3")
@pytest.mark.parametrize("make", EXCHANGES)
def test_one_rank_may_hold_everything(make: MakeExchange, on_ranks: OnRanks) -> None:
    """With keys on the last rank alone, the others' NaN reach nothing."""
    partials = Partials.random(3, "float32")
    partials.lses[:2], partials.outputs[:2] = -INF, torch.nan
    assert partials.right([answer for (answer,) in everywhere(on_ranks, make, partials)])


@pytest.mark.holds("ATT-1")
@pytest.mark.parametrize("make", EXCHANGES)
@pytest.mark.parametrize("spread", [40.0, 400.0])
def test_one_rank_may_dominate(make: MakeExchange, spread: float, on_ranks: OnRanks) -> None:
    """Log-sum-exps hundreds apart neither overflow nor leave the bound."""
    partials = Partials.random(4, "float32", spread=spread)
    assert partials.right([answer for (answer,) in everywhere(on_ranks, make, partials)])


@pytest.mark.holds("ATT-2")
@pytest.mark.parametrize("wire", ["float32", "bfloat16"])
def test_exchanges_in_order_agree_to_the_bit(wire: DType, on_ranks: OnRanks) -> None:
    """They differ in how bytes travel alone, and again and again they give the same."""
    partials = Partials.random(4, wire, n=20)
    first, *others = [
        answer
        for make in IN_ORDER
        for answer in zip(*everywhere(on_ranks, make, partials, times=5), strict=True)
    ]
    for other in others:
        for expected, found in zip(first, other, strict=True):
            assert all(map(torch.equal, expected, found))


def test_a_reduce_scatter_refuses_to_add_in_less(on_ranks: OnRanks) -> None:
    """Partials that should travel in bfloat16 are refused before anything travels."""
    with pytest.raises(ValueError, match="partial_dtype is bfloat16; the sums of a reduce-scatter"):
        everywhere(on_ranks, reduce_scatter, Partials.random(2, "bfloat16"))


def test_a_message_longer_than_promised(on_ranks: OnRanks) -> None:
    """A push refuses it before anything is written, and still works afterwards."""
    partials = Partials.random(2, "float32")
    bytes_each = 3 * 2 * (16 * 4 + 4)

    def body(rank: int) -> tuple[Tensor, Tensor]:
        exchange = push(dist.group.WORLD, partials.model, message_bytes=bytes_each)
        with pytest.raises(ValueError, match=r"has 417 bytes; this push was made for .* 416"):
            exchange(torch.zeros(2, 417, dtype=torch.uint8))
        return partials.merged(rank, exchange)

    assert partials.right(on_ranks(2, body))


def test_a_push_names_the_peer_that_is_silent(
    on_ranks: OnRanks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who has waited long enough says for whom, and for which message."""
    monkeypatch.setattr("helix_gpu.comm.push.PATIENCE", timedelta(seconds=0.2))

    def body(rank: int) -> str:
        exchange = push(dist.group.WORLD, ModelShape())
        if rank == 1:
            return ""
        with pytest.raises(TimeoutError) as silent:
            exchange(torch.zeros(2, 16, dtype=torch.uint8))
        return str(silent.value)

    sentence = "Rank 1 of the group has sent 0 messages in 0.2 seconds; message 1 is waited for."
    assert on_ranks(2, body) == [sentence, ""]


# Wrong exchanges: the tests above would see each of them


def neighbours(group: dist.ProcessGroup, model: ModelShape) -> Exchange:
    """Every rank picks its neighbour's slice from all messages."""

    def exchange(send: Tensor) -> Tensor:
        gathered = torch.empty(group.size() * len(send), send.shape[1], dtype=torch.uint8)
        dist.all_gather(list(gathered.chunk(group.size())), send, group=group)
        return gathered.view(group.size(), *send.shape)[:, (group.rank() + 1) % group.size()]

    return exchange


def own_message_twice(group: dist.ProcessGroup, model: ModelShape) -> Exchange:
    """What rank 0 sent is lost, and this rank's own message stands in its place."""
    right = all_to_all(group, model)

    def exchange(send: Tensor) -> Tensor:
        received = right(send)
        received[0] = received[group.rank()]
        return received

    return exchange


def stale(group: dist.ProcessGroup, model: ModelShape) -> Exchange:
    """Rank 1's message is that of the exchange before."""
    right, before = all_to_all(group, model), list[Tensor]()

    def exchange(send: Tensor) -> Tensor:
        received = right(send)
        before.append(received[1].clone())
        received[1] = before[-2] if len(before) > 1 else 0
        return received

    return exchange


def sum_in_bfloat16(group: dist.ProcessGroup, model: ModelShape) -> Exchange:
    """A reduce-scatter whose sums are rounded to bfloat16."""
    right = all_to_all(group, model)

    def exchange(send: Tensor) -> Tensor:
        items = send.shape[1] // (4 * model.head_dim + 4)
        outputs, lses = unpack(right(send), items, 1, model.head_dim, torch.float32)
        merged, lse = merge(outputs.bfloat16(), lses)
        return pack(merged.bfloat16().float(), lse, 1, torch.float32)

    return exchange


@pytest.mark.parametrize("wrong", [neighbours, own_message_twice, stale, sum_in_bfloat16])
def test_a_wrong_exchange_is_caught(wrong: MakeExchange, on_ranks: OnRanks) -> None:
    """A wrong slice, a lost or stale message and a coarse sum are outside the bound."""
    answers = everywhere(on_ranks, wrong, Partials.random(4, "float32"))
    assert not Partials.random(4, "float32").right([answer for (answer,) in answers])


def test_unweighted_nan_is_caught() -> None:
    """A merge that multiplies an empty rank's NaN by 0 is outside the bound: NaN is not near."""
    partials = Partials.random(2, "float32")
    outputs, lses = partials.outputs, partials.lses
    weights = (lses - lses.amax(0).where(lses.amax(0) != -INF, 0)).exp()
    output = (weights[..., None] * outputs).sum(0) / weights.sum(0).clamp(min=1e-30)[..., None]
    assert not partials.right([(output, lses.logsumexp(0))])
