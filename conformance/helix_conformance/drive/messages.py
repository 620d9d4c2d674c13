"""The messages between the suite and an engine that is a command: PROTOCOL.md, in types.

One JSON object a line each way. The published schemas, one for each message, are generated from
these types by `python -m helix_conformance.drive.messages`.
"""

from __future__ import annotations

import json
from collections.abc import Collection
from pathlib import Path
from typing import Annotated, Any, Final, Literal

import msgspec
from msgspec import UNSET, UnsetType

from helix_conformance.drive.asking import AnswerError, check_requests
from helix_spec import layouts
from helix_spec.config import Config, decode_layout, encode_layout, layout_schema
from helix_spec.engine import Outcome as SpecOutcome
from helix_spec.engine import RankView
from helix_spec.events import MERGE, Decode, Event, Merge, Number, Reason, RequestId
from helix_spec.layouts import DecodeOwner, PagePolicy, PromptSplit
from helix_spec.trace import unindented

PROTOCOL: Final = "helix-engine/1"
"""The version that is spoken. Fields may be added to what the suite says, nothing else changes."""


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
    be checked; fields of others may be left out of answers.
    """

    rank: int
    world_size: int
    config: Config
    layout: LayoutParts
    profiles: list[str]


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


Size = Annotated[int, msgspec.Meta(ge=0, le=2**40)]
"""Elements along one index of an array."""


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """An array of numbers as bytes, little-endian, the last index running fastest; in base64."""

    dtype: Literal["<f2", "<f4", "<f8"]
    shape: list[Size]
    data: bytes


Rows = list[Any] | Array
"""An array: nested lists of numbers, null standing for NaN; or its bytes."""


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


class Failed(_Answer, frozen=True, tag="failed"):
    """Answers anything: the adapter could not do what was asked, and says why. It ends the run.

    This is no refusal. The text goes on where "Rank 1" begins, as in "raised ValueError: no GPU";
    it is shown to people and never looked at.
    """

    what: str


ToEngine = Hello | Start | Apply | Observe
FromEngine = Ready | Outcome | View | Failed

_COLUMNS: Final = {
    "placement": ("position_ids", "active", "slots"),
    "lengths": ("past_len",),
    "attention": ("visible", "output"),
}
_OF_MERGE: Final[dict[str, tuple[str, ...]]] = {MERGE: ("output",)}
_FIELDS: Final = {
    "lengths": ("local_len",),
    "pages": ("block_tables", "free_pages"),
    "preempt": ("preempted",),
    "cache": ("keys", "values"),
}
_BY_REQUEST: Final = (("pages", "block_tables"), ("cache", "keys"), ("cache", "values"))

_encode = msgspec.json.Encoder(enc_hook=encode_layout)
_from_engine: msgspec.json.Decoder[FromEngine] = msgspec.json.Decoder(FromEngine)
_to_engine: msgspec.json.Decoder[ToEngine] = msgspec.json.Decoder(ToEngine, dec_hook=decode_layout)


class RequestError(ValueError):
    """A line that is no request, in a sentence."""


def line_of(message: ToEngine) -> bytes:
    """The line of a message."""
    return _encode.encode(message) + b"\n"


def answer_of(line: bytes) -> FromEngine:
    """The engine's message in a line. Raises AnswerError when it is none."""
    try:
        return _from_engine.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise AnswerError(f"{error}, in the line that begins {_start(line)!r}") from error


def request_of(line: bytes) -> ToEngine:
    """The suite's message in a line. Raises RequestError when it is none."""
    try:
        return _to_engine.decode(line)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        sentence = f"The line that begins {_start(line)!r} is no request of {PROTOCOL}: {error}."
        raise RequestError(sentence) from error


def _start(line: bytes) -> str:
    return line[:80].decode(errors="replace").strip()


def spec_outcome(answer: Outcome, event: Event | None, profiles: Collection[str]) -> SpecOutcome:
    """The outcome in the words of the specification.

    Raises AnswerError when it leaves out a column of a profile that is checked.
    """
    if isinstance(event, Decode | Merge) and answer.reason is None:
        _check_present(answer, _COLUMNS if isinstance(event, Decode) else _OF_MERGE, profiles)
    columns = {
        name: value
        for name in ("past_len", "position_ids", "active", "slots", "visible")
        if (value := getattr(answer, name)) is not UNSET
    }
    output = None if answer.output is UNSET else _rows(answer.output)
    return SpecOutcome(answer.reason, **columns, output=output)


def spec_view(answer: View, asked: list[int] | None, profiles: Collection[str]) -> RankView:
    """The view in the words of the specification.

    Raises AnswerError when it leaves out a field of a profile that is checked, or in it a request.
    """
    _check_present(answer, _FIELDS, profiles)
    local_len = {} if answer.local_len is UNSET else answer.local_len
    check_requests(local_len, asked)
    for profile, name in _BY_REQUEST:
        told = getattr(answer, name)
        if profile in profiles and told.keys() != local_len.keys():
            raise AnswerError(
                f"its {name} are of requests {sorted(told)}, its local_len of {sorted(local_len)}"
            )
    return RankView(
        local_len,
        {} if answer.block_tables is UNSET else answer.block_tables,
        [] if answer.preempted is UNSET else answer.preempted,
        0 if answer.free_pages is UNSET else answer.free_pages,
        {} if answer.keys is UNSET else {id: _rows(rows) for id, rows in answer.keys.items()},
        {} if answer.values is UNSET else {id: _rows(rows) for id, rows in answer.values.items()},
    )


def _check_present(
    answer: Outcome | View, fields: dict[str, tuple[str, ...]], profiles: Collection[str]
) -> None:
    for profile, names in fields.items():
        for name in names if profile in profiles else ():
            if getattr(answer, name) is UNSET:
                raise AnswerError(f"its answer lacks {name}, which profile {profile} asks for")


def _rows(rows: Any) -> Any:
    """What `helix_conformance.expect.arrays.as_array` reads."""
    return msgspec.structs.asdict(rows) if isinstance(rows, Array) else rows


SCHEMAS: Final = Path(__file__).parents[1] / "schemas"
"""Where the published schemas are: `hello.schema.json` and so on."""


def message_schemas() -> dict[str, dict[str, Any]]:
    """The JSON Schema (2020-12) of each message, by its file's name."""
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
