"""Profile `placement`: who owns each new token, and at which position (OWN-2, OWN-3, POS-1)."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from typing import Any

from helix_conformance.drive.asking import MalformedAnswer
from helix_conformance.expect.expectation import Expectation
from helix_conformance.judge.failure import Violation
from helix_spec import invariants
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import Decode


class Columns:
    """What each rank should answer to one accepted decode.

    Parameters
    ----------
    expected
        The decode's expectation.
    config
        Configuration of the trace.
    slots
        By global rank and token, the slots that should be named; see `PagesJudge.slots`.
    """

    def __init__(self, expected: Expectation, config: Config, slots: list[list[int]]) -> None:
        assert expected.decoded is not None
        past_len, self.position_ids, owners, _, visible = expected.decoded
        self.cp = config.layout.cp_size
        self.past_len = [list(column) for column in zip(*past_len, strict=True)]
        self.visible = [list(column) for column in zip(*visible, strict=True)]
        self.active = [[owner == rank for owner in owners] for rank in range(self.cp)]
        self.slots = slots

    def are_those_of(self, rank: int, outcome: Outcome) -> bool:
        """Return whether all that a rank answers is right, the output left out.

        Parameters
        ----------
        rank
            Global rank.
        outcome
            What it answered.
        """
        cp_rank = rank % self.cp
        return (
            outcome.slots == self.slots[rank]
            and outcome.past_len == self.past_len[cp_rank]
            and outcome.position_ids == self.position_ids
            and outcome.active == self.active[cp_rank]
            and outcome.visible == self.visible[cp_rank]
        )

    def active_differs(self, outcomes: Sequence[Outcome]) -> bool:
        """Return whether a rank claims other tokens than it owns.

        Parameters
        ----------
        outcomes
            Outcome of each rank, by global rank.
        """
        return any(o.active != self.active[rank % self.cp] for rank, o in enumerate(outcomes))

    def slots_differ(self, outcomes: Sequence[Outcome]) -> bool:
        """Return whether a rank names other slots than are known.

        Parameters
        ----------
        outcomes
            Outcome of each rank, by global rank.
        """
        return any(o.slots != self.slots[rank] for rank, o in enumerate(outcomes))

    def check_sizes(self, outcomes: Sequence[Outcome], profiles: frozenset[str]) -> None:
        """Check that every column is as long as the batch.

        Parameters
        ----------
        outcomes
            Outcome of each rank, by global rank.
        profiles
            Those that are checked; `past_len` is looked at with `lengths` alone.

        Raises
        ------
        MalformedAnswer
            When a column has another length.
        """
        tokens = len(self.position_ids)
        for rank, outcome in enumerate(outcomes):
            if "lengths" in profiles:
                _check_size(rank, "past_len", outcome.past_len, len(self.past_len[0]))
            for name in ("position_ids", "active", "slots"):
                _check_size(rank, name, getattr(outcome, name), tokens)


def _check_size(rank: int, name: str, column: Sequence[Any], right: int) -> None:
    if len(column) != right:
        raise MalformedAnswer(f"its {name} has {len(column)} entries, not {right}", rank)


class PlacementJudge:
    """OWN-2, OWN-3, POS-1, PAGE-4, BAL-2, and MAP-1 of what the ranks claim.

    Parameters
    ----------
    config
        A legal configuration, with which the ranks were started.
    profiles
        Those that are checked.
    """

    def __init__(self, config: Config, profiles: frozenset[str]) -> None:
        self.config, self.profiles = config, profiles
        self.cp = config.layout.cp_size

    def columns(self, columns: Columns, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """Yield POS-1, and PAGE-4 by the slots that ranks name.

        Parameters
        ----------
        columns
            What the ranks should answer.
        outcomes
            Outcome of each rank, by global rank.
        """
        for rank, outcome in enumerate(outcomes):
            if outcome.position_ids != columns.position_ids:
                what = "global positions of the new tokens"
                right = columns.position_ids
                yield Violation("POS-1", what, right, outcome.position_ids, rank)
            right_active = columns.active[rank % self.cp]
            if outcome.active == right_active and outcome.slots == columns.slots[rank]:
                continue
            for active, slot in zip(outcome.active, outcome.slots, strict=True):
                if slot != -1 and not active:
                    what = "slot of a token that this rank does not own"
                    yield Violation("PAGE-4", what, -1, slot, rank)

    def owners(self, columns: Columns, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """Yield OWN-2, OWN-3 and MAP-1 of each new token, in each group of cp_size ranks.

        Parameters
        ----------
        columns
            What the ranks should answer.
        outcomes
            Outcome of each rank, by global rank.
        """
        right = list(zip(*columns.active, strict=True))
        for first in range(0, len(outcomes), self.cp):
            group = [outcome.active for outcome in outcomes[first : first + self.cp]]
            for token, active in enumerate(zip(*group, strict=True)):
                where = f"the token at position {columns.position_ids[token]}"
                if not invariants.own_2(active):
                    what = f"ranks active for {where}"
                    yield Violation("OWN-2", what, list(right[token]), list(active))
                if active != right[token]:
                    what = f"ranks that claim {where}, and the layout's owner"
                    yield Violation("OWN-3", what, list(right[token]), list(active))
        observed = [outcome.active for outcome in outcomes]
        yield from swapped_ranks(self.config, self.profiles, columns.active, observed)

    def balance(self, expected: Expectation, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """Yield BAL-2 of each request of the batch, by what the ranks claim.

        Parameters
        ----------
        expected
            The expectation of an accepted decode, whose columns were right until now.
        outcomes
            Outcome of each rank, by global rank.
        """
        event, decoded, state = expected.event, expected.decoded, expected.state
        assert isinstance(event, Decode) and decoded is not None
        if state is None or state.requests is None:
            return
        token = 0
        for id, query_len in zip(event.ids, event.query_lens, strict=True):
            request, first = state.requests[id], decoded.position_ids[token]
            claims = [
                bisect_left(positions, first) - bisect_left(positions, request.prompt_len)
                for positions in request.ranks
            ]
            for place in range(token, token + query_len):
                for rank, outcome in enumerate(outcomes[: self.cp]):
                    claims[rank] += outcome.active[place]
            token += query_len
            logical = [claims[(rank + request.shift) % self.cp] for rank in range(self.cp)]
            if not invariants.bal_2(self.config.layout, logical):
                what = f"decoded tokens of request {id} on each rank"
                yield Violation("BAL-2", what, "a spread of one chunk at most", claims)


def swapped_ranks(
    config: Config, profiles: frozenset[str], expected: Sequence[Any], observed: Sequence[Any]
) -> Iterator[Violation]:
    """Yield MAP-1 where the ranks answer what they should with tp_rank fastest.

    Parameters
    ----------
    config
        Configuration of the trace.
    profiles
        Those that are checked; MAP-1 is checked with `attention` alone.
    expected
        What each cp_rank should say, by cp_rank.
    observed
        What each rank says, by global rank.
    """
    ranks, cp, tp = range(config.world_size), config.layout.cp_size, config.tp_size
    if "attention" in profiles and tp > 1:
        right = [expected[rank % cp] for rank in ranks]
        if observed == [expected[rank // tp] for rank in ranks] != right:
            yield Violation("MAP-1", "what the ranks hold, tp_rank fastest", right, observed)
