"""The page of documentation: its program runs, and prints what the page says."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra `models` is not installed")

PAGE = (Path(__file__).parents[2] / "docs" / "helix_in_your_model.md").read_text()
PROGRAM = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)[0]
SAID = re.findall(r"`(True True \[[\d, ]+\])`", PAGE)


@pytest.mark.timeout(240)
def test_the_program_runs_on_two_ranks(tmp_path: Path) -> None:
    """In forty lines."""
    (tmp_path / "model.py").write_text(PROGRAM)
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=2", "model.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"(?:True|False) (?:True|False) \[[\d, ]+\]", done.stdout)
    assert sorted(printed) == sorted(SAID) != []
    assert len([line for line in PROGRAM.splitlines() if line.strip()]) <= 40
