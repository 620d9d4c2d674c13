"""Control messages that are none: whoever gets one says so in a sentence, and ends or goes on."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from multiprocessing.connection import Connection, Pipe
from types import SimpleNamespace

import pytest
from helix_conformance.drive.lines import Line
from helix_conformance.drive.supervised import RemoteRank, _hand_to_and_fro
from helix_conformance.drive.wire import Failed, Play, Ready, Stop, pack, unpack_from_engine
from helix_conformance.drive.worker import Setup

from helix_conformance.drive.driver import EngineFailure, Watch
from helix_conformance.drive.messages import Hello, Observe, line_of
from helix_conformance.drive.process import EngineProcess
from helix_spec.config import Config

GARBAGE = b"\xc1rubbish"


@pytest.fixture
def worker() -> Iterator[EngineProcess]:
    """A worker without torch, once it is ready."""
    process = EngineProcess(Setup(engine="gpu-ledger", rank=0, world=1, channel=-1))
    assert isinstance(process.receive(), Ready)
    yield process
    process.kill()


@pytest.mark.parametrize(
    ("frame", "sentence"),
    [
        (GARBAGE, "Rank 0 was sent garbage: MessagePack data is malformed"),
        (b"", "Rank 0 was sent garbage: Input data was truncated"),
        (b"\x91" * 5000, "Rank 0 was sent garbage: "),
        (pack(Stop(True)), "Rank 0 was sent Stop(whole=True), which is for supervisors"),
    ],
)
def test_a_worker_is_sent_what_it_cannot_play(
    worker: EngineProcess, frame: bytes, sentence: str
) -> None:
    """It ends with a sentence, which its supervisor passes on; no traceback."""
    worker.channel.send_bytes(frame)
    with pytest.raises(EngineFailure, match="died with exit status 1") as failure:
        worker.receive()
    assert sentence in str(failure.value)
    assert "Traceback" not in str(failure.value)


def test_a_worker_is_asked_for_an_engine_that_there_is_not(worker: EngineProcess) -> None:
    """The name is in its answer, and it goes on."""
    config = Config(layout="pr9757/1:C=1,T=2", pages=[9], max_len=90)
    for engine, answer in (("no-such-engine", "names no engine"), ("gpu-ledger", None)):
        worker.play(Play(config, ["placement"], [], Watch(), engine, 1))
        if answer is None:
            assert worker.receive() is not None
        else:
            with pytest.raises(EngineFailure, match=answer):
                worker.receive()


@pytest.mark.parametrize("line", [b"\n", b"{}\n", b"[" * 5000, b'{"type":"apply","seq":1}\n'])
def test_a_served_engine_is_sent_no_request(line: bytes) -> None:
    """It answers what came before, says what the line is not, and ends."""
    command = [sys.executable, "-m", "helix_conformance.drive.serve", "gpu-ledger"]
    told = line_of(Hello(1)) + line_of(Observe(2)) + line + b"\n" + line_of(Hello(3))
    done = subprocess.run(command, input=told, capture_output=True, timeout=60)
    assert 1 == done.returncode
    ready, early = done.stdout.splitlines()
    assert b'"type":"ready","seq":1' in ready
    assert b'"seq":2,"what":"was asked before it was started"' in early
    assert done.stderr.startswith(b"The line that begins ")
    assert b"is no request of helix-engine/1" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.fixture
def line() -> Iterator[tuple[Line, Connection]]:
    """A line, and its far end."""
    here, there = Pipe()
    with here, there:
        yield Line(here), there


def test_a_supervisor_sends_garbage(line: tuple[Line, Connection]) -> None:
    """Rank 0 names the rank, and counts it as lost."""
    near, far = line
    far.send_bytes(GARBAGE)
    rank = RemoteRank(2, near)
    with pytest.raises(EngineFailure, match="Rank 2 has a supervisor that sent garbage: "):
        rank.receive()
    assert rank.lost


def test_a_supervisor_is_sent_garbage(line: tuple[Line, Connection]) -> None:
    """It says so to rank 0, and leaves."""
    near, far = line
    quiet, _open = Pipe()
    far.send_bytes(GARBAGE)
    assert _hand_to_and_fro(SimpleNamespace(channel=quiet, at=5), near) is None
    told = unpack_from_engine(far.recv_bytes())
    assert isinstance(told, Failed)
    assert 5 == told.event
    assert told.what.startswith("has a supervisor that was sent garbage: ")
