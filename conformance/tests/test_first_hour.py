"""What a new user meets first: `init` writes an engine that passes, `talk` shows a conversation."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.init import STARTERS
from helix_spec.config import Config
from helix_spec.events import Admit, Decode
from helix_spec.trace import Trace, dump_trace

GUIDE = Path(__file__).parents[1] / "IMPLEMENTING.md"
BIN = str(Path(sys.executable).parent)


def call(*words):
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture(params=["--python", "--stdio"])
def started(request, tmp_path):
    """A folder into which `init` has written, for each kind of adapter."""
    result = call("init", tmp_path / "new", request.param)
    assert result.exit_code == 0, result.output
    return tmp_path / "new"


def conform(folder, *options):
    """Run the script of a folder: its status and what it printed."""
    script, env = folder / "conformance.sh", os.environ | {"PATH": f"{BIN}:{os.environ['PATH']}"}
    done = subprocess.run(["sh", script, *options], env=env, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_what_init_writes_passes(started):
    """The script that CI runs passes as it was written, on random traces and on vectors."""
    status, printed = conform(started, "--examples", "8")
    assert status == 0, printed
    assert "checked placement;" in printed


def test_what_init_writes_is_judged(started):
    """With its owner taken from the global position, the same script fails by OWN-3."""
    engine = started / "my_engine.py"
    right = engine.read_text()
    wrong = re.sub(r" - (self\.)?prompt_lens?\[id\]", "", right)
    assert wrong != right
    engine.write_text(wrong)
    status, printed = conform(started, "--examples", "8")
    assert status == 1, printed
    assert "OWN-3" in printed


def test_init_overwrites_nothing(started):
    """Where one of the files is there already, none is written."""
    workflow = started / ".github/workflows/conformance.yml"
    (started / "my_engine.py").unlink()
    workflow.write_text("mine")
    result = call("init", started)
    assert result.exit_code == 2
    assert "is there already; nothing was written." in result.output
    assert not (started / "my_engine.py").exists()
    assert workflow.read_text() == "mine"


def test_the_workflow_installs_what_it_is_told(tmp_path):
    """`--suite` is what the workflow installs, and nothing is left to be filled in."""
    assert call("init", tmp_path, "--suite", "suite @ git+https://x.org/y").exit_code == 0
    workflow = (tmp_path / ".github/workflows/conformance.yml").read_text()
    assert '- run: pip install "suite @ git+https://x.org/y"' in workflow
    assert "SUITE" not in workflow
    assert "ENGINE" not in (tmp_path / "conformance.sh").read_text()


def test_the_guide_goes_on_from_what_init_writes():
    """The first file of the guide is the file that `init --python` writes."""
    first = re.search(r"^```python\n(.*?)^```", GUIDE.read_text(), re.M | re.S)
    assert (STARTERS / "my_engine.py.txt").read_text() == first[1]


def test_talk_shows_every_line_in_order(tmp_path):
    """Each request to a rank is followed by its answer before the next event is told."""
    call("init", tmp_path, "--stdio")
    engine = f"stdio:{sys.executable} {tmp_path / 'my_engine.py'}"
    result = call("talk", "--engine", engine)
    assert result.exit_code == 0, result.output
    *lines, _, verdict = result.output.splitlines()
    assert verdict == "Every answer was correct."
    asked, answered = [], []
    for line in lines:
        arrow, rank, message = line.split(" ", 2)
        (asked if arrow == "->" else answered).append(
            (rank, re.search(r'"seq": ?(\d+)', message)[1])
        )
        told = [seq for _, seq in asked]
        assert arrow == "<-" or int(told[-1]) - len(answered) <= 3, "told ahead"
    assert sorted(asked) == sorted(answered)
    assert {rank for rank, _ in asked} == {"0", "1"}


@pytest.mark.parametrize(
    ("engine", "status", "told"),
    [
        ("suite_testing.broken:Liar", 1, "LEN-2 violated at event 1"),
        ("suite_testing.broken:Raiser", 3, "Rank 1 raised "),
        ("stdio:echo 1", 3, "The engine did not start. Rank 0 gave a malformed answer"),
        ("stdio:", 2, "names no command"),
    ],
)
def test_talk_ends_with_the_verdict(tmp_path, engine, status, told):
    """A stored trace is played; the status says whether its answers were correct."""
    config = Config(layout="pr9757/1:C=2,T=2", pages=[5, 5], max_len=50)
    path = tmp_path / "trace.json"
    path.write_bytes(dump_trace(Trace(config=config, events=[Admit(4, 3), Decode([4], [1])])))
    result = call("talk", path, "--engine", engine)
    assert result.exit_code == status, result.output
    assert told in result.output


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (["--layout", "pr9575"], "pr9757"),
        (["--profile", "atention"], "attention"),
        (["--engine", "refrence"], "reference"),
    ],
)
def test_a_typo_is_answered_with_the_nearest_name(words, meant):
    """A name of a layout, profile or engine that is none is followed by one that is near."""
    result = call("run", *words)
    assert result.exit_code == 2
    assert result.output.endswith(f"Did you mean {meant}?\n")


def test_what_is_near_nothing_is_answered_with_all_names():
    """Without a near name the list of names is all that is told."""
    result = call("run", "--layout", "x")
    assert "'balanced', 'custom'.\n" in result.output
    assert "Did you mean" not in result.output


@pytest.mark.parametrize(
    ("line", "completed"),
    [
        ("helix-conformance run --layout pr1", ["pr13180", "pr17866"]),
        ("helix-conformance run --engine gpu-h", ["gpu-hop-b"]),
        ("helix-conformance ta", ["talk"]),
    ],
)
def test_shells_complete_names(line, completed):
    """The variable of the README's line makes the command complete what has been typed."""
    env = {"COMP_WORDS": line, "COMP_CWORD": str(len(line.split()) - 1)}
    how = {"_HELIX_CONFORMANCE_COMPLETE": "bash_complete"}
    result = CliRunner(env=env | how).invoke(main, prog_name="helix-conformance")
    assert [name.split(",")[1] for name in result.output.splitlines()] == completed


def test_tables_in_a_pipe_are_not_wrapped(monkeypatch):
    """A row of the table is one line where there is no terminal, and fits where COLUMNS is set."""
    monkeypatch.delenv("COLUMNS", raising=False)
    words = ["run", "--engine", "gpu-ledger", "--layout", "pr9757", "--cp", "2", "--examples", "2"]
    row = "pages speculative fork preempt padding overlap groups window"
    assert row in call(*words).output
    narrow = CliRunner(env={"COLUMNS": "60"}).invoke(main, words).output
    assert row not in narrow
    assert max(map(len, narrow.partition("\n\n")[0].splitlines())) <= 60
