"""The ranks of a configuration as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from helix_gpu.cache import HelixCache
from helix_gpu.comm.exchange import Exchange
from helix_spec.config import Config

OnRanks = Callable[[int, Callable[[int], Any]], list[Any]]
"""Runs `body(rank)` on so many ranks; answers by rank."""


class ThreadAllToAll:
    """An all-to-all among threads: each leaves what it sends, then picks up what is for it."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.sent: list[Tensor] = [torch.empty(0)] * ranks

    def of(self, rank: int) -> Exchange:
        """Return the exchange of one rank."""

        def exchange(send: Tensor) -> Tensor:
            self.sent[rank] = send.clone()  # the sender goes on
            self.barrier.wait()
            received = torch.stack([row[rank] for row in self.sent])
            self.barrier.wait()
            return received

        return exchange


def run_ranks(
    config: Config,
    body: Callable[[HelixCache, int], Any],
    make: Callable[..., HelixCache] = HelixCache,
    **options: Any,
) -> list[Any]:
    """Return what `body(cache, rank)` gives on every rank of a configuration.

    `options` go to `make`, which makes the caches. The first failure is raised. Pages are poisoned
    where the configuration says so.
    """
    options = {"poison": config.poison} | options
    cp_size = config.layout.cp_size
    exchanges = [ThreadAllToAll(cp_size) for _ in range(config.tp_size)]

    def one(rank: int) -> Any:
        group = exchanges[rank // cp_size]
        try:
            exchange = group.of(rank % cp_size)
            return body(make(config, rank=rank, exchange=exchange, **options), rank)
        except BaseException:
            group.barrier.abort()
            raise

    with ThreadPoolExecutor(config.world_size) as pool:
        return list(pool.map(one, range(config.world_size)))


@contextmanager
def threads_with_collectives() -> Iterator[OnRanks]:
    """Run bodies on ranks that are threads with torch.distributed initialised.

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
