"""What a vector is, and its JSON form; `shipped/FORMAT.md` says it for readers of the files."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
import numpy as np

from helix_conformance.expect import expectation
from helix_conformance.expect.arrays import Array
from helix_conformance.expect.expectation import Expectation, Request, Rows
from helix_conformance.expect.expectation import Output as Expected
from helix_spec.config import (
    CacheGroup,
    Config,
    config_problem,
    decode_layout,
    encode_layout,
    layout_schema,
)
from helix_spec.events import Decode, Event, Merge, Reason, RequestId
from helix_spec.layouts import parse_layout
from helix_spec.trace import Trace, line_of, too_much, unindented

FORMAT: Final = "helix-vector/2"
SCHEMA_FILE: Final = "vector.schema.json"
SHIPPED: Final = Path(__file__).parent / "shipped"
"""Folder of the vectors that come with this package."""
FORMAT_PAGE: Final = "FORMAT.md"

Numbers = list[float]
Label = Annotated[int, msgspec.Meta(ge=0)]
"""Stands for one page of one rank for as long as any request holds it; never used again."""
Place = Annotated[int, msgspec.Meta(ge=-1)]
"""A label; -1 for a page of a cache group that went back behind its window."""
Count = Annotated[int, msgspec.Meta(ge=0)]


class VectorError(ValueError):
    """A file that is not a vector; the message names file, line and field."""


class _Part(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class Output(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One token and query head: the exact output, and the bound E within which one is equal."""

    exact: Numbers
    bound: float


class Decoded(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What the ranks answer to an accepted decode. New tokens stand request after request."""

    past_len: list[list[Count]]
    """For each id of the batch, by cp_rank: tokens held before the step."""
    position_ids: list[Count]
    """For each new token: its global position, on every rank."""
    owners: list[Count]
    """For each new token: the one cp_rank that is active."""
    slots: list[tuple[Label, Count]]
    """For each new token: label of the page and offset in it, on the owner; elsewhere slot -1."""
    visible: list[list[Count]]
    """For each new token, by cp_rank: keys that its query sees."""
    output: list[list[list[Output]]] | None = None
    """By layer, new token and query head of the whole model."""


class Supplied(msgspec.Struct, frozen=True, forbid_unknown_fields=True, array_like=True):
    """One token and query head of a partial: output and natural log-sum-exp; null without keys."""

    output: Numbers | None
    lse: float | None


class Merged(_Part, frozen=True, kw_only=True):
    """What a merge is supplied with, and what comes of it."""

    partials: list[list[list[Supplied]]]
    """By partial, token and query head of the whole model; rank r is handed partial order[r]."""
    output: list[list[Output]]
    """By token and query head of the whole model."""


class State(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What the ranks hold after an event. Tensor-parallel peers hold the same."""

    local_len: dict[RequestId, list[Count]]
    """For each live request, by cp_rank."""
    block_tables: dict[RequestId, list[list[Place]]]
    """For each live request, by cp_rank: labels of its pages, in local order."""
    free_pages: list[Count]
    """By cp_rank."""
    preempted: list[RequestId] = []
    cached: dict[RequestId, list[list[Count]]] | None = None
    """For each live request, by cp_rank: which of the vector's rows its slots hold, in order."""
    unwritten_from: dict[RequestId, list[Count]] | None = None
    """For each live request, by cp_rank: slots from this local index on were never written."""


class GroupStep(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """What follows an event in one cache group; of a replicated one, on one cp_rank."""

    decoded: Decoded | None = None
    state: State | None = None


class Row(_Part, frozen=True, kw_only=True):
    """K and V of one token as they are cached, by layer, KV head of the whole model, and dim."""

    event: Count
    place: Count
    position: Count
    least_keys: list[list[Numbers]]
    """The least that each entry of K, after RoPE, may be."""
    most_keys: list[list[Numbers]]
    """The most that it may be."""
    values: list[list[Numbers]]
    """V: cached entries are equal."""


class Step(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """An event and what follows it."""

    event: Event
    refused: Reason | None = None
    """The reason, on every rank; absent when the event is accepted."""
    hit: Count | None = None
    """Of an accepted event that names a prefix: its tokens found in the cache, on every rank."""
    decoded: Decoded | None = None
    merged: Merged | None = None
    state: State | None = None
    """Absent where this step says nothing of it."""
    groups: dict[str, list[GroupStep]] = {}
    """With cache groups, in place of `decoded` and `state`: of each group by its name one entry,
    or one for each cp_rank, as if that were all the ranks, where it is replicated. Labels are those
    of the group's pool."""


class Vector(_Part, frozen=True, kw_only=True, omit_defaults=True):
    """One case: a header, what every rank is started with, and the steps."""

    format: Literal["helix-vector/2", "helix-vector/1"]
    suite: str
    """Version of the suite that wrote it."""
    name: str
    """That of the file, without `.json`."""
    layout: str
    """The layout's identifier, as in `config`."""
    profiles: list[str]
    """What an engine must declare for the case to be meant for it."""
    invariants: list[str]
    """Which rules of SPEC.md, section 7, the case is there for."""
    notes: list[str]
    """Why it exists."""
    config: Config
    refused: Literal["bad_config"] | None = None
    """Why no engine may start with the configuration; absent when it must start."""
    rows: list[Row] = []
    steps: list[Step]

    @property
    def trace(self) -> Trace:
        """Configuration and events alone."""
        return Trace(note=self.name, config=self.config, events=[step.event for step in self.steps])


def dump_vector(vector: Vector) -> bytes:
    """Return the JSON form of a vector: a header, then each row and each step on a line of its own.

    Returns
    -------
    bytes
        UTF-8, of which `load_vector` reads the same vector.
    """
    head = msgspec.to_builtins(vector, str_keys=True, enc_hook=encode_layout)
    head["config"] = _sparse(head["config"])
    parts = [
        f'  "{name}": [\n    ' + ",\n    ".join(map(_line, head.pop(name))) + "\n  ]"
        for name in ("rows", "steps")
        if head.get(name)
    ]
    head.pop("steps", None)
    lines = [f'  "{name}": {_line(value)}' for name, value in head.items()]
    if not vector.steps:
        parts.append('  "steps": []')
    return ("{\n" + ",\n".join(lines + parts) + "\n}\n").encode()


def _sparse(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the fields that have their defaults (SPEC.md, section 4)."""
    blank = Config(layout=parse_layout("pr9757/1:C=1,T=1"), pages=[], max_len=1)
    usual = msgspec.to_builtins(blank, enc_hook=encode_layout)
    model = {k: v for k, v in config["model"].items() if v != usual["model"][k]}
    fixed = ("layout", "pages", "max_len")
    changed = {k: v for k, v in config.items() if k in fixed or v != usual[k]}
    return changed | ({"model": model} if model else {})


def _line(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def load_vector(path: Path) -> Vector:
    """Return the vector in a file.

    Parameters
    ----------
    path
        A file that is named after its vector.

    Raises
    ------
    VectorError
        When it cannot be read or is no vector; the message names file, line and field.

    Examples
    --------
    >>> path = Path(__file__).parent / "shipped/spec-11-2-step.json"
    >>> load_vector(path).layout
    'pr13180/1:C=4,T=2'
    """
    try:
        data = path.read_bytes()
        vector = msgspec.json.decode(data, type=Vector, dec_hook=decode_layout)
    except OSError as error:
        raise VectorError(f"{path}: cannot be read: {error.strerror}.") from error
    except msgspec.ValidationError as error:
        message, _, field = str(error).partition(" - at ")
        raise _error(path, data, field.strip("`") or "$", message) from error
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise VectorError(f"{path}: is not JSON: {error}.") from error
    for field, message in _problems(path.stem, vector):
        raise _error(path, data, field, message)
    return vector


@lru_cache(maxsize=1)
def shipped_vectors() -> tuple[Vector, ...]:
    """Return the vectors that come with this package, by name."""
    return tuple(load_vectors(SHIPPED))


def load_vectors(folder: Path) -> list[Vector]:
    """Return all vectors in a folder, sorted by the names of their files.

    Parameters
    ----------
    folder
        A folder; its `.json` files are vectors, except for the schema.

    Raises
    ------
    VectorError
        When there is none, or one is wrong; the message names file, line and field.
    """
    if not folder.is_dir():
        raise VectorError(f"{folder} is not a folder of vectors.")
    paths = sorted(path for path in folder.glob("*.json") if path.name != SCHEMA_FILE)
    if not paths:
        raise VectorError(f"{folder} holds no vector: there is no .json file in it.")
    return [load_vector(path) for path in paths]


def _error(path: Path, data: bytes, field: str, message: str) -> VectorError:
    line = line_of(data.decode(errors="replace"), field)
    return VectorError(f"{path}, line {line}, field {field}: {message.rstrip('.')}.")


def _problems(name: str, vector: Vector) -> Iterator[tuple[str, str]]:
    """Where the parts of a vector do not fit one another: field and message."""
    if vector.name != name:
        yield "$.name", f"it is {vector.name!r}, and the file is named {name!r}"
    if vector.layout != str(vector.config.layout):
        yield "$.layout", f"it is {vector.layout!r}, and the configuration says otherwise"
    problem = config_problem(vector.config)
    if (problem is not None) != (vector.refused is not None):
        yield "$.refused", f"it is {vector.refused}, and of the configuration holds: {problem}"
    demand = too_much(vector.config, [step.event for step in vector.steps])
    if demand is not None:
        field, what = demand
        yield field.replace("$.events", "$.steps"), what.rstrip(".")
        return  # some checks below count out what is asked for
    if vector.refused and vector.steps:
        yield "$.steps", "there are steps after a start that is refused"
    for index, step in enumerate(vector.steps):
        problems = _group_problems if vector.config.groups else _step_problems
        for field, message in problems(step, vector.config, len(vector.rows)):
            yield f"$.steps[{index}]{field}", message


def _group_problems(step: Step, config: Config, rows: int) -> Iterator[tuple[str, str]]:
    """Where a step of a configuration with cache groups does not fit them."""
    if step.decoded is not None or step.state is not None:
        yield "", "with cache groups, `decoded` and `state` stand in `groups`"
    if step.groups.keys() != {group.name for group in config.groups}:
        yield ".groups", "its names are not those of the cache groups"
        return
    for group, ranks in _parts(config):
        told, where = step.groups[group.name], f".groups.{group.name}"
        yield from _unlike(where, [told], len(ranks), "part")
        for rank, part in zip(ranks, told, strict=False):
            alone = Step(
                event=step.event, refused=step.refused, decoded=part.decoded, state=part.state
            )
            for field, message in _step_problems(alone, config.alone(group, rank or 0), rows):
                yield f"{where}[{rank or 0}]{field}", message


def _parts(config: Config) -> Iterator[tuple[CacheGroup, list[int | None]]]:
    """Each cache group with the cp_ranks that are told one by one: those of a replicated group."""
    for group in config.groups:
        copies = group.placement == "replicated"
        yield group, [*range(config.layout.cp_size)] if copies else [None]


def _step_problems(step: Step, config: Config, rows: int) -> Iterator[tuple[str, str]]:
    decoded, state, model, ranks = step.decoded, step.state, config.model, config.layout.cp_size
    if isinstance(step.event, Decode) and step.refused is None and decoded is None:
        yield "", "an accepted decode has no `decoded`"
    if decoded is not None:
        if not isinstance(step.event, Decode) or step.refused is not None:
            yield ".decoded", "only an accepted decode has it"
            return
        tokens, ids = sum(step.event.query_lens), len(step.event.ids)
        for field in ("position_ids", "owners", "slots", "visible"):
            yield from _unlike(f".decoded.{field}", [getattr(decoded, field)], tokens, "token")
        yield from _unlike(".decoded.past_len", [decoded.past_len], ids, "request")
        if decoded.output is not None:
            yield from _unlike(".decoded.output", [decoded.output], model.layers, "layer")
            yield from _unlike(".decoded.output", decoded.output, tokens, "token", "a layer")
            by_token = [heads for layer in decoded.output for heads in layer]
            yield from _unlike(".decoded.output", by_token, model.q_heads, "head", "a token")
        if any(len(row) != ranks for row in decoded.past_len + decoded.visible):
            yield ".decoded", f"a count is not given for each of {ranks} cp_ranks"
        if any(owner >= ranks for owner in decoded.owners):
            yield ".decoded.owners", f"a rank is not below {ranks}"
    if (step.merged is None) == (isinstance(step.event, Merge) and step.refused is None):
        yield ".merged", "an accepted merge has it, and nothing else has"
    elif step.merged is not None and isinstance(step.event, Merge):
        tokens = len(step.event.levels[0])
        yield from _unlike(".merged.output", [step.merged.output], tokens, "token")
        yield from _unlike(".merged.output", step.merged.output, model.q_heads, "head", "a token")
        if {len(by_token) for by_token in step.merged.partials} != {tokens}:
            yield ".merged.partials", f"one does not have {tokens} entries, one for each token"
        if len(step.event.levels) != ranks or len(step.merged.partials) != ranks:
            yield ".merged.partials", f"there are not {ranks}, one for each cp_rank"
    if state is None:
        return
    yield from _unlike(".state.free_pages", [state.free_pages], ranks, "cp_rank")
    live = state.local_len.keys()
    for field in ("local_len", "block_tables", "cached", "unwritten_from"):
        by_id = getattr(state, field)
        if by_id is None:
            continue
        if by_id.keys() != live:
            yield f".state.{field}", "its requests are not those of local_len"
        yield from _unlike(f".state.{field}", by_id.values(), ranks, "cp_rank", "a request")
    if (state.cached is None) != (state.unwritten_from is None):
        yield ".state", "`cached` and `unwritten_from` go together"
    for by_rank in (state.cached or {}).values():
        if any(row >= rows for held in by_rank for row in held):
            yield ".state.cached", f"a row is not below {rows}"


def _unlike(
    field: str, lists: Iterable[Sequence[Any]], right: int, each: str, one: str = "it"
) -> Iterator[tuple[str, str]]:
    """Where one of the lists is not of the right length."""
    if any(len(entries) != right for entries in lists):
        yield field, f"{one} does not have {right} entries, one for each {each}"


@dataclass(eq=False, slots=True)
class _LabelledPage:
    """A page that a vector knows by its number, a label."""

    number: int
    holders: int = 1
    contents: ClassVar[Collection[Any]] = ()
    found: ClassVar[bool] = False


class VectorState:
    """The state after a vector's latest step that shows one; see `expectation.State`.

    Parameters
    ----------
    config
        The configuration; of a cache group, as if it were all that is cached. Before the first step
        every page is free.
    rows
        K and V that states name.
    """

    requests: Mapping[int, Request] | None = None

    def __init__(self, config: Config, rows: Sequence[Row] = ()) -> None:
        self.config, self.known_rows = config, rows
        self.shown = State(local_len={}, block_tables={}, free_pages=list(config.pages))
        self.pages: list[dict[int, _LabelledPage]] = [{} for _ in config.pages]
        """Of each cp_rank, the pages by their labels."""

    def show(self, state: State) -> None:
        """Take over the state after a step; a label in no block table is that of a free page."""
        self.shown = state
        for rank, pages in enumerate(self.pages):
            held = Counter(label for t in state.block_tables.values() for label in t[rank])
            for label in held.keys() - pages.keys():
                pages[label] = _LabelledPage(label)
            for label, page in pages.items():
                page.holders = held[label]

    def page(self, rank: int, label: int) -> _LabelledPage:
        """Return the page that `label` stands for on cp_rank `rank`."""
        return self.pages[rank].setdefault(label, _LabelledPage(label))

    @property
    def live(self) -> Collection[int]:
        """See `expectation.State.live`."""
        return list(self.shown.local_len)

    @property
    def preempted(self) -> list[int]:
        """See `expectation.State.preempted`."""
        return self.shown.preempted

    @property
    def free_pages(self) -> list[int]:
        """See `expectation.State.free_pages`."""
        return self.shown.free_pages

    def lengths(self, id: int) -> Sequence[int]:
        """See `expectation.State.lengths`."""
        return self.shown.local_len[id]

    def tables(self, id: int) -> Sequence[Sequence[_LabelledPage]]:
        """See `expectation.State.tables`."""
        tables = self.shown.block_tables[id]
        return [[self.page(rank, label) for label in t] for rank, t in enumerate(tables)]

    def contents(self, id: int, rank: int) -> tuple[list[int], int] | None:
        """Return what rows of request `id` on cp_rank `rank` depend on; see `State.contents`."""
        if self.shown.cached is None or self.shown.unwritten_from is None:
            return None
        return self.shown.cached[id][rank], self.shown.unwritten_from[id][rank]

    def rows(self, id: int, rank: int, heads: range) -> Rows:
        """Return rows of request `id` on cp_rank `rank`, for KV heads `heads`; see `State.rows`."""
        cached = (self.shown.cached or {})[id][rank]
        held = [self.known_rows[row] for row in cached]
        mine, shape = slice(heads.start, heads.stop), self.config.model

        def stacked(parts: Iterable[Any], dim: int) -> Array:
            blank = np.zeros((shape.layers, 0, len(heads), dim))
            return np.stack([np.array(part)[:, mine] for part in parts], axis=1) if held else blank

        return Rows(
            [row.position for row in held],
            stacked((row.least_keys for row in held), shape.key_dim),
            stacked((row.most_keys for row in held), shape.key_dim),
            stacked((row.values for row in held), shape.value_dim),
        )


def expectations(vector: Vector) -> Iterator[Expectation]:
    """Yield what a vector expects of each of its steps.

    Each must be read before the next is asked for: they share one state.

    Parameters
    ----------
    vector
        A vector; one that says that no engine may start has no steps.

    Examples
    --------
    >>> path = Path(__file__).parent / "shipped/spec-11-2-step.json"
    >>> first, second, *_ = expectations(load_vector(path))
    >>> second.decoded.position_ids, second.decoded.owners
    ([13], [0])
    """
    config, state = vector.config, VectorState(vector.config, vector.rows)
    groups = [
        (group, rank, VectorState(config.alone(group, rank or 0)))
        for group, ranks in _parts(config)
        for rank in ranks
    ]
    for index, step in enumerate(vector.steps):
        outputs = list[Expected]()
        if step.decoded is not None:
            by_layer = step.decoded.output or []
            outputs = [_outputs(layers) for layers in zip(*by_layer, strict=True)]
        if step.merged is not None:
            outputs = [_outputs([heads]) for heads in step.merged.output]
        told = (lambda outputs=outputs: outputs) if outputs else None
        decoded, shown = _shown(step, state)
        parts = list[expectation.Part]()
        for group, rank, of_group in groups:
            part = step.groups[group.name][rank or 0]
            expected = Expectation(index, step.event, step.refused, *_shown(part, of_group))
            parts.append(expectation.Part(group, rank, expected))
        if parts:
            shown = parts[0].expected.state
        hit = None if step.hit is None else _only(step.hit)
        yield Expectation(index, step.event, step.refused, decoded, shown, told, parts, hit)


def _only(hit: int) -> expectation.Hit:
    """The hit of a vector, in which live requests hold all that can be found."""
    return expectation.Hit(hit, hit, hit, max(1, hit), hit, hit)


def _shown(
    step: Step | GroupStep, state: VectorState
) -> tuple[expectation.Decoded | None, expectation.State | None]:
    """The columns of a step, and its state, which `state` takes over; None where it shows none."""
    if step.state is not None:
        state.show(step.state)
    columns, decoded = step.decoded, None
    if columns is not None:
        slots = [
            (state.page(owner, label), offset)
            for owner, (label, offset) in zip(columns.owners, columns.slots, strict=True)
        ]
        decoded = expectation.Decoded(
            columns.past_len, columns.position_ids, columns.owners, slots, columns.visible
        )
    return decoded, state if step.state is not None else None


def _outputs(layers: Sequence[Sequence[Output]]) -> Expected:
    """One token's outputs by layer and query head, as arrays."""
    return Expected(
        np.array([[output.exact for output in heads] for heads in layers]),
        np.array([[output.bound for output in heads] for heads in layers]),
    )


def vector_schema() -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of a vector, generated from the types."""
    schema: dict[str, Any] = unindented(msgspec.json.schema(Vector, schema_hook=layout_schema))
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **schema}
