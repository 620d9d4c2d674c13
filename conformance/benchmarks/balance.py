"""The load-balance claim of TensorRT-LLM pull request 9757, by closed forms, ledger and traces.

`python conformance/benchmarks/balance.py [--workload FILE]... [--json FILE] [--plots FOLDER]`.

Before the pull request every decoded token went to the last rank. With x = decoded / prompt tokens
that rank then holds (1 + C*x) / (1 + x) times the mean, and its pool is full after a C-th of the
decode tokens. Both are replayed through the implementation's ledger, for each named layout, and so
are the request lengths of production traces.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from helix_conformance.generate.workload import Request, read_workload
from helix_gpu.bookkeeping.ledger import Ledger
from helix_gpu.bookkeeping.refusals import Refused
from helix_planner.plans import HARDWARE, MODELS, Load, plan
from helix_spec.layouts import Layout, named_layout
from helix_spec.placement import local_len, pages_needed

LAYOUTS = ("before_9757", "pr9757", "pr17866", "vllm_dcp", "balanced")
C, T = 8, 64
PROMPT = 128 * C * T
"""A prompt that falls evenly on the ranks under every rule."""
POOL = 20_000
"""Pages of each rank when a workload is admitted until it is refused."""
BATCH = 128
"""Requests that are live together when the spread of a workload's tokens is taken."""


def layout_of(name: str) -> Layout:
    """The named layout of this benchmark's sizes."""
    return named_layout(name, cp_size=C, tokens_per_block=T)


def last_rank_over_mean(x: float) -> float:
    """The closed form of the claim."""
    return (1 + C * x) / (1 + x)


def skew(name: str, fractions: Sequence[float]) -> list[float]:
    """Tokens on the fullest rank over the mean, in the ledger, at each decoded / prompt tokens."""
    ledger = Ledger(layout_of(name), [10**9] * C, 10**9)
    ledger.admit(ledger.plan_admit(0, PROMPT))
    seen, decoded = [], 0
    for x in fractions:
        more = round(x * PROMPT) - decoded
        if more:
            ledger.advance(ledger.plan_step([0], [more]))
        decoded += more
        lengths = ledger.local_lens([0])[0]
        seen.append(float(lengths.max() / lengths.mean()))
    return seen


def decode_tokens_until_full(name: str, spare_pages: int) -> int:
    """Tokens that one request decodes until a rank refuses, with these pages beside its own."""
    ledger = Ledger(layout_of(name), [PROMPT // (C * T) + spare_pages] * C, 10**9)
    ledger.admit(ledger.plan_admit(0, PROMPT))
    decoded = 0
    try:
        while True:
            ledger.advance(ledger.plan_step([0], [1]))
            decoded += 1
    except Refused:
        return decoded


def shares(name: str, requests: Sequence[Request], of: Any) -> Iterator[list[int]]:
    """For each request, what `of` counts on every rank when it has all its tokens."""
    rules = layout_of(name)
    for number, request in enumerate(requests):
        shift = number % C if rules.start == "rotated" else 0
        yield [of(rules, request.prompt_len, request.output_len, rank, shift) for rank in range(C)]


def filled_at_first_refusal(name: str, requests: Sequence[Request]) -> float:
    """Part of all slots that hold tokens when the first request does not fit any more.

    A trace shorter than that is played again from its beginning.
    """
    used, tokens = [0] * C, 0
    pages = list(shares(name, requests, pages_needed))
    for number in range(10**6):
        wanted = pages[number % len(pages)]
        if any(u + w > POOL for u, w in zip(used, wanted, strict=True)):
            break
        used = [u + w for u, w in zip(used, wanted, strict=True)]
        request = requests[number % len(requests)]
        tokens += request.prompt_len + request.output_len
    return tokens / (C * POOL * T)


def spreads(name: str, requests: Sequence[Request]) -> list[float]:
    """Tokens on the fullest rank over the mean, for each BATCH requests that arrive together."""
    held = list(shares(name, requests, local_len))
    batches = (held[first : first + BATCH] for first in range(0, len(held) - BATCH + 1, BATCH))
    totals = ([sum(column) for column in zip(*batch, strict=True)] for batch in batches)
    return [max(total) * C / sum(total) for total in totals]


def step_seconds(name: str, x: float) -> tuple[float, float]:
    """Modelled step of the slowest rank, and what of it does not depend on the cache."""
    decoded = round(x * PROMPT)
    load = Load(batch=64, prompt_len=PROMPT, decoded=decoded)
    one = plan(MODELS["llama-405b"], HARDWARE["gb200"], layout_of(name), load, tp=8)
    return one.step, one.step - one.kv


def measure(workloads: Sequence[Path]) -> dict[str, Any]:
    """All figures, by name."""
    fractions = [0.0, 0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0]
    figures: dict[str, Any] = {
        "cp_size": C,
        "tokens_per_block": T,
        "x": fractions,
        "closed_form": [last_rank_over_mean(x) for x in fractions],
        "skew": {name: skew(name, fractions) for name in LAYOUTS},
        "until_full": {name: decode_tokens_until_full(name, 16) for name in LAYOUTS},
        "step": {name: [step_seconds(name, x) for x in fractions] for name in LAYOUTS},
        "workloads": {},
    }
    for path in workloads:
        requests = read_workload(path)
        figures["workloads"][path.stem] = {
            name: {
                "filled": filled_at_first_refusal(name, requests),
                "spread": statistics.median(spread := spreads(name, requests)),
                "worst_spread": max(spread),
            }
            for name in LAYOUTS
        }
    return figures


def print_tables(console: Console, figures: dict[str, Any]) -> None:
    """The figures as tables."""
    by_x = [f"x = {x}" for x in figures["x"]]
    table = Table(
        "tokens on the fullest rank / mean", *by_x, title=f"C={C}, T={T}, prompt {PROMPT}"
    )
    table.add_row("(1+C*x)/(1+x)", *(f"{value:.3f}" for value in figures["closed_form"]))
    for name, row in figures["skew"].items():
        table.add_row(name, *(f"{value:.3f}" for value in row))
    console.print(table)

    table = Table("modelled step of the slowest rank, ms", *by_x)
    for name, steps in figures["step"].items():
        table.add_row(name, *(f"{step * 1e3:.3f}" for step, _ in steps))
    console.print(table)

    base = figures["until_full"]["before_9757"]
    table = Table("layout", "decode tokens until full", "over before_9757")
    for name, tokens in figures["until_full"].items():
        table.add_row(name, f"{tokens:,}", f"{tokens / base:g}")
    console.print(table)

    for workload, rows in figures["workloads"].items():
        table = Table(
            "layout", "slots filled at the first refusal", f"fullest / mean of {BATCH}", "worst",
            title=workload,
        )  # fmt: skip
        for name, row in rows.items():
            table.add_row(
                name, f"{row['filled']:.2%}", f"{row['spread']:.4f}", f"{row['worst_spread']:.4f}"
            )
        console.print(table)


def draw(figures: dict[str, Any], folder: Path) -> None:
    """One picture for each claim."""
    import matplotlib

    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "helix", "figure.figsize": (6, 3.6)}
    )
    folder.mkdir(parents=True, exist_ok=True)

    def save(name: str) -> None:
        plt.tight_layout()
        plt.savefig(folder / f"{name}.svg", metadata={"Date": None})
        plt.close()

    marks = dict(zip(LAYOUTS, "xo^sd", strict=True))
    plt.plot(figures["x"], figures["closed_form"], "k--", label="(1 + C x) / (1 + x)")
    for name, row in figures["skew"].items():
        plt.plot(figures["x"], row, marks[name], label=name, fillstyle="none")
    plt.xlabel("x = decoded / prompt tokens")
    plt.ylabel("fullest rank / mean")
    plt.title(f"Tokens per rank in the ledger, C = {C}")
    plt.legend()
    save("skew")

    for name, steps in figures["step"].items():
        plt.plot(figures["x"], [step * 1e3 for step, _ in steps], marks[name] + "-", label=name,
                 fillstyle="none")  # fmt: skip
    plt.xlabel("x = decoded / prompt tokens")
    plt.ylabel("modelled step, ms")
    plt.title("Slowest rank: 64 requests, Llama-405B sizes, tp 8 x cp 8")
    plt.legend()
    save("step")

    plt.barh(LAYOUTS[::-1], [figures["until_full"][name] for name in LAYOUTS[::-1]])
    plt.xlabel("tokens decoded until a rank has no page")
    plt.title(f"Equal pools, C = {C}")
    save("until_full")

    if figures["workloads"]:
        for number, (workload, rows) in enumerate(figures["workloads"].items()):
            places = [i + 0.4 * number for i in range(len(LAYOUTS))]
            plt.barh(places, [100 * rows[name]["filled"] for name in LAYOUTS], 0.38, label=workload)
        plt.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False)
        plt.yticks([i + 0.2 for i in range(len(LAYOUTS))], LAYOUTS)
        plt.xlim(50, 100)
        plt.xlabel("% of all slots filled when the first request is refused")
        save("workloads")


def main() -> None:
    """Measure, print, and write what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--workload", type=Path, action="append", default=[])
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    parser.add_argument("--plots", type=Path, help="draw the claims into this folder, as SVG")
    options = parser.parse_args()
    figures = measure(options.workload)
    print_tables(Console(width=120), figures)
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))
    if options.plots:
        draw(figures, options.plots)


if __name__ == "__main__":
    main()
