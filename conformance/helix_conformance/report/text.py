"""What a user reads on the terminal: tables, failures that explain themselves, traces.

Everything that is shown is in the stream first; the tables and texts are views of it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import count, groupby
from pathlib import Path
from typing import Any, Final

import msgspec
from msgspec import NODEFAULT
from rich import progress
from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from helix_conformance.expect.expectation import Request
from helix_conformance.expect.recorder import Recorder
from helix_conformance.foreign import shell_command, shown
from helix_conformance.judge.coverage import SITUATIONS
from helix_conformance.judge.failure import Failure
from helix_conformance.report.stream import CoverageLine, FailureLine, Row, Summary, encoded
from helix_spec.capabilities import STRICT, freedoms_in_words, in_words
from helix_spec.config import Config, config_problem
from helix_spec.engine import CUMULATIVE, PROFILES
from helix_spec.events import Admit, Event, Merge
from helix_spec.invariants import sentence
from helix_spec.trace import EVERYTHING, Trace

SHOWN_PAGES: Final = 32
"""Of a longer block table so many pages are printed at its beginning, and at its end."""
PIPE_WIDTH: Final = 1000
"""Columns of what is no terminal: no table is as wide."""


def stdout() -> Console:
    """Return standard output; lines are broken where a terminal or COLUMNS says how wide it is."""
    sized = sys.stdout.isatty() or "COLUMNS" in os.environ
    return Console() if sized else Console(width=PIPE_WIDTH)


# A run


def progress_bar(console: Console, *more: progress.ProgressColumn) -> progress.Progress:
    """Return a bar that counts what is done, gone when it ends.

    Parameters
    ----------
    console : Console
        Where it is drawn.
    *more : ProgressColumn
        Columns behind the count and the time.

    Returns
    -------
    Progress
        To be entered.
    """
    counts = progress.BarColumn(), progress.MofNCompleteColumn(), progress.TimeElapsedColumn()
    return progress.Progress(_Description(), *counts, *more, console=console, transient=True)


class _Description(progress.ProgressColumn):
    """What is played."""

    def render(self, task: progress.Task) -> Text:
        """Return it without markup."""
        return Text(shown(task.description))


def print_lines(console: Console, lines: Iterable[str]) -> None:
    """Print lines as `shown` has them, without markup and without breaking them.

    Parameters
    ----------
    console : Console
        Where to.
    lines : iterable of str
        The lines.
    """
    for line in lines:
        console.print(Text(shown(line)), soft_wrap=True)


def print_table(console: Console, rows: Iterable[Row]) -> None:
    """Print the table of a run.

    Of the cumulative profiles the deepest one is shown, which includes those before it.

    Parameters
    ----------
    console : Console
        Where to.
    rows : iterable of Row
        One for each line.
    """
    counts = [Column(name, justify="right") for name in ("traces", "events", "events/s")]
    layout, texts = Column("layout", no_wrap=True), ("driver", "cp_size", "profiles")
    table = Table(layout, *texts, *counts, "verdict", box=None, pad_edge=False)
    for row in rows:
        cumulative = [profile for profile in CUMULATIVE if profile in row.profiles]
        others = [profile for profile in row.profiles if profile not in CUMULATIVE]
        colour = "green" if row.verdict == "pass" else "red"
        xfail = f", [yellow]{len(row.known)} xfail[/]" if row.known else ""
        table.add_row(
            Text(shown(row.layout)),
            Text(shown(row.driver)),
            ranges_text(row.cp_sizes),
            Text(shown(" ".join(cumulative[-1:] + others))),
            f"{row.traces:,}",
            f"{row.events:,}",
            f"{row.events / row.seconds:,.0f}" if row.seconds else "-",
            f"[{colour}]{row.verdict}[/]{xfail}",
        )
    console.print(table)


def ranges_text(numbers: Sequence[int]) -> str:
    """Return rising numbers with runs of three or more as ranges.

    Parameters
    ----------
    numbers : sequence of int
        Each once, rising.

    Examples
    --------
    >>> ranges_text([1, 2, 3, 4, 8, 16]), ranges_text([1, 2, 4])
    ('1-4 8 16', '1 2 4')
    """
    runs = list[list[int]]()
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return " ".join(
        f"{run[0]}-{run[-1]}" if len(run) > 2 else " ".join(map(str, run)) for run in runs
    )


def verdict_text(summary: Summary) -> str:
    """Return the last line of a run: PASS or FAIL, and of what.

    Parameters
    ----------
    summary : Summary
        The last line of the stream.

    Returns
    -------
    str
        One line: layouts, traces, what was checked and what was not.

    Examples
    --------
    >>> verdict_text(Summary(engine="e", verdict="pass", layouts=["pr9757"], traces=9, events=80,
    ...     profiles_checked=["placement"], profiles_not_checked=["merge"], events_per_s=None))
    'PASS: 9 traces of pr9757; checked placement; not checked merge.'
    """
    counted = "1 trace" if summary.traces == 1 else f"{summary.traces:,} traces"
    counted += f" and {summary.vectors:,} vectors" if summary.vectors else ""
    parts = [
        f"{counted} of {', '.join(summary.layouts) or 'no layout'}",
        f"checked {', '.join(summary.profiles_checked) or 'nothing'}",
    ]
    if summary.profiles_not_checked:
        parts.append(f"not checked {', '.join(summary.profiles_not_checked)}")
    if summary.capabilities:
        parts.append(f"only where the engine works: {in_words(summary.capabilities)}")
    if summary.freedoms != STRICT:
        parts.append(f"with the freedoms {freedoms_in_words(summary.freedoms)}")
    return f"{'PASS' if summary.verdict == 'pass' else 'FAIL'}: {'; '.join(parts)}."


def print_coverage(
    console: Console, coverage: Sequence[CoverageLine], *, failed: bool, table: bool = True
) -> None:
    """Print how often each situation was visited, and what was missed.

    Parameters
    ----------
    console : Console
        Where to.
    coverage : sequence of CoverageLine
        What each driver's traces visited.
    failed : bool
        Whether a layout failed: coverage ends there, and no table is printed.
    table : bool
        Whether all situations are printed, and not only those that were missed.
    """
    console.print()
    if failed:
        console.print("Coverage ends where a layout failed; what was missed is in the JSON stream.")
        return
    if table:
        columns = [Column(_title(one), justify="right") for one in coverage]
        counts = Table("situation", *columns, box=None, pad_edge=False)
        for name in SITUATIONS:
            counts.add_row(name, *(_count(one, name) for one in coverage))
        console.print(counts)
        for one in coverage:
            console.print(_sizes(one))
    for one in coverage:
        lines = list(_coverage_text(one))
        print_lines(console, lines if table else lines[: bool(one.missed)])


def _sizes(coverage: CoverageLine) -> Table:
    """The table of sizes that one driver's traces had, and had not."""
    title = Column(Text.assemble("size (", _title(coverage), ")"))
    table = Table(title, "played, how often", "never", box=None, pad_edge=False)
    for dimension, counts in coverage.sizes.items():
        played = ", ".join(f"{size}: {count:,}" for size, count in counts.items() if count)
        never = ", ".join(size for size, count in counts.items() if not count)
        table.add_row(*(Text(shown(cell)) for cell in (dimension, played, never)))
    return table


def _title(coverage: CoverageLine) -> Text:
    return Text(shown(f"{coverage.engine} {coverage.driver}"))


def _count(coverage: CoverageLine, name: str) -> str:
    if name in coverage.impossible:
        return "[dim]impossible[/]"
    return f"{coverage.counts[name]:,}" if coverage.counts[name] else "[yellow]missed[/]"


def _coverage_text(coverage: CoverageLine) -> Iterator[str]:
    """Yield what the traces of a driver missed, and what they could not have met."""
    if coverage.missed:
        needs = {name: ", ".join(SITUATIONS[name]) for name in coverage.missed}
        names = [f"{name} ({need})" if need else name for name, need in needs.items()]
        driver = f"{coverage.engine} {coverage.driver}"
        yield f"Missed by the traces of {driver}: {'; '.join(names)}."
    lacking: dict[str, list[str]] = {}
    for name, need in coverage.impossible.items():
        lacking.setdefault(need, []).append(name)
    for need, names in lacking.items():
        yield f"Impossible there without {need}: {'; '.join(names)}."


# A failure


def replay_text(path: Path | str, engine: str, driver: str | None = None) -> list[str]:
    """Return where a failing trace is stored, and the command that plays it again.

    Parameters
    ----------
    path : Path or str
        Where the trace is stored.
    engine : str
        The engine's name.
    driver : str or None
        The driver's; None for what the engine needs.

    Returns
    -------
    list of str
        A line each.
    """
    if str(path) == "-":
        return ["The trace is in no file."]
    words = ["helix-conformance", "replay", str(path), "--engine", engine]
    words += ["--driver", driver] if driver else []
    place, command = shell_command(words[2:3]), shell_command(words)
    return [f"The trace is in {place}; replay it with:", f"  {command}"]


def failure_text(failure: Failure) -> Iterator[str]:
    """Yield a failure in lines: the trace, each violated invariant, expected and observed.

    Parameters
    ----------
    failure : Failure
        What is wrong, with the smallest trace that shows it.

    Yields
    ------
    str
        A line; the first is empty.
    """
    events = failure.trace.events
    if failure.event is None:
        where = "at the start" if not events else "at the end of the trace"
    else:
        where = f"at event {failure.event}, {event_text(events[failure.event])}"
    yield ""
    if failure.engine_failure is not None:
        yield f"{failure.engine_failure} {sentence('LIVE-1')}"
        if failure.trace.note.startswith("Traceback"):
            yield "  The traceback is in the file of the trace, as its note."
    else:
        numbers = ", ".join(dict.fromkeys(v.invariant for v in failure.violations))
        yield f"{numbers} violated {where}."
    declared = (failure.declared if isinstance(failure, FailureLine) else None) or PROFILES
    yield from (f"  {line}" for line in trace_text(failure.trace, declared))
    yield from circumstances(failure.trace)
    shown: set[str] = set()
    for violation in failure.violations:
        if violation.invariant not in shown:
            yield sentence(violation.invariant)
            shown.add(violation.invariant)
        ranks = "all ranks" if violation.rank is None else f"rank {violation.rank}"
        yield f"  {ranks}: {violation.message}"
        if violation.expected is not None or violation.observed is not None:
            yield f"    expected {value_text(violation.expected)}"
            yield f"    observed {value_text(violation.observed)}"


def circumstances(trace: Trace) -> Iterator[str]:
    """Yield how a trace has to be played to fail, where that is not the plainest way.

    Parameters
    ----------
    trace : Trace
        A trace made small: what does not matter is not in it.

    Yields
    ------
    str
        A sentence.

    Examples
    --------
    >>> from helix_spec.trace import Watch
    >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8)
    >>> list(circumstances(Trace(config=config, events=[], watch=Watch(twice=True))))
    ['It depends on when state is looked at: after every event, twice in a row.']
    """
    if trace.before:
        number = "a trace" if len(trace.before) == 1 else f"{len(trace.before)} traces"
        yield (
            f"It depends on earlier traces: the same engine objects have played {number} before, "
            "which the file holds."
        )
    if trace.times > 1:
        yield f"It is seen when the same objects play the trace {trace.times} times in a row."
    if trace.watch != EVERYTHING:
        watch = trace.watch
        rarely = "of the requests that an event names" if watch.touched else "in the end"
        when = (
            "after every event"
            if watch.every == 1
            else f"every {watch.every} events, else {rarely}"
        )
        again = ", twice in a row" if watch.twice else ""
        yield f"It depends on when state is looked at: {when}{again}."


def alike(failures: Iterable[FailureLine]) -> list[list[FailureLine]]:
    """Return failures in groups: those of a group are told by the same events and sentences.

    Parameters
    ----------
    failures : iterable of FailureLine
        Failures of any layouts and drivers.

    Returns
    -------
    list of lists
        Each in the order given; failures of different drivers are not alike.
    """
    groups: dict[str, list[FailureLine]] = {}
    for failure in failures:
        said = [(v.invariant, v.message, v.rank) for v in failure.violations]
        key = repr((failure.driver, failure.event, failure.engine_failure, said))
        groups.setdefault(key + repr(failure.trace.events), []).append(failure)
    return list(groups.values())


def value_text(value: Any) -> str:
    """Return a value of an answer as JSON, cut where it is long.

    Fractions are in six digits: what an error bound is about is said beside them.

    Parameters
    ----------
    value : object
        Anything that JSON can hold.

    Returns
    -------
    str
        One line; of an object the entries that are no lists come first.

    Examples
    --------
    >>> value_text({"output": [1 / 3, 2.0], "E": 1e-9})
    '{"E": 1e-09, "output": [0.333333, 2.0]}'
    """
    value = json.loads(encoded(value), parse_float=lambda digits: float(f"{float(digits):.6g}"))
    if isinstance(value, dict):
        value = dict(sorted(value.items(), key=lambda item: isinstance(item[1], list)))
    line = json.dumps(value, ensure_ascii=False)
    return line if len(line) <= 300 else line[:300] + " ..."


# A trace


def trace_text(trace: Trace, declared: Collection[str] = PROFILES) -> Iterator[str]:
    """Yield a trace in lines: configuration, events with refusals, the placement at the end.

    Parameters
    ----------
    trace : Trace
        Any trace; of one with a configuration that must be refused the reason is given. Pages and
        refusals are those that are right under its freedoms.
    declared : collection of str
        Profiles of the engine that it was played on.

    Yields
    ------
    str
        A line.
    """
    settings = "".join(f", {setting}" for setting in _set_apart(trace.config))
    yield f"{trace.config.layout}, pools of {trace.config.pages} pages{settings}"
    problem = config_problem(trace.config)
    if problem is not None:
        yield f"must be refused: {problem}"
        return
    if trace.freedoms != STRICT:
        yield f"on an engine with the freedoms {freedoms_in_words(trace.freedoms)}"
    recorder = Recorder(trace.config, declared, trace.freedoms)
    for index, event in enumerate(trace.events):
        reason = recorder.next(event).refused
        yield f"event {index}: {event_text(event)}" + (f" -> refused: {reason}" if reason else "")
    for group in trace.config.groups:
        window = "" if group.window is None else f", window {group.window}"
        yield f"cache group {group.name}: layers {group.layers}, {group.placement}{window}"
    shown = [(part.name, part.state) for part in recorder.groups] or [("", recorder.state)]
    for id in recorder.state.requests:
        yield ""
        for name, state in shown:
            t = state.model.layout.tokens_per_block
            yield from _placement_text(id, state.model.requests[id], t, name)


def _set_apart(config: Config) -> Iterator[str]:
    """Yield whatever is not the default, beside what every configuration says."""
    for part in (config, config.model):
        for field in msgspec.structs.fields(part):
            value = getattr(part, field.name)
            if field.name not in ("model", "seed") and field.default not in (NODEFAULT, value):
                yield f"{field.name}={value}"


def event_text(event: Event) -> str:
    """Return one event in a few words.

    Parameters
    ----------
    event : Event
        Any event; its fields that say nothing are left out.

    Returns
    -------
    str
        The event's name in lower case, and its fields.

    Examples
    --------
    >>> from helix_spec.events import Decode, Prefix
    >>> event_text(Decode([0, 1], [1, 1]))
    'decode ids=[0, 1] query_lens=[1, 1]'
    >>> event_text(Admit(1, 9, prefix=Prefix(of=0, len=8)))
    'admit id=1 prompt_len=9 prefix=8 tokens of 0'
    """
    fields = msgspec.structs.asdict(event)
    for name in ("pad", "chunk", "prefix", "salt"):
        if fields.get(name) in (0, None):
            fields.pop(name, None)
    if isinstance(event, Admit) and event.prefix is not None:
        fields["prefix"] = f"{event.prefix.len} tokens of {event.prefix.of}"
    if isinstance(event, Merge) and event.order == sorted(event.order):
        del fields["order"]
    given = " ".join(f"{name}={value}" for name, value in fields.items())
    return f"{type(event).__name__.lower()} {given}"


def _placement_text(id: int, request: Request, tokens_per_block: int, group: str) -> Iterator[str]:
    """Yield where one request's tokens are: one line for each rank, pages between bars."""
    state = ", preempted" if request.preempted else ""
    yield (
        f"request {id}{' in ' * bool(group)}{group}: {len(request.tokens)} tokens, "
        f"prompt of {request.prompt_len}, {request.steps} decoded{state}"
    )
    t = tokens_per_block
    for rank, (positions, table) in enumerate(zip(request.ranks, request.tables, strict=True)):
        left_out = range(SHOWN_PAGES, len(table) - SHOWN_PAGES)
        pages = [
            f"{_ranges(positions[i * t : (i + 1) * t])} "
            + ("(gone)" if page.number < 0 else f"(page {page.number})")
            for i, page in enumerate(table)
            if i not in left_out
        ]
        if left_out:
            pages.insert(SHOWN_PAGES, f"... {len(left_out)} pages ...")
        yield f"  rank {rank}, {len(positions)} tokens: " + (" | ".join(pages) or "-")


def _ranges(positions: Sequence[int]) -> str:
    """Return rising positions in few words: `0-3 8 12-13`; `-` for none."""
    index = count()
    runs = [list(run) for _, run in groupby(positions, lambda position: position - next(index))]
    return " ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs) or "-"
