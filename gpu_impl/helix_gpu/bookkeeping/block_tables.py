"""Block tables of one rank: the physical pages of each request, in local order."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class BlockTables:
    """A table of page numbers that grows by doubling: a row for each request.

    It does not know how long the rows are. Entries past a request's last page are stale, yet always
    numbers of pages that exist, or -1 where a window has left one behind.

    Examples
    --------
    >>> tables = BlockTables()
    >>> tables.begin(0, [5, 2])
    >>> tables.write(np.array([0]), np.array([2]), [7])
    >>> tables.lists(np.array([0]), np.array([3]))
    [[5, 2, 7]]
    """

    def __init__(self) -> None:
        self._pages: Ints = np.zeros((0, 0), dtype=np.int64)

    def begin(self, row: int, pages: Sequence[int]) -> None:
        """Begin a request's row with these pages.

        Parameters
        ----------
        row : int
        pages : sequence of int
        """
        self._grow(row + 1, len(pages))
        self._pages[row, : len(pages)] = pages

    def write(self, rows: Ints, columns: Ints, pages: Sequence[int]) -> None:
        """Write `pages[i]` at local page `columns[i]` of row `rows[i]`, which has begun.

        Parameters
        ----------
        rows, columns : ndarray, int64 [n]
        pages : sequence of int, [n]
        """
        self._grow(0, int(columns.max(initial=-1)) + 1)
        self._pages[rows, columns] = pages

    def read(self, rows: Ints, width: int) -> Ints:
        """Return the first pages of rows that have begun; stale past their last.

        Parameters
        ----------
        rows : ndarray, int64 [n]
        width : int
            Pages of each.

        Returns
        -------
        ndarray, int64 [n, width]
        """
        self._grow(0, width)
        return self._pages[:, :width][rows]

    def read_from(self, rows: Ints, firsts: Ints, width: int) -> Ints:
        """Return pages of rows from a local page on; past their last some page that exists.

        Parameters
        ----------
        rows, firsts : ndarray, int64 [n]
            Rows that have begun, and the first local page of each, which no window has left behind.
        width : int
            Pages of each.

        Returns
        -------
        ndarray, int64 [n, width]
        """
        self._grow(0, int(firsts.max(initial=0)) + width)
        pages: Ints = self._pages[rows[:, None], firsts[:, None] + np.arange(width)]
        return np.maximum(pages, 0)

    def lists(self, rows: Ints, widths: Ints) -> list[list[int]]:
        """Return the first `widths[i]` pages of row `rows[i]`, which have been written.

        Parameters
        ----------
        rows, widths : ndarray, int64 [n]

        Returns
        -------
        list of list of int
        """
        table = self._pages
        return [table[r, :n].tolist() for r, n in zip(rows.tolist(), widths.tolist(), strict=True)]

    def part(self, row: int, first: int, end: int) -> list[int]:
        """Return the pages at local pages [first, end) of a row, which have been written.

        Parameters
        ----------
        row, first, end : int

        Returns
        -------
        list of int
        """
        pages: list[int] = self._pages[row, first:end].tolist()
        return pages

    def clear(self, row: int, first: int, end: int) -> list[int]:
        """Return the same pages, and let -1 stand in their places.

        Parameters
        ----------
        row, first, end : int

        Returns
        -------
        list of int
        """
        pages = self.part(row, first, end)
        self._pages[row, first:end] = -1
        return pages

    def copy(self, source: int, row: int) -> None:
        """Begin a row as a copy of another.

        Parameters
        ----------
        source : int
            Row that is copied.
        row : int
            Row that begins.
        """
        self._grow(row + 1, 0)
        self._pages[row] = self._pages[source]

    def page(self, rows: Ints, columns: Ints) -> Ints:
        """Return the page at local page `columns[i]` of row `rows[i]`.

        Parameters
        ----------
        rows, columns : ndarray, int64 [n]

        Returns
        -------
        ndarray, int64 [n]
        """
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
