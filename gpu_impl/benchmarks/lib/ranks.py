"""Several ranks that measure together: their clocks, and what they agree on."""

from __future__ import annotations

import faulthandler
import gc
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Collection, Iterator, Sequence
from datetime import timedelta
from typing import Any

from lib import DRY
from lib.device import DEVICE, flush, once, wait
from lib.report import BEGUN, Report

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.graphs import Replay

PATIENCE = timedelta(seconds=60)
"""How long a rank waits for another that has failed."""
LIMIT = 1200.0 if DRY else 240.0
"""Seconds after the start at which nothing new is begun."""
ROUNDS, WARM_UP = (1, 1) if DRY else (30, 3)
Found = dict[str, Any]
"""What a section finds, to be written as JSON."""
More = Callable[[], bool]
"""Whether a section has time left, the same on all ranks."""


def world() -> dist.ProcessGroup:
    """The group of all ranks."""
    assert dist.group.WORLD is not None
    return dist.group.WORLD


def of_all(value: float) -> list[float]:
    """This number of every rank."""
    values = torch.zeros(dist.get_world_size(), dtype=torch.float64, device=DEVICE)
    values[dist.get_rank()] = value
    dist.all_reduce(values)
    found: list[float] = values.tolist()
    return found


def differing(a: Tensor, b: Tensor, tolerance: float = 0.0) -> int:
    """Elements of all ranks that are apart, or NaN."""
    close = torch.isclose(a, b, rtol=tolerance, atol=tolerance)
    return int(sum(of_all(float((~close).sum()))))


def tidy() -> None:
    """Give back the memory of what is no longer used."""
    gc.collect()
    if not DRY:
        torch.cuda.empty_cache()


def times_of(
    runs: dict[str, Replay], alone: Collection[str] = (), rounds: int = ROUNDS
) -> dict[str, dict[str, float]]:
    """Microseconds of each run on the device, taken in turn with a cold L2: median and quartiles.

    In each round the slowest rank counts; of the runs `alone`, which exchange nothing, this rank.
    """
    taken = torch.zeros(rounds, len(runs), dtype=torch.float64, device=DEVICE)
    signal = torch.zeros(1, device=DEVICE)
    for turn in range(-WARM_UP, rounds):
        for place, run in enumerate(runs.values()):
            # All devices begin together, and all hosts are ahead of them by the flush.
            dist.all_reduce(signal)
            flush()()
            taken[max(turn, 0), place] = once(run)
    slowest = taken.clone()
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    of_one = torch.tensor([name in alone for name in runs], device=DEVICE)
    shares = torch.tensor([0.5, 0.25, 0.75], dtype=torch.float64, device=DEVICE)
    figures = torch.where(of_one, taken, slowest).quantile(shares, 0).T.tolist()
    return {
        name: dict(zip(("us", "q1", "q3"), row, strict=True))
        for name, row in zip(runs, figures, strict=True)
    }


def microseconds(
    runs: dict[str, Callable[[], object]], device: torch.device, rounds: int, warm_up: int
) -> dict[str, list[float]]:
    """Of each run, `rounds` times in turn, the slowest rank's time, launching it included."""
    times = torch.zeros(rounds, len(runs), dtype=torch.float64, device=device)
    for turn in range(-warm_up, rounds):
        for place, run in enumerate(runs.values()):
            dist.barrier()
            begun = time.perf_counter()
            run()
            if device.type == "cuda":
                torch.cuda.synchronize()
            if turn >= 0:
                times[turn, place] = (time.perf_counter() - begun) * 1e6
    dist.all_reduce(times, dist.ReduceOp.MAX)
    return {name: times[:, place].tolist() for place, name in enumerate(runs)}


def host_times(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Median microseconds from a run's launch to its end on the device; the slowest rank's."""
    taken = microseconds(runs, DEVICE, ROUNDS, WARM_UP)
    return {name: statistics.median(times) for name, times in taken.items()}


def goal(what: str, found: float, bound: float, *, least: bool) -> Found:
    """A row of a section's goals."""
    met = found >= bound if least else found <= bound
    sign = ">=" if least else "<="
    return {"goal": what, "found": found, "bound": f"{sign} {bound:g}", "met": met}


class Ranks:
    """What the ranks agree on, through the host: no device has to answer."""

    def __init__(self) -> None:
        self.group = dist.new_group(backend="gloo", timeout=PATIENCE)
        self.lost = False
        """Whether another rank no longer answers."""

    def saying(self, so: bool) -> list[int]:
        """The ranks that say so."""
        said = torch.zeros(dist.get_world_size(), dtype=torch.int64)
        said[dist.get_rank()] = so
        try:
            dist.all_reduce(said, group=self.group)
        except RuntimeError:
            self.lost = True
            raise
        ranks: list[int] = said.nonzero()[:, 0].tolist()
        return ranks

    def section(
        self, report: Report, body: Callable[[Report, Found, More], None], seconds: float
    ) -> Callable[[Found], None]:
        """A body of a report's section that fails on all ranks if it does on one.

        It is asked to end after so many seconds. If it hangs, the process ends.
        """

        def together(found: Found) -> None:
            begun, failure = time.monotonic(), None
            until = min(begun + seconds, BEGUN + LIMIT)
            longest = max(until - begun, 0) + PATIENCE.total_seconds()
            faulthandler.dump_traceback_later(longest, exit=True)
            tidy()
            try:
                if self.saying(begun > BEGUN + LIMIT):
                    raise TimeoutError("Out of time before it began.")
                body(report, found, lambda: not self.saying(time.monotonic() > until))
                wait()  # whoever fails leaves nothing open that others wait for
            except Exception as error:
                failure = error
                print(f"rank {dist.get_rank()}:", traceback.format_exc(), file=sys.stderr)
            failed = self.saying(failure is not None)
            faulthandler.cancel_dump_traceback_later()
            if failure is not None:
                raise failure
            if failed:
                raise RuntimeError(f"It failed on ranks {failed}; their own output says why.")

        return together


def limited(items: Sequence[Any], found: Found, more: More) -> Iterator[Any]:
    """The items for which there is time; `found` says if that is not all."""
    for place, item in enumerate(items):
        if not more():
            found["not_run"] = f"out of time: {len(items) - place} of {len(items)}"
            return
        yield item
