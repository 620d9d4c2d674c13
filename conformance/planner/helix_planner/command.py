"""`helix-conformance plan`: every tp x cp split of some ranks, as a table and as JSON."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import click
import msgspec
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from helix_conformance.report.command import OUTPUT, BadInput, OneOf, exit_statuses
from helix_conformance.report.text import stdout
from helix_planner.plans import (
    HARDWARE,
    MODELS,
    Hardware,
    Load,
    ModelCard,
    PlanError,
    Split,
    best,
    plan,
    read_card,
    splits,
)
from helix_spec.layouts import LAYOUT_NAMES, named_layout

COLUMNS: Final = (
    "tp x cp", "weights GB", "KV GB", "pages", "weights ms", "KV ms", "exchange ms", "merge ms",
    "reduce ms", "step ms", "largest batch", "largest context", "",
)  # fmt: skip
"""What is shown of each split: sizes and times of its fullest rank."""
WIDTH: Final = 150
"""Characters that all columns take; a narrower terminal wraps lines rather than numbers."""


_STATUSES: Final = {0: "the plans were printed", 2: "bad usage, or nothing fits"}


@click.command("plan", epilog=exit_statuses(_STATUSES))
@click.option("--model", default="llama-405b", show_default=True, metavar="NAME|FILE.json",
              help="llama-405b, deepseek-r1, or a file with the fields of ModelCard.")  # fmt: skip
@click.option("--hardware", default="gb200", show_default=True, metavar="NAME|FILE.json",
              help="h200, gb200, or a file with the fields of Hardware.")  # fmt: skip
@click.option("--ranks", default=32, show_default=True, type=click.IntRange(1, 1024),
              help="GPUs in all; every legal tp x cp split of them is shown.")  # fmt: skip
@click.option("--context", default=1_000_000, show_default=True, type=click.IntRange(1, 2**40),
              help="Tokens of each request, decoded ones included.")  # fmt: skip
@click.option("--decoded", default=0, show_default=True, type=click.IntRange(0),
              help="How many of them were decoded: the owner rule places these.")  # fmt: skip
@click.option("--batch", default=8, show_default=True, type=click.IntRange(1, 10**6),
              help="Requests decoded together.")  # fmt: skip
@click.option("--layout", "name", default="pr9757", show_default=True,
              type=OneOf(LAYOUT_NAMES))  # fmt: skip
@click.option("--tokens-per-block", default=64, show_default=True, type=click.IntRange(1))
@click.option("--weight-bytes", default=1.0, show_default=True, help="Bytes of one weight.")
@click.option("--kv-bytes", default=1.0, show_default=True, help="Bytes of one cached number.")
@click.option("--json", "json_path", type=OUTPUT,
              help="Write the plans as one JSON object.")  # fmt: skip
def command(**options: Any) -> None:
    """Print bytes, pages and step time of a sharded cache, on paper.

    For every tp x cp split of the ranks: what the fullest rank stores and reads, the time of one
    decode step term by term, and the largest batch and context before memory runs out. The times
    are the roofline of appendix A of the Helix paper; measured constants can be given as a file.
    """
    try:
        show(stdout(), options)
    except PlanError as error:
        raise BadInput(str(error)) from error


def show(console: Console, options: dict[str, Any]) -> None:
    """Print the plans that the command line asks for. Raises PlanError."""
    model = read_card(ModelCard, options["model"], MODELS)
    hardware = read_card(Hardware, options["hardware"], HARDWARE)
    if options["decoded"] >= options["context"]:
        raise PlanError(
            f"{options['decoded']} tokens decoded of a context of {options['context']}; a request "
            "has at least one token of prompt."
        )
    load = Load(
        batch=options["batch"],
        prompt_len=options["context"] - options["decoded"],
        decoded=options["decoded"],
        weight_bytes=options["weight_bytes"],
        kv_bytes=options["kv_bytes"],
    )
    t = options["tokens_per_block"]
    plans = [
        plan(
            model, hardware, named_layout(options["name"], cp_size=cp, tokens_per_block=t), load, tp
        )
        for tp, cp in splits(model, options["ranks"])
    ]
    wide = Console(file=console.file, width=max(console.width, WIDTH))
    wide.print(_table(plans, options))
    if options["json_path"] is not None:
        shown = {name: value for name, value in options.items() if name != "json_path"}
        chosen = best(plans)
        document = {"settings": shown, "plans": plans, "best": chosen and [chosen.tp, chosen.cp]}
        options["json_path"].write_bytes(msgspec.json.encode(document))


def _table(plans: list[Split], options: dict[str, Any]) -> Table:
    title = (
        f"{options['model']} on {options['ranks']} ranks ({options['hardware']}), "
        f"{options['batch']} requests of {options['context']:,} tokens, {options['decoded']:,} of "
        f"them decoded, {options['name']}; * is the fastest that fits"
    )
    table = Table(title=title, title_justify="left", box=SIMPLE)
    for heading in COLUMNS:
        table.add_column(heading, justify="right")
    for row in _rows(plans):
        table.add_row(*row)
    return table


def _rows(plans: list[Split]) -> Iterator[tuple[str, ...]]:
    """The plans as columns of text, the best marked."""
    chosen = best(plans)
    for one in plans:
        terms = [one.weights, one.kv, one.exchange, one.merge, one.reduce + one.overhead, one.step]
        yield (
            f"{one.tp} x {one.cp}" + (" *" if one is chosen else ""),
            f"{one.weight_bytes / 1e9:,.1f}",
            f"{one.kv_bytes / 1e9:,.1f}",
            f"{one.pages:,}",
            *(f"{term * 1e3:,.3f}" for term in terms),
            f"{one.largest_batch:,}",
            f"{one.largest_context:,}",
            "" if one.fits else "does not fit",
        )
