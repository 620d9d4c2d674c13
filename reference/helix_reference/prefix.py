"""What a request's first tokens may find in the cache (SPEC.md section 5.8).

Pages are compared by the tokens that they hold, one after the other; nothing is hashed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Final, NamedTuple

from helix_reference.state import Content, Page, Request, State
from helix_reference.tokens import Identity
from helix_spec.events import Admit, Event, Resume
from helix_spec.layouts import Layout


class Sought(NamedTuple):
    """What an event looks for: tokens from position 0 on, under a salt and a shift."""

    tokens: Sequence[Identity]
    salt: int
    shift: int


class Hit(NamedTuple):
    """How many of a request's first tokens may be found, by what is known of the cache."""

    unit: int
    """A hit is a multiple of it; 0 where the layout lets nothing be found."""
    limit: int
    """The event allows no larger one."""
    live: int
    """So many are held by live requests."""
    own: int
    """So many are held by live requests and in free pages that were not given up here."""
    ever: int
    """So many were ever in pages where they could be found."""
    unsalted: int
    """The same, whatever the salt."""


NOTHING: Final = Hit(0, 0, 0, 0, 0, 0)


def unit_of(layout: Layout) -> int:
    """Return the tokens of which a hit is a multiple; 0 where nothing can be found.

    Parameters
    ----------
    layout
        The layout. With T * C tokens every rank has a full page, and the same ones in every
        request, if the prompt is dealt by position.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> unit_of(parse_layout("vllm_dcp/1:C=2,T=4,I=1")), unit_of(parse_layout("pr9757/1:C=2,T=4"))
    (8, 0)
    """
    if layout.prompt == "contiguous" and layout.cp_size > 1:
        return 0
    return layout.cp_size * layout.tokens_per_block


def settled(state: State, request: Request) -> int:
    """Return how many of a request's tokens are known and stay, whatever is accepted.

    Parameters
    ----------
    state
        The state that the request is in.
    request
        A request, known or released.
    """
    if state.config.overlap:
        return request.prompt_len
    return len(request.tokens) - max(0, request.open_group - 1)


def findable(state: State, request: Request) -> int:
    """Return up to which position others may find a live request's tokens.

    Parameters
    ----------
    state
        The state that the request is in.
    request
        A live request.
    """
    layout, known = state.layout, settled(state, request)
    by_position = (layout.prompt, layout.owner) == ("round_robin", "position") or (
        layout.owner == "interleave" and layout.owner_interleave == layout.prompt_interleave
    )
    if by_position or layout.cp_size == 1:
        return known
    return min(known, request.prompt_len)


def mark(state: State, request: Request, now: int) -> None:
    """Write on the pages of a live request what others may find there by now.

    Parameters
    ----------
    state
        The state that the request is in.
    request
        A live request.
    now
        Index of the present event.
    """
    unit = unit_of(state.layout)
    while unit and (request.found + 1) * unit <= findable(state, request):
        last = (request.found + 1) * unit - 1
        content = request.salt, last, request.tokens[last]
        for table in request.tables:
            table[request.found].contents.setdefault(content, now)
        state.ever_found.add(content)
        request.found += 1


def sought(state: State, event: Event) -> Sought | None:
    """Return what an event looks for in the cache; None where it looks for nothing.

    Parameters
    ----------
    state
        The state before the event.
    event
        An event that is not refused for another reason than pages.
    """
    match event:
        case Admit(_, _, _, prefix, salt) if prefix is not None:
            source = state.known(prefix.of)
            assert source is not None
            return Sought(source.tokens[: prefix.len], salt, source.shift)
        case Resume(id, prefix) if prefix > 0:
            request = state.requests[id]
            return Sought(request.tokens[:prefix], request.salt, request.shift)
    return None


def hit_of(state: State, event: Event) -> Hit:
    """Return how many tokens an event may find.

    Parameters
    ----------
    state
        The state before the event.
    event
        An event that is not refused for another reason than pages.
    """
    unit, wanted = unit_of(state.layout), sought(state, event)
    if wanted is None:
        return NOTHING
    placed = event.prompt_len if isinstance(event, Admit) else 0
    if isinstance(event, Resume):
        placed = len(state.requests[event.id].tokens)
    computed = state.config.admission == "prefill"
    limit = min(len(wanted.tokens), placed - computed)
    if isinstance(event, Resume) and state.freedoms.resume_hits == "none":
        limit = 0
    if not unit:
        return Hit(0, limit, 0, 0, 0, 0)
    blocks = contents(wanted, limit // unit, unit)
    live = [set(pages) for pages in live_pages(state)]
    held = [
        pages | {content for page in pool.cached for content in page.contents}
        for pages, pool in zip(live, state.pools, strict=True)
    ]
    anyones = {content[1:] for content in state.ever_found}
    return Hit(
        unit,
        limit,
        unit * _found(blocks, lambda content: all(content in pages for pages in live)),
        unit * _found(blocks, lambda content: all(content in pages for pages in held)),
        unit * _found(blocks, lambda content: content in state.ever_found),
        unit * _found(blocks, lambda content: content[1:] in anyones),
    )


def contents(wanted: Sought, blocks: int, unit: int) -> list[Content]:
    """Return what the first blocks of some tokens hold.

    Parameters
    ----------
    wanted
        The tokens.
    blocks
        How many blocks.
    unit
        Tokens of a block.
    """
    ends = [(block + 1) * unit - 1 for block in range(blocks)]
    return [(wanted.salt, last, wanted.tokens[last]) for last in ends]


def live_pages(state: State) -> list[dict[Content, Page]]:
    """Return the pages of live requests where tokens may be found, by cp_rank and content.

    Parameters
    ----------
    state
        The present state. Of several pages with the same tokens it is the one that has had them
        longest.
    """
    found: list[dict[Content, Page]] = [{} for _ in state.pools]
    for request in state.requests.values():
        for pages, table in zip(found, request.tables, strict=False):
            for page in table:
                for content, since in page.contents.items():
                    other = pages.setdefault(content, page)
                    if since < other.contents[content]:
                        pages[content] = page
    return found


def _found(blocks: list[Content], holds: Callable[[Content], bool]) -> int:
    """How many blocks in a row are held."""
    for number, block in enumerate(blocks):
        if not holds(block):
            return number
    return len(blocks)
