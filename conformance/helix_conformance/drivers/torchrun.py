"""Ranks under torchrun: each launched process supervises one engine in a child.

The supervisors talk through the key-value store of torchrun's own rendezvous; the engines form
a process group of their own. Rank 0 holds the traces and the judge, the others serve.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

from helix_conformance.drivers.base import EngineFailure, Played
from helix_conformance.drivers.process import START_LIMIT_S, EngineProcess, collect
from helix_conformance.drivers.stores import joined_store, read, write
from helix_conformance.drivers.wire import (
    Done,
    Failed,
    Play,
    Ready,
    pack,
    unpack_from_engine,
    unpack_to_engine,
)
from helix_conformance.drivers.worker import Setup
from helix_conformance.protocol import Watch
from helix_spec.configs import Config
from helix_spec.events import Event

IDLE_LIMIT_S = 3600.0
"""How long a supervisor waits for the next trace: rank 0 may be thinking."""
STOP = b"stop"


def launched() -> bool:
    """Whether this process was started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


class Supervisor:
    """One launched process: a line to the store, and the engine in a child."""

    def __init__(self, engine: str, *, backend: str, deadline_s: float) -> None:
        self.rank, self.world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        self.deadline_s = deadline_s
        self.played = 0
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self.store = joined_store(host, port, "helix-control")
        self.child = EngineProcess(
            Setup(
                engine=engine,
                rank=self.rank,
                world=self.world,
                channel=-1,
                store_host=host,
                store_port=port,
                group="helix-engine",
                backend=backend,
                collective_timeout_s=10 * deadline_s,
            )
        )

    def serve(self) -> None:
        """Play what rank 0 hands out, until it says stop."""
        self._publish("start", self._started())
        while True:
            frame = self._read(f"trace-{self.played}", IDLE_LIMIT_S)
            if frame == STOP:
                self.child.kill()
                return
            self._publish(f"answer-{self.played}", self._play(unpack_to_engine(frame)))
            self.played += 1

    def _started(self) -> Ready | Done | Failed:
        return _result(self.child, START_LIMIT_S)

    def _play(self, play: Play) -> Ready | Done | Failed:
        if self.rank >= play.config.world_size:
            return Done([])
        try:
            self.child.play(play)
        except EngineFailure as failure:
            return Failed(failure.event, failure.what)
        return _result(self.child, self.deadline_s)

    def _publish(self, key: str, message: Ready | Done | Failed) -> None:
        write(self.store, f"{key}-{self.rank}", pack(message))

    def _read(self, key: str, limit_s: float) -> bytes:
        return read(self.store, key, limit_s)


class TorchrunDriver(Supervisor):
    """Rank 0: hands traces to all supervisors and gathers their answers."""

    name = "torchrun"
    survives_failure = False
    streams = False

    def __init__(self, engine: str, *, backend: str, deadline_s: float) -> None:
        super().__init__(engine, backend=backend, deadline_s=deadline_s)
        self._publish("start", self._started())
        ready = self._gather("start", range(self.world), START_LIMIT_S)
        self.profiles = frozenset(
            profile for answer in ready if isinstance(answer, Ready) for profile in answer.profiles
        )
        self.settings = ready[0].settings if isinstance(ready[0], Ready) else {}

    @property
    def largest_world(self) -> int | None:
        """The number of launched processes."""
        return self.world

    def play(
        self, config: Config, profiles: frozenset[str], events: Iterable[Event], watch: Watch
    ) -> Iterator[Played]:
        """See `Driver.play`: the trace goes out whole, and one answer of each rank comes back."""
        play = Play(config, sorted(profiles), list(events), watch)
        write(self.store, f"trace-{self.played}", pack(play))
        key = f"answer-{self.played}"
        self.played += 1
        self._publish(key, self._play(play))
        done = self._gather(key, range(config.world_size), self.deadline_s)
        rows = [answer.answers for answer in done if isinstance(answer, Done)]
        # A rank that refused to start has given one answer only.
        yield from zip([None, *play.events, None], zip(*rows, strict=False), strict=False)

    def close(self) -> None:
        """Let the other supervisors go, and end the engine."""
        write(self.store, f"trace-{self.played}", STOP)
        self.child.kill()

    def _gather(self, key: str, ranks: Iterable[int], limit_s: float) -> list[Ready | Done]:
        """The answers of these ranks. Raises the failure of the rank to blame."""
        answers: list[Ready | Done] = []
        failures: list[EngineFailure] = []
        for rank in ranks:
            try:
                # Each supervisor answers within the limit of its own child, and a little more.
                message = unpack_from_engine(self._read(f"{key}-{rank}", limit_s + 15))
            except RuntimeError:
                failures.append(EngineFailure(rank, None, "has a supervisor that fell silent"))
                continue
            if isinstance(message, Failed):
                failures.append(EngineFailure(rank, message.event, message.what))
            elif isinstance(message, Ready | Done):
                answers.append(message)
        if failures:
            raise min(failures, key=lambda failure: "waits in a collective" in failure.what)
        return answers


def _result(child: EngineProcess, limit_s: float) -> Ready | Done | Failed:
    try:
        return collect([child], limit_s)[0]
    except EngineFailure as failure:
        return Failed(failure.event, failure.what)
