"""Which pages several requests hold after a fork, in counters: no page has a number here.

A fork shares every page on every rank. The full ones are never written again, and a request
releases all of them at once: requests that begin alike have a common `SharedPrefix`. The open ones,
partly filled, each have a tag with its number of holders, since a request leaves them one by one
when it writes. So forks, copies and releases cost the same whatever the number of tokens cached.

Where there is a window, requests leave full pages one by one, too: each has a tag of its own, and a
fork costs by the pages of the window.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class OpenPages:
    """Holders of the open pages that were shared, by tag. Tag 0 is a page never shared.

    Parameters
    ----------
    holders : dict of int to int
        Number of holders by tag.
    tags : int
        Tags given out so far.

    Examples
    --------
    >>> pages = OpenPages()
    >>> tag = pages.join(0)  # a fork: two requests hold the page
    >>> pages.must_copy([tag, tag])  # both write: the last one may write in place
    [True, False]
    """

    holders: dict[int, int] = field(default_factory=dict)
    tags: int = 0
    """Tags given out so far."""

    def join(self, tag: int) -> int:
        """Count one more holder of the page with this tag, and return its tag from now on.

        Parameters
        ----------
        tag : int
            0 if the page was never shared: it is given a new tag.
        """
        if not tag:
            self.tags += 1
            tag = self.tags
        self.holders[tag] = self.holders.get(tag, 1) + 1
        return tag

    def leave(self, tag: int) -> bool:
        """Count one holder less of the page with this tag, and return whether others still hold it.

        Parameters
        ----------
        tag : int
            Of a page that is shared.
        """
        self.holders[tag] -= 1
        if self.holders[tag]:
            return True
        del self.holders[tag]
        return False

    def must_copy(self, tags: Sequence[int]) -> list[bool]:
        """Return whether each of these writers, one after the other, must copy its page first.

        It must while the page has other holders. The last of all the holders need not: the others
        have copied and left.

        Parameters
        ----------
        tags : sequence of int
            Tag of the page that each writer writes into.

        Returns
        -------
        list of bool
        """
        left = Counter[int]()
        copies = []
        for tag in tags:
            left[tag] += 1
            copies.append(left[tag] < self.holders[tag])
        return copies


@dataclass(slots=True)
class SharedWindows:
    """The full pages that requests with a window share on the ranks, those at their front.

    Parameters
    ----------
    pages : OpenPages
        Holders of the pages.
    tags : dict of int to list of deque
        By request and rank, the tags of its pages that were shared, in local order.

    Examples
    --------
    >>> shared = SharedWindows()
    >>> shared.fork(0, 1, [2, 1])  # both now hold two pages of rank 0, and one of rank 1
    >>> shared.drop(0, rank=0, count=1), shared.drop(1, rank=0, count=1)
    (1, 0)
    >>> shared.end(0), shared.end(1)
    ([1, 1], [0, 0])
    """

    pages: OpenPages = field(default_factory=OpenPages)
    tags: dict[int, list[deque[int]]] = field(default_factory=dict)

    def fork(self, source: int, row: int, held: Sequence[int]) -> None:
        """Let a new request share the full pages of another.

        Parameters
        ----------
        source, row : int
            What stands for the two requests.
        held : sequence of int, [cp_size]
            Full pages that the first one holds.
        """
        before = self.tags.get(source) or [deque() for _ in held]
        self.tags[source] = [
            deque(map(self.pages.join, [*tags, *[0] * (count - len(tags))]))
            for tags, count in zip(before, held, strict=True)
        ]
        self.tags[row] = [tags.copy() for tags in self.tags[source]]

    def share(self, row: int, sources: Sequence[int | None], ranks: int) -> None:
        """Let a new request begin with full pages of others, one a rank.

        Parameters
        ----------
        row : int
            What stands for the new request.
        sources : sequence of int or None
            For each place, a request that has the same page there; None where nobody has.
        ranks : int
        """
        mine = self.tags[row] = [deque[int]() for _ in range(ranks)]
        for place, source in enumerate(sources):
            theirs = None
            if source is not None:
                theirs = self.tags.setdefault(source, [deque[int]() for _ in range(ranks)])
            for rank in range(ranks):
                tag = 0
                if theirs is not None:
                    tags = theirs[rank]
                    tags.extend([0] * (place + 1 - len(tags)))
                    tag = tags[place] = self.pages.join(tags[place])
                mine[rank].append(tag)

    def holds_alone(self, row: int, place: int) -> bool:
        """Return whether nobody else holds a request's page at a place, on any rank.

        Parameters
        ----------
        row, place : int
        """
        return all(
            self.pages.holders.get(tags[place], 1) == 1 if place < len(tags) else True
            for tags in self.tags.get(row, [])
        )

    def drop(self, row: int, rank: int, count: int) -> int:
        """Let a request drop its first pages on a rank, and return how many others still hold.

        Parameters
        ----------
        row, rank : int
        count : int
            Pages that it drops.
        """
        tags = self.tags[row][rank] if row in self.tags else deque[int]()
        return sum(self.pages.leave(tags.popleft()) for _ in range(min(count, len(tags))))

    def end(self, row: int) -> list[int]:
        """End a request, and return how many of its pages others still hold, on each rank.

        Parameters
        ----------
        row : int

        Returns
        -------
        list of int
            [cp_size], or of one entry 0 where it shares none.
        """
        ranks = self.tags.pop(row, [])
        return [sum(self.pages.leave(tag) for tag in tags if tag) for tags in ranks] or [0]


@dataclass(slots=True)
class SharedPrefix:
    """The full pages of a prefix that several requests share, on the ranks.

    Parameters
    ----------
    pages : tuple of int, [cp_size]
        Pages on each rank, those of the shorter prefixes below included.
    below : SharedPrefix or None
        The longest shorter prefix that is shared, too.
    holders : int
        Requests and longer prefixes that stand on this one directly.
    """

    pages: tuple[int, ...]
    """[cp_size] pages on each rank, those of the prefixes below included."""
    below: SharedPrefix | None
    holders: int
    """Requests and longer prefixes that stand on this one directly."""


def fork_prefix(prefix: SharedPrefix | None, pages: tuple[int, ...]) -> SharedPrefix | None:
    """Return the shared prefix of a request and of its new fork.

    Parameters
    ----------
    prefix : SharedPrefix or None
        The shared prefix that the request had before.
    pages : tuple of int, [cp_size]
        Full pages of the request on each rank.

    Returns
    -------
    SharedPrefix or None
        None when there is no full page at all.
    """
    while prefix is not None and prefix.holders == 1:
        prefix = prefix.below  # nobody else stands there: these pages are the request's own
    _join_lone(prefix)
    if prefix is None or prefix.pages != pages:
        return SharedPrefix(pages, prefix, 2) if any(pages) else None
    prefix.holders += 1
    return prefix


def release_prefix(prefix: SharedPrefix | None) -> SharedPrefix | None:
    """Count one holder less of a shared prefix, and return the part of it that others still hold.

    Parameters
    ----------
    prefix : SharedPrefix or None
        The shared prefix of a request that ends.

    Returns
    -------
    SharedPrefix or None
    """
    while prefix is not None:
        prefix.holders -= 1
        if prefix.holders:
            return prefix
        prefix = prefix.below
    return None


def _join_lone(prefix: SharedPrefix | None) -> None:
    """Let each prefix absorb those below that it alone holds: no more of them than requests."""
    while prefix is not None:
        while prefix.below is not None and prefix.below.holders == 1:
            prefix.below = prefix.below.below
        prefix = prefix.below
