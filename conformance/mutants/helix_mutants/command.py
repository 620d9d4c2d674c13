"""`helix-conformance zoo`: the suite against every mutant."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from helix_conformance.report.command import OUTPUT, exit_statuses

_STATUSES = {
    0: "every mutant was killed by name, and no unmutated engine was named",
    1: "one was not, or an unmutated engine was named",
    2: "bad usage",
}


@click.command("zoo", epilog=exit_statuses(_STATUSES))
@click.option(
    "--tier",
    type=click.Choice(["sample", "one-process", "corners", "pool", "all"]),
    default="all",
    show_default=True,
    help="One mutant for each invariant, mutants that show in one process soon, those that show "
    "there in corners only, those that need a pool of gloo workers, or all.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random traces.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Ten seeds instead of one: how often each mutant is killed, and the worst seed.",
)
@click.option(
    "--json",
    "json_path",
    type=OUTPUT,
    help="Write the mutants, the controls and the score as one JSON object.",
)
@click.option(
    "--stream",
    "stream_path",
    type=OUTPUT,
    help="Append the result to a run's JSON stream, for `helix-conformance report`.",
)
def command(
    tier: str, seed: int, sweep: bool, json_path: Path | None, stream_path: Path | None
) -> None:
    """Measure the suite: engines that are wrong on purpose, each of which it must catch.

    Each mutant has one defect that an engine really had, or one of our own making. It counts as
    killed when the run fails and names one of the mutant's expected invariants. Unmutated engines
    run beside them and must pass.
    """
    from helix_mutants import run  # imports torch, which `--help` need not wait for

    sys.exit(run.sweep(tier) if sweep else run.score(json_path, tier, seed, stream_path))
