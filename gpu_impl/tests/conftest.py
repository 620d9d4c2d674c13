"""What several tests need: legal layouts, ranks as threads, and exact attention with its bound."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from helix_gpu.cache import HelixCache
from helix_gpu.comm.exchange import Exchange
from helix_spec.config import Config

UNIT = {torch.float32: 2.0**-24, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}


def round_to_bfloat16() -> None:
    """Let Triton's interpreter round float32 to bfloat16 as GPUs do, to the nearest; it cuts."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle, tl

    cast = InterpreterBuilder.cast_impl

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if (source.dtype.scalar, target.scalar) != (tl.float32, tl.bfloat16):
            return cast(self, source, target)
        rounded = torch.from_numpy(np.array(source.data)).to(torch.bfloat16)
        return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), target.scalar)

    InterpreterBuilder.cast_impl = cast_impl


if os.environ.get("TRITON_INTERPRET") == "1":
    round_to_bfloat16()


class Table:
    """An all-to-all among threads: everyone lays down what it sends, then picks up its own."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.sent: list[Tensor] = [torch.empty(0)] * ranks

    def seat(self, rank: int) -> Exchange:
        """The exchange of one rank."""

        def exchange(send: Tensor) -> Tensor:
            self.sent[rank] = send
            self.barrier.wait()
            received = torch.stack([row[rank] for row in self.sent])
            self.barrier.wait()
            return received

        return exchange


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """Runs `body(cache, rank)` on every rank of a configuration; the answers by rank.

    What else is given goes to each `HelixCache`.
    """

    def run(config: Config, body: Callable[[HelixCache, int], Any], **how: Any) -> list[Any]:
        cp_size = config.layout.cp_size
        tables = [Table(cp_size) for _ in range(config.tp_size)]

        def one(rank: int) -> Any:
            table = tables[rank // cp_size]
            try:
                exchange = table.seat(rank % cp_size)
                return body(HelixCache(config, rank=rank, exchange=exchange, **how), rank)
            except BaseException:
                table.barrier.abort()
                raise

        with ThreadPoolExecutor(config.world_size) as pool:
            return list(pool.map(one, range(config.world_size)))

    return run


@pytest.fixture
def on_ranks() -> Iterator[Callable[[int, Callable[[int], Any]], list[Any]]]:
    """Runs `body(rank)` on n ranks, threads with torch.distributed initialised; answers by rank.

    Collectives among them are real in all but the wire. Every rank answers or fails, then the
    first failure is raised.
    """
    torch._C._distributed_c10d._set_thread_isolation_mode(True)
    threaded._install_threaded_pg()

    def run(ranks: int, body: Callable[[int], Any]) -> list[Any]:
        store = dist.HashStore()
        threaded.ProcessLocalGroup.reset()

        def one(rank: int) -> tuple[Any, BaseException | None]:
            dist.init_process_group("threaded", rank=rank, world_size=ranks, store=store)
            try:
                return body(rank), None
            except BaseException as error:
                threaded.ProcessLocalGroup.exception_handle(error)  # peers need not wait for it
                return None, error
            finally:
                dist.destroy_process_group()

        with ThreadPoolExecutor(ranks) as pool:
            answers = list(pool.map(one, range(ranks)))
        errors = [error for _, error in answers if error is not None]
        for error in sorted(errors, key=lambda error: isinstance(error, SystemExit)):
            raise error
        return [answer for answer, _ in answers]

    yield run
    threaded._uninstall_threaded_pg()
    torch._C._distributed_c10d._set_thread_isolation_mode(False)


def _exact(
    q: Tensor, shards: Sequence[tuple[Tensor, Tensor]], out: torch.dtype, wire: torch.dtype
) -> tuple[Tensor, Tensor, Tensor]:
    query = q.double()
    groups = q.shape[0] // shards[0][0].shape[1]
    k, v = (
        torch.cat([shard[part] for shard in shards]).double().repeat_interleave(groups, 1)
        for part in (0, 1)
    )
    scale, u32 = q.shape[-1] ** -0.5, 2.0**-24
    products = query * k
    scores = products.sum(-1) * scale
    lse = scores.logsumexp(0)
    p = (scores - lse).exp()
    o = (p[..., None] * v).sum(0)

    ds = u32 * (
        scale * q.shape[-1] ** 0.5 * products.norm(dim=-1)
        + ((q.shape[-1] / 3) ** 0.5 + 2) * scores.abs()
        + scores.abs().amax(0)
    )
    squares = ((p * (v - o).norm(dim=-1) * ds) ** 2).sum(0)
    squares += ((p * v.norm(dim=-1) * u32) ** 2).sum(0)
    squares += (UNIT[out] * o.norm(dim=-1)) ** 2
    squares += (u32 * (len(k) ** 0.5 + 2) * (p[..., None] * v.abs()).sum(0).norm(dim=-1)) ** 2
    end = 0
    for keys, _ in shards:
        mine = slice(end, end := end + len(keys))
        if not len(keys):
            continue
        weight = p[mine].sum(0)
        o_r = (p[mine][..., None] * v[mine]).sum(0) / weight[:, None]
        lse_r = scores[mine].logsumexp(0)
        squares += (weight * o_r.norm(dim=-1) * UNIT[wire]) ** 2
        squares += (weight * (lse_r.abs() + 1) * 2 * u32 * (o_r - o).norm(dim=-1)) ** 2
    return o, lse, squares.sqrt()


@pytest.fixture
def exact() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """Float64 attention of one query [heads, dim] over shards of (k, v) [tokens, kv_heads, dim].

    Gives the output, its log-sum-exp and, per head, the distance within which an output of
    type `out`, merged from partials of type `wire`, is equal (ATT-4).
    """
    return _exact


def entries(*key: int) -> np.random.Generator:
    """A generator that belongs to `key` alone."""
    return np.random.default_rng(key)


@pytest.fixture
def values() -> Callable[..., Tensor]:
    """Multiples of 1/16 within +-4 of a shape, exact in every type, that belong to a key."""

    def make(shape: tuple[int, ...], *key: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(entries(*key).integers(-64, 65, shape) / 16).to(dtype)

    return make
