"""The suite on the Triton kernels: `suite_testing.kernel_cases`, in a process of its own.

Triton decides on import, for the whole process, whether kernels are interpreted.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import suite_testing


@pytest.mark.skipif(
    importlib.util.find_spec("triton") is None,
    reason="triton has no wheel for this Python or platform",
)
def test_the_kernels_pass_the_suite() -> None:
    """All of it, in the interpreter."""
    cases = Path(suite_testing.__file__).with_name("kernel_cases.py")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases],
        capture_output=True,
        text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
