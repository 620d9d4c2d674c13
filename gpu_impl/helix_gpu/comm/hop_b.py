"""HOP-B: the batch in two halves, one attending while the other's partials travel.

From arXiv 2507.07120 ("HOP-B"). What is hidden is the time of the bytes; the latency of an exchange
is paid twice instead of once, and so are the launches of the attention. At most decode shapes it
loses, so a gate decides by measured costs, for every step and alike on all ranks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from statistics import median
from typing import Final

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.comm.exchange import Exchange
from helix_spec.config import ModelShape

Found = tuple[Tensor, ...]
Work = Callable[..., Found]
"""Takes tensors."""
REPEATS: Final = 20
"""Times that each thing is measured; the median counts."""
MESSAGES: Final = (2**12, 2**20)
"""Bytes for each rank, at most, in the two exchanges that are measured."""


@dataclass(frozen=True, slots=True)
class Costs:
    """What attending and exchanging cost, the same on all ranks. Seconds and bytes per second.

    Examples
    --------
    >>> costs = Costs(latency=1e-5, exchange_speed=1e11, attention_speed=4e12, second_half=1e-5)
    >>> costs.saved(cached=2**30, sent=2**20) > 0  # little to hide
    False
    >>> costs.saved(cached=2**32, sent=2**25) > 0
    True
    """

    latency: float
    """Of an exchange without bytes."""
    exchange_speed: float
    """Bytes that a rank sends to all others, per second beyond the latency."""
    attention_speed: float
    """Bytes of cached K and V that a rank attends over, per second."""
    second_half: float
    """What attending in two halves takes longer than in one."""

    def saved(self, cached: float, sent: float) -> float:
        """Return the seconds that two halves save in a layer; negative where they lose.

        Halves pass through attention (a seconds each) and exchange (x each) as two equal jobs
        through two machines, which takes a + max(a, x) + x (Johnson, Naval Res. Logist. Q. 1,
        1954). So where attention is the longer, half of the bytes' time is saved, and the second
        half's launches are lost; where the exchange is, half of the attention's, and one latency is
        lost.

        Parameters
        ----------
        cached : float
            Bytes of K and V that a rank reads.
        sent : float
            Bytes that it sends.
        """
        attention = cached / self.attention_speed
        whole = attention + self._exchange(sent)
        a, x = (attention + self.second_half) / 2, self._exchange(sent / 2)
        return whole - (a + max(a, x) + x)

    def _exchange(self, sent: float) -> float:
        return self.latency + sent / self.exchange_speed


def measure(
    exchange: Exchange,
    group: dist.ProcessGroup,
    model: ModelShape,
    attend: Callable[[int], object],
    rows: int,
    cached: int,
    device: torch.device | str = "cpu",
) -> Costs:
    """Return the costs on these ranks, of which the slowest counts.

    Every rank of the group calls it. It takes tens of exchanges.

    Parameters
    ----------
    exchange : Exchange
        Made for this group and model.
    group : ProcessGroup
    model : ModelShape
    attend : callable
        `attend(n)` attends with n rows.
    rows : int
        Rows of a usual batch, at least 2.
    cached : int
        Bytes of K and V that `attend(rows)` reads.
    device : torch.device or str

    Returns
    -------
    Costs
    """
    device, wire = torch.device(device), getattr(torch, model.partial_dtype)
    item = model.value_dim * wire.itemsize + 4  # of one row and head
    sizes = [size // item * item for size in MESSAGES]

    def exchanging(size: int) -> Callable[[], object]:
        send = torch.zeros(group.size(), size, dtype=torch.uint8, device=device)
        return lambda: exchange(send)

    def halves() -> None:
        attend(rows // 2)
        attend(rows - rows // 2)

    runs = [*map(exchanging, sizes), lambda: attend(rows), halves]
    times = torch.tensor([_seconds(run, device) for run in runs], device=device)
    dist.all_reduce(times, op=dist.ReduceOp.MAX, group=group)
    return fitted(times.tolist(), [size * (group.size() - 1) for size in sizes], cached)


def fitted(times: Sequence[float], sent: Sequence[int], cached: int) -> Costs:
    """Return the costs from the times of four runs.

    A difference that noise has made negative or 0 is taken for 0 seconds: an exchange whose bytes
    cost nothing, and halves that cost no more, never let HOP-B look better than it is.

    Parameters
    ----------
    times : sequence of float, [4]
        Seconds of a small and of a large exchange, of attending whole and in halves.
    sent : sequence of int, [2]
        Bytes that a rank sends to all others in the two exchanges.
    cached : int
        Bytes of K and V that attending reads.

    Returns
    -------
    Costs
    """
    (small, large, whole, halves), (few, many) = times, sent
    per_byte = max(large - small, 0.0) / (many - few)
    return Costs(
        latency=max(small - few * per_byte, 0.0),
        exchange_speed=1 / per_byte if per_byte else float("inf"),
        attention_speed=cached / whole,
        second_half=max(halves - whole, 0.0),
    )


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time of a run, from its launch to its end on the device."""

    def once() -> float:
        _synchronize(device)
        start = time.perf_counter()
        run()
        _synchronize(device)
        return time.perf_counter() - start

    once()
    return median(once() for _ in range(REPEATS))


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class SameLane:
    """Does work at once, in the caller's stream or thread."""

    def close(self) -> None:
        """End nothing."""

    def hand(self, work: Work, *given: Tensor) -> Callable[[], Found]:
        """Do `work(*given)`, and return a function that returns its result.

        Parameters
        ----------
        work : callable
            Takes tensors and returns some.
        *given : Tensor
        """
        result = work(*given)
        return lambda: result


class Lane:
    """Does work beside the main one, in the order in which it is handed over.

    A stream on CUDA, whose work starts when all before it in the current stream has ended, and a
    thread on the CPU.

    Parameters
    ----------
    device : torch.device
    """

    def __init__(self, device: torch.device) -> None:
        self.stream: torch.cuda.Stream | None = None
        if device.type == "cuda":
            self.stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]
        self.thread = None if self.stream else ThreadPoolExecutor(1)

    def close(self) -> None:
        """End the thread, if there is one."""
        if self.thread is not None:
            self.thread.shutdown()

    def hand(self, work: Work, *given: Tensor) -> Callable[[], Found]:
        """Begin `work(*given)`, and return a function that waits for its result.

        Parameters
        ----------
        work : callable
            Takes tensors and returns some.
        *given : Tensor
        """
        if self.thread is not None:
            return self.thread.submit(work, *given).result
        assert self.stream is not None
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            result = work(*given)
        ended = self.stream.record_event()
        for tensor in given:
            tensor.record_stream(self.stream)

        def wait() -> Found:
            torch.cuda.current_stream().wait_event(ended)
            for tensor in result:
                tensor.record_stream(torch.cuda.current_stream())
            return result

        return wait
