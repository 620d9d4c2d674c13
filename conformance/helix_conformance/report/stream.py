"""The JSON stream of a run: its lines as types, their published schema, and reading them back.

A run writes settings, then rows, failures and coverage as they are known, and a summary at last;
proofs and a mutation run are one line each. A file may hold several runs, one after another.
The form is published as `stream.schema.json` beside this file, generated from the types by
`python -m helix_conformance.report.stream`.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal, TypeAlias

import msgspec

from helix_conformance.drive.driver import Answer
from helix_conformance.judge.failure import Violation
from helix_conformance.judge.xfail import LAYOUTS
from helix_conformance.prove import Report as ProofReport
from helix_spec.config import decode_layout, encode_layout, layout_schema
from helix_spec.invariants import NUMBERS
from helix_spec.trace import Trace, unindented

Verdict: TypeAlias = Literal["pass", "fail", "error"]


class StreamError(ValueError):
    """A file that is no stream of a run; the message names file, line and field."""


class _Line(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="kind"):
    pass


class Settings(_Line, frozen=True, kw_only=True, tag="settings"):
    """A run begins: everything that was set, and the machine."""

    format: Literal["helix-run/1"] = "helix-run/1"
    command: str
    """`run` or `replay`."""
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
    seconds: float
    verdict: Verdict
    known: list[str] = []
    """Known differences of the engine that showed here, or were not run."""


class FailureLine(_Line, frozen=True, kw_only=True, tag="failure"):
    """A red row: the smallest failing trace and what is wrong there."""

    layout: str
    engine: str
    driver: str
    event: int | None
    """Index of the event that was answered wrongly; null at start or at the end."""
    violations: list[Violation] = []
    engine_failure: str | None = None
    """How an engine died, hung or answered garbage (LIVE-1)."""
    rank: int | None = None
    """The rank that did."""
    trace: Trace
    trace_file: str
    declared: list[str] = []
    answers: list[Answer] = []
    """What each rank answered to that event, outputs and cached rows left out."""


class KnownDifference(msgspec.Struct, frozen=True, kw_only=True):
    """One entry of the engine's ledger, and what became of it in the run."""

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


class Summary(_Line, frozen=True, kw_only=True, tag="summary"):
    """A run ends. A run without this line was cut off."""

    engine: str
    verdict: Verdict
    layouts: list[str]
    profiles_checked: list[str]
    profiles_not_checked: list[str]
    traces: int
    events: int
    events_per_s: float | None
    known_differences: list[KnownDifference] = []
    coverage: dict[str, int] = {}
    """How often each situation was visited, by the traces of all drivers."""
    missed: list[str] = []
    """Situations that no driver's traces visited, and some could have."""
    seed: int | None = None


class Proofs(_Line, frozen=True, kw_only=True, tag="proofs"):
    """What `prove` found."""

    suite_version: str
    report: ProofReport


class MutantKill(msgspec.Struct, frozen=True):
    """What became of one wrong engine."""

    name: str
    source: str
    killed: bool
    """Whether the run failed and named an invariant that is expected of this mutant."""
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
        """Whether every wrong engine was caught by name, and no right one."""
        return all(kill.killed for kill in self.mutants) and not any(self.controls.values())


Line: TypeAlias = Settings | Row | FailureLine | CoverageLine | Summary | Proofs | MutationRun


class Run:
    """The lines of one run."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.rows: list[Row] = []
        self.failures: list[FailureLine] = []
        self.coverage: list[CoverageLine] = []
        self.summary: Summary | None = None

    @property
    def verdict(self) -> Verdict:
        """The summary's; `error` of a run that was cut off."""
        return "error" if self.summary is None else self.summary.verdict

    @property
    def shortcomings(self) -> list[str]:
        """Why it is not a whole run, a sentence each; none when it is."""
        found = list(self.settings.restrictions)
        if self.summary is None:
            found.append("The run was cut off: it has no summary line.")
        elif self.summary.verdict == "error":
            found.append("The run ended in an error: an engine died, hung or answered garbage.")
        if not found:
            found += self._layouts_left_out()
        by_layout: dict[str, list[Row]] = {}
        for row in self.rows:
            by_layout.setdefault(row.layout, []).append(row)
        for layout, rows in by_layout.items():
            checked = {profile for row in rows for profile in row.profiles}
            left_out = [p for row in rows for p in row.declared if p not in checked]
            if left_out and not any(row.known for row in rows):
                names = ", ".join(dict.fromkeys(left_out))
                found.append(f"Of layout {layout} declared profiles were not checked: {names}.")
        return found

    def _layouts_left_out(self) -> list[str]:
        """Layouts that were not played, though nothing that was set or is known says why."""
        known = [] if self.summary is None else self.summary.known_differences
        excused = {entry.layout for entry in known if entry.kind == "must_not_run"}
        played = {row.layout for row in self.rows}
        missing = [name for name in LAYOUTS if name not in played | excused]
        if not self.rows:
            return ["No layout was played."]
        return [f"Layouts that were not played: {', '.join(missing)}."] if missing else []


class Record:
    """Everything that a file, or several, told: the runs, and the last proofs and mutation run."""

    def __init__(self, lines: Iterable[Line]) -> None:
        self.runs: list[Run] = []
        self.proofs: Proofs | None = None
        self.zoo: MutationRun | None = None
        for line in lines:
            self._take(line)

    def _take(self, line: Line) -> None:
        if isinstance(line, Settings):
            self.runs.append(Run(line))
        elif isinstance(line, Proofs):
            self.proofs = line
        elif isinstance(line, MutationRun):
            self.zoo = line
        elif not self.runs or self.runs[-1].summary is not None:
            raise StreamError(
                f"a {type(line).__name__} stands outside a run, which is settings first"
            )
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
            red = [
                f"{row.layout} ({row.driver}): {row.verdict}"
                for row in run.rows
                if row.verdict != "pass"
            ]
            if red:
                found.append(f"Engine {run.settings.engine} is red on {'; '.join(red)}.")
            elif run.verdict == "fail":
                found.append(f"The ledger of {run.settings.engine} is no longer true.")
            if run.summary is None:
                found.append(f"A run of {run.settings.engine} was cut off: it has no summary line.")
        if self.proofs is not None and self.proofs.report.verdict == "fail":
            found.append(f"Proofs are missing: {'; '.join(self.proofs.report.problems)}.")
        if self.zoo is not None and not self.zoo.clean:
            found.append(f"The zoo's score is {self.zoo.score}, or an unmutated engine was named.")
        return found

    @property
    def shortcomings(self) -> list[str]:
        """Why this is not the whole picture, a sentence each; none when a run is whole."""
        if not self.runs:
            return ["There is no run of an engine in this stream."]
        found = (
            []
            if any(not run.shortcomings for run in self.runs)
            else [sentence for run in self.runs for sentence in run.shortcomings]
        )
        if self.proofs is not None and self.proofs.report.verdict == "partial":
            found.append("The proofs are those of some theorems alone.")
        return list(dict.fromkeys(found))


def encode_line(line: Line) -> bytes:
    """The JSON of a line, its end included."""
    return msgspec.json.encode(line, enc_hook=encode_layout) + b"\n"


def append_line(path: Path, line: Line) -> None:
    """One line at the end of a stream."""
    with path.open("ab") as file:
        file.write(encode_line(line))


_DECODER = msgspec.json.Decoder(Line, dec_hook=decode_layout)


def read_stream(paths: Iterable[Path]) -> Record:
    """What these files hold, one after another.

    A last line that breaks off is left out: its run has no summary then. Raises StreamError,
    naming file, line and field.
    """
    lines: list[Line] = []
    for path in paths:
        try:
            raw = path.read_bytes().splitlines(keepends=True)
        except OSError as error:
            raise StreamError(f"{path}: cannot be read: {error.strerror}.") from error
        for number, text in enumerate(raw, 1):
            if not text.strip():
                continue
            try:
                lines.append(_sound(_DECODER.decode(text)))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError, StreamError) as error:
                whole = isinstance(error, (msgspec.ValidationError, StreamError)) or text.endswith(
                    b"\n"
                )
                if not whole and number == len(raw):
                    break
                raise StreamError(f"{path}, line {number}: {error}.") from error
    try:
        return Record(lines)
    except StreamError as error:
        raise StreamError(f"{', '.join(map(str, paths))}: {error}.") from error


def _sound(line: Line) -> Line:
    """The line, when what it refers to is there. Raises StreamError."""
    if isinstance(line, FailureLine):
        events = len(line.trace.events)
        if line.event is not None and not 0 <= line.event < events:
            raise StreamError(f"event is {line.event}, and its trace has {events} events")
        unknown = {v.invariant for v in line.violations} - set(NUMBERS)
        if unknown:
            raise StreamError(f"{min(unknown)!r} is no number of an invariant")
    return line


def stream_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of one line, generated from the types.

    Of a trace it says no more than that `trace.schema.json` of helix_spec does.
    """
    schema: dict[str, Any] = unindented(msgspec.json.schema(Line, schema_hook=layout_schema))
    types = schema["$defs"]
    types["Trace"] = {"type": "object", "description": "See trace.schema.json of helix_spec."}
    named = _named({"anyOf": schema["anyOf"]}, types, set())
    schema["$defs"] = {name: types[name] for name in types if name in named}
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def _named(node: Any, types: dict[str, Any], found: set[str]) -> set[str]:
    """The types that a part of a schema refers to, and those that they refer to."""
    if isinstance(node, dict):
        name = str(node.get("$ref", "")).rpartition("/")[2]
        if name and name not in found:
            found.add(name)
            _named(types[name], types, found)
    for child in (
        node.values() if isinstance(node, dict) else node if isinstance(node, list) else ()
    ):
        _named(child, types, found)
    return found


def published_schema() -> dict[str, Any]:
    """The JSON Schema as it is shipped with this package."""
    text = files("helix_conformance.report").joinpath(SCHEMA_FILE).read_text("utf-8")
    schema: dict[str, Any] = json.loads(text)
    return schema


SCHEMA_FILE = "stream.schema.json"

if __name__ == "__main__":
    target = Path(__file__).with_name(SCHEMA_FILE)
    target.write_text(json.dumps(stream_schema(), indent=1) + "\n")
    print(f"wrote {target}")
