"""The device that is measured: what it is, work timed on it, launched or captured."""

from __future__ import annotations

import functools
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib import metadata
from typing import Any

from lib import DRY

import torch
from torch import Tensor

from helix_gpu.graphs import Replay

DEVICE = torch.device("cpu" if DRY else "cuda")
TYPE = torch.float16 if DRY else torch.bfloat16
"""What is timed. The interpreter does not round to bfloat16, it cuts."""


def random(*shape: int, dtype: torch.dtype = TYPE) -> Tensor:
    """Normal values; drawn anew at every call."""
    return torch.randn(shape, dtype=torch.float32, device=DEVICE).to(dtype)


def again(work: Callable[[], None]) -> Replay:
    """What stands in for a CUDA graph where there is none: doing it again."""
    work()
    return work


def captured(run: Callable[[], Any]) -> Callable[[], Any]:
    """`run` as the replay of a CUDA graph, after a warm-up that compiles what it launches."""
    if DRY:
        return run
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()

    def replay(kept: object = run) -> None:
        # A graph holds addresses alone: what `run` refers to must live as long as it does.
        graph.replay()

    return replay


def wait() -> None:
    """Until the device has nothing left to do."""
    if not DRY:
        torch.cuda.synchronize()


def strict(on: bool) -> None:
    """Whether PyTorch raises where the host would wait for the device."""
    if not DRY:
        torch.cuda.set_sync_debug_mode("error" if on else "default")


@functools.cache
def flush() -> Callable[[], Any]:
    """Empties the L2 cache by *reading*: written lines would go to memory during the timing."""
    other = torch.zeros(1 if DRY else 2**26, dtype=torch.int32, device=DEVICE)
    return lambda: other.max()


def timed(candidates: dict[str, Callable[[], Any]], rounds: int) -> dict[str, dict[str, float]]:
    """Microseconds of each candidate, taken in turn with a cold L2: median and spread.

    `spread` is the distance from the 10th to the 90th percentile, as a share of the median.
    """
    rounds = 2 if DRY else rounds
    taken: dict[str, list[Any]] = {name: [] for name in candidates}
    for _ in range(rounds + 1):
        for name, run in candidates.items():
            if DRY:
                begun = time.perf_counter()
                run()
                taken[name].append((time.perf_counter() - begun) * 1e6)
                continue
            # The host is ahead of the device by the flush, so the launch is not in the time.
            flush()()
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            run()
            end.record()
            taken[name].append((begin, end))
    if not DRY:
        torch.cuda.synchronize()
    found = {}
    for name, times in taken.items():
        us = sorted(t if DRY else t[0].elapsed_time(t[1]) * 1e3 for t in times[1:])
        low, high = us[len(us) // 10], us[(len(us) - 1) * 9 // 10]
        median = statistics.median(us)
        found[name] = {"us": median, "spread": (high - low) / median}
    return found


def device_time(run: Replay, times: int = 3 if DRY else 200) -> float:
    """Median microseconds of a run, from its start on the device to its end."""
    return statistics.median(once(run) for _ in range(times))


def once(run: Callable[[], object]) -> float:
    """Microseconds of one run on the device; those of the host in a dry run."""
    if DRY:
        begun = time.perf_counter()
        run()
        return (time.perf_counter() - begun) * 1e6
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    run()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3


def machine(commit: str) -> dict[str, Any]:
    """What the figures were taken on."""
    facts: dict[str, Any] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "triton": metadata.version("triton"),
        "commit": commit or output_of("git", "rev-parse", "--short", "HEAD"),
    }
    if not DRY:
        properties = torch.cuda.get_device_properties(0)
        facts |= {
            "gpu": properties.name,
            "multiprocessors": properties.multi_processor_count,
            "l2_mib": getattr(properties, "L2_cache_size", 0) / 2**20,
            "cuda": torch.version.cuda,
            "driver": output_of(
                "nvidia-smi", "--id=0", "--query-gpu=driver_version", "--format=csv,noheader"
            ),
        }
    return facts


def output_of(*command: str) -> str:
    """What a command prints, or nothing where it cannot run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
