"""Caches of latents (MLA) and of 8 bits through the whole suite: right ones, wrong ones named."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import pytest
import torch

from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines.gpu import GpuEngine
from helix_conformance.judge.play import check_trace
from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.rope import rotate
from helix_gpu.cache import HelixCache
from helix_mutants.parts import rebound
from helix_spec.config import Config, LatentShape, ModelShape
from helix_spec.events import Accept, Admit, Decode, Fork, Preempt, Resume
from helix_spec.trace import Trace

DEEPSEEK = ModelShape(
    layers=2, q_heads=16, kv_heads=1, head_dim=192, latent=LatentShape(),
    dtype="bfloat16", partial_dtype="bfloat16",
)  # fmt: skip
SMALL = ModelShape(
    layers=2, q_heads=8, kv_heads=1, head_dim=24, dtype="bfloat16",
    latent=LatentShape(latent_dim=32, rope_dim=16),
)  # fmt: skip
NARROW = ModelShape(
    q_heads=8, kv_heads=4, head_dim=32, dtype="bfloat16", cache_dtype="float8_e4m3fn"
)
EVENTS = [
    Admit(0, 9),
    Decode([0], [3], 2),
    Accept(0, 2),
    Fork(0, 1),
    Decode([1, 0], [1, 1]),
    Preempt(0),
    Resume(0),
    Decode([0, 1], [2, 1]),
]


def trace(model: ModelShape, *, layout: str = "pr9757/1:C=2,T=2", tp_size: int = 2) -> Trace:
    """The events on this model."""
    config = Config(layout=layout, pages=[30, 30], max_len=60, model=model, tp_size=tp_size)
    return Trace(config=config, events=EVENTS)


@pytest.mark.parametrize("cached", [None, "float8_e4m3fn"])
def test_deepseeks_dimensions_on_gloo(gpu_pool, cached) -> None:
    """512 + 64 over tp 2 and cp 2, in processes: every tp_rank caches the latents."""
    model = msgspec.structs.replace(DEEPSEEK, cache_dtype=cached)
    assert check_trace(gpu_pool, trace(model), gpu_pool.profiles) is None


class Wrong(GpuEngine):
    """`HelixCache`, of another class."""

    cache_class: ClassVar[type[HelixCache]]

    def start(self, config, profiles):
        outcome = super().start(config, profiles)
        self.cache.__class__ = self.cache_class
        return outcome


def _attending(function) -> type[HelixCache]:
    class Cache(HelixCache):
        _attended = rebound(HelixCache._attended, attend_pages=function)

    return Cache


def _scaled_by_width(q, pages, tables, lengths, *, scale, value_dim, runs):
    return attend_pages(q, pages, tables, lengths, value_dim=value_dim, runs=runs)


def _values_from_the_end(q, pages, tables, lengths, *, scale, value_dim, runs):
    output, lse = attend_pages(q, pages, tables, lengths, scale=scale, runs=runs)
    return output[..., -value_dim:], lse


def _turned_whole(x, cos, sin):
    """The latent is turned with the rest, by the angles there are, over and over."""
    times = x.shape[-1] // cos.shape[-1] // 2
    a, b = x.float().chunk(2, dim=-1)
    cos, sin = (table.repeat(1, 1, times)[..., : a.shape[-1]] for table in (cos, sin))
    return torch.cat((a * cos - b * sin, b * cos + a * sin), dim=-1).to(x.dtype)


class TurnsTheLatent(HelixCache):
    """RoPE goes over the whole row."""

    _prompt = rebound(HelixCache._prompt, rotate=_turned_whole)
    _rotated = rebound(HelixCache._rotated, rotate=_turned_whole)


class RoundsDown(HelixCache):
    """K and V are cut to 8 bits, not rounded."""

    def _cached(self, rows):
        toward_zero = (rows.float().view(torch.int32) >> 20 << 20).view(torch.float32)
        return toward_zero.to(self.pool.dtype)


def _left_in_float32(x, cos, sin):
    return rotate(x.float(), cos, sin)


class RoundsOnce(HelixCache):
    """K goes from float32 to 8 bits at once, which ends elsewhere where bfloat16 ends in a tie."""

    _prompt = rebound(HelixCache._prompt, rotate=_left_in_float32)


@pytest.mark.parametrize(
    ("cache", "model", "expected"),
    [
        pytest.param(cache, model, set(numbers), marks=pytest.mark.holds(*numbers))
        for cache, model, *numbers in [
            (_attending(_scaled_by_width), SMALL, "ATT-1", "ATT-4"),
            (_attending(_values_from_the_end), SMALL, "ATT-1", "ATT-4"),
            (TurnsTheLatent, SMALL, "OWN-1"),
            (RoundsDown, NARROW, "OWN-1"),
            (RoundsOnce, NARROW, "POS-2"),
        ]
    ],
)
def test_a_wrong_one_is_named(cache, model, expected) -> None:
    """What is wrong with a latent or an 8-bit cache is named by what it breaks."""
    engine = type("Engine", (Wrong,), {"cache_class": cache})
    driver = ThreadDriver(engine)
    try:
        failure = check_trace(driver, trace(model, tp_size=1), driver.profiles)
    finally:
        driver.close()
    assert failure is not None
    assert expected <= {violation.invariant for violation in failure.violations}
