"""Calls that used to go wrong quietly, on one rank: each is a sentence, and changes nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from torch import Tensor

from helix_gpu.bookkeeping.refusals import Refused, StepError
from helix_gpu.cache import DecodeStep, HelixCache
from helix_spec.config import Config, ModelShape
from helix_spec.events import Reason

LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 4, 2, 16
CONFIG = Config(
    layout="pr9757/1:C=1,T=4",
    pages=[20],
    max_len=64,
    model=ModelShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM),
)


def prompt_kv(positions: Tensor) -> tuple[Tensor, Tensor]:
    """K and V that tell a position by their numbers."""
    shape = (LAYERS, len(positions), KV_HEADS, DIM)
    k = (positions % 5)[None, :, None, None].expand(shape).float()
    return k, k + 1


def rows(step: DecodeStep) -> list[Tensor]:
    """Q, K and V of a layer for a step."""
    n = len(step.lengths)
    return [torch.full((n, heads, DIM), 0.5) for heads in (Q_HEADS, KV_HEADS, KV_HEADS)]


def attend(cache: HelixCache, step: DecodeStep) -> None:
    """All layers of a step."""
    for layer in range(LAYERS):
        cache.attend(step, layer, *rows(step))


def state(cache: HelixCache) -> tuple[Any, ...]:
    """All that a refused call must leave as it was."""
    ids = cache.request_ids
    return (
        ids, cache.preempted_ids, cache.free_pages, cache.pool.clone().nan_to_num(7).tolist(),
        [(cache.local_len(id), cache.block_table(id)) for id in ids],
        cache.book.ledger.free.tolist(), cache.book.ledger.admitted,
    )  # fmt: skip


@pytest.fixture
def cache() -> HelixCache:
    """A cache with request 0 of 5 tokens."""
    cache = HelixCache(CONFIG, rank=0)
    cache.pool.zero_()
    cache.admit(0, 5, prompt_kv)
    return cache


def test_a_wrong_configuration_is_refused_before_anything_is_made() -> None:
    """The cache, the bookkeeping and the mesh say what is wrong with a field."""
    for change, sentence in (
        ({"layers": 0}, "model.layers is 0"),
        ({"cache_dtype": "int8"}, "model.cache_dtype is 'int8'"),
        ({"kv_heads": 0}, "model.kv_heads is 0"),
    ):
        model = msgspec.structs.replace(CONFIG.model, **change)
        with pytest.raises(Refused, match=sentence) as refused:
            HelixCache(msgspec.structs.replace(CONFIG, model=model), rank=0)
        assert refused.value.reason == Reason.BAD_CONFIG


# Steps that are over


def over_by_release(cache: HelixCache) -> DecodeStep:
    """The request ends, and another takes its row and pages."""
    step = cache.begin([0])
    cache.release(0)
    cache.admit(1, 16, prompt_kv)
    return step


def over_by_preemption(cache: HelixCache) -> DecodeStep:
    """The request comes back to the same row."""
    step = cache.begin([0])
    cache.preempt(0)
    cache.resume(0, prompt_kv)
    return step


def over_by_the_next_step(cache: HelixCache) -> DecodeStep:
    """The request has gone on to another step."""
    step = cache.begin([0])
    attend(cache, step)
    attend(cache, cache.begin([0]))
    return step


def over_by_acceptance(cache: HelixCache) -> DecodeStep:
    """Its last tokens were rejected."""
    step = cache.begin([0], [4])
    attend(cache, step)
    cache.accept(0, 2)
    return step


def over_by_a_fork(cache: HelixCache) -> DecodeStep:
    """Its open page is another request's too."""
    step = cache.begin([0])
    attend(cache, step)
    cache.fork(0, 1)
    return step


def over_by_cancellation(cache: HelixCache) -> DecodeStep:
    """It was undone."""
    step = cache.begin([0])
    cache.cancel(step)
    return step


@pytest.mark.holds("PAGE-4")
@pytest.mark.parametrize(
    "ended",
    [
        over_by_release, over_by_preemption, over_by_the_next_step, over_by_acceptance,
        over_by_a_fork, over_by_cancellation,
    ],
)  # fmt: skip
def test_a_step_does_not_outlive_what_it_was_begun_for(
    ended: Callable[[HelixCache], DecodeStep], cache: HelixCache
) -> None:
    """Attending to it, and undoing it, is an error; nobody's cache is written."""
    step = ended(cache)
    before = state(cache)
    for call in (lambda: cache.attend(step, 0, *rows(step)), lambda: cache.cancel(step)):
        with pytest.raises(StepError, match="The step is over: request 0 has ended, or gone on"):
            call()
    assert before == state(cache)


@pytest.mark.parametrize("again", [0, 1])
def test_chunks_of_a_prompt_end_with_their_request(again: int) -> None:
    """Another request in the same row, with the same id too, is not written into."""
    cache = HelixCache(CONFIG, rank=0)
    steps = cache.prefill(0, 16, 8)
    attend(cache, next(steps))
    cache.release(0)
    cache.admit(again, 16, prompt_kv)
    before = state(cache)
    with pytest.raises((StepError, Refused), match=r"request 0 has ended|Request 0 is not known"):
        next(steps)
    assert before == state(cache)


def test_a_step_of_another_cache(cache: HelixCache) -> None:
    """It is an error, and so is one that was made by hand."""
    other = HelixCache(CONFIG, rank=0)
    other.admit(0, 5, prompt_kv)
    step, reserved = other.begin([0]), other.reserve(1)
    with pytest.raises(StepError, match="begun by another cache"):
        cache.attend(step, 0, *rows(step))
    with pytest.raises(StepError, match="none that this cache has begun or reserved"):
        cache.attend(reserved, 0, *rows(reserved))


# Tokens that are not there


def test_a_prompt_that_was_not_computed_is_not_read(cache: HelixCache) -> None:
    """Neither decoded from, nor forked, accepted or read out, in part or in whole."""
    steps = cache.prefill(1, 10, 8)
    for _ in range(2):
        before = state(cache)
        for call in (
            lambda: cache.begin([0, 1]),
            lambda: cache.fork(1, 2),
            lambda: cache.read(1, 0, 1),
        ):
            with pytest.raises(StepError, match=r"Request 1 has new tokens from position [08] on"):
                call()
        assert before == state(cache)
        attend(cache, next(steps))
    attend(cache, cache.begin([0, 1]))


def test_chunks_are_attended_to_in_their_order() -> None:
    """A layer that lacks the first chunk does not attend to the second."""
    cache = HelixCache(CONFIG, rank=0)
    first, second = cache.prefill(0, 16, 8)
    cache.attend(first, 0, *rows(first))
    cache.attend(second, 0, *rows(second))
    with pytest.raises(StepError, match=r"Layer 1 was given 0 tokens of request 0.* position 8"):
        cache.attend(second, 1, *rows(second))
    attend(cache, first)
    attend(cache, second)
    assert cache.local_len(0) == 16


def test_reserved_buffers_hold_one_step_at_a_time(cache: HelixCache) -> None:
    """All chunks of a prompt at once do not share them, and nor do two steps of two requests."""
    cache.reserve(8)
    steps = cache.prefill(1, 16, 8)
    first = next(steps)
    for call in (lambda: next(steps), lambda: cache.begin([0], pad=7)):
        with pytest.raises(StepError, match="reserved for 8 rows hold a step to which layer 0"):
            call()
    attend(cache, first)
    second = next(steps)
    attend(cache, second)
    assert second.book.position_ids.tolist() == list(range(8, 16))
    attend(cache, cache.begin([0], pad=7))


def test_reserved_buffers_compute_a_prompt_as_others_do(cache: HelixCache) -> None:
    """With `reserve` and without it the same numbers come out."""
    outputs = []
    for reserved in (False, True):
        cache = HelixCache(CONFIG, rank=0)
        if reserved:
            cache.reserve(8)
        outputs.append(
            [cache.attend(step, i, *rows(step)) for step in cache.prefill(0, 16, 8) for i in (0, 1)]
        )
    assert all(map(torch.equal, *outputs))


def test_a_step_whose_forward_failed_is_not_read_by_the_next(cache: HelixCache) -> None:
    """It is attended to after all, or cancelled; then the numbers are those of no failure."""
    expected = HelixCache(CONFIG, rank=0)
    expected.admit(0, 5, prompt_kv)
    wanted = torch.stack([expected.attend(s, 0, *rows(s)) for s in [expected.begin([0])]])
    step = cache.begin([0])
    cache.attend(step, 0, *rows(step))  # layer 1 fails
    with pytest.raises(StepError, match=r"position 5 on that layer 1 was not given; attend to its"):
        cache.begin([0])
    cache.cancel(step)
    step = cache.begin([0])
    assert torch.equal(wanted[0], cache.attend(step, 0, *rows(step)))
    cache.attend(step, 1, *rows(step))
    cache.begin([0])


def test_a_replay_is_told_of() -> None:
    """`finish` is for steps in reserved buffers, where a graph found them, and for no others."""
    cache = HelixCache(CONFIG, rank=0)
    cache.admit(0, 5, prompt_kv)
    with pytest.raises(StepError, match="not in buffers reserved for 1 rows"):
        cache.finish(cache.begin([0]))
    cache = HelixCache(CONFIG, rank=0)
    cache.admit(0, 5, prompt_kv)
    cache.reserve(1)
    cache.finish(cache.begin([0]))
    cache.begin([0])
    with pytest.raises(StepError, match="of dummies"):
        cache.finish(cache.reserve(1))


# Arguments


@pytest.mark.parametrize(
    ("backend", "sentence"),
    [
        ("nope", "There is no backend 'nope'; there are torch, triton, flashinfer, and any"),
        ("flashinfer", "attends in float16 or bfloat16|needs the package flashinfer-python"),
        ("triton", "attends on a GPU, and on the CPU under TRITON_INTERPRET=1"),
        (3, "There is no backend 3"),
    ],
)
def test_a_backend_that_is_not_there(backend: Any, sentence: str) -> None:
    """No other one attends in its place."""
    with pytest.raises(ValueError, match=sentence):
        HelixCache(CONFIG, rank=0, backend=backend)


@pytest.mark.parametrize("layer", [-1, 2, 0.0, None])
def test_a_layer_that_is_not_there(layer: Any, cache: HelixCache) -> None:
    """The last one does not stand in for it."""
    step = cache.begin([0])
    with pytest.raises(ValueError, match="layer is"):
        cache.attend(step, layer, *rows(step))


def test_arrays_are_lists() -> None:
    """Ids and counts may come as NumPy's or torch's."""
    cache = HelixCache(CONFIG, rank=0)
    cache.admit(np.int64(3), np.int32(5), prompt_kv)
    attend(cache, cache.begin(np.array([3])))
    attend(cache, cache.begin(torch.tensor([3]), np.array([2]), np.int64(1)))
    cache.accept(np.int64(3), np.int64(1))
    assert cache.local_len(3) == 7
    assert all(type(id) is int for id in cache.request_ids)


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda c: c.begin(0), "ids is 0; it must be a sequence of integers"),
        (lambda c: c.begin("0"), "ids is '0'; it must be a sequence of integers"),
        (lambda c: c.begin([0.0]), r"ids\[0\] is 0.0; it must be an integer"),
        (lambda c: c.begin([0], [1.5]), r"query_lens\[0\] is 1.5; it must be an integer"),
        (lambda c: c.begin([0], pad=0.5), "pad is 0.5; it must be an integer"),
        (lambda c: c.admit("a", 5, prompt_kv), "id is 'a'; it must be an integer"),
        (lambda c: c.admit(1, 5.0, prompt_kv), "prompt_len is 5.0; it must be an integer"),
        (lambda c: c.admit(1, 5, None), "prompt_kv is None; it must be a function"),
        (lambda c: c.admit(1, 5, lambda at: at), "prompt_kv returned a Tensor; it must return K"),
        (lambda c: c.attend(None, 0, None, None), "step is None; it must be a step"),
        (lambda c: c.prefill(1, 5, 2.5), "chunk is 2.5; it must be an integer"),
        (lambda c: c.accept(0, 1.0), "kept is 1.0; it must be an integer"),
        (lambda c: c.reserve(1.5), "rows is 1.5; it must be an integer"),
        (lambda c: c.read(0, 0.0, 1), "first is 0.0; it must be an integer"),
        (lambda c: c.decode([0], None, None, None), "Q is a NoneType; it must be a Tensor"),
        (lambda c: c.combine(torch.zeros(1, 3, 16), torch.zeros(1, 3)), "Partials have shapes"),
        (lambda c: c.gather(torch.zeros(1, 3, 16)), "must hold this rank's 4 heads"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_named(
    call: Callable[[HelixCache], Any], sentence: str, cache: HelixCache
) -> None:
    """Before anything has changed."""
    before = state(cache)
    with pytest.raises(ValueError, match=sentence):
        call(cache)
    assert before == state(cache)


@pytest.mark.holds("PAGE-5")
def test_prompts_are_refused_together() -> None:
    """One that does not fit leaves those before it out too, and takes no admission number."""
    layout = "custom/1:prompt=contiguous,owner=step,pages=lazy,start=rotated,C=2,T=4"
    config = msgspec.structs.replace(CONFIG, layout=layout, pages=[4, 4])
    cache = HelixCache(config, rank=0, exchange=lambda send: send)
    cache.pool.zero_()
    before = state(cache)
    for ids, lens, reason in (
        ([0, 1], [16, 20], Reason.OUT_OF_PAGES),
        ([0, 0], [4, 4], Reason.DUPLICATE_REQUEST),
        ([0, 1], [4, 0], Reason.EMPTY_PROMPT),
        ([0, 1], [65, 4], Reason.TOO_LONG),
        ([0, 1], [4], Reason.BAD_COUNT),
        ([], [], Reason.BAD_COUNT),
    ):
        with pytest.raises(Refused) as refused:
            cache.prefill(ids, lens, 4)
        assert refused.value.reason == reason
        assert before == state(cache)


def test_a_closed_cache_does_nothing(cache: HelixCache) -> None:
    """Whatever is asked of it; closing it twice is nothing."""
    step = cache.begin([0])
    with cache:
        pass
    cache.close()
    for call in (
        lambda: cache.begin([0]),
        lambda: cache.attend(step, 0, *rows(step)),
        lambda: cache.admit(1, 5, prompt_kv),
        lambda: cache.request_ids,
        lambda: cache.reserve(3),
    ):
        with pytest.raises(ValueError, match="This cache is closed"):
            call()
