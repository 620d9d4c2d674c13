"""Who is to blame when several ranks fail, and how supervisors hear of each other's end."""

import os
import socket
import sys
import threading
import time
from contextlib import suppress

import pytest

from helix_conformance.drive import launched, meeting
from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.launched import Remote, Supervised
from helix_conformance.drive.meeting import (
    KEY,
    NONCE,
    PROOF,
    Address,
    RefusedError,
    Rendezvous,
    call,
)
from helix_conformance.drive.messages import (
    Apply,
    Ended,
    Failed,
    Hello,
    LayoutParts,
    Observe,
    Outcome,
    Ready,
    RequestError,
    Start,
    Stop,
    Stuck,
    View,
    Where,
    control_of,
    line_of,
    request_of,
)
from helix_conformance.drive.process import (
    WINDOW,
    Child,
    Due,
    Lines,
    Loop,
    ProcessDriver,
    collect,
)
from helix_spec.config import Config
from helix_spec.events import Admit, Reason
from helix_spec.trace import Watch

CONFIG = Config(layout="pr9757/1:C=1,T=2", pages=[5], max_len=50)


class Line:
    """One end of a line, as a supervisor holds it, in blocking calls."""

    def __init__(self, end):
        self.end, self.file = end, end.makefile("rb")

    def tell(self, *messages):
        """Send messages."""
        self.end.sendall(b"".join(map(line_of, messages)))

    def hear(self):
        """The next message."""
        line = self.file.readline()
        try:
            return request_of(line)
        except RequestError:
            return control_of(line)

    def close(self):
        """Hang up."""
        self.file.close()
        self.end.close()


def line(loop, rank=0):
    """A rank behind a supervisor, and the supervisor's end of the line."""
    ours, theirs = socket.socketpair()
    descriptor = ours.detach()
    return Remote(rank, Lines(descriptor, os.dup(descriptor)), loop), Line(theirs)


def owes(rank, *events, kind=Outcome):
    """Let a rank owe answers about these events, numbered from 1."""
    rank.ask(b"", [Due(seq, kind, event) for seq, event in enumerate(events, 1)])


@pytest.fixture
def ranks():
    """Three ranks behind supervisors, and the supervisors' ends of their lines."""
    loop = Loop()
    pairs = [line(loop, rank) for rank in range(3)]
    yield [rank for rank, _ in pairs], [far for _, far in pairs]
    loop.close()
    for rank, far in pairs:
        rank.kill()
        far.close()


def says_when_asked(far, waits):
    """Be a supervisor whose engine is silent."""

    def serve():
        asked = far.hear()
        assert isinstance(asked, Where)
        far.tell(Stuck(asked.seq, waits))

    threading.Thread(target=serve, daemon=True).start()


def failure_of(ranks, limit_s=5.0):
    """Whom `collect` blames, for which event, and with what words."""
    with pytest.raises(EngineFailure) as caught:
        collect(ranks, 1, limit_s)
    return caught.value.rank, caught.value.event, caught.value.what


def test_answers_come_back_by_rank(ranks):
    """Whoever is first, each rank's answers are with that rank."""
    seen, supervisors = ranks
    for rank in (2, 0, 1):
        owes(seen[rank], None, kind=Ready)
        supervisors[rank].tell(Ready(1, "helix-engine/1", str(rank), ["placement"]))
    collect(seen, 1, 5.0)
    assert [rank.answers[0].engine for rank in seen] == ["0", "1", "2"]


@pytest.mark.holds("LIVE-1")
def test_rank_that_died_is_blamed_before_those_that_miss_it(ranks):
    """A rank that raises because its peer is gone is not blamed, though it was heard first."""
    seen, supervisors = ranks
    for rank in seen:
        owes(rank, 3)
    supervisors[0].tell(Failed(1, "raised RuntimeError: connection closed by peer"))
    supervisors[2].tell(Ended("died with signal SIGKILL", "died"))
    assert failure_of(seen) == (2, 3, "died with signal SIGKILL")


@pytest.mark.holds("LIVE-1")
def test_supervisor_that_is_gone_is_blamed_first(ranks):
    """The end of a line is the end of its supervisor; the event is the last that anyone began.

    What its engine answered before may have been lost with it.
    """
    seen, supervisors = ranks
    for rank, event in zip(seen, (4, 3, 2), strict=True):
        owes(rank, event)
    supervisors[0].tell(Ended("died with signal SIGKILL", "died"))
    supervisors[1].close()
    assert failure_of(seen) == (1, 4, "has a supervisor that was ended")
    assert [rank.lost for rank in seen[:2]] == [False, True]


def test_told_to_stop_comes_last(ranks):
    """A launcher that ends everybody is not to blame when one process ended before."""
    seen, supervisors = ranks
    for rank in seen:
        owes(rank, 1)
    supervisors[0].tell(Ended("was told to stop", "stopped"))
    supervisors[1].tell(Ended("exited with status 1", "died"))
    assert failure_of(seen) == (1, 1, "exited with status 1")
    assert seen[0].lost


def test_a_failure_ahead_waits_for_its_turn(ranks):
    """Answers to an event count, whatever a rank does at a later one."""
    seen, supervisors = ranks
    for rank, far in zip(seen, supervisors, strict=True):
        owes(rank, 0, 1)
        far.tell(Outcome(1))
    supervisors[1].tell(Failed(2, "raised ValueError: lost"))
    supervisors[2].tell(Ended("exited with status 1", "died"))
    collect(seen, 1, 5.0)
    for rank in seen:
        rank.answers.popleft()
    assert failure_of(seen) == (2, 1, "exited with status 1")


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize(
    ("waits", "blamed"),
    [
        ((True, False, True), (1, 2, "timed out: no answer within 0.2 s")),
        (
            (False, True, False),
            (0, 2, "timed out: no answer within 0.2 s, nor from rank 2"),
        ),
        (
            (True, True, True),
            (0, 2, "is blocked in a collective that has not ended within 0.2 s"),
        ),
    ],
)
def test_silent_ranks_are_asked_where_they_are(ranks, waits, blamed):
    """Of silent ranks the one is blamed that does not wait for its peers."""
    seen, supervisors = ranks
    for rank, far, wait in zip(seen, supervisors, waits, strict=True):
        owes(rank, 2)
        says_when_asked(far, wait)
    assert blamed == failure_of(seen, 0.2)


@pytest.mark.holds("LIVE-1")
def test_rank_that_went_on_skipped_a_collective(ranks):
    """When the silent ones all wait, whoever is through without them is named."""
    seen, supervisors = ranks
    for rank in seen:
        owes(rank, 1)
    supervisors[1].tell(Outcome(1))
    says_when_asked(supervisors[0], True)
    says_when_asked(supervisors[2], True)
    what = "skipped a collective that ranks 0 and 2 are blocked in"
    assert (1, 1, what) == failure_of(seen, 0.2)


def test_supervisor_that_does_not_say_where_it_is(ranks, monkeypatch):
    """A supervisor that does not answer either is named itself."""
    monkeypatch.setattr(launched, "ASK_LIMIT_S", 0.1)
    seen, _ = ranks
    for rank in seen:
        owes(rank, None)
    assert failure_of(seen, 0.1) == (0, None, "has a supervisor that fell silent")


def test_who_was_not_asked_where_it_is(ranks):
    """An engine that speaks as its supervisor does is named."""
    seen, supervisors = ranks
    owes(seen[0], 0)
    supervisors[0].tell(Stuck(7, True))
    what = "gave a malformed answer: it says where it is, and was not asked"
    assert (0, 0, what) == failure_of(seen[:1])


def test_told_to_stop_ends_the_wait(ranks):
    """A driver that is told to stop gives up although no rank has failed."""
    seen, _ = ranks
    for rank in seen:
        owes(rank, 0)
    began = time.monotonic()
    with pytest.raises(EngineFailure, match="was told to stop"):
        collect(seen, 1, 60.0, lambda: True)
    assert time.monotonic() - began < 30


class Lone(ProcessDriver):
    """A driver of one rank, whose supervisor does as it is told: `answers` is run in a thread."""

    def __init__(self, answers, deadline_s):
        super().__init__("nobody", deadline_s)
        rank, self.far = line(self.loop)
        self.ranks = [rank]
        self.thread = threading.Thread(target=answers, args=[self.far], daemon=True)
        self.thread.start()

    def start_ranks(self, world):
        """There is one."""
        return []


def answering(far, answers):
    """Give some answers to each request, and say where the engine is."""
    left = iter(answers)
    with suppress(OSError, ValueError):
        while (asked := far.hear()) is not None:
            if isinstance(asked, Where):
                far.tell(Stuck(asked.seq, False))
            else:
                far.tell(*next(left, ()))


def played(*answers, deadline_s=20.0):
    """What a driver yields for a trace of one event whose requests are answered so."""
    driver = Lone(lambda far: answering(far, answers), deadline_s)
    try:
        return list(driver.play(CONFIG, frozenset({"lengths"}), [Admit(0, 1)], Watch()))
    finally:
        driver.kill()
        driver.far.close()


WHOLE = ([Outcome(1)], [Outcome(2)], [View(3, {})], [View(4, {})])
"""The answers to a start, to an event and to two looks at the state."""


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize("count", range(len(WHOLE)))
def test_missing_answers_do_not_pass(count):
    """A rank that answers less than it was asked has failed."""
    with pytest.raises(EngineFailure, match="no answer within 0"):
        played(*WHOLE[:count], deadline_s=0.2)


def test_answers_too_many_do_not_pass():
    """A rank that answers more than it was asked has failed."""
    with pytest.raises(EngineFailure, match="gave a malformed answer: it sent outcome 2, and no"):
        played([Outcome(1), Outcome(2)])


def test_whole_answers_and_a_refused_start():
    """Every event has its answers; after a refused start there is one only."""
    assert [event for event, _ in played(*WHOLE)] == [None, Admit(0, 1), None]
    ((event, (refused,)),) = played([Outcome(1, Reason.BAD_CONFIG)])
    assert (event, refused.outcome.reason) == (None, Reason.BAD_CONFIG)


@pytest.mark.parametrize("window", [1, WINDOW])
def test_requests_go_out_ahead_of_answers(window):
    """A window of events is sent before the first of them is answered, and no more."""
    asked, drawn = [], []

    def answers(far):
        far.tell(Outcome(far.hear().seq))
        asked.extend(far.hear() for _ in range(2 * window))
        far.end.settimeout(0.1)
        with pytest.raises(TimeoutError):
            far.end.recv(1)
        first, look = asked[:2]
        far.tell(Outcome(first.seq), View(look.seq, {}))

    driver = Lone(answers, 20.0)
    driver.window = window
    events = (drawn.append(id) or Admit(id, 1) for id in range(3 * WINDOW))
    played = driver.play(CONFIG, frozenset({"lengths"}), events, Watch())
    next(played)
    assert drawn == []
    assert next(played)[0] == Admit(0, 1)
    assert drawn == list(range(window))
    assert sum(isinstance(request, Apply) for request in asked) == window
    driver.thread.join()
    driver.kill()
    driver.far.close()


HERE = Address(name=f"helix-tests/{os.getpid()}")
BY_TCP = Address("127.0.0.1")


def met(address, world, *callers, limit_s=5.0):
    """Lines that rank 0 gets from callers, each a function of the address; and what they return."""
    rendezvous, returned = Rendezvous(address), [None] * len(callers)

    def answer(place):
        try:
            returned[place] = callers[place](rendezvous.address)
        except (RefusedError, OSError) as error:
            returned[place] = error

    threads = [threading.Thread(target=answer, args=(place,)) for place in range(len(callers))]
    for thread in threads:
        thread.start()
    try:
        return rendezvous.lines(world, limit_s), returned
    except EngineFailure as failure:
        return failure, returned
    finally:
        for thread in threads:
            thread.join()


@pytest.fixture
def key(monkeypatch):
    """The key of this environment."""
    monkeypatch.setenv(KEY, "a secret")
    return b"a secret"


def ranked(rank):
    """A rank that calls."""
    return lambda address: call(address, rank, 5.0)


def close(ends):
    """Close descriptors."""
    for end in ends:
        os.close(end)


@pytest.mark.parametrize("address", [HERE, BY_TCP])
def test_ranks_are_let_in(key, address):
    """On one machine and on several every rank has its line."""
    found, returned = met(address, 3, ranked(2), ranked(1))
    assert set(found) == {1, 2}
    close([*found.values(), *returned])


def silent(address):
    """Someone who connects and says nothing."""
    with socket.create_connection((address.host, address.port)) as end:
        end.settimeout(10)
        with suppress(ConnectionError):
            return end.recv(1)


def guessing(address):
    """Someone who does not know the key, and repeats what rank 0 says."""
    with socket.create_connection((address.host, address.port)) as end:
        end.sendall(b"x" * NONCE + (1).to_bytes(4))
        heard = end.recv(NONCE + PROOF)
        end.sendall(heard[NONCE:])
        end.settimeout(10)
        with suppress(ConnectionError):
            return end.recv(1)


def test_only_those_with_the_key_are_let_in(key, monkeypatch):
    """Strangers are disconnected, a rank that comes gets its line, one that does not is named."""
    monkeypatch.setattr(meeting, "HANDSHAKE_S", 0.2)
    failure, (said, answered, ours) = met(BY_TCP, 3, silent, guessing, ranked(2), limit_s=1.0)
    assert (failure.rank, failure.what) == (1, "has no supervisor after 1 seconds")
    assert (said or b"", answered or b"") == (b"", b"")
    close([ours])


def test_a_rank_knows_rank_0(key):
    """Who listens in the place of rank 0 without the key is told nothing, and is no rank 0."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        heard = []

        def pretend():
            with server.accept()[0] as end:
                heard.append(end.recv(NONCE + 4))
                end.sendall(b"x" * (NONCE + PROOF))
                heard.append(end.recv(1000))

        thread = threading.Thread(target=pretend)
        thread.start()
        with pytest.raises(RefusedError, match="Who answers where rank 0 should has another key"):
            call(Address("127.0.0.1", server.getsockname()[1]), 1, 5.0)
        thread.join()
        assert [len(said) for said in heard] == [NONCE + 4, 0]
        assert key not in b"".join(heard)


def test_another_user_is_not_let_in(monkeypatch):
    """On one machine the system says who calls, and who answers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(meeting.os, "getuid", lambda: 12345)
        failure, (refused,) = met(HERE, 2, ranked(1), limit_s=0.5)
    assert failure.rank == 1
    assert isinstance(refused, RefusedError)


def test_lines_of_any_length_cross():
    """Short lines and long ones arrive whole, and then the end."""
    found, returned = met(HERE, 2, ranked(1))
    here, there = (Lines(end, os.dup(end)) for end in (returned[0], found[1]))
    sent, heard = [b"", b"{}", b"x" * 10_000_000, b"last"], []
    here.unsent += b"".join(text + b"\n" for text in sent)
    while len(heard) < len(sent):
        here.write()
        heard += there.read()
    assert heard == sent
    here.close()
    with pytest.raises(EOFError):
        there.read()
    there.close()


def test_the_end_of_a_flood_is_kept():
    """However much a process prints, its last words are kept, and no more."""
    loop = Loop()
    code = "import sys; sys.stderr.write('x' * 1_000_000 + 'the end')"
    child = Child(0, [sys.executable, "-c", code], loop, ours=True)
    owes(child, 5)
    rank, event, what = failure_of([child])
    assert (rank, event) == (0, 5)
    assert what.startswith("exited with status 0; its stderr ends: 'xxx")
    assert what.endswith("xthe end'")
    assert child.printed == 1_000_007
    assert len(child.last_words) == 2**16
    loop.close()
    child.kill()


@pytest.fixture
def supervised():
    """A supervisor of a process that answers nothing, and rank 0's end of its line."""
    ends = []

    def start(code):
        near, far = socket.socketpair()
        descriptor = near.detach()
        ends.append(far)
        up = Lines(descriptor, os.dup(descriptor))
        return Supervised(1, [sys.executable, "-c", code], up), far

    yield start
    for far in ends:
        far.close()


ECHO = "import sys\nfor line in sys.stdin: print(line, end='', flush=True)"


def test_a_supervisor_relays_lines(supervised):
    """Requests go down and answers come up as they are, until rank 0 says stop."""
    supervisor, far = supervised(ECHO)
    parts = LayoutParts(**CONFIG.layout.parts())
    requests = [Hello(1), Start(2, 0, 1, CONFIG, parts, ["placement"]), Observe(3, [7])]
    told = b"".join(map(line_of, requests))
    heard = bytearray()

    def rank_0():
        far.sendall(told)
        while len(heard) < len(told):
            heard.extend(far.recv(2**16))
        far.sendall(line_of(Stop(True)))

    thread = threading.Thread(target=rank_0)
    thread.start()
    assert supervisor.run() == Stop(True)
    thread.join()
    assert heard == told


def test_a_supervisor_that_looks_at_its_engine_hears_that_it_may_stop(supervised):
    """`Stop` arrives while the supervisor waits for what the engine prints: it leaves then."""
    supervisor, far = supervised("import time; time.sleep(60)")

    def rank_0():
        far.sendall(line_of(Where(1)))
        time.sleep(0.2)
        far.sendall(line_of(Stop(False)))

    thread = threading.Thread(target=rank_0)
    thread.start()
    assert supervisor.run() == Stop(False)
    thread.join()


def test_a_supervisor_tells_of_its_engines_end(supervised):
    """Rank 0 hears how the engine ended, at once; when rank 0 hangs up the supervisor leaves."""
    supervisor, far = supervised("raise SystemExit(7)")
    heard = []

    def rank_0():
        heard.append(far.makefile("rb").readline())
        far.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=rank_0)
    thread.start()
    assert supervisor.run() is None
    thread.join()
    assert heard == [line_of(Ended("exited with status 7; its stderr is empty", "died"))]
