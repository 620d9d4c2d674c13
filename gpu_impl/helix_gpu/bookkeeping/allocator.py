"""Which physical pages of one rank's pool are free."""

from __future__ import annotations

from collections.abc import Iterable


class PageAllocator:
    """Hands out page numbers 0 to pages - 1; the page given back last goes out first.

    Pages never taken are a counter rather than a list, so a large pool costs nothing.
    """

    def __init__(self, pages: int) -> None:
        self.pages = pages
        self._untouched = 0
        self._returned: list[int] = []
        self._holders: dict[int, int] = {}

    @property
    def free(self) -> int:
        """Pages that can be taken."""
        return self.pages - len(self._holders)

    def take(self, count: int) -> list[int]:
        """Take `count` pages. Raises RuntimeError, and takes none, when fewer are free."""
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
        """One more request holds these pages, which are taken."""
        for page in pages:
            self._holders[page] += 1

    def give_back(self, pages: Iterable[int]) -> None:
        """One holder of each lets go; a page is free when the last has.

        Raises RuntimeError, and gives none back, unless each is taken and appears once.
        """
        pages = list(pages)
        wrong = set(pages) - self._holders.keys()
        if wrong or len(set(pages)) != len(pages):
            raise RuntimeError(
                f"Pages {pages} were given back, of which {sorted(wrong)} are not taken; each "
                "page must be taken and appear once."
            )
        for page in pages:
            self._holders[page] -= 1
            if not self._holders[page]:
                del self._holders[page]
                self._returned.append(page)
