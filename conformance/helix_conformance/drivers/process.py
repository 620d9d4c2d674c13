"""One engine process, seen from its supervisor: started, spoken to, watched, ended."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection, Pipe, wait

import msgspec

from helix_conformance.drivers.base import EngineFailure
from helix_conformance.drivers.wire import At, Done, Failed, Play, Ready, send, unpack_from_engine
from helix_conformance.drivers.worker import Setup

START_LIMIT_S = 120.0
"""A worker imports torch before it is ready; on two busy cores that takes long."""


class EngineProcess:
    """The process of one rank. `heard` is when it last said anything."""

    def __init__(self, setup: Setup) -> None:
        self.rank = setup.rank
        self.at: int | None = None
        self.heard = time.monotonic()
        self.output = tempfile.TemporaryFile()  # noqa: SIM115  # lives as long as the process
        self.channel, theirs = Pipe()
        setup = msgspec.structs.replace(setup, channel=theirs.fileno())
        self.process = subprocess.Popen(
            [
                *(sys.executable, "-m", "helix_conformance.drivers.worker"),
                msgspec.json.encode(setup).decode(),
            ],
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=self.output,
            stderr=subprocess.STDOUT,
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        theirs.close()

    def play(self, play: Play) -> None:
        """Send a trace; `collect` brings the answers."""
        self.at, self.heard = None, time.monotonic()
        try:
            send(self.channel, play)
        except OSError:
            raise self.failure(self._death()) from None

    def receive(self) -> Ready | Done | None:
        """What it has to say now; None when that was only where it is. Raises EngineFailure."""
        try:
            message = unpack_from_engine(self.channel.recv_bytes())
        except (EOFError, OSError):
            raise self.failure(self._death()) from None
        except msgspec.DecodeError as error:
            raise self.failure(f"answered garbage: {error}") from None
        self.heard = time.monotonic()
        match message:
            case At(event):
                self.at = event
                return None
            case Failed(event, what):
                self.at = event
                raise self.failure(what)
            case Ready() | Done():
                return message

    def failure(self, what: str) -> EngineFailure:
        """What went wrong with this rank, at the event where it is."""
        return EngineFailure(self.rank, self.at, what)

    def waits_for_peers(self) -> bool:
        """Whether the silent process sits in a collective: then a peer is to blame."""
        before = self.output.seek(0, os.SEEK_END)
        self.process.send_signal(signal.SIGUSR1)  # its faulthandler prints where every thread is
        time.sleep(0.5)
        self.output.seek(before)
        return b"torch/distributed" in self.output.read()

    def kill(self) -> None:
        """End the process at once."""
        self.process.kill()
        self.process.wait()
        self.channel.close()
        self.output.close()

    def _death(self) -> str:
        try:
            code = self.process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "closed its channel without an answer"
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"exit status {code}"
        return f"died with {how}; it last printed: {self._last_words()!r}"

    def _last_words(self) -> str:
        size = self.output.seek(0, os.SEEK_END)
        self.output.seek(max(0, size - 500))
        return self.output.read().decode(errors="replace").strip()


def collect(processes: Sequence[EngineProcess], deadline_s: float) -> list[Ready | Done]:
    """One answer of each process, in order.

    Raises the EngineFailure of the first process that fails; or, when no process has moved for
    deadline_s seconds, that of the one to blame.
    """
    answers: dict[int, Ready | Done] = {}
    by_channel = {p.channel: p for p in processes}
    while len(answers) < len(processes):
        silent = [p for p in processes if p.rank not in answers]
        last = max(p.heard for p in processes)
        left = max(0.0, last + deadline_s - time.monotonic())
        ready = [c for c in wait([p.channel for p in silent], left) if isinstance(c, Connection)]
        if not ready:
            raise blame([(p, p.waits_for_peers()) for p in silent], processes, deadline_s)
        for channel in ready:
            process = by_channel[channel]
            answer = process.receive()
            if answer is not None:
                answers[process.rank] = answer
    return [answers[p.rank] for p in processes]


def blame(
    silent: Sequence[tuple[EngineProcess, bool]],
    processes: Sequence[EngineProcess],
    deadline_s: float,
) -> EngineFailure:
    """Which of the processes to name when some stay silent, and whether they wait for peers."""
    for process, waits in silent:
        if not waits:
            return process.failure(f"hung: it has not answered for {deadline_s:g} seconds")
    stuck = [process for process, _ in silent]
    behind = min(stuck, key=_progress)
    for process in processes:
        if process not in stuck or _progress(process) > _progress(behind):
            names = ", ".join(str(p.rank) for p in stuck if p is not process)
            what = f"left out a collective in which ranks {names} wait for it"
            return EngineFailure(process.rank, behind.at, what)
    return behind.failure(f"waits in a collective that has not ended in {deadline_s:g} seconds")


def _progress(process: EngineProcess) -> int:
    return -1 if process.at is None else process.at
