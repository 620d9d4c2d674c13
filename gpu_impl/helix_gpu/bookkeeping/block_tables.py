"""Block tables of one rank: the physical pages of each request, in local order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class BlockTables:
    """A table of page numbers that grows by doubling: a row for each request.

    It does not know how long the rows are; entries past a request's last page are stale, yet
    always numbers of pages that exist.
    """

    def __init__(self) -> None:
        self._pages: Ints = np.zeros((0, 0), dtype=np.int64)

    def begin(self, row: int, pages: Sequence[int]) -> None:
        """Let a request's row begin with these pages."""
        self._grow(row + 1, len(pages))
        self._pages[row, : len(pages)] = pages

    def write(self, rows: Ints, columns: Ints, pages: Sequence[int]) -> None:
        """Put `pages[i]` at local page `columns[i]` of row `rows[i]`, which has begun."""
        self._grow(0, int(columns.max(initial=-1)) + 1)
        self._pages[rows, columns] = pages

    def read(self, rows: Ints, width: int) -> Ints:
        """[n, width] the first `width` pages of rows that have begun; stale past their last."""
        self._grow(0, width)
        return self._pages[:, :width][rows]

    def lists(self, rows: Ints, widths: Ints) -> list[list[int]]:
        """The first `widths[i]` pages of row `rows[i]`, which it has been given."""
        table = self._pages
        return [table[r, :n].tolist() for r, n in zip(rows.tolist(), widths.tolist(), strict=True)]

    def copy(self, source: int, row: int) -> None:
        """Let `row` begin as a copy of row `source`."""
        self._grow(row + 1, 0)
        self._pages[row] = self._pages[source]

    def page(self, rows: Ints, columns: Ints) -> Ints:
        """[n] the page at local page `columns[i]` of row `rows[i]`."""
        return self._pages[rows, columns]

    def _grow(self, rows: int, columns: int) -> None:
        old_rows, old_columns = self._pages.shape
        if rows > old_rows or columns > old_columns:
            grown = np.zeros(
                (_doubled(old_rows, rows), _doubled(old_columns, columns)), dtype=np.int64
            )
            grown[:old_rows, :old_columns] = self._pages
            self._pages = grown


def _doubled(size: int, needed: int) -> int:
    return size if needed <= size else max(needed, 2 * size)
