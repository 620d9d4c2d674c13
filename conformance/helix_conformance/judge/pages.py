"""Profile `pages`: which physical page is which page of the model (PAGE-1 to 3, GROW-1, OWN-1).

Page numbers are an engine's own business. The suite demands that the mapping of its pages to the
model's is one to one and stays: that alone holds PAGE-2 and GROW-1, sharing by fork and copy on
write included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from helix_conformance.expect.expectation import Expectation, Page, State
from helix_conformance.judge.failure import Violation
from helix_spec import invariants
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Decode, ids_by_token

UNMAPPED: Final = -(2**62)
"""Number of a model page that no physical page is mapped to yet: no slot is in it."""


class PageMap:
    """Which physical page of one rank is which page of the model.

    Parameters
    ----------
    pool
        Number of pages that the rank has; None for an engine that allocates none.
    beside
        The map of another cache group that takes pages from the same pool.
    """

    def __init__(self, pool: int | None, beside: PageMap | None = None) -> None:
        self.pool = pool
        self.model_pages: dict[int, Page] = beside.model_pages if beside else {}
        self.numbers: dict[Page, int] = beside.numbers if beside else {}
        self.tables: dict[int, list[int]] = {}
        self.expected: dict[int, Sequence[Page]] = {}
        """Each request's block table and the model's, as last seen: to look again only at what
        changed."""
        self.unseen = False
        """Whether pages may have changed hands unseen, so that what free ones hold is not known."""

    def knows(
        self, ids: list[int], tables: dict[int, list[int]], expected: Sequence[Sequence[Page]]
    ) -> bool:
        """Return whether requests have the block tables that they had, and should have them.

        Parameters
        ----------
        ids
            Requests in the order in which the rank should name them.
        tables
            The rank's block tables, page numbers by request.
        expected
            For each of the requests, the model's pages.
        """
        return (
            [*tables] == ids
            and [*tables.values()] == [*map(self.tables.get, ids)]
            and expected == (*map(self.expected.get, ids),)
        )

    def table(
        self, rank: int, id: int, table: list[int], expected: Sequence[Page]
    ) -> Iterator[Violation]:
        """Yield PAGE-1, PAGE-2 and GROW-1 of one request's block table.

        Parameters
        ----------
        rank
            Global rank, to name in a violation.
        id
            The request.
        table
            Page numbers that the rank tells.
        expected
            The model's pages, in the same order.
        """
        if self.tables.get(id) == table and self.expected.get(id) == expected:
            return
        if len(table) != len(expected):
            what = f"pages of request {id}"
            yield Violation("PAGE-1", what, len(expected), len(table), rank, id)
        for place, (number, page) in enumerate(zip(table, expected, strict=False)):
            if (number < 0) != (page.number < 0):
                what = f"page {place} of request {id}, which some later query can see"
                right = f"a page of the {'pool' if page.number >= 0 else 'pool no more, -1'}"
                if page.number < 0:
                    what = f"page {place} of request {id}, which no later query can see"
                yield Violation("WIN-2", what, right, number, rank, id)
            elif number >= 0 and self.model_pages.get(number) is not page:
                yield from self.map(rank, id, number, page)
        extra, held = table[len(expected) :], [number for number in table if number >= 0]
        if len(set(held)) < len(held) or any(number in self.in_use() for number in extra):
            what = f"block table of request {id}"
            yield Violation("PAGE-2", what, "pages of its own", table, rank, id)
        self.tables[id], self.expected[id] = list(table), list(expected)

    def map(
        self, rank: int, id: int, number: int, page: Page, *, written: bool = False
    ) -> Iterator[Violation]:
        """Map one page: it must be in the pool, the same page as before, and nobody else's.

        Parameters
        ----------
        rank
            Global rank, to name in a violation.
        id
            The request that holds the page.
        number
            The physical page.
        page
            The model's page.
        written
            Whether a token was written into it: then another request's page is overwritten (OWN-1).

        Yields
        ------
        Violation
            PAGE-1, GROW-1, PAGE-2 or OWN-1. A page that is somebody else's is not mapped.
        """
        if number < 0 or (self.pool is not None and number >= self.pool):
            what = f"page of request {id}, in the rank's pool"
            right = f"at least 0 and below {self.pool}"
            yield Violation("PAGE-1", what, right, number, rank, id)
            return
        before, known = self.model_pages.get(number), self.numbers.get(page)
        if before is page:
            return
        if known is not None:
            what = f"page that holds tokens of request {id}"
            yield Violation("GROW-1", what, known, number, rank, id)
        if before is not None and before.holders > 0:
            does = "writes into" if written else "holds"
            what = f"request {id} {does} a page that is not its own"
            yield Violation("PAGE-2", what, known, number, rank, id)
            if written:
                what = f"request {id} overwrites tokens in a page that is not its own"
                yield Violation("OWN-1", what, known, number, rank, id)
            return
        held = set(() if before is None else before.contents)
        if page.found and known is None and not self.unseen and held.isdisjoint(page.contents):
            # Found though nobody held it: it must be the page that had these tokens last.
            what = f"free page in which tokens of request {id} were found"
            yield Violation("HIT-4", what, "one that still holds them", number, rank, id)
        if before is not None:
            self.numbers.pop(before, None)
        self.model_pages[number], self.numbers[page] = page, number

    def forget(self, id: int) -> None:
        """Forget a request that was released.

        Parameters
        ----------
        id
            The request.
        """
        self.tables.pop(id, None)
        self.expected.pop(id, None)

    def in_use(self) -> set[int]:
        """Return the physical pages that are mapped to a page in use."""
        return {number for number, page in self.model_pages.items() if page.holders > 0}


class PagesJudge:
    """PAGE-1, PAGE-2, PAGE-3, GROW-1, and OWN-1 by the slots that ranks name.

    Parameters
    ----------
    config
        A legal configuration, with which the ranks were started.
    profiles
        Those that are checked; without `pages` the pools have no end.
    maps
        Of a cache group, which shares its pools, a map for each rank.
    """

    def __init__(
        self, config: Config, profiles: frozenset[str], maps: list[PageMap] | None = None
    ) -> None:
        self.t = config.layout.tokens_per_block
        self.cp = config.layout.cp_size
        self.config = config
        pools = config.pages if "pages" in profiles else [None] * self.cp
        self.shared = maps is not None
        self.maps = maps or [PageMap(pools[rank % self.cp]) for rank in range(config.world_size)]

    def forget(self, id: int) -> None:
        """Forget a request that was released.

        Parameters
        ----------
        id
            The request.
        """
        for page_map in self.maps:
            page_map.forget(id)

    def pass_over(self) -> None:
        """Take note that an event was accepted after which no state was looked at."""
        for page_map in self.maps:
            page_map.unseen = True

    def slots(self, expected: Expectation) -> list[list[int]]:
        """Return the slots that each rank should name, as far as its pages are known.

        Parameters
        ----------
        expected
            The expectation of an accepted decode.

        Returns
        -------
        list of list of int
            By global rank and token, page number times T plus offset; -1 for a token of another
            rank, below -1 where no physical page is mapped yet.
        """
        assert expected.decoded is not None
        owners, places = expected.decoded.owners, expected.decoded.slots
        slots = [[-1] * len(owners) for _ in self.maps]
        for token, (owner, (page, offset)) in enumerate(zip(owners, places, strict=True)):
            for rank in range(owner, len(self.maps), self.cp):
                number = self.maps[rank].numbers.get(page, UNMAPPED)
                slots[rank][token] = number * self.t + offset
        return slots

    def written(
        self, expected: Expectation, state: State | None, outcomes: Sequence[Outcome]
    ) -> Iterator[Violation]:
        """Yield OWN-1 unless each new token is written once, at its index, in its request's page.

        Parameters
        ----------
        expected
            The expectation of an accepted decode.
        state
            The latest state that is expected, to see whose token is overwritten; None for unknown.
        outcomes
            Outcome of each rank, by global rank.
        """
        event, decoded = expected.event, expected.decoded
        assert isinstance(event, Decode) and decoded is not None
        columns = decoded.position_ids, decoded.owners, decoded.slots
        tokens = zip(ids_by_token(event), *columns, strict=True)
        for token, (id, position, owner, (page, offset)) in enumerate(tokens):
            for first in range(0, len(outcomes), self.cp):
                slots = [o.slots[token] for o in outcomes[first : first + self.cp]]
                if [rank for rank, slot in enumerate(slots) if slot >= 0] != [owner]:
                    where = f"the token at position {position} of request {id}"
                    yield from self._written_elsewhere(where, first, owner, slots, id, state)
                if slots[owner] >= 0:
                    rank, (number, given) = first + owner, divmod(slots[owner], self.t)
                    if given != offset:
                        index = decoded.visible[token][owner] - 1
                        what = f"offset in its page of local index {index} of request {id}"
                        yield Violation("OWN-1", what, offset, given, rank, id)
                    yield from self.maps[rank].map(rank, id, number, page, written=True)

    def _written_elsewhere(
        self, where: str, first: int, owner: int, slots: list[int], id: int, state: State | None
    ) -> Iterator[Violation]:
        """A token that is not written on its owner alone, in the cp_size ranks from `first` on."""
        if sum(slot >= 0 for slot in slots) != 1:
            what = f"slots in which the ranks wrote {where}"
            yield Violation("OWN-1", what, "one slot", slots, None, id)
        for rank, slot in enumerate(slots, first):
            if slot >= 0 and rank != first + owner and self._holds_a_token(rank, slot, state):
                what = f"slot in which {where} was written"
                yield Violation("OWN-1", what, "free", slot, rank, id)

    def _holds_a_token(self, rank: int, slot: int, state: State | None) -> bool:
        """Whether a token of a live request should be in this slot."""
        page, cp_rank = self.maps[rank].model_pages.get(slot // self.t), rank % self.cp
        if page is None or state is None:
            return False
        for id in state.live:
            table = list(state.tables(id)[cp_rank])
            if page in table:
                return table.index(page) * self.t + slot % self.t < state.lengths(id)[cp_rank]
        return False

    def held(
        self, state: State, views: Sequence[RankView], ids: list[int], *, whole: bool
    ) -> Iterator[Violation]:
        """Yield PAGE-1, PAGE-2 and GROW-1 of block tables, and PAGE-3.

        Parameters
        ----------
        state
            The state that is expected.
        views
            State of each rank, by global rank.
        ids
            Live requests that the views should tell of.
        whole
            Whether they are all live ones: then their pages and the free ones make up the pool.
        """
        tables = list(zip(*map(state.tables, ids), strict=True)) or [()] * self.cp
        free_pages = state.free_pages
        for rank, view in enumerate(views):
            page_map, expected = self.maps[rank], tables[rank % self.cp]
            wrong = list[Violation]()
            if not page_map.knows(ids, view.block_tables, expected):
                for id in view.local_len:
                    right = state.tables(id)[rank % self.cp]
                    wrong += page_map.table(rank, id, view.block_tables.get(id, []), right)
                for id in sorted(view.block_tables.keys() - set(ids)):
                    what = f"block table of request {id}, which is not live"
                    wrong.append(Violation("PAGE-1", what, None, view.block_tables[id], rank, id))
                yield from wrong
            if self.shared:
                continue  # `GroupsJudge` counts the pages of all groups
            free = free_pages[rank % self.cp]
            if whole or view.free_pages != free:
                yield from self._free(rank, view, free, explained=whole and bool(wrong))

    def _free(
        self, rank: int, view: RankView, free: int, *, explained: bool
    ) -> Iterator[Violation]:
        """PAGE-3 on one rank; where the free pages are right, the view is of all live requests.

        `explained`: its tables are wrong, which is all that is wrong if they fit its free pages.
        """
        pool = self.config.pages[rank % self.cp]
        if explained and invariants.page_3(view.free_pages, view.block_tables, pool):
            return
        if view.free_pages != free:
            yield Violation("PAGE-3", "free pages", free, view.free_pages, rank)
        elif not invariants.page_3(free, view.block_tables, pool):
            used = len({page for table in view.block_tables.values() for page in table})
            yield Violation("PAGE-3", "distinct pages in block tables", pool - free, used, rank)
