"""Engines to which something happens in the middle of an event."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any, ClassVar

import torch

from helix_conformance.engines.gpu import GpuEngine
from helix_gpu.cache import HelixCache
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import Decode, Event
from suite_testing.broken import write_over_the_servers_head

BEACONS = "HELIX_FAULTS_BEACONS"
"""A folder in which each rank's file grows by a byte with each event that it begins."""


class Beacon(GpuEngine):
    """The real implementation; it says where it is, so that something can happen to it there."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        self.beacon = Path(os.environ[BEACONS], f"rank-{self.rank}")
        self.beacon.unlink(missing_ok=True)
        return super().start(config, profiles)

    def apply(self, event: Event) -> Outcome:
        """Say so, then let the event happen."""
        with self.beacon.open("ab") as beacon:  # whole, wherever the rank is killed
            beacon.write(b".")
        return super().apply(event)


class BitFlipped(GpuEngine):
    """On rank 1 one bit of what a peer sent in the exchange arrives turned over."""

    def apply(self, event: Event) -> Outcome:
        """Turn a high bit over in what arrives."""
        if self.rank == 1 and isinstance(event, Decode) and self.config.layout.cp_size > 1:
            honest = self.cache._exchange

            def flipped(send: torch.Tensor) -> torch.Tensor:
                received = honest(send)
                received.view(torch.int32).view(-1)[0] ^= 1 << 28
                return received

            self.cache._exchange = flipped
            try:
                return super().apply(event)
            finally:
                self.cache._exchange = honest
        return super().apply(event)


class Garbled(GpuEngine):
    """On rank 1 the stream of answers carries bytes that are no message, as the pad says.

    1: a line of rubbish; 2: a line that does not end; 3: bytes that are no UTF-8.
    """

    def apply(self, event: Event) -> Outcome:
        """Write to the stream over the server's head."""
        if self.rank == 1 and isinstance(event, Decode) and event.pad:
            rubbish = {1: b"rubbish\n", 2: b'{"type":"outcome",', 3: b'{"type":"\xff\xfe"}\n'}
            write_over_the_servers_head(rubbish[event.pad])
            if event.pad == 2:
                time.sleep(3600)
        return super().apply(event)


class _NoMemoryInLayer1(HelixCache):
    """K and V of a step are written in layer 0 and not in layer 1, whose allocation fails."""

    fails = False
    calls = 0

    def _cached(self, rows: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.fails and self.calls == 4:
            raise torch.OutOfMemoryError("CUDA out of memory, so to speak")
        return super()._cached(rows)


class OutOfMemory(GpuEngine):
    """On rank 1 memory runs out in the middle of the append of a step with one dummy."""

    made: ClassVar[list[Any]] = []
    """The engines of this process, for a look at what is left of them."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        outcome = super().start(config, profiles)
        self.made.append(self)
        self.cache.__class__ = _NoMemoryInLayer1
        return outcome

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        self.cache.calls = 0
        self.cache.fails = self.rank == 1 and isinstance(event, Decode) and event.pad == 1
        return super().apply(event)
