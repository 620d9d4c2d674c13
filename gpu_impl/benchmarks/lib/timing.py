"""Work in turn, timed on the host."""

from __future__ import annotations

import time
from collections.abc import Callable


def in_turn(
    runs: dict[str, Callable[[], object]], rounds: int, warm_up: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of each run on the host, `rounds` times in turn after those to warm up."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(-warm_up, rounds):
        for name, run in runs.items():
            begun = time.perf_counter()
            run()
            if turn >= 0:
                times[name].append(time.perf_counter() - begun)
    return times
