"""The messages between the suite and an engine in another process: PROTOCOL.md, in types.

One JSON object a line each way. The published schemas, one for each message of an engine, are
generated from these types by `python -m helix_conformance.drive.messages`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeVar

import msgspec
from msgspec import UNSET, UnsetType

from helix_conformance.drive.asking import MalformedAnswer, check_requests
from helix_conformance.drive.driver import Kind
from helix_spec import layouts
from helix_spec.capabilities import Box, Freedoms
from helix_spec.config import Config, decode_layout, encode_layout, layout_schema
from helix_spec.engine import GroupColumns as SpecColumns
from helix_spec.engine import GroupView as SpecGroupView
from helix_spec.engine import Outcome as SpecOutcome
from helix_spec.engine import RankView
from helix_spec.events import MERGE, Decode, Event, Merge, Number, Reason, RequestId
from helix_spec.layouts import DecodeOwner, LayoutError, PagePolicy, PromptSplit
from helix_spec.trace import unindented

Message = TypeVar("Message")
_Fields = tuple[tuple[str, tuple[str, ...]], ...]

PROTOCOL: Final = "helix-engine/1"
"""The version that is spoken. Fields may be added to what the suite says, nothing else changes."""
MAX_LINE_BYTES: Final = 2**26
"""Bytes of one request or answer; a line that does not end before is malformed."""


class _Asked(msgspec.Struct, frozen=True, tag_field="type"):
    seq: int
    """Number of this request; the answer repeats it."""


class Hello(_Asked, frozen=True, tag="hello"):
    """The first line to a new process. It is answered with `ready`."""

    protocol: str = PROTOCOL


class LayoutParts(msgspec.Struct, frozen=True):
    """A layout in parts, as SPEC.md, section 3, names them."""

    prompt: PromptSplit
    owner: DecodeOwner
    pages: PagePolicy
    start: layouts.Start
    cp_size: int
    tokens_per_block: int
    prompt_interleave: int | None
    owner_interleave: int | None


class Start(_Asked, frozen=True, tag="start"):
    """A trace begins; nothing of an earlier one is left. It is answered with `outcome`.

    `layout` is what the identifier in `config` says, in parts. `profiles` are those that will
    be checked; fields of others may be left out of answers. With `again` the engine's object that
    has played the trace before is started, where there is one, in place of a new one.
    """

    rank: int
    world_size: int
    config: Config
    layout: LayoutParts
    profiles: list[str]
    again: bool = False
    exchanges_done: int = 0
    """Where the engine's counter of exchanges starts, if it says that it takes it."""


class Apply(_Asked, frozen=True, tag="apply"):
    """An event happens on this rank. It is answered with `outcome`."""

    event: Event


class Observe(_Asked, frozen=True, tag="observe"):
    """The state is looked at. It is answered with `view`: of these requests, or of all live ones.

    A request that is asked for and not live is left out of the view.
    """

    ids: list[int] | None = None


class _Answer(msgspec.Struct, frozen=True, tag_field="type", forbid_unknown_fields=True):
    seq: int
    """Number of the request that is answered."""


class Ready(_Answer, frozen=True, tag="ready"):
    """Answers `hello`: what this engine is, what it declares, and how it is set up."""

    protocol: str
    engine: str
    profiles: list[str]
    version: str = ""
    settings: dict[str, str] = {}
    """Shown in reports, whatever it is."""
    capabilities: list[Box] | None = None
    """Where it works; left out, or null, when that is everywhere."""
    freedoms: Freedoms = Freedoms()
    """In what it differs rightly; left out when in nothing."""
    takes_exchanges_done: bool = False
    """Whether its counter of exchanges starts where `start` says."""


Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
"""Elements along one index of an array."""


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array of numbers as bytes, little-endian, the last index running fastest; in base64."""

    dtype: Literal["<f2", "<f4", "<f8"]
    shape: list[Size]
    data: bytes


Rows = list[Any] | Array
"""An array: nested lists of numbers, null standing for NaN; or its bytes."""


class GroupColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Columns of one cache group in an `outcome`."""

    past_len: list[Number] | UnsetType = UNSET
    active: list[bool] | UnsetType = UNSET
    slots: list[Number] | UnsetType = UNSET
    visible: list[Number] | UnsetType = UNSET


class GroupView(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The state of one cache group in a `view`."""

    local_len: dict[RequestId, Number] | UnsetType = UNSET
    block_tables: dict[RequestId, list[Number]] | UnsetType = UNSET
    keys: dict[RequestId, Rows] | UnsetType = UNSET
    values: dict[RequestId, Rows] | UnsetType = UNSET


class Outcome(_Answer, frozen=True, tag="outcome"):
    """Answers `start` and `apply`. `reason` is left out, or null, when the event was accepted.

    After an accepted decode or merge the columns of the checked profiles must be there: SPEC.md,
    10.1.
    """

    reason: Reason | None = None
    past_len: list[Number] | UnsetType = UNSET
    position_ids: list[Number] | UnsetType = UNSET
    active: list[bool] | UnsetType = UNSET
    slots: list[Number] | UnsetType = UNSET
    visible: list[Number] | UnsetType = UNSET
    output: Rows | UnsetType = UNSET
    hit: Number | None = None
    """Of an accepted event that names a prefix: its tokens found in the cache (`prefix`)."""
    groups: dict[str, GroupColumns] | UnsetType = UNSET
    """With cache groups, by name; of the columns above `position_ids` alone is there then."""


class View(_Answer, frozen=True, tag="view"):
    """Answers `observe`. The fields of the checked profiles must be there: SPEC.md, 10.2.

    Keys of the objects are request ids in decimal digits.
    """

    local_len: dict[RequestId, Number] | UnsetType = UNSET
    block_tables: dict[RequestId, list[Number]] | UnsetType = UNSET
    free_pages: Number | UnsetType = UNSET
    preempted: list[RequestId] | UnsetType = UNSET
    keys: dict[RequestId, Rows] | UnsetType = UNSET
    values: dict[RequestId, Rows] | UnsetType = UNSET
    groups: dict[str, GroupView] | UnsetType = UNSET
    """With cache groups, by name; tables, lengths and rows above are left out then."""
    pools: dict[str, Number] | UnsetType = UNSET
    """Free pages of each pool beside `main`."""


class Failed(_Answer, frozen=True, tag="failed", omit_defaults=True):
    """Answers anything: the adapter could not do what was asked, and says why. It ends the run.

    This is no refusal. The text goes on where "Rank 1" begins, as in "raised ValueError: no GPU";
    it is shown to people and never looked at. So is the traceback, in the file of the trace.
    """

    what: str
    traceback: str = ""


class Where(_Asked, frozen=True, tag="where"):
    """Asks a supervisor about its silent engine. It is answered with `stuck`."""


class Stop(msgspec.Struct, frozen=True, tag_field="type", tag="stop"):
    """Tells a supervisor that the run is over. It is not answered."""

    whole: bool
    """Whether no other supervisor is missing."""


class Stuck(_Answer, frozen=True, tag="stuck"):
    """Answers `where`: whether the engine is blocked in a collective."""

    waits: bool


class Ended(msgspec.Struct, frozen=True, tag_field="type", tag="ended"):
    """Tells rank 0 that a supervisor's engine, or the supervisor itself, has failed."""

    what: str
    how: Kind


ToEngine = Hello | Start | Apply | Observe
FromEngine = Ready | Outcome | View | Failed
ToSupervisor = Where | Stop
FromSupervisor = FromEngine | Stuck | Ended

ANSWERED_BY: Final[dict[type[ToEngine], type[FromEngine]]] = {
    Hello: Ready,
    Start: Outcome,
    Apply: Outcome,
    Observe: View,
}
"""What type of answer is due to a request, when it is not `failed`."""

_OF_DECODE: Final = (
    ("placement", ("position_ids", "active", "slots")),
    ("lengths", ("past_len",)),
    ("attention", ("visible", "output")),
)
_OF_MERGE: Final = ((MERGE, ("output",)),)
_OF_VIEW: Final = (
    ("lengths", ("local_len",)),
    ("pages", ("block_tables", "free_pages")),
    ("preempt", ("preempted",)),
    ("cache", ("keys", "values")),
)
_OF_GROUPED: Final = (("placement", ("position_ids",)), ("attention", ("output",)))
_OF_GROUP: Final = (
    ("placement", ("active", "slots")),
    ("lengths", ("past_len",)),
    ("attention", ("visible",)),
)
_OF_RANK: Final = (("pages", ("free_pages",)), ("preempt", ("preempted",)))
_OF_TABLES: Final = (
    ("lengths", ("local_len",)),
    ("pages", ("block_tables",)),
    ("cache", ("keys", "values")),
)
"""Of a view with cache groups: what belongs to the rank, and what to each group."""
_BY_REQUEST: Final = ("block_tables", "keys", "values")

_encode = msgspec.json.Encoder(enc_hook=encode_layout).encode
_from_engine: msgspec.json.Decoder[FromEngine] = msgspec.json.Decoder(FromEngine)
_from_supervisor: msgspec.json.Decoder[FromSupervisor] = msgspec.json.Decoder(FromSupervisor)
_to_engine: msgspec.json.Decoder[ToEngine] = msgspec.json.Decoder(ToEngine, dec_hook=decode_layout)
_to_either: msgspec.json.Decoder[ToEngine | ToSupervisor] = msgspec.json.Decoder(
    ToEngine | ToSupervisor, dec_hook=decode_layout
)
_UNREADABLE: Final = (msgspec.MsgspecError, ValueError, RecursionError)


class RequestError(ValueError):
    """A line that is no request, in a sentence."""


class LayoutRefusedError(RequestError):
    """A `start` whose layout is no canonical identifier: it is refused with `bad_config`.

    Parameters
    ----------
    sentence
        What is wrong.
    seq
        Number of the request.
    """

    def __init__(self, sentence: str, seq: int) -> None:
        super().__init__(sentence)
        self.seq = seq


class _Numbered(msgspec.Struct, frozen=True):
    seq: int


def line_of(message: ToEngine | ToSupervisor | FromSupervisor) -> bytes:
    """Return the line of a message, its end included.

    Examples
    --------
    >>> line_of(Hello(1)).strip()
    b'{"type":"hello","seq":1,"protocol":"helix-engine/1"}'
    """
    return _encode(message) + b"\n"


def answer_of(line: bytes) -> FromEngine:
    """Return the engine's message in a line.

    Raises
    ------
    MalformedAnswer
        When the line holds none.

    Examples
    --------
    >>> answer_of(b'{"type": "outcome", "seq": 6, "reason": "out_of_pages"}').reason
    <Reason.OUT_OF_PAGES: 'out_of_pages'>
    """
    return _answer(_from_engine, line)


def relayed_of(line: bytes) -> FromSupervisor:
    """Return the message of a supervisor, or of its engine, in a line.

    Raises
    ------
    MalformedAnswer
        When the line holds none.
    """
    return _answer(_from_supervisor, line)


def _answer(decoder: msgspec.json.Decoder[Message], line: bytes) -> Message:
    try:
        return decoder.decode(line)
    except _UNREADABLE as error:
        sentence = f"{error}, in the line that begins {_start(line)!r}"
        raise MalformedAnswer(sentence) from error


def request_of(line: bytes) -> ToEngine:
    """Return the suite's message in a line.

    Raises
    ------
    RequestError
        When the line holds none.

    Examples
    --------
    >>> request_of(b'{"type": "observe", "seq": 5, "ids": [7]}')
    Observe(seq=5, ids=[7])
    """
    return _request(_to_engine, line)


def control_of(line: bytes) -> ToSupervisor | None:
    """Return a line's message to a supervisor; None when it is for the engine.

    Raises
    ------
    RequestError
        When the line is for neither.

    Examples
    --------
    >>> control_of(b'{"type": "where", "seq": 1}')
    Where(seq=1)
    """
    request = _request(_to_either, line)
    return request if isinstance(request, Where | Stop) else None


def _request(decoder: msgspec.json.Decoder[Message], line: bytes) -> Message:
    try:
        return decoder.decode(line)
    except _UNREADABLE as error:
        sentence = f"The line that begins {_start(line)!r} is no request of {PROTOCOL}: {error}."
        if isinstance(error.__cause__, LayoutError):
            try:  # what follows the layout in the line may be no JSON
                seq = msgspec.json.decode(line, type=_Numbered).seq
            except _UNREADABLE:
                raise RequestError(sentence) from error
            raise LayoutRefusedError(sentence, seq) from error
        raise RequestError(sentence) from error


def _start(line: bytes) -> str:
    return line[:80].decode(errors="replace").strip()


def spec_outcome(answer: Outcome, event: Event | None, profiles: Collection[str]) -> SpecOutcome:
    """Return an outcome in the words of the specification (SPEC.md, 10.1).

    Parameters
    ----------
    answer : Outcome
        What a rank answered to `start` or `apply`.
    event : Event or None
        The event that was applied; None for `start`.
    profiles : collection of str
        The profiles that are checked.

    Returns
    -------
    helix_spec.engine.Outcome
        The same; columns that were left out are empty, or None.

    Raises
    ------
    MalformedAnswer
        When the answer leaves out a column of a profile that is checked.

    Examples
    --------
    >>> spec_outcome(Outcome(2, past_len=[5]), Decode([7], [1]), {"lengths"}).past_len
    [5]
    """
    checked = frozenset(profiles)
    groups = _told(answer.groups, {})
    if answer.reason is None and isinstance(event, Decode | Merge):
        fields = _OF_DECODE if isinstance(event, Decode) else _OF_MERGE
        if groups and fields is _OF_DECODE:
            _check_present(answer, _OF_GROUPED, checked)
            for name, columns in groups.items():
                _check_present(columns, _OF_GROUP, checked, f"of cache group {name} ")
        else:
            _check_present(answer, fields, checked)
    return SpecOutcome(
        answer.reason,
        _told(answer.past_len, []),
        _told(answer.position_ids, []),
        _told(answer.active, []),
        _told(answer.slots, []),
        _told(answer.visible, None),
        None if answer.output is UNSET else _rows(answer.output),
        {
            name: SpecColumns(
                _told(one.past_len, []),
                _told(one.active, []),
                _told(one.slots, []),
                _told(one.visible, None),
            )
            for name, one in groups.items()
        },
        answer.hit,
    )


def spec_view(answer: View, asked: list[int] | None, profiles: Collection[str]) -> RankView:
    """Return a view in the words of the specification (SPEC.md, 10.2).

    Parameters
    ----------
    answer : View
        What a rank answered to `observe`.
    asked : list of int, or None
        Ids of the requests that were asked for; None for all live ones.
    profiles : collection of str
        The profiles that are checked.

    Returns
    -------
    RankView
        The same; fields that were left out are empty, or 0.

    Raises
    ------
    MalformedAnswer
        When the answer leaves out a field of a profile that is checked, leaves out a request of
        such a field, or holds a request that was not asked for.
    """
    checked = frozenset(profiles)
    groups = _told(answer.groups, {})
    _check_present(answer, _OF_RANK if groups else _OF_VIEW, checked)
    if not groups:
        _check_same_requests(answer, _OF_VIEW, checked, asked)
    for name, group in groups.items():
        _check_present(group, _OF_TABLES, checked, f"of cache group {name} ")
        _check_same_requests(group, _OF_TABLES, checked, asked)
    return RankView(
        _told(answer.local_len, {}),
        _told(answer.block_tables, {}),
        _told(answer.preempted, []),
        _told(answer.free_pages, 0),
        _rows_by_request(answer.keys),
        _rows_by_request(answer.values),
        {
            name: SpecGroupView(
                _told(one.local_len, {}),
                _told(one.block_tables, {}),
                _rows_by_request(one.keys),
                _rows_by_request(one.values),
            )
            for name, one in groups.items()
        },
        _told(answer.pools, {}),
    )


def _check_same_requests(
    view: View | GroupView, fields: _Fields, checked: frozenset[str], asked: list[int] | None
) -> None:
    """Raise MalformedAnswer unless all fields by request are of the same ones, all asked for."""
    local_len: dict[int, int] = _told(view.local_len, {})
    check_requests(local_len, asked)
    for _, name in _needed(fields, checked):
        if name in _BY_REQUEST and (told := getattr(view, name)).keys() != local_len.keys():
            raise MalformedAnswer(
                f"its {name} are of requests {sorted(told)}, its local_len of {sorted(local_len)}"
            )


def _rows_by_request(rows: dict[int, Rows] | UnsetType) -> dict[int, Any]:
    return {} if rows is UNSET else {id: _rows(one) for id, one in rows.items()}


def _told(value: Any, otherwise: Any) -> Any:
    return otherwise if value is UNSET else value


@lru_cache
def _needed(fields: _Fields, checked: frozenset[str]) -> tuple[tuple[str, str], ...]:
    """The fields that must be there, each with the profile that asks for it."""
    return tuple(
        (profile, name) for profile, names in fields if profile in checked for name in names
    )


def _check_present(
    answer: Outcome | View | GroupColumns | GroupView,
    fields: _Fields,
    checked: frozenset[str],
    whose: str = "",
) -> None:
    for profile, name in _needed(fields, checked):
        if getattr(answer, name) is UNSET:
            lacks = f"its answer {whose}lacks {name}"
            raise MalformedAnswer(f"{lacks}, which profile {profile} asks for")


def _rows(rows: Any) -> Any:
    """What `helix_conformance.expect.arrays.as_array` reads."""
    if isinstance(rows, Array):
        return {"dtype": rows.dtype, "shape": rows.shape, "data": rows.data}
    return rows


SCHEMAS: Final = Path(__file__).parents[1] / "schemas"
"""Where the published schemas are: `hello.schema.json` and so on."""


def message_schemas() -> dict[str, dict[str, Any]]:
    """Return the JSON Schema (2020-12) of each message of an engine, by its file's name.

    Examples
    --------
    >>> sorted(message_schemas())[:3]
    ['apply.schema.json', 'failed.schema.json', 'hello.schema.json']
    """
    messages = (Hello, Start, Apply, Observe, Ready, Outcome, View, Failed)
    return {
        f"{kind.__name__.lower()}.schema.json": {
            "$schema": "https://json-schema.org/draft/2020-12/schema",
            **unindented(msgspec.json.schema(kind, schema_hook=layout_schema)),
        }
        for kind in messages
    }


if __name__ == "__main__":
    SCHEMAS.mkdir(exist_ok=True)
    for name, schema in message_schemas().items():
        (SCHEMAS / name).write_text(json.dumps(schema, indent=1) + "\n")
        print(f"wrote {SCHEMAS / name}")
