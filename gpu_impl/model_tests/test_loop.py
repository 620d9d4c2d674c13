"""Requests that come, wait, are preempted, forked and share prefixes give the tokens of none of it.

Every request's tokens are those that `generate` of the library gives for its prompt alone.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `models` is not installed")

from gpu_testing.parity import alone
from gpu_testing.small_models import prompt_of, small_model
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_gpu.generate import Loop, Request, compare, sampler
from helix_gpu.models import ModelCache, helix_config, own_attention

Fixture = Callable[..., Any]
FAMILIES = ["llama", "gemma3", "gpt_oss", "deepseek_v3"]
PROMPTS = [prompt_of(tokens)[0].tolist() for tokens in (3, 21, 1, 14, 9)]
NEW = 12


def own(model: Any, prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """What the library chooses behind each prompt."""
    before = model.config._attn_implementation
    model.set_attn_implementation(own_attention(model))
    found = [
        model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=NEW, min_new_tokens=NEW, do_sample=False,
        )[0, len(prompt) :].tolist()
        for prompt in prompts
    ]  # fmt: skip
    model.set_attn_implementation(before)
    return found


def on_two(
    on_ranks: Fixture, model: Any, body: Callable[[Loop], Any], pages: int, **options: Any
) -> list[Any]:
    """What a body makes of a loop, on each of two ranks."""
    config = helix_config(model, "balanced/1:C=2,T=2", pages=[pages] * 2, max_len=60)
    torch.set_num_threads(1)

    def one(rank: int) -> Any:
        with HelixCache.on(config, helix_mesh(config), rope=None, poison=True) as helix:
            return body(Loop(model, ModelCache(model, helix), **options))

    return on_ranks(2, one)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompts", ["sharded", "admitted"])
@pytest.mark.parametrize(("pages", "fewer"), [(100, False), (13, True)])
def test_requests_join_leave_and_wait(
    family: str, prompts: str, pages: int, fewer: bool, on_ranks: Fixture
) -> None:
    """With pages for all of them, and with so few that some are preempted."""
    model = small_model(family)
    wanted = own(model, PROMPTS)

    def body(loop: Loop) -> tuple[list[list[int]], int, int]:
        preempted = []
        preempt = loop.cache.preempt
        loop.cache.preempt = lambda id: (preempted.append(id), preempt(id))  # type: ignore
        for prompt in PROMPTS:
            loop.add(prompt, NEW)
        chosen = [request.chosen for request in loop.run()]
        return chosen, len(preempted), loop.cache.helix.free_pages

    for chosen, preempted, free in on_two(
        on_ranks, model, body, pages, batch=3, chunk=8, prompts=prompts
    ):
        assert chosen == wanted
        assert (preempted > 0) == fewer
        assert free == pages


@pytest.mark.holds("PAGE-3", "OWN-1")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("seed", range(3))
def test_preempted_forked_and_behind_a_prefix(family: str, seed: int, on_ranks: Fixture) -> None:
    """At random: forks go on with another token, prompts behind a prefix share its pages."""
    model = small_model(family)
    prefix = prompt_of(11, seed=9)[0].tolist()
    prompts = [*PROMPTS[:3], *(prefix + prompt for prompt in PROMPTS[2:])]

    def body(loop: Loop) -> list[tuple[list[int], list[int]]]:
        choose, forks, starts = random.Random(seed), list[tuple[int, int]](), {}
        loop.keep(prefix)
        held = loop.cache.helix.free_pages
        for prompt in prompts:
            starts[loop.add(prompt, NEW)] = prompt
        while loop.live or loop.waiting:
            loop.step()
            growing = [id for id in loop.live if 1 < len(loop.requests[id].chosen) < NEW - 1]
            if growing and choose.random() < 0.3:
                loop.preempt(choose.choice(growing))
            elif growing and len(forks) < 3 and choose.random() < 0.5:
                parent = choose.choice(growing)
                child = loop.fork(parent)
                request = loop.requests[child]
                request.tokens[-1] = 1 + request.tokens[-1] % 200  # chosen, and not given yet
                starts[child] = list(request.tokens)
                forks.append((parent, child))
        assert len(forks) == 3
        assert loop.cache.helix.free_pages == held
        return [(start, loop.requests[id].tokens[len(start) :]) for id, start in starts.items()]

    first, second = on_two(on_ranks, model, body, 200, batch=4, chunk=5)
    assert first == second
    wanted = own(model, [start for start, _ in first])
    assert [tokens for _, tokens in first] == [
        full[: len(tokens)] for full, (_, tokens) in zip(wanted, first, strict=True)
    ]


def test_a_prefix_shares_its_pages() -> None:
    """What is computed for a prompt behind it is the rest alone, unless a prompt is only itself."""
    model = small_model("llama")
    cache = alone(model)
    loop, prefix = Loop(model, cache, batch=3), prompt_of(16)[0].tolist()
    kept = loop.keep(prefix)
    ids = [loop.add([*prefix, 5, 6], 4), loop.add([*prefix, 7], 4), loop.add(prefix, 4)]
    for _ in ids:
        loop.step()
    tables = [cache.helix.block_table(id) for id in (kept, *ids)]
    assert [table[:4] == tables[0] for table in tables] == [True, True, True, False]


def test_sampled_tokens_do_not_depend_on_the_batch() -> None:
    """One at a time, or all together: a request draws its own numbers."""
    model = small_model("qwen3")
    drawn = []
    for batch in (1, 5):
        loop = Loop(model, alone(model), sampler(0.8, seed=4), batch=batch)
        for prompt in PROMPTS:
            loop.add(prompt, NEW)
        drawn.append([request.chosen for request in loop.run()])
    assert drawn[0] == drawn[1] != own(model, PROMPTS)


def test_where_the_unsharded_model_differs_is_said() -> None:
    """Nowhere; and at the step whose logits are changed."""
    model = small_model("llama")
    loop = Loop(model, alone(model), keep_logits=True)
    loop.add(PROMPTS[1], NEW)
    request: Request = loop.run()[0]
    assert "12 steps: the most probable token is the same at each" in compare(model, [request])[0]
    request.logits[5] = -request.logits[5]
    assert "token differs at 1, first at step 5, where" in compare(model, [request])[0]


def test_requests_that_are_refused() -> None:
    """No token, too many, and pools that do not suffice for one."""
    model = small_model("llama")
    loop = Loop(model, alone(model, pages=3, max_len=40))
    for prompt, new in (([], 4), ([1], 0), ([1] * 30, 11)):
        with pytest.raises(ValueError, match="each must be at least 1, and both together at most"):
            loop.add(prompt, new)
    loop.add([1] * 20, 4)
    with pytest.raises(Refused, match="page"):
        loop.run()
    loop = Loop(model, alone(model, pages=3, max_len=40))
    loop.add([1] * 10, 4)
    with pytest.raises(Refused, match="page"):
        loop.run()
