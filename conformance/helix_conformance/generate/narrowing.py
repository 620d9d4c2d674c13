"""What is drawn where an engine works: the options of a dimension that a box allows."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import TypeVar

import msgspec

from helix_spec.capabilities import EVENT_DIMENSIONS, Box, Span, allows
from helix_spec.events import Admit, Decode, Event, Skip

T = TypeVar("T")
_RATIOS = (1, 2, 3, 4, 6, 8, 9, 12, 16)
"""Query heads for each KV head, where a box limits heads."""


class NothingInsideError(ValueError):
    """A box leaves nothing to draw.

    Parameters
    ----------
    dimension : str
        The dimension that empties it.
    asked : str
        What was asked of it.
    """

    def __init__(self, dimension: str, asked: str) -> None:
        super().__init__(f"{dimension} leaves nothing to play: {asked}.")
        self.dimension = dimension


def within(box: Box, dimension: str, options: Sequence[T]) -> Sequence[T]:
    """Return what to draw in a dimension: the options that a box allows, and what else it lists.

    Parameters
    ----------
    box : Box
        Where the engine works.
    dimension : str
        One of its fields.
    options : sequence
        What is drawn where nothing is limited; one that stands there twice stays twice.

    Returns
    -------
    sequence
        Not empty. Of a range that holds none of the options, its ends or near ones.

    Examples
    --------
    >>> within(Box(head_dim=[128, 80]), "head_dim", (16, 32, 128))
    [128, 80]
    >>> within(Box(head_dim=Span(min=200, max=256)), "head_dim", (16, 32))
    [200, 256]
    """
    allowed = getattr(box, dimension)
    if allowed is None:
        return options
    inside = [option for option in options if allows(allowed, option)]
    if isinstance(allowed, Span):
        low = allowed.min or allowed.max
        ends = dict.fromkeys((low, min(allowed.max, 2 * low)))
        return inside or [*ends]  # type: ignore[list-item]
    return inside + [value for value in allowed if value not in options]


def only(box: Box, dimension: str, options: Sequence[T], asked: str) -> Sequence[T]:
    """Return the options that a box allows, and nothing else.

    Parameters
    ----------
    box : Box
        Where the engine works.
    dimension : str
        One of its fields.
    options : sequence
        What can be drawn at all.
    asked : str
        What they are, for the message.

    Raises
    ------
    NothingInsideError
        When it allows none of them.

    Examples
    --------
    >>> only(Box(interleave=[2]), "interleave", [1, 3], "T 3 has the interleaves 1 and 3")
    Traceback (most recent call last):
        ...
    helix_conformance.generate.narrowing.NothingInsideError: interleave leaves nothing to play: \
T 3 has the interleaves 1 and 3.
    """
    allowed = getattr(box, dimension)
    inside = options if allowed is None else [o for o in options if allows(allowed, o)]
    if not inside:
        raise NothingInsideError(dimension, asked)
    return inside


def heads(box: Box, tp_size: int, cp_size: int, *, latent: bool) -> list[tuple[int, int]]:
    """Return the numbers of query heads and KV heads that a box allows on these ranks.

    Parameters
    ----------
    box : Box
        Where the engine works.
    tp_size, cp_size : int
        Numbers of ranks.
    latent : bool
        Whether all query heads read one latent.

    Raises
    ------
    NothingInsideError
        When it allows none.

    Examples
    --------
    >>> heads(Box(kv_heads=[8], q_heads_per_kv_head=[4, 8]), 1, 2, latent=False)
    [(32, 8), (64, 8)]
    """
    few = [tp_size * by for by in (1, 2, 3, 4)]
    kv_heads = (
        only(box, "kv_heads", [1], "a latent has 1") if latent else within(box, "kv_heads", few)
    )
    found = [
        (q, kv)
        for kv in kv_heads
        for q in _query_heads(box, kv)
        if q % (tp_size * cp_size) == 0 and (latent or kv % tp_size == 0)
    ]
    if not found:
        name = next(n for n in ("q_heads", "q_heads_per_kv_head", "kv_heads") if getattr(box, n))
        raise NothingInsideError(
            name, f"no such heads divide over tp_size {tp_size} and C {cp_size}"
        )
    return found


def _query_heads(box: Box, kv_heads: int) -> Iterator[int]:
    """The numbers of query heads over so many KV heads that a box allows."""
    ratios = within(box, "q_heads_per_kv_head", _RATIOS)
    for q in dict.fromkeys(within(box, "q_heads", [kv_heads * ratio for ratio in ratios])):
        if q % kv_heads == 0 and allows(box.q_heads_per_kv_head, q // kv_heads):
            yield q


def limits_events(boxes: Collection[Box]) -> bool:
    """Return whether events are limited, and not only configurations."""
    return any(getattr(box, name) is not None for box in boxes for name in EVENT_DIMENSIONS)


def fitted(box: Box, event: Event) -> Event:
    """Return an event with no more rows and tokens than a box allows.

    Parameters
    ----------
    box : Box
        Where the engine works.
    event : Event
        The event.

    Examples
    --------
    >>> fitted(Box(batch=Span(max=2)), Decode([4, 5, 6], [1, 1, 1], pad=1))
    Decode(ids=[4, 5], query_lens=[1, 1], pad=0)
    """
    if isinstance(event, Admit):
        chunk = event.chunk and nearest(box.chunk, event.chunk)
        length = nearest(box.prompt_len, event.prompt_len)
        return msgspec.structs.replace(event, prompt_len=length, chunk=chunk)
    if not isinstance(event, Decode | Skip):
        return event
    lens = [nearest(box.query_len, count) for count in event.query_lens]
    pad = event.pad if isinstance(event, Decode) else 0
    rows = nearest(box.batch, len(event.ids) + pad)
    if isinstance(event, Decode):
        event = msgspec.structs.replace(event, pad=max(0, rows - len(event.ids)))
    return msgspec.structs.replace(event, ids=event.ids[:rows], query_lens=lens[:rows])


def nearest(allowed: Sequence[int] | Span | None, count: int) -> int:
    """Return the largest number that is allowed and not above `count`, else the smallest.

    Examples
    --------
    >>> nearest([2, 4], 3), nearest([2, 4], 1), nearest(None, 7)
    (2, 2, 7)
    """
    if allowed is None:
        return count
    if isinstance(allowed, Span):
        return max(allowed.min, min(allowed.max, count))
    return max([one for one in allowed if one <= count], default=min(allowed))
