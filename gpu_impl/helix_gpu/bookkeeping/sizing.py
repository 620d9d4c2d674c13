"""How many pages a cache needs for work that is known beforehand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from helix_gpu.bookkeeping.inputs import integer, integers
from helix_gpu.bookkeeping.ledger import Ints, Ledger
from helix_spec.layouts import Layout, parse_layout

PLENTY = 2**40
"""Pages and tokens that no request uses up."""
TOKENS_AT_ONCE = 2**14
"""New tokens that are dealt at a time; it bounds the memory that dealing takes."""


def pages_for(
    layout: Layout | str,
    prompts: Sequence[int],
    new_tokens: int | Sequence[int],
    batch: int | None = None,
) -> list[int]:
    """Return pool sizes with which no request of some work is ever refused a page.

    Whichever `batch` of the requests are live at a time, and in whichever order they come. Forks
    need as many pages more as they write into, and groups of speculative tokens count whole until
    they are accepted.

    Parameters
    ----------
    layout : Layout or str
    prompts : sequence of int, [n]
        Tokens of each request's prompt.
    new_tokens : int or sequence of int, [n]
        Tokens that each request decodes, at most.
    batch : int, optional
        Requests that are live at a time, at most; all of them unless given.

    Returns
    -------
    list of int, [cp_size]
        As `Config.pages` takes them.

    Raises
    ------
    ValueError
        For no prompt, counts below what they count, and lists of two lengths.

    Examples
    --------
    >>> pages_for("pr9757/1:C=2,T=4", prompts=[9, 3], new_tokens=4)  # 12 and 7 tokens, 1 and none
    [5, 1]
    >>> pages_for("pr9757/1:C=2,T=4", prompts=[9, 3], new_tokens=4, batch=1)
    [3, 1]
    """
    layout = parse_layout(layout) if isinstance(layout, str) else layout
    prompts = integers("prompts", prompts)
    if hasattr(new_tokens, "__iter__"):
        decoded = integers("new_tokens", new_tokens)
    else:
        decoded = [integer("new_tokens", new_tokens)] * len(prompts)
    if not prompts or min(prompts) < 1:
        raise ValueError(f"prompts is {prompts}; it must list one token or more for each request.")
    if len(decoded) != len(prompts) or min(decoded) < 0:
        raise ValueError(
            f"new_tokens is {new_tokens}; it must be 0 or more, or such a number for each prompt."
        )
    batch = len(prompts) if batch is None else integer("batch", batch)
    if batch < 1:
        raise ValueError(f"batch is {batch}; it must be at least one request.")
    alone = {pair: _pages_alone(layout, *pair) for pair in set(zip(prompts, decoded, strict=True))}
    needs = np.array([alone[pair] for pair in zip(prompts, decoded, strict=True)])
    needs.sort(axis=0)
    pages: list[int] = needs[-batch:].sum(0).tolist()
    return [max(1, count) for count in pages]


def _pages_alone(layout: Layout, prompt_len: int, new_tokens: int) -> Ints:
    """[cp_size]: the pages that one request ends up with, at most, whatever its shift."""
    most = np.zeros(layout.cp_size, dtype=np.int64)
    for shift in range(layout.cp_size if layout.start == "rotated" else 1):
        ledger = Ledger(layout, [PLENTY] * layout.cp_size, PLENTY)
        ledger.admitted = shift
        ledger.admit(ledger.plan_admit(0, prompt_len))
        for first in range(0, new_tokens, TOKENS_AT_ONCE):
            tokens = min(TOKENS_AT_ONCE, new_tokens - first)
            ledger.advance(ledger.plan_step([0], [tokens]))
        most = np.maximum(most, ledger.held([0])[0])
    return most
