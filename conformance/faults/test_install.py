"""The package in an empty environment: its command starts, and says what is missing."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def beside(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The programs of an environment that `pip install .` was called in, and nothing else."""
    folder = tmp_path_factory.mktemp("empty")
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    subprocess.run([folder / "bin/pip", "install", "--quiet", ROOT], check=True)
    return folder / "bin"


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("words", "status", "sentence"),
    [
        ("--help", 0, "Check an engine's sharded decode KV cache"),
        ("--version", 0, "helix-conformance, version "),
        ("run", 2, "needs torch: pip install 'helix-conformance[gpu]'."),
        ("run --engine reference --driver torchrun", 2, "needs torch: pip install"),
        ("run --engine reference --driver mpi", 2, "pip install 'helix-conformance[mpi]'."),
        ("show", 2, "Missing argument 'TRACE.json'."),
        ("vectors", 2, "Run the vectors of DIR"),
        ("prove", 2, "pip install 'helix-conformance[prove]'."),
        ("run --engine gpu-ledger --driver pool --cp 2 --examples 3", 0, "PASS: "),
        ("run --engine reference --driver stdio --cp 1 --examples 1", 0, "PASS: "),
        ("vectors check --engine reference", 0, "PASS: "),
    ],
)
def test_the_command(beside: Path, tmp_path: Path, words: str, status: int, sentence: str) -> None:
    """Help, a verdict, or one sentence; no traceback."""
    command = [beside / "helix-conformance", *words.split()]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=500)
    said = done.stdout + done.stderr
    assert done.returncode == status, said
    assert sentence in said
    assert "Traceback" not in said
