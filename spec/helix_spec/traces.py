"""A trace: a configuration and the events that follow, with its JSON form and schema.

The form is published as `trace.schema.json` beside this file, generated from the types by
`python -m helix_spec.traces`.
"""

from __future__ import annotations

import json
import re
from contextlib import suppress
from importlib.resources import files
from inspect import cleandoc
from pathlib import Path
from typing import Any, Literal

import msgspec

from helix_spec.configs import Config, config_problem
from helix_spec.events import Event, Merge
from helix_spec.layouts import LayoutError


class TraceError(ValueError):
    """A file that is not a trace; the message names file, line and field."""


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A reproducible run: what the engines are started with, and the events in order."""

    format: Literal["helix-trace/1"] = "helix-trace/1"
    note: str = ""
    config: Config
    events: list[Event]


def dump_trace(trace: Trace) -> bytes:
    """The JSON form, one event a line."""
    head = msgspec.to_builtins(trace)
    events = ",\n    ".join(json.dumps(event) for event in head.pop("events"))
    text = json.dumps(head, indent=2)[: -len("\n}")]
    return f'{text},\n  "events": [\n    {events}\n  ]\n}}\n'.encode()


def load_trace(path: Path) -> Trace:
    """The trace in a file.

    Raises TraceError, naming file, line and field, when the file is no trace, or when it has
    events and no engine may start with its configuration. Without events it may say that.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        trace = msgspec.json.decode(data, type=Trace)
    except msgspec.ValidationError as error:
        message, _, field = str(error).partition(" - at ")
        field = field.strip("`") or "$"
        line = line_of(data.decode(errors="replace"), field)
        raise TraceError(f"{path}, line {line}, field {field}: {message}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        byte = re.search(r"\(byte (\d+)\)", str(error))
        line = data.count(b"\n", 0, int(byte[1]) if byte else len(data)) + 1
        raise TraceError(f"{path}, line {line}: {error}.") from error
    problem = config_problem(trace.config)
    if problem is not None and (trace.events or not _names_a_layout(trace.config)):
        line = line_of(data.decode(), "$.config")
        raise TraceError(f"{path}, line {line}, field $.config: {problem}")
    for index, event in enumerate(trace.events):
        if isinstance(event, Merge) and len(event.levels) != trace.config.rules.cp_size:
            field = f"$.events[{index}].levels"
            raise TraceError(
                f"{path}, line {line_of(data.decode(), field)}, field {field}: there are "
                f"{len(event.levels)} partials; there must be one for each of the "
                f"{trace.config.rules.cp_size} cp_ranks."
            )
    return trace


def _names_a_layout(config: Config) -> bool:
    try:
        config.rules  # noqa: B018
    except LayoutError:
        return False
    return True


def line_of(text: str, field: str) -> int:
    """Line of a JSON text on which the value at a path such as `$.events[3].kept` begins.

    A path that leaves the document (a required field that is missing) ends at its last part
    that exists.
    """
    at = _skip_space(text, 0)
    for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", field):
        inside = _members(text, at)
        found = inside.get(name or int(index))
        if found is None:
            break
        at = found
    return text.count("\n", 0, at) + 1


def _members(text: str, at: int) -> dict[str | int, int]:
    """Where each member of the object or array that begins at `at` has its value.

    What follows the fault that is being reported may be no JSON: the members before it count.
    """
    decoder = json.JSONDecoder()
    found: dict[str | int, int] = {}
    is_object, at = text[at : at + 1] == "{", _skip_space(text, at + 1)
    with suppress(ValueError, IndexError, RecursionError):
        while text[at] not in "]}":
            key: Any = len(found)
            if is_object:
                key, at = decoder.raw_decode(text, at)
                if not isinstance(key, str):
                    break
                at = _skip_space(text, _skip_space(text, at) + 1)
            found[key] = at
            _, at = decoder.raw_decode(text, at)
            at = _skip_space(text, at)
            if text[at] == ",":
                at = _skip_space(text, at + 1)
    return found


def _skip_space(text: str, at: int) -> int:
    while at < len(text) and text[at] in " \t\r\n":
        at += 1
    return at


def trace_schema() -> dict[str, Any]:
    """The JSON Schema (2020-12) of a trace, generated from the types."""
    schema: dict[str, Any] = unindented(msgspec.json.schema(Trace))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def unindented(node: Any) -> Any:
    """The schema with its descriptions unindented, as Python 3.13 does by itself."""
    if isinstance(node, dict):
        return {
            key: cleandoc(value) if key == "description" else unindented(value)
            for key, value in node.items()
        }
    return [unindented(item) for item in node] if isinstance(node, list) else node


def published_schema() -> dict[str, Any]:
    """The JSON Schema as it is shipped with this package."""
    schema: dict[str, Any] = json.loads(files("helix_spec").joinpath(SCHEMA_FILE).read_text())
    return schema


SCHEMA_FILE = "trace.schema.json"

if __name__ == "__main__":
    target = Path(__file__).with_name(SCHEMA_FILE)
    target.write_text(json.dumps(trace_schema(), indent=1) + "\n")
    print(f"wrote {target}")
