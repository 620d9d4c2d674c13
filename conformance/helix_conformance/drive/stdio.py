"""Ranks that are processes of any language, spoken to in JSON lines: see PROTOCOL.md.

Each rank is a child of its own. It is started once and plays many traces; after a failure all are
ended, and started anew for the next trace. A child's stdout carries its answers and nothing else,
the end of its stderr is shown when it fails.
"""

from __future__ import annotations

import os
import selectors
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from typing import IO, Final, NoReturn

from helix_conformance.drive.asking import AnswerError, ReportedError, words
from helix_conformance.drive.driver import Answer, EngineFailure, Played, Watch, signal_name
from helix_conformance.drive.messages import (
    PROTOCOL,
    Apply,
    Failed,
    FromEngine,
    Hello,
    LayoutParts,
    Observe,
    Outcome,
    Ready,
    Start,
    ToEngine,
    View,
    answer_of,
    line_of,
    spec_outcome,
    spec_view,
)
from helix_conformance.engines import COMMAND, EngineSpecError, load_engine
from helix_spec.config import Config
from helix_spec.engine import Outcome as SpecOutcome
from helix_spec.engine import declaration_problem
from helix_spec.events import Event, ids_of

START_LIMIT_S: Final = 120.0
"""How long a process may take until it says `ready`: it may have much to load."""
FAREWELL_S: Final = 2.0
"""How long processes may take to end once their stdin has; then they are killed."""
MAX_LINE_BYTES: Final = 2**28
"""Bytes of one answer; a line that does not end before is garbage."""
KEPT: Final = 2**16
"""Bytes of stderr that are kept of each process, the last ones."""
SHOWN: Final = 1000
"""Bytes of them that a failure shows."""
_CHUNK: Final = 2**16


def command_of(engine: str) -> list[str]:
    """The words of the command that runs one rank of this engine.

    `stdio:COMMAND` is split as a shell would, and no shell runs it. A Python engine is served.
    Raises EngineSpecError when there is no command in it.
    """
    if not engine.startswith(COMMAND):
        if load_engine(engine).needs_processes:
            raise EngineSpecError(
                f"Engine {engine} needs torch.distributed among its ranks; use --driver pool."
            )
        return [sys.executable, "-m", "helix_conformance.drive.serve", engine]
    try:
        command = shlex.split(engine.removeprefix(COMMAND))
    except ValueError as error:
        raise EngineSpecError(f"{engine!r} cannot be split into words: {error}.") from error
    if not command:
        raise EngineSpecError(f"{engine!r} names no command; give stdio:COMMAND.")
    return command


class _Child:
    """The process of one rank: what it has still to be told, and what it has said."""

    def __init__(self, rank: int, command: Sequence[str]) -> None:
        self.rank = rank
        self.process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            start_new_session=True,  # so that whatever it starts can be ended with it
            env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        )
        self.stdin = _unblocked(self.process.stdin)
        self.stdout = _unblocked(self.process.stdout)
        self.stderr = _unblocked(self.process.stderr)
        self.unsent = bytearray()
        self.unread = bytearray()
        self.searched = 0
        """Bytes of `unread` that are known to hold no end of a line."""
        self.last_words = b""
        self.due: list[tuple[int, type[FromEngine]]] = []
        """Numbers of the requests that wait for an answer, and of what kind."""
        self.answers: list[FromEngine] = []

    def ask(self, requests: Sequence[ToEngine]) -> None:
        """Put requests on their way."""
        self.answers = []
        for request in requests:
            self.due.append((request.seq, _ANSWERED_BY[type(request)]))
            self.unsent += line_of(request)
        self.write()

    def write(self) -> None:
        """As much as the pipe takes now. That it is closed shows by the end of stdout."""
        try:
            while self.unsent:
                del self.unsent[: os.write(self.stdin, self.unsent[:_CHUNK])]
        except BlockingIOError:
            return
        except OSError:
            self.unsent.clear()

    def listen(self) -> bool:
        """Take what is on stdout; whether it has not ended.

        Raises AnswerError, and ReportedError when a failure is all that it says.
        """
        chunk = os.read(self.stdout, _CHUNK)
        self.unread += chunk
        while (end := self.unread.find(b"\n", self.searched)) >= 0:
            line = bytes(self.unread[:end])
            del self.unread[: end + 1]
            self.searched = 0
            self._take(answer_of(line))
        self.searched = len(self.unread)
        if self.searched > MAX_LINE_BYTES:
            raise AnswerError(f"its line is longer than {MAX_LINE_BYTES} bytes")
        return bool(chunk)

    def _take(self, answer: FromEngine) -> None:
        if isinstance(answer, Failed):
            raise ReportedError(answer.what)
        told = type(answer).__name__.lower()
        if not self.due:
            raise AnswerError(f"it sent {told} {answer.seq}, and nothing was asked")
        seq, kind = self.due.pop(0)
        if answer.seq != seq:
            raise AnswerError(f"it answered request {answer.seq}, and was asked {seq}")
        if not isinstance(answer, kind):
            raise AnswerError(f"it sent {told} where {kind.__name__.lower()} is due")
        self.answers.append(answer)

    def listen_to_stderr(self) -> bool:
        """Keep the end of what is on stderr; whether it has not ended."""
        chunk = os.read(self.stderr, _CHUNK)
        self.last_words = (self.last_words + chunk)[-KEPT:]
        return bool(chunk)

    def how_it_ended(self) -> str:
        """What to say of a process whose stdout has ended."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return "closed its stdout without an answer"
        if code < 0:
            return f"died with signal {signal_name(-code)}"
        return f"exited with status {code}"

    def stderr_words(self) -> str:
        """The end of its stderr, as the end of a sentence."""
        with suppress(OSError):  # there is no more to read now
            while self.listen_to_stderr():
                pass
        text = self.last_words[-SHOWN:].decode(errors="replace").strip()
        return f"; its stderr ends: {text!r}" if text else "; its stderr is empty"

    def kill(self) -> None:
        """End the process, and all that it has started, at once."""
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            if pipe is not None:
                with suppress(OSError):
                    pipe.close()


class StdioDriver:
    """One child for each rank, told each event at the same time as the others.

    `deadline_s` is how long the ranks may take for one event.
    """

    name = "stdio"
    largest_world: int | None = None
    streams = True

    def __init__(self, engine: str, *, deadline_s: float = 30.0) -> None:
        self.engine = engine
        self.command = command_of(engine)
        self.deadline_s = deadline_s
        self.survives_failure = True
        self.seq = 0
        self.children: list[_Child] = []
        self.selector = selectors.DefaultSelector()
        self.profiles: frozenset[str] = frozenset()
        self.settings: dict[str, str] = {}
        self._have(1)

    def play(
        self, config: Config, profiles: frozenset[str], events: Iterable[Event], watch: Watch
    ) -> Iterator[Played]:
        """See `Driver.play`."""
        world, checked = config.world_size, sorted(profiles)
        layout = LayoutParts(**config.layout.parts())
        self._have(world)
        seq = self._next()
        starts = [[Start(seq, rank, world, config, layout, checked)] for rank in range(world)]
        yield None, self._ask(None, None, starts, profiles)
        for index, event in enumerate(events):
            requests: list[ToEngine] = [Apply(self._next(), event)]
            if watch.looks(index):
                ids = None if watch.whole(index) else ids_of(event)
                requests.append(Observe(self._next(), ids))
            yield event, self._ask(index, event, [requests] * world, profiles)
        at_last = [[Observe(self._next(), None)]] * world
        yield None, self._ask(None, None, at_last, profiles)

    def close(self) -> None:
        """Let the children go: their stdin ends, and soon they have."""
        for child in self.children:
            if child.process.stdin is not None:
                child.process.stdin.close()
        until = time.monotonic() + FAREWELL_S
        for child in self.children:
            with suppress(subprocess.TimeoutExpired):
                child.process.wait(max(0.0, until - time.monotonic()))
        self._kill()

    def _next(self) -> int:
        self.seq += 1
        return self.seq

    def _have(self, world: int) -> None:
        """Start the children that are missing. They must declare what the first one does."""
        new = range(len(self.children), world)
        for rank in new:
            try:
                child = _Child(rank, self.command)
            except OSError as error:
                self._kill()
                what = f"cannot be started: {self.command[0]}: {error.strerror}"
                raise EngineFailure(rank, None, what) from error
            self.children.append(child)
            self.selector.register(child.stdout, selectors.EVENT_READ, (child, child.listen))
            self.selector.register(
                child.stderr, selectors.EVENT_READ, (child, child.listen_to_stderr)
            )
            child.ask([Hello(self._next())])
        self._collect([self.children[rank] for rank in new], None, START_LIMIT_S)
        for rank in new:
            self._welcome(self.children[rank])

    def _welcome(self, child: _Child) -> None:
        (ready,) = child.answers
        assert isinstance(ready, Ready)
        if ready.protocol != PROTOCOL:
            self._fail(child, None, f"speaks {ready.protocol!r}, and the suite {PROTOCOL}")
        problem = declaration_problem(ready.profiles)
        if problem is not None:
            self._fail(child, None, problem.rstrip("."))
        if child.rank == 0:
            self.profiles = frozenset(ready.profiles)
            self.settings = {"engine": ready.engine, "version": ready.version, **ready.settings}
        elif self.profiles != frozenset(ready.profiles):
            told, first = ", ".join(sorted(ready.profiles)), ", ".join(sorted(self.profiles))
            self._fail(child, None, f"declares {told}, where rank 0 declares {first}")

    def _ask(
        self,
        at: int | None,
        event: Event | None,
        requests: Sequence[Sequence[ToEngine]],
        profiles: frozenset[str],
    ) -> list[Answer]:
        """Ask each rank its requests, and have their answers. Raises EngineFailure."""
        ranks = self.children[: len(requests)]
        for child, asked in zip(ranks, requests, strict=True):
            child.ask(asked)
        self._collect(ranks, at, self.deadline_s)
        answers = []
        for child, asked in zip(ranks, requests, strict=True):
            try:
                answers.append(_answer(asked, child.answers, event, profiles))
            except AnswerError as error:
                self._fail(child, at, words(error))
        return answers

    def _collect(self, ranks: Sequence[_Child], at: int | None, limit_s: float) -> None:
        """Write and listen until these ranks have answered. Raises EngineFailure."""
        until = time.monotonic() + limit_s
        writing = {child for child in ranks if child.unsent}
        for child in writing:
            self.selector.register(child.stdin, selectors.EVENT_WRITE, (child, child.write))
        while any(child.due for child in ranks):
            left = until - time.monotonic()
            if left <= 0:
                self._hung([child for child in ranks if child.due], at, limit_s)
            for key, _ in self.selector.select(left):
                child, act = key.data
                try:
                    goes_on = act()
                except (AnswerError, ReportedError) as error:
                    self._fail(child, at, words(error))
                if act == child.write:
                    if not child.unsent:
                        writing.discard(child)
                        self.selector.unregister(child.stdin)
                elif not goes_on and act == child.listen:
                    self._fail(child, at, child.how_it_ended())
                elif not goes_on:
                    self.selector.unregister(child.stderr)
        for child in writing:  # it answered before it had read all
            self.selector.unregister(child.stdin)

    def _hung(self, silent: Sequence[_Child], at: int | None, limit_s: float) -> NoReturn:
        """Some ranks have not answered in time: the first is named, the others with it."""
        self.survives_failure = False  # to try again and again would take for ever
        what = f"hung: it has not answered for {limit_s:g} seconds"
        others = ", ".join(str(child.rank) for child in silent[1:])
        self._fail(silent[0], at, what + (f"; nor have ranks {others}" if others else ""))

    def _fail(self, child: _Child, at: int | None, what: str) -> NoReturn:
        """End all children, and say what this one did."""
        failure = EngineFailure(child.rank, at, what + child.stderr_words())
        self._kill()
        raise failure

    def _kill(self) -> None:
        self.selector.close()
        self.selector = selectors.DefaultSelector()
        for child in self.children:
            child.kill()
        self.children = []


_ANSWERED_BY: Final[dict[type[ToEngine], type[FromEngine]]] = {
    Hello: Ready,
    Start: Outcome,
    Apply: Outcome,
    Observe: View,
}


def _answer(
    asked: Sequence[ToEngine],
    told: Sequence[FromEngine],
    event: Event | None,
    profiles: frozenset[str],
) -> Answer:
    """One rank's answers to the requests of one event. Raises AnswerError."""
    outcome, view = SpecOutcome(), None
    for request, answer in zip(asked, told, strict=True):
        if isinstance(answer, Outcome):
            outcome = spec_outcome(answer, event, profiles)
        elif isinstance(answer, View) and isinstance(request, Observe):
            view = spec_view(answer, request.ids, profiles)
    return Answer(outcome, view)


def _unblocked(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe.fileno()
