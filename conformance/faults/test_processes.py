"""Whoever ends a run, and however: its processes end too, and what had ended is shown."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

from suite_testing.sabotage import processes_of

BESIDE = Path(sys.executable).parent
WITHIN_S = 5.0
"""How long all of a run may take to be gone."""
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or shutil.which("mpiexec", path=BESIDE) is None,
    reason="needs mpi4py and mpiexec: pip install helix-conformance[mpi]",
)
DRIVERS = ["local", "stdio", "pool", "torchrun", pytest.param("mpi", marks=needs_mpi)]
TWO_RANKS = ["--cp", "2", "--ranks", "2"]
Starts = Callable[..., subprocess.Popen[str]]


@pytest.fixture
def token() -> Iterator[str]:
    """What the environment of every process of a run holds; none is left behind."""
    token = f"HELIX_TEST={uuid.uuid4().hex}"
    yield token
    for pid in processes_of(token, within_s=0):
        os.kill(pid, signal.SIGKILL)


@pytest.fixture
def starts(token: str, tmp_path: Path) -> Starts:
    """Start the command in a folder of its own, with another for what is temporary."""
    (tmp_path / "tmp").mkdir()
    name, _, value = token.partition("=")

    def start(*words: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [BESIDE / "helix-conformance", *words],
            cwd=tmp_path,
            env=os.environ | {name: value, "TMPDIR": str(tmp_path / "tmp")},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    return start


def running(starts: Starts, tmp_path: Path, driver: str, engine: str) -> subprocess.Popen[str]:
    """A run of which one layout has ended, and the next has no end."""
    stream = tmp_path / "run.jsonl"
    words = ["run", "--engine", engine, "--driver", driver, *TWO_RANKS, "--json", "run.jsonl"]
    run = starts(*words, "--layout", "before_9757", "--layout", "pr9757", "--examples", "40")
    until = time.monotonic() + 100
    while not (stream.exists() and b'"kind":"row"' in stream.read_bytes()):
        assert run.poll() is None, run.communicate()[0]
        assert time.monotonic() < until
        time.sleep(0.05)
    return run


@pytest.mark.timeout(150)
@pytest.mark.parametrize("driver", DRIVERS)
def test_ctrl_c(starts: Starts, token: str, tmp_path: Path, driver: str) -> None:
    """Ctrl-C shows the layouts that have ended, with status 130, and nothing is left."""
    run = running(starts, tmp_path, driver, "suite_testing.broken:Daemon")
    run.send_signal(signal.SIGINT)
    output, _ = run.communicate(timeout=WITHIN_S)
    assert run.returncode == 130, output
    assert "Interrupted; layouts that had ended: before_9757." in output
    assert "Traceback" not in output
    assert processes_of(token, within_s=WITHIN_S) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.timeout(150)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
@pytest.mark.parametrize("driver", DRIVERS)
def test_told_to_end(
    starts: Starts, token: str, tmp_path: Path, driver: str, number: signal.Signals
) -> None:
    """So it does after SIGTERM and SIGHUP, with the status that a shell has of them."""
    run = running(starts, tmp_path, driver, "suite_testing.broken:Daemon")
    run.send_signal(number)
    output, _ = run.communicate(timeout=WITHIN_S)
    assert run.returncode == 128 + number, output
    assert processes_of(token, within_s=WITHIN_S) == []
    assert list((tmp_path / "tmp").iterdir()) == []


@pytest.mark.timeout(150)
@pytest.mark.parametrize("driver", DRIVERS)
def test_killed(starts: Starts, token: str, tmp_path: Path, driver: str) -> None:
    """SIGKILL to whoever started a run ends all processes that are ours."""
    run = running(starts, tmp_path, driver, "gpu-ledger")
    assert (len(processes_of(token, within_s=0)) > 1) == (driver != "local")
    run.kill()
    assert processes_of(token, within_s=WITHIN_S) == []
    run.communicate()


LAUNCHERS = {
    "torchrun": ["torchrun", "--standalone", "--nproc-per-node=2", "--no-python"],
    "mpi": ["mpiexec", "--continuous", "-n", "2"],
}
AS_ROOT = dict.fromkeys(["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"], "1")


@pytest.mark.timeout(150)
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("driver", DRIVERS[3:])
def test_a_launcher_of_ones_own(
    token: str, tmp_path: Path, driver: str, number: signal.Signals
) -> None:
    """Whatever happens to a torchrun or mpiexec of the user's own, the ranks end with it."""
    name, _, value = token.partition("=")
    words = ["run", "--engine", "gpu-ledger", "--driver", driver, "--examples", "100000"]
    launcher, *options = LAUNCHERS[driver]
    run = subprocess.Popen(
        [BESIDE / launcher, *options, BESIDE / "helix-conformance", *words, "--json", "run.jsonl"],
        cwd=tmp_path,
        env=os.environ
        | (AS_ROOT if os.geteuid() == 0 else {})
        | {name: value, "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    until = time.monotonic() + 100
    while not (tmp_path / "run.jsonl").exists() or len(processes_of(token, within_s=0)) < 5:
        assert run.poll() is None
        assert time.monotonic() < until
        time.sleep(0.05)
    run.send_signal(number)
    assert processes_of(token, within_s=WITHIN_S) == []
    run.wait()


@pytest.mark.timeout(150)
@pytest.mark.parametrize("driver", DRIVERS)
def test_a_daemon_of_an_engine_is_ended(starts: Starts, token: str, driver: str) -> None:
    """A run that ends by itself ends what an engine has left behind, its daemons too."""
    words = ["run", "--engine", "suite_testing.broken:Daemon", "--driver", driver, *TWO_RANKS]
    run = starts(*words, "--layout", "pr9757", "--examples", "2")
    output, _ = run.communicate(timeout=100)
    assert run.returncode == 0, output
    assert processes_of(token, within_s=1) == []


@pytest.mark.timeout(150)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_proofs_end(starts: Starts, token: str, number: signal.Signals) -> None:
    """Of proofs that are interrupted those that have ended are shown, and no process is left."""
    run = starts("prove", "--jobs", "1")
    until = time.monotonic() + 60
    while len(processes_of(token, within_s=0)) < 2:
        assert time.monotonic() < until
        time.sleep(0.05)
    time.sleep(3)
    run.send_signal(number)
    output, _ = run.communicate(timeout=WITHIN_S)
    assert run.returncode == (-number if number == signal.SIGKILL else 128 + number), output
    assert ("partial" in output) == (number != signal.SIGKILL)
    assert processes_of(token, within_s=WITHIN_S) == []
