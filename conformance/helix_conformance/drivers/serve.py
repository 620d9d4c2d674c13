"""A Python engine as a command: one rank of it, over stdin and stdout, as PROTOCOL.md says.

    python -m helix_conformance.drivers.serve my_package.adapter:Engine

For an engine that lives in another environment, container or machine than the suite; and the
stdio driver starts any Python engine so.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import msgspec

from helix_conformance.drivers.asking import words
from helix_conformance.drivers.messages import (
    PROTOCOL,
    Apply,
    Array,
    Failed,
    FromEngine,
    Hello,
    Outcome,
    Ready,
    Start,
    ToEngine,
    View,
)
from helix_conformance.protocol import Engine, EngineSpecError, engine_settings, load_engine

_to_engine: msgspec.json.Decoder[ToEngine] = msgspec.json.Decoder(ToEngine)


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
        assert self.engine is not None, "nothing has been started"
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


def main(spec: str) -> None:
    """Serve until stdin ends. What the engine prints goes to stderr: stdout is for answers."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        server = Server(spec)
    except EngineSpecError as error:
        sys.exit(str(error))
    encode = msgspec.json.Encoder(enc_hook=_as_message).encode
    for line in sys.stdin.buffer:
        request = _to_engine.decode(line)
        answer = server.answer(request)
        try:
            text = encode(answer)
        except (TypeError, ValueError, OverflowError) as error:
            text = encode(Failed(request.seq, f"answered garbage: {error}"))
        answers.write(text + b"\n")
        answers.flush()


if __name__ == "__main__":
    main(sys.argv[1])
