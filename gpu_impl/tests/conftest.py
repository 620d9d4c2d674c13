"""What several tests need: legal layouts, ranks as threads, and exact attention with its bound."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

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
def on_ranks() -> Iterator[ranks.OnRanks]:
    """`gpu_testing.ranks.threads_with_collectives`."""
    with ranks.threads_with_collectives() as run:
        yield run


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
