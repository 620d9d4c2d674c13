"""The ranks of a configuration as threads of one process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from helix_gpu.cache import HelixCache
from helix_gpu.comm.exchange import Exchange
from helix_spec.config import Config


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
