"""The kernels of the one-sided exchange in the interpreter; `test_kernels` runs this file.

Ranks are windows in one process: they all put, then they all take, as the protocol's phases.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helix_gpu.comm.push_kernels import PARTS, put, take
from helix_gpu.comm.windows import arrivals, slots, window_bytes


class Ranks:
    """Windows, epochs and addresses of all ranks."""

    def __init__(self, ranks: int, capacity: int) -> None:
        self.ranks, self.capacity = ranks, capacity
        size = window_bytes(ranks, capacity)
        self.windows = [torch.zeros(size, dtype=torch.uint8) for _ in range(ranks)]
        self.addresses = torch.tensor([window.data_ptr() for window in self.windows])
        self.epochs = [torch.zeros(1, dtype=torch.int64) for _ in range(ranks)]

    def put(self, sent: list[Tensor]) -> None:
        """Every rank's messages, into all windows."""
        for rank, send in enumerate(sent):
            put(send, self.addresses, self.epochs[rank], rank, self.capacity)

    def take(self, sent: list[Tensor]) -> list[Tensor]:
        """What every rank finds in its window; the next epoch begins."""
        received = [torch.empty_like(send) for send in sent]
        for rank, tensor in enumerate(received):
            take(tensor, self.windows[rank], self.epochs[rank], self.capacity)
            self.epochs[rank] += 1
        return received


def messages(ranks: int, length: int, seed: int) -> list[Tensor]:
    """Random bytes [ranks, length] of every rank."""
    generator = torch.Generator().manual_seed(seed)
    shape = (ranks, ranks, length)
    return list(torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8))


@pytest.mark.parametrize(
    ("ranks", "length", "capacity"), [(2, 16, 16), (3, 4, 64), (3, 40_000, 40_000), (2, 4100, 8192)]
)
def test_messages_arrive(ranks: int, length: int, capacity: int) -> None:
    """Row s of what rank d takes is row d of what rank s put, epoch after epoch."""
    world = Ranks(ranks, capacity)
    for epoch in range(3):
        sent = messages(ranks, length, epoch)
        world.put(sent)
        for rank, received in enumerate(world.take(sent)):
            assert torch.equal(torch.stack([send[rank] for send in sent]), received)


def test_slots_and_counts_are_the_protocols() -> None:
    """An exchange fills one slot, the next the other; every program counts once."""
    world = Ranks(2, 32)
    first, second = messages(2, 32, 0), messages(2, 32, 1)
    world.put(first)
    window = slots(world.windows[1], 2, 32)
    assert torch.equal(torch.stack([send[1] for send in first]), window[0])
    assert not window[1].any()
    assert arrivals(world.windows[1], 2).tolist() == [PARTS, PARTS]
    world.take(first)
    world.put(second)
    assert torch.equal(torch.stack([send[1] for send in first]), window[0])
    assert torch.equal(torch.stack([send[1] for send in second]), window[1])
    assert arrivals(world.windows[1], 2).tolist() == [2 * PARTS, 2 * PARTS]
