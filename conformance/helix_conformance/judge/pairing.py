"""Which physical page stands for which page of the model.

Page numbers are an engine's own business. The suite demands that the pairing of its pages with
the model's is one to one and stays: that alone holds PAGE-2 and GROW-1, sharing by fork and copy
on write included.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Final

from helix_conformance.judge.failure import Violation
from helix_reference.model import Page

UNPAIRED: Final = -(2**62)
"""Stands for a page that no physical page stands for yet: no slot is in it."""


class Pairing:
    """Which physical page of one rank stands for which page of the model.

    `pool` is the number of pages that the rank has, None for an engine that allocates none.
    """

    def __init__(self, pool: int | None) -> None:
        self.pool = pool
        self.twins: dict[int, Page] = {}
        self.numbers: dict[Page, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.stood_for: dict[int, list[Page]] = {}
        """Each request's block table and the model's pages, as last seen: to look again only at
        what changed."""

    def number(self, twin: Page) -> int:
        """The physical page that stands for this page of the model; UNPAIRED when none does."""
        return self.numbers.get(twin, UNPAIRED)

    def knows(
        self, ids: Sequence[int], tables: dict[int, list[int]], twins: Sequence[list[Page]]
    ) -> bool:
        """Whether these requests, with these `twins`, have the block tables that they had.

        They stand for the same pages then as when they were last looked at.
        """
        return (
            [*tables] == ids
            and [*tables.values()] == [*map(self.tables.get, ids)]
            and twins == (*map(self.stood_for.get, ids),)
        )

    def changed(self, tables: dict[int, list[int]], twins: dict[int, list[Page]]) -> list[int]:
        """Those of the requests with these `twins` of which this is not so."""
        return [
            id
            for id, pages in twins.items()
            if self.tables.get(id) != tables.get(id, []) or self.stood_for.get(id) != pages
        ]

    def table(self, rank: int, id: int, table: list[int], twins: list[Page]) -> Iterator[Violation]:
        """One request's block table, when it has changed."""
        for page, twin in zip(table, twins, strict=False):
            if self.twins.get(page) is not twin:
                yield from self.pair(rank, id, page, twin)
        extra = table[len(twins) :]
        if len(set(table)) < len(table) or any(page in self.live() for page in extra):
            what = f"block table of request {id}"
            yield Violation("PAGE-2", what, "pages of its own", table, rank, id)
        self.tables[id], self.stood_for[id] = list(table), list(twins)

    def pair(
        self, rank: int, id: int, page: int, twin: Page, *, written: bool = False
    ) -> Iterator[Violation]:
        """One page: in the pool, and the same page as before, nobody else's."""
        if page < 0 or (self.pool is not None and page >= self.pool):
            yield Violation(
                "PAGE-1",
                f"page of request {id}, in the rank's pool",
                f"at least 0 and below {self.pool}",
                page,
                rank,
                id,
            )
            return
        stood_for, number = self.twins.get(page), self.numbers.get(twin)
        if stood_for is twin:
            return
        if number is not None:
            what = f"page that holds tokens of request {id}"
            yield Violation("GROW-1", what, number, page, rank, id)
        if stood_for is not None and stood_for.holders > 0:
            what = (
                f"request {id} {'writes into' if written else 'holds'} a page that is not its own"
            )
            yield Violation("PAGE-2", what, number, page, rank, id)
            if written:
                what = f"request {id} overwrites tokens in a page that is not its own"
                yield Violation("OWN-1", what, number, page, rank, id)
            return
        if stood_for is not None:
            self.numbers.pop(stood_for, None)
        self.twins[page], self.numbers[twin] = twin, page

    def forget(self, id: int) -> None:
        """A request was released."""
        self.tables.pop(id, None)
        self.stood_for.pop(id, None)

    def live(self) -> set[int]:
        """Physical pages that stand for a page in use."""
        return {page for page, twin in self.twins.items() if twin.holders > 0}
