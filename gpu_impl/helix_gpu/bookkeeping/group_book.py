"""One rank's bookkeeping of several cache groups, whose pages come from pools that they share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from helix_gpu.bookkeeping.allocator import PageAllocator
from helix_gpu.bookkeeping.ledger import Admission, Ints, Ledger, Step, check_pages, total_pages
from helix_gpu.bookkeeping.rank_book import Pool, PromptChunk, RankBook, RankStep
from helix_gpu.bookkeeping.refusals import check_config
from helix_spec.config import MAIN_POOL, Config


class GroupAdmission(tuple[Admission, ...]):
    """The plan of an admission or resumption, for each cache group."""

    __slots__ = ()

    @property
    def id(self) -> int:
        """Return the request."""
        return self[0].id

    @property
    def prompt_len(self) -> int:
        """Return the tokens to place."""
        return self[0].prompt_len


class GroupPlan(tuple[Step, ...]):
    """The plan of a step for each cache group; what belongs to all of them is the first one's."""

    __slots__ = ()

    def __getattr__(self, name: str) -> Any:
        return getattr(self[0], name)


class GroupChunk(NamedTuple):
    """Pieces of prompts that were placed, as one step of each cache group."""

    of_groups: dict[str, PromptChunk]
    step: RankStep
    """That of the first group, as what follows."""
    ids: list[int]
    rows: Ints
    firsts: Ints
    ends: Ints


class GroupBook:
    """The bookkeeping of one cp_rank for a configuration with cache groups (SPEC.md section 4.2).

    Each group has a `RankBook` with its own layout, of one rank where it is replicated. They are
    planned together, the need of a pool summed over its groups, and applied together: a refusal of
    one is a refusal of all and changes nothing. They number their requests' rows alike, so what
    concerns requests and not pages is asked of the first.

    Parameters
    ----------
    config : Config
        With one cache group or more.
    cp_rank : int

    Raises
    ------
    Refused
        With `bad_config` for a configuration that it may not start with.
    ValueError
        For a cp_rank outside the configuration.

    Examples
    --------
    >>> from helix_spec.config import CacheGroup
    >>> groups = [CacheGroup(name="all", layers=[0])]
    >>> groups.append(CacheGroup(name="near", layers=[0], placement="replicated", window=3))
    >>> config = Config(layout="pr17866/1:C=2,T=2", pages=[9, 9], max_len=99, groups=groups)
    >>> book = GroupBook(config, cp_rank=0)
    >>> book.admit(0, prompt_len=5)
    >>> {name: one.block_table(0) for name, one in book.books.items()}
    {'all': [0, 1], 'near': [-1, 3, 4]}
    >>> book.decode_step([0], [2])["near"].visible.tolist(), book.free_pages
    ([3, 3], 5)
    """

    def __init__(self, config: Config, cp_rank: int) -> None:
        check_config(config)
        c = config.layout.cp_size
        if not 0 <= cp_rank < c:
            raise ValueError(
                f"cp_rank is {cp_rank}; with cp_size {c} it must lie between 0 and {c - 1}."
            )
        self.layout, self.cp_rank = config.layout, cp_rank
        self.pools: dict[str, Pool] = {}
        for name in (MAIN_POOL, *config.pools):
            sizes = config.pool_sizes(name)
            free = np.array(sizes, dtype=np.int64)
            self.pools[name] = Pool(free, PageAllocator(sizes[cp_rank]))
        self.books: dict[str, RankBook] = {}
        self._places: dict[str, list[int]] = {name: [] for name in self.pools}
        """By pool, which of the groups take pages from it."""
        for place, group in enumerate(config.groups):
            self.books[group.name] = RankBook(
                config.alone(group, cp_rank),
                0 if group.placement == "replicated" else cp_rank,
                pool=self.pools[group.pool],
                window=group.window,
            )
            self._places[group.pool].append(place)
        self._ledgers: list[Ledger] = [book.ledger for book in self.books.values()]
        self._windows = [book for book in self.books.values() if book.ledger.window is not None]

    @property
    def ledger(self) -> Ledger:
        """Return the ledger of the first group, for what concerns requests and no pages."""
        return self._ledgers[0]

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
        """Return the pages of the pool `main` on this rank that no request holds."""
        return self.pools[MAIN_POOL].allocator.free

    @property
    def free_by_pool(self) -> dict[str, int]:
        """Return the pages of each pool on this rank that no request holds."""
        return {name: pool.allocator.free for name, pool in self.pools.items()}

    @property
    def has_windows(self) -> bool:
        """Return whether some group has a window."""
        return bool(self._windows)

    def live(self, ids: Sequence[int]) -> list[int]:
        """Return those of the requests that are live, in their order.

        Parameters
        ----------
        ids : sequence of int
        """
        return self.ledger.live(ids)

    def plan_admissions(
        self, ids: Sequence[int], prompt_lens: Sequence[int]
    ) -> list[GroupAdmission]:
        """Plan the admission of new requests, one after the other; nothing changes.

        Parameters
        ----------
        ids, prompt_lens : sequence of int, [n]
            As `Ledger.plan_admissions` takes them.

        Returns
        -------
        list of GroupAdmission, [n]

        Raises
        ------
        Refused
            As `Ledger.plan_admissions`, for what all groups take together.
        """
        self.ledger.check_prompts(ids, prompt_lens)
        plans = [ledger.place_prompts(ids, prompt_lens) for ledger in self._ledgers]
        self._check_pages(list(map(total_pages, plans)))
        return [GroupAdmission(of_request) for of_request in zip(*plans, strict=True)]

    def plan_admit(self, id: int, prompt_len: int) -> GroupAdmission:
        """Plan the admission of a new request; nothing changes.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.

        Returns
        -------
        GroupAdmission

        Raises
        ------
        Refused
            As `plan_admissions`.
        """
        (plan,) = self.plan_admissions([id], [prompt_len])
        return plan

    def plan_resume(self, id: int) -> GroupAdmission:
        """Plan to place all tokens of a preempted request as a prompt; nothing changes.

        Parameters
        ----------
        id : int

        Returns
        -------
        GroupAdmission

        Raises
        ------
        Refused
            As `Ledger.plan_resume`, for what all groups take together.
        """
        plan = GroupAdmission(ledger.place_again(id) for ledger in self._ledgers)
        self._check_pages([one.pages for one in plan])
        return plan

    def place(self, plan: GroupAdmission) -> dict[str, list[int]]:
        """Apply an admission or resumption planned against the present state.

        Parameters
        ----------
        plan : GroupAdmission

        Returns
        -------
        dict of str to list of int
            By group, physical pages that it took on this rank. Those before a window are given back
            by `drop`, once the prompt is written.
        """
        books = self.books.items()
        return {name: book.place(one) for (name, book), one in zip(books, plan, strict=True)}

    def admit(self, id: int, prompt_len: int) -> None:
        """Admit a request.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.

        Raises
        ------
        Refused
            As `plan_admit`.
        """
        self.place(self.plan_admit(id, prompt_len))
        self.drop(self.ledger.rows([id]))

    def resume(self, id: int) -> None:
        """Place a preempted request anew.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            As `plan_resume`.
        """
        self.place(self.plan_resume(id))
        self.drop(self.ledger.rows([id]))

    def prompt_chunks(self, plans: Sequence[GroupAdmission], tokens: int) -> Iterator[GroupChunk]:
        """Yield the prompts of admissions that were placed, as steps of a limited number of tokens.

        Parameters
        ----------
        plans : sequence of GroupAdmission
        tokens : int
            Tokens of a step, at most.

        Yields
        ------
        GroupChunk
            The same tokens for each group; see `RankBook.prompt_chunks`.
        """
        by_group = [
            book.prompt_chunks([plan[place] for plan in plans], tokens)
            for place, book in enumerate(self.books.values())
        ]
        for chunks in zip(*by_group, strict=True):
            of_groups = dict(zip(self.books, chunks, strict=True))
            yield GroupChunk(of_groups, *chunks[0])

    def plan_step(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> GroupPlan:
        """Plan the new tokens of each request. Nothing changes: it is all that a skipped step does.

        Parameters
        ----------
        ids, query_lens, pad
            As `RankBook.plan_step` takes them.

        Returns
        -------
        GroupPlan

        Raises
        ------
        Refused
            As `Ledger.plan_step`, for what all groups take together.
        """
        lens = [1] * len(ids) if query_lens is None else query_lens
        first, *others = self._ledgers
        rows, counts = first.check_step(ids, lens, pad)
        if sum(lens) > len(lens):  # no ledger is to deal what its pools could never hold
            for ledger in others:
                ledger.check_step(ids, lens, pad)
        plan = GroupPlan(ledger.deal(rows, counts, pad) for ledger in self._ledgers)
        self._check_pages([step.pages for step in plan])
        return plan

    def advance(self, plan: GroupPlan) -> dict[str, RankStep]:
        """Apply a step planned against the present state, and return what this rank sees of it.

        Parameters
        ----------
        plan : GroupPlan

        Returns
        -------
        dict of str to RankStep
            By group. What leaves a window is given back by `drop`, once the step is attended to.
        """
        books = self.books.items()
        return {name: book.advance(step) for (name, book), step in zip(books, plan, strict=True)}

    def decode_step(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> dict[str, RankStep]:
        """Plan and apply a step, and return what this rank sees of it.

        Parameters
        ----------
        ids, query_lens, pad
            As `plan_step` takes them.

        Returns
        -------
        dict of str to RankStep
            By group.

        Raises
        ------
        Refused
            As `plan_step`.
        """
        plan = self.plan_step(ids, query_lens, pad)
        steps = self.advance(plan)
        self.drop(plan.rows)
        return steps

    def drop(self, rows: Ints) -> None:
        """Give back the pages of every group that no later query of these requests sees.

        Parameters
        ----------
        rows : ndarray, int64 [n]
            Rows of requests, each once.
        """
        if self._windows:
            next_queries = self.ledger.next_queries(rows)
            for book in self._windows:
                book.drop(rows, next_queries)

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
        """Rewind a request's open group of tokens to its first ones, in every cache group.

        Parameters
        ----------
        id : int
        kept : int
            Tokens that stay.

        Raises
        ------
        Refused
            As `Ledger.plan_accept`, by the first cache group and before anything changes.
        """
        for book in self.books.values():
            book.accept(id, kept)

    def cancel(self, ids: Sequence[int]) -> None:
        """Undo the last step of live requests, after which nothing else has changed them.

        Parameters
        ----------
        ids : sequence of int
        """
        for book in self.books.values():
            book.cancel(ids)

    def sampled(self, ids: Sequence[int]) -> None:
        """Count the oldest outstanding decode of each request as sampled.

        Parameters
        ----------
        ids : sequence of int

        Raises
        ------
        Refused
            As `Ledger.sampled`, by the first cache group and before anything changes.
        """
        for ledger in self._ledgers:
            ledger.sampled(ids)

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
            As `RankBook.fork`, by the first cache group and before anything changes.
        """
        for book in self.books.values():
            book.fork(parent, child)

    def preempt(self, id: int) -> None:
        """Free the pages of a live request, which stays known.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            As `RankBook.preempt`, by the first cache group and before anything changes.
        """
        for book in self.books.values():
            book.preempt(id)

    def release(self, id: int) -> None:
        """End a request, live or preempted; pages that no other request holds are free.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            As `RankBook.release`, by the first cache group and before anything changes.
        """
        for book in self.books.values():
            book.release(id)

    def _check_pages(self, needs: Sequence[Ints]) -> None:
        """Raise unless every pool has the pages that its groups take together."""
        for name, places in self._places.items():
            free = self.pools[name].free
            first, *more = (needs[place] for place in places)
            check_pages(sum(more, first), free, name)
