"""Ranks whose processes torchrun or mpiexec launches: each supervises one engine in a child.

A supervisor holds only its line to rank 0 and runs the engine in a child. That of rank 0 holds the
traces and the judge as well, and alone decides who has been silent for too long; the others relay
the lines of PROTOCOL.md. Whichever process ends, the others learn of it at once: what rank 0 knows
by then is written, and no process is left behind.
"""

from __future__ import annotations

import atexit
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

import msgspec

from helix_conformance.drive import messages
from helix_conformance.drive.asking import MalformedAnswer
from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.leash import NOT_STARTED
from helix_conformance.drive.meeting import (
    INTERFACE,
    KEY,
    Address,
    Group,
    RefusedError,
    Rendezvous,
    address_of,
    call,
    hosted_store,
    joined_store,
)
from helix_conformance.drive.process import (
    SERVE,
    START_LIMIT_S,
    Child,
    Lines,
    Loop,
    ProcessDriver,
    Rank,
    served,
)
from helix_conformance.drive.processes import end_with_the_parent, leashed, nothing_left
from helix_conformance.engines import COMMAND, EngineSpecError, load_engine, require_torch

LAUNCHED: Final = ("torchrun", "mpi")
"""Drivers whose processes are launched from outside."""
VERDICT_FILE: Final = "HELIX_CONFORMANCE_VERDICT"
"""Where such a run leaves its exit status: torchrun turns every failure into status 1. Until then
the process id of rank 0 is there, behind a word."""
NO_VERDICT: Final = 3
"""Exit status of a run that has none, and of a supervisor that rank 0 has left."""
ASK_LIMIT_S: Final = 5.0
"""How long a supervisor may take to say where its engine is."""
BAD_INPUT: Final = 2
"""Exit status of a run that ended before it met its ranks."""
INTERRUPTED: Final = 130
"""Exit status after Ctrl-C, as a shell has it."""
INTERRUPT_S: Final = 4.0
"""How long rank 0 may take to show what it knows then."""


class Meeting(msgspec.Struct, frozen=True):
    """What rank 0 sends all supervisors first, over their lines: where the engines' group meets.

    Parameters
    ----------
    host, port : str, int
        Where the store of the group listens; empty and 0 when the engines need none.
    """

    host: str = ""
    port: int = 0


class Place(msgspec.Struct, frozen=True):
    """Where the ranks are.

    Parameters
    ----------
    host : str
        Address on which rank 0 listens to the others.
    interface : str
        The network interface on which all ranks wait for each other.
    alone : bool
        Whether they are all on one machine.
    """

    host: str = "127.0.0.1"
    interface: str = "lo"
    alone: bool = True


def _place(*, alone: bool) -> Place:
    """The place of this process. Raises EngineSpecError when several machines know no way."""
    if alone:
        return Place()
    interface = os.environ.get(INTERFACE, "")
    if not interface or not os.environ.get(KEY):
        raise EngineSpecError(
            "The ranks are on several machines. Name the network interface by which they reach "
            f"each other in {INTERFACE}, and give all of them one secret in {KEY}."
        )
    try:
        return Place(address_of(interface), interface, alone=False)
    except OSError as error:
        raise EngineSpecError(
            f"{INTERFACE}: {interface!r} is no network interface with an IPv4 address."
        ) from error


# Torchrun


class Torchrun:
    """Processes that torchrun launches; those of several machines meet at its key-value store.

    What it reads is in the environment that torchrun gives each process.
    """

    def is_here(self) -> bool:
        """Return whether it has launched this process."""
        return "TORCHELASTIC_RUN_ID" in os.environ

    def rank(self) -> int:
        """Return the global rank of this process."""
        return int(os.environ["RANK"])

    def world(self) -> int:
        """Return the number of the processes."""
        return int(os.environ["WORLD_SIZE"])

    def command(self, ranks: int) -> tuple[list[str], dict[str, str]]:
        """Return the command that starts so many Python processes here, and its environment.

        Parameters
        ----------
        ranks : int
            Number of the processes.

        Returns
        -------
        words : list of str
            The command; what Python is to run follows it.
        more : dict of str to str
            Variables that the command needs in its environment.

        Examples
        --------
        >>> words, more = Torchrun().command(4)
        >>> words[-3:], more
        (['--nproc-per-node=4', '--no-python', '--'], {'OMP_NUM_THREADS': '1'})
        """
        require_torch("Driver torchrun")
        words = leashed([sys.executable, "-P", "-m", "helix_conformance.drive.agent"])
        words += [f"--nproc-per-node={ranks}", "--no-python", "--"]
        return [*words], {"OMP_NUM_THREADS": "1"}

    def place(self) -> Place:
        """Return where the ranks are. Raises EngineSpecError; in every process alike."""
        return _place(alone=os.environ["LOCAL_WORLD_SIZE"] == os.environ["WORLD_SIZE"])

    def rendezvous(self, place: Place) -> Rendezvous:
        """Return what rank 0 waits at for the others.

        Parameters
        ----------
        place : Place
            Where the ranks are.
        """
        if place.alone:
            return Rendezvous(self._here())
        found = Rendezvous(Address(place.host))
        self._control().set("address", msgspec.json.encode(found.address).decode())
        return found

    def address(self, place: Place) -> Address:
        """Return where rank 0 waits; of several machines once it has said so.

        Parameters
        ----------
        place : Place
            Where the ranks are.
        """
        if place.alone:
            return self._here()
        return msgspec.json.decode(self._control().get("address"), type=Address)

    def lines(self, descriptor: int, peer: int) -> Lines:
        """Return the lines to and from a peer.

        Parameters
        ----------
        descriptor : int
            File descriptor of the TCP connection to it.
        peer : int
            Its rank.
        """
        return Lines(descriptor, os.dup(descriptor))

    def leave_at_once(self, status: int) -> None:
        """Let this process end, with exit status `status`, while a peer is missing.

        Nothing waits for peers here.
        """

    def _here(self) -> Address:
        """The same in all processes of this launch, and in no other."""
        keys = ("TORCHELASTIC_RUN_ID", "MASTER_ADDR", "MASTER_PORT", "TORCHELASTIC_RESTART_COUNT")
        return Address(name="/".join(["helix", str(os.getuid()), *(os.environ[k] for k in keys)]))

    def _control(self) -> Any:
        store = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return joined_store(*store, "helix-control")


# MPI


class Mpi:
    """Processes that an mpiexec launches. Lines travel over MPI, as bytes.

    MPI does not say when a peer dies, so each message is announced on a TCP connection, and the end
    of the connection is the end of the peer. Start it with `mpiexec --continuous`: without, Open
    MPI ends all processes when one is killed, before anybody could report it.
    """

    has_met = False

    def is_here(self) -> bool:
        """See `Torchrun.is_here`: of Open MPI or of the PMI family."""
        return "OMPI_COMM_WORLD_RANK" in os.environ or "PMI_RANK" in os.environ

    def rank(self) -> int:
        """See `Torchrun.rank`. Whoever asks and is rank 0 must open a driver."""
        if _world().rank == 0:
            atexit.register(self._abandon)
        return int(_world().rank)

    def world(self) -> int:
        """See `Torchrun.world`."""
        return int(_world().size)

    def command(self, ranks: int) -> tuple[list[str], dict[str, str]]:
        """See `Torchrun.command`.

        Raises
        ------
        EngineSpecError
            When there is no mpiexec or no mpi4py.
        """
        if find_spec("mpi4py") is None:
            raise EngineSpecError("Driver mpi needs mpi4py: pip install 'helix-conformance[mpi]'.")
        beside = str(Path(sys.executable).parent)
        path = os.pathsep.join([beside, os.environ.get("PATH", "")])
        mpiexec = shutil.which("mpiexec", path=path)
        if mpiexec is None:
            raise EngineSpecError(
                "Driver mpi needs an mpiexec on the PATH: install one, or "
                "pip install 'helix-conformance[mpi]'."
            )
        more = {"PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe"}
        # On one machine ranks need no network among them; the listener of mpiexec itself cannot be
        # kept from any interface but by a network of its own.
        more |= {"OMPI_MCA_btl": "self,sm", "OMPI_MCA_pml": "ob1"}
        if os.geteuid() == 0:
            more |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
        return leashed([mpiexec, "--continuous", "-n", str(ranks)], apart=True), more

    def place(self) -> Place:
        """See `Torchrun.place`. All ranks call."""
        mpi, world = _mpi(), _world()
        longest = mpi.MAX_PROCESSOR_NAME
        mine = mpi.Get_processor_name().encode().ljust(longest, b"\0")
        names = bytearray(longest * world.size)
        world.Allgather([mine, mpi.BYTE], [names, mpi.BYTE])
        return _place(alone=bytes(names) == mine * world.size)

    def rendezvous(self, place: Place) -> Rendezvous:
        """See `Torchrun.rendezvous`."""
        here = Address(name=f"helix/{secrets.token_hex(16)}")
        found = Rendezvous(here if place.alone else Address(place.host))
        self._broadcast(bytearray(msgspec.json.encode(found.address).ljust(_ADDRESS)))
        self.has_met = True
        return found

    def address(self, place: Place) -> Address:
        """See `Torchrun.address`."""
        return msgspec.json.decode(self._broadcast(bytearray(_ADDRESS)), type=Address)

    def lines(self, descriptor: int, peer: int) -> Lines:
        """See `Torchrun.lines`."""
        return MpiLines(descriptor, peer)

    def leave_at_once(self, status: int) -> None:
        """See `Torchrun.leave_at_once`: MPI's own farewell would wait for all ranks."""
        atexit.register(_exit, status)

    def _broadcast(self, buffer: bytearray) -> bytearray:
        _world().Bcast([buffer, _mpi().BYTE], root=0)
        return buffer

    def _abandon(self) -> None:
        """Rank 0 ends and has met nobody: the others wait for it."""
        if not self.has_met:
            sys.stdout.flush()
            sys.stderr.flush()
            _world().Abort(BAD_INPUT)


_ADDRESS: Final = 1024
"""Bytes of an address, blanks behind it, as it is broadcast."""


class MpiLines(Lines):
    """Lines that travel over MPI; on the connection travels a byte for each message.

    Parameters
    ----------
    descriptor : int
        File descriptor of the TCP connection to the peer.
    peer : int
        Its rank.
    """

    TAG: Final = 7
    LIMIT_S: Final = 60.0
    """How long a message that has been announced may take."""

    def __init__(self, descriptor: int, peer: int) -> None:
        super().__init__(descriptor, os.dup(descriptor))
        self.peer = peer
        self.sending: tuple[Any, bytes] | None = None
        """The message that is under way, and may not be let go of."""

    def send(self, data: bytearray) -> int:
        """See `Lines.send`. Bytes count as sent once MPI is done with them."""
        if self.sending is None:
            super().send(bytearray(b"."))
            message = bytes(data)
            request = _world().Isend([message, _mpi().BYTE], dest=self.peer, tag=self.TAG)
            self.sending = request, message
        request, message = self.sending
        if not request.Test():
            time.sleep(0.0005)  # the connection could take more, so nothing else would wait
            raise BlockingIOError
        self.sending = None
        return len(message)

    def receive(self) -> bytes:
        """See `Lines.receive`: all messages that are announced now."""
        mpi, world, status = _mpi(), _world(), _mpi().Status()
        received = bytearray()
        for _ in super().receive():
            self._complete(lambda: world.Iprobe(source=self.peer, tag=self.TAG, status=status))
            message = bytearray(status.Get_count(mpi.BYTE))
            request = world.Irecv([message, mpi.BYTE], source=self.peer, tag=self.TAG)
            self._complete(request.Test)
            received += message
        return bytes(received)

    def _complete(self, done: Callable[[], bool]) -> None:
        """Wait without burning a core. Raises OSError when the peer must be gone."""
        until, pause = time.monotonic() + self.LIMIT_S, 0.0
        while not done():
            if time.monotonic() > until:
                raise OSError(f"A message has not travelled in {self.LIMIT_S:g} seconds.")
            time.sleep(pause)
            pause = min(0.005, pause + 0.0001)


def _mpi() -> Any:
    from mpi4py import MPI  # here, since mpi4py is optional, and its import starts MPI

    return MPI


def _world() -> Any:
    return _mpi().COMM_WORLD


def _exit(status: int) -> None:
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


Launcher = Torchrun | Mpi
"""What launches processes, and by which they first meet."""
_LAUNCHERS: Final[dict[str, Launcher]] = {"torchrun": Torchrun(), "mpi": Mpi()}


# Rank 0


class Remote(Rank):
    """A rank behind a supervisor, as rank 0 sees it.

    Parameters
    ----------
    rank : int
        The global rank.
    lines : Lines
        Lines to and from its supervisor.
    loop : Loop
        The loop that all ranks share.
    """

    stuck: messages.Stuck | None = None
    """The latest answer to `where`."""
    asked = 0

    def take(self, line: bytes) -> None:
        """See `Rank.take`; some lines are the supervisor's own."""
        match messages.relayed_of(line):
            case messages.Stuck() as stuck if stuck.seq == self.asked:
                self.stuck = stuck
            case messages.Stuck():
                raise MalformedAnswer("it says where it is, and was not asked")
            case messages.Ended(what, how):
                self.failed = self.failure(what, how)
            case answer:
                self.answered(answer)

    @property
    def lost(self) -> bool:
        """Whether the supervisor is gone, or soon will be."""
        return self.failed is not None and self.failed.how in ("gone", "stopped")

    def ended(self) -> EngineFailure:
        """See `Rank.ended`."""
        return self.failure("has a supervisor that was ended", "gone")

    def look(self) -> None:
        """See `Rank.look`."""
        self.asked, self.stuck = self.asked + 1, None
        self.lines.put(messages.line_of(messages.Where(self.asked)))

    def waits_for_peers(self) -> bool:
        """See `Rank.waits_for_peers`.

        Raises
        ------
        EngineFailure
            When the supervisor is silent too, for `ASK_LIMIT_S` seconds.
        """
        until = time.monotonic() + ASK_LIMIT_S
        while self.stuck is None:
            if self.failed is None and time.monotonic() > until:
                self.failed = self.failure("has a supervisor that fell silent", "gone")
            if self.failed is not None:
                raise self.failed
            self.loop.turn(0.1)
        return self.stuck.waits

    def kill(self) -> None:
        """See `Rank.kill`: hang up."""
        self.lines.close()


class LaunchedDriver(ProcessDriver):
    """Rank 0: supervises its own engine, and reaches the others through their supervisors.

    Parameters
    ----------
    engine : str
        Name of a Python engine, as `load_engine` takes it.
    name : str
        One of `LAUNCHED`.
    backend : str
        Of the engines' process group: `gloo` or `nccl`.
    deadline_s : float
        Seconds that the ranks may be silent for.

    Raises
    ------
    EngineFailure
        When a supervisor does not come, or an engine does not start.
    """

    def __init__(self, engine: str, name: str, *, backend: str, deadline_s: float) -> None:
        in_group = load_engine(engine).needs_processes
        super().__init__(engine, deadline_s, in_group=in_group)
        self.name, self.launcher = name, _LAUNCHERS[name]
        self.largest_world = world = self.launcher.world()
        place = self.launcher.place()
        self.store = hosted_store(place.host) if in_group else None  # it listens while this lives
        meeting = Meeting(place.host, self.store.port) if self.store else Meeting()
        try:
            found = self.launcher.rendezvous(place).lines(world, START_LIMIT_S)
            for line in found.values():
                os.write(line, msgspec.json.encode(meeting) + b"\n")
        except EngineFailure:
            self.launcher.leave_at_once(NO_VERDICT)
            raise
        self.child = served(
            engine, _group(self.launcher, place, meeting, 0, backend, deadline_s), self.loop
        )
        self.remotes = [
            Remote(rank, self.launcher.lines(line, rank), self.loop)
            for rank, line in sorted(found.items())
        ]
        # A launcher that ends everybody because one process died must not end the report of it.
        self.handler_before = signal.signal(signal.SIGTERM, self._told)
        self._have(world)

    def start_ranks(self, world: int) -> list[Rank]:
        """See `ProcessDriver.start_ranks`: once, for what is ended is not launched again."""
        if self.ranks:
            return []
        if self.child.lines.source < 0:
            raise EngineFailure(0, None, "has been ended after a failure")
        self.ranks = [self.child, *self.remotes]
        return self.ranks

    def kill(self) -> None:
        """See `ProcessDriver.kill`: let the other supervisors go, and end the engine."""
        if self.ranks:
            there = [remote for remote in self.remotes if not remote.lost]
            whole = len(there) == len(self.remotes)
            for remote in there:
                remote.lines.put(messages.line_of(messages.Stop(whole)))
            until = time.monotonic() + ASK_LIMIT_S
            while any(r.lines.unsent for r in there) and time.monotonic() < until:
                self.loop.turn(0.1)
            if whole:
                signal.signal(signal.SIGTERM, self.handler_before)
            else:
                self.launcher.leave_at_once(NO_VERDICT)  # it may still be told to stop
        super().kill()

    def _told(self, *_: Any) -> None:
        self.told_to_stop = True


def _group(
    launcher: Launcher, place: Place, meeting: Meeting, rank: int, backend: str, deadline_s: float
) -> Group:
    """The place of a rank's engine in its group."""
    return Group(
        rank=rank,
        world=launcher.world(),
        host=meeting.host,
        port=meeting.port,
        name="helix-engine",
        backend=backend,
        timeout_s=10 * deadline_s,  # a hang is rank 0's to call
        interface=place.interface,
    )


# The other ranks


class Supervised(Child):
    """A supervisor's engine: relays lines between rank 0 and it, until rank 0 stops it or is gone.

    Parameters
    ----------
    rank : int
        The global rank.
    command : sequence of str
        The command that serves the engine.
    up : Lines
        Lines to and from rank 0.

    Raises
    ------
    EngineFailure
        When the command cannot be started.
    """

    def __init__(self, rank: int, command: Sequence[str], up: Lines) -> None:
        super().__init__(rank, command, Loop(), ours=True)
        self.up = up
        self.asked: list[messages.Where] = []
        self.over = False
        self.stop: messages.Stop | None = None
        self.loop.add(up, self.listen_up)

    def take(self, line: bytes) -> None:
        """See `Rank.take`: rank 0 reads it."""
        self.up.put(line + b"\n")

    def listen_up(self) -> bool:
        """Take what rank 0 has sent; return whether there may be more."""
        try:
            for line in self.up.read():
                control = messages.control_of(line)
                if isinstance(control, messages.Stop):
                    self.stop, self.over = control, True
                elif control is not None:
                    self.asked.append(control)
                else:
                    self.lines.put(line + b"\n")
        except (EOFError, MalformedAnswer):
            self.over = True
        except messages.RequestError as error:
            what = f"has a supervisor that was sent a malformed line: {error}"
            self._tell(messages.Ended(what, "raised"))
            self.over = True
        return not self.over

    def run(self) -> messages.Stop | None:
        """Relay until the run is over; return rank 0's `Stop`, None when rank 0 is gone."""
        signal.signal(signal.SIGTERM, _told_to_stop)
        reported = False
        try:
            while not self.over:
                self.loop.turn(None)
                while self.asked and self.failed is None and not self.over:
                    where = self.asked.pop()
                    self.look()
                    self._tell(messages.Stuck(where.seq, self.waits_for_peers()))
                if self.failed is not None and not reported:
                    self._tell(messages.Ended(self.failed.what, self.failed.how))
                    reported = True
        except SystemExit:
            self._tell(messages.Ended("was told to stop", "stopped"))
            raise
        finally:
            self.kill()
        return self.stop

    def _tell(self, message: messages.Ended | messages.Stuck) -> None:
        self.up.put(messages.line_of(message))


def _told_to_stop(*_: Any) -> None:
    sys.exit(NO_VERDICT)


def _supervise(launcher: Launcher, engine: str, *, backend: str, deadline_s: float) -> int:
    """Be the supervisor of a rank but 0; returns the exit status."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # rank 0 ends in order, and the others with it
    rank, place = launcher.rank(), launcher.place()
    try:
        line = call(launcher.address(place), rank, START_LIMIT_S)
    except RefusedError as error:
        raise EngineSpecError(str(error)) from error
    meeting = msgspec.json.decode(_first_line(line), type=Meeting)
    group = _group(launcher, place, meeting, rank, backend, deadline_s)
    up = launcher.lines(line, 0)
    stop = Supervised(rank, [*SERVE, engine, group.to_json()], up).run()
    status = NO_VERDICT if stop is None else 0
    if stop is None or not stop.whole:
        launcher.leave_at_once(status)
    return status


def _first_line(line: int) -> bytes:
    """What rank 0 says first, byte by byte: what follows is not for this reader."""
    said = b""
    while not said.endswith(b"\n"):
        said += os.read(line, 1) or b"\n"
    return said


# Launching, and taking part


def take_part(engine: str, driver: str, *, ranks: int, backend: str, deadline_s: float) -> None:
    """Be one of the launched processes: rank 0 goes on, the others serve it and leave.

    Where nobody has launched this process, launch so many with the same command, and leave with
    the verdict of their rank 0.

    Parameters
    ----------
    engine : str
        Name of a Python engine, as `load_engine` takes it.
    driver : str
        One of `LAUNCHED`.
    ranks : int
        How many processes to launch, where that is to be done.
    backend : str
        Of the engines' process group: `gloo` or `nccl`.
    deadline_s : float
        Seconds that the ranks may be silent for.

    Raises
    ------
    EngineSpecError
        When the engine cannot be run so; in every process alike.
    SystemExit
        In every process but rank 0 of those that were launched.
    """
    if engine.startswith(COMMAND):
        raise EngineSpecError(f"{engine!r} is a command; it runs under --driver stdio.")
    load_engine(engine)
    launcher = _LAUNCHERS[driver]
    if not launcher.is_here():
        sys.exit(_launch(*launcher.command(ranks), driver))
    end_with_the_parent()
    if launcher.rank() != 0:
        sys.exit(_supervise(launcher, engine, backend=backend, deadline_s=deadline_s))
    if VERDICT_FILE in os.environ:
        Path(os.environ[VERDICT_FILE]).write_text(f"rank-0 {os.getpid()}")


def _launch(command: Sequence[str], more: dict[str, str], driver: str) -> int:
    """Run this command in processes of a launcher; the exit status is that of their rank 0."""
    words = [*command, sys.executable, "-P", "-m", "helix_conformance", *sys.argv[1:]]
    with (
        tempfile.TemporaryDirectory(prefix="helix-", ignore_cleanup_errors=True) as folder,
        nothing_left(),
    ):
        place = str(Path(folder, "verdict"))
        Path(place).touch()
        # Mpiexec that is killed leaves its own folder behind: it goes with ours.
        kept = {VERDICT_FILE: place, "PRTE_MCA_prte_tmpdir_base": folder}
        launched = subprocess.Popen(
            words,
            env=more | os.environ | kept,
            start_new_session=True,  # Ctrl-C is for rank 0 alone
        )
        try:
            launched.wait()
        except KeyboardInterrupt as interrupt:
            _interrupt(place)
            return getattr(interrupt, "status", INTERRUPTED)
        told = Path(place).read_text()
    if told.isdecimal():
        return int(told)
    if launched.returncode == NOT_STARTED:
        return BAD_INPUT  # why is on stderr
    print(
        f"The processes under {driver} have ended without a verdict: rank 0 did not live to give "
        "one. What was known by then is in the file of --json.",
        file=sys.stderr,
    )
    return NO_VERDICT


def _interrupt(place: str) -> None:
    """Have rank 0 show what it knows, and wait no longer than it may take."""
    said, until = Path(place).read_text().split(), time.monotonic() + INTERRUPT_S
    if said:
        with suppress(ProcessLookupError):
            os.kill(int(said[-1]), signal.SIGINT)
        while not Path(place).read_text().isdecimal() and time.monotonic() < until:
            time.sleep(0.05)


def leave_interrupted(driver: str | None, status: int) -> None:
    """End the process in which Ctrl-C was noticed, a launched one without a farewell to its peers.

    Parameters
    ----------
    driver : str or None
        The driver's name.
    status : int
        The exit status.
    """
    leave_verdict(status)
    if driver in LAUNCHED:
        _exit(status)
    sys.exit(status)


def leave_verdict(status: int) -> None:
    """Write the exit status where a launching process looks for it.

    Several processes may end before they meet, and alike.
    """
    if VERDICT_FILE in os.environ:
        Path(os.environ[VERDICT_FILE]).write_text(str(status))
