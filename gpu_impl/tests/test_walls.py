"""What importing helix_gpu may load."""

import subprocess
import sys

import pytest

FORBIDDEN = [f"helix_spec.{module}" for module in ("placement", "invariants", "values")]
FORBIDDEN += ["helix_reference", "helix_conformance"]


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [("helix_gpu.bookkeeping.rank_book", ["torch"]), ("helix_gpu.cache", FORBIDDEN)],
)
def test_import_does_not_load(module: str, forbidden: list[str]) -> None:
    """The bookkeeping runs without torch, and nothing uses another package's arithmetic."""
    code = f"import sys, {module}; print(sorted(set(sys.modules) & set({forbidden})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
