"""What `generate` does with a cache: beams, prompts in pieces, sampling, conversations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers", reason="the extra `models` is not installed")

from gpu_testing.parity import alone
from gpu_testing.small_models import FAMILIES, padded, prompt_of, small_model
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.models import ModelCache, own_attention

BATCH = padded([prompt_of(1), prompt_of(17), prompt_of(6)])


def greedy(model: Any, batch: dict[str, Tensor], cache: ModelCache | None, **how: Any) -> Tensor:
    """What `generate` gives."""
    given = {} if cache is None else cache.argument
    how = {"max_new_tokens": 10, "min_new_tokens": 10, "do_sample": False} | how
    return model.generate(**batch, **how, **given)


def own(model: Any, batch: dict[str, Tensor], **how: Any) -> Tensor:
    """What `generate` gives without a sharded cache."""
    model.set_attn_implementation(own_attention(model))
    return greedy(model, batch, None, **how)


@pytest.mark.holds("PAGE-3")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize(
    "how",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 2, "num_return_sequences": 2},
        {"prefill_chunk_size": 17},
        {"do_sample": True},
    ],
    ids=str,
)
def test_generate(family: str, how: dict[str, Any]) -> None:
    """Greedy, with beams, which fork and release, a prompt in pieces, and sampled."""
    model = small_model(family)
    batch = padded([prompt_of(20)]) if "prefill_chunk_size" in how else BATCH
    torch.manual_seed(5)
    wanted = own(model, batch, **how)
    cache = alone(model)
    torch.manual_seed(5)
    assert torch.equal(greedy(model, batch, cache, **how), wanted)
    assert len(cache.rows) == len(cache.helix.request_ids)
    cache.reset()
    assert cache.helix.free_pages == 100
    assert torch.equal(greedy(model, batch, cache, **how | {"do_sample": False}),
                       own(model, batch, **how | {"do_sample": False}))  # fmt: skip


def test_a_conversation_goes_on() -> None:
    """A second call with the whole text computes what is new alone."""
    model = small_model("mixtral")
    cache = alone(model)
    first = greedy(model, {"input_ids": prompt_of(9)}, cache)
    text = {"input_ids": torch.cat((first, prompt_of(5, seed=1)), 1)}
    assert torch.equal(greedy(model, text, cache), own(model, text))


def test_crop_takes_tokens_back() -> None:
    """As if they had never been given; not those of a prompt, nor any of a window."""
    model = small_model("qwen3")
    prompt, more, other = prompt_of(7), prompt_of(5, seed=1), prompt_of(3, seed=2)
    cache = alone(model)

    def given(tokens: Tensor) -> Tensor:
        with torch.no_grad():
            return model(tokens, **cache.argument).logits

    given(prompt)
    with pytest.raises(Refused, match="open group"):
        cache.crop(-1)
    given(more)
    cache.crop(-3)
    assert (cache.get_seq_length(), cache.helix.local_len(0)) == (9, 9)
    found = given(other)
    model.set_attn_implementation("sdpa")
    with torch.no_grad():
        wanted = model(torch.cat((prompt, more[:, :2], other), 1)).logits
    torch.testing.assert_close(found, wanted[:, 9:], rtol=0, atol=2e-5)
    with pytest.raises(ValueError, match="full attention alone takes tokens back"):
        alone(small_model("gemma3")).crop(-1)


def test_rows_are_chosen() -> None:
    """A row that is repeated is forked, one that is left out is released."""
    model = small_model("llama")
    cache = alone(model)
    with torch.no_grad():
        model(torch.cat((prompt_of(6), prompt_of(6, seed=1))), **cache.argument)
        cache.batch_repeat_interleave(2)
        cache.batch_select_indices(torch.tensor([3, 0, 2]))
        found = model(torch.tensor([[7], [8], [9]]), **cache.argument).logits
        model.set_attn_implementation("sdpa")
        for row, (seed, token) in enumerate(((1, 7), (0, 8), (1, 9))):
            text = torch.cat((prompt_of(6, seed), torch.tensor([[token]])), 1)
            torch.testing.assert_close(found[row], model(text).logits[0, -1:], rtol=0, atol=2e-5)
    assert len(cache.helix.request_ids) == 3
