"""What a run opens on the network while it runs: on one machine nothing but the loopback."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from helix_conformance.drive.meeting import INTERFACE, KEY, joined_store
from suite_testing.sabotage import processes_of

BESIDE = Path(sys.executable).parent
LISTENS = "0A"
LOOPBACK = ("0100007F", "00000000000000000000000001000000", "0000000000000000FFFF00000100007F")
"""127.0.0.1, ::1 and ::ffff:127.0.0.1, as the system writes them."""
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or shutil.which("mpiexec", path=BESIDE) is None,
    reason="needs mpi4py and mpiexec: pip install helix-conformance[mpi]",
)


@pytest.fixture
def token() -> Iterator[str]:
    """What the environment of every process of a run holds."""
    token = uuid.uuid4().hex
    yield token
    for pid in processes_of(token, within_s=0):
        os.kill(pid, signal.SIGKILL)


def listening(token: str) -> tuple[set[str], set[str]]:
    """Addresses on which processes of a run listen, and those that others can reach."""
    everywhere, reachable = set[str](), set[str]()
    for pid in processes_of(token, within_s=0):
        folder = Path("/proc", str(pid))
        try:
            own = {os.readlink(link) for link in (folder / "fd").iterdir()}
            apart = interfaces(folder) == {"lo"}
            rows = [
                row.split()
                for name in ("tcp", "tcp6")
                for row in (folder / "net" / name).read_text().splitlines()[1:]
            ]
        except OSError:  # it has just ended
            continue
        found = {r[1] for r in rows if r[3] == LISTENS and f"socket:[{r[9]}]" in own}
        everywhere |= found
        if not apart:  # in a network that holds a loopback alone nobody else is
            reachable |= {one for one in found if one.partition(":")[0] not in LOOPBACK}
    return everywhere, reachable


def interfaces(process: Path) -> set[str]:
    """The network interfaces that a process has."""
    return {
        row.partition(":")[0].strip() for row in (process / "net/dev").read_text().splitlines()[2:]
    }


def test_the_check_sees_who_listens_on_all_interfaces(token: str) -> None:
    """A process that does is found; one on the loopback is no fault."""
    code = (
        "import socket, sys; s = socket.create_server((sys.argv[1], 0)); print(flush=True); input()"
    )
    for host, exposed in (("127.0.0.1", 0), ("", 1)):
        with subprocess.Popen(
            [sys.executable, "-c", code, host],
            env=os.environ | {"HELIX_TEST": token},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        ) as process:
            assert process.stdout is not None
            process.stdout.readline()
            everywhere, reachable = listening(token)
            assert (len(everywhere), len(reachable)) == (1, exposed)
            process.communicate(b"\n")


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    ("engine", "driver"),
    [
        ("gpu-ledger", "local"),
        ("gpu-ledger", "stdio"),
        ("gpu", "pool"),
        ("gpu-push", "pool"),
        ("gpu", "torchrun"),
        pytest.param("gpu", "mpi", marks=needs_mpi),
    ],
)
def test_every_driver_listens_on_the_loopback_alone(
    tmp_path: Path, token: str, engine: str, driver: str
) -> None:
    """No process of a run listens where another machine reaches it, from start to end."""
    words = ["run", "--engine", engine, "--driver", driver, "--layout", "pr9757", "--cp", "2"]
    run = subprocess.Popen(
        [BESIDE / "helix-conformance", *words, "--ranks", "2", "--examples", "5"],
        cwd=tmp_path,
        env=os.environ | {"HELIX_TEST": token},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    everywhere, exposed = set[str](), set[str]()
    while run.poll() is None:
        found, reachable = listening(token)
        everywhere |= found
        exposed |= reachable
        time.sleep(0.02)
    output, _ = run.communicate()
    print(f"\n{engine} on {driver}: {sorted(everywhere)}")
    assert run.returncode == 0, output
    assert exposed == set()
    assert bool(everywhere) == (engine not in ("gpu-ledger",))


def free_port() -> int:
    """A port that is free now."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def two_agents(folder: Path, token: str, keys: tuple[str, str]) -> list[subprocess.Popen[str]]:
    """A run under two torchruns with a static rendezvous, as on two machines, with these keys."""
    meet = ["--nnodes=2", "--rdzv-backend=static", "--master-addr=127.0.0.1"]
    meet += [f"--master-port={free_port()}", "--nproc-per-node=1", "--no-python"]
    command = [str(BESIDE / "helix-conformance"), "run", "--driver", "torchrun"]
    command += ["--layout", "pr9757", "--cp", "2", "--examples", "3"]
    return [
        subprocess.Popen(
            [
                BESIDE / "torchrun",
                *meet,
                f"--node-rank={rank}",
                *command,
            ],
            cwd=folder,
            env=os.environ
            | {"HELIX_TEST": token, KEY: key, INTERFACE: "lo", "HELIX_START_LIMIT_S": "20"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank, key in enumerate(keys)
    ]


@pytest.mark.timeout(200)
def test_several_machines_with_one_key(tmp_path: Path, token: str) -> None:
    """Two agents with the same key pass; the store of torchrun never holds the key."""
    agents = two_agents(tmp_path, token, ("a secret", "a secret"))
    port = int(next(str(w) for w in agents[0].args if "master-port" in str(w)).partition("=")[2])  # type: ignore[union-attr]
    address = None
    while address is None and agents[0].poll() is None:
        try:
            store = joined_store("127.0.0.1", port, "helix-control")
            if store.check(["address"]):
                address = store.get("address")
        except RuntimeError:
            time.sleep(0.1)
    outputs = [agent.communicate()[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], outputs
    assert "PASS: " in outputs[0]
    assert address is not None
    assert b"127.0.0.1" in address
    assert b"secret" not in address


@pytest.mark.timeout(200)
def test_several_machines_with_other_keys(tmp_path: Path, token: str) -> None:
    """Who has another key is let in by nobody, and the run ends."""
    agents = two_agents(tmp_path, token, ("a secret", "another"))
    outputs = [agent.communicate()[0] for agent in agents]
    assert 0 not in [agent.returncode for agent in agents]
    assert "Who answers where rank 0 should has another key." in outputs[1]
    assert "has no supervisor after 20 seconds" in outputs[0]


@pytest.mark.timeout(200)
def test_several_machines_without_a_key(tmp_path: Path, token: str) -> None:
    """Without one every process says so in a sentence, and nothing listens for the others."""
    agents = two_agents(tmp_path, token, ("", ""))
    outputs = [agent.communicate()[0] for agent in agents]
    assert 0 not in [agent.returncode for agent in agents]
    for output in outputs:
        assert f"give all of them one secret in {KEY}." in output
