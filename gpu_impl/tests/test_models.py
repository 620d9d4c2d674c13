"""Models of `transformers` over a sharded cache give the tokens that they give without one.

Here on two ranks, as threads, and for some of the families; `make models` runs this for all of
them, and `model_tests` beside it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the extra `models` is not installed")

from transformers import Gemma2Config, Gemma2ForCausalLM, T5Config, T5ForConditionalGeneration

from gpu_testing.parity import Expected, alone, differences, expected, forced
from gpu_testing.small_models import FAMILIES, WINDOW, padded, prompt_of, small_model
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_gpu.models import ModelCache, helix_config

Fixture = Callable[..., Any]
LAYOUT = "pr9757/1:C=2,T=2"
BATCH = padded([prompt_of(1), prompt_of(17), prompt_of(6)])
STEPS = 12
ALL = os.environ.get("MODELS") == "all"
SOME = list(FAMILIES) if ALL else ["llama", "gpt_oss", "deepseek_v3"]


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Ranks share few cores."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def on_two(
    on_ranks: Fixture, model: Any, wanted: Expected, tp_size: int = 1, **options: Any
) -> list[Tensor]:
    """Logits of each rank under teacher forcing."""
    layout = LAYOUT if tp_size == 1 else "pr9757/1:C=1,T=2"
    pages = [60] * (2 // tp_size)
    config = helix_config(model, layout, pages=pages, max_len=64, tp_size=tp_size)

    def body(rank: int) -> Tensor:
        with HelixCache.on(config, helix_mesh(config), rope=None) as helix:
            cache = ModelCache(model, helix, **options)
            return forced(model, BATCH, wanted.tokens, cache.argument)[1]

    return on_ranks(2, body)


@pytest.mark.holds("ATT-1", "MAP-1")
@pytest.mark.parametrize("family", SOME)
def test_a_family_on_two_ranks(family: str, on_ranks: Fixture) -> None:
    """A batch with left padding, beyond the window: the library's tokens, alike on both ranks."""
    model = small_model(family)
    wanted = expected(model, BATCH, STEPS)
    first, second = on_two(on_ranks, model, wanted)
    assert torch.equal(first, second)
    assert differences(first, wanted) == []


@pytest.mark.parametrize("family", ["gpt_oss", "deepseek_v3"] if ALL else ["deepseek_v3"])
def test_tensor_parallel_ranks_and_admitted_prompts(family: str, on_ranks: Fixture) -> None:
    """Each rank has the sinks and the projections of its own heads, whoever computes the prompt."""
    model = small_model(family)
    wanted = expected(model, BATCH, STEPS)
    for prompts in ("sharded", "admitted") if ALL else ("admitted",):
        first, second = on_two(on_ranks, model, wanted, tp_size=2, prompts=prompts)
        assert torch.equal(first, second)
        assert differences(first, wanted) == []


def without_sinks(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sinks count for nothing."""
    for name, sinks in model.named_parameters():
        if name.endswith("sinks"):
            monkeypatch.setattr(sinks, "data", torch.full_like(sinks, -torch.inf))


def without_windows(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows reach over everything."""
    monkeypatch.setattr(model.config, "sliding_window", 1000)


def without_a_partial(model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the second rank of the group found counts for nothing."""
    combine = HelixCache.combine

    def dropped(self: HelixCache, output: Tensor, lse: Tensor, **options: Any) -> Any:
        return combine(self, output, lse - torch.inf if self.rank else lse, **options)

    monkeypatch.setattr(HelixCache, "combine", dropped)


@pytest.mark.parametrize(
    ("family", "breaks"),
    [
        ("llama", without_a_partial),
        ("gpt_oss", without_sinks),
        ("gpt_oss", without_windows),
        *([("gemma3", without_windows), ("deepseek_v3", without_a_partial)] if ALL else []),
    ],
)
def test_what_is_left_out_is_noticed(
    family: str, breaks: Fixture, on_ranks: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Controls: each of these makes wrong tokens, not logits that are a little off."""
    model = small_model(family)
    wanted = expected(model, BATCH, STEPS)
    breaks(model, monkeypatch)
    said = differences(on_two(on_ranks, model, wanted)[0], wanted)
    assert any(line.startswith("Wrong token") for line in said)


def test_a_tie_is_told_from_a_wrong_token() -> None:
    """Only the best two within twice the bound may change places, and rarely."""
    exact = torch.tensor([[[0.0, 1.0, 0.99]] * 200])
    wanted = Expected(torch.ones(1, 200, dtype=torch.int64), exact, bound=0.01)
    tie = exact.clone()
    tie[0, 7] = torch.tensor([0.0, 0.994, 0.996])
    assert differences(exact, wanted) == []
    assert differences(tie, wanted) == ["Tie in row 0, step 7: the best two are 0.01 apart."]
    wrong = exact.clone()
    wrong[0, 3, 0] = 2
    assert [line[:11] for line in differences(wrong, wanted)] == ["Row 0, step", "Wrong token"]
    often = tie[:, 7:8].expand(1, 200, 3)
    assert differences(often, wanted)[-1] == "200 of 200 steps are ties, more than 1%."
    assert "nan" in differences(exact * torch.nan, wanted)[0]


def test_models_that_are_refused() -> None:
    """A sentence for each, before anything has happened."""
    small = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "vocab_size": 9}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}
    with pytest.raises(ValueError, match=r"caps the logits of its attention at 50.0"):
        alone(Gemma2ForCausalLM(Gemma2Config(**small, **heads)))
    shape = {"d_model": 16, "d_ff": 16, "d_kv": 8, "num_heads": 2, "num_layers": 1}
    with pytest.raises(ValueError, match="not a decoder"):
        alone(T5ForConditionalGeneration(T5Config(**shape, vocab_size=9)))
    model = small_model("gemma3")
    model.config.layer_types = ["sliding_attention"] * 4
    with pytest.raises(ValueError, match="no layer of full attention"):
        alone(model)
    model.config.attention_chunk_size = 4
    model.config.layer_types = ["full_attention", "chunked_attention"] * 2
    with pytest.raises(ValueError, match="Layer 1 of Gemma3ForCausalLM is of type chunked"):
        alone(model)


def test_caches_that_are_refused() -> None:
    """Another model's, one that rotates, and a way of prompts that is none."""
    model = small_model("llama")
    config = helix_config(model, "pr9757/1:C=1,T=4", pages=[9], max_len=9)
    with pytest.raises(ValueError, match="give it rope=None"):
        ModelCache(model, HelixCache(config, rank=0))
    helix = HelixCache(config, rank=0, rope=None)
    with pytest.raises(ValueError, match="Qwen3ForCausalLM needs ModelShape"):
        ModelCache(small_model("qwen3"), helix)
    prompts: Any = "copied"
    with pytest.raises(ValueError, match="prompts is 'copied'"):
        ModelCache(model, helix, prompts=prompts)


def test_calls_that_are_refused() -> None:
    """No cache, assisted decoding, masks that no cache can follow, and other batches."""
    model = small_model("llama")
    cache = alone(model)
    with pytest.raises(ValueError, match="attends by helix without a ModelCache"):
        model(prompt_of(3))
    with pytest.raises(ValueError, match="generate without an assistant"):
        model.generate(prompt_of(3), assistant_model=model, max_new_tokens=4, **cache.argument)
    square = torch.ones(1, 1, 3, 3, dtype=torch.bool)
    for mask, said in (
        (square, "The mask has shape"),
        (torch.zeros(1, 3), r"The rows of the batch have \[0\] tokens"),
    ):
        with pytest.raises(ValueError, match=said):
            model(prompt_of(3), attention_mask=mask, **cache.argument)
    assert cache.helix.request_ids == []
    model(prompt_of(3), **cache.argument)
    with pytest.raises(ValueError, match=r"shows \[2\] earlier tokens of its rows; \[3\] are"):
        model(prompt_of(1), attention_mask=torch.tensor([[0, 1, 1, 1]]), **cache.argument)
    with pytest.raises(ValueError, match="The batch has 2 rows; this cache was filled with 1"):
        model(prompt_of(1).expand(2, 1), **cache.argument)
    capped: Any = model.model.layers[0].self_attn
    attend = capped.forward
    capped.forward = lambda *given, **how: attend(*given, **how, softcap=3.0)
    with pytest.raises(ValueError, match="attends with a softcap"):
        model(prompt_of(1), **cache.argument)


def test_a_window_that_was_not_followed_is_refused() -> None:
    """A fork that the windows did not see."""
    model = small_model("gemma3")
    cache = alone(model)
    model(prompt_of(WINDOW), **cache.argument)
    cache.helix.fork(0, 5)
    step = cache.helix.begin([5])
    cache.take(step)
    with pytest.raises(ValueError, match="does not end before token 9 of request 5"):
        model(prompt_of(1), position_ids=step.positions[None], **cache.argument)
    with pytest.raises(ValueError, match="keeps recurrent states by the rows"):
        alone(small_model("qwen3_next")).fork(0, 1)
