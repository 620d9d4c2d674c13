"""The JSON stream of a run: line types, the writer, reading back, the published schema.

A run writes settings, then rows, failures and coverage as they are known, and a summary at last;
proofs and a mutation run are one line each. A file may hold several runs, one after another.
The format is published as `stream.schema.json` beside this file, generated from the types by
`python -m helix_conformance.report.stream`.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from hashlib import sha256
from pathlib import Path
from typing import Any, Final, Literal, TypeAlias, TypeVar
from weakref import finalize

import msgspec

from helix_conformance.foreign import shown_json, without_surrogates
from helix_conformance.judge.failure import Failure
from helix_spec.capabilities import STRICT, Box, Freedoms
from helix_spec.config import decode_layout, encode_layout, layout_schema
from helix_spec.engine import PROFILES
from helix_spec.events import MERGE, Merge
from helix_spec.invariants import NUMBERS, profiles_of
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace, dump_trace, trace_problem, unindented

SCHEMA_FILE: Final = "stream.schema.json"
MAX_FILE_BYTES: Final = 2**28
"""Of a stream that is read."""
CONFIRMED: Final = "confirmed"
"""The verdict of a theorem that holds."""

Verdict: TypeAlias = Literal["pass", "fail", "error"]


class StreamError(ValueError):
    """A file that is no stream of a run; the message names file, line and field."""


# The lines


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    pass


class Settings(_Line, frozen=True, kw_only=True, tag="settings"):
    """A run begins: everything that was set, and the machine."""

    format: Literal["helix-run/1"] = "helix-run/1"
    command: str
    """`run`, `replay` or `vectors check`; `check` of the Python API."""
    engine: str
    suite_version: str
    started: str
    """UTC, ISO 8601."""
    python: str
    machine: str
    options: dict[str, Any] = {}
    restrictions: list[str] = []
    """Why this run is a part of what the suite can do, a sentence each; none of a whole run."""


class Row(_Line, frozen=True, kw_only=True, tag="row"):
    """One line of the table: one layout, or one workload, through one driver."""

    layout: str
    engine: str
    driver: str
    cp_sizes: list[int]
    profiles: list[str]
    """Those that were checked."""
    declared: list[str] = []
    """Those that the engine declares."""
    settings: dict[str, str] = {}
    """What the engine says about how it is set up."""
    identifiers: list[str] = []
    """Every layout identifier that was played."""
    traces: int
    events: int
    vectors: int = 0
    """Shipped vectors that were played beside the random traces."""
    seconds: float
    verdict: Verdict
    known: list[str] = []
    """Expected failures of the engine that were met here, or were not run."""
    capabilities: list[Box] = []
    """Where the engine works, and nothing else was played; empty for everywhere."""
    freedoms: Freedoms = STRICT
    """In what the engine differs rightly."""


class FailureLine(Failure, _Line, frozen=True, kw_only=True, tag="failure"):
    """A failing row: the smallest failing trace and what is wrong there."""

    layout: str
    engine: str
    driver: str
    trace_file: str
    declared: list[str] = []


class KnownDifference(msgspec.Struct, frozen=True, kw_only=True):
    """One expected failure of the engine, and what became of it in the run."""

    kind: str
    does: str
    link: str
    status: str
    invariant: str | None = None
    profile: str | None = None
    reason: str | None = None
    layout: str | None = None


class CoverageLine(_Line, frozen=True, kw_only=True, tag="coverage"):
    """How often one driver's traces visited the situations that matter."""

    engine: str
    driver: str
    counts: dict[str, int]
    missed: list[str]
    """Situations that could have occurred and never did."""
    impossible: dict[str, str]
    """Situations that could not occur, with what it would have taken."""
    sizes: dict[str, dict[str, int]] = {}
    """How often each size worth drawing was played, by dimension; 0 for those that were not."""


class Summary(_Line, frozen=True, kw_only=True, tag="summary"):
    """A run ends. A run without this line was cut off."""

    engine: str
    verdict: Verdict
    layouts: list[str]
    profiles_checked: list[str]
    profiles_not_checked: list[str]
    traces: int
    events: int
    vectors: int = 0
    events_per_s: float | None
    known_differences: list[KnownDifference] = []
    """Expected failures (xfail) of the engine."""
    coverage: dict[str, int] = {}
    """How often each situation was visited, by the traces of all drivers."""
    missed: list[str] = []
    """Situations that no driver's traces visited, and some could have."""
    seed: int | None = None
    capabilities: list[Box] = []
    """Where the engine works, and nothing else was played; empty for everywhere."""
    freedoms: Freedoms = STRICT
    """In what the engine differs rightly."""


class Kill(msgspec.Struct, frozen=True):
    """A wrong formula, and the smallest values that refute it (null: nothing did)."""

    wrong: str
    refuted_by: dict[str, int | str] | None


class TheoremResult(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one theorem. `proves` are numbers of SPEC.md."""

    id: str
    proves: list[str] = []
    statement: str = ""
    method: Literal["z3", "crosshair"] = "z3"
    verdict: str
    seconds: float = 0.0
    witness: dict[str, int] = {}
    kills: list[Kill] = []


class ProofReport(msgspec.Struct, frozen=True):
    """The JSON form of `prove`. A run of some theorems alone is `partial`, never `pass`."""

    theorems: list[TheoremResult]
    verdict: Literal["pass", "fail", "partial"]
    problems: list[str]
    seconds: float


class Proofs(_Line, frozen=True, kw_only=True, tag="proofs"):
    """What `prove` found."""

    suite_version: str
    report: ProofReport


class MutantKill(msgspec.Struct, frozen=True):
    """What became of one wrong engine."""

    name: str
    source: str
    killed: bool
    """Whether the run failed and named one of the mutant's expected invariants."""
    by: list[str]
    """The invariants that the run named."""
    events: int
    """Events of the minimal trace."""
    examples: int
    """Traces until the one that was named so; without those by which it was made smaller."""
    seconds: float
    """Seconds until then."""
    failures: int = 1
    """Failures until then; those before the last one named other invariants."""


class MutationRun(_Line, frozen=True, kw_only=True, tag="zoo"):
    """What `zoo` found: the wrong engines, and what unmutated ones were wrongly named for."""

    suite_version: str
    tier: str
    seed: int
    score: str
    mutants: list[MutantKill]
    controls: dict[str, list[str]]

    @property
    def clean(self) -> bool:
        """Whether every wrong engine was caught by name, and no correct one."""
        return all(kill.killed for kill in self.mutants) and not any(self.controls.values())


Line: TypeAlias = Settings | Row | FailureLine | CoverageLine | Summary | Proofs | MutationRun
Kind = TypeVar("Kind", bound=Line)


# Writing


class Stream:
    """The writer of a run's JSON lines.

    Parameters
    ----------
    path : Path or None
        The file, which is emptied, and is this run's until its summary is written; without one the
        lines go nowhere.

    Attributes
    ----------
    lines : list of Line
        All lines so far.
    problem : str or None
        Why lines are missing in the file, as a sentence.

    Raises
    ------
    StreamError
        When the file cannot be written, or another run writes it.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.path = path
        self.lines: list[Line] = []
        self.problem: str | None = None
        self.file: int | None = None
        """Descriptor of the file, while it is open."""
        if path is not None:
            self.file = _opened(path)
            self.close = finalize(self, os.close, self.file)

    def write(self, line: Line) -> None:
        """Write one line, to disk at once: a run that is cut off leaves what it knew.

        Parameters
        ----------
        line : Line
            Any line of the stream.
        """
        self.lines.append(line)
        if self.file is not None:
            try:
                _write(self.file, encode_line(line))
            except OSError as error:
                self.problem = f"{self.path} is not whole: {error.strerror}."
            if self.problem or isinstance(line, Summary):
                self.file = None
                self.close()

    def of(self, kind: type[Kind]) -> list[Kind]:
        """Return the lines so far that are of one type.

        Parameters
        ----------
        kind : type
            Such as `Row`.

        Returns
        -------
        list of kind
            In the order in which they were written.
        """
        return [line for line in self.lines if isinstance(line, kind)]


def restrictions(options: Mapping[str, Any], examples: int) -> list[str]:
    """Return why a run with these options is not a whole one.

    Parameters
    ----------
    options : mapping
        Those of `run`: layouts, cp_sizes, asked (profiles), examples, workload.
    examples : int
        Random traces that a whole run plays of each layout.

    Returns
    -------
    list of str
        A sentence each; none for a whole run.
    """
    named, fewer = list(dict.fromkeys(options["layouts"])), options["examples"]
    found = []
    if options["workload"]:
        found.append("A workload was replayed; no random traces were played.")
    elif options.get("soak"):
        found.append("One long trace was played; no random traces were.")
    elif named and len(named) < len(LAYOUT_NAMES):
        of = f"{len(named)} of {len(LAYOUT_NAMES)}"
        found.append(f"Only {of} layouts were played: {', '.join(named)}.")
    some = {"cp_size was played": options["cp_sizes"], "profile was asked for": options["asked"]}
    found += [f"Not every {what}, but {', '.join(map(str, v))}." for what, v in some.items() if v]
    if fewer and fewer < examples:
        whole = f"a whole run plays {examples}"
        found.append(f"Only {fewer} random traces were played of each layout; {whole}.")
    return found


def save_trace(folder: Path, name: str, trace: Trace, *, apart: bool = False) -> Path:
    """Write a failing trace.

    Parameters
    ----------
    folder : Path
        Where it goes; the folder is made.
    name : str
        What failed, such as a layout and a driver: it names the file.
    trace : Trace
        The trace.
    apart : bool
        Whether the file's name ends with a digest, so that no other trace's file is overwritten.

    Returns
    -------
    Path
        The file.
    """
    folder.mkdir(parents=True, exist_ok=True)
    data = dump_trace(trace)
    digest = f"-{sha256(data).hexdigest()[:8]}" if apart else ""
    path = folder / f"{re.sub('[/:]', '-', name)}{digest}.json"
    try:
        path.write_bytes(data)
    except OSError:
        with suppress(OSError):
            path.unlink()  # a part of a trace is none, and the next run would read it
        raise
    return path


def encode_line(line: Line) -> bytes:
    """Return the JSON of a line.

    Parameters
    ----------
    line : Line
        Any line of the stream.

    Returns
    -------
    bytes
        UTF-8, its line feed included.
    """
    return shown_json(encoded(line)) + b"\n"


def encoded(value: object) -> bytes:
    """Return the JSON of a line or a view; what no UTF-8 can hold is in it as an escape.

    Parameters
    ----------
    value : object
        Anything that msgspec encodes; texts may hold lone surrogates.
    """
    try:
        return msgspec.json.encode(value, enc_hook=encode_layout)
    except UnicodeEncodeError:
        plain = msgspec.to_builtins(value, enc_hook=encode_layout, str_keys=True)
        return msgspec.json.encode(without_surrogates(plain))


def append_line(path: Path, line: Line) -> None:
    """Write one line at the end of a stream.

    Parameters
    ----------
    path : Path
        The stream's file, which is made when it is not there.
    line : Line
        Any line of the stream.
    """
    with path.open("ab") as file:
        file.write(encode_line(line))


def _opened(path: Path) -> int:
    """Open a stream's file for one run alone. Raises StreamError."""
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    except OSError as error:
        raise StreamError(f"{path}: cannot be written: {error.strerror}.") from error
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        raise StreamError(f"{path}: another run writes this file; give each its own.") from None
    except OSError:
        pass  # a file system, or a kind of file, without locks
    with suppress(OSError):  # a pipe has nothing to empty
        os.ftruncate(file, 0)
    return file


def _write(file: int, data: bytes) -> None:
    while data:
        data = data[os.write(file, data) :]


# Reading back


State: TypeAlias = Literal["pass", "fail", "error", "unsettled", "not checked", "not declared"]
"""What a row says of one profile."""

_BROKEN: Final = "died, timed out or gave a malformed answer"


class Run(msgspec.Struct):
    """The lines of one run."""

    settings: Settings
    rows: list[Row] = []
    failures: list[FailureLine] = []
    coverage: list[CoverageLine] = []
    summary: Summary | None = None

    @property
    def verdict(self) -> Verdict:
        """The summary's; `error` of a run that was cut off."""
        return "error" if self.summary is None else self.summary.verdict

    @property
    def by_layout(self) -> dict[str, list[Row]]:
        """The rows of each layout, in the order in which layouts were first played."""
        found: dict[str, list[Row]] = {}
        for row in self.rows:
            found.setdefault(row.layout, []).append(row)
        return found

    @property
    def shortcomings(self) -> list[str]:
        """Why it is not a whole run, a sentence each; none when it is."""
        found = list(self.settings.restrictions)
        if self.summary is None:
            found.append("The run was cut off: it has no summary line.")
        elif self.summary.verdict == "error":
            found.append(f"The run ended in an error: an engine {_BROKEN}.")
        found = found or self._layouts_left_out()
        for layout, rows in self.by_layout.items():
            checked = {profile for row in rows for profile in row.profiles}
            left_out = [p for row in rows for p in row.declared if p not in checked]
            if left_out and not any(row.known for row in rows):
                names = ", ".join(dict.fromkeys(left_out))
                found.append(f"Of layout {layout} declared profiles were not checked: {names}.")
        return found

    def _layouts_left_out(self) -> list[str]:
        """Layouts that were not played, though no option and no expected failure says why."""
        known = [] if self.summary is None else self.summary.known_differences
        excused = {entry.layout for entry in known if entry.kind == "must_not_run"}
        missing = [name for name in LAYOUT_NAMES if name not in excused | set(self.by_layout)]
        if not self.rows:
            return ["No layout was played."]
        return [f"Layouts that were not played: {', '.join(missing)}."] if missing else []

    def failure_of(self, row: Row) -> FailureLine | None:
        """Return the first failure of a row.

        Parameters
        ----------
        row : Row
            One of this run's.

        Returns
        -------
        FailureLine or None
            None of a row that passes.
        """
        key = (row.layout, row.engine, row.driver)
        return next((f for f in self.failures if (f.layout, f.engine, f.driver) == key), None)

    def profile_states(self, row: Row) -> dict[str, tuple[State, str]]:
        """Return what a row says of each profile.

        A failure settles the profiles that its invariants belong to; of the others a row that
        ended there says nothing.

        Parameters
        ----------
        row : Row
            One of this run's.

        Returns
        -------
        dict of str to (State, str)
            Of each profile, in the order of `PROFILES`, its state and why it is so.
        """
        failure = self.failure_of(row)
        named = set() if failure is None else {v.invariant for v in failure.violations}
        to_blame = {p for number in named for p in profiles_of(number)} & set(row.profiles)
        if failure is not None and failure.event is not None:
            merging = isinstance(failure.trace.events[failure.event], Merge)
            to_blame = {p for p in to_blame if (p == MERGE) == merging} or to_blame

        def state(profile: str) -> tuple[State, str]:
            if profile not in row.profiles:
                if profile in row.declared:
                    return "not checked", "the engine declares it; this run did not check it"
                return "not declared", "the engine does not declare it"
            if row.verdict == "pass":
                return "pass", f"{row.traces} traces, {row.events} events"
            if row.verdict == "error":
                return "error", f"the engine {_BROKEN}"
            if profile in to_blame or not to_blame:
                return "fail", ", ".join(sorted(named))
            return "unsettled", "the run of this layout ended at a failure of another profile"

        return {profile: state(profile) for profile in PROFILES}


class Record:
    """Everything that a file, or several, holds.

    Parameters
    ----------
    lines : iterable of Line
        The lines in their order.

    Attributes
    ----------
    runs : list of Run
        All runs.
    proofs : Proofs or None
        The last proofs.
    zoo : MutationRun or None
        The last mutation run.

    Raises
    ------
    StreamError
        When a line stands outside a run.
    """

    def __init__(self, lines: Iterable[Line]) -> None:
        self.runs: list[Run] = []
        self.proofs: Proofs | None = None
        self.zoo: MutationRun | None = None
        for line in lines:
            if isinstance(line, Settings):
                self.runs.append(Run(line))
            elif isinstance(line, Proofs):
                self.proofs = line
            elif isinstance(line, MutationRun):
                self.zoo = line
            elif not self.runs or self.runs[-1].summary is not None:
                kind = type(line).__name__
                raise StreamError(f"a {kind} stands outside a run, which is settings first")
            elif isinstance(line, Row):
                self.runs[-1].rows.append(line)
            elif isinstance(line, FailureLine):
                self.runs[-1].failures.append(line)
            elif isinstance(line, CoverageLine):
                self.runs[-1].coverage.append(line)
            else:
                self.runs[-1].summary = line

    @property
    def problems(self) -> list[str]:
        """What is wrong, a sentence each: failures, errors, missing ends; none when all is well."""
        found = []
        for run in self.runs:
            engine, rows = run.settings.engine, [row for row in run.rows if row.verdict != "pass"]
            if rows:
                failing = "; ".join(f"{row.layout} ({row.driver}): {row.verdict}" for row in rows)
                found.append(f"Engine {engine} is failing on {failing}.")
            elif run.verdict == "fail":
                found.append(f"The expected failures (xfail) of {engine} are no longer true.")
            if run.summary is None:
                found.append(f"A run of {engine} was cut off: it has no summary line.")
        if self.proofs is not None and self.proofs.report.verdict == "fail":
            found.append(f"Proofs are missing: {'; '.join(self.proofs.report.problems)}.")
        if self.zoo is not None and not self.zoo.clean:
            score = self.zoo.score
            found.append(f"The mutation score is {score}, or an unmutated engine was named.")
        return found

    @property
    def shortcomings(self) -> list[str]:
        """Why this is not the whole picture, a sentence each; none when a run is whole."""
        if not self.runs:
            return ["There is no run of an engine in this stream."]
        of_runs = [run.shortcomings for run in self.runs]
        found = [sentence for one in of_runs for sentence in one] if all(of_runs) else []
        if self.proofs is not None and self.proofs.report.verdict == "partial":
            found.append("The proofs are those of some theorems alone.")
        return list(dict.fromkeys(found))

    @property
    def verdict(self) -> Verdict | Literal["partial"]:
        """That of everything here: `pass` only of a whole run without a problem."""
        if any(run.verdict == "error" for run in self.runs):
            return "error"
        if self.problems:
            return "fail"
        return "partial" if self.shortcomings else "pass"


_DECODER = msgspec.json.Decoder(Line, dec_hook=decode_layout)


def read_stream(paths: Sequence[Path]) -> Record:
    """Return what files hold, one after another.

    A last line that breaks off is left out: its run has no summary then.

    Parameters
    ----------
    paths : sequence of Path
        Files of JSON lines.

    Returns
    -------
    Record
        All runs, the last proofs and the last mutation run.

    Raises
    ------
    StreamError
        When a file is no stream; the message names file, line and field.
    """
    lines = [line for path in paths for line in _read(path)]
    try:
        if not lines:
            raise StreamError("there is no run, no proof and no mutation run in it")
        return Record(lines)
    except StreamError as error:
        raise StreamError(f"{', '.join(map(str, paths))}: {error}.") from error


def _read(path: Path) -> Iterator[Line]:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
    except OSError as error:
        raise StreamError(f"{path}: cannot be read: {error.strerror}.") from error
    if len(data) > MAX_FILE_BYTES:
        raise StreamError(f"{path}: is too large; a stream has at most {MAX_FILE_BYTES} bytes.")
    raw = data.splitlines(keepends=True)
    for number, text in enumerate(raw, 1):
        try:
            if text.strip():
                yield _checked(_DECODER.decode(text))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, StreamError) as error:
            cut_off = number == len(raw) and not text.endswith(b"\n")
            if cut_off and not isinstance(error, (msgspec.ValidationError, StreamError)):
                return
            raise StreamError(f"{path}, line {number}: {error}.") from error


def _checked(line: Line) -> Line:
    """Return the line, when what it refers to is there. Raises StreamError."""
    if isinstance(line, FailureLine):
        problem = trace_problem(line.trace)
        if problem is not None:
            raise StreamError(f"in its trace, field {problem[0]}: {problem[1].rstrip('.')}")
        events = len(line.trace.events)
        if line.event is not None and not 0 <= line.event < events:
            raise StreamError(f"event is {line.event}, and its trace has {events} events")
        unknown = {v.invariant for v in line.violations} - set(NUMBERS)
        if unknown:
            raise StreamError(f"{min(unknown)!r} is no number of an invariant")
    return line


# The schema


def stream_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one line, generated from the types.

    Returns
    -------
    dict
        Of a trace it says no more than that `trace.schema.json` of helix_spec does.
    """
    schema: dict[str, Any] = unindented(msgspec.json.schema(Line, schema_hook=layout_schema))
    types = schema["$defs"]
    types["Trace"] = {"type": "object", "description": "See trace.schema.json of helix_spec."}
    # The types that only a trace refers to are left out.
    named, unread = set[str](), [schema["anyOf"]]
    while unread:
        new = set(re.findall(r'"#/\$defs/([^"]+)"', json.dumps(unread.pop()))) - named
        named |= new
        unread += [types[name] for name in new]
    schema["$defs"] = {name: types[name] for name in types if name in named}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


if __name__ == "__main__":
    target = Path(__file__).with_name(SCHEMA_FILE)
    target.write_text(json.dumps(stream_schema(), indent=1) + "\n")
    print(f"wrote {target}")
