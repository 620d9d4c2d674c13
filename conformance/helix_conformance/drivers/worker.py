"""The process that holds one rank's engine; started by `process.EngineProcess`.

Its control channel is a pipe of its own, given by file descriptor; torch.distributed, if the
engine needs it, meets at a store whose address the supervisor gives. stdout and stderr are the
engine's to flood.
"""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from datetime import timedelta
from multiprocessing.connection import Connection

import msgspec

from helix_conformance.drivers.wire import At, Done, Failed, Play, Ready, send, unpack_to_engine
from helix_conformance.protocol import Answer, Engine, load_engine
from helix_spec.events import Outcome


class Setup(msgspec.Struct, frozen=True):
    """What a worker is told when it starts."""

    engine: str
    rank: int
    world: int
    channel: int
    """File descriptor of the control channel."""
    store_host: str
    store_port: int
    group: str
    """Name under which the ranks of this pool meet at the store."""
    backend: str
    collective_timeout_s: float


def main(setup: Setup) -> None:
    """Serve traces until the supervisor hangs up."""
    faulthandler.register(signal.SIGUSR1)  # a supervisor asks a silent worker where it is
    channel = Connection(setup.channel)
    engine_class = load_engine(setup.engine)
    if engine_class.needs_processes:
        _join_group(setup)
        engine_class.join(setup.world)
    send(channel, Ready(sorted(engine_class.profiles)))
    while True:
        try:
            frame = channel.recv_bytes()
        except EOFError:
            os._exit(0)  # without the process group's farewell: peers may be gone already
        play = unpack_to_engine(frame)
        playing = load_engine(play.engine) if play.engine else engine_class
        send(channel, _play(channel, playing, setup.rank, play))


def _join_group(setup: Setup) -> None:
    import torch
    import torch.distributed as dist

    from helix_conformance.drivers.stores import joined_store

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
        engine = engine_class(rank)
        answers = [Answer(engine.start(play.config, frozenset(play.profiles)))]
        if answers[0].outcome.reason is not None:
            return Done(answers)  # it has not started: there is nothing more to ask
        for at, event in enumerate(play.events):
            send(channel, At(at))
            answers.append(Answer(engine.apply(event), play.watch.look(engine, at, event)))
        at = None
        answers.append(Answer(Outcome(), engine.observe()))
        return Done(answers)
    except Exception as error:
        return Failed(at, f"raised {type(error).__name__}: {error}")


if __name__ == "__main__":
    main(msgspec.json.decode(sys.argv[1], type=Setup))
