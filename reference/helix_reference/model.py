"""The operational model: all ranks of one sharded KV cache, one event at a time.

A request's tokens lie in lists: `tokens[p]` is the identity of the token at global position p,
`ranks[r]` the positions whose KV is on cp_rank r, in local order, and `tables[r]` the pages that
hold them. Each event is a method of a few lines; `refusals.refusal` decides beforehand whether
it may happen at all, so that a refused event changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import repeat
from operator import attrgetter
from typing import NamedTuple

from helix_reference.dealing import deal_prompt, decode_owner
from helix_reference.refusals import refusal
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import (
    FEATURES,
    MERGE,
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
)
from helix_spec.layouts import Layout

Identity = tuple[int, int]
"""What a token is: the index in the trace of the event that created it, its place in that event."""


@dataclass(eq=False, slots=True)
class Page:
    """A physical page of one rank's pool, while requests hold it."""

    number: int
    holders: int = 1


class Pool:
    """The pages of one rank."""

    def __init__(self, pages: int) -> None:
        self.free = list(range(pages))
        self.size = pages

    def take(self) -> Page:
        """A free page, held once. Beside an engine without pages there is always one more."""
        if not self.free:
            self.free.append(self.size)
            self.size += 1
        return Page(self.free.pop())

    def give_back(self, page: Page) -> None:
        """One holder lets go; the page is free when the last one has."""
        page.holders -= 1
        if page.holders == 0:
            self.free.append(page.number)


@dataclass(slots=True)
class Request:
    """One request; `tokens` is by global position, `ranks` and `tables` by cp_rank."""

    prompt_len: int
    shift: int
    tokens: list[Identity]
    ranks: list[list[int]]
    tables: list[list[Page]]
    preempted: bool = False
    open_group: int = 0
    """Tokens of the last decode, while some of them may still be rewound."""
    outstanding: int = 0
    """With overlap: decodes whose tokens the scheduler has not learned."""
    high_water: list[int] = field(default_factory=list)
    """Most tokens each rank ever held in the present pages; slots beyond were never written."""

    @property
    def steps(self) -> int:
        """Tokens decoded so far."""
        return len(self.tokens) - self.prompt_len


class Step(NamedTuple):
    """What one accepted decode did for one request of its batch."""

    id: int
    first: int
    """Global position of the first new token."""
    owners: list[int]
    """cp_rank of each new token."""
    past_len: list[int]
    """Tokens on each cp_rank before the step."""
    held: list[list[int]]
    """For each new token, tokens on each cp_rank once it was placed."""


class Growth(NamedTuple):
    """Pages that one rank needs for a request's new tokens."""

    rank: int
    fresh: int
    """Pages to add to its table."""
    open_page: Page | None
    """The page that the first new token goes to, when it already holds some; else None."""


class Model:
    """All ranks of one sharded KV cache. The configuration must be legal.

    `features` are those of the engine it stands beside: events that need another are refused as
    `unsupported`. Without `config.overlap` there is nothing to sample, whatever the features.
    Beside an engine that does not allocate pages (`allocates` false) none ever run out.
    """

    def __init__(
        self,
        config: Config,
        features: Iterable[str] = (*FEATURES, MERGE),
        *,
        allocates: bool = True,
    ) -> None:
        self.allocates = allocates
        self.config = config
        self.features = frozenset(features) - (frozenset() if config.overlap else {"overlap"})
        self.layout: Layout = config.layout
        self.pools = [Pool(pages) for pages in config.pages]
        self.requests: dict[int, Request] = {}
        self.events_seen = 0
        self.admissions = 0
        self.last_steps: list[Step] = []
        """One for each request of the last event, when that was an accepted decode."""

    def apply(self, event: Event) -> Reason | None:
        """Let the event happen, or say why it is refused and change nothing."""
        reason = refusal(self, event)
        self.last_steps = []
        if reason is None:
            self._happen(event)
        self.events_seen += 1
        return reason

    def _happen(self, event: Event) -> None:
        match event:
            case Admit(id, prompt_len):
                self._admit(id, prompt_len)
            case Decode(ids, query_lens):
                self._decode(ids, query_lens)
            case Accept(id, kept):
                self._accept(self.requests[id], kept)
            case Sampled(ids):
                for id in ids:
                    self.requests[id].outstanding -= 1
            case Skip() | Merge():
                pass
            case Fork(parent, child):
                self._fork(self.requests[parent], child)
            case Release(id):
                self._give_pages_back(self.requests.pop(id))
            case Preempt(id):
                self._preempt(self.requests[id])
            case Resume(id):
                self._resume(self.requests[id])

    def _admit(self, id: int, prompt_len: int) -> None:
        shift = 0
        if self.layout.start == "rotated":
            shift = self.admissions % self.layout.cp_size
        self.admissions += 1
        tokens = list(zip(repeat(self.events_seen), range(prompt_len), strict=False))
        self.requests[id] = request = Request(prompt_len, shift, tokens, [], [])
        self._place_prompt(request)

    def _place_prompt(self, request: Request) -> None:
        """Deal all tokens of the request as a prompt, into fresh pages."""
        request.ranks = deal_prompt(self.layout, request.prompt_len, request.shift)
        wanted = self.pages_for_prompt(request.ranks)
        request.tables = [
            [pool.take() for _ in range(pages)]
            for pool, pages in zip(self.pools, wanted, strict=True)
        ]
        request.high_water = [len(positions) for positions in request.ranks]

    def _decode(self, ids: list[int], query_lens: list[int]) -> None:
        place = 0
        for id, query_len in zip(ids, query_lens, strict=True):
            request = self.requests[id]
            owners, now = self.owners(request, query_len), _lengths(request)
            step = Step(id, len(request.tokens), owners, now, [])
            for owner in owners:
                self._append(request, (self.events_seen, place), owner)
                now = [*now]
                now[owner] = len(request.ranks[owner])
                step.held.append(now)
                place += 1
            request.open_group = query_len
            request.outstanding += self.config.overlap
            self.last_steps.append(step)

    def _append(self, request: Request, token: Identity, owner: int) -> None:
        """Place one more token on the rank that owns it, in a page that nobody else holds."""
        layout, position, mine = self.layout, len(request.tokens), request.ranks[owner]
        if layout.pages == "lockstep":
            filled = position % (layout.tokens_per_block * layout.cp_size)
            for rank in range(layout.cp_size):
                self._make_room(request, rank, filled)
        else:
            self._make_room(request, owner, len(mine) % layout.tokens_per_block)
        request.tokens.append(token)
        mine.append(position)
        if len(mine) > request.high_water[owner]:
            request.high_water[owner] = len(mine)

    def _make_room(self, request: Request, rank: int, filled: int) -> None:
        """A page where the last one is full, a copy of the last one where others hold it too."""
        pool, table = self.pools[rank], request.tables[rank]
        if filled == 0:
            table.append(pool.take())
        elif table[-1].holders > 1:
            pool.give_back(table[-1])
            table[-1] = pool.take()

    def _accept(self, request: Request, kept: int) -> None:
        total = len(request.tokens) - request.open_group + kept
        request.open_group = 0
        del request.tokens[total:]
        for positions in request.ranks:
            while positions and positions[-1] >= total:
                positions.pop()
        for rank, wanted in enumerate(self.pages_held(request)):
            while len(request.tables[rank]) > wanted:
                self.pools[rank].give_back(request.tables[rank].pop())
            slots = wanted * self.layout.tokens_per_block
            request.high_water[rank] = min(request.high_water[rank], slots)

    def _fork(self, parent: Request, child: int) -> None:
        parent.open_group = 0
        for table in parent.tables:
            for page in table:
                page.holders += 1
        self.requests[child] = Request(
            parent.prompt_len,
            parent.shift,
            list(parent.tokens),
            [list(positions) for positions in parent.ranks],
            [list(table) for table in parent.tables],
            high_water=list(parent.high_water),
        )

    def _preempt(self, request: Request) -> None:
        self._give_pages_back(request)
        request.preempted = True
        request.open_group = request.outstanding = 0
        request.ranks = [[] for _ in self.pools]
        request.tables = [[] for _ in self.pools]

    def _resume(self, request: Request) -> None:
        request.preempted = False
        request.prompt_len = len(request.tokens)
        self._place_prompt(request)

    def _give_pages_back(self, request: Request) -> None:
        for pool, table in zip(self.pools, request.tables, strict=True):
            for page in table:
                pool.give_back(page)

    # What the next tokens of a request need; `refusals` counts with it.

    def owners(self, request: Request, query_len: int) -> list[int]:
        """cp_rank of each of the next tokens."""
        steps, prompt_len, shift = request.steps, request.prompt_len, request.shift
        return [
            decode_owner(self.layout, prompt_len, step, shift)
            for step in range(steps, steps + query_len)
        ]

    def growth(self, request: Request, query_len: int) -> list[Growth]:
        """What each rank's table needs for the next tokens, for the ranks that need to act."""
        t = self.layout.tokens_per_block
        if self.layout.pages == "lockstep":
            block = t * self.layout.cp_size
            total = len(request.tokens)
            return [
                _growth(rank, table, total, query_len, block)
                for rank, table in enumerate(request.tables)
            ]
        owners = self.owners(request, query_len)
        return [
            _growth(rank, request.tables[rank], len(request.ranks[rank]), owners.count(rank), t)
            for rank in set(owners)
        ]

    def pages_held(self, request: Request) -> list[int]:
        """Pages that each rank holds for a request under the page policy (PAGE-1)."""
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        if self.layout.pages == "lockstep":
            return [_blocks(len(request.tokens), t * c)] * c
        return [_blocks(len(positions), t) for positions in request.ranks]

    def pages_for_prompt(self, ranks: list[list[int]]) -> list[int]:
        """Pages that each rank takes for a prompt dealt like this."""
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        if self.layout.pages == "lockstep":
            return [_blocks(sum(len(positions) for positions in ranks), t * c)] * c
        return [_blocks(len(positions), t) for positions in ranks]

    # What a rank would report.

    def outcome(self, rank: int, reason: Reason | None) -> Outcome:
        """What cp_rank `rank` answers to the last event, without the attention output."""
        if reason is not None or not self.last_steps:
            return Outcome(reason)
        return self.decoded([attrgetter("number")] * self.layout.cp_size)[rank]

    def decoded(self, numbers_of: Sequence[Callable[[Page], int]]) -> list[Outcome]:
        """What each rank answers to the decode just accepted, with its pages numbered its way."""
        t, c, ranks = self.layout.tokens_per_block, self.layout.cp_size, range(len(numbers_of))
        tokens = [(step, place) for step in self.last_steps for place in range(len(step.owners))]
        positions = [step.first + place for step, place in tokens]
        past_len = list(zip(*[step.past_len for step in self.last_steps], strict=True))
        visible = list(zip(*[step.held[place] for step, place in tokens], strict=True))
        active = [[False] * len(tokens) for _ in ranks]
        slots = [[-1] * len(tokens) for _ in ranks]
        for token, (step, place) in enumerate(tokens):
            owner = step.owners[place]
            index = step.held[place][owner] - 1
            page = self.requests[step.id].tables[owner][index // t]
            for rank in ranks[owner::c]:
                active[rank][token] = True
                slots[rank][token] = numbers_of[rank](page) * t + index % t
        outcomes = []
        for rank in ranks:
            past, seen = list(past_len[rank % c]), list(visible[rank % c])
            outcomes.append(Outcome(None, past, positions, active[rank], slots[rank], seen))
        return outcomes

    def slot(self, id: int, rank: int, index: int) -> int:
        """Slot of a request's local index on a rank."""
        t = self.layout.tokens_per_block
        return self.requests[id].tables[rank][index // t].number * t + index % t

    def view(self, rank: int, ids: Sequence[int] | None = None) -> RankView:
        """What cp_rank `rank` observes, without cached rows."""
        live = {id: request for id, request in self.requests.items() if not request.preempted}
        asked = live if ids is None else {id: live[id] for id in ids if id in live}
        return RankView(
            {id: len(request.ranks[rank]) for id, request in asked.items()},
            {id: [page.number for page in request.tables[rank]] for id, request in asked.items()},
            sorted(id for id, request in self.requests.items() if request.preempted),
            len(self.pools[rank].free),
        )


def _lengths(request: Request) -> list[int]:
    """Tokens of a request on each cp_rank."""
    return list(map(len, request.ranks))


def _growth(rank: int, table: list[Page], held: int, more: int, block: int) -> Growth:
    """Growth of a rank with `held` tokens by `more`, where a page opens every `block` tokens."""
    open_page = table[-1] if held % block else None
    return Growth(rank, _blocks(held + more, block) - _blocks(held, block), open_page)


def _blocks(tokens: int, block: int) -> int:
    """Blocks that so many tokens fill or begin."""
    return (tokens + block - 1) // block
