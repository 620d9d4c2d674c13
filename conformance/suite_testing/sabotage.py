"""What happens to ranks from outside: signals to worker processes, once they are in a step."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from helix_spec.config import Config, ModelShape
from helix_spec.events import Accept, Admit, Decode, Event, Fork, Preempt, Release, Resume
from helix_spec.trace import Trace

DEADLINE_S = 15.0


def long_trace(rounds: int = 60, layout: str = "pr9757/1:C=4,T=2") -> Trace:
    """Requests that come, grow, fork, are preempted and go, again and again."""
    events: list[Event] = [Admit(0, 13), Admit(1, 3)]
    for number in range(rounds):
        child = 2 + number
        events += [
            Decode([0, 1], [1, 3]),
            Accept(1, 2),
            Fork(1, child),
            Decode([child, 0], [1, 1], 1),
            Preempt(0),
            Resume(0),
            Release(child),
        ]
        if number % 10 == 9:
            events += [Release(0), Admit(0, 13), Release(1), Admit(1, 3)]
    config = Config(
        layout=layout, pages=[60] * 4, max_len=400, model=ModelShape(q_heads=8, kv_heads=2)
    )
    return Trace(config=config, events=events)


def worker(rank: int) -> int:
    """Process id of the worker of a rank, among the descendants of this process."""
    parents: dict[int, int] = {}
    found: list[int] = []
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            words = (entry / "cmdline").read_bytes().split(b"\0")
            stat = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        parents[int(entry.name)] = int(stat[1])
        if b"helix_conformance.drive.serve" in words and stat[0] != "Z":
            group = json.loads(words[words.index(b"helix_conformance.drive.serve") + 2])
            if group["rank"] == rank:
                found.append(int(entry.name))
    mine = [pid for pid in found if os.getpid() in _line(pid, parents)]
    assert len(mine) == 1, f"{len(mine)} workers of rank {rank}"
    return mine[0]


def processes_of(token: str, *, within_s: float) -> list[int]:
    """Return the processes whose environment holds a text, and that have not ended in this time."""
    until = time.monotonic() + within_s
    while True:
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if token.encode() in (folder / "environ").read_bytes():
                    found.append(int(folder.name))
            except OSError:  # it has just ended
                continue
        if not found or time.monotonic() > until:
            return found
        time.sleep(0.1)


def _line(pid: int, parents: dict[int, int]) -> Iterator[int]:
    while pid in parents:
        pid = parents[pid]
        yield pid


def where(rank: int) -> int:
    """Events that a rank has begun, by its beacon."""
    try:
        return Path(os.environ["HELIX_FAULTS_BEACONS"], f"rank-{rank}").stat().st_size
    except OSError:
        return 0


@contextmanager
def once_it_is_at(rank: int, event: int, act: Callable[[int], None]) -> Iterator[list[float]]:
    """While the body runs, wait for a rank to begin this event, then act on its process.

    Yields the times at which that was done.
    """
    for beacon in Path(os.environ["HELIX_FAULTS_BEACONS"]).iterdir():
        beacon.unlink()
    done: list[float] = []
    over = threading.Event()

    def watch() -> None:
        while where(rank) < event and not over.is_set():
            time.sleep(0.002)
        if not over.is_set():
            done.append(time.monotonic())
            act(worker(rank))

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield done
    finally:
        over.set()
        thread.join()


def kill(pid: int) -> None:
    """End a process at once, whatever it is doing."""
    os.kill(pid, signal.SIGKILL)


def stop(pid: int) -> None:
    """Stop a process; it stays there and says nothing."""
    os.kill(pid, signal.SIGSTOP)


def slow(pid: int) -> None:
    """Stop a process for most of the next two seconds."""
    for _ in range(20):
        os.kill(pid, signal.SIGSTOP)
        time.sleep(0.09)
        os.kill(pid, signal.SIGCONT)
        time.sleep(0.01)
