"""A Python engine behind PROTOCOL.md: one rank of it, over stdin and stdout.

    python -m helix_conformance.drive.serve my_package.adapter:Engine [GROUP]

For an engine that lives in another environment, container or machine than the suite; the stdio
driver starts any Python engine so. The pool, and the supervisors of launched ranks, give a `Group`
as JSON: the rank's place in torch.distributed.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import sys
from typing import Any

import msgspec

from helix_conformance.drive.asking import (
    ReportedError,
    checked_outcome,
    checked_view,
    traceback_of,
    words,
)
from helix_conformance.drive.meeting import Group
from helix_conformance.drive.messages import (
    MAX_LINE_BYTES,
    PROTOCOL,
    Apply,
    Array,
    Failed,
    FromEngine,
    GroupColumns,
    GroupView,
    Hello,
    LayoutRefusedError,
    Outcome,
    Ready,
    RequestError,
    Start,
    ToEngine,
    View,
    request_of,
)
from helix_conformance.engines import (
    EngineSpecError,
    engine_declaration,
    engine_settings,
    load_engine,
    made,
    needs_group,
    takes_exchanges_done,
)
from helix_spec.capabilities import EVERYWHERE
from helix_spec.engine import Engine
from helix_spec.engine import Outcome as SpecOutcome
from helix_spec.events import Reason


class Server:
    """Answers one request at a time for one rank.

    Parameters
    ----------
    spec : str
        Name of the engine, as `load_engine` takes it.
    group : Group or None
        The rank's place in torch.distributed, for engines that need it.

    Raises
    ------
    EngineSpecError
        When there is no such engine, or it needs a group and there is none.
    """

    def __init__(self, spec: str, group: Group | None = None) -> None:
        self.spec = spec
        self.engine_class = load_engine(spec)
        if self.engine_class.needs_processes:
            if group is None:
                raise EngineSpecError(needs_group(spec))
            group.join()
            self.engine_class.join(group.world)
        self.engine: Engine | None = None

    def answer(self, request: ToEngine) -> FromEngine:
        """Return the engine's answer to a request; `Failed` when the engine raises."""
        try:
            return self._answer(request)
        except Exception as error:
            return Failed(request.seq, words(error), traceback_of(error))

    def _answer(self, request: ToEngine) -> FromEngine:
        seq = request.seq
        if isinstance(request, Hello):
            boxes, freedoms = engine_declaration(self.engine_class)
            return Ready(
                seq,
                PROTOCOL,
                self.spec,
                sorted(self.engine_class.profiles),
                settings=engine_settings(self.engine_class),
                capabilities=None if boxes == EVERYWHERE else list(boxes),
                freedoms=freedoms,
                takes_exchanges_done=takes_exchanges_done(self.engine_class),
            )
        if isinstance(request, Start):
            if self.engine is None or not request.again:
                self.engine = made(self.engine_class, request.rank, request.exchanges_done)
            outcome = self.engine.start(request.config, frozenset(request.profiles))
            return Outcome(seq, **_fields(checked_outcome(outcome)))
        if self.engine is None:
            raise ReportedError("was asked before it was started")
        if isinstance(request, Apply):
            return Outcome(seq, **_fields(checked_outcome(self.engine.apply(request.event))))
        view = checked_view(self.engine.observe(request.ids), request.ids)
        return View(seq, **_fields(view))


def _fields(answer: Any) -> dict[str, Any]:
    """The fields of an Outcome or a RankView that say something."""
    told = {
        name: value
        for name in answer.__struct_fields__
        if (value := getattr(answer, name)) is not None
    }
    groups, pools = told.pop("groups", {}), told.pop("pools", {})
    if groups:
        kind = GroupColumns if isinstance(answer, SpecOutcome) else GroupView
        told["groups"] = {name: kind(**_fields(one)) for name, one in groups.items()}
    if pools:
        told["pools"] = pools
    return told


def as_message(x: Any) -> Array:
    """Return a numpy array, or a torch tensor, in the form in which it travels.

    PROTOCOL.md says it under Arrays. Float16, float32 and float64 travel as they are. The types of
    at most 16 bits that numpy or torch has beside them, bfloat16 say, travel as float32, which
    holds them exactly; all others as float64.

    Parameters
    ----------
    x : array or tensor of numbers, of any shape
        What an engine answered with.

    Returns
    -------
    Array
        Its type, its shape and its bytes, the last index running fastest.

    Raises
    ------
    TypeError
        When it is neither, or holds no numbers.

    Examples
    --------
    >>> import numpy as np
    >>> as_message(np.zeros((1, 2), np.int64)).dtype, as_message(np.zeros((1, 2))).shape
    ('<f8', [1, 2])
    """
    if hasattr(x, "detach"):  # a tensor, of a torch that is not imported for its sake
        x = x.detach().cpu()
        x = (x.float() if x.is_floating_point() and x.itemsize < 4 else x).numpy()
    if not (hasattr(x, "tobytes") and hasattr(x, "dtype")) or x.dtype.kind not in "fiubV":
        raise TypeError(f"An engine answered with a {type(x).__name__}, which cannot be sent.")
    if x.dtype.str not in ("<f2", "<f4", "<f8"):
        x = x.astype("<f4" if x.dtype.itemsize <= 2 else "<f8")
    return Array(x.dtype.str, list(x.shape), x.tobytes())


_encode = msgspec.json.Encoder(enc_hook=as_message).encode


def main(spec: str, group: Group | None = None) -> None:
    """Serve until stdin ends. What the engine prints goes to stderr: stdout is for answers.

    Parameters
    ----------
    spec : str
        Name of the engine, as `load_engine` takes it.
    group : Group or None
        The rank's place in torch.distributed, for engines that need it.

    Raises
    ------
    SystemExit
        At the end: with status 0, with 1 after a line that is no request, or with 2 and a sentence
        when the engine cannot be served. A rank of a group that has begun to serve ends by
        `os._exit`.
    """
    faulthandler.register(signal.SIGUSR1)  # by which a driver asks a silent rank where it is
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    try:
        server = Server(spec, group)
    except EngineSpecError as error:
        print(error, file=sys.stderr, flush=True)
        sys.exit(2)
    gc.freeze()  # what was imported stays: each full collection would look through all of it
    while line := sys.stdin.buffer.readline(MAX_LINE_BYTES):
        try:
            answers.write(reply(server, line))
        except RequestError as error:
            print(error, file=sys.stderr, flush=True)
            _leave(1, group)
        answers.flush()
    _leave(0, group)


def _leave(status: int, group: Group | None) -> None:
    """End; without the process group's farewell, since peers may be gone already."""
    if group is not None:
        os._exit(status)
    sys.exit(status)


def reply(server: Server, line: bytes) -> bytes:
    """Return the line that answers a line.

    Parameters
    ----------
    server : Server
        The rank that answers.
    line : bytes
        A request of PROTOCOL.md.

    Returns
    -------
    bytes
        Its answer, the end of the line included.

    Raises
    ------
    RequestError
        When the line is no request.

    Examples
    --------
    >>> reply(Server("reference"), b'{"type": "observe", "seq": 1}').strip()
    b'{"type":"failed","seq":1,"what":"was asked before it was started"}'
    """
    try:
        request = request_of(line)
    except LayoutRefusedError as error:
        print(error, file=sys.stderr, flush=True)
        return _encode(Outcome(error.seq, Reason.BAD_CONFIG)) + b"\n"
    answer = server.answer(request)
    try:
        text = _encode(answer)
    except (TypeError, ValueError, OverflowError) as error:
        text = _encode(Failed(request.seq, f"gave a malformed answer: {error}"))
    return text + b"\n"


if __name__ == "__main__":
    main(sys.argv[1], *(msgspec.json.decode(text, type=Group) for text in sys.argv[2:]))
