"""Processes that end with whoever started them, and with all that they have started themselves.

A process of ours is told by the system when its parent ends (`leash`), and is the parent of what
its descendants leave behind: so even a daemon of an engine can be found, and is ended with it.
"""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Final

from helix_conformance.drive import leash


class Told(KeyboardInterrupt):
    """A signal has told this process to end, as Ctrl-C does.

    Parameters
    ----------
    number : int
        The signal's.
    """

    def __init__(self, number: int = signal.SIGINT) -> None:
        super().__init__()
        self.status = 128 + number
        """The exit status, as a shell has it."""


ENDED_WITHIN_S: Final = 2.0
"""How long what was killed may take to be gone."""


def leashed(command: Sequence[str], *, apart: bool = False) -> list[str]:
    """Return a command that runs another one, which ends when this process does.

    Parameters
    ----------
    command : sequence of str
        The program and its arguments.
    apart : bool
        Whether it has a network of its own, in which there is the loopback alone.

    Examples
    --------
    >>> leashed(["ls"])[-1]
    'ls'
    """
    how = "apart" if apart else "-"
    return [sys.executable, "-I", "-S", leash.__file__, how, str(os.getpid()), *command]


def end_with_the_parent() -> None:
    """Have the system end this process when the one that started it ends."""
    leash.control(leash.PR_SET_PDEATHSIG, signal.SIGKILL)


def descendants(pid: int) -> list[int]:
    """Return the processes that have come from one, and live: children before their own.

    Parameters
    ----------
    pid : int
        Process id.
    """
    children = defaultdict[int, list[int]](list)
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has just ended
            state, parent, *_ = stat.read_text(errors="replace").rpartition(")")[2].split()
            if state not in "ZX":
                children[int(parent)].append(int(stat.parent.name))
    found = [pid]
    for one in found:
        found += children[one]
    return found[1:]


def end(pid: int) -> None:
    """End a process and all that has come from it, at once.

    Parameters
    ----------
    pid : int
        Process id of a child of this process, which has not been waited for.
    """
    _send(pid, signal.SIGSTOP)  # so that it starts no more, and stays the parent of them all
    _end_all(lambda: descendants(pid))
    _send(pid, signal.SIGKILL)


def _end_all(left: Callable[[], list[int]]) -> None:
    """Kill what is left until nothing is."""
    until = time.monotonic() + ENDED_WITHIN_S
    while (pids := left()) and time.monotonic() < until:
        for pid in pids:
            _send(pid, signal.SIGKILL)


@contextmanager
def nothing_left() -> Iterator[None]:
    """End whatever the body has started, and what that has left behind, when the body is over.

    Within it a signal that would end this process raises `Told`.
    """
    before = set(descendants(os.getpid()))
    leash.control(leash.PR_SET_CHILD_SUBREAPER, 1)
    try:
        with _signals_are_raised():
            yield
    finally:
        _end_all(lambda: [pid for pid in descendants(os.getpid()) if pid not in before])
        leash.control(leash.PR_SET_CHILD_SUBREAPER, 0)


@contextmanager
def _signals_are_raised() -> Iterator[None]:
    """Raise `Told` for signals that would end this process without a word."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def told(number: int, _: object) -> None:
        raise Told(number)

    numbers = [n for n in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(n) is signal.SIG_DFL]
    for number in numbers:
        signal.signal(number, told)
    try:
        yield
    finally:
        for number in numbers:
            if signal.getsignal(number) is told:  # a driver may have set its own, which stays
                signal.signal(number, signal.SIG_DFL)


def _send(pid: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.kill(pid, number)
