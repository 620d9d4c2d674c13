"""What lies in the current folder is not run because somebody stands there."""

from __future__ import annotations

import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

BESIDE = Path(sys.executable).parent
PLANTED = [
    "queue",
    "z3",
    "numpy",
    "torch",
    "msgspec",
    "ctypes",
    "mpi4py",
    "optree",
    "sitecustomize",
]
RUN = ["run", "--layout", "pr9757", "--cp", "2", "--ranks", "2", "--examples", "1"]
needs_mpi = pytest.mark.skipif(
    find_spec("mpi4py") is None or shutil.which("mpiexec", path=BESIDE) is None,
    reason="needs mpi4py and mpiexec: pip install helix-conformance[mpi]",
)


def planted(folder: Path) -> None:
    """Put modules into a folder that leave a file behind when they are imported."""
    for name in PLANTED:
        code = f"open({str(folder / 'imported')!r}, 'a').write({name!r}); raise ImportError"
        (folder / f"{name}.py").write_text(code)


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "words",
    [
        [*RUN, "--engine", "gpu-ledger"],
        [*RUN, "--engine", "gpu-ledger", "--driver", "stdio"],
        [*RUN, "--engine", "gpu", "--driver", "pool"],
        [*RUN, "--engine", "gpu", "--driver", "torchrun"],
        pytest.param([*RUN, "--engine", "gpu", "--driver", "mpi"], marks=needs_mpi),
        ["prove", "--theorem", "contract-chunk-owner"],
    ],
    ids=lambda words: " ".join(words[-2:]),
)
def test_no_command_imports_from_there(tmp_path: Path, words: list[str]) -> None:
    """Neither the command nor a process of it; it does what it does elsewhere."""
    planted(tmp_path)
    command = [BESIDE / "helix-conformance", *words]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert not (tmp_path / "imported").exists()


def test_the_check_sees_an_import(tmp_path: Path) -> None:
    """A Python that does look there leaves the file."""
    planted(tmp_path)
    done = subprocess.run([sys.executable, "-c", "import queue"], cwd=tmp_path, capture_output=True)
    assert done.returncode != 0
    assert (tmp_path / "imported").read_text() == "queue"
