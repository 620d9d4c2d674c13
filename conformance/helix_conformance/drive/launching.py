"""Runs whose processes torchrun or mpiexec launches: taking part in one, and launching one."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Final

from helix_conformance.engines import COMMAND, EngineSpecError, load_engine

LAUNCHED: Final = ("torchrun", "mpi")
"""Drivers whose processes are launched from outside."""
VERDICT_FILE: Final = "HELIX_CONFORMANCE_VERDICT"
"""Where such a run leaves its exit status: torchrun turns every failure into status 1."""
NO_VERDICT: Final = 3


def take_part(engine: str, driver: str, *, ranks: int, backend: str, deadline_s: float) -> None:
    """Be one of the launched processes: rank 0 goes on, the others serve it and leave.

    Where nobody has launched this process, launch so many with the same command, and leave with
    the verdict of their rank 0. Raises EngineSpecError, in every process alike.
    """
    if engine.startswith(COMMAND):
        raise EngineSpecError(f"{engine!r} is a command; it runs under --driver stdio.")
    load_engine(engine)
    module = _module(driver)
    if not module.launched():
        sys.exit(_launch(module, driver, ranks))
    if module.rank() != 0:
        sys.exit(module.serve(engine, backend=backend, deadline_s=deadline_s))


def _launch(module: ModuleType, driver: str, ranks: int) -> int:
    command, more = module.launcher(ranks)
    with tempfile.TemporaryDirectory() as folder:
        verdict = Path(folder) / "verdict"
        subprocess.run(
            [*command, "-m", "helix_conformance", *sys.argv[1:]],
            env=more | os.environ | {VERDICT_FILE: str(verdict)},
            check=False,
        )
        if verdict.exists():
            return int(verdict.read_text())
    print(
        f"The processes under {driver} have ended without a verdict: rank 0 did not live to give "
        "one. What was known by then is in the file of --json.",
        file=sys.stderr,
    )
    return NO_VERDICT


def leave_verdict(status: int) -> None:
    """Put the exit status where a launching process looks for it."""
    if VERDICT_FILE in os.environ:
        Path(os.environ[VERDICT_FILE]).write_text(str(status))


def _module(driver: str) -> ModuleType:
    if driver == "mpi":
        from helix_conformance.drive import mpi

        return mpi
    from helix_conformance.drive import torchrun

    return torchrun
