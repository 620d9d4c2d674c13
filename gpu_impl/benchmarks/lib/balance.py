"""Steps of every layout against the closed form."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from helix_gpu.cache import HelixCache
from helix_spec.config import Config, ModelShape
from helix_spec.layouts import named_layout
from helix_spec.placement import pages_needed

LAYOUTS = ("before_9757", "pr9757", "pr17866", "balanced")
PAGE = 64
Figures = dict[str, list[float]]
"""By layout, one for each of the fractions."""


def config_for(
    name: str,
    c: int,
    model: ModelShape,
    batch: int,
    prompt: int,
    fractions: Sequence[float],
    steps: int = PAGE,
) -> Config:
    """A layout of `c` ranks with room for what `grown` makes of these, and so many more steps."""
    rules = named_layout(name, cp_size=c, tokens_per_block=PAGE)
    most = int(prompt * max(fractions))
    return Config(
        layout=f"{name}/1:C={c},T={PAGE}",
        # As many as the longest batch fills, and those that requests open when measured.
        pages=[
            sum(
                pages_needed(rules, prompt, most, rank, id if name == "balanced" else 0)
                + len(fractions) * -(-steps // PAGE)
                for id in range(batch)
            )
            for rank in range(c)
        ],
        max_len=prompt + most + PAGE + steps,
        model=model,
        poison=False,
    )


def grown(
    cache: HelixCache, batch: int, prompt: int, fractions: Sequence[float]
) -> list[list[int]]:
    """A batch of requests at each of the fractions of decoded / prompt tokens.

    Batches are forks of each other, so that they share their prompts and what was decoded first.
    Prompts are zeros, and nothing is cached of decoded tokens: they have lengths and pages.
    """
    model, none = cache.config.model, torch.zeros((), dtype=cache.dtype, device=cache.device)

    def zeros(positions: Tensor) -> tuple[Tensor, Tensor | None]:
        k = none.expand(model.layers, len(positions), cache.kv_heads, model.key_dim)
        return k, None if model.latent else k

    for id in range(batch):
        cache.admit(id, prompt, zeros, rotated=True)
    batches, ids, decoded = list[list[int]](), list(range(batch)), 0
    for place, x in enumerate(fractions):
        if place:
            parents, ids = ids, [id + batch for id in ids]
            for parent, child in zip(parents, ids, strict=True):
                cache.fork(parent, child)
        while decoded < x * prompt:
            cache.book.decode_step(ids, [PAGE] * batch)
            decoded += PAGE
        for id, row in zip(ids, cache.book.ledger.rows(ids).tolist(), strict=True):
            cache._written.rewind(row, cache.book.ledger.total(id))  # as if layers had them
        batches.append(ids)
    return batches


def share_memory(caches: list[HelixCache]) -> None:
    """Let all caches read the same pages, of random numbers.

    In memory of their own one layout was up to 20 percent slower than another that holds as much,
    a whole run long: how a pool's memory lies is none of the layout's doing.
    """
    largest = max((cache.pool for cache in caches), key=lambda pool: pool.shape[1]).normal_()
    for cache in caches:
        cache.pool = largest[:, : cache.pool.shape[1]]


def judged(steps: Figures, c: int, prompt: int, fractions: Sequence[float]) -> dict[str, Any]:
    """What the closed form says of the steps of one clock, and how far measured ones are off."""
    even, share = steps["balanced"], prompt / c
    a, f = statistics.linear_regression([share * (1 + x) for x in fractions], even)
    closed = [(f + a * share * (1 + c * x)) / (f + a * share * (1 + x)) for x in fractions]
    ratios = {
        name: [step / base for step, base in zip(of, even, strict=True)]
        for name, of in steps.items()
    }
    off = [r / form - 1 for r, form in zip(ratios["before_9757"], closed, strict=True)]
    return {"fixed": f, "per_token": a, "closed": closed, "ratios": ratios, "off": off}
