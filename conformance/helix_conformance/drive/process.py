"""Ranks in processes that speak PROTOCOL.md: commands of any language, and a pool of our own.

Requests are sent ahead of the answers, a bounded number of events, where the ranks share no process
group. The answers to each event are yielded once all ranks have given theirs. A process's stdout
carries its answers and nothing else; the end of its stderr is shown when it fails.
"""

from __future__ import annotations

import errno
import fcntl
import os
import selectors
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import islice
from typing import Any, Final, NamedTuple

import msgspec

from helix_conformance.drive import messages
from helix_conformance.drive.asking import MalformedAnswer, words
from helix_conformance.drive.blame import NOTHING_DUE, blame_silent, first_cause
from helix_conformance.drive.driver import Answer, EngineFailure, Kind, Played, signal_name
from helix_conformance.drive.meeting import Group, hosted_store
from helix_conformance.drive.messages import MAX_LINE_BYTES
from helix_conformance.drive.processes import end, leashed
from helix_conformance.engines import COMMAND, EngineSpecError, load_engine, needs_group
from helix_conformance.foreign import bounded
from helix_spec.capabilities import EVERYWHERE, STRICT, boxes_of
from helix_spec.config import Config
from helix_spec.engine import Outcome, declaration_problem
from helix_spec.events import Event, ids_of
from helix_spec.trace import Watch

START_LIMIT_S: Final = float(os.environ.get("HELIX_START_LIMIT_S", "120"))
"""How long a process may take until it says `ready`: it may have much to load, torch at least."""
GRACE_S: Final = 0.5
"""How long the others may take to fail too, once one has: the first is not always to blame."""
DRAIN_S: Final = 5.0
"""How long ranks may be silent that have still to answer what nobody wants to know any more."""
FAREWELL_S: Final = 2.0
"""How long processes may take to end once their stdin has; then they are killed."""
LOOK_S: Final = 0.5
"""How long a silent process may take to print where it is."""
WINDOW: Final = 64
"""Events that may be under way on ranks that share no process group."""
UNSENT: Final = 2**20
"""Bytes that may wait to be written to one rank before no more events are drawn."""
KEPT: Final = 2**16
"""Bytes of stderr that are kept of each process, the last ones."""
SHOWN: Final = 1000
"""Bytes of them that a failure shows."""
_CHUNK: Final = 2**16
_PIPE: Final = 2**20
"""Bytes that a pipe holds while nobody reads, where the system lets it."""
_WAKE_S: Final = 0.5
"""How often a wait looks up, to see whether this process was told to stop."""


class Lines:
    """Lines to and from another process, over descriptors that never block.

    Parameters
    ----------
    source : int
        File descriptor to read from.
    sink : int
        File descriptor to write to; another one than `source`, since each is closed alone.
    """

    def __init__(self, source: int, sink: int) -> None:
        self.source, self.sink = source, sink
        for descriptor in (source, sink):
            os.set_blocking(descriptor, False)
        self.unsent = bytearray()
        self.rest = bytearray()
        """The beginning of a line whose end has not come."""

    def put(self, data: bytes) -> None:
        """Queue whole lines, their ends included, and write what can be written now."""
        self.unsent += data
        self.write()

    def write(self) -> bool:
        """Write what can be written now, and return True, as `Loop` wants it.

        When the other process reads no more, the end of `read` shows it.
        """
        try:
            while self.unsent:
                del self.unsent[: self.send(self.unsent[:_CHUNK])]
        except BlockingIOError:
            pass
        except OSError:
            self.unsent.clear()
        return True

    def read(self) -> list[bytes]:
        """Return the lines that are complete now, without their ends.

        Raises
        ------
        EOFError
            When no more will come.
        MalformedAnswer
            When a line is too long.
        """
        try:
            chunk = self.receive()
        except BlockingIOError:
            return []
        except OSError:
            chunk = b""
        if not chunk:
            raise EOFError
        first, end, behind = chunk.partition(b"\n")
        self.rest += first
        if len(self.rest) > MAX_LINE_BYTES:
            raise MalformedAnswer(f"its line is longer than {MAX_LINE_BYTES} bytes")
        if not end:
            return []
        *others, rest = behind.split(b"\n")
        lines = [bytes(self.rest), *others]
        self.rest = bytearray(rest)
        return lines

    def send(self, data: bytearray) -> int:
        """Write some of the bytes; return how many.

        Raises
        ------
        BlockingIOError
            When there is no room.
        """
        return os.write(self.sink, data)

    def receive(self) -> bytes:
        """Return some bytes, none at the end.

        Raises
        ------
        BlockingIOError
            When there are none yet.
        """
        return os.read(self.source, _CHUNK)

    def close(self) -> None:
        """Close both directions."""
        self.hang_up()
        with suppress(OSError):
            os.close(self.source)
        self.source = -1

    def hang_up(self) -> None:
        """Close what the other process reads."""
        self.unsent.clear()
        with suppress(OSError):
            os.close(self.sink)
        self.sink = -1


class Loop:
    """Waits for whatever processes send, and writes what they can take."""

    def __init__(self) -> None:
        self.selector = selectors.DefaultSelector()
        self.writers: list[Lines] = []

    def add(self, lines: Lines, listen: Callable[[], bool]) -> None:
        """Take in lines in both directions.

        Parameters
        ----------
        lines : Lines
            What is written whenever its process can take it.
        listen : function without parameters that returns bool
            What reads them; see `hear`.
        """
        self.writers.append(lines)
        self.hear(lines.source, listen)

    def hear(self, source: int, listen: Callable[[], bool]) -> None:
        """Call `listen` when there is something to read, until it returns False.

        Parameters
        ----------
        source : int
            File descriptor to read from.
        listen : function without parameters that returns bool
            It reads, and returns whether there may be more.
        """
        self.selector.register(source, selectors.EVENT_READ, listen)

    def turn(self, timeout_s: float | None) -> None:
        """Wait until something can be read or written, or until the time is over.

        Parameters
        ----------
        timeout_s : float or None
            The most seconds to wait; None for no limit.
        """
        writing = [lines for lines in self.writers if lines.unsent]
        for lines in writing:
            self.selector.register(lines.sink, selectors.EVENT_WRITE, lines.write)
        try:
            for key, _ in self.selector.select(timeout_s):
                if not key.data():
                    self.selector.unregister(key.fd)
        finally:
            for lines in writing:
                self.selector.unregister(lines.sink)

    def close(self) -> None:
        """Forget all."""
        self.selector.close()
        self.writers = []


class Due(NamedTuple):
    """An answer that a rank owes.

    Parameters
    ----------
    seq : int
        Number of the request.
    kind : type
        Class of the message that answers it, when it is not `Failed`.
    event : int or None
        Index of the event that it is about.
    """

    seq: int
    kind: type[messages.FromEngine]
    event: int | None


class Rank:
    """One rank of an engine: what it has still to answer, and what it has answered.

    Parameters
    ----------
    rank : int
        The global rank.
    lines : Lines
        Lines to and from the process that answers for it.
    loop : Loop
        The loop that all ranks of a trace share.
    """

    def __init__(self, rank: int, lines: Lines, loop: Loop) -> None:
        self.rank, self.lines, self.loop = rank, lines, loop
        self.due: deque[Due] = deque()
        self.answers: deque[messages.FromEngine | EngineFailure] = deque()
        """What it has answered; a failure in place of each answer that says so."""
        self.heard = time.monotonic()
        """When it last said anything."""
        self.failed: EngineFailure | None = None
        """Why no more will be heard."""
        self.answered_last: int | None = None
        """Index of the last event of the trace that it has answered."""
        loop.add(lines, self.listen)

    @property
    def at(self) -> int | None:
        """Index of the event that the rank is at; None outside any event."""
        return self.due[0].event if self.due else None

    @property
    def begun(self) -> int | None:
        """Index of the last event that the rank has begun, as far as its answers tell."""
        return self.answered_last if self.at is None else self.at

    @property
    def progress(self) -> float:
        """Number of the request that the rank is at; infinite when no answer is due."""
        return self.due[0].seq if self.due else NOTHING_DUE

    def ask(self, lines: bytes, due: Iterable[Due]) -> None:
        """Queue requests; `lines.write` puts them on their way.

        Parameters
        ----------
        lines : bytes
            The requests, one line each.
        due : iterable of Due
            The answers that they are owed, in the same order.
        """
        self.due.extend(due)
        self.lines.unsent += lines

    def listen(self) -> bool:
        """Take what the rank has sent; return whether there may be more."""
        try:
            for line in self.lines.read():
                self.take(line)
        except EOFError:
            self.failed = self.failed or self.ended()
        except MalformedAnswer as error:
            self.failed = self.failed or self.failure(words(error))
        self.heard = time.monotonic()
        return self.failed is None

    def take(self, line: bytes) -> None:
        """Take one line.

        Raises
        ------
        MalformedAnswer
            When the line is no answer, or another one is due.
        """
        self.answered(messages.answer_of(line))

    def answered(self, answer: messages.FromEngine) -> None:
        """Take one answer.

        Raises
        ------
        MalformedAnswer
            When none or another one is due.
        """
        if not self.due:
            raise MalformedAnswer(f"it sent {_kind(answer)} {answer.seq}, and nothing was asked")
        seq, kind, event = self.due[0]
        if isinstance(answer, messages.Failed):
            failure = self.failure(answer.what)
            failure.traceback = bounded(answer.traceback)
            self.answers.append(failure)
        elif answer.seq != seq:
            raise MalformedAnswer(f"it answered request {answer.seq}, and was asked {seq}")
        elif not isinstance(answer, kind):
            due = kind.__name__.lower()
            raise MalformedAnswer(f"it sent {_kind(answer)} where {due} is due")
        else:
            self.answers.append(answer)
        self.answered_last = self.answered_last if event is None else event
        self.due.popleft()

    def failure(self, what: str, how: Kind = "raised") -> EngineFailure:
        """Return what went wrong with this rank, at the event that it is at.

        Parameters
        ----------
        what : str
            Verb and object, for a sentence that begins with the rank.
        how : Kind
            How it failed, one of `KINDS`.

        Returns
        -------
        EngineFailure
            The failure, to be raised or kept.
        """
        return EngineFailure(self.rank, self.at, what, how)

    def failure_in(self, count: int) -> EngineFailure | None:
        """Return why the first `count` answers are not all good; None if they are or may be."""
        for answer in islice(self.answers, count):
            if isinstance(answer, EngineFailure):
                return answer
        return self.failed if len(self.answers) < count else None

    def ended(self) -> EngineFailure:
        """Return the failure of a rank that has closed its lines."""
        raise NotImplementedError

    def look(self) -> None:
        """Begin to find out where the rank is."""
        raise NotImplementedError

    def waits_for_peers(self) -> bool:
        """Return, after `look`, whether the rank is blocked in a collective."""
        raise NotImplementedError

    def kill(self) -> None:
        """End the rank at once."""
        raise NotImplementedError


def _kind(answer: messages.FromEngine) -> str:
    return type(answer).__name__.lower()


class Child(Rank):
    """A rank that is a process of this one.

    Parameters
    ----------
    rank : int
        The global rank.
    command : sequence of str
        The command and its arguments; no shell runs it.
    loop : Loop
        The loop that all ranks of a trace share.
    ours : bool
        Whether the process is `drive.serve`, which prints where it is when it is asked.

    Raises
    ------
    EngineFailure
        When the command cannot be started.
    """

    def __init__(self, rank: int, command: Sequence[str], loop: Loop, *, ours: bool) -> None:
        self.ours = ours
        self.last_words, self.printed, self.printed_before_look = b"", 0, 0
        try:
            _check_there(command[0])
            self.process = subprocess.Popen(
                leashed(command),
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # so that whatever it starts can be ended with it
                env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
            )
        except OSError as error:
            what = f"cannot be started: {command[0]}: {error.strerror}"
            raise EngineFailure(rank, None, what) from error
        sink, source, self.stderr = (
            os.dup(pipe.fileno())  # type: ignore[union-attr]  # all three are pipes
            for pipe in (self.process.stdin, self.process.stdout, self.process.stderr)
        )
        for pipe in (self.process.stdin, self.process.stdout, self.process.stderr):
            pipe.close()  # type: ignore[union-attr]
        if hasattr(fcntl, "F_SETPIPE_SZ"):
            with suppress(OSError):  # there is a limit for each user
                fcntl.fcntl(source, fcntl.F_SETPIPE_SZ, _PIPE)
        super().__init__(rank, Lines(source, sink), loop)
        os.set_blocking(self.stderr, False)
        loop.hear(self.stderr, self.listen_to_stderr)

    def listen_to_stderr(self) -> bool:
        """Keep the end of what is on stderr; return whether there may be more."""
        try:
            chunk = os.read(self.stderr, _CHUNK)
        except BlockingIOError:
            return True
        self.last_words = (self.last_words + chunk)[-KEPT:]
        self.printed += len(chunk)
        return bool(chunk)

    def failure(self, what: str, how: Kind = "raised") -> EngineFailure:
        """See `Rank.failure`; of a command, and of a process that died, with its last words."""
        if how != "died" and self.ours:
            return super().failure(what, how)
        for _ in range(_PIPE // _CHUNK):  # as much as there may be, and no more of a flood
            self.listen_to_stderr()
        text = self.last_words[-SHOWN:].decode(errors="replace").strip()
        end = f"; its stderr ends: {text!r}" if text else "; its stderr is empty"
        return super().failure(what + end, how)

    def ended(self) -> EngineFailure:
        """See `Rank.ended`."""
        try:
            code = self.process.wait(timeout=1)
        except subprocess.TimeoutExpired:
            return self.failure("closed its stdout without an answer", "died")
        if code < 0:
            return self.failure(f"died with signal {signal_name(-code)}", "died")
        return self.failure(f"exited with status {code}", "died")

    def look(self) -> None:
        """See `Rank.look`: its faulthandler prints where every thread is."""
        self.printed_before_look = self.printed
        if self.ours:
            self.process.send_signal(signal.SIGUSR1)

    def waits_for_peers(self) -> bool:
        """See `Rank.waits_for_peers`."""
        until = time.monotonic() + LOOK_S
        while self.ours and time.monotonic() < until:
            new = self.printed - self.printed_before_look
            if new and b"torch/distributed" in self.last_words[-new:]:
                return True
            self.loop.turn(0.01)
        return False

    def kill(self) -> None:
        """See `Rank.kill`: with all that the process has started."""
        if self.process.poll() is None:
            end(self.process.pid)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)  # what it left behind when it died
        self.process.wait()
        self.lines.close()
        os.close(self.stderr)


def _check_there(program: str) -> None:
    """Raise OSError when there is no such program: it is another one that starts it."""
    if shutil.which(program) is None:
        number = errno.EACCES if os.path.exists(program) else errno.ENOENT
        raise OSError(number, os.strerror(number))


def collect(
    ranks: Sequence[Rank],
    count: int,
    limit_s: float,
    told_to_stop: Callable[[], bool] = lambda: False,
) -> None:
    """Wait until each rank has given so many answers.

    Parameters
    ----------
    ranks : sequence of Rank
        The ranks of the trace, which share a loop.
    count : int
        Answers that are needed of each; they are left in `Rank.answers`.
    limit_s : float
        Seconds that the ranks whose answers are missing may all be silent for.
    told_to_stop : function without parameters that returns bool
        Whether this process has to give up.

    Raises
    ------
    EngineFailure
        Of the rank to blame, when some fail or are silent for too long.
    """
    began, grace = time.monotonic(), 0.0
    while True:
        failures = [failed for rank in ranks if (failed := rank.failure_in(count))]
        missing = [rank for rank in ranks if len(rank.answers) < count and not rank.failed]
        if not failures and not missing:
            return
        now = time.monotonic()
        if told_to_stop():
            failures.append(ranks[0].failure("was told to stop", "stopped"))
        if failures:
            grace = grace or now + GRACE_S
            if not missing or now >= grace:
                failure = first_cause([*failures, *(rank.failed for rank in ranks if rank.failed)])
                if failure.how == "gone":  # with its supervisor its last answers may be lost
                    failure.event = max(
                        (r.begun for r in ranks if r.begun is not None), default=None
                    )
                raise failure
        until = grace or max(began, *(rank.heard for rank in missing)) + limit_s
        if now >= until:
            raise blame_silent(missing, ranks, limit_s)
        ranks[0].loop.turn(min(until - now, _WAKE_S))


class Request(msgspec.Struct, frozen=True):
    """What all ranks are asked about one event.

    Parameters
    ----------
    index : int or None
        Index of the event; None at the start and at the end.
    event : Event or None
        The event; None at the start and at the end.
    asked : sequence of messages
        The requests, in the order in which they are sent.
    """

    index: int | None
    event: Event | None
    asked: Sequence[messages.ToEngine]

    def due(self) -> list[Due]:
        """Return the answers that each rank owes for it."""
        return [Due(m.seq, messages.ANSWERED_BY[type(m)], self.index) for m in self.asked]

    def answer(self, told: Sequence[Any], profiles: frozenset[str]) -> Answer:
        """Return one rank's answers in the words of the specification.

        Parameters
        ----------
        told : sequence of messages
            What the rank has answered, a message for each of `asked`.
        profiles : frozenset of str
            The profiles that are checked.

        Raises
        ------
        MalformedAnswer
            When a message leaves out what a profile needs; see `messages.spec_outcome` and
            `messages.spec_view`.
        """
        outcome, view = Outcome(), None
        for message, answer in zip(self.asked, told, strict=True):
            if isinstance(answer, messages.Outcome):
                outcome = messages.spec_outcome(answer, self.event, profiles)
            elif isinstance(answer, messages.View) and isinstance(message, messages.Observe):
                view = messages.spec_view(answer, message.ids, profiles)
        return Answer(outcome, view)


class ProcessDriver:
    """What all drivers whose ranks are processes have in common.

    Parameters
    ----------
    engine : str
        `stdio:COMMAND`, or the name of a Python engine as `load_engine` takes it.
    deadline_s : float
        Seconds that the ranks may take for one event.
    in_group : bool
        Whether the ranks share a process group. They are asked one event at a time then: a rank
        that leaves out a collective must not meet that of its peers' next event.
    """

    name = "process"
    largest_world: int | None = None
    survives_failure = False

    def __init__(self, engine: str, deadline_s: float, *, in_group: bool = False) -> None:
        self.engine, self.deadline_s = engine, deadline_s
        self.seq = 0
        self.loop = Loop()
        self.ranks: list[Rank] = []
        self.profiles: frozenset[str] = frozenset()
        self.capabilities = EVERYWHERE
        self.freedoms = STRICT
        self.settings: dict[str, str] = {}
        self.takes_exchanges_done = False
        self.exchanges_done = 0
        self.told_to_stop = False
        self.window = 1 if in_group else WINDOW

    @property
    def streams(self) -> bool:
        """See `Driver.streams`."""
        return self.window == 1

    def start_ranks(self, world: int) -> list[Rank]:
        """Start the ranks that are missing for a world of `world` ranks, and return them.

        Raises
        ------
        EngineFailure
            When one cannot be started.
        """
        raise NotImplementedError

    def play(
        self,
        config: Config,
        profiles: frozenset[str],
        events: Iterable[Event],
        watch: Watch,
        *,
        again: bool = False,
    ) -> Iterator[Played]:
        """See `Driver.play`: up to a window of events is sent ahead of the answers."""
        self._drain()
        self._have(config.world_size)
        try:
            yield from self._played(config, profiles, enumerate(events), watch, again)
        except EngineFailure as failure:
            if failure.how == "timed out":
                self.survives_failure = False  # to try again and again would take for ever
            self.kill()
            raise

    def close(self) -> None:
        """End the stdin of the processes, wait for them to end, and kill those that have not."""
        until = time.monotonic() + FAREWELL_S
        children = [rank for rank in self.ranks if isinstance(rank, Child)]
        for child in children:
            child.lines.hang_up()
        while time.monotonic() < until and any(c.process.poll() is None for c in children):
            self.loop.turn(0.01)  # what they are still writing keeps them from ending
        self.kill()

    def renew(self) -> bool:
        """See `Driver.renew`; ranks that were launched with this process cannot be."""
        if self.survives_failure:
            self.kill()
        return self.survives_failure

    def kill(self) -> None:
        """End all ranks at once."""
        self.loop.close()
        self.loop = Loop()
        for rank in self.ranks:
            rank.kill()
        self.ranks = []

    def _played(
        self,
        config: Config,
        profiles: frozenset[str],
        events: Iterator[tuple[int, Event]],
        watch: Watch,
        again: bool,
    ) -> Iterator[Played]:
        ranks, answers = self.ranks[: config.world_size], self._begun(config, profiles, again)
        yield None, answers
        if any(answer.outcome.reason is not None for answer in answers):
            return  # it has not started: there is nothing more to ask
        pending: deque[Request] = deque()
        drawn = False
        while pending or not drawn:
            if not drawn and len(pending) <= self.window // 2:
                drawn = self._send_ahead(ranks, pending, events, watch)
            request = pending.popleft()
            yield request.event, self._answers(ranks, request, profiles)

    def _begun(self, config: Config, profiles: frozenset[str], again: bool) -> list[Answer]:
        world, seq = config.world_size, self._next()
        layout, checked = messages.LayoutParts(**config.layout.parts()), sorted(profiles)
        starts = [
            messages.Start(seq, rank, world, config, layout, checked, again, self.exchanges_done)
            for rank in range(world)
        ]
        request = Request(None, None, starts[:1])
        for rank, message in zip(self.ranks, starts, strict=False):
            rank.answered_last = None
            rank.ask(messages.line_of(message), request.due())
            rank.lines.write()
        return self._answers(self.ranks[:world], request, profiles)

    def _send_ahead(
        self,
        ranks: Sequence[Rank],
        pending: deque[Request],
        events: Iterator[tuple[int, Event]],
        watch: Watch,
    ) -> bool:
        """Fill the window; whether there are no more events."""
        drawn = False
        while not drawn and len(pending) < self.window:
            request = self._request(next(events, None), watch)
            drawn = request.event is None
            pending.append(request)
            lines, due = b"".join(map(messages.line_of, request.asked)), request.due()
            for rank in ranks:
                rank.ask(lines, due)
            if max(len(rank.lines.unsent) for rank in ranks) > UNSENT:
                break
        for rank in ranks:
            rank.lines.write()
        return drawn

    def _request(self, drawn: tuple[int, Event] | None, watch: Watch) -> Request:
        """Return what is asked about an event; after the last one, about the whole state."""
        if drawn is None:
            return Request(None, None, [messages.Observe(self._next(), None)])
        index, event = drawn
        asked: list[messages.ToEngine] = [messages.Apply(self._next(), event)]
        if watch.looks(index):
            ids = None if watch.whole(index) else ids_of(event)
            asked += [messages.Observe(self._next(), ids) for _ in range(1 + watch.twice)]
        return Request(index, event, asked)

    def _answers(
        self, ranks: Sequence[Rank], request: Request, profiles: frozenset[str]
    ) -> list[Answer]:
        """Return the answers of all ranks to one request. Raises EngineFailure."""
        count = len(request.asked)
        collect(ranks, count, self.deadline_s, lambda: self.told_to_stop)
        answers = []
        for rank in ranks:
            told = [rank.answers.popleft() for _ in range(count)]
            try:
                answers.append(request.answer(told, profiles))
            except MalformedAnswer as error:
                failure = rank.failure(words(error))
                failure.event = request.index  # by now it may be further on
                raise failure from error
        return answers

    def _drain(self) -> None:
        """Hear out answers that nobody waits for; end the ranks when they do not come."""
        began = time.monotonic()
        while late := [rank for rank in self.ranks if rank.due]:
            silent = time.monotonic() > max(began, *(rank.heard for rank in late)) + DRAIN_S
            if silent or any(rank.failed for rank in late):
                self.kill()
                return
            self.loop.turn(0.1)
        for rank in self.ranks:
            rank.answers.clear()

    def _have(self, world: int) -> None:
        """Start the ranks that are missing. They must declare what the first one does."""
        try:
            if not (new := self.start_ranks(world)):
                return
            request = Request(None, None, [messages.Hello(self._next())])
            for rank in new:
                rank.ask(messages.line_of(request.asked[0]), request.due())
                rank.lines.write()
            collect(new, 1, START_LIMIT_S, lambda: self.told_to_stop)
            for rank in new:
                self._welcome(rank)
        except EngineFailure:
            self.kill()
            raise

    def _welcome(self, rank: Rank) -> None:
        ready = rank.answers.popleft()
        assert isinstance(ready, messages.Ready)
        if ready.protocol != messages.PROTOCOL:
            raise rank.failure(f"speaks {ready.protocol!r}, and the suite {messages.PROTOCOL}")
        problem = declaration_problem(ready.profiles)
        if problem is not None:
            raise rank.failure(problem.rstrip("."))
        try:
            boxes = boxes_of(ready.capabilities)
        except ValueError as error:
            raise rank.failure(str(error).rstrip(".")) from error
        if rank.rank == 0:
            self.profiles, self.settings = frozenset(ready.profiles), self.settings_of(ready)
            self.capabilities, self.freedoms = boxes, ready.freedoms
            self.takes_exchanges_done = ready.takes_exchanges_done
        elif self.profiles != frozenset(ready.profiles):
            told, first = ", ".join(sorted(ready.profiles)), ", ".join(sorted(self.profiles))
            raise rank.failure(f"declares {told}, where rank 0 declares {first}")
        elif (self.capabilities, self.freedoms) != (boxes, ready.freedoms):
            raise rank.failure("declares other capabilities or freedoms than rank 0")

    def settings_of(self, ready: messages.Ready) -> dict[str, str]:
        """Return what a rank reports about how it is set up."""
        return ready.settings

    def _next(self) -> int:
        self.seq += 1
        return self.seq


def command_of(engine: str) -> list[str]:
    """Return the words of the command that runs one rank of an engine.

    Parameters
    ----------
    engine : str
        `stdio:COMMAND`, which is split as a shell would, and no shell runs it; or the name of a
        Python engine, which is served.

    Returns
    -------
    list of str
        The program and its arguments.

    Raises
    ------
    EngineSpecError
        When there is no command in it.

    Examples
    --------
    >>> command_of("stdio:./my_engine --device 'GPU 0'")
    ['./my_engine', '--device', 'GPU 0']
    >>> command_of("reference")[2:]
    ['-m', 'helix_conformance.drive.serve', 'reference']
    """
    if not engine.startswith(COMMAND):
        if load_engine(engine).needs_processes:
            raise EngineSpecError(needs_group(engine))
        return [*SERVE, engine]
    try:
        command = shlex.split(engine.removeprefix(COMMAND))
    except ValueError as error:
        raise EngineSpecError(f"{engine!r} cannot be split into words: {error}.") from error
    if not command:
        raise EngineSpecError(f"{engine!r} names no command; give stdio:COMMAND.")
    return command


SERVE: Final = (sys.executable, "-P", "-m", "helix_conformance.drive.serve")
"""The command that serves the Python engine that is named after it; it imports nothing from the
current folder."""


def served(engine: str, group: Group, loop: Loop) -> Child:
    """Start one rank of a Python engine as a process of this one.

    Parameters
    ----------
    engine : str
        Name of the engine, as `load_engine` takes it.
    group : Group
        The rank's place among the ranks.
    loop : Loop
        The loop that all ranks of a trace share.

    Returns
    -------
    Child
        The rank; it has still to say `ready`.

    Raises
    ------
    EngineFailure
        When it cannot be started.
    """
    return Child(group.rank, [*SERVE, engine, group.to_json()], loop, ours=True)


class StdioDriver(ProcessDriver):
    """One process of a command for each rank, as many as a trace needs.

    Parameters
    ----------
    engine : str
        `stdio:COMMAND`, or the name of a Python engine that needs no torch.distributed.
    deadline_s : float
        Seconds that the ranks may take for one event.

    Raises
    ------
    EngineSpecError
        When there is no command in the name.
    EngineFailure
        When the first rank does not start.

    Examples
    --------
    >>> driver = StdioDriver("reference")
    >>> driver.name, driver.largest_world, driver.settings["engine"]
    ('stdio', None, 'reference')
    >>> driver.close()
    """

    name = "stdio"
    child: type[Child] = Child
    """What each rank is."""

    def __init__(self, engine: str, *, deadline_s: float = 30.0) -> None:
        super().__init__(engine, deadline_s)
        self.command = command_of(engine)
        self.survives_failure = True
        self._have(1)

    def start_ranks(self, world: int) -> list[Rank]:
        """See `ProcessDriver.start_ranks`."""
        new = range(len(self.ranks), world)
        self.ranks += [self.child(rank, self.command, self.loop, ours=False) for rank in new]
        return self.ranks[new.start :]

    def settings_of(self, ready: messages.Ready) -> dict[str, str]:
        """See `ProcessDriver.settings_of`."""
        return {"engine": ready.engine, "version": ready.version, **ready.settings}


class PoolDriver(ProcessDriver):
    """Processes 0 .. size-1 over gloo, kept for many traces; one of fewer ranks uses the first.

    After an EngineFailure all processes are ended, and started anew for the next trace.

    Parameters
    ----------
    engine : str
        Name of a Python engine, as `load_engine` takes it.
    size : int
        Number of the processes.
    deadline_s : float
        Seconds that the ranks may take for one event.

    Raises
    ------
    EngineSpecError
        When there is no such engine.
    EngineFailure
        When a rank does not start.
    """

    name = "pool"

    def __init__(self, engine: str, size: int = 4, *, deadline_s: float = 30.0) -> None:
        in_group = load_engine(engine).needs_processes
        super().__init__(engine, deadline_s, in_group=in_group)
        self.size = self.largest_world = size
        self.starts = 0
        self.store = hosted_store() if in_group else None  # it listens as long as this object lives
        self._have(size)

    def start_ranks(self, world: int) -> list[Rank]:
        """See `ProcessDriver.start_ranks`: all at once, each time meeting under a new name."""
        if self.ranks:
            return []
        self.starts += 1
        group = Group(
            world=self.size,
            port=0 if self.store is None else self.store.port,
            name=f"pool-{self.starts}",
            timeout_s=10 * self.deadline_s,  # a hang is the driver's to call
        )
        for rank in range(group.world):
            place = msgspec.structs.replace(group, rank=rank)
            self.ranks.append(served(self.engine, place, self.loop))
        return self.ranks
