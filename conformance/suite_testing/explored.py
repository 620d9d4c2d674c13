"""Settings of the explorer, and what `helix_spec.placement` says of each."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import astuple
from random import Random
from typing import Any, NamedTuple, get_args

from helix_spec import placement
from helix_spec.layouts import (
    NAMED_LAYOUTS,
    DecodeOwner,
    Layout,
    PagePolicy,
    PromptSplit,
    Start,
    layout_problem,
)


class Explored(NamedTuple):
    """One setting: a layout with its sizes, a request, pools of `pool` pages."""

    layout: Layout
    interleave: int
    prompt_len: int
    steps: int
    pool: int
    before: int
    """Requests that came before it: what a rotated start counts."""

    @property
    def shift(self) -> int:
        """The start shift of the request."""
        return self.before % self.layout.cp_size if self.layout.start == "rotated" else 0

    def answers(self) -> dict[str, Any]:
        """Return tokens by rank in local order, owners, pages, capacity and the next owner."""
        layout, prompt_len, shift = self.layout, self.prompt_len, self.shift
        total, ranks = prompt_len + self.steps, range(layout.cp_size)
        lens = [placement.local_len(layout, prompt_len, self.steps, r, shift) for r in ranks]
        return {
            "positions": [
                [placement.position(layout, prompt_len, r, index, shift) for index in range(held)]
                for r, held in enumerate(lens)
            ],
            "owners": [placement.owner(layout, prompt_len, p, shift) for p in range(total + 1)],
            "pages": [
                placement.pages_needed(layout, prompt_len, self.steps, r, shift) for r in ranks
            ],
            "capacity": placement.capacity(layout, [self.pool] * len(ranks), prompt_len, shift),
            "text": str(layout),
            "legal": layout_problem(layout) is None,
        }


def explored(count: int, seed: int = 0) -> Iterator[Explored]:
    """Yield settings: named layouts and any others, legal or not."""
    draw = Random(seed)
    kinds = (PromptSplit, DecodeOwner, PagePolicy, Start)
    for _ in range(count):
        named = draw.choice(list(NAMED_LAYOUTS.values()))
        any_other = tuple(draw.choice(get_args(kind)) for kind in kinds)
        rule = draw.choice([astuple(named), any_other])
        t = draw.choice([1, 2, 3, 4, 6, 8, 16, 32, 100])
        i = draw.choice([*(n for n in range(1, t + 1) if t % n == 0), 5])
        turns = [i if part == "interleave" else None for part in rule[:2]]
        layout = Layout(*rule, draw.choice([1, 2, 3, 4, 5, 8, 11]), t, *turns)
        prompt_len, steps = draw.randint(1, 300), draw.choice([0, draw.randint(1, 300)])
        yield Explored(layout, i, prompt_len, steps, draw.randint(1, 40), draw.randint(0, 9))
