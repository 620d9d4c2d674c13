"""When an event is refused, and why (SPEC.md section 6).

The reasons are tried in their order; nothing here changes the model.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

from helix_reference.dealing import deal_prompt
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Preempt,
    Reason,
    Release,
    Resume,
    Sampled,
    Skip,
    features_of,
)

if TYPE_CHECKING:
    from helix_reference.model import Model, Page


def refusal(model: Model, event: Event) -> Reason | None:
    """Why the model refuses this event; None when it may happen."""
    if not features_of(event) <= model.features:
        return Reason.UNSUPPORTED
    match event:
        case Admit(id, prompt_len):
            return _admit(model, id, prompt_len)
        case Decode(ids, query_lens, pad):
            return _decode(model, ids, query_lens, pad)
        case Skip(ids, query_lens):
            return _decode(model, ids, query_lens, 0)
        case Accept(id, kept):
            return _accept(model, id, kept)
        case Sampled(ids):
            return _sampled(model, ids)
        case Fork(parent, child):
            if child in model.requests:
                return Reason.DUPLICATE_REQUEST
            return _not_live(model, [parent])
        case Release(id):
            return None if id in model.requests else Reason.UNKNOWN_REQUEST
        case Preempt(id):
            return _not_live(model, [id])
        case Resume(id):
            return _resume(model, id)
        case Merge():
            return None


def _admit(model: Model, id: int, prompt_len: int) -> Reason | None:
    if id in model.requests:
        return Reason.DUPLICATE_REQUEST
    if prompt_len < 1:
        return Reason.EMPTY_PROMPT
    if prompt_len > model.config.max_len:
        return Reason.TOO_LONG
    shift = model.admissions if model.layout.start == "rotated" else 0
    return _prompt_pages(model, prompt_len, shift)


def _decode(model: Model, ids: list[int], query_lens: list[int], pad: int) -> Reason | None:
    if not ids or len(ids) != len(query_lens) or min(query_lens) < 1 or pad < 0:
        return Reason.BAD_COUNT
    known = [model.requests[id] for id in ids if id in model.requests]
    if 2 in [request.outstanding for request in known]:
        return Reason.BAD_COUNT
    if len(set(ids)) < len(ids):
        return Reason.DUPLICATE_REQUEST
    reason = _not_live(model, ids)
    if reason is not None:
        return reason
    for request, query_len in zip(known, query_lens, strict=True):
        if len(request.tokens) + query_len > model.config.max_len:
            return Reason.TOO_LONG
    return _decode_pages(model, ids, query_lens)


def _accept(model: Model, id: int, kept: int) -> Reason | None:
    request = model.requests.get(id)
    group = request.open_group if request else 0
    if kept < 1 or (group and kept > group):
        return Reason.BAD_COUNT
    reason = _not_live(model, [id])
    if reason is not None:
        return reason
    if request is None or not group or request.outstanding:
        return Reason.NOTHING_OPEN
    return None


def _sampled(model: Model, ids: list[int]) -> Reason | None:
    if not ids:
        return Reason.BAD_COUNT
    if len(set(ids)) < len(ids):
        return Reason.DUPLICATE_REQUEST
    reason = _not_live(model, ids)
    if reason is not None:
        return reason
    if any(not model.requests[id].outstanding for id in ids):
        return Reason.NOTHING_OPEN
    return None


def _resume(model: Model, id: int) -> Reason | None:
    request = model.requests.get(id)
    if request is None:
        return Reason.UNKNOWN_REQUEST
    if not request.preempted:
        return Reason.NOT_PREEMPTED
    return _prompt_pages(model, len(request.tokens), request.shift)


def _not_live(model: Model, ids: Sequence[int]) -> Reason | None:
    """The first id in list order that is unknown or preempted decides."""
    for id in ids:
        if id not in model.requests:
            return Reason.UNKNOWN_REQUEST
        if model.requests[id].preempted:
            return Reason.PREEMPTED_REQUEST
    return None


def _prompt_pages(model: Model, prompt_len: int, shift: int) -> Reason | None:
    if not model.allocates or _plenty(model, prompt_len):
        return None
    if prompt_len > _slots(model):
        return Reason.OUT_OF_PAGES  # not even one token a slot fits: do not deal the lists
    ranks = deal_prompt(model.layout, prompt_len, shift)
    return _too_many(model, model.pages_for_prompt(ranks))


def _decode_pages(model: Model, ids: list[int], query_lens: list[int]) -> Reason | None:
    """Count the batch's need in its order: a copy taken by one request may spare the next."""
    if not model.allocates or _plenty(model, sum(query_lens)):
        return None
    if sum(query_lens) > _slots(model):
        return Reason.OUT_OF_PAGES
    wanted = [0] * model.layout.cp_size
    let_go: Counter[Page] = Counter()
    for id, query_len in zip(ids, query_lens, strict=True):
        for growth in model.growth(model.requests[id], query_len):
            wanted[growth.rank] += growth.fresh
            page = growth.open_page
            if page is not None and page.holders - let_go[page] > 1:
                wanted[growth.rank] += 1
                let_go[page] += 1
    return _too_many(model, wanted)


def _plenty(model: Model, tokens: int) -> bool:
    """Whether each rank has a page for each token: no token takes more, be it fresh or a copy."""
    return tokens <= min([len(pool.free) for pool in model.pools])


def _slots(model: Model) -> int:
    return sum(model.config.pages) * model.layout.tokens_per_block


def _too_many(model: Model, wanted: list[int]) -> Reason | None:
    short = any(pages > len(pool.free) for pages, pool in zip(wanted, model.pools, strict=True))
    return Reason.OUT_OF_PAGES if short else None
