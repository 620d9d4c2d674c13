"""What is known of each request, and the refusals that follow from it (SPEC.md, section 6).

Engines that are reached without their scheduler need someone to number requests and to tell one
refusal from another. Pages are the engine's own affair: `out_of_pages` is not told here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Protocol, TypeVar

from helix_spec.config import Config
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Preempt,
    Reason,
    Release,
    Resume,
    Skip,
    features_of,
)


class Known(Protocol):
    """A request, as an adapter keeps it."""

    total: int
    """Its tokens."""
    open: int | None
    """Tokens of its open group; None without one."""
    preempted: bool


AnyKnown = TypeVar("AnyKnown", bound=Known)


def refusal(
    event: Event, known: Mapping[int, AnyKnown], config: Config, profiles: Collection[str]
) -> Reason | None:
    """Return why an event is refused, but for want of pages; None when nothing speaks against it.

    Parameters
    ----------
    event
        The event; its counts may be wrong.
    known
        Every known request by its id.
    config
        What the engine was started with.
    profiles
        Those that the engine declares; it knows no `fork`, `overlap` or `merge`.
    """
    if not features_of(event) <= set(profiles):
        return Reason.UNSUPPORTED
    match event:
        case Admit(id, prompt_len):
            if id in known:
                return Reason.DUPLICATE_REQUEST
            if prompt_len < 1:
                return Reason.EMPTY_PROMPT
            return Reason.TOO_LONG if prompt_len > config.max_len else None
        case Decode(ids, query_lens) | Skip(ids, query_lens):
            if not ids or len(ids) != len(query_lens) or min(query_lens) < 1:
                return Reason.BAD_COUNT
            if getattr(event, "pad", 0) < 0:
                return Reason.BAD_COUNT
            if len(set(ids)) < len(ids):
                return Reason.DUPLICATE_REQUEST
            reasons = [reason for id in ids if (reason := _not_live(id, known)) is not None]
            if reasons:
                return reasons[0]
            totals = (known[id].total + more for id, more in zip(ids, query_lens, strict=True))
            return Reason.TOO_LONG if max(totals) > config.max_len else None
        case Accept(id, kept):
            group = known[id].open if id in known else None
            if kept < 1 or (group is not None and kept > group):
                return Reason.BAD_COUNT
            return _not_live(id, known) or (Reason.NOTHING_OPEN if group is None else None)
        case Release(id):
            return None if id in known else Reason.UNKNOWN_REQUEST
        case Preempt(id):
            return _not_live(id, known)
        case Resume(id):
            if id not in known:
                return Reason.UNKNOWN_REQUEST
            return None if known[id].preempted else Reason.NOT_PREEMPTED
    return Reason.UNSUPPORTED


def _not_live(id: int, known: Mapping[int, AnyKnown]) -> Reason | None:
    if id not in known:
        return Reason.UNKNOWN_REQUEST
    return Reason.PREEMPTED_REQUEST if known[id].preempted else None
