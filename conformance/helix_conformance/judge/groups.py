"""Profiles `groups` and `window`: each cache group by itself, and the pools that they share.

A group is judged as if it were all that is cached (SPEC.md section 4.2); of a replicated one, each
cp_rank as an engine of its own. That alone holds most of REP-1 and WIN-1.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import msgspec

from helix_conformance.drive.asking import MalformedAnswer
from helix_conformance.drive.driver import Answer
from helix_conformance.expect.expectation import Expectation, Part
from helix_conformance.judge.failure import Violation
from helix_conformance.judge.pages import PageMap
from helix_spec.config import MAIN_POOL, CacheGroup, Config
from helix_spec.engine import RankView


class _Judge(Protocol):
    """Judges an engine whose only cache is one group: `judge.Judge`."""

    def event(self, expected: Expectation, answers: Sequence[Answer]) -> list[Violation]: ...

    def finished(self, answers: Sequence[Answer]) -> list[Violation]: ...


class GroupsJudge:
    """All invariants of each cache group, REP-1, WIN-1, POOL-1, and PAGE-3 of each pool.

    Parameters
    ----------
    config
        A legal configuration with cache groups.
    profiles
        Those that are checked.
    judge_of
        Returns the judge of an engine whose only cache is one group, with these maps of pages.
    """

    def __init__(
        self,
        config: Config,
        profiles: frozenset[str],
        judge_of: Callable[[Config, list[PageMap]], _Judge],
    ) -> None:
        self.config, self.profiles, self.judge_of = config, profiles, judge_of
        self.parts: list[_PartJudge] = []
        self.last: Sequence[Part] = ()

    def event(self, expected: Expectation, answers: Sequence[Answer]) -> list[Violation]:
        """Return what is wrong with the columns and states of an event.

        Parameters
        ----------
        expected
            The event's expectation, with its `parts`.
        answers
            Answer of each rank, by global rank.
        """
        if not self.parts:
            self.parts = list(self._judges(expected.parts))
        self.last = expected.parts
        found = [
            violation
            for judge, part in zip(self.parts, expected.parts, strict=True)
            for violation in judge.event(part.expected, answers)
        ]
        return found + list(self._pools(answers))

    def finished(self, answers: Sequence[Answer]) -> list[Violation]:
        """Return what is wrong with the states at the end; see `Judge.finished`."""
        found = [violation for judge in self.parts for violation in judge.finished(answers)]
        return found + list(self._pools(answers))

    def _judges(self, parts: Sequence[Part]) -> Iterator[_PartJudge]:
        maps: dict[tuple[str, int], PageMap] = {}
        for part in parts:
            group, c = part.group, self.config.layout.cp_size
            ranks = range(self.config.world_size)
            if part.cp_rank is not None:
                ranks = ranks[part.cp_rank :: c]
            sizes = self.config.pool_sizes(group.pool)
            own = list[PageMap]()
            for rank in ranks:
                size = sizes[rank % c] if "pages" in self.profiles else None
                beside = maps.setdefault((group.pool, rank), PageMap(size))
                own.append(PageMap(size, beside))
            alone = self.config.alone(group, part.cp_rank or 0)
            yield _PartJudge(part, ranks, self.judge_of(alone, own))

    def _pools(self, answers: Sequence[Answer]) -> Iterator[Violation]:
        """PAGE-3 and POOL-1, of views that tell of all live requests."""
        views = [answer.view for answer in answers if answer.view is not None]
        if "pages" not in self.profiles or len(views) < len(answers) or not self.last:
            return
        state = self.last[0].expected.state
        live = set(state.live) if state is not None else None
        for rank, view in enumerate(views):
            whole = all(one.local_len.keys() == live for one in view.groups.values())
            for pool in (MAIN_POOL, *self.config.pools):
                yield from self._pool(rank, pool, view, whole=whole)

    def _pool(self, rank: int, pool: str, view: RankView, *, whole: bool) -> Iterator[Violation]:
        cp_rank = rank % self.config.layout.cp_size
        groups = [group for group in self.config.groups if group.pool == pool]
        free = view.free_pages if pool == MAIN_POOL else view.pools.get(pool)
        expected = _free_pages(self.last, groups[0], cp_rank)
        numbers = ["PAGE-3"] + ["POOL-1"] * (len(groups) > 1)
        if expected is not None and free != expected:
            what = f"free pages of the pool {pool}"
            yield from (Violation(number, what, expected, free, rank) for number in numbers)
            return
        held: dict[int, set[str]] = {}
        for group in groups:
            for table in view.groups[group.name].block_tables.values():
                for page in table:
                    held.setdefault(page, set()).add(group.name)
        held.pop(-1, None)
        for page, names in held.items():
            if len(names) > 1:
                what = f"cache groups that hold page {page} of the pool {pool}"
                yield Violation("POOL-1", what, "one", sorted(names), rank)
        size = self.config.pool_sizes(pool)[cp_rank]
        if whole and free is not None and len(held) + free != size:
            what = f"distinct pages of the pool {pool} in block tables"
            yield from (Violation(number, what, size - free, len(held), rank) for number in numbers)


class _PartJudge:
    """Judges one cache group, or one cp_rank of a replicated one.

    Parameters
    ----------
    part
        What is expected of it, for its group and rank.
    ranks
        The global ranks that are asked.
    judge
        Judges them as an engine whose only cache is this group.
    """

    def __init__(self, part: Part, ranks: range, judge: _Judge) -> None:
        self.group, self.is_copy = part.group, part.cp_rank is not None
        self.ranks, self.judge = ranks, judge

    def event(self, expected: Expectation, answers: Sequence[Answer]) -> Iterator[Violation]:
        """Yield what is wrong with the group after an event."""
        return self._named(self.judge.event(expected, self._own(answers)))

    def finished(self, answers: Sequence[Answer]) -> Iterator[Violation]:
        """Yield what is wrong with the group's state at the end."""
        return self._named(self.judge.finished(self._own(answers)))

    def _own(self, answers: Sequence[Answer]) -> list[Answer]:
        """What the ranks answer for this group."""
        own = list[Answer]()
        for rank in self.ranks:
            outcome, view = answers[rank].outcome, answers[rank].view
            try:
                outcome = outcome.of_group(self.group.name)
                view = view and view.of_group(self.group.name)
            except KeyError as error:
                raise MalformedAnswer(f"its answer lacks the cache group {error}", rank) from error
            own.append(Answer(outcome, view))
        return own

    def _named(self, found: Sequence[Violation]) -> Iterator[Violation]:
        for one in found:
            violation = msgspec.structs.replace(
                one,
                message=f"cache group {self.group.name}: {one.message}",
                rank=None if one.rank is None else self.ranks[one.rank],
            )
            yield violation
            if self.group.window is not None and one.invariant == "LEN-3":
                yield msgspec.structs.replace(violation, invariant="WIN-1")
            if self.is_copy:
                yield msgspec.structs.replace(violation, invariant="REP-1")


def _free_pages(parts: Sequence[Part], group: CacheGroup, cp_rank: int) -> int | None:
    """The free pages that a rank should have in the pool of a group; None where no state is."""
    for part in parts:
        state = part.expected.state
        if part.group == group and part.cp_rank in (None, cp_rank) and state is not None:
            return state.free_pages[cp_rank if part.cp_rank is None else 0]
    return None
