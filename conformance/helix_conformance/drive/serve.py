"""A Python engine as a command: one rank of it, over stdin and stdout, as PROTOCOL.md says.

    python -m helix_conformance.drive.serve my_package.adapter:Engine

For an engine that lives in another environment, container or machine than the suite; and the
stdio driver starts any Python engine so.
"""

from __future__ import annotations

import os
import sys
from typing import Any, Final

import msgspec

from helix_conformance.drive.asking import ReportedError, words
from helix_conformance.drive.messages import (
    PROTOCOL,
    Apply,
    Array,
    Failed,
    FromEngine,
    Hello,
    Outcome,
    Ready,
    RequestError,
    Start,
    ToEngine,
    View,
    request_of,
)
from helix_conformance.engines import EngineSpecError, engine_settings, load_engine
from helix_spec.engine import Engine

MAX_LINE_BYTES: Final = 2**28
"""Bytes of one request."""


class Server:
    """Answers one request at a time for one rank."""

    def __init__(self, spec: str) -> None:
        self.spec = spec
        self.engine_class = load_engine(spec)
        if self.engine_class.needs_processes:
            raise EngineSpecError(
                f"Engine {spec} needs torch.distributed among its ranks; use --driver pool."
            )
        self.engine: Engine | None = None

    def answer(self, request: ToEngine) -> FromEngine:
        """What the engine says, whatever it does."""
        try:
            return self._answer(request)
        except Exception as error:
            return Failed(request.seq, words(error))

    def _answer(self, request: ToEngine) -> FromEngine:
        seq = request.seq
        if isinstance(request, Hello):
            settings = engine_settings(self.engine_class)
            profiles = sorted(self.engine_class.profiles)
            return Ready(seq, PROTOCOL, self.spec, profiles, settings=settings)
        if isinstance(request, Start):
            self.engine = self.engine_class(request.rank)
            outcome: Any = self.engine.start(request.config, frozenset(request.profiles))
            return Outcome(seq, **_fields(outcome))
        if self.engine is None:
            raise ReportedError("was asked before it was started")
        if isinstance(request, Apply):
            return Outcome(seq, **_fields(self.engine.apply(request.event)))
        return View(seq, **_fields(self.engine.observe(request.ids)))


def _fields(answer: Any) -> dict[str, Any]:
    """The fields of an Outcome or a RankView that say something."""
    return {
        name: value for name, value in msgspec.structs.asdict(answer).items() if value is not None
    }


def _as_message(x: Any) -> Any:
    """A numpy array in the form in which it travels."""
    if hasattr(x, "tobytes") and hasattr(x, "dtype"):
        x = x if x.dtype.str in ("<f2", "<f4", "<f8") else x.astype("<f8")
        return Array(x.dtype.str, list(x.shape), x.tobytes())
    raise TypeError(f"An engine answered with a {type(x).__name__}, which cannot be sent.")


_encode = msgspec.json.Encoder(enc_hook=_as_message).encode


def main(spec: str) -> None:
    """Serve until stdin ends. What the engine prints goes to stderr: stdout is for answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        server = Server(spec)
    except EngineSpecError as error:
        sys.exit(str(error))
    while line := sys.stdin.buffer.readline(MAX_LINE_BYTES):
        try:
            answers.write(reply(server, line))
        except RequestError as error:
            sys.exit(str(error))
        answers.flush()


def reply(server: Server, line: bytes) -> bytes:
    """The line that answers a line. Raises RequestError when that is none."""
    request = request_of(line)
    answer = server.answer(request)
    try:
        text = _encode(answer)
    except (TypeError, ValueError, OverflowError) as error:
        text = _encode(Failed(request.seq, f"answered garbage: {error}"))
    return text + b"\n"


if __name__ == "__main__":
    main(sys.argv[1])
