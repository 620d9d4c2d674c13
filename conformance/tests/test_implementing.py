"""The guide for engines is run as it stands: its file is written, its commands are played."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main

GUIDE = Path(__file__).parents[1] / "IMPLEMENTING.md"
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```", re.M | re.S)
EXAMPLES = " --examples 15"
"""Traces of each run, in place of the 400 that a reader plays."""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty folder, on the path of this process and of its children."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    yield tmp_path
    sys.modules.pop("my_engine", None)


def play(line):
    """Run one command of the guide: its exit status and output."""
    words = shlex.split(line)
    if words[0] == "helix-conformance":
        if words[1] == "run":
            words += shlex.split(EXAMPLES)
        sys.modules.pop("my_engine", None)  # the file has grown
        result = CliRunner().invoke(main, words[1:])
        return result.exit_code, result.output
    if words[0] == "pytest":
        plugin = ["-p", "helix_conformance.pytest_plugin", "--helix-examples=5"]
        env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
        words = [sys.executable, "-m", *words, *plugin]
        done = subprocess.run(words, env=env, capture_output=True, text=True)
    else:
        words = [sys.executable if word == "python" else word for word in words]
        done = subprocess.run(words, capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def test_the_guide_is_true(folder):
    """Every file and every command, in order, with the exit status that the text names."""
    played = {}
    for language, text in BLOCK.findall(GUIDE.read_text()):
        if language in ("python", "toml"):
            name, _, code = text.partition("\n")
            with (folder / name.removeprefix("# ")).open("a") as file:
                file.write(code + "\n\n")
        if language == "sh":
            for line in text.splitlines():
                command, _, remark = line.partition("#")
                if command.strip() and command.strip() != "set -e":
                    status, output = play(command)
                    right = int(remark.split()[-1]) if remark else 0
                    assert status == right, f"{line}\n{output}"
                    played[line] = output
    assert len(played) == 16
    red = next(output for line, output in played.items() if "Mistaken" in line)
    assert "OWN-3 violated at event 1" in red
    assert "custom" not in red
    passed = next(output for line, output in played.items() if "OWN-2" in line)
    assert "1 passed" in passed
    for name in ("TestPages", "test_long_runs"):
        assert "1 passed" in next(output for line, output in played.items() if name in line)
    assert all((folder / name).exists() for name in ("run.html", "run.xml", "badge.json"))


def test_every_profile_is_in_the_guide():
    """Whoever follows it meets them all."""
    from helix_spec.engine import PROFILES

    text = GUIDE.read_text()
    assert [profile for profile in PROFILES if f"`{profile}`" not in text] == []
