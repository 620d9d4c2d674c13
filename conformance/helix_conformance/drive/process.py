"""The ranks that a supervisor sees: started, spoken to, watched, blamed, ended."""

from __future__ import annotations

import os
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from typing import Final, Protocol

import msgspec

from helix_conformance.drive.driver import KINDS, EngineFailure, Kind, signal_name
from helix_conformance.drive.wire import (
    At,
    Done,
    Failed,
    FrameError,
    Play,
    Ready,
    Stuck,
    send,
    unpack_from_engine,
)
from helix_conformance.drive.worker import Setup

START_LIMIT_S: Final = float(os.environ.get("HELIX_START_LIMIT_S", "120"))
"""A worker imports torch before it is ready; on two busy cores that takes long, and an engine that
imports more may need more: HELIX_START_LIMIT_S gives it."""
GRACE_S: Final = 0.5
"""How long the others may take to fail too, once one has: the first is not always to blame."""
FRAME_LIMIT_S: Final = 10
"""Longest silence within one frame; a whole frame is written at once."""
LOOK_S: Final = 0.5
"""How long a silent process may take to print where it is."""
KEPT: Final = 2**16
"""Bytes of a process's output that are kept, the last ones."""


class Channel(Protocol):
    """Something that `multiprocessing.connection.wait` can wait for."""

    def fileno(self) -> int:
        """Its file descriptor."""


class Rank(Protocol):
    """One rank of an engine in a process, of this machine or behind a supervisor elsewhere."""

    rank: int
    at: int | None
    """The event where it is."""
    heard: float
    """When it last said anything."""

    @property
    def channel(self) -> Channel:
        """Where it is heard."""

    def play(self, play: Play) -> None:
        """Send a trace; `collect` brings the answer."""

    def receive(self) -> Ready | Done | None:
        """What it has to say now; None when that was only where it is. Raises EngineFailure."""

    def look(self) -> None:
        """Begin to find out where it is."""

    def waits_for_peers(self) -> bool:
        """After `look`: whether it sits in a collective; then a peer is to blame."""

    def failure(self, what: str, how: Kind = "raised") -> EngineFailure:
        """What went wrong with this rank, at the event where it is."""

    def kill(self) -> None:
        """End it at once."""


class LastWords:
    """A pipe that a process may flood: the end of what it wrote is kept."""

    def __init__(self) -> None:
        self.read_end, self.write_end = os.pipe()
        self.kept = b""
        self.total = 0
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        while chunk := os.read(self.read_end, KEPT):
            self.kept = (self.kept + chunk)[-KEPT:]
            self.total += len(chunk)
        os.close(self.read_end)

    def since(self, total: int) -> bytes:
        """What came after the first `total` bytes, as far as it is kept."""
        new = self.total - total
        return self.kept[-new:] if new > 0 else b""


class EngineProcess:
    """The process of one rank, a child of this one."""

    def __init__(self, setup: Setup) -> None:
        self.rank = setup.rank
        self.at: int | None = None
        self.heard = time.monotonic()
        self.number = 0
        self.printed_before_look = 0
        self.output = LastWords()
        self.channel, theirs = Pipe()
        _do_not_wait_longer(self.channel, FRAME_LIMIT_S)
        setup = msgspec.structs.replace(setup, channel=theirs.fileno())
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "helix_conformance.drive.worker"),
                msgspec.json.encode(setup).decode(),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.output.write_end,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        os.close(self.output.write_end)
        theirs.close()

    def play(self, play: Play) -> None:
        """See `Rank.play`. That the process is dead shows when it is heard."""
        self.at, self.heard, self.number = None, time.monotonic(), play.number
        with suppress(OSError):
            send(self.channel, play)

    def receive(self) -> Ready | Done | None:
        """See `Rank.receive`."""
        try:
            message = unpack_from_engine(self.channel.recv_bytes())
        except BlockingIOError:
            raise self.failure("answered garbage: a frame that did not end") from None
        except (EOFError, OSError):
            raise self.failure(self._death(), "died") from None
        except FrameError as error:
            raise self.failure(f"answered garbage: {error}") from None
        self.heard = time.monotonic()
        match message:
            case At(event):
                self.at = event
                return None
            case Failed(event, what, how):
                self.at = event
                raise self.failure(what, how)
            case Done(_, number) if number != self.number:
                what = f"it answered trace {number}, and was asked {self.number}"
                raise self.failure(f"answered garbage: {what}")
            case Ready() | Done():
                return message
            case Stuck():
                raise self.failure("answered garbage: it says that it is stuck, unasked")

    def failure(self, what: str, how: Kind = "raised") -> EngineFailure:
        """See `Rank.failure`."""
        return EngineFailure(self.rank, self.at, what, how)

    def look(self) -> None:
        """See `Rank.look`: its faulthandler prints where every thread is."""
        self.printed_before_look = self.output.total
        self.process.send_signal(signal.SIGUSR1)

    def waits_for_peers(self) -> bool:
        """See `Rank.waits_for_peers`."""
        until = time.monotonic() + LOOK_S
        while b"torch/distributed" not in self.output.since(self.printed_before_look):
            if time.monotonic() > until:
                return False
            time.sleep(0.01)
        return True

    def kill(self) -> None:
        """See `Rank.kill`."""
        self.process.kill()
        self.process.wait()
        self.channel.close()

    def _death(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its channel without an answer"
        how = f"signal {signal_name(-code)}" if code < 0 else f"exit status {code}"
        time.sleep(0.1)  # the thread that drains its output may be behind
        words = self.output.kept[-500:].decode(errors="replace").strip()
        return f"died with {how}; it last printed: {words!r}"


def _do_not_wait_longer(channel: Connection, limit_s: int) -> None:
    """Let a read of the channel's socket fail when nothing comes for so long."""
    with socket.socket(fileno=os.dup(channel.fileno())) as line:
        line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack("@ll", limit_s, 0))


def collect(
    ranks: Sequence[Rank],
    deadline_s: float,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> list[Ready | Done]:
    """One answer of each rank, in order.

    Raises the EngineFailure of the rank to blame, when some fail; or when none has moved for
    deadline_s seconds; or when this process is told to stop.
    """
    answers: dict[int, Ready | Done] = {}
    failures: dict[int, EngineFailure] = {}
    until: float | None = None
    while len(answers) < len(ranks):
        silent = [r for r in ranks if r.rank not in answers and r.rank not in failures]
        now = time.monotonic()
        if until is None and told_to_stop():
            failures[-1] = EngineFailure(ranks[0].rank, ranks[0].at, "was told to stop", "stopped")
        if failures and until is None:
            until = now + GRACE_S
        if failures and (not silent or now >= (until or 0)):
            raise _to_blame(list(failures.values()), ranks)
        left = (until or max(r.heard for r in ranks) + deadline_s) - now
        if left <= 0:
            raise blame(silent, ranks, deadline_s)
        by_channel = {r.channel.fileno(): r for r in silent}
        for channel in wait(list(by_channel), min(left, 0.5)):
            assert isinstance(channel, int)
            rank = by_channel[channel]
            try:
                answer = rank.receive()
            except EngineFailure as failure:
                failures[rank.rank] = failure
                continue
            if answer is not None:
                answers[rank.rank] = answer
    return [answers[r.rank] for r in ranks]


def _to_blame(failures: Sequence[EngineFailure], ranks: Sequence[Rank]) -> EngineFailure:
    """Of several failures the one that brought about the others."""
    failure = min(failures, key=lambda failure: KINDS.index(failure.how))
    if failure.how == "gone":  # its last word came a while ago: the others know how far all were
        failure.event = max(ranks, key=_progress).at
    return failure


def blame(silent: Sequence[Rank], ranks: Sequence[Rank], deadline_s: float) -> EngineFailure:
    """Which of the ranks to name when some stay silent: one that does not wait for its peers."""
    for rank in silent:
        rank.look()
    try:
        hung = [rank for rank in silent if not rank.waits_for_peers()]
    except EngineFailure as failure:
        return failure
    if hung:
        what = f"hung: it has not answered for {deadline_s:g} seconds"
        return hung[0].failure(what, "hung")
    behind = min(silent, key=_progress)
    for rank in ranks:
        if rank not in silent or _progress(rank) > _progress(behind):
            names = ", ".join(str(r.rank) for r in silent if r is not rank)
            what = f"left out a collective in which ranks {names} wait for it"
            return EngineFailure(rank.rank, behind.at, what, "hung")
    what = f"waits in a collective that has not ended in {deadline_s:g} seconds"
    return behind.failure(what, "hung")


def _progress(rank: Rank) -> int:
    return -1 if rank.at is None else rank.at
