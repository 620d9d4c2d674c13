"""The Triton kernels in the interpreter: every test of *_cases.py, in one process.

Triton decides on import, for the whole process, whether kernels are interpreted. A process of
their own keeps that from the other tests, some of which compile the same kernels.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
@pytest.mark.holds("PAGE-4", "ATT-1", "ATT-2", "ATT-3")
@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton has no wheel for this Python or platform",
)
def test_kernels_in_the_interpreter() -> None:
    """All of them pass. `TRITON_INTERPRET=1 pytest gpu_impl/tests/kernel_cases.py` tells more."""
    cases = sorted(Path(__file__).parent.glob("*_cases.py"))
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *cases],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
