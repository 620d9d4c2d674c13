"""The command line `helix-conformance`."""

from __future__ import annotations

import sys
import time
import traceback
import webbrowser
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from functools import partial
from importlib.metadata import entry_points
from itertools import count
from pathlib import Path
from typing import Any, Final

import click
from rich.console import Console

from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.launched import (
    INTERRUPTED,
    LAUNCHED,
    leave_interrupted,
    leave_verdict,
    take_part,
)
from helix_conformance.drive.opening import DRIVERS
from helix_conformance.drive.processes import nothing_left
from helix_conformance.drive.serve import main as serve_engine
from helix_conformance.engines import EngineSpecError, engine_names
from helix_conformance.expect.making import export
from helix_conformance.expect.vectors import FORMAT_PAGE, SHIPPED, Vector, VectorError, load_vectors
from helix_conformance.generate.narrowing import NothingInsideError
from helix_conformance.generate.workload import WorkloadError, read_workload, scaled
from helix_conformance.init import starter_files
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import Player
from helix_conformance.judge.xfail import Known, LedgerError
from helix_conformance.probe import NothingStartsError, beyond, probe_text, proposal
from helix_conformance.probe import probe as probe_engine
from helix_conformance.prove import ProveError
from helix_conformance.prove import prove as prove_theorems
from helix_conformance.report.command import (
    FILE,
    OUTPUT,
    BadInput,
    OneOf,
    exit_statuses,
    report,
    write_file,
)
from helix_conformance.report.html import explore_page, show_page
from helix_conformance.report.stream import (
    CoverageLine,
    FailureLine,
    Row,
    Stream,
    StreamError,
    Summary,
)
from helix_conformance.report.text import (
    alike,
    failure_text,
    print_coverage,
    print_lines,
    print_table,
    progress_bar,
    replay_text,
    stdout,
    trace_text,
    verdict_text,
)
from helix_conformance.session import Advance, Session, SessionError
from helix_conformance.talk import TalkDriver, short_trace
from helix_conformance.version import __version__
from helix_spec.config import Config, ModelShape, config_problem
from helix_spec.engine import PROFILES
from helix_spec.invariants import NUMBERS
from helix_spec.layouts import LAYOUT_NAMES, LayoutError, layout_name, named_layout
from helix_spec.trace import TraceError, load_trace

EXIT_STATUS = {"pass": 0, "fail": 1, "error": 3}
CHECKED_NOTHING: Final = 2
NOT_WRITTEN: Final = 2
SUITE_FAILED: Final = 70
"""EX_SOFTWARE of <sysexits.h>."""
JUDGED: Final = {
    0: "every answer was correct",
    1: "a difference was found",
    2: "bad usage or input, something missing, nothing checked, or a file not written",
    3: "an engine died, timed out or gave a malformed answer",
    SUITE_FAILED: "the suite itself failed, with a traceback",
    INTERRUPTED: "Ctrl-C; what had ended is shown",
}
"""What the exit statuses mean of a command that judges an engine."""
PROVED: Final = {
    0: "every theorem was confirmed, or all of those asked for",
    1: "one was not, or wrong formulas survived",
    2: "bad usage, or z3 or CrossHair is missing",
    INTERRUPTED: "Ctrl-C; what had ended is shown",
}
PROBED: Final = {
    0: "a declaration was proposed",
    2: "bad usage, something missing, or nothing that could be started",
    INTERRUPTED: "Ctrl-C",
}
SHOWN: Final = {0: "it was shown, or written", 2: "bad usage, or a file that cannot be used"}
STARTED: Final = {0: "the files were written", 2: "bad usage, or a file that is there already"}
SERVED: Final = {
    0: "stdin has ended",
    1: "a line was no request",
    2: "bad usage, or an engine that cannot be served",
}
SAID_EVERY_S: Final = 5.0
"""Seconds from one line of progress to the next."""
_ONE_LAYOUT: Final = (
    "Only {0} passes. An engine that places tokens by one layout is run with --layout {0}, or says "
    "so in its capabilities."
)
REFUSED: Final = (
    *(EngineSpecError, LayoutError, LedgerError, ProveError, SessionError, TraceError),
    *(NothingInsideError, NothingStartsError, StreamError, VectorError, WorkloadError),
)
"""What the user gave cannot be used; the message is a sentence."""
COMMANDS: Final = "helix_conformance.commands"
"""Group of entry points by which a package adds click commands to this command line."""


class Commands(click.Group):
    """The commands of this module, and those that installed packages add by entry points."""

    def invoke(self, context: click.Context) -> Any:
        """Run a command; what it refuses ends it in a sentence and status 2.

        No defect of the suite ends it with the status of a difference.
        """
        try:
            return super().invoke(context)
        except REFUSED as error:
            leave_verdict(BadInput.exit_code)
            raise BadInput(str(error)) from error
        except click.ClickException as error:
            leave_verdict(error.exit_code)
            raise
        except KeyboardInterrupt as interrupt:
            sys.exit(getattr(interrupt, "status", INTERRUPTED))
        except (click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise
        except Exception:
            traceback.print_exc()
            leave_verdict(SUITE_FAILED)
            sys.exit(SUITE_FAILED)

    def list_commands(self, context: click.Context) -> list[str]:
        """Return the names of all commands, in the order of the alphabet."""
        return sorted({*super().list_commands(context), *entry_points(group=COMMANDS).names})

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        """Return the command of this name. Raises BadInput when a package's cannot be loaded."""
        added = list(entry_points(group=COMMANDS, name=name))
        if name in self.commands or not added:
            return super().get_command(context, name)
        try:
            command: click.Command = added[0].load()
        except Exception as error:  # whatever its module does when it is imported
            raise BadInput(
                f"Command {name!r} ({added[0].value}) cannot be loaded: {error}."
            ) from error
        return command


@click.group(
    cls=Commands,
    context_settings={
        "help_option_names": ["-h", "--help"],
        "max_content_width": 100,
        "show_default": True,
    },
)
@click.version_option(__version__, prog_name="helix-conformance")
def main() -> None:
    """Check an engine's sharded decode KV cache against the specification.

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
      helix-conformance replay helix-failures/pr9757-local-1a2b3c4d.json --engine reference
          a failing trace once more
      helix-conformance show helix-failures/pr9757-local-1a2b3c4d.json
          where the tokens of a trace belong, rank by rank and page by page

    Each command's help ends with what its exit statuses mean. Under a torchrun of your own only 0
    or not 0 survives, and the last line of --json holds the verdict. An mpiexec of your own needs
    --continuous, or it ends the report together with a rank that dies.
    """  # noqa: D301  # click keeps the lines of a paragraph that begins with a real backspace


_NAMES_OF_ENGINES: Final = (
    "NAME or NAME:ARGUMENT (reference, gpu, or one that an installed package registers), "
    "module:Class, or stdio:COMMAND for one of any language."
)


def _engines(_: click.Context, __: click.Parameter, begun: str) -> list[str]:
    """Names of engines, for the completion of shells."""
    return [name for name in engine_names() if name.startswith(begun)]


_deadline = click.option(
    "--deadline",
    default=30.0,
    type=click.FloatRange(0.1),
    help="Seconds without an answer after which a rank has timed out.",
)
_ENGINE_OPTIONS = [
    click.option("--engine", default="gpu", help=_NAMES_OF_ENGINES, shell_complete=_engines),
    click.option(
        "--driver",
        "driver_name",
        type=OneOf(DRIVERS),
        help="Where the ranks live: in this process (local), each a child that speaks JSON lines "
        "(stdio), in worker processes over gloo (pool), or under torchrun or mpiexec (mpi), which "
        "is launched when it is not there. Default: what the engine needs; for gpu its "
        "bookkeeping in this process, and all of it in a pool.",
    ),
    click.option(
        "--profile",
        "asked",
        multiple=True,
        type=OneOf(PROFILES),
        help="Check this profile and those it builds on. Repeat for several. Default: all that "
        "the engine declares.",
    ),
    click.option(
        "--ranks",
        default=4,
        type=click.IntRange(1, 64),
        help="Processes of a pool, or of a torchrun or mpiexec that is launched.",
    ),
    click.option(
        "--backend",
        type=click.Choice(["gloo", "nccl"]),
        default="gloo",
        help="What the ranks of a torchrun or mpiexec talk over.",
    ),
    _deadline,
    click.option(
        "--json",
        "json_path",
        type=OUTPUT,
        help="Write the run as JSON lines; the last is the summary.",
    ),
]
_layouts = click.option(
    "--layout",
    "layouts",
    multiple=True,
    type=OneOf(LAYOUT_NAMES),
    help="Check this layout; custom stands for any other legal combination. Repeat for several. "
    "Default: all.",
)


_xfail = click.option(
    "--xfail",
    "--known",
    "known_path",
    type=FILE,
    help="The engine's expected failures (TOML): they are named and do not fail the run; one that "
    "no longer fails does. --known is the name of version 0.1.",
)


def _on_an_engine(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options by which an engine is named and driven."""
    for option in reversed(_ENGINE_OPTIONS):
        function = option(function)
    return function


@main.command(epilog=exit_statuses(JUDGED))
@_on_an_engine
@_layouts
@click.option(
    "--cp",
    "cp_sizes",
    multiple=True,
    type=click.IntRange(1, 64),
    help="cp_size to check. Repeat for several. Default: 1 2 3 4 8 in one process, and up to "
    "the number of ranks elsewhere.",
)
@click.option(
    "--examples",
    type=click.IntRange(1),
    help="Random traces for each layout. Default: 400 in one process, 40 elsewhere.",
)
@click.option("--seed", default=0, help="Seed of the random traces.")
@click.option(
    "--workload",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Replay this request trace (Mooncake .jsonl or Azure .csv) instead of random traces.",
)
@click.option("--tokens-per-block", default=64, help="Workload: page size T.")
@click.option("--interleave", type=int, help="Workload: interleave I of vllm_dcp.")
@click.option("--tp", "tp_size", default=1, help="Workload: tp_size.")
@click.option("--pages", default=4096, help="Workload: pages of each rank.")
@click.option("--q-heads", type=int, help="Workload: query heads. Default: 8 or a bit more.")
@click.option("--kv-heads", default=2, help="Workload: KV heads.")
@click.option("--head-dim", default=32, help="Workload: head dim.")
@click.option("--limit", type=click.IntRange(1), help="Workload: only the first N requests.")
@click.option(
    "--scale",
    default=1,
    type=click.IntRange(1),
    help="Workload: divide all lengths by this, rounding up.",
)
@click.option("--max-steps", default=500, help="Workload: decode steps each.")
@click.option("--batch", default=128, help="Workload: requests at a time.")
@click.option(
    "--traces",
    "folder",
    default="helix-failures",
    type=click.Path(file_okay=False, path_type=Path),
    help="Folder for failing traces; those of earlier runs that lie there are played first.",
)
@click.option(
    "--soak",
    type=click.IntRange(1),
    metavar="STEPS",
    help="Play one trace of so many events (such as 100000) from one start, not random traces.",
)
@click.option(
    "--exchanges-done",
    default=0,
    type=click.IntRange(0, 2**53),
    help="Start the engine's counter of exchanges at this number, such as 2147483600: a wrap "
    "shows. For engines that take it (SPEC.md, section 10).",
)
@click.option("--stop-at-first", is_flag=True, help="End with the first layout that fails.")
@click.option(
    "--jobs",
    default=1,
    type=click.IntRange(1),
    help="Layouts that are played at a time, each by a process of its own: the same traces, and "
    "the same result but where the clock ends the search for a smaller failing trace.",
)
@click.option("--coverage", is_flag=True, help="Print how often each situation was visited.")
@_xfail
def run(**options: Any) -> None:
    """Play random traces, or a workload, and judge every answer.

    Without options: this project's implementation, every layout, all its profiles. The table
    has a line for each layout and driver. After a failure come the smallest failing trace, each
    violated invariant with its sentence from SPEC.md, what was expected and what was observed.
    """
    if options["jobs"] > 1 and options["driver_name"] in LAUNCHED:
        raise BadInput("--jobs is for ranks that this process starts: local, stdio and pool.")
    if options["known_path"] is not None and options["workload"] is not None:
        raise BadInput("--xfail is for random traces; a workload is judged without it.")
    with _session(options) as session:
        left_out = session.begin("run", options)
        if options["workload"]:
            _play_workload(session, options)
        elif options["soak"]:
            session.soak(options["layouts"], options["cp_sizes"], options["soak"])
        else:
            session.random(options["layouts"], options["cp_sizes"], options["examples"])
    console = _show(session)
    if session.not_started is None:
        print_coverage(
            console,
            session.stream.of(CoverageLine),
            failed=bool(session.failures),
            table=options["coverage"],
        )
    if left_out:
        print_lines(console, [f"This is a part of a run, not a whole one. {' '.join(left_out)}"])
    for failure, *others in alike(session.failures):
        where = replay_text(failure.trace_file, failure.engine, failure.driver)
        print_lines(console, [*failure_text(failure), *where])
        if others:
            places = (f"{other.layout} ({other.trace_file})" for other in others)
            print_lines(console, [f"The same fails on {', '.join(places)}."])
    passing = {row.layout for row in session.stream.of(Row) if row.verdict == "pass"}
    if session.failures and len(passing) == 1 and not options["layouts"]:
        print_lines(console, [_ONE_LAYOUT.format(*passing)])
    print_lines(console, [*session.unwritten, *session.known.sentences()])
    _leave(session)


@main.command(epilog=exit_statuses(JUDGED))
@click.argument("trace_path", metavar="TRACE.json", type=click.Path(path_type=Path))
@_on_an_engine
def replay(**options: Any) -> None:
    """Play one stored trace and judge every answer."""
    trace, path = load_trace(options["trace_path"]), options["trace_path"]
    with _session(options) as session:
        session.begin("replay", options, "One stored trace was played")
        session.replay(trace, path)
    console = _show(session)
    for failure in session.failures:
        where = replay_text(failure.trace_file, session.engine)
        print_lines(console, [*failure_text(failure), *where])
    _leave(session)


main.add_command(report)


@main.command(epilog=exit_statuses(STARTED))
@click.argument("folder", default=".", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--python",
    "kind",
    flag_value="python",
    default="python",
    show_default=False,
    help="An adapter in Python, which the suite imports. This is the default.",
)
@click.option("--stdio", "kind", flag_value="stdio", help="One of any language: a command.")
@click.option(
    "--suite",
    default="helix-conformance",
    help="What the workflow installs the suite from, as pip takes it: a name, a path, a git URL.",
)
def init(folder: Path, kind: str, suite: str) -> None:
    """Write an adapter that passes `placement` on one layout into FOLDER, and a CI file.

    It is an engine of its own, of a hundred lines: what is marked `yours` in it becomes calls of
    your engine. conformance.sh runs the suite on it, here and in the workflow of GitHub Actions.
    """
    files = {folder / name: text for name, text in starter_files(kind, suite).items()}
    for path in files:
        if path.exists():
            raise BadInput(f"{path} is there already; nothing was written.")
    for path, text in files.items():
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BadInput(f"{path.parent}: cannot be made: {error.strerror}.") from error
        write_file(path, text.encode())
        click.echo(f"wrote {path}")
    click.echo(f"Run it with: sh {folder / 'conformance.sh'}")


@main.command(epilog=exit_statuses(JUDGED))
@click.argument(
    "trace_path", metavar="[TRACE.json]", required=False, type=click.Path(path_type=Path)
)
@click.option("--engine", required=True, help=_NAMES_OF_ENGINES, shell_complete=_engines)
@_layouts
@_deadline
def talk(trace_path: Path | None, engine: str, layouts: tuple[str, ...], deadline: float) -> None:
    """Show the conversation with an engine line by line, in the words of PROTOCOL.md.

    What is played is TRACE.json, or a prompt and two steps. -> is what the suite says, <- what
    the engine answers, after the number of the rank. A Python engine is served (see `serve`).
    """
    console = stdout()
    say = partial(print_lines, console)
    try:
        driver = TalkDriver(engine, lambda line: say([line]), deadline_s=deadline)
    except EngineFailure as failure:
        say(["", f"The engine did not start. {failure}"])
        sys.exit(EXIT_STATUS["error"])
    with nothing_left(), closing(driver):
        trace = load_trace(trace_path) if trace_path else short_trace(driver, layouts)
        found = Player(driver, driver.profiles, Tally(), Known()).judged(trace)
    say(failure_text(found) if found else ["", "Every answer was correct."])
    sys.exit(EXIT_STATUS[found.verdict if found else "pass"])


@main.command(epilog=exit_statuses(PROBED))
@_on_an_engine
@click.option(
    "--around",
    "trace_path",
    type=click.Path(path_type=Path),
    help="A trace whose configuration works. Default: one is looked for.",
)
def probe(**options: Any) -> None:
    """Propose a declaration of capabilities: start the engine on single changes, and see.

    It starts around a configuration that works, one for each kind of attention. What is refused or
    fails is left out. No answer is judged: `run` does that, inside what is declared.
    """
    around = load_trace(options["trace_path"]).config if options["trace_path"] else None
    with _session(options) as session:
        _, driver = next(drivers := session.drivers())
        found = probe_engine(driver, around, session.progress("configurations", 1000))
        boxes = proposal(found)
        print_lines(stdout(), probe_text(found, boxes, beyond(driver, boxes)))
        drivers.close()


@main.command(epilog=exit_statuses(SHOWN))
@click.argument("trace_path", metavar="TRACE.json", type=click.Path(path_type=Path))
@click.option(
    "--html",
    "html_path",
    type=OUTPUT,
    help="Write a self-contained page instead, with a slider over the events.",
)
def show(trace_path: Path, html_path: Path | None) -> None:
    """Print where the tokens of a trace belong: each request, rank by rank, page by page."""
    trace = load_trace(trace_path)
    if html_path is not None:
        write_file(html_path, show_page(trace, trace_path.name).encode())
        return
    for line in trace_text(trace):
        click.echo(line)


@main.command(epilog=exit_statuses(SHOWN))
@click.argument("html_path", metavar="[FILE]", default="explorer.html", type=OUTPUT)
@click.option("--open", "opened", is_flag=True, help="Open it in the browser.")
def explore(html_path: Path, opened: bool) -> None:
    """Write a page on which layouts and sizes are chosen: who holds which token.

    It shows the tokens by rank and page, balance and capacity, and how two layouts differ. It is
    one file, explorer.html where no name is given, and loads nothing.
    """
    write_file(html_path, explore_page().encode())
    click.echo(f"wrote {html_path}")
    if opened:
        webbrowser.open(html_path.absolute().as_uri())


@main.group()
def vectors() -> None:
    """Test vectors: cases as JSON, for engines and test runners in any language."""


@vectors.command("export", epilog=exit_statuses(SHOWN))
@click.argument("folder", metavar="DIR", type=click.Path(file_okay=False, path_type=Path))
def vectors_export(folder: Path) -> None:
    """Write the vectors, their format page (FORMAT.md) and their JSON Schema into DIR."""
    try:
        count = len(export(folder))
    except OSError as error:
        raise BadInput(str(error)) from error
    click.echo(f"wrote {count} files to {folder}; begin with {folder / FORMAT_PAGE}")


@vectors.command("check", epilog=exit_statuses(JUDGED))
@click.argument("folder", metavar="[DIR]", required=False, type=click.Path(path_type=Path))
@_on_an_engine
@_layouts
@_xfail
def vectors_check(**options: Any) -> None:
    """Run the vectors of DIR, or those shipped with this package, against an engine.

    Only what the files say counts. Cases that need a profile which the engine does not declare,
    or which was not asked for, are named as not checked.
    """
    cases = _cases(options["folder"] or SHIPPED, options["layouts"])
    with _session(options) as session:
        session.begin("vectors check", {}, "Stored vectors were played")
        left_out = session.vectors(cases)
    console = _show(session)
    texts = _vector_texts(session.failures, dict(cases))
    print_lines(console, [*left_out, *texts, *session.known.sentences()])
    _leave(session)


@main.command(epilog=exit_statuses(PROVED))
@click.option(
    "--theorem",
    "only",
    multiple=True,
    metavar="ID",
    help="Confirm this theorem alone. Repeat for several. Default: the whole manifest.",
)
@click.option("--jobs", default=2, type=click.IntRange(1), help="At a time.")
@click.option(
    "--json",
    "json_path",
    type=OUTPUT,
    help="Write the theorems, their verdicts, witnesses and kills as one JSON object.",
)
@click.option(
    "--stream",
    "stream_path",
    type=OUTPUT,
    help="Append the result to a run's JSON stream, for `helix-conformance report`.",
)
def prove(**options: Any) -> None:
    """Confirm the theorems of the specification, for all sizes.

    Z3 proves the arithmetic over unbounded integers, CrossHair confirms contracts on the very
    functions that run. The exact manifest must be confirmed, every precondition has a witness,
    and every theorem refutes at least one wrong formula; whatever is missing is named.
    """
    sys.exit(prove_theorems(**options))


@main.command(epilog=exit_statuses(SERVED))
@click.option("--engine", required=True, help="A name, or module:Class; it needs no processes.")
def serve(engine: str) -> None:
    """Be one rank of a Python engine on stdin and stdout, in the words of PROTOCOL.md.

    For an engine that lives in another environment, container or machine than the suite:
    --engine "stdio:ssh host helix-conformance serve --engine my_package.adapter:Engine".
    """
    serve_engine(engine)


@contextmanager
def _session(options: dict[str, Any]) -> Iterator[Session]:
    """A session with these options, a bar on the terminal's error stream beside it."""
    known = Known.read(options["known_path"]) if options.get("known_path") else Known()
    names = {"ranks": "ranks", "backend": "backend", "deadline": "deadline_s"}
    setup = {name: options[option] for option, name in names.items()}
    if options["driver_name"] in LAUNCHED:  # goes on as rank 0 of the processes that are launched
        take_part(options["engine"], options["driver_name"], **setup)
    console = Console(stderr=True)
    bars = progress_bar(console)

    def bar(description: str, total: int) -> Advance:
        for task in bars.task_ids:
            bars.remove_task(task)
        task = bars.add_task(description, total=total)
        return lambda: bars.advance(task)

    session = Session(
        options["engine"],
        options["driver_name"],
        options["asked"],
        **setup,
        known=known,
        stream=Stream(options["json_path"]),
        folder=options.get("folder"),
        progress=bar if console.is_terminal else partial(_said_now_and_then, console),
        stop_at_first=options.get("stop_at_first", False),
        exchanges_done=options.get("exchanges_done", 0),
        jobs=options.get("jobs", 1),
    )
    try:
        with bars, nothing_left():
            yield session
    except KeyboardInterrupt as interrupt:
        _show_part(session)
        leave_interrupted(session.driver, getattr(interrupt, "status", INTERRUPTED))


def _said_now_and_then(console: Console, description: str, total: int) -> Advance:
    """Say where a run is every few seconds, where no bar can be drawn."""
    done, said = count(1), time.monotonic()

    def advance() -> None:
        nonlocal said
        number = next(done)
        if time.monotonic() - said > SAID_EVERY_S:
            said = time.monotonic()
            print_lines(console, [f"{description}: {number:,} of {total:,}"])

    return advance


def _show_part(session: Session) -> None:
    """Print what a run had found when it was interrupted."""
    console = _show(session)
    for failure in session.failures:
        where = replay_text(failure.trace_file, failure.engine, failure.driver)
        print_lines(console, [*failure_text(failure), *where])
    done = ", ".join(dict.fromkeys(row.layout for row in session.stream.of(Row))) or "none"
    print_lines(console, [*session.unwritten, f"Interrupted; layouts that had ended: {done}."])


def _show(session: Session) -> Console:
    """Print the table of a run."""
    console = stdout()
    if session.not_started is not None:
        sentence = f"The engine did not start. {session.not_started}"
        print_lines(Console(stderr=True), [sentence])
    rows = session.stream.of(Row)
    if rows or session.not_started is None:
        print_table(console, rows)
    return console


def _play_workload(session: Session, options: dict[str, Any]) -> None:
    """A workload on each layout and cp_size asked for."""
    requests = scaled(read_workload(options["workload"])[: options["limit"]], options["scale"])
    configs = [
        _workload_config(name, cp_size, options)
        for name in options["layouts"] or ["pr9757"]
        for cp_size in options["cp_sizes"] or [4]
    ]
    batch, steps = options["batch"], options["max_steps"]
    session.workload(requests, configs, batch_limit=batch, max_steps=steps)


def _cases(folder: Path, layouts: tuple[str, ...]) -> list[tuple[Path, Vector]]:
    """The vectors of a folder, each with its file: only those of these layouts, if any is named."""
    cases = [
        (folder / f"{vector.name}.json", vector)
        for vector in load_vectors(folder)
        if not layouts or layout_name(vector.config.layout) in layouts
    ]
    if not cases:
        raise BadInput(f"{folder} holds no vector of layout {' or '.join(layouts)}.")
    return cases


def _vector_texts(failures: Iterable[FailureLine], cases: dict[Path, Vector]) -> Iterator[str]:
    """Each failing vector; all but the first of a layout in one line."""
    shown = set[str]()
    for failure in failures:
        path = Path(failure.trace_file)
        if failure.layout not in shown:
            shown.add(failure.layout)
            yield from ["", f"{path}: {' '.join(cases[path].notes)}", *failure_text(failure)]
            continue
        numbers = sorted(failure.invariants, key=NUMBERS.index)
        at = "the start" if failure.event is None else f"event {failure.event}"
        yield f"{path}: {', '.join(numbers)} at {at}"


def _workload_config(name: str, cp_size: int, options: dict[str, Any]) -> Config:
    """The configuration of a workload run. Raises BadInput before any rank starts."""
    if name == "custom":
        raise BadInput("A workload needs a named layout; custom is for random traces.")
    world = cp_size * options["tp_size"]
    step = world * options["kv_heads"]
    block, interleave = options["tokens_per_block"], options["interleave"]
    layout = named_layout(name, cp_size=cp_size, tokens_per_block=block, interleave=interleave)
    q_heads = options["q_heads"] or max(step, 8 // step * step)
    config = Config(
        layout=layout,
        pages=[options["pages"]] * cp_size,
        max_len=2**31 - 1,
        model=ModelShape(
            q_heads=q_heads, kv_heads=options["kv_heads"], head_dim=options["head_dim"]
        ),
        tp_size=options["tp_size"],
        seed=options["seed"],
    )
    problem = config_problem(config)
    if problem is not None:
        raise BadInput(problem)
    return config


def _leave(session: Session) -> None:
    """End with the verdict's exit status, and leave it where a launching process looks."""
    status = EXIT_STATUS[session.summary()]
    if not session.stream.of(Row) and session.not_started is None:
        status = CHECKED_NOTHING
    [summary] = session.stream.of(Summary)
    if session.stream.problem is not None:
        print_lines(Console(stderr=True), [session.stream.problem])
        status = status or NOT_WRITTEN
    print_lines(stdout(), [verdict_text(summary)])
    leave_verdict(status)
    sys.exit(status)
