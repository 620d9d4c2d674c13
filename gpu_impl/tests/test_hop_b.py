"""HOP-B: when it pays, what is measured, and that it changes no bit."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.cache import DecodeStep, HelixCache
from helix_gpu.comm.exchange import MakeExchange, all_gather, all_to_all, reduce_scatter
from helix_gpu.comm.hop_b import Costs, Lane, fitted, measure
from helix_gpu.comm.push import push
from helix_spec.config import Config, ModelShape

MIB = 2.0**20
H200 = Costs(latency=20e-6, exchange_speed=380e9, attention_speed=4.3e12, second_half=5e-6)
"""Planning values for one host of H200: NCCL's latency, NVLink, memory, two launches."""


@pytest.mark.parametrize(
    ("cached", "sent"),
    [
        (1024 * MIB, 6 * MIB),  # MLA, 64 requests at 128 heads
        (4096 * MIB, 7 * MIB),
        (256 * MIB, 64 * MIB),  # the exchange is the longer part, and the attention is hidden
    ],
)
def test_it_pays_where_bytes_cost_time(cached: float, sent: float) -> None:
    """Much to send and enough attention to hide it behind."""
    assert H200.saved(cached, sent) > 0


@pytest.mark.parametrize(
    ("cached", "sent"),
    [
        (256 * MIB, 0.1 * MIB),  # GQA, 8 requests: an exchange is latency
        (256 * MIB, 0.8 * MIB),  # GQA, 64 requests
        (4096 * MIB, 0.0),
        (16 * MIB, 6 * MIB),  # nothing to hide it behind: the second latency is more
    ],
)
def test_it_loses_where_latency_does(cached: float, sent: float) -> None:
    """Little to send, or little attention."""
    assert H200.saved(cached, sent) < 0


def test_what_is_saved_in_closed_form() -> None:
    """Half of the bytes' time less the launches, or half of the attention's less a latency."""
    costs = Costs(latency=3.0, exchange_speed=2.0, attention_speed=5.0, second_half=1.0)
    assert costs.saved(500, 20) == pytest.approx(20 / 2.0 / 2 - 1.0)
    no_launches = Costs(latency=3.0, exchange_speed=2.0, attention_speed=5.0, second_half=0.0)
    assert no_launches.saved(50, 400) == pytest.approx(50 / 5.0 / 2 - 3.0)


def test_costs_are_fitted_from_times() -> None:
    """Two exchanges give latency and speed, two attentions the price of halves."""
    few, many = 3000, 3_000_000
    costs = fitted([2.0 + few / 1e6, 2.0 + many / 1e6, 4.0, 4.5], [few, many], 800)
    assert costs.latency == pytest.approx(2.0)
    assert costs.exchange_speed == pytest.approx(1e6)
    assert (costs.attention_speed, costs.second_half) == (200.0, 0.5)


def test_noise_never_makes_it_pay() -> None:
    """A large exchange that was measured faster than a small one has no bytes to hide."""
    costs = fitted([2.0, 1.5, 4.0, 3.0], [3000, 3_000_000], 800)
    assert (costs.latency, costs.exchange_speed, costs.second_half) == (2.0, float("inf"), 0.0)
    assert costs.saved(8e9, 1e9) <= 0


@pytest.mark.parametrize("make", [all_to_all, all_gather, reduce_scatter, push])
def test_the_slowest_rank_counts_for_all(make: MakeExchange, on_ranks: Any) -> None:
    """All get the same costs, though one attends more slowly: they must decide alike."""

    def body(rank: int) -> Costs:
        def attend(rows: int) -> None:
            time.sleep(0.004 if rank == 1 else 0.0)

        group, model = dist.group.WORLD, ModelShape()
        return measure(make(group, model), group, model, attend, rows=4, cached=4000)

    first, second = on_ranks(2, body)
    assert second == first
    assert first.attention_speed <= 4000 / 0.004


def test_work_is_done_beside_and_in_order() -> None:
    """What is handed over runs in another thread, one after the other; errors come back."""
    lane, ran = Lane(torch.device("cpu")), list[tuple[float, bool]]()
    here = threading.get_ident()
    gate = threading.Event()

    def work(given: Tensor) -> Tensor:
        gate.wait(10)
        ran.append((given.item(), threading.get_ident() == here))
        return given + 1

    waits = [lane.hand(work, torch.tensor(float(i))) for i in range(3)]
    assert ran == []
    gate.set()
    assert [wait().item() for wait in waits] == [1.0, 2.0, 3.0]
    assert ran == [(0.0, False), (1.0, False), (2.0, False)]

    def fails(given: Tensor) -> Tensor:
        raise RuntimeError("the peer is gone")

    with pytest.raises(RuntimeError, match="gone"):
        lane.hand(fails, torch.zeros(1))()


ALWAYS = Costs(latency=0.0, exchange_speed=1.0, attention_speed=1.0, second_half=0.0)
NEVER = Costs(latency=1.0, exchange_speed=1e30, attention_speed=1e30, second_half=0.0)


@pytest.mark.holds("ATT-2")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_halves_change_no_bit(dtype: Any, run_ranks: Any, values: Any) -> None:
    """Groups, dummies and a prompt in chunks give the same in halves; a lone row is not halved.

    Where they pay a step has two exchanges, else one.
    """
    model = ModelShape(q_heads=8, kv_heads=2, dtype=dtype, partial_dtype=dtype, head_dim=16)
    config = Config(layout="pr9757/1:C=4,T=2", pages=[40] * 4, max_len=99, model=model)

    def body(cache: HelixCache, rank: int) -> tuple[list[Tensor], list[int]]:
        inner, exchanges = cache._exchange, list[int]()

        def counted(send: Tensor) -> Tensor:
            exchanges[-1] += 1
            return inner(send)

        cache._exchange = counted

        def attended(step: DecodeStep) -> Tensor:
            exchanges.append(0)
            places = step.book.position_ids.tolist()
            dummies = len(step.lengths) - len(places)
            q, k, v = (
                torch.cat(
                    [values((1, heads, 16), place, code, dtype=cache.dtype) for place in places]
                    + [torch.full((dummies, heads, 16), torch.nan, dtype=cache.dtype)]
                )
                for code, heads in enumerate((8, 2, 2))
            )
            return cache.attend(step, 0, q, k, v)

        outputs = [attended(step) for id in (0, 1) for step in cache.prefill(id, 9, chunk=4)]
        outputs += [
            attended(cache.begin([1, 0], [3, 1], pad=2)),
            attended(cache.begin([0])),
            attended(cache.begin([0, 1])),
        ]
        return outputs, exchanges

    whole = run_ranks(config, body)
    for costs, expected in ((ALWAYS, [2, 2, 1, 2, 2, 1, 2, 1, 2]), (NEVER, [1] * 9)):
        for (outputs, _), (others, exchanges) in zip(
            whole, run_ranks(config, body, hop_b=costs), strict=True
        ):
            assert exchanges == expected
            assert all(map(torch.equal, outputs, others))
