"""Messages that are none: whoever gets one says so in a sentence, and ends or goes on."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Iterator

import pytest

from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.launched import Remote, Supervised
from helix_conformance.drive.meeting import Group
from helix_conformance.drive.messages import (
    Ended,
    Hello,
    Observe,
    Ready,
    Stop,
    line_of,
    relayed_of,
)
from helix_conformance.drive.process import Child, Due, Lines, Loop, collect, served

RUBBISH = b"\xc1rubbish\n"
NONE = [b"\n", b"{}\n", b"[" * 5000 + b"\n", b'{"type":"apply","seq":1}\n', RUBBISH]


@pytest.fixture
def worker() -> Iterator[Child]:
    """A process of a pool without torch, once it is ready."""
    process = served("gpu-ledger", Group(world=1, name="alone"), Loop())
    process.ask(line_of(Hello(1)), [Due(1, Ready, None)])
    process.lines.write()
    collect([process], 1, 60)
    assert isinstance(process.answers.popleft(), Ready)
    yield process
    process.kill()


@pytest.mark.parametrize("line", [*NONE, line_of(Stop(True))])
def test_a_worker_is_sent_no_request(worker: Child, line: bytes) -> None:
    """It ends with a sentence, which its driver passes on; no traceback."""
    worker.ask(line, [Due(2, Ready, None)])
    worker.lines.write()
    with pytest.raises(EngineFailure, match="exited with status 1") as failure:
        collect([worker], 1, 60)
    assert "The line that begins " in str(failure.value)
    assert "is no request of helix-engine/1" in str(failure.value)
    assert "Traceback" not in str(failure.value)


@pytest.mark.parametrize("line", NONE)
def test_a_served_engine_is_sent_no_request(line: bytes) -> None:
    """It answers what came before, says what the line is not, and ends."""
    command = [sys.executable, "-m", "helix_conformance.drive.serve", "gpu-ledger"]
    told = line_of(Hello(1)) + line_of(Observe(2)) + line + b"\n" + line_of(Hello(3))
    done = subprocess.run(command, input=told, capture_output=True, timeout=60)
    assert done.returncode == 1
    ready, early = done.stdout.splitlines()
    assert b'"type":"ready","seq":1' in ready
    assert b'"seq":2,"what":"was asked before it was started"' in early
    assert done.stderr.startswith(b"The line that begins ")
    assert b"is no request of helix-engine/1" in done.stderr
    assert b"Traceback" not in done.stderr


@pytest.fixture
def line() -> Iterator[tuple[Lines, socket.socket]]:
    """A line, and its far end."""
    here, there = socket.socketpair()
    descriptor = here.detach()
    near = Lines(descriptor, os.dup(descriptor))
    with there:
        yield near, there
    near.close()


def test_a_supervisor_sends_rubbish(line: tuple[Lines, socket.socket]) -> None:
    """Rank 0 names the rank."""
    near, far = line
    far.sendall(RUBBISH)
    rank = Remote(2, near, Loop())
    rank.ask(b"", [Due(1, Ready, 5)])
    with pytest.raises(EngineFailure, match="gave a malformed answer: ") as failure:
        collect([rank], 1, 5)
    assert (failure.value.rank, failure.value.event) == (2, 5)


@pytest.mark.parametrize("rubbish", NONE)
def test_a_supervisor_is_sent_no_request(line: tuple[Lines, socket.socket], rubbish: bytes) -> None:
    """It says so to rank 0, and leaves."""
    near, far = line
    far.sendall(rubbish)
    assert Supervised(1, [sys.executable, "-c", "input()"], near).run() is None
    told = relayed_of(far.makefile("rb").readline())
    assert isinstance(told, Ended)
    assert told.what.startswith(
        "has a supervisor that was sent a malformed line: The line that begins "
    )
