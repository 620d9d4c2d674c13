"""Whether a model over a sharded cache gives the tokens that it gives without one.

The library's own cache and attention choose the tokens; every other run is given those (teacher
forcing), so that its logits are of the same text at each step. How far rounding alone takes them is
seen from the same run in float64.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from helix_gpu.cache import HelixCache
from helix_gpu.models import ModelCache, helix_config, own_attention

ROUNDINGS: Final = 4
"""A run that sums in another order is this many times as far from float64 as the library's own run
of the same type, at most: both make the same roundings, and their largest differ by luck."""
CACHES: Final = ("cache", "past_key_values")
"""What versions of `transformers` call the cache that a forward pass returns."""
TIES: Final = 0.01
"""The share of steps that may be ties in float32; in 16 bits, whose logits are coarse, any may."""


def alone(model: Any, pages: int = 100, max_len: int = 200, **options: Any) -> ModelCache:
    """Return a model's cache on one rank; options go to `ModelCache`."""
    config = helix_config(model, "pr9757/1:C=1,T=4", pages=[pages], max_len=max_len)
    return ModelCache(model, HelixCache(config, rank=0, rope=None), **options)


@torch.no_grad()
def forced(
    model: Any, batch: Mapping[str, Tensor], tokens: Tensor | int, cache: Mapping[str, Any]
) -> tuple[Tensor, Tensor]:
    """Return the tokens that follow a batch, and the logits of each step [rows, steps, vocabulary].

    Parameters
    ----------
    model : PreTrainedModel
    batch : mapping
        `input_ids` [rows, columns], and with padding `attention_mask`.
    tokens : Tensor, int64 [rows, steps], or int
        Those that are given to the model, or how many it chooses.
    cache : mapping
        `ModelCache.argument`, or nothing for the library's own.
    """
    steps = tokens if isinstance(tokens, int) else tokens.shape[1]
    ids, mask = batch["input_ids"], batch.get("attention_mask")
    chosen, logits = [], []
    for step in range(steps):
        given: dict[str, Any] = {}
        if mask is not None:
            positions = (mask.cumsum(1) - 1).clamp(min=0)
            given = {"attention_mask": mask, "position_ids": positions[:, -ids.shape[1] :]}
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        output = model(ids, **given, **cache, use_cache=True, logits_to_keep=1)
        cache = cache or {name: output[name] for name in list(output) if name in CACHES}
        logits.append(output.logits[:, -1])
        ids = logits[-1].argmax(-1) if isinstance(tokens, int) else tokens[:, step]
        ids = ids[:, None]
        chosen.append(ids)
    return torch.cat(chosen, 1), torch.stack(logits, 1)


@dataclass(frozen=True, slots=True)
class Expected:
    """What the library's own runs give for a batch."""

    tokens: Tensor
    """int64 [rows, steps]"""
    exact: Tensor
    """float64 [rows, steps, vocabulary]: logits of the model in float64."""
    bound: float
    """How far from these a run in the model's type may be."""


def expected(model: Any, batch: Mapping[str, Tensor], steps: int) -> Expected:
    """Return what a model gives without a sharded cache; its attention is set to its own.

    Parameters
    ----------
    model : PreTrainedModel
    batch : mapping
        As `forced` takes it.
    steps : int
        Tokens for each row.
    """
    model.set_attn_implementation(own_attention(model))
    tokens, logits = forced(model, batch, steps, {})
    exact_model = copy.deepcopy(model).double()
    exact_model.set_experts_implementation("eager")  # others multiply in at most 32 bits
    exact = forced(exact_model, batch, tokens, {})[1]
    return Expected(tokens, exact, ROUNDINGS * float((logits - exact).abs().max()))


def differences(found: Tensor, expected: Expected) -> list[str]:
    """Return what is wrong with a run's logits, one sentence each, and which steps are ties.

    Ties begin with the word "Tie". The best two may change places where both are within the bound
    of the exact logits, which are then less than twice the bound apart.

    Parameters
    ----------
    found : Tensor [rows, steps, vocabulary]
        Under teacher forcing.
    expected : Expected
    """
    said = []
    distance = (found - expected.exact).abs().amax(-1)
    for row, step in (~(distance <= expected.bound)).nonzero().tolist():
        said.append(
            f"Row {row}, step {step}: a logit is {float(distance[row, step]):.3g} from float64's, "
            f"the bound is {expected.bound:.3g}."
        )
    best = found.argmax(-1)
    ties = (best != expected.tokens).nonzero().tolist()
    for row, step in ties:
        exact = expected.exact[row, step]
        gap = float(exact[expected.tokens[row, step]] - exact[best[row, step]])
        word = "Tie" if gap < 2 * expected.bound else "Wrong token"
        said.append(f"{word} in row {row}, step {step}: the best two are {gap:.3g} apart.")
    if found.dtype == torch.float32 and len(ties) > TIES * best.numel():
        said.append(f"{len(ties)} of {best.numel()} steps are ties, more than {TIES:.0%}.")
    return said
