"""Every driver on whole runs of their own: one verdict for one seed, and an end in order.

Run by `make drivers`: each test starts processes, and a hang is waited for until its deadline.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import uuid
from importlib.util import find_spec
from pathlib import Path

import pytest

from helix_spec.config import Config
from helix_spec.events import Admit, Decode
from helix_spec.trace import Trace, dump_trace, load_trace
from suite_testing.sabotage import processes_of

BESIDE = Path(sys.executable).parent
LIMIT_S = 150
"""Far beyond any deadline that is given below: a run that takes so long does not end."""
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or shutil.which("mpiexec", path=BESIDE) is None,
    reason="needs mpi4py and mpiexec: pip install helix-conformance[mpi]",
)
mpi = pytest.param("mpi", marks=needs_mpi)
TORN = ["torchrun", mpi]
"""Drivers whose supervisors are processes that somebody else launches."""
PROCESSES = ["stdio", "pool", *TORN]
ALL = ["local", *PROCESSES]


@pytest.fixture
def environment(monkeypatch):
    """Of the runs: every process of a run can be told."""
    token = uuid.uuid4().hex
    as_root = ["OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"]
    more = dict.fromkeys(as_root, "1") if os.geteuid() == 0 else {}
    yield (
        os.environ
        | more
        | {
            "HELIX_TEST": token,
            "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        }
    )
    left = processes_of(token, within_s=10)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert left == [], "a run has left processes behind"


@pytest.fixture
def helix(tmp_path, environment):
    """Run the command in a folder of its own; returns status, output, and the JSON stream."""

    def run(*words, launched_by=()):
        stream = tmp_path / "run.jsonl"
        command = [*launched_by, str(BESIDE / "helix-conformance"), *map(str, words)]
        done = subprocess.run(
            [*command, "--json", str(stream)],
            cwd=tmp_path,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=LIMIT_S,
        )
        lines = stream.read_text().splitlines() if stream.exists() else []
        return done.returncode, done.stdout, [json.loads(line) for line in lines]

    return run


@pytest.fixture
def stored(tmp_path):
    """A trace whose second event is a decode with so many dummy requests."""

    def store(pad):
        config = Config(layout="pr9757/1:C=2,T=2", pages=[5, 5], max_len=50)
        path = tmp_path / f"trace-{pad}.json"
        path.write_bytes(
            dump_trace(Trace(config=config, events=[Admit(0, 3), Decode([0], [1], pad)]))
        )
        return path

    return store


LAUNCHERS = {
    "torchrun": [BESIDE / "torchrun", "--standalone", "--nproc-per-node=2", "--no-python"],
    "mpi": [BESIDE / "mpiexec", "--continuous", "-n", "2"],
}


@pytest.mark.holds("LEN-2")
@pytest.mark.parametrize("driver", ALL)
def test_one_seed_has_one_verdict(helix, tmp_path, driver):
    """A planted difference ends every driver with the same verdict and the same smallest trace."""
    words = ["run", "--engine", "suite_testing.broken:Liar", "--cp", 2, "--examples", 20]
    words += ["--ranks", 2, "--layout", "pr9757", "--layout", "balanced", "--seed", 3]
    status, output, lines = helix(*words, "--driver", driver)
    assert status == 1, output
    assert lines[-1]["verdict"] == "fail"
    failures = [line for line in lines if line["kind"] == "failure"]
    assert [[v["invariant"] for v in f["violations"]] for f in failures] == [["LEN-2"]] * 2
    for name in ("pr9757", "balanced"):
        [path] = (tmp_path / "helix-failures").glob(f"{name}-{driver}-*.json")
        trace = load_trace(path)
        assert str(trace.config.layout) == f"{name}/1:C=2,T=1"
        assert trace.events == [Admit(0, 1), Decode([0], [1])]


MISCHIEF = {
    1: "died with signal SIGSEGV; its stderr ends: ",
    2: "timed out: no answer within 5 s",
    3: "raised RuntimeError: the adapter lost its way",
    4: "exit",  # sys.exit: a status of the process, or SystemExit where that is caught
    5: "exit",  # os._exit
    6: "timed out: no answer within 5 s",  # it floods stdout for ever
    8: "gave a malformed answer: its past_len has 2 entries, not 1",
    11: "gave a malformed answer: it answered request 99, and was asked ",
}
IN_PROCESS = (2, 3, 4, 5, 8)
"""What an engine can do in the suite's own process and be named for."""


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize("mischief", MISCHIEF)
@pytest.mark.parametrize("driver", ALL)
def test_rank_in_trouble_is_named(helix, stored, driver, mischief):
    """A rank that dies, hangs, raises, exits, floods or answers something else is named."""
    if driver == "local" and mischief not in IN_PROCESS:
        pytest.skip("in one process it would take the suite with it, or is what a terminal is for")
    path = stored(mischief)
    words = ["replay", path, "--engine", "suite_testing.broken:Mischief", "--driver", driver]
    status, output, lines = helix(*words, "--ranks", 2, "--deadline", 5)
    assert status == 3, output
    assert lines[-1]["verdict"] == "error"
    (failure,) = (line for line in lines if line["kind"] == "failure")
    assert failure["engine_failure"].startswith("Rank 1 ")
    assert MISCHIEF[mischief] in failure["engine_failure"]
    assert failure["engine_failure"].endswith("(at event 1).")
    assert [event["event"] for event in failure["trace"]["events"]] == ["admit", "decode"]


@pytest.mark.parametrize("driver", PROCESSES)
def test_flood_that_answers_is_no_failure(helix, stored, driver):
    """An engine that prints 20 MB and then answers passes."""
    words = ["replay", stored(7), "--engine", "suite_testing.broken:Mischief", "--driver", driver]
    status, output, _ = helix(*words, "--ranks", 2, "--deadline", 20)
    assert status == 0, output


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize("driver", TORN)
def test_killed_supervisor(helix, stored, driver):
    """A killed supervisor ends the run, which names its rank and the event."""
    words = ["replay", stored(9), "--engine", "suite_testing.broken:Mischief", "--driver", driver]
    status, output, lines = helix(*words, "--ranks", 2, "--deadline", 5)
    assert status == 3, output
    assert "Rank 1 has a supervisor that was ended (at event 1)." in output
    assert [lines[0]["kind"], lines[-1]["kind"]] == ["settings", "summary"]
    assert lines[-1]["verdict"] == "error"


@pytest.mark.parametrize("driver", TORN)
def test_killed_supervisor_of_rank_0(helix, stored, driver):
    """When the judge itself is killed the others leave, and what it knew is on disk."""
    words = ["replay", stored(10), "--engine", "suite_testing.broken:Mischief", "--driver", driver]
    status, output, lines = helix(*words, "--ranks", 2, "--deadline", 5)
    assert status == 3, output
    assert "have ended without a verdict" in output
    assert [line["kind"] for line in lines] == ["settings"]


@pytest.mark.parametrize("driver", TORN)
@pytest.mark.parametrize(
    ("mischief", "verdict"), [(0, "pass"), (1, "error"), (9, "error"), (10, None)]
)
def test_launched_from_outside(helix, stored, driver, mischief, verdict):
    """Under a launcher of the user's own the last line holds the verdict, and red is not 0."""
    words = ["replay", stored(mischief), "--engine", "suite_testing.broken:Mischief"]
    status, output, lines = helix(
        *words, "--driver", driver, "--deadline", 5, launched_by=LAUNCHERS[driver]
    )
    assert (verdict == "pass") == (status == 0), output
    if driver == "mpi" and verdict == "error":
        assert status == 3
    assert verdict == lines[-1].get("verdict")


@pytest.mark.parametrize("driver", TORN)
def test_bad_input_of_a_launched_run(helix, driver):
    """What rank 0 alone finds wrong is a sentence and status 2, whoever launches."""
    words = ["run", "--engine", "suite_testing.broken:Mischief", "--ranks", 2, "--cp", 3]
    status, output, _ = helix(*words, "--driver", driver)
    assert status == 2, output
    assert f"3 ranks are needed, and the {driver} has 2" in output
    assert "Traceback" not in output


@needs_mpi
def test_bad_input_under_mpiexec(helix, environment):
    """What rank 0 alone finds wrong ends all processes, with status 2."""
    words = ["run", "--engine", "suite_testing.broken:Mischief", "--driver", "mpi", "--cp", 3]
    status, output, _ = helix(*words, launched_by=LAUNCHERS["mpi"])
    assert status == 2, output
    assert "3 ranks are needed, and the mpi has 2" in output
    words = ["run", "--workload", __file__, "--engine", "suite_testing.broken:Mischief"]
    status, output, _ = helix(*words, "--driver", "mpi", launched_by=LAUNCHERS["mpi"])
    assert status == 2, output


@pytest.mark.holds("LIVE-1")
@needs_mpi
def test_crash_among_engines_that_wait(helix, stored):
    """Of four things that fail at once, the rank that died is named, not those that miss it."""
    words = ["replay", stored(1), "--engine", "suite_testing.broken:Trouble", "--driver", "mpi"]
    status, output, _ = helix(*words, "--ranks", 2, "--deadline", 5)
    assert status == 3, output
    assert "Rank 1 died with signal SIGKILL" in output


@pytest.mark.timeout(400)
@pytest.mark.parametrize("driver", TORN)
def test_whole_implementation(helix, driver):
    """This project's implementation passes on 4 ranks, with all profiles."""
    words = ["run", "--driver", driver, "--layout", "pr9757", "--cp", 4, "--examples", 10]
    status, output, lines = helix(*words)
    assert status == 0, output
    assert "attention" in lines[-1]["profiles_checked"]


def test_killed_suite_leaves_no_children(tmp_path, environment):
    """The children of a suite that is killed see the end of their stdin, and end."""
    words = ["run", "--engine", "reference", "--driver", "stdio", "--examples", "10000"]
    suite = subprocess.Popen([BESIDE / "helix-conformance", *words], cwd=tmp_path, env=environment)
    while len(processes_of(environment["HELIX_TEST"], within_s=0)) < 3:
        assert suite.poll() is None
        time.sleep(0.1)
    suite.kill()
    suite.wait()
