"""The adapter's plumbing, on a stand-in for FlashInfer in plain torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.judge.play import check_trace
from helix_spec.trace import load_trace

STAND_IN = Path(__file__).parent / "stand_in"
FINDINGS = Path(__file__).parents[1] / "findings"


@pytest.fixture(scope="module")
def merging():
    """The engines of merges, over the stand-in."""
    ours = lambda: [name for name in sys.modules if name.split(".")[0] in MINE]  # noqa: E731
    MINE = ("flashinfer", "helix_flashinfer")
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(STAND_IN))
        for name in ours():
            patch.delitem(sys.modules, name)
        from helix_flashinfer import merging

        yield merging
        for name in ours():
            del sys.modules[name]


@pytest.mark.parametrize(
    ("engine", "trace", "invariants"),
    [
        ("MergeStates", "flashinfer-all-below-floor", set()),
        ("MergeStates", "flashinfer-one-rank-empty", set()),
        ("MergeStatesInfinite", "flashinfer-all-empty", set()),
        ("MergeState", "flashinfer-low-beside-empty", set()),
        ("MergeState", "flashinfer-all-empty", set()),
        ("MergeStatesLow", "flashinfer-all-below-floor", {"ATT-1"}),
        ("MergeStateLow", "flashinfer-low-beside-empty", {"ATT-1"}),
        ("MergeStateInfinite", "flashinfer-all-empty", {"ATT-3"}),
        ("MergeStatesAnything", "flashinfer-one-rank-empty", {"ATT-1", "ATT-3"}),
    ],
)
def test_traces_tell_engines_apart(merging, engine, trace, invariants):
    """A trace fails where a precaution is left out, and passes where it is taken."""
    driver = LocalDriver(getattr(merging, engine))
    failure = check_trace(driver, load_trace(FINDINGS / f"{trace}.json"), driver.profiles)
    named = set() if failure is None else failure.invariants
    assert invariants <= named and bool(invariants) == bool(named)


def conform(out, *options, path=()):
    """Run the command; its status and what it printed."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, "-m", "helix_flashinfer.conform", "--out", str(out), *options]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    return done.returncode, done.stdout + done.stderr


def test_without_a_gpu_it_is_not_run(tmp_path):
    """Status 2 and the reason; nothing is written."""
    status, told = conform(tmp_path / "out", path=[STAND_IN])
    assert (status, told.partition(":")[0]) == (2, "not run")
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_keeps_answers_and_a_step_that_fails_is_named(tmp_path):
    """The facts of the stand-in lie in the log; a step whose kernels are broken is not run."""
    chosen = ["--anywhere", "--patience", "5", "--only", "facts-merge"]
    status, told = conform(tmp_path / "right", *chosen, path=[STAND_IN])
    assert status == 0, told
    assert sorted(path.name for path in (tmp_path / "right").iterdir()) == [
        "logs.tar.gz",
        "summary.txt",
    ]
    lines = (tmp_path / "right" / "summary.txt").read_text().split("\n")[2:-2]
    answers = {line["call"]: line["answers"] for line in map(json.loads, lines)}
    assert answers["merge_state, -inf and -inf"] == "[nan, nan]"

    broken = tmp_path / "flashinfer.py"
    broken.write_text("raise ImportError('no such library')")
    status, told = conform(tmp_path / "wrong", *chosen, path=[tmp_path])
    assert status == 1
    assert (
        "facts-merge: not run, since its kernels do not compile or run (cascade: status 1)" in told
    )
