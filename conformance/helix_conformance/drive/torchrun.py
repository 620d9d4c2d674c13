"""Ranks under torchrun: each launched process supervises one engine in a child.

The supervisors find each other through the key-value store of torchrun's own rendezvous; the
engines form a process group of their own there.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import msgspec

from helix_conformance.drive.lines import Address, Line, Switchboard, call
from helix_conformance.drive.process import START_LIMIT_S
from helix_conformance.drive.stores import joined_store
from helix_conformance.drive.supervised import (
    LEFT_ALONE,
    SupervisedDriver,
    met_at,
    setup_of,
    supervise,
)
from helix_conformance.drive.worker import Setup

_KEY: Final = "address"


def launched() -> bool:
    """Whether this process was started by torchrun."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def rank() -> int:
    """The global rank of this process."""
    return int(os.environ["RANK"])


def launcher(ranks: int) -> tuple[list[str], dict[str, str]]:
    """The command that starts so many Python processes on this machine, and its environment."""
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    return [*words, f"--nproc-per-node={ranks}"], {}


class TorchrunDriver(SupervisedDriver):
    """Rank 0 of a torchrun."""

    name = "torchrun"

    def __init__(self, engine: str, *, backend: str, deadline_s: float) -> None:
        setup = _setup(engine, backend, deadline_s)
        switchboard = Switchboard(setup.store_host)
        _store(setup).set(_KEY, msgspec.json.encode(switchboard.address).decode())
        found = switchboard.lines(setup.world, START_LIMIT_S)
        lines = {rank: Line(connection) for rank, connection in found.items()}
        super().__init__(engine, setup, lines, deadline_s)


def serve(engine: str, *, backend: str, deadline_s: float) -> int:
    """Be another rank than 0; returns the exit status."""
    setup = _setup(engine, backend, deadline_s)
    address = msgspec.json.decode(_store(setup).get(_KEY), type=Address)
    line = Line(call(address, setup.rank, START_LIMIT_S))
    return LEFT_ALONE if supervise(setup, line) is None else 0


def _setup(engine: str, backend: str, deadline_s: float) -> Setup:
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    world = int(os.environ["WORLD_SIZE"])
    return met_at(setup_of(engine, rank(), world, backend, deadline_s), host, port)


def _store(setup: Setup) -> Any:
    return joined_store(setup.store_host, setup.store_port, "helix-control")
