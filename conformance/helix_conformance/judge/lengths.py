"""Profile `lengths`: how many tokens each rank holds and each query sees (LEN-1 to 3, BAL)."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from itertools import pairwise

from helix_conformance.expect.expectation import Request, State
from helix_conformance.judge.failure import Violation
from helix_conformance.judge.placement import Columns, swapped_ranks
from helix_spec import invariants
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView


class LengthsJudge:
    """LEN-1 to LEN-3, BAL-1, BAL-3, and MAP-1 of what the ranks hold.

    Parameters
    ----------
    config
        A legal configuration, with which the ranks were started.
    profiles
        Those that are checked.
    """

    def __init__(self, config: Config, profiles: frozenset[str]) -> None:
        self.config, self.profiles = config, profiles
        self.layout = config.layout
        self.cp = config.layout.cp_size
        self.admitted: deque[tuple[int, Request]] = deque(maxlen=4 * self.cp)
        """The latest admissions, in order (BAL-3)."""

    def columns(self, columns: Columns, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """Yield LEN-2, and LEN-3 wherever an engine reports what is visible.

        Parameters
        ----------
        columns
            What the ranks should answer.
        outcomes
            Outcome of each rank, by global rank.
        """
        lengths, attention = "lengths" in self.profiles, "attention" in self.profiles
        for rank, outcome in enumerate(outcomes):
            past_len, visible = columns.past_len[rank % self.cp], columns.visible[rank % self.cp]
            if lengths and outcome.past_len != past_len:
                what = "tokens held before the step, for each request of the batch"
                yield Violation("LEN-2", what, past_len, outcome.past_len, rank)
            reported = outcome.visible is not None and lengths
            if (reported or attention) and outcome.visible != visible:
                what = "keys on this rank that each new token's query sees"
                yield Violation("LEN-3", what, visible, outcome.visible, rank)

    def equal(
        self, state: State, views: Sequence[RankView], ids: list[int], preempted: list[int]
    ) -> bool:
        """Return whether all views tell of these requests what is right, and of no others.

        Parameters
        ----------
        state
            The state that is expected.
        views
            State of each rank, by global rank.
        ids
            Requests in the order in which the views should name them.
        preempted
            The preempted requests that every view should name.
        """
        held = list(zip(*map(state.lengths, ids), strict=True))
        for rank, view in enumerate(views):
            if view.preempted != preempted or [*view.local_len] != ids:
                return False
            if ids and (*view.local_len.values(),) != held[rank % self.cp]:
                return False
        return True

    def held(
        self, state: State, views: Sequence[RankView], ids: Sequence[int]
    ) -> Iterator[Violation]:
        """Yield LEN-1, BAL-1 and MAP-1, in each group of cp_size ranks.

        Parameters
        ----------
        state
            The state that is expected.
        views
            State of each rank, by global rank.
        ids
            Live requests to look at.
        """
        for id in ids:
            expected = list(state.lengths(id))
            lengths = [view.local_len.get(id) for view in views]
            yield from swapped_ranks(self.config, self.profiles, expected, lengths)
            for first in range(0, len(views), self.cp):
                observed = lengths[first : first + self.cp]
                if observed == expected:
                    continue
                what = f"tokens of request {id} on each rank, {sum(expected)} in all"
                yield Violation("LEN-1", what, expected, observed, request=id)
                counts = [count or 0 for count in observed]
                if not invariants.bal_1(self.layout, counts):
                    bound = invariants.spread_bound(self.layout)
                    what = f"spread of request {id} over the ranks"
                    yield Violation("BAL-1", what, f"at most {bound}", observed, request=id)

    def rotation(self, state: State, views: Sequence[RankView]) -> Iterator[Violation]:
        """Yield BAL-3 of every C requests that were admitted in a row and stand alike.

        Parameters
        ----------
        state
            The state that is expected.
        views
            State of each rank, by global rank, of all live requests.
        """
        if self.layout.start != "rotated" or state.requests is None:
            return
        admitted = list(self.admitted)
        for first in range(len(admitted) - self.cp + 1):
            row = admitted[first : first + self.cp]
            alike = all(
                (a.prompt_len, a.steps) == (b.prompt_len, b.steps)
                for (_, a), (_, b) in pairwise(row)
            )
            live = all(state.requests.get(id) is r and not r.preempted for id, r in row)
            if not (alike and live):
                continue
            ids = [id for id, _ in row]
            lens = [[view.local_len.get(id, 0) for view in views[: self.cp]] for id in ids]
            if not invariants.bal_3(lens):
                totals = [sum(column) for column in zip(*lens, strict=True)]
                yield Violation("BAL-3", f"totals of requests {ids}", "all equal", totals)
