"""CrossHair as a prover: whether it confirms the contract of a function, read strictly.

The contract of a function is in its docstring, as PEP 316 has it: `pre:` lines say for what
arguments, `post:` lines what holds of the result `_`. CrossHair runs the function itself on
symbolic integers, over all paths. Its report counts only if there is one line for each `post:`,
all of them "Confirmed over all paths.", and nothing else: the exit status of CrossHair is 0 also
for a contract that was never reached.
"""

from __future__ import annotations

import ctypes
import importlib
import inspect
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import helix_spec

SOLVER_BUDGET: Final = 40_000_000
"""Z3 resource units for one question of CrossHair's; the contracts here need a tenth."""
PR_SET_PDEATHSIG: Final = 1
"""Of <sys/prctl.h>."""
MAX_SECONDS: Final = 60
"""CPU seconds for one contract. The resource budget ends first; this is a last resort."""

CONFIRMED: Final = "Confirmed over all paths."


def contract_lines(function: Callable[..., Any], kind: str) -> list[str]:
    """Return the conditions of one kind (`pre` or `post`) in a docstring.

    Examples
    --------
    >>> from helix_spec.placement import ceil_div
    >>> contract_lines(ceil_div, "pre")
    ['b > 0']
    """
    return re.findall(rf"^\s*{kind}: (.+)$", inspect.getdoc(function) or "", re.MULTILINE)


def contract_problem(name: str) -> str | None:
    """Return what CrossHair says against a contract; None when it confirms every postcondition.

    Parameters
    ----------
    name
        Module and function, below `helix_spec`.
    """
    module_name, _, function_name = name.rpartition(".")
    function = getattr(importlib.import_module(f"helix_spec.{module_name}"), function_name)
    expected = len(contract_lines(function, "post"))
    if expected == 0:
        return f"{name} has no contract"
    home = str(Path(helix_spec.__file__).parents[1])
    command = [sys.executable, "-P", "-m", "crosshair", "check", "--report_all"]
    command += ["--analysis_kind=PEP316", f"--per_condition_timeout={MAX_SECONDS}"]
    command += [f"--per_path_timeout={MAX_SECONDS // 2}", f"helix_spec.{name}"]
    done = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        timeout=2 * MAX_SECONDS,
        preexec_fn=_end_with_the_parent,
        cwd=home,  # CrossHair imports what lies in the current folder
        env=os.environ
        | {
            "PYTHONHASHSEED": "0",
            "CROSSHAIR_SMT_RLIMIT": str(SOLVER_BUDGET),
            "PYTHONPATH": os.pathsep.join(filter(None, [home, os.environ.get("PYTHONPATH")])),
        },
    )
    return read_report(done.stdout, done.stderr, expected)


def _end_with_the_parent() -> None:
    """Have the system end this process when the one that started it ends, however it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def read_report(stdout: str, stderr: str, expected: int) -> str | None:
    """Return what a report of CrossHair lacks; None when it confirms all postconditions.

    Parameters
    ----------
    stdout, stderr
        What CrossHair wrote.
    expected
        How many postconditions the contract has.

    Examples
    --------
    >>> read_report("a.py:1: info: Confirmed over all paths.", "", expected=1) is None
    True
    >>> read_report("", "", expected=1)
    'CrossHair reached 0 of 1 postconditions'
    """
    lines = [line for line in stdout.splitlines() if line.strip()]
    messages = [re.sub(r"^\S+:\d+: (?:info|error|warning): ", "", line) for line in lines]
    others = [message for message in messages if message != CONFIRMED]
    if others:
        return f"CrossHair: {others[0]}"
    if len(messages) != expected:
        said = stderr.strip().splitlines()
        return f"CrossHair reached {len(messages)} of {expected} postconditions" + (
            f": {said[-1]}" if said else ""
        )
    return None
