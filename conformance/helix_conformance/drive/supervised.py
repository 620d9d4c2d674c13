"""Ranks whose processes are launched from outside: each launched process supervises one engine.

A supervisor holds only its end of the control channel (`lines`) and runs the engine in a child.
That of rank 0 holds the traces and the judge as well, and alone decides who has been silent for too
long; the others hand frames to and fro. Whichever process ends, the others learn of it at once:
what rank 0 knows by then is written, and nobody is left behind.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from multiprocessing.connection import wait
from typing import Any, Final

import msgspec

from helix_conformance.drive.driver import EngineFailure, Kind
from helix_conformance.drive.group import GroupDriver
from helix_conformance.drive.lines import Line
from helix_conformance.drive.process import EngineProcess, Rank
from helix_conformance.drive.wire import (
    Ask,
    At,
    Done,
    Failed,
    FrameError,
    Play,
    Ready,
    Stop,
    Stuck,
    ToEngine,
    pack,
    unpack_from_engine,
    unpack_to_engine,
)
from helix_conformance.drive.worker import Setup

ASK_LIMIT_S: Final = 5.0
"""How long a supervisor may take to say where its engine is."""
TELL_EVERY_S: Final = 0.2
"""How often a supervisor says by itself where its engine is."""
LEFT_ALONE: Final = 3
"""Exit status of a supervisor that rank 0 has left: the run had no verdict."""


class RemoteRank:
    """A rank behind a supervisor, seen from rank 0."""

    def __init__(self, rank: int, line: Line) -> None:
        self.rank = rank
        self.channel = line
        self.at: int | None = None
        self.heard = time.monotonic()
        self.lost = False

    def play(self, play: Play) -> None:
        """See `Rank.play`. That the supervisor is gone shows when it is heard."""
        self.at, self.heard = None, time.monotonic()
        self._send(play)

    def receive(self) -> Ready | Done | None:
        """See `Rank.receive`."""
        match self._message():
            case At(event):
                self.at = event
                return None
            case Stuck():
                return None
            case (Ready() | Done()) as answer:
                return answer

    def failure(self, what: str, how: Kind = "raised") -> EngineFailure:
        """See `Rank.failure`."""
        return EngineFailure(self.rank, self.at, what, how)

    def look(self) -> None:
        """See `Rank.look`."""
        self._send(Ask())

    def waits_for_peers(self) -> bool:
        """See `Rank.waits_for_peers`."""
        until = time.monotonic() + ASK_LIMIT_S
        while wait([self.channel.fileno()], max(0.0, until - time.monotonic())):
            match self._message():
                case Stuck(event, waits):
                    self.at = event
                    return waits
        raise self._lost("has a supervisor that fell silent")

    def kill(self, *, whole: bool = True) -> None:
        """Let the supervisor go; it ends its engine."""
        self._send(Stop(whole))
        self.channel.close()

    def _send(self, message: ToEngine) -> None:
        with suppress(OSError):
            self.channel.send(pack(message))

    def _message(self) -> Ready | At | Done | Stuck:
        """The next message that is no failure. Raises EngineFailure."""
        try:
            message = unpack_from_engine(self.channel.receive())
        except (EOFError, OSError):
            raise self._lost("has a supervisor that was ended") from None
        except FrameError as error:
            raise self._lost(f"has a supervisor that sent garbage: {error}") from None
        self.heard = time.monotonic()
        if isinstance(message, Failed):
            self.at = message.event
            self.lost = self.lost or message.how == "stopped"
            raise self.failure(message.what, message.how)
        return message

    def _lost(self, what: str) -> EngineFailure:
        self.lost = True
        return self.failure(what, "gone")


class SupervisedDriver(GroupDriver):
    """Rank 0: supervises its own engine, and hears of the others by their supervisors."""

    def __init__(
        self, engine: str, setup: Setup, lines: Mapping[int, Line], deadline_s: float
    ) -> None:
        super().__init__(engine, setup.world, deadline_s)
        self.ranks: list[Rank] = [
            EngineProcess(setup),
            *(RemoteRank(rank, line) for rank, line in sorted(lines.items())),
        ]
        # A launcher that ends everybody because one process died must not end the report of it.
        self.handler_before = signal.signal(signal.SIGTERM, self._told)
        self.greet()

    def close(self) -> None:
        """Let the other supervisors go, and end the engine."""
        if not self.ranks:
            return
        whole = not any(isinstance(rank, RemoteRank) and rank.lost for rank in self.ranks)
        for rank in self.ranks:
            if isinstance(rank, RemoteRank):
                rank.kill(whole=whole)
            else:
                rank.kill()
        self.ranks = []
        if whole:
            signal.signal(signal.SIGTERM, self.handler_before)
        else:
            self.not_whole()

    def not_whole(self) -> None:
        """A supervisor is gone, and the run ends in an error; it may still be told to stop."""

    def _told(self, *_: Any) -> None:
        self.told_to_stop = True


def supervise(setup: Setup, line: Line) -> Stop | None:
    """Be the supervisor of a rank but 0, until rank 0 says stop, or is gone: then None."""
    signal.signal(signal.SIGTERM, _leave)
    child = EngineProcess(setup)
    try:
        return _hand_to_and_fro(child, line)
    except SystemExit:
        with suppress(OSError):
            line.send(pack(Failed(child.at, "was told to stop", "stopped")))
        raise
    finally:
        child.kill()


def _hand_to_and_fro(child: EngineProcess, line: Line) -> Stop | None:
    told, alive = 0.0, True
    while True:
        ready = wait([line.fileno(), child.channel.fileno()] if alive else [line.fileno()])
        try:
            if line.fileno() in ready:
                request = unpack_to_engine(line.receive())
                if isinstance(request, Stop):
                    return request
                if isinstance(request, Play):
                    child.play(request)
                else:
                    child.look()
                    line.send(pack(Stuck(child.at, child.waits_for_peers())))
            else:
                try:
                    answer = child.receive()
                except EngineFailure as failure:
                    alive = failure.how == "raised"
                    line.send(pack(Failed(failure.event, failure.what, failure.how)))
                    continue
                if answer is not None:
                    line.send(pack(answer))
                elif time.monotonic() > told + TELL_EVERY_S:
                    told = time.monotonic()
                    line.send(pack(At(child.at or 0)))
        except (EOFError, OSError):
            return None
        except FrameError as error:
            with suppress(OSError):
                line.send(
                    pack(Failed(child.at, f"has a supervisor that was sent garbage: {error}"))
                )
            return None


def _leave(*_: Any) -> None:
    sys.exit(LEFT_ALONE)


def setup_of(engine: str, rank: int, world: int, backend: str, deadline_s: float) -> Setup:
    """What a supervisor's child is told, but for where its group meets."""
    return Setup(
        engine=engine,
        rank=rank,
        world=world,
        channel=-1,
        group="helix-engine",
        backend=backend,
        collective_timeout_s=10 * deadline_s,  # a hang is rank 0's to call
    )


def met_at(setup: Setup, host: str, port: int) -> Setup:
    """The same, with the place where the group meets."""
    return msgspec.structs.replace(setup, store_host=host, store_port=port)


def leave_at_once(status: int) -> None:
    """End this process without any farewell that waits for peers."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)
