"""The operational model: all ranks of one sharded KV cache, one event at a time.

Each event is a method of a few lines; `refusals.refusal` decides beforehand whether it may happen
at all, so that a refused event changes nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

from helix_reference.dealing import deal_prompt
from helix_reference.prefix import Sought, contents, hit_of, live_pages, mark, sought, unit_of
from helix_reference.refusals import refusal
from helix_reference.state import GONE, Pool, Request, State, Step
from helix_reference.tokens import Identity, Positions, Tokens
from helix_spec.capabilities import STRICT, Freedoms
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
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
    ids_of,
)


class Model(State):
    """All ranks of one sharded KV cache, which events change.

    Parameters
    ----------
    config
        A legal configuration (`helix_spec.config.config_problem` says None), without cache groups.
    freedoms
        What differs from the strictest engine.
    pools
        The pool of each cp_rank, where other caches take pages from it too.
    window
        A query at position p sees positions above p - window alone; None for all up to p.

    Examples
    --------
    >>> model = Model(Config(layout="pr9757/1:C=4,T=2", pages=[9] * 4, max_len=100))
    >>> [model.apply(Admit(0, 13)), model.apply(Decode([0], [1]))]
    [None, None]
    >>> model.requests[0].ranks
    [[0, 1, 2, 3, 13], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    """

    def __init__(
        self,
        config: Config,
        freedoms: Freedoms = STRICT,
        pools: list[Pool] | None = None,
        window: int | None = None,
    ) -> None:
        super().__init__(config, pools)
        self.freedoms = freedoms
        self.window = window
        self.events_seen = 0
        self.finds = False
        """Whether prefixes are found; set before the first event."""
        self.wanted: Sought | None = None
        """What the last event looked for in the cache."""
        self.last_hit: int | None = None
        """Of the last event, the tokens that it found; None where it looked for none."""
        self.last_steps: list[Step] = []
        """One for each request of the last event, when that was an accepted decode."""

    def apply(self, event: Event) -> Reason | None:
        """Let the event happen, or return why it is refused and change nothing.

        Parameters
        ----------
        event
            The next event of the trace. A refused one counts, too: tokens are identified by the
            index of their event.

        Returns
        -------
        Reason or None
            None when the event has happened.
        """
        reason = self.refusal(event)
        self.follow(event, reason)
        return reason

    def follow(self, event: Event, reason: Reason | None, hit: int | None = None) -> None:
        """Let the event happen where `reason` is None; else it counts, and changes nothing.

        Parameters
        ----------
        event
            The next event of the trace.
        reason
            Why it is refused; None for what `refusal` finds no reason.
        hit
            Tokens that an engine has found in its cache, as many as may be; None for as many as
            this model finds.
        """
        self.last_steps, self.wanted, self.last_hit = [], None, None
        if reason is None:
            self.wanted = sought(self, event)
            if self.wanted is not None:
                self.last_hit = hit_of(self, event).own if hit is None else hit
            self._happen(event)
            if self.finds:
                for id in ids_of(event):
                    if id in self.requests and not self.requests[id].preempted:
                        mark(self, self.requests[id], self.events_seen)
            if self.window is not None and self.freedoms.window_pages == "returned":
                for request in self.requests.values():
                    self._leave_behind(request, self.window)
        self.events_seen += 1

    def refusal(self, event: Event) -> Reason | None:
        """Return why the event would be refused now; None when it may happen."""
        return refusal(self, event)

    def _happen(self, event: Event) -> None:
        match event:
            case Admit(id, prompt_len, _, _, salt):
                self._admit(id, prompt_len)
                self.requests[id].salt = salt
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
                self._release(id)
            case Preempt(id):
                self._preempt(self.requests[id])
            case Resume(id):
                self._resume(self.requests[id])

    def _admit(self, id: int, prompt_len: int) -> None:
        shift = 0
        prefix: Sequence[Identity] = ()
        if self.layout.start == "rotated":
            shift = self.admissions % self.layout.cp_size
        if self.wanted is not None:
            shift, prefix = self.wanted.shift, self.wanted.tokens
        self.admissions += 1
        tokens = Tokens(self.events_seen, prompt_len, prefix=prefix)
        self.requests[id] = request = Request(prompt_len, shift, tokens, [], [], [])
        self._place_prompt(request)

    def _place_prompt(self, request: Request) -> None:
        """Deal all tokens of the request as a prompt, into pages that hold them, and fresh ones."""
        request.ranks = deal_prompt(self.layout, request.prompt_len, request.shift)
        request.tables, request.found = [[] for _ in self.pools], 0
        if self.wanted is not None and self.last_hit:
            self._share_found(request, self.wanted, self.last_hit)
        places = zip(self.pools, request.tables, self.pages_of(request.ranks), strict=True)
        for pool, table, pages in places:
            table += [pool.take() for _ in range(pages - len(table))]
        request.written = [len(positions) for positions in request.ranks]

    def _share_found(self, request: Request, wanted: Sought, hit: int) -> None:
        """Begin the request's tables with pages that hold its tokens, those of live ones first."""
        unit, live = unit_of(self.layout), live_pages(self)
        for content in contents(wanted, hit // unit, unit):
            for pool, table, pages in zip(self.pools, request.tables, live, strict=True):
                page = pages.get(content)
                if page is None:
                    page = pool.take_again(content, self.events_seen)
                else:
                    page.holders += 1
                table.append(page)

    def _decode(self, ids: list[int], query_lens: list[int]) -> None:
        place = 0
        for id, query_len in zip(ids, query_lens, strict=True):
            request = self.requests[id]
            owners, held = self.owners(request, query_len), list(map(len, request.ranks))
            step = Step(id, len(request.tokens), owners, held, [])
            for owner in owners:
                self._append(request, (self.events_seen, place), owner)
                index = len(request.ranks[owner]) - 1
                step.pages.append(request.tables[owner][index // self.layout.tokens_per_block])
                place += 1
            self.last_steps.append(step)
            request.open_group = query_len
            request.outstanding += self.config.overlap

    def _append(self, request: Request, token: Identity, owner: int) -> None:
        """Place one more token on the rank that owns it, in a page that nobody else holds."""
        mine = request.ranks[owner]
        for rank, place in self.writers(owner, len(mine), len(request.tokens)):
            self._make_room(request, rank, place)
        mine.append(len(request.tokens))
        request.tokens.append(token)
        request.written[owner] = max(request.written[owner], len(mine))

    def _make_room(self, request: Request, rank: int, place: int) -> None:
        """Take a page where the request has none at this place, a copy where others hold it."""
        pool, table = self.pools[rank], request.tables[rank]
        if place == len(table):
            table.append(pool.take())
        elif table[place].holders > 1:
            pool.give_back(table[place])
            table[place] = pool.take()

    def _accept(self, request: Request, kept: int) -> None:
        total = len(request.tokens) - request.open_group + kept
        request.open_group = 0
        request.tokens.rewind(total)
        for positions in request.ranks:
            positions.rewind(total)
        if self.freedoms.rewind_pages == "kept":
            return
        for rank, wanted in enumerate(self.pages_of(request.ranks)):
            while len(request.tables[rank]) > wanted:
                self.pools[rank].give_back(request.tables[rank].pop())
            slots = wanted * self.layout.tokens_per_block
            request.written[rank] = min(request.written[rank], slots)

    def _fork(self, parent: Request, child: int) -> None:
        parent.open_group = 0
        wanted = self.pages_of(parent.ranks)  # more are kept for the parent's next tokens alone
        shared = [table[:pages] for table, pages in zip(parent.tables, wanted, strict=True)]
        for table in shared:
            for page in table:
                page.holders += 1
        self.requests[child] = Request(
            parent.prompt_len,
            parent.shift,
            parent.tokens.copy(),
            [positions.copy() for positions in parent.ranks],
            shared,
            list(parent.written),
            salt=parent.salt,
            found=parent.found,
        )

    def _leave_behind(self, request: Request, window: int) -> None:
        """Give pages back whose last position no later query can see (SPEC.md section 5.7)."""
        rewindable = max(0, request.open_group - 1)
        behind = len(request.tokens) - rewindable - window
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        for pool, table, positions in zip(self.pools, request.tables, request.ranks, strict=True):
            for place, page in enumerate(table):
                if page is GONE:
                    continue
                if self.layout.pages == "lockstep":
                    gone = (place + 1) * t * c - 1 <= behind
                else:
                    full = (place + 1) * t <= len(positions)
                    gone = full and positions[(place + 1) * t - 1] <= behind
                if not gone:
                    break
                pool.give_back(page)
                table[place] = GONE

    def _preempt(self, request: Request) -> None:
        self._give_pages_back(request)
        request.preempted = True
        request.open_group = request.outstanding = 0
        request.ranks = [Positions() for _ in self.pools]
        request.tables = [[] for _ in self.pools]

    def _resume(self, request: Request) -> None:
        request.preempted = False
        request.prompt_len = len(request.tokens)
        self._place_prompt(request)

    def _release(self, id: int) -> None:
        request = self.former[id] = self.requests.pop(id)
        self._give_pages_back(request)
        request.open_group = 0

    def _give_pages_back(self, request: Request) -> None:
        for pool, table in zip(self.pools, request.tables, strict=True):
            for page in table:
                if not page.contents:
                    pool.give_back(page)
            for page in reversed(table):  # a block is of no use without those before it
                if page.contents:
                    pool.give_back(page)

    # What a rank reports.

    def outcome(self, rank: int, reason: Reason | None) -> Outcome:
        """Return what a rank answers to the last event, without the attention output.

        Parameters
        ----------
        rank
            Its cp_rank.
        reason
            What `apply` returned for the event.

        Returns
        -------
        Outcome
            After an accepted decode with its columns; else with the reason alone.

        Examples
        --------
        >>> model = Model(Config(layout="pr9757/1:C=2,T=2", pages=[9] * 2, max_len=100))
        >>> model.apply(Admit(0, 3))
        >>> reason = model.apply(Decode([0], [3]))
        >>> [model.outcome(rank, reason).active for rank in range(2)]
        [[True, True, False], [False, False, True]]
        """
        if reason is not None or not self.last_steps:
            return Outcome(reason, hit=self.last_hit)
        columns, t = Outcome(None, [], [], [], [], []), self.layout.tokens_per_block
        for step in self.last_steps:
            held = step.past_len[rank]
            columns.past_len.append(held)
            for place, owner in enumerate(step.owners):
                mine = owner == rank
                columns.position_ids.append(step.first + place)
                columns.active.append(mine)
                columns.slots.append(step.pages[place].number * t + held % t if mine else -1)
                held += mine
                assert columns.visible is not None
                columns.visible.append(held - self.unseen(step, place, rank))
        return columns

    def unseen(self, step: Step, place: int, rank: int) -> int:
        """Return how many tokens on a rank lie before the window of a step's new token.

        Parameters
        ----------
        step
            One of the last decode.
        place
            The new token's number in the step, from 0.
        rank
            A cp_rank.
        """
        if self.window is None:
            return 0
        last = step.first + place - self.window
        return sum(position <= last for position in self.requests[step.id].ranks[rank])

    def slot(self, id: int, rank: int, index: int) -> int:
        """Return the slot of a token on a rank: physical page * T + offset in the page.

        Parameters
        ----------
        id
            A live request.
        rank
            The cp_rank that holds the token.
        index
            The token's local index on that rank.

        Returns
        -------
        int
            A slot of the rank's pool, from 0.
        """
        t = self.layout.tokens_per_block
        return self.requests[id].tables[rank][index // t].number * t + index % t

    def view(self, rank: int, ids: Sequence[int] | None = None) -> RankView:
        """Return what a rank observes, without cached rows.

        Parameters
        ----------
        rank
            Its cp_rank.
        ids
            The requests that are observed; None for all. Those that are not live are left out.

        Returns
        -------
        RankView
            Lengths and block tables of these requests; all preempted ids, rising; free pages.

        Examples
        --------
        >>> model = Model(Config(layout="pr9757/1:C=2,T=2", pages=[9] * 2, max_len=100))
        >>> model.apply(Admit(0, 3))
        >>> view = model.view(1)
        >>> view.local_len, view.free_pages
        ({0: 1}, 8)
        """
        live = {id: request for id, request in self.requests.items() if not request.preempted}
        asked = live if ids is None else {id: live[id] for id in ids if id in live}
        return RankView(
            {id: len(request.ranks[rank]) for id, request in asked.items()},
            {id: [page.number for page in request.tables[rank]] for id, request in asked.items()},
            sorted(id for id, request in self.requests.items() if request.preempted),
            self.pools[rank].free,
        )
