"""Which pages several requests hold after a fork, in counters: no page has a number here.

A fork shares every page on every rank. The full ones are never written again, and a request
releases all of them at once: requests that begin alike have a common `Stem`, the full pages of
their shared prefix. The open ones, partly filled, each have a tag with its number of holders, since
a request leaves them one by one when it writes. So forks, copies and releases cost the same
whatever the number of tokens cached.
"""

from __future__ import annotations

from collections import Counter
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
class Stem:
    """The full pages of a prefix that several requests share, on the ranks.

    Parameters
    ----------
    pages : tuple of int, [cp_size]
        Pages on each rank, those of the shorter prefixes below included.
    below : Stem or None
        The longest shorter prefix that is shared, too.
    holders : int
        Requests and longer prefixes that stand on this one directly.
    """

    pages: tuple[int, ...]
    """[cp_size] pages on each rank, those of the stems below included."""
    below: Stem | None
    holders: int
    """Requests and stems that stand on this one directly."""


def branch(stem: Stem | None, pages: tuple[int, ...]) -> Stem | None:
    """Return the shared prefix of a request and of its new fork.

    Parameters
    ----------
    stem : Stem or None
        The shared prefix that the request had before.
    pages : tuple of int, [cp_size]
        Full pages of the request on each rank.

    Returns
    -------
    Stem or None
        None when there is no full page at all.
    """
    while stem is not None and stem.holders == 1:
        stem = stem.below  # nobody else stands there: these pages are the request's own
    _join_lone(stem)
    if stem is None or stem.pages != pages:
        return Stem(pages, stem, 2) if any(pages) else None
    stem.holders += 1
    return stem


def let_go(stem: Stem | None) -> Stem | None:
    """Count one holder less of a shared prefix, and return the part of it that others still hold.

    Parameters
    ----------
    stem : Stem or None
        The shared prefix of a request that ends.

    Returns
    -------
    Stem or None
    """
    while stem is not None:
        stem.holders -= 1
        if stem.holders:
            return stem
        stem = stem.below
    return None


def _join_lone(stem: Stem | None) -> None:
    """Let each stem swallow those on which it alone stands: no more stems than requests."""
    while stem is not None:
        while stem.below is not None and stem.below.holders == 1:
            stem.below = stem.below.below
        stem = stem.below
