"""Which physical pages of one rank's pool are free."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out the page numbers of one pool; the page returned last is taken first.

    Pages never taken are a counter rather than a list, so a large pool costs nothing.

    Parameters
    ----------
    pages : int
        Pages of the pool, numbered from 0.

    Examples
    --------
    >>> allocator = PageAllocator(4)
    >>> allocator.take(3)
    [0, 1, 2]
    >>> allocator.give_back([1])
    >>> allocator.take(2), allocator.free
    ([1, 3], 0)
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._untouched = 0
        self._returned: list[int] = []
        self._holders: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Return the number of pages that can be taken."""
        return self.pages - len(self._holders)

    def take(self, count: int) -> list[int]:
        """Take pages and return their numbers.

        Parameters
        ----------
        count : int
            How many.

        Raises
        ------
        RuntimeError
            When fewer are free; none is taken.
        """
        if count > self.free:
            raise RuntimeError(
                f"{count} pages were asked for and {self.free} are free; the ledger should have "
                "refused the event."
            )
        if not count:
            return []  # most steps open no page here
        reused = min(count, len(self._returned))
        fresh = count - reused
        taken = [self._returned.pop() for _ in range(reused)]
        taken += range(self._untouched, self._untouched + fresh)
        self._untouched += fresh
        self._holders.update(dict.fromkeys(taken, 1))
        return taken

    def share(self, pages: Iterable[int]) -> None:
        """Count one more holder of each of these pages, which are taken.

        Parameters
        ----------
        pages : iterable of int
        """
        for page in pages:
            self._holders[page] += 1

    def set_aside(self, pages: Iterable[int]) -> None:
        """Let pages that have one holder be free, and given to nobody before `let_go`.

        Parameters
        ----------
        pages : iterable of int
        """
        for page in pages:
            del self._holders[page]

    def retake(self, pages: Iterable[int]) -> None:
        """Take pages that were set aside.

        Parameters
        ----------
        pages : iterable of int
        """
        self._holders.update(dict.fromkeys(pages, 1))

    def let_go(self, pages: Iterable[int]) -> None:
        """Let pages that were set aside be given to anyone.

        Parameters
        ----------
        pages : iterable of int
        """
        self._returned.extend(pages)

    def give_back(self, pages: Iterable[int]) -> None:
        """Count one holder less of each of these pages; a page without holders is free.

        Parameters
        ----------
        pages : iterable of int

        Raises
        ------
        RuntimeError
            Unless each is taken and appears once; none is given back.
        """
        pages, holders = list(pages), self._holders
        # A difference of sets would look at every page of the pool that is taken.
        if not all(map(holders.__contains__, pages)) or len(set(pages)) != len(pages):
            wrong = sorted(set(pages).difference(holders))
            raise RuntimeError(
                f"Pages {pages} were given back, of which {wrong} are not taken; each "
                "page must be taken and appear once."
            )
        for page in pages:
            left = holders[page] - 1
            if left:
                holders[page] = left
            else:
                del holders[page]
                self._returned.append(page)
