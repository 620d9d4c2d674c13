"""The guide for engines is run as it stands: its file is written, its commands are played."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "conformance/IMPLEMENTING.md"
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


def played_page(page, folder):
    """Write every file of a page and play every command, in order; what each command printed.

    Each must end with the exit status that stands behind it.
    """
    played = {}
    for language, text in BLOCK.findall(page.read_text()):
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
    return played


@pytest.mark.parametrize(("name", "found"), [("cpp_engine", "OWN-3"), ("merge_alone", "ATT-1")])
def test_a_how_to_is_true(folder, name, found):
    """Its engine passes, and its mistake is found by the rule that the page names."""
    shutil.copy(GUIDE.parent / "examples/c/helix_engine.c", folder)
    *before, failed = played_page(ROOT / f"docs/howto/{name}.md", folder).values()
    assert "PASS: " in "".join(before)
    assert found in failed
    assert found in (ROOT / f"docs/howto/{name}.md").read_text()


def test_the_guide_is_true(folder):
    """Every file and every command, in order, with the exit status that the text names."""
    played = played_page(GUIDE, folder)
    assert len(played) == 16
    example = GUIDE.parent / "examples/python/my_engine.py"
    assert example.read_text().split() == (folder / "my_engine.py").read_text().split()
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
