"""`HelixCache` by the Triton kernels, in the interpreter; `test_kernels` runs this file.

A stand-in takes the place of the CUDA graph: it notes what a step launches, tensor by tensor, and
does the same again. What the host would have changed in between, other than in those tensors'
memory, does not reach a replay, as with a real graph.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from triton.runtime.interpreter import InterpretedFunction

from gpu_testing.ranks import run_ranks
from helix_gpu.bookkeeping.rank_book import RankStep
from helix_gpu.cache import Backend, DecodeStep, HelixCache
from helix_gpu.comm.exchange import Exchange
from helix_gpu.comm.hop_b import Costs, SameLane
from helix_gpu.graphs import Replay, StepGraph
from helix_spec.config import Config, LatentShape, ModelShape

pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

WAITS = {
    torch.ops.aten._local_scalar_dense.default,
    torch.ops.aten.nonzero.default,
    torch.ops.aten.equal.default,
    torch.ops.aten.is_nonzero.default,
    torch.ops.aten.masked_select.default,
}
"""Operations for which the host would wait; a capture fails there."""
IN_TURN = threading.RLock()
"""The interpreter keeps its place in the grid in one variable."""
TAPES = threading.local()


class Tape(TorchDispatchMode):
    """What a step launched: operations of torch, kernels, exchanges."""

    def __init__(self) -> None:
        super().__init__()
        self.played: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any], Any]] = []
        self.silent = False

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func in WAITS and not self.silent:
            raise AssertionError(f"A captured step calls {func}, which waits for the device.")
        return self.note(func, args, kwargs or {})

    def note(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: Any) -> Any:
        """Do it, and note it unless it is part of something that is noted whole."""
        outer, self.silent = self.silent, True
        try:
            result = func(*args, **kwargs)
        finally:
            self.silent = outer
        if not outer:
            self.played.append((func, args, kwargs, result))
        return result

    def replay(self) -> None:
        """Do it all again, results into the memory that they had."""
        for func, args, kwargs, result in self.played:
            if "empty" in str(func):
                continue
            again = func(*args, **kwargs)
            for old, new in zip(tree_leaves(result), tree_leaves(again), strict=True):
                if isinstance(old, Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


def stand_in(work: Callable[[], None]) -> Replay:
    """A capture as `helix_gpu.graphs` wants it."""
    TAPES.current = tape = Tape()
    try:
        with tape:
            work()
    finally:
        del TAPES.current
    return tape.replay


def noted(func: Callable[..., Any]) -> Callable[..., Any]:
    """A function that a running capture notes as one launch."""

    def call(*args: Any, **kwargs: Any) -> Any:
        tape = getattr(TAPES, "current", None)
        return func(*args, **kwargs) if tape is None else tape.note(func, args, kwargs)

    return call


@pytest.fixture(autouse=True)
def _kernels_are_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    run = InterpretedFunction.run

    def in_turn(*args: Any, **kwargs: Any) -> Any:
        with IN_TURN:
            return run(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", lambda *a, **kw: noted(in_turn)(*a, **kw))


def on_ranks(
    config: Config,
    body: Callable[[HelixCache], Any],
    backend: Backend = "triton",
    cache_class: type[HelixCache] = HelixCache,
) -> Any:
    """What `body` makes of every rank's cache."""

    def make(config: Config, *, exchange: Exchange, **options: Any) -> HelixCache:
        return cache_class(config, exchange=noted(exchange), **options)

    return run_ranks(config, lambda cache, rank: body(cache), make, backend=backend)


SMALL = ModelShape(q_heads=2, kv_heads=1)
MODELS = {
    "gqa": ModelShape(q_heads=4, kv_heads=2),
    "float16, products and partials too": ModelShape(
        q_heads=4, kv_heads=1, head_dim=32,
        dtype="float16", product_dtype="float16", partial_dtype="float16",
    ),
    "bfloat16, products in float32": ModelShape(q_heads=4, kv_heads=4, dtype="bfloat16"),
    "8 bits": ModelShape(q_heads=4, kv_heads=2, dtype="float16", cache_dtype="float8_e4m3fn"),
    "latent": ModelShape(
        q_heads=4, kv_heads=1, head_dim=24, latent=LatentShape(latent_dim=32, rope_dim=16)
    ),
    "latent of 8 bits": ModelShape(
        layers=2, q_heads=4, kv_heads=1, head_dim=24, dtype="float16", cache_dtype="float8_e4m3fn",
        latent=LatentShape(latent_dim=32, rope_dim=16),
    ),
}  # fmt: skip
PROMPTS = {7: 3, 2: 5}
STEPS = 3
"""With C=2 and T=2 turns pass and pages begin meanwhile."""


def setting(model: ModelShape) -> Config:
    """Two ranks, and tables wider than any step needs."""
    return Config(layout="pr9757/1:C=2,T=2", pages=[20, 20], max_len=40, model=model)


def inputs(config: Config, step: int) -> list[Tensor | None]:
    """Q, K and V [layers, 2, heads, dim] of one token for each request."""
    model, generator = config.model, torch.Generator().manual_seed(step)
    shapes = [(model.q_heads, model.key_dim), (model.kv_heads, model.key_dim)]
    given: list[Tensor | None] = [
        (torch.randint(-32, 33, (model.layers, 2, *shape), generator=generator) / 16).to(
            getattr(torch, model.dtype)
        )
        for shape in [*shapes, shapes[1]]
    ]
    if model.latent:
        given[2] = None
    return given


def admit(cache: HelixCache) -> None:
    """The prompts."""
    model = cache.config.model

    def prompt_kv(positions: Tensor) -> tuple[Tensor, Tensor | None]:
        shape = (model.layers, len(positions), model.kv_heads, model.key_dim)
        k = (positions[None, :, None, None] % 7 / 4).expand(shape).to(cache.dtype)
        return k, None if model.latent else k + 1

    for id, prompt_len in PROMPTS.items():
        cache.admit(id, prompt_len, prompt_kv)


def eager(cache: HelixCache) -> tuple[list[Tensor], Tensor]:
    """Outputs of every step, and the pool at the end."""
    cache.pool.zero_()
    admit(cache)
    outputs = []
    for step in range(STEPS):
        q, k, v = inputs(cache.config, step)
        outputs.append(cache.decode(list(PROMPTS), q, k, v))
    return outputs, cache.pool.float()


def replayed(cache: HelixCache) -> tuple[list[Tensor], Tensor]:
    """The same by a graph of 3 rows, captured while the cache was empty."""
    cache.pool.zero_()
    graph = StepGraph(cache, 3, capture=stand_in)
    admit(cache)
    outputs = []
    for step in range(STEPS):
        outputs.append(graph.decode(list(PROMPTS), *inputs(cache.config, step)).clone())
    return outputs, cache.pool.float()


def same(one: Any, other: Any) -> bool:
    """Whether outputs and pools are equal on every rank (NaN to NaN)."""
    return all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for (outputs, pool), (others, other_pool) in zip(one, other, strict=True)
        for a, b in zip([*outputs, pool], [*others, other_pool], strict=True)
    )


@pytest.mark.parametrize("model", MODELS.values(), ids=MODELS)
def test_the_kernels_attend_as_the_cpu_does(model: ModelShape) -> None:
    """The cache holds the same bits, and outputs differ by roundings of their type."""
    config = setting(model)
    unit = torch.finfo(getattr(torch, model.dtype)).eps
    for (outputs, pool), (expected, expected_pool) in zip(
        attended(model), on_ranks(config, eager, "torch"), strict=True
    ):
        torch.testing.assert_close(pool, expected_pool, rtol=0, atol=0, equal_nan=True)
        for output, right in zip(outputs, expected, strict=True):
            torch.testing.assert_close(output, right, rtol=4 * unit, atol=8 * unit)


@cache
def attended(model: ModelShape) -> Any:
    """What eager steps by the kernels give."""
    return on_ranks(setting(model), eager)


@pytest.mark.parametrize("model", [SMALL, MODELS["latent of 8 bits"]], ids=["gqa", "latent"])
def test_a_replay_is_what_the_eager_step_is(model: ModelShape) -> None:
    """Over turns and pages, with dummies, lengths growing: the same bits in outputs and pools."""
    assert same(attended(model), on_ranks(setting(model), replayed))


class Halved(HelixCache):
    """Attends in two halves whatever it costs."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        always = Costs(latency=0.0, exchange_speed=1.0, attention_speed=1.0, second_half=0.0)
        super().__init__(*args, **kwargs, hop_b=always)


class HalvedInOneThread(Halved):
    """The same, with everything where a capture notes it."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._lane = SameLane()


def test_halves_change_no_bit() -> None:
    """HOP-B by the kernels, eager and replayed, gives what whole steps give."""
    config = setting(SMALL)
    assert same(attended(SMALL), on_ranks(config, eager, cache_class=Halved))
    assert same(attended(SMALL), on_ranks(config, replayed, cache_class=HalvedInOneThread))


@pytest.mark.parametrize("stale", ["slots", "lengths", "tables", "cos", "sin"])
def test_a_stale_buffer_shows(stale: str) -> None:
    """A cache that leaves one of a step's tensors as it was at the capture is caught."""

    class Stale(HelixCache):
        def _begun(self, book: RankStep) -> DecodeStep:
            reserved = getattr(self._reserved[len(book.rows) + book.pad], stale)
            kept = reserved.clone()
            step = super()._begun(book)
            reserved.copy_(kept)
            return step

    wrong = on_ranks(setting(SMALL), replayed, cache_class=Stale)
    assert not same(attended(SMALL), wrong)


def test_what_waits_cannot_be_captured() -> None:
    """The stand-in refuses a step that asks the device for a number."""
    tensor = torch.zeros(3)
    with pytest.raises(AssertionError, match="waits for the device"):
        stand_in(lambda: tensor.sum().item() and None)


def test_what_a_graph_does_not_hold() -> None:
    """Too many tokens, missing inputs, and a backend whose work cannot be captured, are errors."""
    config = Config(layout="pr9757/1:C=1,T=2", pages=[20], max_len=40, model=SMALL)
    cache = HelixCache(config, rank=0, backend="triton")
    graph = StepGraph(cache, 1, capture=stand_in)
    q, k, v = inputs(config, 0)
    with pytest.raises(ValueError, match="2 new tokens; this graph holds 1"):
        graph.decode([7, 2], q, k, v)
    with pytest.raises(ValueError, match="2 new tokens; this graph holds 1"):
        graph.replay(q[:, :2], k[:, :2], None if v is None else v[:, :2])
    with pytest.raises(ValueError, match="has shape None; it must have"):
        graph.decode([7], q[:, :1], k[:, :1], None)
    with pytest.raises(ValueError, match="rows is 0; a step has at least one"):
        StepGraph(cache, 0, capture=stand_in)
    with pytest.raises(ValueError, match="The backend is torch"):
        StepGraph(HelixCache(config, rank=0), 1, capture=stand_in)
