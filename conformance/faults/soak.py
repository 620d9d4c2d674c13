"""Long runs: `make soak`. Every answer is judged, and memory must stay flat.

200,000 events of mixed kinds on the bookkeeping of 8 ranks in this process, as one run that never
starts anew; then 5,000 on the whole engine in 4 gloo processes, as traces of 1,000. Resident memory
is printed as it goes. The command fails when an answer is wrong, or when memory has grown by more
than the bound between the first fifth, when caches are warm, and the end.
"""

from __future__ import annotations

import gc
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Final

import click
import numpy as np

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import PoolDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.actions import Scope
from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.soak import PROMPT_LENS, long_events, mixed
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.judge import Judge
from helix_conformance.judge.play import check_trace
from helix_conformance.report.text import failure_text
from helix_spec.config import Config, ModelShape
from helix_spec.events import FEATURES
from helix_spec.trace import Trace, Watch
from suite_testing.sabotage import worker

MIB: Final = 2**20
GROWTH_MIB: Final = 16.0
"""What a process may grow by after its first fifth: less than 0.1 KiB an event."""
SCOPE: Final = Scope(frozenset(FEATURES), prompt_lens=PROMPT_LENS)


def resident(pid: int | str = "self") -> float:
    """MiB that a process holds in memory."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * 4096 / MIB


def flat(name: str, samples: list[tuple[int, float]]) -> bool:
    """Print the slope of memory over events after the first fifth; whether it is flat."""
    warm = [sample for sample in samples if sample[0] >= samples[-1][0] / 5]
    events, memory = np.array(warm).T
    slope = np.polyfit(events, memory, 1)[0] * 1024
    growth = memory[-1] - memory[0]
    verdict = "flat" if growth <= GROWTH_MIB else "GROWS"
    print(f"{name}: {slope:+.4f} KiB an event, {growth:+.1f} MiB since the first fifth "
          f"(bound {GROWTH_MIB:g} MiB): {verdict}", flush=True)  # fmt: skip
    return bool(growth <= GROWTH_MIB)


def in_one_process(layout: str, events: int, seed: int) -> bool:
    """The bookkeeping of 8 ranks through one long life; whether it was right, memory flat."""
    config = Config(
        layout=layout,
        pages=[80, 60, 80, 70, 80, 80, 50, 80],
        max_len=400,
        model=ModelShape(q_heads=16, kv_heads=2),
        overlap=True,
    )
    driver = LocalDriver(LedgerEngine)
    judge = Judge(config, driver.profiles)
    recorder = Recorder(config, driver.profiles)
    source = mixed(recorder, Seeded(f"{seed}"), SCOPE, events)
    played = driver.play(config, driver.profiles, source, Watch(every=20))
    kinds: Counter[str] = Counter()
    samples = list[tuple[int, float]]()
    began = time.perf_counter()
    found = judge.started(next(played)[1])
    for done, (event, answers) in enumerate(played, start=1):
        expected = None if event is None else recorder.next(event)
        found = judge.finished(answers) if expected is None else judge.event(expected, answers)
        if found:
            print(f"event {done - 1}, {event}: {found}")
            return False
        if expected is None:
            break
        kinds[f"{type(event).__name__.lower()}{' refused' if expected.refused else ''}"] += 1
        if done % (events // 20) == 0:
            gc.collect()
            samples.append((done, resident()))
            rate = done / (time.perf_counter() - began)
            print(f"{done:>7} events, {rate:.0f} a second, {samples[-1][1]:.1f} MiB", flush=True)
    print(", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())))
    return flat(f"{layout}, {events} events in one process", samples)


def on_gloo(events: int, seed: int) -> bool:
    """The whole engine on 4 processes; whether it was right, and every process's memory flat."""
    driver, good = PoolDriver("gpu", 4, deadline_s=120), True
    processes = [worker(rank) for rank in range(4)]
    samples: dict[str, list[tuple[int, float]]] = {f"rank {rank}": [] for rank in range(4)}
    each = events // 10
    try:
        for number in range(10):
            layout = ("pr9757/1:C=4,T=4", "vllm_dcp/1:C=4,T=4,I=2")[number % 2]
            config = Config(
                layout=layout, pages=[90] * 4, max_len=300, overlap=number % 2 == 0,
                model=ModelShape(q_heads=8, kv_heads=2, layers=2), seed=number,
            )  # fmt: skip
            recorder = Recorder(config)
            trace = Trace(
                config=config,
                events=[*long_events(recorder, Seeded(f"{seed + number}"), SCOPE, each)],
            )
            failure = check_trace(
                driver, trace, driver.profiles, watch=Watch(every=50, touched=False), tally=Tally()
            )
            if failure is not None:
                print("\n".join(failure_text(failure)))
                return False
            for rank, pid in enumerate(processes):
                samples[f"rank {rank}"].append(((number + 1) * each, resident(pid)))
            memory = ", ".join(f"{held[-1][1]:.1f}" for held in samples.values())
            print(f"{(number + 1) * each:>7} events on 4 ranks, {memory} MiB", flush=True)
        for name, held in samples.items():
            good = flat(f"{name}, {events} events on gloo", held) and good
    finally:
        driver.close()
    return good


@click.command()
@click.option("--events", default=200_000, show_default=True, help="In one process.")
@click.option("--gloo-events", default=5_000, show_default=True, help="On 4 gloo ranks.")
@click.option("--layout", default="pr9757/1:C=8,T=4", show_default=True, help="In one process.")
@click.option("--seed", default=0, show_default=True)
def main(events: int, gloo_events: int, layout: str, seed: int) -> None:
    """Play for long, and print memory as it goes."""
    good = in_one_process(layout, events, seed) if events else True
    good = (on_gloo(gloo_events, seed) if gloo_events else True) and good
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
