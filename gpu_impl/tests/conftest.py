"""What several tests need: legal layouts, ranks as threads, and exact attention with its bound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.testing._internal.distributed import multi_threaded_pg as threaded

from gpu_testing import ranks
from gpu_testing.exact import exact_attention


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


@pytest.fixture
def run_ranks() -> Callable[..., list[Any]]:
    """`gpu_testing.ranks.run_ranks`."""
    return ranks.run_ranks


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


@pytest.fixture
def exact() -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    """`gpu_testing.exact.exact_attention`."""
    return exact_attention


def entries(*key: int) -> np.random.Generator:
    """A generator that belongs to `key` alone."""
    return np.random.default_rng(key)


@pytest.fixture
def values() -> Callable[..., Tensor]:
    """Multiples of 1/16 within +-4 of a shape, exact in every type, that belong to a key."""

    def make(shape: tuple[int, ...], *key: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.from_numpy(entries(*key).integers(-64, 65, shape) / 16).to(dtype)

    return make
