"""A pool of engine processes over gloo, started once and kept for many traces."""

from __future__ import annotations

from typing import Any

import msgspec

from helix_conformance.drive.group import GroupDriver
from helix_conformance.drive.process import EngineProcess
from helix_conformance.drive.worker import Setup
from helix_conformance.engines import load_engine


class PoolDriver(GroupDriver):
    """Worker processes 0 .. size-1; a trace of fewer ranks uses the first of them.

    After an EngineFailure all workers are ended, and started anew for the next trace. `engine`
    may change between traces to one that makes the same groups and declares the same profiles.
    """

    name = "pool"

    def __init__(self, engine: str, size: int = 4, *, deadline_s: float = 30.0) -> None:
        super().__init__(engine, size, deadline_s)
        self.starts = 0
        self.store: Any = None
        self.begin()

    def begin(self) -> None:
        """Start all workers."""
        self.starts += 1
        setup = Setup(
            engine=self.engine,
            rank=0,
            world=self.size,
            channel=-1,
            collective_timeout_s=10 * self.deadline_s,  # a hang is the supervisor's to call
        )
        if load_engine(self.engine).needs_processes:
            from helix_conformance.drive.stores import hosted_store

            # The store listens as long as this object lives; each start meets under a new name.
            self.store = hosted_store()
            setup = msgspec.structs.replace(
                setup,
                store_host="127.0.0.1",
                store_port=self.store.port,
                group=f"pool-{self.starts}",
            )
        self.ranks = [
            EngineProcess(msgspec.structs.replace(setup, rank=rank)) for rank in range(self.size)
        ]
        self.greet()
