"""The frames between the suite, the supervisors, and the processes that hold the engines.

Frames are msgpack of the types below, never pickled; arrays travel as type, shape and bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any

import msgspec

from helix_conformance.drive.driver import Answer, Kind, Watch
from helix_conformance.expect.arrays import encode_array
from helix_spec.config import Config, decode_layout
from helix_spec.events import Event
from helix_spec.layouts import Layout


class Play(msgspec.Struct, frozen=True, tag="play"):
    """To the engine's process: play this trace."""

    config: Config
    profiles: list[str]
    events: list[Event]
    watch: Watch
    engine: str | None = None
    """Another engine than the process was started with, which can do with its groups."""
    number: int = 0
    """Of the trace; its answer repeats it."""


class Ask(msgspec.Struct, frozen=True, tag="ask"):
    """To a supervisor: its engine is silent; where is it?"""


class Stop(msgspec.Struct, frozen=True, tag="stop"):
    """To a supervisor: the run is over. `whole` when no other supervisor is missing."""

    whole: bool


class Ready(msgspec.Struct, frozen=True, tag="ready"):
    """From the engine's process, once: it is up; this is what the engine declares."""

    profiles: list[str]
    settings: dict[str, str] = {}


class At(msgspec.Struct, frozen=True, tag="at"):
    """From the engine's process: it begins this event now."""

    event: int


class Done(msgspec.Struct, frozen=True, tag="done"):
    """From the engine's process: the answers to the start, each event and the end."""

    answers: list[Answer]
    number: int = 0


class Failed(msgspec.Struct, frozen=True, tag="failed"):
    """From the engine's process or its supervisor: how it failed, at which event."""

    event: int | None
    what: str
    how: Kind = "raised"


class Stuck(msgspec.Struct, frozen=True, tag="stuck"):
    """From a supervisor that was asked: where its engine is, and whether it waits for peers."""

    event: int | None
    waits: bool


ToEngine = Play | Ask | Stop
FromEngine = Ready | At | Done | Failed | Stuck


class FrameError(ValueError):
    """A frame that is no message; the text says what is wrong with it."""


def _written(x: Any) -> Any:
    return str(x) if isinstance(x, Layout) else encode_array(x)


_encode = msgspec.msgpack.Encoder(enc_hook=_written)
_from_engine: msgspec.msgpack.Decoder[FromEngine] = msgspec.msgpack.Decoder(FromEngine)
_to_engine: msgspec.msgpack.Decoder[ToEngine] = msgspec.msgpack.Decoder(
    ToEngine, dec_hook=decode_layout
)


def pack(message: ToEngine | FromEngine) -> bytes:
    """The frame of a message."""
    return _encode.encode(message)


def unpack_from_engine(frame: bytes) -> FromEngine:
    """The message of a frame. Raises FrameError when it is none."""
    with _refusing():
        return _from_engine.decode(frame)


def unpack_to_engine(frame: bytes) -> ToEngine:
    """The message of a frame. Raises FrameError when it is none."""
    with _refusing():
        return _to_engine.decode(frame)


@contextmanager
def _refusing() -> Iterator[None]:
    try:
        yield
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise FrameError(str(error)) from None


def send(connection: Connection, message: ToEngine | FromEngine) -> None:
    """Send one message."""
    connection.send_bytes(pack(message))
