"""A pool of engine processes over gloo, started once and kept for many traces."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import msgspec

from helix_conformance.drivers.base import EngineFailure, Played
from helix_conformance.drivers.process import START_LIMIT_S, EngineProcess, collect
from helix_conformance.drivers.wire import Done, Play, Ready
from helix_conformance.drivers.worker import Setup
from helix_conformance.protocol import Watch
from helix_spec.configs import Config
from helix_spec.events import Event


class PoolDriver:
    """Worker processes 0 .. size-1; a trace of fewer ranks uses the first of them.

    After an EngineFailure all workers are ended, and started anew for the next trace. `engine`
    may change between traces to one that makes the same groups and declares the same profiles.
    """

    name = "pool"
    survives_failure = False
    streams = False

    def __init__(self, engine: str, size: int = 4, *, deadline_s: float = 30.0) -> None:
        self.engine = engine
        self.size = size
        self.deadline_s = deadline_s
        self.starts = 0
        self.workers: list[EngineProcess] = []
        self.profiles: frozenset[str] = frozenset()
        self.settings: dict[str, str] = {}
        self._start()

    @property
    def largest_world(self) -> int | None:
        """The number of workers."""
        return self.size

    def play(
        self, config: Config, profiles: frozenset[str], events: Iterable[Event], watch: Watch
    ) -> Iterator[Played]:
        """See `Driver.play`: the trace goes out whole, and one answer of each rank comes back."""
        if not self.workers:
            self._start()
        ranks = self.workers[: config.world_size]
        play = Play(config, sorted(profiles), list(events), watch, self.engine)
        try:
            for worker in ranks:
                worker.play(play)
            done = collect(ranks, self.deadline_s)
        except EngineFailure:
            self.close()
            raise
        rows = [answer.answers for answer in done if isinstance(answer, Done)]
        # A rank that refused to start has given one answer only.
        yield from zip([None, *play.events, None], zip(*rows, strict=False), strict=False)

    def close(self) -> None:
        """End all workers."""
        for worker in self.workers:
            worker.kill()
        self.workers = []

    def _start(self) -> None:
        from helix_conformance.drivers.stores import hosted_store

        # The store listens as long as this object lives; every start meets under a new name.
        self.store = hosted_store()
        self.starts += 1
        setup = Setup(
            engine=self.engine,
            rank=0,
            world=self.size,
            channel=-1,
            store_host="127.0.0.1",
            store_port=self.store.port,
            group=f"pool-{self.starts}",
            backend="gloo",
            collective_timeout_s=10 * self.deadline_s,  # a hang is the supervisor's to call
        )
        self.workers = [
            EngineProcess(msgspec.structs.replace(setup, rank=rank)) for rank in range(self.size)
        ]
        try:
            ready = collect(self.workers, START_LIMIT_S)
        except EngineFailure:
            self.close()
            raise
        self.profiles = frozenset(
            profile for answer in ready if isinstance(answer, Ready) for profile in answer.profiles
        )
        self.settings = ready[0].settings if isinstance(ready[0], Ready) else {}
