"""Ranks under mpiexec: each launched process supervises one engine in a child.

Traces and answers travel over MPI; the engines form a process group of torch.distributed, which
rank 0 hosts a store for. MPI does not say when a peer dies, so each frame is announced on a line
(`lines`), and the end of the line is the end of the peer. Start it with `mpiexec --continuous`:
without, Open MPI ends all processes when one is killed, before anybody could report it.
"""

from __future__ import annotations

import atexit
import os
import shutil
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Final

import msgspec

from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.lines import Address, Line, Switchboard, call
from helix_conformance.drive.process import START_LIMIT_S
from helix_conformance.drive.supervised import (
    LEFT_ALONE,
    SupervisedDriver,
    leave_at_once,
    met_at,
    setup_of,
    supervise,
)
from helix_conformance.engines import EngineSpecError, load_engine

TAG: Final = 7
TRANSFER_LIMIT_S: Final = 60.0
"""How long a frame that has been announced may take."""
BAD_INPUT: Final = 2
"""Exit status of a run that ended before it met its ranks."""
AS_ROOT: Final = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
}
MORE_RANKS_THAN_CORES: Final = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}


def launched() -> bool:
    """Whether this process was started by an mpiexec, of Open MPI or of the PMI family."""
    return "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ


def rank() -> int:
    """The global rank of this process. Whoever asks and is rank 0 must open an MpiDriver."""
    if _world().rank == 0:
        atexit.register(_abandon)
    return int(_world().rank)


def _abandon() -> None:
    """Rank 0 ends and has met nobody: the others wait for it."""
    if not MpiDriver.has_met:
        sys.stdout.flush()
        sys.stderr.flush()
        _world().Abort(BAD_INPUT)


def launcher(ranks: int) -> tuple[list[str], dict[str, str]]:
    """The command that starts so many Python processes on this machine, and its environment.

    Raises EngineSpecError when there is no mpiexec or no mpi4py.
    """
    _world_or_sentence()
    beside = str(Path(sys.executable).parent)
    mpiexec = shutil.which("mpiexec", path=os.pathsep.join([beside, os.environ.get("PATH", "")]))
    if mpiexec is None:
        raise EngineSpecError(
            "There is no mpiexec on the PATH; install one, or helix-conformance[mpi]."
        )
    more = MORE_RANKS_THAN_CORES | (AS_ROOT if os.geteuid() == 0 else {})
    return [mpiexec, "--continuous", "-n", str(ranks), sys.executable], more


class MpiLine(Line):
    """A line that announces frames, which travel over MPI."""

    def __init__(self, connection: Connection, peer: int) -> None:
        super().__init__(connection)
        self.peer = peer

    def send(self, frame: bytes) -> None:
        """See `Line.send`."""
        mpi = _mpi()
        request = _world().Isend([frame, mpi.BYTE], dest=self.peer, tag=TAG)
        self.connection.send_bytes(b"frame")
        _complete(request.Test)

    def receive(self) -> bytes:
        """See `Line.receive`."""
        mpi, world = _mpi(), _world()
        self.connection.recv_bytes()
        status = mpi.Status()
        _complete(lambda: world.Iprobe(source=self.peer, tag=TAG, status=status))
        frame = bytearray(status.Get_count(mpi.BYTE))
        request = world.Irecv([frame, mpi.BYTE], source=self.peer, tag=TAG)
        _complete(request.Test)
        return bytes(frame)


def _complete(done: Any) -> None:
    """Wait without burning a core. Raises OSError when the peer must be gone."""
    until, pause = time.monotonic() + TRANSFER_LIMIT_S, 0.0
    while not done():
        if time.monotonic() > until:
            raise OSError(f"A frame has not travelled in {TRANSFER_LIMIT_S:g} seconds.")
        time.sleep(pause)
        pause = min(0.005, pause + 0.0001)


class Meeting(msgspec.Struct, frozen=True):
    """What rank 0 tells all supervisors at the beginning."""

    address: Address
    store_host: str = ""
    store_port: int = 0


class MpiDriver(SupervisedDriver):
    """Rank 0 of an mpiexec."""

    name = "mpi"
    has_met = False

    def __init__(self, engine: str, *, backend: str, deadline_s: float) -> None:
        world = _world()
        host = _host()
        switchboard = Switchboard(host)
        meeting = Meeting(switchboard.address)
        if load_engine(engine).needs_processes:
            from helix_conformance.drive.stores import hosted_store

            self.store = hosted_store(host)  # it listens as long as this object lives
            meeting = msgspec.structs.replace(meeting, store_host=host, store_port=self.store.port)
        world.bcast(msgspec.json.encode(meeting), root=0)
        MpiDriver.has_met = True
        try:
            found = switchboard.lines(world.size, START_LIMIT_S)
        except EngineFailure:
            self.not_whole()
            raise
        setup = setup_of(engine, 0, world.size, backend, deadline_s)
        super().__init__(
            engine,
            met_at(setup, meeting.store_host, meeting.store_port),
            {rank: MpiLine(connection, rank) for rank, connection in found.items()},
            deadline_s,
        )

    def not_whole(self) -> None:
        """MPI's own farewell waits for all ranks, the one that is gone too: leave without it."""
        atexit.register(leave_at_once, LEFT_ALONE)


def serve(engine: str, *, backend: str, deadline_s: float) -> int:
    """Be another rank than 0; returns the exit status, when all ranks can leave in order."""
    world = _world()
    _host()
    meeting = msgspec.json.decode(world.bcast(None, root=0), type=Meeting)
    setup = setup_of(engine, world.rank, world.size, backend, deadline_s)
    line = MpiLine(call(meeting.address, world.rank, START_LIMIT_S), 0)
    stop = supervise(met_at(setup, meeting.store_host, meeting.store_port), line)
    if stop is None or not stop.whole:
        leave_at_once(LEFT_ALONE if stop is None else 0)
    return 0


def _host() -> str:
    """Where rank 0 listens: on the loopback alone, when all ranks are on one machine."""
    names: list[str] = _world().allgather(_mpi().Get_processor_name())
    return "127.0.0.1" if len(set(names)) == 1 else names[0]


def _mpi() -> Any:
    from mpi4py import MPI

    return MPI


def _world() -> Any:
    return _mpi().COMM_WORLD


def _world_or_sentence() -> None:
    import importlib.util

    if importlib.util.find_spec("mpi4py") is None:
        raise EngineSpecError("There is no mpi4py; install helix-conformance[mpi].")
