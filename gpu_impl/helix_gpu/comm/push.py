"""An exchange without collectives: each rank writes its messages into its peers' memory.

Every rank has a *window* (`windows`) that all ranks of the group can write: SLOTS slots of one
message from each rank, and a count of arrivals from each. On CUDA it is torch's symmetric memory,
which peers reach over NVLink, and two Triton kernels do the work (`push_kernels`); multicast is not
used. On a CPU it is a shared file, and this module does what the kernels do: a simulation, for
tests.

Why no message is overwritten before it is read, with two slots. Epochs count exchanges. A rank's
put of epoch n + 2 goes where its put of epoch n went. It begins after the rank's own epoch n + 1
has ended, so after an arrival of epoch n + 1 from every peer. A peer signals n + 1 only after its
own epoch n has ended, and that ends with the last take of epoch n. With one slot the put of n + 1
would follow only the peer's put of n, not its take. `phases` says all of this in data: the CPU runs
it, and a test explores every interleaving of it, and of versions that are wrong.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Final, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.comm.exchange import Exchange
from helix_gpu.comm.windows import ALIGNMENT, SLOTS, arrivals, slots, window_bytes
from helix_spec.config import ModelShape

PATIENCE: Final = timedelta(seconds=60)
"""How long a CPU rank waits for a message before it gives its peer up."""


class Put(NamedTuple):
    """Write this rank's message to `peer` into `slot` of the peer's window."""

    peer: int
    slot: int


class Signal(NamedTuple):
    """Count one more arrival from this rank at `peer`, once what was put is visible there."""

    peer: int


class Await(NamedTuple):
    """Wait until `arrivals` messages from `peer` have arrived here."""

    peer: int
    arrivals: int


class Take(NamedTuple):
    """Copy the message from `peer` out of `slot` of this rank's window."""

    peer: int
    slot: int


Action = Put | Signal | Await | Take


def phases(ranks: int, epoch: int) -> list[list[list[Action]]]:
    """Return what every rank does in an exchange: phases of threads of actions.

    A phase begins when the one before has ended on this rank; its threads run in any order.

    Parameters
    ----------
    ranks : int
        Ranks of the group.
    epoch : int
        Number of the exchange, from 0.

    Returns
    -------
    list of list of list of Action

    Examples
    --------
    >>> puts, takes = phases(ranks=2, epoch=3)
    >>> puts[1]
    [Put(peer=1, slot=1), Signal(peer=1)]
    >>> takes[0]
    [Await(peer=0, arrivals=4), Take(peer=0, slot=1)]
    """
    slot = epoch % SLOTS
    puts: list[list[Action]] = [[Put(peer, slot), Signal(peer)] for peer in range(ranks)]
    takes: list[list[Action]] = [
        [Await(peer, epoch + 1), Take(peer, slot)] for peer in range(ranks)
    ]
    return [puts, takes]


def push(
    group: dist.ProcessGroup, model: ModelShape, *, message_bytes: int = 2**20, done: int = 0
) -> Exchange:
    """Return the exchange by one-sided writes; every rank of the group calls it.

    On CUDA every rank of the world calls it equally often, as the ranks of a mesh do: torch counts
    rendezvous by process, and a rank that one left out hangs in the next (pytorch issue 196082).

    Parameters
    ----------
    group : ProcessGroup
        The ranks that share a sequence, on one host.
    model : ModelShape
    message_bytes : int
        Bytes that a rank sends to one other in an exchange, at most: rows * heads / C * (head_dim *
        element size + 4). Memory is taken for SLOTS * C of them.
    done : int
        Exchanges that count as done, the same number on all ranks: for tests of what a counter
        does after billions of them.

    Returns
    -------
    Exchange
        It raises ValueError for a longer message, before any is written.
    """
    capacity = -(-message_bytes // ALIGNMENT) * ALIGNMENT
    if "nccl" in dist.get_backend(group):
        return _DevicePush(group, capacity, done)
    return _HostPush(group, capacity, done)


class _HostPush:
    """The protocol in plain copies between processes or threads that share a file.

    A signal must not overtake what was put before it: it does not on x86, whose stores are seen in
    their order.
    """

    def __init__(self, group: dist.ProcessGroup, capacity: int, done: int) -> None:
        self.rank, self.ranks, self.capacity = group.rank(), group.size(), capacity
        self.epoch = done
        windows = _shared_windows(group, window_bytes(self.ranks, capacity), done)
        self.slots = [slots(window, self.ranks, capacity) for window in windows]
        self.arrivals = [arrivals(window, self.ranks) for window in windows]

    def __call__(self, send: Tensor) -> Tensor:
        length = _checked_length(send, self.capacity)
        received = torch.empty_like(send)
        for phase in phases(self.ranks, self.epoch):
            for thread in phase:
                for action in thread:
                    match action:
                        case Put(peer, slot):
                            self.slots[peer][slot, self.rank, :length] = send[peer]
                        case Signal(peer):
                            self.arrivals[peer][self.rank] += 1
                        case Await(peer, arrivals):
                            self._wait(peer, arrivals)
                        case Take(peer, slot):
                            received[peer] = self.slots[self.rank][slot, peer, :length]
        self.epoch += 1
        return received

    def _wait(self, peer: int, arrivals: int) -> None:
        deadline = time.monotonic() + PATIENCE.total_seconds()
        while self.arrivals[self.rank][peer] < arrivals:
            if time.monotonic() > deadline:
                raise TimeoutError(
                    f"Rank {peer} of the group has sent {int(self.arrivals[self.rank][peer])} "
                    f"messages in {PATIENCE.total_seconds():g} seconds; message {arrivals} is "
                    "waited for."
                )
            time.sleep(0)


class _DevicePush:
    """The protocol in two kernels over symmetric memory, and a count of epochs on the device.

    Nothing of it changes on the host, so a CUDA graph may replay it. It waits on the device for
    its peers: no two that wait for each other may share a GPU.
    """

    def __init__(self, group: dist.ProcessGroup, capacity: int, done: int) -> None:
        from torch.distributed import _symmetric_memory as symmetric_memory

        from helix_gpu.comm.push_kernels import PARTS

        self.rank, self.ranks, self.capacity = group.rank(), group.size(), capacity
        self.device = torch.device("cuda", torch.cuda.current_device())
        # Read at the rendezvous. Where multicast cannot be set up, that fails or hangs.
        os.environ.setdefault("TORCH_SYMM_MEM_DISABLE_MULTICAST", "1")
        size = window_bytes(self.ranks, capacity)
        self.window = symmetric_memory.empty(size, dtype=torch.uint8, device=self.device)
        self.handle = symmetric_memory.rendezvous(self.window, group)
        self.window.zero_()
        arrivals(self.window, self.ranks).fill_(done * PARTS)
        peers = [self.handle.get_buffer(rank, (size,), torch.uint8) for rank in range(self.ranks)]
        self.windows = torch.tensor([peer.data_ptr() for peer in peers], device=self.device)
        self.epoch = torch.full((1,), done, dtype=torch.int64, device=self.device)
        # No rank may write before all windows are ready.
        torch.cuda.synchronize(self.device)
        dist.barrier(group)

    def __call__(self, send: Tensor) -> Tensor:
        from helix_gpu.comm.push_kernels import put, take

        _checked_length(send, self.capacity)
        received = torch.empty_like(send)
        put(send, self.windows, self.epoch, self.rank, self.capacity)
        take(received, self.window, self.epoch, self.capacity)
        self.epoch += 1
        return received


def _checked_length(send: Tensor, capacity: int) -> int:
    length = send.shape[1]
    if length > capacity:
        raise ValueError(
            f"A message has {length} bytes; this push was made for message_bytes {capacity}."
        )
    return length


def _shared_windows(group: dist.ProcessGroup, size: int, done: int) -> Sequence[Tensor]:
    """Every rank's window, with so many arrivals, as memory that all ranks of the group share."""
    memory = Path("/dev/shm")
    with tempfile.NamedTemporaryFile(dir=memory if memory.is_dir() else None) as mine:
        mine.truncate(size)
        windows = [
            torch.from_file(name, shared=True, size=size, dtype=torch.uint8)
            for name in _gathered(mine.name, group)
        ]
        arrivals(windows[group.rank()], group.size()).fill_(done)
        dist.barrier(group)  # the file's name goes when everyone has mapped it
    return windows


def _gathered(name: str, group: dist.ProcessGroup) -> list[str]:
    """Every rank's file name, as bytes: torch's gathering of objects would unpickle them."""
    own = torch.zeros(os.pathconf("/", "PC_PATH_MAX"), dtype=torch.uint8)
    own[: len(name)] = torch.tensor(list(name.encode("ascii")), dtype=torch.uint8)
    rows = [torch.empty_like(own) for _ in range(group.size())]
    dist.all_gather(rows, own, group=group)
    return [bytes(row.tolist()).rstrip(b"\0").decode("ascii") for row in rows]
