"""From the name of an engine, and of a driver, to a driver that holds it."""

from __future__ import annotations

from typing import Final

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines import COMMAND, EngineSpecError, load_engine

DRIVERS: Final = ("local", "stdio", "pool", "torchrun", "mpi")
"""What `--driver` may name."""


def default_driver(engine: str) -> str:
    """Where an engine runs when nothing is said. Raises EngineSpecError."""
    if engine.startswith(COMMAND):
        return "stdio"
    return "pool" if load_engine(engine).needs_processes else "local"


def open_driver(
    engine: str,
    driver: str | None = None,
    *,
    ranks: int = 4,
    backend: str = "gloo",
    deadline_s: float = 30.0,
) -> Driver:
    """The ranks of an engine, up and waiting; whoever opens them closes them.

    `ranks` are the processes of a pool; `deadline_s` is how long a rank may be silent. Raises
    EngineSpecError when the names do not fit, and EngineFailure when the engine does not start.
    """
    driver = driver or default_driver(engine)
    if driver == "stdio":
        from helix_conformance.drive.stdio import StdioDriver

        return StdioDriver(engine, deadline_s=deadline_s)
    if engine.startswith(COMMAND):
        raise EngineSpecError(f"{engine!r} is a command; it runs under --driver stdio.")
    if driver == "local":
        engine_class = load_engine(engine)
        if engine_class.needs_processes:
            raise EngineSpecError(
                f"Engine {engine} needs a process for each rank; use --driver pool."
            )
        return LocalDriver(engine_class, deadline_s=deadline_s)
    if driver == "pool":
        from helix_conformance.drive.pool import PoolDriver

        return PoolDriver(engine, ranks, deadline_s=deadline_s)
    if driver == "mpi":
        from helix_conformance.drive.mpi import MpiDriver

        return MpiDriver(engine, backend=backend, deadline_s=deadline_s)
    from helix_conformance.drive.torchrun import TorchrunDriver

    return TorchrunDriver(engine, backend=backend, deadline_s=deadline_s)
