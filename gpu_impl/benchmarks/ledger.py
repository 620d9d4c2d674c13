"""Time of one ledger step, by batch and by tokens cached.

Run as `PYTHONPATH=spec:gpu_impl python gpu_impl/benchmarks/ledger.py [--json FILE]`.
"""

from __future__ import annotations

import argparse
import platform
import statistics
from pathlib import Path

from lib.report import write_json
from lib.timing import in_turn

import numpy as np

from helix_gpu.bookkeeping.ledger import Ledger
from helix_spec.layouts import named_layout

CP_SIZE, TOKENS_PER_BLOCK, REPEATS = 8, 32, 500
CONTEXTS = (1_000, 1_000_000, 10_000_000)
BATCHES = (1, 8, 64, 1_000)


def step_times(layout: str, batch: int, context: int, query_len: int) -> list[float]:
    """Microseconds of each of REPEATS steps (plan and advance) of `batch` requests."""
    rules = named_layout(layout, cp_size=CP_SIZE, tokens_per_block=TOKENS_PER_BLOCK)
    ledger = Ledger(rules, [2**31 - 1] * CP_SIZE, 2**31 - 1)
    for id in range(batch):
        # Unequal lengths, so that pages open and turns end in different steps.
        ledger.admit(ledger.plan_admit(id, context + id))
    ids, query_lens = list(range(batch)), [query_len] * batch

    def step() -> None:
        ledger.advance(ledger.plan_step(ids, query_lens))

    return [1e6 * seconds for seconds in in_turn({"step": step}, REPEATS)["step"]]


def main() -> None:
    """Print a table, and write it to a file with --json."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--layout", default="pr9757", help="a named layout (pr9757)")
    parser.add_argument("--query-len", type=int, default=1, help="tokens a request and step (1)")
    arguments = parser.parse_args()

    print(f"{arguments.layout}, C={CP_SIZE}, T={TOKENS_PER_BLOCK}, {REPEATS} steps each, µs a step")
    print(f"of {arguments.query_len} tokens a request")
    print(f"{'requests':>8} {'context':>10} {'median':>8} {'5 %':>8} {'95 %':>8}")
    figures = []
    for batch in BATCHES:
        for context in CONTEXTS:
            times = step_times(arguments.layout, batch, context, arguments.query_len)
            low, high = np.quantile(times, [0.05, 0.95]).tolist()
            median = statistics.median(times)
            print(f"{batch:>8} {context:>10} {median:>8.1f} {low:>8.1f} {high:>8.1f}")
            figures.append(
                {"requests": batch, "context": context, "median_us": median,
                 "p5_us": low, "p95_us": high}
            )  # fmt: skip
    setting = {"layout": arguments.layout, "query_len": arguments.query_len}
    setting |= {"cp_size": CP_SIZE, "repeats": REPEATS}
    machine = {"python": platform.python_version(), "numpy": np.__version__}
    document = {"setting": setting | machine, "figures": figures}
    write_json(arguments.json, document)


if __name__ == "__main__":
    main()
