"""The GitHub Action: its script runs as a job would run it, and its inputs reach the script."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "conformance/action.sh"
SCRIPTS = [
    SCRIPT,
    ROOT / "conformance/release.sh",
    ROOT / "conformance/helix_conformance/starters/conformance.sh.txt",
    ROOT / ".ci/run",
]
ACTION = yaml.safe_load((ROOT / "action.yml").read_text())


def job(folder, **inputs):
    """Run the script in a folder as the action does; its status, and the job's summary."""
    summary = folder / "summary.md"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    env = os.environ | inputs | {"PATH": path, "GITHUB_STEP_SUMMARY": str(summary)}
    done = subprocess.run(["sh", SCRIPT], cwd=folder, env=env, capture_output=True, text=True)
    return done.returncode, summary.read_text(), done.stdout


@pytest.mark.parametrize(
    ("engine", "status", "told"),
    [("reference", 0, "    PASS: "), ("suite_testing.broken:Liar", 1, "    LEN-2 violated")],
)
def test_the_script_runs_a_suite(tmp_path, engine, status, told):
    """It ends with the run's status, and leaves the stream, the page, JUnit and a summary."""
    found, summary, printed = job(
        tmp_path, ENGINE=engine, LAYOUTS="pr9757 vllm_dcp", OPTIONS="--examples 2 --cp 2"
    )
    assert found == status, printed
    assert summary.startswith(f"### Helix conformance: status {status}\n\n    layout")
    assert told in summary
    assert "Only 2 of 7 layouts were played: pr9757, vllm_dcp." in summary
    left = sorted(path.name for path in (tmp_path / "conformance-report").iterdir())
    assert left == ["run.html", "run.jsonl", "run.txt", "run.xml"]


def test_bad_usage_is_in_the_status(tmp_path):
    """A run that does not begin ends the job with status 2, and no page stands for it."""
    found, summary, _ = job(tmp_path, ENGINE="nobody")
    assert found == 2
    assert summary.startswith("### Helix conformance: status 2")
    assert not (tmp_path / "conformance-report/run.html").exists()


def test_every_input_reaches_the_script_as_a_variable():
    """Inputs are given in `env` alone, so that no shell reads them as program text."""
    steps = [step for step in ACTION["runs"]["steps"] if "run" in step]
    assert all("shell" in step and "${{" not in step["run"] for step in steps)
    given = " ".join(str(step.get(part)) for step in ACTION["runs"]["steps"] for part in step)
    assert set(re.findall(r"inputs\.([\w-]+)", given)) == set(ACTION["inputs"])
    variables = {name for step in steps for name in step["env"]}
    read = set(
        re.findall(r"\$\{?([A-Z]+)\b", SCRIPT.read_text() + steps[0]["run"] + steps[1]["run"])
    )
    assert variables <= read


@pytest.mark.skipif(
    not shutil.which("shellcheck"), reason="shellcheck is not installed (Debian has it)"
)
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(script):
    """Shellcheck finds nothing in the shell scripts that are run here and by users."""
    done = subprocess.run(["shellcheck", script], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "")
