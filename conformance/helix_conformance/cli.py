"""The command line `helix-conformance`."""

from __future__ import annotations

import gc
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import click
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from helix_conformance import session
from helix_conformance.drive.driver import Driver, EngineFailure
from helix_conformance.drive.launching import LAUNCHED, leave_verdict, take_part
from helix_conformance.drive.opening import DRIVERS, default_driver, open_driver
from helix_conformance.engines import EngineSpecError
from helix_conformance.generate.configs import LAYOUT_NAMES
from helix_conformance.generate.workload import WorkloadError, read_workload, scaled
from helix_conformance.judge.coverage import Coverage, at_hand
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.xfail import Known, LedgerError
from helix_conformance.report.command import report, write_file
from helix_conformance.report.show import trace_text
from helix_conformance.report.stream import Row
from helix_conformance.report.text import (
    Stream,
    make_row,
    print_coverage,
    print_failure,
    print_table,
    restrictions,
    save_failure,
)
from helix_conformance.session import Tally
from helix_spec.config import Config, ModelShape, config_problem
from helix_spec.engine import PROFILES
from helix_spec.layouts import LayoutError, layout_name, named_layout
from helix_spec.trace import TraceError, load_trace

EXIT_STATUS = {"pass": 0, "fail": 1, "error": 3}


class BadInput(click.ClickException):
    """Something the user gave cannot be used; nothing has run."""

    exit_code = 2


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def main() -> None:
    r"""Check an engine's sharded decode KV cache against the specification.

    An engine is told events (admit, decode, release, ...) on all its ranks. After each event
    everything observable is compared with a reference: which rank and slot holds which
    position, lengths, pages, cached rows, attention outputs. A failing run ends with the
    smallest trace that still fails.

    \b
    Examples:
      helix-conformance run
          this project's implementation: every layout, in one process and on 4 gloo workers
      helix-conformance run --engine my_package.adapter:Engine --layout pr9757 --cp 4
          an engine of yours, one layout
      helix-conformance run --engine stdio:./my_engine
          an engine of any language: a command that speaks PROTOCOL.md
      helix-conformance replay helix-failures/pr9757-local.json --engine reference
          a failing trace once more
      helix-conformance show helix-failures/pr9757-local.json
          where the tokens of a trace belong, rank by rank and page by page
      helix-conformance plan --model deepseek-r1 --ranks 32 --context 10000000
          what sharding would cost and gain, on paper

    Exit status: 0 all answers were right; 1 a difference was found; 2 bad usage, configuration
    or input file; 3 an engine died, hung or answered garbage. Under a torchrun of your own only
    0 or not 0 survives, and the last line of --json holds the verdict. An mpiexec of your own
    needs --continuous, or it ends the report together with a rank that dies.
    """


_engine = click.option(
    "--engine",
    default="gpu",
    show_default=True,
    help="An engine of this project (reference, gpu), the name that an installed package gives its "
    "own, module:Class, trtllm:CHECKOUT, or stdio:COMMAND for one of any language.",
)
_driver = click.option(
    "--driver",
    "driver_name",
    type=click.Choice(DRIVERS),
    help="Where the ranks live: in this process (local), each a child that speaks JSON lines "
    "(stdio), in worker processes over gloo (pool), or under torchrun or mpiexec (mpi), which is "
    "launched when it is not there. Default: what the engine needs; for gpu its bookkeeping in "
    "this process, and all of it in a pool.",
)
_profile = click.option(
    "--profile",
    "asked",
    multiple=True,
    type=click.Choice(PROFILES),
    help="Check this profile and those it builds on. Repeat for several. Default: all that the "
    "engine declares.",
)
_ranks = click.option(
    "--ranks",
    default=4,
    show_default=True,
    type=click.IntRange(1, 64),
    help="Processes of a pool, or of a torchrun or mpiexec that is launched.",
)
_backend = click.option(
    "--backend",
    type=click.Choice(["gloo", "nccl"]),
    default="gloo",
    show_default=True,
    help="What the ranks of a torchrun or mpiexec talk over.",
)
_deadline = click.option(
    "--deadline",
    default=30.0,
    show_default=True,
    type=click.FloatRange(0.1),
    help="Seconds after which a silent rank counts as hung.",
)
_json = click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the run as JSON lines; the last is the summary.",
)

_append = click.option(
    "--stream",
    "stream_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Append the result to a run's JSON stream, for `helix-conformance report`.",
)


@main.command()
@_engine
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    type=click.Choice(LAYOUT_NAMES),
    help="Layout to check; custom draws any other legal combination. Repeat for several. "
    "Default: all.",
)
@click.option(
    "--cp",
    "cp_sizes",
    multiple=True,
    type=click.IntRange(1, 64),
    help="cp_size to check. Repeat for several. Default: 1 2 3 4 8 in one process, and up to "
    "the number of ranks elsewhere.",
)
@_driver
@_profile
@click.option(
    "--examples",
    type=click.IntRange(1),
    help="Random traces for each layout. Default: 400 in one process, 40 elsewhere.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random traces.")
@_ranks
@_backend
@_deadline
@click.option(
    "--workload",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replay this request trace (Mooncake .jsonl or Azure .csv) instead of random traces.",
)
@click.option("--tokens-per-block", default=64, show_default=True, help="Workload: page size T.")
@click.option("--interleave", type=int, help="Workload: interleave I of vllm_dcp.")
@click.option("--tp", "tp_size", default=1, show_default=True, help="Workload: tp_size.")
@click.option("--pages", default=4096, show_default=True, help="Workload: pages of each rank.")
@click.option("--q-heads", type=int, help="Workload: query heads. Default: 8 or a bit more.")
@click.option("--kv-heads", default=2, show_default=True, help="Workload: KV heads.")
@click.option("--head-dim", default=32, show_default=True, help="Workload: head dim.")
@click.option("--limit", type=click.IntRange(1), help="Workload: only the first N requests.")
@click.option(
    "--scale",
    default=1,
    show_default=True,
    type=click.IntRange(1),
    help="Workload: divide all lengths by this, rounding up.",
)
@click.option("--max-steps", default=500, show_default=True, help="Workload: decode steps each.")
@click.option("--batch", default=128, show_default=True, help="Workload: requests at a time.")
@_json
@click.option(
    "--traces",
    "folder",
    default="helix-failures",
    show_default=True,
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for failing traces.",
)
@click.option(
    "--known",
    "known_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="The engine's ledger of known differences (TOML): they are named and do not fail the "
    "run; one that no longer shows does.",
)
def run(**options: Any) -> None:
    """Play random traces, or a workload, and judge every answer.

    Without options: this project's implementation, every layout, all its profiles. The table
    has a line for each layout and driver. After a failure come the smallest failing trace, each
    violated invariant with its sentence from SPEC.md, what was expected and what was observed.
    """
    known = _ledger(options)
    _take_part(options)
    tiers = _tiers(options["engine"], options["driver_name"], options["asked"])
    most = max(_default_examples(driver_name) for _, driver_name in tiers)
    left_out = restrictions(options, examples=most, layouts=len(LAYOUT_NAMES))
    stream = Stream(options["json_path"])
    stream.settings("run", restrictions=left_out, **options)
    play = _play_workload if options["workload"] else _play_random
    failures = []
    for engine, driver_name in tiers:
        failures += play(stream, engine, driver_name, options, known)
    console = Console()
    print_table(console, stream.rows)
    names = [" ".join(tier) for tier in tiers]
    print_coverage(console, names, stream.coverage, red=bool(failures))
    if left_out:
        words = f"This is a part of a run, not a whole one. {' '.join(left_out)}"
        console.print(words, markup=False, highlight=False, soft_wrap=True)
    for row, failure, path in failures:
        name = shlex.quote(row.engine)
        replay = f"helix-conformance replay {path} --engine {name} --driver {row.driver}"
        print_failure(console, failure, path, replay)
    for line in known.sentences():
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    _leave(stream.summary(options["engine"], known, options["seed"]))


@main.command()
@click.argument("trace_path", metavar="TRACE.json", type=click.Path(path_type=Path))
@_engine
@_driver
@_profile
@_ranks
@_backend
@_deadline
@_json
def replay(**options: Any) -> None:
    """Play one stored trace and judge every answer."""
    trace = _trace(options["trace_path"])
    _take_part(options)
    tiers = _tiers(options["engine"], options["driver_name"], options["asked"])
    stream, console = Stream(options["json_path"]), Console()
    alone = ["One stored trace was played; a whole run plays random traces of every layout."]
    stream.settings("replay", restrictions=alone, **options)
    failed: list[Failure] = []
    for engine, driver_name in tiers:
        tally = Tally()
        with _driver_of(stream, engine, driver_name, options) as driver:
            _check_world(driver, trace.config.world_size)
            profiles = session.profiles_to_check(driver.profiles, options["asked"])
            declared = driver.profiles
            failure = session.check_trace(driver, trace, profiles, tally=tally)
        row = make_row(
            str(trace.config.layout),
            engine,
            driver_name,
            [trace.config.layout.cp_size],
            profiles,
            declared,
            tally,
            failure,
            settings=driver.settings,
        )
        stream.row(row)
        if failure is not None:
            failed.append(failure)
            stream.failure(row, failure, options["trace_path"])
    print_table(console, stream.rows)
    for failure in failed:
        name = shlex.quote(options["engine"])
        again = f"helix-conformance replay {options['trace_path']} --engine {name}"
        print_failure(console, failure, options["trace_path"], again)
    _leave(stream.summary(options["engine"]))


main.add_command(report)


@main.command()
@click.argument("trace_path", metavar="TRACE.json", type=click.Path(path_type=Path))
@click.option(
    "--html",
    "html_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write a self-contained page instead, with a slider over the events.",
)
def show(trace_path: Path, html_path: Path | None) -> None:
    """Print where the tokens of a trace belong: each request, rank by rank, page by page."""
    trace = _trace(trace_path)
    if html_path is not None:
        from helix_conformance.report.html import show_page

        write_file(html_path, show_page(trace).encode())
        return
    for line in trace_text(trace):
        click.echo(line)


@main.group()
def vectors() -> None:
    """Test vectors: cases as JSON, for engines and test runners in any language."""


@vectors.command("export")
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
def vectors_export(folder: Path) -> None:
    """Write the vectors, their format page (FORMAT.md) and their JSON Schema into DIR."""
    from helix_conformance.expect.making import export
    from helix_conformance.expect.vectors import FORMAT_PAGE, VectorError

    try:
        count = len(export(folder))
    except (VectorError, OSError) as error:
        raise BadInput(str(error)) from error
    click.echo(f"wrote {count} files to {folder}; begin with {folder / FORMAT_PAGE}")


@vectors.command("check")
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@_engine
@click.option(
    "--layout",
    "layouts",
    multiple=True,
    type=click.Choice(LAYOUT_NAMES),
    help="Check the vectors of this layout. Repeat for several. Default: all.",
)
@_driver
@_profile
@_ranks
@_backend
@_deadline
@_json
def vectors_check(**options: Any) -> None:
    """Run the vectors of DIR, or those shipped with this package, against an engine.

    Only what the files say counts. Cases that need a profile which the engine does not declare,
    or which was not asked for, are named as not checked. Exit status as of `run`.
    """
    from helix_conformance import vectors_command as command
    from helix_conformance.expect.vectors import VectorError

    try:
        cases = command.read(options["folder"], options["layouts"])
    except VectorError as error:
        raise BadInput(str(error)) from error
    _take_part(options)
    stream = Stream(options["json_path"])
    stream.settings("vectors check", options["engine"], restrictions=command.ALONE)
    for engine, driver_name in _tiers(options["engine"], options["driver_name"], ()):
        with _driver_of(stream, engine, driver_name, options) as driver:
            profiles = session.profiles_to_check(driver.profiles, options["asked"])
            command.check(stream, driver, engine, cases, profiles)
    _leave(stream.summary(options["engine"]))


@main.command()
@click.option(
    "--tier",
    type=click.Choice(["one-process", "corners", "pool", "all"]),
    default="all",
    show_default=True,
    help="Mutants that show in one process soon, those that show there in corners only, those that "
    "need a pool of gloo workers, or all.",
)
@click.option("--seed", default=0, show_default=True, help="Seed of the random traces.")
@click.option(
    "--sweep",
    is_flag=True,
    help="Ten seeds instead of one: how often each mutant is killed, and the worst seed.",
)
@_json
@_append
def zoo(
    tier: str, seed: int, sweep: bool, json_path: Path | None, stream_path: Path | None
) -> None:
    """Measure the suite: engines that are wrong on purpose, each of which it must catch.

    Each mutant has one defect that an engine really had, or one of our own making. It counts as
    killed when the run fails and names an invariant of the mutant's row. Unmutated engines run
    beside them and must stay green.
    """
    from helix_conformance.zoo import run as zoo_run

    sys.exit(zoo_run.sweep(tier) if sweep else zoo_run.zoo(json_path, tier, seed, stream_path))


@main.command()
@click.option(
    "--theorem",
    "only",
    multiple=True,
    metavar="ID",
    help="Confirm this theorem alone. Repeat for several. Default: the whole manifest.",
)
@click.option("--jobs", default=2, show_default=True, type=click.IntRange(1), help="At a time.")
@click.option(
    "--json",
    "json_path",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Write the theorems, their verdicts, witnesses and kills as one JSON object.",
)
@_append
def prove(
    only: tuple[str, ...], jobs: int, json_path: Path | None, stream_path: Path | None
) -> None:
    """Confirm the theorems of the specification, for all sizes.

    Z3 proves the arithmetic over unbounded integers, CrossHair confirms contracts on the very
    functions that run. The exact manifest must be confirmed, every precondition has a witness,
    and every theorem refutes at least one wrong formula; whatever is missing is named, and the
    exit status is 1.
    """
    from helix_conformance import prove as proofs

    try:
        sys.exit(proofs.prove(json_path, stream_path=stream_path, only=only, jobs=jobs))
    except proofs.ProveError as error:
        raise BadInput(f"The proofs cannot run: {error}.") from error


@main.command()
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
              type=click.Choice(LAYOUT_NAMES))  # fmt: skip
@click.option("--tokens-per-block", default=64, show_default=True, type=click.IntRange(1))
@click.option("--weight-bytes", default=1.0, show_default=True, help="Bytes of one weight.")
@click.option("--kv-bytes", default=1.0, show_default=True, help="Bytes of one cached number.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path),
              help="Write the plans as one JSON object.")  # fmt: skip
def plan(**options: Any) -> None:
    """Bytes, pages and step time of a sharded cache, on paper.

    For every tp x cp split of the ranks: what the fullest rank stores and reads, the time of one
    decode step term by term, and the largest batch and context before memory runs out. The times
    are the roofline of appendix A of the Helix paper; measured constants can be given as a file.
    """
    from helix_conformance import planning

    try:
        planning.show(Console(), options)
    except planning.PlanError as error:
        raise BadInput(str(error)) from error


@main.command()
@click.option("--engine", required=True, help="A name, or module:Class; it needs no processes.")
def serve(engine: str) -> None:
    """Be one rank of a Python engine on stdin and stdout, in the words of PROTOCOL.md.

    For an engine that lives in another environment, container or machine than the suite:
    --engine "stdio:ssh host helix-conformance serve --engine my_package.adapter:Engine".
    """
    from helix_conformance.drive.serve import main as be_a_rank

    be_a_rank(engine)


def _trace(path: Path) -> Any:
    try:
        return load_trace(path)
    except TraceError as error:
        raise BadInput(str(error)) from error


def _tiers(engine: str, driver_name: str | None, asked: Sequence[str]) -> list[tuple[str, str]]:
    """Which engine runs on which driver: the whole of one, or for `gpu` each where it can."""
    if engine != "gpu":
        try:
            return [(engine, driver_name or default_driver(engine))]
        except EngineSpecError as error:
            raise BadInput(str(error)) from error
    bookkeeping, whole = ("gpu-ledger", "local"), ("gpu", driver_name or "pool")
    if driver_name == "local":
        return [bookkeeping]
    if driver_name is not None:
        return [whole]
    deep = {"cache", "attention"}
    if asked and not deep.intersection(asked):
        return [bookkeeping]
    return [whole] if asked else [bookkeeping, whole]


@contextmanager
def _driver_of(
    stream: Stream, engine: str, driver_name: str, options: dict[str, Any]
) -> Iterator[Driver]:
    """The driver that holds the engine; profiles that it does not declare cannot be asked for."""
    try:
        driver = open_driver(
            engine,
            driver_name,
            ranks=options["ranks"],
            backend=options["backend"],
            deadline_s=options["deadline"],
        )
    except EngineSpecError as error:
        raise BadInput(str(error)) from error
    except EngineFailure as failure:
        click.echo(f"The engine did not start. {failure}", err=True)
        stream.dead = True
        _leave(stream.summary(options["engine"]))
    try:
        missing = [profile for profile in options["asked"] if profile not in driver.profiles]
        if missing:
            raise BadInput(
                f"Engine {engine} does not declare {', '.join(missing)}; it declares "
                f"{', '.join(profile for profile in PROFILES if profile in driver.profiles)}."
            )
        gc.freeze()  # what was imported stays: no collection need look through it again
        yield driver
    finally:
        driver.close()


def _ledger(options: dict[str, Any]) -> Known:
    """The known differences of the engine; none without --known."""
    if options["known_path"] is None:
        return Known()
    if options["workload"] is not None:
        raise BadInput("--known is for random traces; a workload is judged without a ledger.")
    try:
        return Known.read(options["known_path"])
    except LedgerError as error:
        raise BadInput(str(error)) from error


_Red = tuple[Row, Failure, Path]
"""A failing row, what is wrong there, and where its trace is stored."""


def _red(stream: Stream, row: Row, failure: Failure, folder: Path) -> _Red:
    """Store and write down a failure as soon as it is known."""
    path = save_failure(folder, row, failure)
    stream.failure(row, failure, path)
    return row, failure, path


def _default_examples(driver_name: str) -> int:
    return 400 if driver_name == "local" else 40


def _play_random(
    stream: Stream, engine: str, driver_name: str, options: dict[str, Any], known: Known
) -> list[_Red]:
    """Random traces of each layout asked for; the failures with their rows and files."""
    failures = []
    names = options["layouts"] or LAYOUT_NAMES
    examples = options["examples"] or _default_examples(driver_name)
    with _driver_of(stream, engine, driver_name, options) as driver, _progress() as progress:
        cp_sizes = _cp_sizes(driver, options["cp_sizes"])
        coverage = Coverage(at_hand(driver.profiles, layouts=names, cp_sizes=cp_sizes))
        bar = progress.add_task("", total=examples * len(names))
        for done, name in enumerate(names):
            progress.update(bar, description=f"{name} ({driver_name})", completed=done * examples)
            tally = Tally()
            checked, failure = session.layout_run(
                driver,
                name,
                options["asked"],
                cp_sizes=cp_sizes,
                tp_sizes=(1,) if options["cp_sizes"] else (1, 2),
                examples=examples,
                seed=options["seed"],
                tally=tally,
                known=known,
                progress=lambda: progress.advance(bar),
                coverage=coverage,
            )
            if not checked:
                continue
            here = known.of_layout(name)
            row = make_row(
                name,
                engine,
                driver_name,
                cp_sizes,
                checked,
                driver.profiles,
                tally,
                failure,
                here,
                driver.settings,
            )
            stream.row(row)
            if failure is not None:
                failures.append(_red(stream, row, failure, options["folder"]))
                if failure.verdict == "error" and not driver.survives_failure:
                    break
        progress.update(bar, completed=examples * len(names))
    stream.covered(engine, driver_name, coverage)
    return failures


def _play_workload(
    stream: Stream, engine: str, driver_name: str, options: dict[str, Any], known: Known
) -> list[_Red]:
    """A workload on each layout and cp_size asked for; the failures with their rows and files."""
    try:
        requests = read_workload(options["workload"])[: options["limit"]]
    except WorkloadError as error:
        raise BadInput(str(error)) from error
    requests = scaled(requests, options["scale"])
    configs = [
        _workload_config(name, cp_size, options)
        for name in options["layouts"] or ["pr9757"]
        for cp_size in options["cp_sizes"] or [4]
    ]
    failures = []
    # Playing makes no cycles; a collector that walks millions of tokens costs a quarter more.
    gc.set_threshold(1_000_000)
    with _driver_of(stream, engine, driver_name, options) as driver, _progress() as progress:
        profiles = session.profiles_to_check(driver.profiles, options["asked"])
        coverage = Coverage(
            at_hand(
                driver.profiles,
                layouts=[layout_name(config.layout) for config in configs],
                cp_sizes=[config.layout.cp_size for config in configs],
                random=False,
            )
        )
        for config in configs:
            _check_world(driver, config.world_size)
            bar = progress.add_task(str(config.layout), total=len(requests))
            tally = Tally()
            try:
                failure = session.workload(
                    driver,
                    config,
                    requests,
                    profiles,
                    batch_limit=options["batch"],
                    max_steps=options["max_steps"],
                    tally=tally,
                    released=lambda bar=bar: progress.advance(bar),  # type: ignore[misc]
                    coverage=coverage,
                )
            except WorkloadError as error:
                raise BadInput(str(error)) from error
            row = make_row(
                str(config.layout),
                engine,
                driver_name,
                [config.layout.cp_size],
                profiles,
                driver.profiles,
                tally,
                failure,
                settings=driver.settings,
            )
            stream.row(row)
            if failure is not None:
                failures.append(_red(stream, row, failure, options["folder"]))
                if not driver.survives_failure:
                    break
    stream.covered(engine, driver_name, coverage)
    return failures


def _workload_config(name: str, cp_size: int, options: dict[str, Any]) -> Config:
    """The configuration of a workload run. Raises BadInput before any rank starts."""
    if name == "custom":
        raise BadInput("A workload needs a named layout; custom is for random traces.")
    world = cp_size * options["tp_size"]
    step = world * options["kv_heads"]
    try:
        layout = named_layout(
            name,
            cp_size=cp_size,
            tokens_per_block=options["tokens_per_block"],
            interleave=options["interleave"],
        )
    except LayoutError as error:
        raise BadInput(str(error)) from error
    config = Config(
        layout=layout,
        pages=[options["pages"]] * cp_size,
        max_len=2**31 - 1,
        model=ModelShape(
            q_heads=options["q_heads"] or max(step, 8 // step * step),
            kv_heads=options["kv_heads"],
            head_dim=options["head_dim"],
        ),
        tp_size=options["tp_size"],
        seed=options["seed"],
    )
    problem = config_problem(config)
    if problem is not None:
        raise BadInput(problem)
    return config


def _cp_sizes(driver: Driver, asked: Sequence[int]) -> list[int]:
    """The cp_sizes to draw from, smallest first; a pool's own size counts for most examples."""
    world = driver.largest_world
    for cp_size in asked:
        _check_world(driver, cp_size)
    if asked:
        return sorted(set(asked))
    return [1, 2, 3, 4, 8] if world is None else [*range(1, world), *[world] * world]


def _check_world(driver: Driver, world: int) -> None:
    if driver.largest_world is not None and world > driver.largest_world:
        raise BadInput(
            f"{world} ranks are needed, and the {driver.name} has {driver.largest_world}; "
            f"give --ranks {world}."
        )


def _progress() -> Progress:
    """A bar on the terminal's error stream; where there is no terminal, nothing."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=Console(stderr=True),
        transient=True,
    )


def _take_part(options: dict[str, Any]) -> None:
    """Go on as rank 0 where processes are launched; see `launching.take_part`."""
    if options["driver_name"] in LAUNCHED:
        try:
            take_part(
                options["engine"],
                options["driver_name"],
                ranks=options["ranks"],
                backend=options["backend"],
                deadline_s=options["deadline"],
            )
        except EngineSpecError as error:
            raise BadInput(str(error)) from error


def _leave(verdict: str) -> None:
    """End with the verdict's exit status, and leave it where a launching process looks."""
    status = EXIT_STATUS[verdict]
    leave_verdict(status)
    sys.exit(status)
