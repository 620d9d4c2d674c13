"""Closed forms, dealt lists and incremental counters agree over a whole small world.

Every layout of at most 5 ranks and 4 tokens a block, every start, prompts of 1 to 40 tokens, 0 to
40 steps: the closed forms of `helix_spec.placement`, the naive dealing of `helix_reference` and
the ledger of `helix_gpu`, which share no arithmetic, give the same owners, lengths and pages.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any, get_args

import numpy as np
import pytest

from helix_gpu.bookkeeping.ledger import Ledger
from helix_reference import dealing
from helix_spec import placement
from helix_spec.layouts import (
    DecodeOwner,
    Layout,
    PagePolicy,
    PromptSplit,
    Start,
    layout_problem,
)

MOST = 40
PROMPTS = np.arange(1, MOST + 1)[:, None]
STEPS = np.arange(MOST + 1)[None, :]
SIZES = list(product(range(1, 6), range(1, 5)))


def layouts(c: int, t: int) -> Iterator[Layout]:
    """Every legal layout of these sizes."""
    dealt = [i for i in range(1, t + 1) if t % i == 0]
    rules = product(get_args(PromptSplit), get_args(DecodeOwner))
    for (prompt, owner), pages, start in product(rules, get_args(PagePolicy), get_args(Start)):
        for i in dealt if prompt == "interleave" else [None]:
            for j in dealt if owner == "interleave" else [None]:
                layout = Layout(prompt, owner, pages, start, c, t, i, j)
                if layout_problem(layout) is None:
                    yield layout


def shifts(layout: Layout) -> range:
    """The start shifts that requests of a layout can have."""
    return range(layout.cp_size if layout.start == "rotated" else 1)


@pytest.fixture
def elementwise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lets the closed forms run on arrays: their min and max compare element by element."""
    monkeypatch.setattr(placement, "min", np.minimum, raising=False)
    monkeypatch.setattr(placement, "max", np.maximum, raising=False)


def closed_lengths(layout: Layout, shift: int) -> Any:
    """[prompt, step, rank] by the closed form."""
    ranks = range(layout.cp_size)
    lengths = [placement.local_len(layout, PROMPTS, STEPS, rank, shift) for rank in ranks]
    return np.stack(np.broadcast_arrays(*lengths), axis=-1)


def dealt_lengths(layout: Layout, shift: int) -> Any:
    """[prompt, step, rank] by dealing tokens one by one."""
    lengths = np.zeros((MOST, MOST + 1, layout.cp_size), dtype=np.int64)
    for row, prompt in enumerate(range(1, MOST + 1)):
        hands = dealing.deal_prompt(layout, prompt, shift)
        lengths[row] = [len(hand) for hand in hands]
        for step in range(MOST):
            lengths[row, step + 1 :, dealing.decode_owner(layout, prompt, step, shift)] += 1
    return lengths


def counted(layout: Layout) -> tuple[Any, Any]:
    """[prompt, shift, step, rank] lengths, and pages, by the ledger's counters."""
    c, copies = layout.cp_size, len(shifts(layout))
    ledger = Ledger(layout, [MOST * MOST * 3 * copies] * c, 2 * MOST)
    ids = range(MOST * copies)
    for request in ids:  # the shift is the admission number modulo C
        ledger.admit(ledger.plan_admit(request, 1 + request // copies))
    lengths, pages = [ledger.local_lens(ids)], [ledger.held(ids)]
    for _ in range(MOST):
        ledger.advance(ledger.plan_step(ids, [1] * len(ids)))
        lengths.append(ledger.local_lens(ids))
        pages.append(ledger.held(ids))
    shape = (MOST, copies, MOST + 1, c)
    return tuple(np.stack(found, 1).reshape(shape) for found in (lengths, pages))


@pytest.mark.holds("LEN-1", "PAGE-1")
@pytest.mark.parametrize(("c", "t"), SIZES)
@pytest.mark.usefixtures("elementwise")
def test_lengths_agree(c: int, t: int) -> None:
    """Local lengths of every rank after every step, three ways; pages two ways."""
    for layout in layouts(c, t):
        by_counters, held = counted(layout)
        for shift in shifts(layout):
            closed = closed_lengths(layout, shift)
            np.testing.assert_array_equal(by_counters[:, shift], closed, err_msg=str(layout))
            if layout.pages == "lazy":  # lists know nothing of pages
                dealt = dealt_lengths(layout, shift)
                np.testing.assert_array_equal(dealt, closed, err_msg=str(layout))
            pages = [
                np.broadcast_to(
                    placement.pages_needed(layout, PROMPTS, STEPS, rank, shift),
                    (MOST, MOST + 1),
                )
                for rank in range(c)
            ]
            np.testing.assert_array_equal(
                held[:, shift], np.stack(pages, -1), err_msg=f"pages of {layout}"
            )


@pytest.mark.holds("OWN-1")
@pytest.mark.parametrize(("c", "t"), SIZES)
def test_placement_agrees(c: int, t: int) -> None:
    """Rank and local index of every prompt position, as the dealt lists have them, and back."""
    splits = {(one.prompt, one.prompt_interleave): one for one in layouts(c, t)}
    for layout in splits.values():
        for prompt, shift in product(range(1, MOST + 1), range(c)):
            for rank, hand in enumerate(dealing.deal_prompt(layout, prompt, shift)):
                for index, position in enumerate(hand):
                    assert rank == placement.owner(layout, prompt, position, shift)
                    assert index == placement.local_index(layout, prompt, position, shift)
                    assert position == placement.position(layout, prompt, rank, index, shift)
