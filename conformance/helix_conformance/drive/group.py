"""Ranks in processes: a trace goes out whole, and one answer of each rank comes back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

from helix_conformance.drive.driver import Answer, EngineFailure, Played, Watch
from helix_conformance.drive.process import START_LIMIT_S, Rank, collect
from helix_conformance.drive.wire import Done, Play, Ready
from helix_spec.config import Config
from helix_spec.events import Event


class GroupDriver:
    """What the drivers with a process for each rank have in common."""

    survives_failure = False
    streams = False

    def __init__(self, engine: str, size: int, deadline_s: float) -> None:
        self.engine = engine
        self.size = size
        self.deadline_s = deadline_s
        self.played = 0
        self.ranks: Sequence[Rank] = []
        self.profiles: frozenset[str] = frozenset()
        self.settings: dict[str, str] = {}
        self.told_to_stop = False

    @property
    def largest_world(self) -> int | None:
        """The number of processes."""
        return self.size

    def play(
        self, config: Config, profiles: frozenset[str], events: Iterable[Event], watch: Watch
    ) -> Iterator[Played]:
        """See `Driver.play`: the trace goes out whole, and one answer of each rank comes back."""
        if not self.ranks:
            self.begin()
        self.played += 1
        ranks = self.ranks[: config.world_size]
        play = Play(config, sorted(profiles), list(events), watch, self.engine, self.played)
        try:
            for rank in ranks:
                rank.play(play)
            done = collect(ranks, self.deadline_s, lambda: self.told_to_stop)
            rows = [_rows(r, answer, play) for r, answer in zip(ranks, done, strict=True)]
        except EngineFailure:
            self.close()
            raise
        # A rank that refused to start has given one answer only: the judge looks no further.
        yield from zip([None, *play.events, None], zip(*rows, strict=False), strict=False)

    def begin(self) -> None:
        """Start the ranks, after a failure anew."""
        raise EngineFailure(0, None, "has been ended after a failure")

    def greet(self) -> None:
        """Hear of every rank that it is up, and what it declares. Raises EngineFailure."""
        try:
            ready = collect(self.ranks, START_LIMIT_S, lambda: self.told_to_stop)
        except EngineFailure:
            self.close()
            raise
        first, *others = [answer for answer in ready if isinstance(answer, Ready)]
        self.profiles, self.settings = frozenset(first.profiles), first.settings
        for rank, other in enumerate(others, 1):
            if self.profiles != frozenset(other.profiles):
                self.close()
                raise EngineFailure(rank, None, "declares other profiles than rank 0")

    def close(self) -> None:
        """End the ranks."""
        for rank in self.ranks:
            rank.kill()
        self.ranks = []


def _rows(rank: Rank, answer: Ready | Done, play: Play) -> list[Answer]:
    """The answers of one rank to all of a trace. Raises EngineFailure when some are missing."""
    rows = answer.answers if isinstance(answer, Done) else []
    refused = len(rows) == 1 and rows[0].outcome.reason is not None
    if not refused and len(rows) != len(play.events) + 2:
        what = f"answered garbage: {len(rows)} answers to {len(play.events)} events, start and end"
        raise rank.failure(what)
    return rows
