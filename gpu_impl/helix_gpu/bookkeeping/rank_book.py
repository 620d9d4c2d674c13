"""One rank's bookkeeping without tensors: the ledger seen from this rank, and its pages."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helix_gpu.bookkeeping.allocator import PageAllocator
from helix_gpu.bookkeeping.block_tables import BlockTables
from helix_gpu.bookkeeping.contents import Contents
from helix_gpu.bookkeeping.contents import finds as can_find
from helix_gpu.bookkeeping.ledger import Admission, Ints, Ledger, Rewind, Step
from helix_gpu.bookkeeping.refusals import check_config
from helix_spec.config import Config


class RankStep(NamedTuple):
    """New tokens for each of n requests, m in all, seen from one rank (int64 unless said).

    Tokens stand request after request, in the order of the batch. Dummy requests have no entries;
    `pad` counts them.
    """

    past_len: Ints
    """[n] tokens of the request on this rank before the step."""
    position_ids: Ints
    """[m] global position of the new token."""
    active: NDArray[np.bool_]
    """[m] whether this rank owns the new token."""
    slots: Ints
    """[m] slot written (physical page * tokens_per_block + offset), -1 where not owned."""
    visible: Ints
    """[m] keys on this rank that the new token's query sees, itself included: consecutive ones."""
    rows: Ints
    """[m] row of the token's request in the block tables."""
    taken: list[int]
    """Physical pages that the step took."""
    copied: list[PageCopy]
    """Pages whose earlier tokens must be copied before the new ones are written."""
    pad: int
    """Dummy requests behind the n."""
    starts: Ints | None = None
    """[m] local index of the first key that the new token's query sees; None where it is 0."""

    @classmethod
    def of_dummies(cls, pad: int) -> RankStep:
        """Return a step without tokens.

        Parameters
        ----------
        pad : int
            Dummy requests.
        """
        none = np.zeros(0, dtype=np.int64)
        return cls(none, none, none.astype(bool), none, none, none, [], [], pad)


class Pool(NamedTuple):
    """A pool of pages from which several cache groups take."""

    free: Ints
    """[cp_size] free pages of every rank, by the ledgers of the groups."""
    allocator: PageAllocator
    """The pages of this rank."""


class PageCopy(NamedTuple):
    """Copy on write: the first slots of a page go to another page.

    Attributes
    ----------
    source, target : int
        Physical pages.
    tokens : int
        Slots to copy.
    """

    source: int
    target: int
    tokens: int


class PromptChunk(NamedTuple):
    """Pieces of prompts that were placed, one for each of n requests, as one step."""

    step: RankStep
    ids: list[int]
    rows: Ints
    """[n] rows of the requests."""
    firsts: Ints
    """[n] position of each piece's first token."""
    ends: Ints
    """[n] position behind its last one."""


class RankBook:
    """The bookkeeping of one cp_rank: lengths, pages, slots and positions.

    Ranks that apply the same events give the same answers and the same refusals without
    communication.

    Parameters
    ----------
    config : Config
        Without cache groups, for which there is `groups.GroupBook`.
    cp_rank : int
    pool : Pool, optional
        From which it takes pages; its own, of `config.pages`, unless given.
    window : int, optional
        Tokens that a query sees; all unless given.
    finds : bool
        Whether new requests find tokens that it was told others have (SPEC.md section 5.8).

    Raises
    ------
    Refused
        With `bad_config` for a configuration that it may not start with.
    ValueError
        For a cp_rank outside the configuration, and one with cache groups.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=2,T=2", pages=[8, 8], max_len=100)
    >>> book = RankBook(config, cp_rank=1)
    >>> book.admit(7, prompt_len=5)  # rank 0 has four of the five tokens
    [0]
    >>> step = book.decode_step([7], [3])
    >>> step.position_ids.tolist(), step.active.tolist(), step.slots.tolist()
    ([5, 6, 7], [False, False, True], [-1, -1, 1])
    """

    def __init__(
        self,
        config: Config,
        cp_rank: int,
        *,
        pool: Pool | None = None,
        window: int | None = None,
        finds: bool = False,
    ) -> None:
        check_config(config)
        if config.groups:
            raise ValueError("The configuration has cache groups; a GroupBook keeps those.")
        self.layout = config.layout
        if not 0 <= cp_rank < self.layout.cp_size:
            raise ValueError(
                f"cp_rank is {cp_rank}; with cp_size {self.layout.cp_size} it must lie between "
                f"0 and {self.layout.cp_size - 1}."
            )
        self.cp_rank = cp_rank
        free = config.pages if pool is None else pool.free
        self.ledger = Ledger(self.layout, free, config.max_len)
        self.ledger.overlap, self.ledger.window = config.overlap, window
        if finds and can_find(self.layout):
            self.ledger.contents = Contents(self.layout)
            self.ledger.computes = config.admission == "prefill"
        self.tables = BlockTables()
        self._allocator = pool.allocator if pool else PageAllocator(config.pages[cp_rank])
        self._page_size = np.array(self.layout.tokens_per_block)  # as the ledger has its numbers
        self._before, self._zero = np.array((window or 1) - 1), np.array(0)

    @property
    def request_ids(self) -> list[int]:
        """Return the live requests, in the order in which they were placed."""
        return self.ledger.ids

    @property
    def preempted_ids(self) -> list[int]:
        """Return the preempted requests, in rising order."""
        return sorted(self.ledger.preempted)

    @property
    def free_pages(self) -> int:
        """Return the number of pages of this rank's pool that no request holds."""
        return self._allocator.free

    def live(self, ids: Sequence[int]) -> list[int]:
        """Return those of the requests that are live, in their order.

        Parameters
        ----------
        ids : sequence of int
        """
        return self.ledger.live(ids)

    def local_len(self, id: int) -> int:
        """Return the tokens of a live request on this rank.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not live.
        """
        return self.holdings([id])[0][0]

    def block_table(self, id: int) -> list[int]:
        """Return the physical pages of a live request on this rank, in local order.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not live.
        """
        return self.holdings([id])[1][0]

    def holdings(self, ids: Sequence[int]) -> tuple[list[int], list[list[int]]]:
        """Return the tokens of live requests on this rank, and their block tables.

        Parameters
        ----------
        ids : sequence of int, [n]

        Returns
        -------
        tokens : list of int, [n]
        tables : list of list of int, [n]
            Physical pages in local order.

        Raises
        ------
        Refused
            For a request that is not live.
        """
        rows = self.ledger.rows(ids)
        lengths, pages = self.ledger.on_rank(self.cp_rank, rows)
        return lengths.tolist(), self.tables.lists(rows, pages)

    def plan_admit(self, id: int, prompt_len: int) -> Admission:
        """Plan the admission of a new request; nothing changes.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.

        Returns
        -------
        Admission

        Raises
        ------
        Refused
            As `Ledger.plan_admit`.
        """
        return self.ledger.plan_admit(id, prompt_len)

    def plan_admissions(self, ids: Sequence[int], prompt_lens: Sequence[int]) -> list[Admission]:
        """Plan the admission of new requests, one after the other; nothing changes.

        Parameters
        ----------
        ids, prompt_lens
            As `Ledger.plan_admissions` takes them.

        Returns
        -------
        list of Admission, [n]

        Raises
        ------
        Refused
            As `Ledger.plan_admissions`.
        """
        return self.ledger.plan_admissions(ids, prompt_lens)

    def plan_resume(self, id: int) -> Admission:
        """Plan to place all tokens of a preempted request as a prompt; nothing changes.

        Parameters
        ----------
        id : int

        Returns
        -------
        Admission

        Raises
        ------
        Refused
            As `Ledger.plan_resume`.
        """
        return self.ledger.plan_resume(id)

    def place(self, plan: Admission) -> list[int]:
        """Apply an admission or resumption planned against the present state.

        Parameters
        ----------
        plan : Admission

        Returns
        -------
        list of int
            Fresh pages that it took on this rank, behind those that were found. Those before the
            window are given back by `drop`, once the prompt is written.
        """
        contents, revived, held = self.ledger.contents, list[int](), list[int]()
        if contents is not None:
            held = [block.page for block in plan.found if block.rows]
            revived = contents.revive(plan.found)
        taken = self._take(plan.pages, found=len(revived))
        self._allocator.retake(revived)
        self._allocator.share(held)
        row = self.ledger.admit(plan)
        self.tables.begin(row, [*(block.page for block in plan.found), *taken])
        self._reach(np.array([row]))
        return taken

    def _take(self, pages: Ints, found: int = 0) -> list[int]:
        """Take pages here, of those that an event takes on each rank; so many were found."""
        contents = self.ledger.contents
        if contents is not None and contents.cached:
            short = int((pages - self.ledger.free).max()) + len(contents.cached)
            self._allocator.let_go(contents.give_up(max(0, short)))
        return self._allocator.take(int(pages[self.cp_rank]) - found)

    def tell(self, id: int, tokens: Sequence[int]) -> None:
        """Say what the tokens are that a live request got in its last step.

        Parameters
        ----------
        id : int
        tokens : sequence of int
            Their ids.
        """
        contents, row = self.ledger.contents, self.ledger.rows([id])
        if contents is not None:
            contents.extend(int(row[0]), self.ledger.total(id) - len(tokens), tokens)
            self._reach(row)

    def _reach(self, rows: Ints) -> None:
        """Let others find what they may find of these requests by now."""
        contents = self.ledger.contents
        if contents is None:
            return
        for row, tokens in zip(rows.tolist(), self.ledger.findable(rows).tolist(), strict=True):
            contents.reach(row, tokens, partial(self._page, row))

    def _page(self, row: int, place: int) -> int:
        return self.tables.part(row, place, place + 1)[0]

    def admit(self, id: int, prompt_len: int) -> list[int]:
        """Admit a request, and return the physical pages that it took on this rank.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.

        Returns
        -------
        list of int

        Raises
        ------
        Refused
            As `plan_admit`.
        """
        return self._placed(self.plan_admit(id, prompt_len))

    def resume(self, id: int) -> list[int]:
        """Place a preempted request anew, and return the physical pages that it took on this rank.

        Parameters
        ----------
        id : int

        Returns
        -------
        list of int

        Raises
        ------
        Refused
            As `plan_resume`.
        """
        return self._placed(self.plan_resume(id))

    def _placed(self, plan: Admission) -> list[int]:
        taken = self.place(plan)
        self.drop(self.ledger.rows([plan.id]))
        return taken

    def drop(self, rows: Ints, next_queries: Ints | None = None) -> None:
        """Give back the pages that no later query of these requests sees.

        Whatever may still look at these pages has done so.

        Parameters
        ----------
        rows : ndarray, int64 [n]
            Rows of requests, each once.
        next_queries : ndarray, int64 [n], optional
            As `Ledger.next_queries` returns them, where that is known.
        """
        if self.ledger.window is None:
            return
        if next_queries is None:
            next_queries = self.ledger.next_queries(rows)
        dropped = self.ledger.drop(rows, next_queries)
        if dropped is None:
            return
        mine = zip(
            dropped.rows.tolist(),
            dropped.firsts[:, self.cp_rank].tolist(),
            dropped.counts[:, self.cp_rank].tolist(),
            strict=True,
        )
        for row, first, count in mine:
            if count:
                self._allocator.give_back(self.tables.clear(row, first, first + count))

    def prompt_chunks(self, plans: Sequence[Admission], tokens: int) -> Iterator[PromptChunk]:
        """Yield the prompts of admissions that were placed, as steps of a limited number of tokens.

        A step takes up where the one before it ended, and may hold the end of one prompt and the
        next ones. Each token sees those of its own prompt before it and itself; nothing is taken or
        changed.

        Parameters
        ----------
        plans : sequence of Admission
        tokens : int
            Tokens of a step, at most.

        Yields
        ------
        PromptChunk
        """
        pieces, left = list[tuple[Admission, int, int]](), tokens
        for plan in plans:
            first = plan.hit
            while first < plan.prompt_len:
                end = min(first + left, plan.prompt_len)
                pieces.append((plan, first, end))
                left -= end - first
                first = end
                if not left:
                    yield self._chunk(pieces)
                    pieces, left = [], tokens
        if pieces:
            yield self._chunk(pieces)

    def _chunk(self, pieces: Sequence[tuple[Admission, int, int]]) -> PromptChunk:
        """The positions [first, end) of each of these prompts, as one step."""
        t, columns = self.layout.tokens_per_block, list[tuple[NDArray[Any], ...]]()
        ids = [plan.id for plan, _, _ in pieces]
        rows = self.ledger.rows(ids)
        for row, (plan, first, end) in zip(rows, pieces, strict=True):
            mine, positions = plan.shards[self.cp_rank].positions(), np.arange(first, end)
            past_len, visible = (mine.searchsorted(positions, side) for side in ("left", "right"))
            active = past_len < visible
            own = past_len[active]
            starts = np.zeros_like(positions)
            if self.ledger.window is not None:
                starts = mine.searchsorted(positions - (self.ledger.window - 1))
            slots = np.full(len(positions), -1)
            slots[active] = self.tables.page(np.full(len(own), row), own // t) * t + own % t
            row_of_each = np.full(len(positions), row)
            columns.append(
                (past_len[:1], positions, active, slots, visible - starts, row_of_each, starts)
            )
        past_lens, positions, active, slots, visible, row_of_each, starts = map(
            np.concatenate, zip(*columns, strict=True)
        )
        step = RankStep(
            past_lens, positions, active, slots, visible, row_of_each, [], [], 0,
            None if self.ledger.window is None else starts,
        )  # fmt: skip
        firsts, ends = (np.array(x) for x in zip(*((a, b) for _, a, b in pieces), strict=True))
        return PromptChunk(step, ids, rows, firsts, ends)

    def plan_step(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> Step:
        """Plan the new tokens of each request. Nothing changes: it is all that a skipped step does.

        Parameters
        ----------
        ids : sequence of int, [n]
        query_lens : sequence of int, [n], optional
            New tokens of each request; one unless given.
        pad : int
            Dummy requests behind them.

        Returns
        -------
        Step

        Raises
        ------
        Refused
            As `Ledger.plan_step`.
        """
        return self.ledger.plan_step(ids, [1] * len(ids) if query_lens is None else query_lens, pad)

    def advance(self, step: Step) -> RankStep:
        """Apply a step planned against the present state, and return what this rank sees of it.

        Parameters
        ----------
        step : Step

        Returns
        -------
        RankStep
        """
        taken = self._take(step.pages)
        rows = step.rows[step.requests]
        copied = self._copy_on_write(step, taken)
        self._open_pages(step, rows, taken[len(copied) :])
        self.ledger.advance(step)
        t = self._page_size
        index = step.past_lens[:, self.cp_rank]
        active = step.owners == self.cp_rank
        # -1 where another rank owns the token; 0 at first where this one does.
        slots, mine = active - 1, active.nonzero()[0]
        own = index[mine]
        slots[mine] = self.tables.page(rows[mine], own // t) * t + own % t
        visible, starts = index + active, self._starts(rows, step.positions)
        if starts is not None:
            visible = visible - starts
        return RankStep(
            index[step.firsts], step.positions, active, slots, visible, rows, taken, copied,
            step.pad, starts,
        )  # fmt: skip

    def _starts(self, rows: Ints, positions: Ints) -> Ints | None:
        """The first local index that queries at these positions see; None without a window."""
        if self.ledger.window is None:
            return None
        first = np.maximum(positions - self._before, self._zero)
        return self.ledger.tokens_before(rows, first, self.cp_rank)

    def decode_step(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> RankStep:
        """Plan and apply a step, and return what this rank sees of it.

        Parameters
        ----------
        ids, query_lens, pad
            As `plan_step` takes them.

        Returns
        -------
        RankStep

        Raises
        ------
        Refused
            As `plan_step`.
        """
        plan = self.plan_step(ids, query_lens, pad)
        step = self.advance(plan)
        self.drop(plan.rows)
        return step

    def skip(self, ids: Sequence[int], query_lens: Sequence[int] | None = None) -> None:
        """Plan a step that never runs; nothing changes.

        Parameters
        ----------
        ids, query_lens
            As `plan_step` takes them.

        Raises
        ------
        Refused
            As `plan_step`.
        """
        self.plan_step(ids, query_lens)

    def accept(self, id: int, kept: int) -> None:
        """Rewind a request's open group to its first tokens.

        Parameters
        ----------
        id : int
        kept : int
            Tokens of the group that stay.

        Raises
        ------
        Refused
            As `Ledger.plan_accept`.
        """
        plan = self.ledger.plan_accept(id, kept)
        pages = self._beyond(plan)
        self.ledger.accept(plan)
        self._allocator.give_back(pages)
        if self.ledger.contents is not None:
            self.ledger.contents.rewind(plan.row, plan.total)
            self._reach(np.array([plan.row]))
        self.drop(np.array([plan.row]))

    def cancel(self, ids: Sequence[int]) -> None:
        """Undo the last step of live requests, after which nothing else has changed them.

        Pages that it let leave the window do not come back: it must come before `drop`.

        Parameters
        ----------
        ids : sequence of int
        """
        for id in ids:
            plan = self.ledger.plan_cancel(id)
            pages = self._beyond(plan)
            if self.ledger.contents is not None:
                self.ledger.contents.rewind(plan.row, plan.total)
            self.ledger.cancel(plan)
            self._allocator.give_back(pages)

    def sampled(self, ids: Sequence[int]) -> None:
        """Count the oldest outstanding decode of each request as sampled.

        Parameters
        ----------
        ids : sequence of int

        Raises
        ------
        Refused
            As `Ledger.sampled`.
        """
        self.ledger.sampled(ids)

    def fork(self, parent: int, child: int) -> None:
        """Begin a request as a copy of another that shares all its pages.

        Parameters
        ----------
        parent : int
            A live request.
        child : int
            Id of the new one.

        Raises
        ------
        Refused
            For a parent that is not live, and a child that is known.
        """
        self.ledger.fork(parent, child)
        source, row = self.ledger.rows([parent, child]).tolist()
        if self.ledger.contents is not None:
            self._reach(np.array([source]))
            self.ledger.contents.fork(source, row)
        self.tables.copy(source, row)
        self._allocator.share(self._held(child))
        self.drop(np.array([source, row]))

    def preempt(self, id: int) -> None:
        """Free the pages of a live request, which stays known.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not live.
        """
        pages = self._held(id)
        self.ledger.preempt(id)
        self._let_go(pages)

    def release(self, id: int) -> None:
        """End a request, live or preempted; pages that no other request holds are free.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not known.
        """
        pages = [] if id in self.ledger.preempted else self._held(id)
        self.ledger.release(id)
        self._let_go(pages)

    def _let_go(self, pages: list[int]) -> None:
        """Give back the pages of a request that has ended here; some may be found again."""
        cached = self.ledger.contents.cached if self.ledger.contents is not None else {}
        self._allocator.set_aside(page for page in pages if page in cached)
        self._allocator.give_back(page for page in pages if page not in cached)

    def _held(self, id: int) -> list[int]:
        """The pages of a live request here, without those that have left the window."""
        (row,) = rows = self.ledger.rows([id])
        _, places = self.ledger.on_rank(self.cp_rank, rows)
        return self.tables.part(int(row), self.ledger.dropped(self.cp_rank, row), int(places[0]))

    def _beyond(self, plan: Rewind) -> list[int]:
        """The pages here that a rewind gives back."""
        mine = slice(self.cp_rank, self.cp_rank + 1)
        (table,) = self.tables.lists(np.array([plan.row]), plan.held[mine])
        return table[int(plan.kept[self.cp_rank]) :]

    def _open_pages(self, step: Step, rows: Ints, pages: list[int]) -> None:
        """Put pages just taken where the step's tokens open one on this rank."""
        if pages:
            opening, opened = step.opening, step.opened
            if self.layout.pages == "lazy":
                here = step.owners[opening] == self.cp_rank
                opening, opened = opening[here], opened[here]
            self.tables.write(rows[opening], opened, pages)

    def _copy_on_write(self, step: Step, pages: list[int]) -> list[PageCopy]:
        """Put pages just taken in the place of shared ones that the step writes into here."""
        writes = [w for w in step.shared if w.copies and w.rank == self.cp_rank]
        if not writes:
            return []
        t = self.layout.tokens_per_block
        firsts = step.firsts[[write.place for write in writes]]
        rows = step.rows[[write.place for write in writes]]
        held = step.past_lens[firsts, self.cp_rank]
        columns = held // t
        if self.layout.pages == "lockstep":
            columns = step.positions[firsts] // (t * self.layout.cp_size)
        sources: list[int] = self.tables.page(rows, columns).tolist()
        targets = pages[: len(writes)]
        self.tables.write(rows, columns, targets)
        for page in sources:  # several requests may leave one page
            self._allocator.give_back([page])
        tokens: list[int] = (held - columns * t).tolist()
        return [PageCopy(*copy) for copy in zip(sources, targets, tokens, strict=True)]
