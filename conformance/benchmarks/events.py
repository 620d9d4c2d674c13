"""Events a second that the suite plays and judges; printed, not asserted.

`python conformance/benchmarks/events.py [--json FILE]`. Tier by tier, each several times:

- bookkeeping: one process, cp_size 4, 64 live requests, 8 of them in each decode; the requests
  that an event names are compared after it, everything every 100 events and at the end;
- attention, 4 threads of one process, and 4 gloo ranks: every output and all state compared after
  every event. Gloo ranks are told events ahead of their answers.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import statistics
import time
from collections.abc import Iterator
from pathlib import Path

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import PoolDriver
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines.gpu import GpuEngine, LedgerEngine
from helix_conformance.judge.play import check_trace
from helix_spec.config import Config, ModelShape
from helix_spec.events import Admit, Decode, Event, Release
from helix_spec.trace import Trace, Watch


def rolling(live: int, batch: int, events: int) -> Iterator[Event]:
    """Decodes over `live` requests in turn; every tenth event one ends and another begins."""
    for id in range(live):
        yield Admit(id, 100 + 37 * id % 400)
    ids = list(range(live))
    for number in range(events - live):
        if number % 20 == 9:
            yield Release(ids.pop(0))
        elif number % 20 == 19:
            ids.append(live + number)
            yield Admit(live + number, 100 + 37 * number % 400)
        else:
            first = number * batch % len(ids)
            yield Decode((ids + ids)[first : first + batch], [1] * batch)


def events_per_second(driver: Driver, trace: Trace, watch: Watch, repeats: int) -> list[float]:
    """Speed of each repeat, trace generation left out."""
    speeds = []
    for _ in range(repeats):
        began = time.perf_counter()
        failure = check_trace(driver, trace, driver.profiles, watch=watch)
        assert failure is None, failure
        speeds.append(len(trace.events) / (time.perf_counter() - began))
    return speeds


def main() -> None:
    """Run all and print their medians and spread."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    gc.freeze()  # as the command line does
    bookkeeping = Trace(
        config=Config(layout="pr9757/1:C=4,T=16", pages=[4000] * 4, max_len=100_000),
        events=list(rolling(64, 8, 5000)),
    )
    attention = Trace(
        config=Config(
            layout="pr9757/1:C=4,T=4",
            pages=[200] * 4,
            max_len=1000,
            model=ModelShape(q_heads=8, kv_heads=2, head_dim=32),
        ),
        events=[
            *(Admit(id, 20 + 7 * id) for id in range(4)),
            *([Decode([0, 1, 2, 3], [1] * 4)] * 96),
        ],
    )
    settings: list[tuple[str, int | None, Driver, Trace, Watch]] = [
        ("bookkeeping, 1 process, C=4, batch 8 of 64", 5000, LocalDriver(LedgerEngine),
         bookkeeping, Watch(every=100, touched=True)),
        ("attention, 4 threads, batch 4", None, ThreadDriver(GpuEngine), attention, Watch()),
        ("attention, 4 gloo ranks, batch 4", 100, PoolDriver("gpu", 4), attention, Watch()),
    ]  # fmt: skip
    results = []
    for name, goal, driver, trace, watch in settings:
        try:
            results.append((name, goal, events_per_second(driver, trace, watch, 5)))
        finally:
            driver.close()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}")
    print(f"{'setting':45} {'events/s':>10} {'least':>8} {'most':>8} {'/ goal':>8}")
    for name, goal, runs in results:
        median = statistics.median(runs)
        of_goal = f"{median / goal:8.2f}" if goal else f"{'-':>8}"
        print(f"{name:45} {median:10,.0f} {min(runs):8,.0f} {max(runs):8,.0f} {of_goal}")
    if options.json:
        rows = [{"setting": n, "goal": g, "events_per_s": r} for n, g, r in results]
        options.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
