"""The page of documentation: its program runs, and what it names is there."""

from __future__ import annotations

import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helix_gpu.cache import DecodeStep, HelixCache

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "helix_gpu.md").read_text()
THREADS = """\
import atexit, pathlib
@atexit.register
def _():
    names = [file.read_text().strip() for file in pathlib.Path("/proc/self/task").glob("*/comm")]
    print(f"left: {names.count('pt_gloo_runloop')}")
"""
PROGRAM = re.findall(r"^```python\n(.*?)^```", PAGE, re.M | re.S)[0]

SAID = ["[5, 9, 5] 21 (2, 8, 16)", "[9, 12, 10] 21 (2, 8, 16)"]


@pytest.mark.timeout(120)
def test_the_program_runs_on_two_ranks(tmp_path: Path) -> None:
    """It prints what the page says, in forty lines; none of gloo's threads outlives Python."""
    (tmp_path / "page.py").write_text(THREADS + PROGRAM)
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=2", "page.py"],
        cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    printed = re.findall(r"\[[\d, ]+\] \d+ \([\d, ]+\)|left: \d+", done.stdout)
    assert sorted(printed) == [*SAID, "left: 0", "left: 0"]
    assert all(f"`{line}`" in PAGE.replace("\n", " ") for line in SAID)
    assert len([line for line in PROGRAM.splitlines() if line.strip()]) <= 40


def test_what_the_page_names_is_there() -> None:
    """Modules, and methods of a cache, by their public names."""
    for name in re.findall(r"`(helix_gpu(?:\.\w+)+)`", PAGE):
        module, _, last = name.rpartition(".")
        try:
            importlib.import_module(name)
        except ModuleNotFoundError:
            assert hasattr(importlib.import_module(module), last), name
    calls = set(re.findall(r"cache\.(\w+)\(", PAGE)) | {"cancel", "release", "accept", "close"}
    assert [name for name in calls if name.startswith("_") or not hasattr(HelixCache, name)] == []
    assert all(hasattr(HelixCache, name) for name in ("attend", "gather", "prefill", "finish"))


@pytest.mark.parametrize("kind", [HelixCache, DecodeStep])
def test_public_names_are_described(kind: type) -> None:
    """What has no underscore has a docstring."""
    public = [
        (name, value)
        for name, value in inspect.getmembers(kind, callable)
        if not name.startswith("_") and value.__qualname__.startswith(kind.__name__)
    ]
    assert len(public) > 2
    assert [name for name, value in public if not value.__doc__] == []
