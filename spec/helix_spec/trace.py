"""A trace: a configuration, the events that follow, and how they are played; its JSON form.

The form is published as `trace.schema.json` beside this file, generated from the types by
`python -m helix_spec.trace`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from inspect import cleandoc
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import msgspec

from helix_spec.capabilities import STRICT, Freedoms
from helix_spec.config import (
    Config,
    config_problem,
    decode_layout,
    encode_layout,
    layout_schema,
)
from helix_spec.events import Admit, Decode, Event, Fork, Merge, Release, Skip

MAX_RANKS: Final = 2**12
MAX_PAGES: Final = 2**23
MAX_TOKENS: Final = 2**23
MAX_NUMBERS: Final = 2**28
MAX_REQUESTS: Final = 2**12
"""The most that a file may ask for: ranks; pages in all pools; tokens of all requests at one time;
numbers of Q, K and V in a page; requests at one time. The reference keeps a list of all pages, and
of all tokens, a piece of a prompt as one, and what is shown or looked at grows with them."""


class TraceError(ValueError):
    """A file that is no trace; the message names file, line and field."""


class Watch(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """How often state is looked at: everything every `every` events and at the end.

    Attributes
    ----------
    every : int
        Events from one look at everything to the next, at least 1.
    touched : bool
        Whether, in between, the requests are looked at that an event names.
    twice : bool
        Whether each look is taken twice in a row; the second one counts.

    Examples
    --------
    >>> [Watch(3).whole(index) for index in range(6)]
    [False, False, True, False, False, True]
    """

    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    touched: bool = True
    twice: bool = False

    def whole(self, index: int) -> bool:
        """Return whether everything is looked at after the event with this index."""
        return (index + 1) % self.every == 0

    def looks(self, index: int) -> bool:
        """Return whether anything is looked at after the event with this index."""
        return self.touched or self.whole(index)


EVERYTHING: Final = Watch()
"""All state is looked at after every event."""


class Earlier(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What ranks have played before: its answers are not judged."""

    config: Config
    events: list[Event]


class Trace(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """A reproducible run: what the engines are started with, and the events in order.

    The last four fields say how they are played, where a failure or what it shows may depend on it.
    """

    format: Literal["helix-trace/2", "helix-trace/1"] = "helix-trace/2"
    note: str = ""
    config: Config
    events: list[Event]
    watch: Watch = EVERYTHING
    before: list[Earlier] = []
    """Traces that the same objects of the engine have played before, each started anew."""
    times: Annotated[int, msgspec.Meta(ge=1, le=100)] = 1
    """How often it is played in a row by the same objects: every time with the same bits."""
    freedoms: Freedoms = STRICT
    """Those of the engine on which it was played: they say which pages and refusals were right."""


def dump_trace(trace: Trace) -> bytes:
    """Return the JSON form of a trace, one event a line, encoded as UTF-8.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8)
    >>> print(dump_trace(Trace(config=config, events=[Admit(0, 5)])).decode().splitlines()[-3])
        {"event": "admit", "id": 0, "prompt_len": 5}
    """
    head = msgspec.to_builtins(trace, enc_hook=encode_layout)
    lists = {name: map(json.dumps, head.pop(name)) for name in ("before", "events")}
    usual = {"watch": {}, "times": 1, "freedoms": msgspec.to_builtins(STRICT)}
    head = {name: value for name, value in head.items() if value != usual.get(name)}
    text = json.dumps(head, indent=2)[: -len("\n}")]
    for name, lines in lists.items():
        joined = ",\n    ".join(lines)
        if name == "events" or joined:
            text += f',\n  "{name}": [\n    {joined}\n  ]'
    return f"{text}\n}}\n".encode()


def load_trace(path: Path) -> Trace:
    """Return the trace in a file.

    Parameters
    ----------
    path
        A file of format `helix-trace/2`, or `helix-trace/1`.

    Raises
    ------
    TraceError
        When the file cannot be read or is no trace, when it asks for more than fits in memory,
        or when it has events and no engine may start with its configuration. (Without events it
        may be a test of that refusal.) The message names file, line and field.

    Examples
    --------
    >>> load_trace(Path("absent.json"))
    Traceback (most recent call last):
    helix_spec.trace.TraceError: absent.json: cannot be read: No such file or directory.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise TraceError(f"{path}: cannot be read: {error.strerror}.") from error
    try:
        trace = msgspec.json.decode(data, type=Trace, dec_hook=decode_layout)
    except msgspec.ValidationError as error:
        message, _, field = str(error).partition(" - at ")
        field = field.strip("`") or "$"
        line = line_of(data.decode(errors="replace"), field)
        raise TraceError(f"{path}, line {line}, field {field}: {message.rstrip('.')}.") from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        byte = re.search(r"\(byte (\d+)\)", str(error))
        line = data.count(b"\n", 0, int(byte[1]) if byte else len(data)) + 1
        raise TraceError(f"{path}, line {line}: {error}.") from error
    problem = trace_problem(trace)
    if problem is not None:
        field, what = problem
        line = line_of(data.decode(), field)
        raise TraceError(f"{path}, line {line}, field {field}: {what}")
    return trace


def trace_problem(trace: Trace) -> tuple[str, str] | None:
    """Return why a trace cannot be played, though it is well formed.

    Parameters
    ----------
    trace
        What was read.

    Returns
    -------
    tuple of str, or None
        The field, as a path such as `$.config.pages`, and a sentence; None when it can be played.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[2], max_len=8)
    >>> trace_problem(Trace(config=config, events=[Merge([[0], [0]], [0, 1])]))
    ('$.events[0].levels', 'There are 2 partials; there must be one for each of the 1 cp_ranks.')
    """
    whole = [("$", trace.config, trace.events)]
    whole += [(f"$.before[{n}]", part.config, part.events) for n, part in enumerate(trace.before)]
    for at, config, events in whole:
        found = _unplayable(config, events)
        if found is not None:
            return at + found[0].removeprefix("$"), found[1]
    return None


def _unplayable(config: Config, events: Sequence[Event]) -> tuple[str, str] | None:
    """The field and the sentence by which a trace is refused; None when it can be played."""
    problem = config_problem(config)
    if problem is not None and events:
        return "$.config", problem
    demand = too_much(config, events)
    if demand is not None:
        return demand
    for index, event in enumerate(events):
        if isinstance(event, Merge) and len(event.levels) != config.layout.cp_size:
            return (
                f"$.events[{index}].levels",
                f"There are {len(event.levels)} partials; there must be one for each of the "
                f"{config.layout.cp_size} cp_ranks.",
            )
    return None


def too_much(
    config: Config, events: Sequence[Event], *, contents: bool = False
) -> tuple[str, str] | None:
    """Return what a trace asks for beyond the limits above.

    Tokens are counted as if no event were refused and no group cut short; a request counts at
    most `max_len` of them. So no request has more tokens than are counted here. Tokens of a prompt
    that its split deals out together count as one.

    Parameters
    ----------
    config
        The configuration.
    events
        The events that follow.
    contents
        Whether cached rows or outputs are looked at: then every token counts.

    Returns
    -------
    tuple of str, or None
        The field, as a path such as `$.config.pages`, and a sentence; None when the trace stays
        within all limits.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[2**24], max_len=8)
    >>> too_much(config, [])
    ('$.config.pages', 'It asks for 16777216 pages in all pools; a file may ask for 8388608.')
    """
    model = config.model
    numbers = model.q_heads * model.key_dim + model.kv_heads * (model.key_dim + model.value_dim)
    numbers *= model.layers * config.layout.tokens_per_block
    for field, asked, most, unit in (
        ("$.config", config.world_size, MAX_RANKS, "ranks"),
        ("$.config.pages", sum(config.pages), MAX_PAGES, "pages in all pools"),
        ("$.config.model", numbers, MAX_NUMBERS, "numbers in a page"),
    ):
        if asked > most:
            return field, f"It asks for {asked} {unit}; a file may ask for {most}."
    layout = config.layout
    piece = 1 if contents else layout.prompt_interleave or layout.tokens_per_block
    requests, total = dict[int, _Length](), 0
    for index, event in enumerate(events):
        for id, (tokens, counted) in _lengths_after(event, requests, config.max_len, piece):
            had = requests.get(id, _Length(0, 0))
            requests[id] = _Length(max(had.tokens, tokens), max(had.counted, counted))
            total += requests[id].counted - had.counted
        if isinstance(event, Release) and event.id in requests:
            total -= requests.pop(event.id).counted
        if len(requests) > MAX_REQUESTS:
            what = f"There may be {len(requests)} requests by now; a file may ask for "
            return f"$.events[{index}]", f"{what}{MAX_REQUESTS}."
        if total > MAX_TOKENS:
            as_one = f", {piece} of a prompt counted as one" if piece > 1 else ""
            what = f"Requests may have {total} tokens by now{as_one}; a file may ask for "
            return f"$.events[{index}]", f"{what}{MAX_TOKENS}."
    return None


class _Length(NamedTuple):
    """The most tokens that a request may have, and what they count for."""

    tokens: int
    counted: int


def _lengths_after(
    event: Event, requests: dict[int, _Length], max_len: int, piece: int
) -> list[tuple[int, _Length]]:
    """The lengths of requests after an event; only of those to which it may add tokens."""
    match event:
        case Admit(id, prompt_len):
            tokens = min(prompt_len, max_len)
            return [(id, _Length(tokens, -(-tokens // piece)))]
        case Decode(ids, query_lens) | Skip(ids, query_lens):
            pairs = [(id, n) for id, n in zip(ids, query_lens, strict=False) if id in requests]
            room = {id: max_len - requests[id].tokens for id, _ in pairs}
            added = [(id, requests[id], min(query_len, room[id])) for id, query_len in pairs]
            return [(id, _Length(had.tokens + n, had.counted + n)) for id, had, n in added]
        case Fork(parent, child):
            return [(child, requests.get(parent, _Length(0, 0)))]
        case _:
            return []


def line_of(text: str, field: str) -> int:
    """Return the line of a JSON text on which the value at a path begins, counted from 1.

    Parameters
    ----------
    text
        The JSON text; what follows the value may be malformed.
    field
        A path such as `$.events[3].kept`. One that leaves the document (a required field that is
        missing) ends at its last part that exists.

    Examples
    --------
    >>> text = '''{
    ...   "a": 1,
    ...   "b": [2]
    ... }'''
    >>> line_of(text, "$.b[0]")
    3
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
    """Return the JSON Schema (2020-12) of a trace, generated from the types."""
    schema: dict[str, Any] = unindented(msgspec.json.schema(Trace, schema_hook=layout_schema))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}


def unindented(node: Any) -> Any:
    """Return a schema with its descriptions unindented, as Python 3.13 does by itself.

    Parameters
    ----------
    node
        A JSON Schema, or a part of one.
    """
    if isinstance(node, dict):
        return {
            key: cleandoc(value) if key == "description" else unindented(value)
            for key, value in node.items()
        }
    return [unindented(item) for item in node] if isinstance(node, list) else node


def published_schema() -> dict[str, Any]:
    """Return the JSON Schema of a trace as it is shipped with this package."""
    schema: dict[str, Any] = json.loads(files("helix_spec").joinpath(SCHEMA_FILE).read_text())
    return schema


SCHEMA_FILE = "trace.schema.json"

if __name__ == "__main__":
    target = Path(__file__).with_name(SCHEMA_FILE)
    target.write_text(json.dumps(trace_schema(), indent=1) + "\n")
    print(f"wrote {target}")
