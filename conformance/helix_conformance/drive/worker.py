"""The process that holds one rank's engine; started by `process.EngineProcess`.

Its control channel is a pipe of its own, given by file descriptor; torch.distributed, if the
engine needs it, meets at a store whose address the supervisor gives. stdout and stderr are the
engine's to flood.
"""

from __future__ import annotations

import ctypes
import faulthandler
import gc
import os
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Final, NoReturn

import msgspec

from helix_conformance.drive.asking import apply, finish, start, words
from helix_conformance.drive.wire import (
    At,
    Done,
    Failed,
    FrameError,
    Play,
    Ready,
    pack,
    send,
    unpack_to_engine,
)
from helix_conformance.engines import engine_settings, load_engine
from helix_spec.engine import Engine

PR_SET_PDEATHSIG: Final = 1
"""Of <sys/prctl.h>."""


class Setup(msgspec.Struct, frozen=True):
    """What a worker is told when it starts."""

    engine: str
    rank: int
    world: int
    channel: int
    """File descriptor of the control channel."""
    store_host: str = ""
    """Where the ranks meet, when the engine needs them to."""
    store_port: int = 0
    group: str = ""
    """Name under which they meet."""
    backend: str = "gloo"
    collective_timeout_s: float = 300.0


def main(setup: Setup) -> None:
    """Serve traces until the supervisor hangs up."""
    _end_with_the_supervisor()
    faulthandler.register(signal.SIGUSR1)  # a supervisor asks a silent worker where it is
    channel = Connection(setup.channel)
    engine_class = load_engine(setup.engine)
    if engine_class.needs_processes:
        _join_group(setup)
        engine_class.join(setup.world)
    gc.freeze()  # what was imported stays: each full collection would look through all of it
    send(channel, Ready(sorted(engine_class.profiles), engine_settings(engine_class)))
    while True:
        try:
            frame = channel.recv_bytes()
        except EOFError:
            os._exit(0)  # without the process group's farewell: peers may be gone already
        try:
            play = unpack_to_engine(frame)
        except FrameError as error:
            _leave(f"Rank {setup.rank} was sent garbage: {error}.")
        if not isinstance(play, Play):
            _leave(f"Rank {setup.rank} was sent {play}, which is for supervisors.")
        channel.send_bytes(_packed(_play(channel, engine_class, setup.rank, play)))


def _leave(sentence: str) -> NoReturn:
    """End at once, without the process group's farewell."""
    print(sentence, file=sys.stderr, flush=True)
    os._exit(1)


def _end_with_the_supervisor() -> None:
    """A supervisor that is killed cannot end its child; where the system can, it does."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _join_group(setup: Setup) -> None:
    import torch
    import torch.distributed as dist

    from helix_conformance.drive.stores import joined_store

    if setup.backend == "nccl":
        torch.cuda.set_device(setup.rank % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)
    dist.init_process_group(
        setup.backend,
        store=joined_store(setup.store_host, setup.store_port, setup.group),
        rank=setup.rank,
        world_size=setup.world,
        timeout=timedelta(seconds=setup.collective_timeout_s),
    )


def _play(channel: Connection, engine_class: type[Engine], rank: int, play: Play) -> Done | Failed:
    at: int | None = None
    try:
        playing = load_engine(play.engine) if play.engine else engine_class
        engine = playing(rank)
        answers = [start(engine, play.config, frozenset(play.profiles))]
        if answers[0].outcome.reason is not None:
            return Done(answers, play.number)  # it has not started: there is nothing more to ask
        for at, event in enumerate(play.events):
            send(channel, At(at))
            answers.append(apply(engine, at, event, play.watch))
        at = None
        answers.append(finish(engine))
        return Done(answers, play.number)
    except Exception as error:
        return Failed(at, words(error))


def _packed(reply: Done | Failed) -> bytes:
    """The frame of a reply; of values that cannot be sent, whose they are."""
    try:
        return pack(reply)
    except (TypeError, ValueError, OverflowError) as error:
        what = str(error)
    assert isinstance(reply, Done)  # a failure is text
    for index, answer in enumerate(reply.answers):
        try:
            pack(Done([answer]))
        except (TypeError, ValueError, OverflowError):
            at = index - 1 if 0 < index < len(reply.answers) - 1 else None  # start and end
            return pack(Failed(at, f"answered garbage: {what}"))
    return pack(Failed(None, f"answered garbage: {what}"))


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Setup))
