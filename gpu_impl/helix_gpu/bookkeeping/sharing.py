"""Which pages several requests hold after a fork, in counters: no page has a number here.

A fork shares every page on every rank. The full ones are never written again, and a request gives
up all of them at once: requests that begin alike stand on one `Stem`. The open ones, partly
filled, each have a tag with its number of holders, since a request leaves them one by one when it
writes. So forks, copies and releases cost the same whatever the number of tokens cached.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field


@dataclass(slots=True)
class OpenPages:
    """Holders of the open pages that were shared, by tag. Tag 0 is a page never shared."""

    holders: dict[int, int] = field(default_factory=dict)
    tags: int = 0
    """Tags given out so far."""

    def join(self, tag: int) -> int:
        """One more request holds the page of this tag; the tag that it has from now on."""
        if not tag:
            self.tags += 1
            tag = self.tags
        self.holders[tag] = self.holders.get(tag, 1) + 1
        return tag

    def leave(self, tag: int) -> bool:
        """A request lets go of the page, or makes it its own; whether others still hold it."""
        self.holders[tag] -= 1
        if self.holders[tag]:
            return True
        del self.holders[tag]
        return False

    def must_copy(self, tags: Sequence[int]) -> list[bool]:
        """Whether these writers, one after the other, find other holders in their page.

        The last of all the holders finds none: the others have copied and left.
        """
        left = Counter[int]()
        copies = []
        for tag in tags:
            left[tag] += 1
            copies.append(left[tag] < self.holders[tag])
        return copies


@dataclass(slots=True)
class Stem:
    """Full pages that several requests begin with, on the ranks together with those `below`."""

    pages: tuple[int, ...]
    """[cp_size] pages on each rank, those of the stems below included."""
    below: Stem | None
    holders: int
    """Requests and stems that stand on this one directly."""


def branch(stem: Stem | None, pages: tuple[int, ...]) -> Stem | None:
    """The stem of a request and of its new fork, when the request has these full pages.

    `stem` is the one that the request stood on. None when there is no full page at all.
    """
    while stem is not None and stem.holders == 1:
        stem = stem.below  # nobody else stands there: these pages are the request's own
    _join_lone(stem)
    if stem is None or stem.pages != pages:
        return Stem(pages, stem, 2) if any(pages) else None
    stem.holders += 1
    return stem


def let_go(stem: Stem | None) -> Stem | None:
    """A request leaves its stem; the part of it that others still hold."""
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
