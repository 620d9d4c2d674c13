"""From the name of an engine, and of a driver, to a driver that holds it."""

from __future__ import annotations

from typing import Final

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.launched import LaunchedDriver
from helix_conformance.drive.process import PoolDriver, StdioDriver
from helix_conformance.engines import COMMAND, EngineSpecError, load_engine

DRIVERS: Final = ("local", "stdio", "pool", "torchrun", "mpi")
"""What `--driver` may name."""


def default_driver(engine: str) -> str:
    """Return the name of the driver on which an engine runs when none is given.

    Parameters
    ----------
    engine : str
        `stdio:COMMAND`, or the name of a Python engine as `load_engine` takes it.

    Returns
    -------
    str
        `stdio` for a command, `pool` for an engine that needs processes, else `local`.

    Raises
    ------
    EngineSpecError
        When the engine's name stands for none.

    Examples
    --------
    >>> default_driver("reference")
    'local'
    >>> default_driver("stdio:./my_engine")
    'stdio'
    """
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
    """Return the ranks of an engine, up and waiting; whoever opens them closes them.

    Parameters
    ----------
    engine : str
        `stdio:COMMAND`, or the name of a Python engine as `load_engine` takes it.
    driver : str or None
        One of `DRIVERS`; None for the engine's `default_driver`.
    ranks : int
        Processes of a pool.
    backend : str
        Of the process group under torchrun and mpiexec: `gloo` or `nccl`.
    deadline_s : float
        Seconds that a rank may be silent for.

    Returns
    -------
    Driver
        The driver; its ranks run until `close`.

    Raises
    ------
    EngineSpecError
        When the names do not fit each other.
    EngineFailure
        When the engine does not start.

    Examples
    --------
    >>> driver = open_driver("reference")
    >>> driver.name, driver.largest_world
    ('local', None)
    >>> driver.close()
    """
    driver = driver or default_driver(engine)
    if driver == "stdio":
        return StdioDriver(engine, deadline_s=deadline_s)
    if engine.startswith(COMMAND):
        raise EngineSpecError(f"{engine!r} is a command; it runs under --driver stdio.")
    if driver == "local":
        engine_class = load_engine(engine)
        if engine_class.needs_processes:
            raise EngineSpecError(
                f"Engine {engine} needs a process for each rank; use --driver pool."
            )
        return LocalDriver(
            engine_class,
            deadline_s=deadline_s,
            elsewhere=lambda: StdioDriver(engine, deadline_s=deadline_s),
        )
    if driver == "pool":
        return PoolDriver(engine, ranks, deadline_s=deadline_s)
    return LaunchedDriver(engine, driver, backend=backend, deadline_s=deadline_s)
