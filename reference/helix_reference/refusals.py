"""When an event is refused, and why (SPEC.md section 6).

The reasons are tried in their order; nothing here changes the state. That an engine does not
support an event is for whoever knows the engine: the reference supports all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from helix_reference.dealing import deal_prompt
from helix_reference.prefix import hit_of, settled
from helix_reference.state import Page, State
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Preempt,
    Prefix,
    Reason,
    Release,
    Resume,
    Sampled,
    Skip,
)


def refusal(state: State, event: Event) -> Reason | None:
    """Return why this event is refused; None when it may happen (SPEC.md section 6).

    Parameters
    ----------
    state
        What all ranks hold before the event; it is not changed.
    event
        The event.

    Returns
    -------
    Reason or None
        The first reason that applies, in the order of SPEC.md section 6.

    Examples
    --------
    >>> from helix_spec.config import Config
    >>> state = State(Config(layout="pr9757/1:C=2,T=2", pages=[1, 1], max_len=8))
    >>> refusal(state, Admit(0, 4)) is None
    True
    >>> refusal(state, Admit(0, 5)).value, refusal(state, Decode([0], [1])).value
    ('out_of_pages', 'unknown_request')
    """
    reason = reason_but_pages(state, event)
    if reason is not None:
        return reason
    wanted = zip(pages_needed(state, event), state.pools, strict=True)
    return Reason.OUT_OF_PAGES if any(need > pool.free for need, pool in wanted) else None


def reason_but_pages(state: State, event: Event) -> Reason | None:
    """Return why this event is refused however many pages are free; None for no such reason.

    Parameters
    ----------
    state
        What all ranks hold before the event; it is not changed.
    event
        The event.
    """
    match event:
        case Admit(id, prompt_len, _, prefix):
            return _admit(state, id, prompt_len, prefix)
        case Decode(ids, query_lens, pad):
            return _decode(state, ids, query_lens, pad)
        case Skip(ids, query_lens):
            return _decode(state, ids, query_lens, 0)
        case Accept(id, kept):
            return _accept(state, id, kept)
        case Sampled(ids):
            return _sampled(state, ids) if state.config.overlap else Reason.UNSUPPORTED
        case Fork(parent, child):
            if child in state.requests:
                return Reason.DUPLICATE_REQUEST
            return _not_live(state, [parent])
        case Release(id):
            return None if id in state.requests else Reason.UNKNOWN_REQUEST
        case Preempt(id):
            return _not_live(state, [id])
        case Resume(id, prefix_len):
            return _resume(state, id, prefix_len)
        case Merge():
            return None


def pages_needed(state: State, event: Event) -> list[int]:
    """Return how many pages an event takes on each cp_rank (SPEC.md section 5.5).

    Parameters
    ----------
    state
        What all ranks hold before the event; it is not changed.
    event
        One that is not refused for another reason.

    Examples
    --------
    >>> from helix_spec.config import Config
    >>> state = State(Config(layout="pr9757/1:C=2,T=2", pages=[3, 3], max_len=8))
    >>> pages_needed(state, Admit(0, 5))
    [2, 1]
    """
    match event:
        case Admit(_, prompt_len, _, prefix):
            source = state.known(prefix.of) if prefix else None
            shift = state.admissions if source is None else source.shift
            return _less_live(state, event, _prompt_pages(state, prompt_len, shift))
        case Decode(ids, query_lens) | Skip(ids, query_lens):
            return _decode_pages(state, ids, query_lens)
        case Resume(id):
            request = state.requests[id]
            pages = _prompt_pages(state, len(request.tokens), request.shift)
            return _less_live(state, event, pages)
    return [0] * len(state.pools)


def _admit(state: State, id: int, prompt_len: int, prefix: Prefix | None) -> Reason | None:
    source = state.known(prefix.of) if prefix else None
    if prefix is not None:
        known = prompt_len if source is None else min(prompt_len, settled(state, source))
        if not 1 <= prefix.len <= known:
            return Reason.BAD_COUNT
    if id in state.requests:
        return Reason.DUPLICATE_REQUEST
    if prefix is not None and source is None:
        return Reason.UNKNOWN_REQUEST
    if prompt_len < 1:
        return Reason.EMPTY_PROMPT
    if prompt_len > state.config.max_len:
        return Reason.TOO_LONG
    return None


def _decode(state: State, ids: list[int], query_lens: list[int], pad: int) -> Reason | None:
    if not ids or len(ids) != len(query_lens) or min(query_lens) < 1 or pad < 0:
        return Reason.BAD_COUNT
    known = [state.requests[id] for id in ids if id in state.requests]
    if any(request.outstanding == 2 for request in known):
        return Reason.BAD_COUNT
    if len(set(ids)) < len(ids):
        return Reason.DUPLICATE_REQUEST
    reason = _not_live(state, ids)
    if reason is not None:
        return reason
    for request, query_len in zip(known, query_lens, strict=True):
        if len(request.tokens) + query_len > state.config.max_len:
            return Reason.TOO_LONG
    return None


def _accept(state: State, id: int, kept: int) -> Reason | None:
    request = state.requests.get(id)
    group = request.open_group if request else 0
    if kept < 1 or (group and kept > group):
        return Reason.BAD_COUNT
    reason = _not_live(state, [id])
    if reason is not None:
        return reason
    if request is None or not group or request.outstanding:
        return Reason.NOTHING_OPEN
    return None


def _sampled(state: State, ids: list[int]) -> Reason | None:
    if not ids:
        return Reason.BAD_COUNT
    if len(set(ids)) < len(ids):
        return Reason.DUPLICATE_REQUEST
    reason = _not_live(state, ids)
    if reason is not None:
        return reason
    if any(not state.requests[id].outstanding for id in ids):
        return Reason.NOTHING_OPEN
    return None


def _resume(state: State, id: int, prefix: int) -> Reason | None:
    request = state.requests.get(id)
    if prefix < 0 or (request is not None and prefix > len(request.tokens)):
        return Reason.BAD_COUNT
    if request is None:
        return Reason.UNKNOWN_REQUEST
    if not request.preempted:
        return Reason.NOT_PREEMPTED
    return None


def _not_live(state: State, ids: Sequence[int]) -> Reason | None:
    """The first id in list order that is unknown or preempted decides."""
    for id in ids:
        if id not in state.requests:
            return Reason.UNKNOWN_REQUEST
        if state.requests[id].preempted:
            return Reason.PREEMPTED_REQUEST
    return None


def _less_live(state: State, event: Event, pages: list[int]) -> list[int]:
    """These pages without those that the event shares with live requests (SPEC.md section 5.8)."""
    hit = hit_of(state, event)
    return [count - (hit.live // hit.unit if hit.unit else 0) for count in pages]


def _prompt_pages(state: State, prompt_len: int, admission: int) -> list[int]:
    """The pages of a prompt whose ranks are turned by this admission number."""
    if prompt_len > _slots(state):
        return _more_than_all(state)  # it may be longer than a list can be
    shift = admission if state.layout.start == "rotated" else 0
    return state.pages_of(deal_prompt(state.layout, prompt_len, shift))


def _decode_pages(state: State, ids: list[int], query_lens: list[int]) -> list[int]:
    """Count the batch's need in its order: a copy taken by one request may spare the next."""
    if sum(query_lens) > _slots(state):
        return _more_than_all(state)  # they may be more than a list can hold
    wanted = [0] * state.layout.cp_size
    copied: Counter[Page] = Counter()
    for id, query_len in zip(ids, query_lens, strict=True):
        request = state.requests[id]
        own = set[int]()  # ranks on which the last page is nobody else's by now
        held = [len(positions) for positions in request.ranks]
        pages = [len(table) for table in request.tables]
        for token, owner in enumerate(state.owners(request, query_len)):
            total = len(request.tokens) + token
            for rank, place in state.writers(owner, held[owner], total):
                if place == pages[rank]:
                    pages[rank] += 1
                    wanted[rank] += 1
                elif rank not in own and _is_shared(request.tables[rank][place], copied):
                    wanted[rank] += 1
                own.add(rank)
            held[owner] += 1
    return wanted


def _is_shared(page: Page, copied: Counter[Page]) -> bool:
    """Whether others hold a page that is to be written; then it is copied, and one fewer does."""
    if page.holders - copied[page] <= 1:
        return False
    copied[page] += 1
    return True


def _slots(state: State) -> int:
    """Slots of all pools: no more tokens can ever be held."""
    return sum(state.config.pages) * state.layout.tokens_per_block


def _more_than_all(state: State) -> list[int]:
    return [pages + 1 for pages in state.config.pages]
