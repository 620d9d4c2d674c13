"""`make test-fast` on copies in which one line of helix_gpu is wrong: it fails, whichever it is."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HELIX_GPU = Path("gpu_impl/helix_gpu")
WRONG = {
    "owner": (
        "bookkeeping/dealing.py", 'divmod(0 if layout.owner == "step" else prompt_len, chunk)',
        "divmod(prompt_len, chunk)",
    ),
    "length": ("bookkeeping/ledger.py", " + before - before[firsts][requests]", " + before"),
    "page": (
        "bookkeeping/ledger.py", "return -(-local_len // self._block)",
        "return local_len // self._block + 1",
    ),
    "merge": ("attention/merge.py", "(lses - top).exp()", "(lses - top).exp2()"),
    "refusal": (
        "bookkeeping/ledger.py", "totals.max() > self.max_len", "totals.max() >= self.max_len"
    ),
}  # fmt: skip


@pytest.mark.timeout(600)
@pytest.mark.parametrize("wrong", WRONG)
def test_the_fast_tests_notice_a_wrong_line(wrong: str, tmp_path: Path) -> None:
    """The first failure is told within the minute that they take."""
    leave_out = shutil.ignore_patterns("__pycache__")
    for name in ("spec", "reference", "gpu_impl", "conformance"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=leave_out)
    for name in ("Makefile", "pyproject.toml", "conftest.py"):
        shutil.copy(ROOT / name, tmp_path)
    file, right, mistake = WRONG[wrong]
    path = tmp_path / HELIX_GPU / file
    text = path.read_text()
    assert text.count(right) == 1
    path.write_text(text.replace(right, mistake))
    folders = ["spec", "reference", "gpu_impl", "conformance", "conformance/mutants"]
    done = subprocess.run(
        ["make", "--old-file=.venv/installed", f"BIN={Path(sys.executable).parent}", "test-fast"],
        cwd=tmp_path,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(str(tmp_path / folder) for folder in folders),
            "PYTEST_ADDOPTS": "-x -q -p no:cacheprovider",
        },
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    print(done.stdout)
    assert done.returncode != 0
    assert "1 failed" in done.stdout
