"""Who is to blame when several ranks fail, and how supervisors hear of each other's end."""

import threading
import time
from multiprocessing.connection import Pipe

import pytest

from helix_conformance.drive import supervised
from helix_conformance.drive.driver import Answer, EngineFailure, Watch
from helix_conformance.drive.group import GroupDriver
from helix_conformance.drive.lines import Line, Switchboard, call
from helix_conformance.drive.process import LastWords, collect
from helix_conformance.drive.supervised import RemoteRank
from helix_conformance.drive.wire import Ask, At, Done, Failed, Play, Ready, Stop, Stuck, pack
from helix_conformance.drive.wire import unpack_to_engine as unpack
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Admit, Reason


@pytest.fixture
def ranks():
    """Three ranks behind supervisors, and the supervisors' ends of their lines."""
    pairs = [Pipe() for _ in range(3)]
    yield (
        [RemoteRank(rank, Line(ours)) for rank, (ours, _) in enumerate(pairs)],
        [Line(theirs) for _, theirs in pairs],
    )
    for pair in pairs:
        for end in pair:
            end.close()


def tell(line, *messages):
    """Send messages as a supervisor does."""
    for message in messages:
        line.send(pack(message))


def says_when_asked(line, stuck):
    """Be a supervisor whose engine is silent."""

    def serve():
        assert Ask() == unpack(line.receive())
        tell(line, stuck)

    threading.Thread(target=serve, daemon=True).start()


def failure_of(ranks, deadline_s=5.0):
    """Whom `collect` blames, for which event, and with what words."""
    with pytest.raises(EngineFailure) as caught:
        collect(ranks, deadline_s)
    return caught.value.rank, caught.value.event, caught.value.what


def test_answers_come_back_in_order(ranks):
    """Answers are put in the order of the ranks, whoever is first; progress is no answer."""
    seen, supervisors = ranks
    for rank in (2, 0, 1):
        tell(supervisors[rank], At(0), Ready([str(rank)]))
    assert ["0", "1", "2"] == [ready.profiles[0] for ready in collect(seen, 5.0)]


@pytest.mark.holds("LIVE-1")
def test_rank_that_died_is_blamed_before_those_that_miss_it(ranks):
    """A rank that raises because its peer is gone is not blamed, though it was heard first."""
    seen, supervisors = ranks
    tell(supervisors[0], Failed(3, "raised RuntimeError: connection closed by peer"))
    tell(supervisors[2], Failed(3, "died with signal SIGKILL", "died"))
    assert (2, 3, "died with signal SIGKILL") == failure_of(seen)


@pytest.mark.holds("LIVE-1")
def test_supervisor_that_is_gone_is_blamed_first(ranks):
    """The end of a line is the end of its supervisor; the event is the last that anyone began."""
    seen, supervisors = ranks
    tell(supervisors[0], At(4), Failed(4, "died with signal SIGKILL", "died"))
    supervisors[1].close()
    assert (1, 4, "has a supervisor that was ended") == failure_of(seen)
    assert seen[1].lost


def test_told_to_stop_comes_last(ranks):
    """A launcher that ends everybody is not to blame when one process ended before."""
    seen, supervisors = ranks
    tell(supervisors[0], Failed(1, "was told to stop", "stopped"))
    tell(supervisors[1], Failed(1, "died with exit status 1", "died"))
    assert (1, 1, "died with exit status 1") == failure_of(seen)


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize(
    ("waits", "blamed"),
    [
        ((True, False, True), (1, 2, "hung: it has not answered for 0.2 seconds")),
        ((True, True, True), (0, 2, "waits in a collective that has not ended in 0.2 seconds")),
    ],
)
def test_silent_ranks_are_asked_where_they_are(ranks, waits, blamed):
    """Of silent ranks the one is blamed that does not wait for its peers."""
    seen, supervisors = ranks
    for line, wait in zip(supervisors, waits, strict=True):
        tell(line, At(1))
        says_when_asked(line, Stuck(2, wait))
    assert blamed == failure_of(seen, 0.2)


@pytest.mark.holds("LIVE-1")
def test_rank_that_went_on_left_its_peers_alone(ranks):
    """When the silent ones all wait, whoever is through without them left a collective out."""
    seen, supervisors = ranks
    tell(supervisors[1], At(1), Done([]))
    says_when_asked(supervisors[0], Stuck(1, True))
    says_when_asked(supervisors[2], Stuck(1, True))
    what = "left out a collective in which ranks 0, 2 wait for it"
    assert (1, 1, what) == failure_of(seen, 0.2)


def test_supervisor_that_does_not_say_where_it_is(ranks, monkeypatch):
    """A supervisor that does not answer either is named itself."""
    monkeypatch.setattr(supervised, "ASK_LIMIT_S", 0.1)
    seen, _ = ranks
    assert (0, None, "has a supervisor that fell silent") == failure_of(seen, 0.1)


def test_told_to_stop_ends_the_wait(ranks):
    """A driver that is told to stop gives up although no rank has failed."""
    seen, _ = ranks
    began = time.monotonic()
    with pytest.raises(EngineFailure, match="was told to stop"):
        collect(seen, 60.0, lambda: True)
    assert 30 > time.monotonic() - began


class Answering(GroupDriver):
    """A driver whose only rank gives these answers."""

    name = "answering"

    def __init__(self, answers):
        super().__init__("nobody", 1, 5.0)
        ours, self.theirs = Pipe()
        self.ranks = [RemoteRank(0, Line(ours))]
        tell(Line(self.theirs), Done(answers))


def played(answers):
    """What a driver yields for a trace of one event that is answered so."""
    driver = Answering(answers)
    config = Config(layout="pr9757/1:C=1,T=2", pages=[5], max_len=50)
    try:
        return list(driver.play(config, frozenset({"placement"}), [Admit(0, 1)], Watch()))
    finally:
        assert isinstance(unpack(driver.theirs.recv_bytes()), Play)
        driver.close()
        driver.theirs.close()


ACCEPTED = Answer(Outcome(), RankView({}))


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize("count", [0, 1, 2, 4])
def test_missing_answers_do_not_pass(count):
    """A rank that answers fewer or more events than it was told has failed."""
    with pytest.raises(EngineFailure, match=f"{count} answers to 1 events, start and end"):
        played([ACCEPTED] * count)


def test_whole_answers_and_a_refused_start():
    """Every event has its answers; after a refused start there is one only."""
    assert [None, Admit(0, 1), None] == [event for event, _ in played([ACCEPTED] * 3)]
    refused = Answer(Outcome(Reason.BAD_CONFIG))
    assert [(None, (refused,))] == played([refused])


def test_only_those_with_the_key_are_let_in():
    """A stranger is hung up on, a rank that comes gets its line, one that does not is named."""
    board = Switchboard("127.0.0.1")
    stranger = call(type(board.address)(board.address.host, board.address.port, b"x" * 16), 1, 5.0)
    with call(board.address, 2, 5.0) as ours:
        with pytest.raises(EngineFailure, match="has no supervisor") as caught:
            board.lines(3, 0.5)
        assert 1 == caught.value.rank
        assert stranger.poll(5)
        with pytest.raises((EOFError, ConnectionError)):
            stranger.recv_bytes()
        assert not ours.closed
    stranger.close()


def test_frames_of_any_size_cross_a_line():
    """Frames of no bytes and of many arrive whole."""
    board = Switchboard("127.0.0.1")
    here = Line(call(board.address, 1, 5.0))
    there = Line(board.lines(2, 5.0)[1])
    for frame in (b"", pack(Stop(True)), b"x" * 100_000):
        here.send(frame)
        assert frame == there.receive()
    here.close()
    with pytest.raises((EOFError, OSError)):
        there.receive()
    there.close()


def test_the_end_of_a_flood_is_kept():
    """However much a process prints, its last words are kept, and no more."""
    words = LastWords()
    with open(words.write_end, "wb") as flood:
        for _ in range(100):
            flood.write(b"x" * 10_000)
        flood.write(b"the end")
    until = time.monotonic() + 10
    while words.total < 1_000_007 and time.monotonic() < until:
        time.sleep(0.01)
    assert words.kept.endswith(b"xthe end")
    assert 2**16 == len(words.kept)
    assert b"the end" == words.since(1_000_000)
