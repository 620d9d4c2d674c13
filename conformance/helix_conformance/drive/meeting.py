"""How processes of a run find each other: a torch.distributed group, and lines between supervisors.

A line is a connection, so both ends learn at once when the other process is gone, however it went.
On one machine nobody listens but on the loopback; on several, on the interface that the user names.
"""

from __future__ import annotations

import fcntl
import hmac
import os
import socket
import struct
import time
from contextlib import closing
from datetime import timedelta
from typing import Any, Final

import msgspec

from helix_conformance.drive.driver import EngineFailure

KEY: Final = "HELIX_CONFORMANCE_KEY"
"""Variable of the secret that the ranks of several machines share."""
INTERFACE: Final = "HELIX_CONFORMANCE_INTERFACE"
"""Variable of the network interface by which they reach each other."""
HANDSHAKE_S: Final = 5.0
"""How long a caller may take to say who it is."""
NONCE: Final = 32
PROOF: Final = 32
"""Bytes of a random number, and of a proof that its sender has the key."""
SIOCGIFADDR: Final = 0x8915
"""Of <linux/sockios.h>."""


def hosted_store(host: str = "127.0.0.1") -> Any:
    """Return a key-value store that listens on a free port as long as the object lives.

    Parameters
    ----------
    host : str
        Address of this machine on which it listens, and on no other.

    Returns
    -------
    torch.distributed.TCPStore
        The store; `port` says where it listens.
    """
    import torch.distributed as dist  # here, since torch is optional

    # Torch itself would listen on all interfaces.
    listening = socket.create_server((host, 0)).detach()
    return dist.TCPStore(  # type: ignore[attr-defined]  # not in the stub
        host, 0, is_master=True, wait_for_workers=False, master_listen_fd=listening
    )


def joined_store(host: str, port: int, name: str) -> Any:
    """Return the store at an address; its keys are apart from those under other names.

    Parameters
    ----------
    host : str
        Name or address of the machine where the store listens.
    port : int
        Its TCP port.
    name : str
        Prefix of the keys.

    Returns
    -------
    torch.distributed.PrefixStore
        The store.
    """
    import torch.distributed as dist  # here, since torch is optional

    store = dist.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]  # not in the stub
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # not in the stub


class Group(msgspec.Struct, frozen=True, kw_only=True):
    """A process's place among the ranks, and where they meet; given on its command line.

    Parameters
    ----------
    rank : int
        The global rank of the process.
    world : int
        Number of the processes.
    host, port : str, int
        Where the store listens at which they meet, when the engine needs them to.
    name : str
        The prefix of the keys in that store.
    backend : str
        Of the process group: `gloo` or `nccl`.
    timeout_s : float
        Seconds that a collective may take.
    interface : str
        The network interface on which the ranks wait for each other.

    Examples
    --------
    >>> import json
    >>> json.loads(Group(rank=1, world=2, name="pool-1").to_json())["rank"]
    1
    """

    rank: int = 0
    world: int
    host: str = "127.0.0.1"
    port: int = 0
    name: str
    backend: str = "gloo"
    timeout_s: float = 300.0
    interface: str = "lo"

    def to_json(self) -> str:
        """Return the group as text; `msgspec.json.decode` reads it."""
        return msgspec.json.encode(self).decode()

    def join(self) -> None:
        """Initialise torch.distributed with this process as its rank."""
        import torch  # here, since torch is optional
        import torch.distributed as dist

        if self.backend == "nccl":
            torch.cuda.set_device(self.rank % torch.cuda.device_count())
        else:
            torch.set_num_threads(1)
        for backend in ("GLOO", "NCCL"):  # each would take one that others can reach
            os.environ.setdefault(f"{backend}_SOCKET_IFNAME", self.interface)
        dist.init_process_group(
            self.backend,
            store=joined_store(self.host, self.port, self.name),
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=self.timeout_s),
        )


class Address(msgspec.Struct, frozen=True):
    """Where rank 0 waits for the supervisors.

    Parameters
    ----------
    host : str
        Address of rank 0's machine; empty when all ranks are on one.
    port : int
        The TCP port.
    name : str
        On one machine the name of a socket in no file system, of which the system says who calls.
    """

    host: str = ""
    port: int = 0
    name: str = ""


class RefusedError(Exception):
    """Who is at the other end of a line is none of ours."""


class Rendezvous:
    """Rank 0's end: listens until every other rank has a line.

    On one machine a caller must be of the same user, which the system says. On several it proves
    that it has the key of the environment (`KEY`), as rank 0 does in turn; the key never travels.

    Parameters
    ----------
    address : Address
        Where to listen; a port of 0 is any that is free.

    Raises
    ------
    OSError
        When nothing can be opened there.
    """

    def __init__(self, address: Address) -> None:
        if address.name:
            self.socket = socket.socket(socket.AF_UNIX)
            self.socket.bind(f"\0{address.name}")
            self.socket.listen()
            self.address = address
        else:
            self.socket = socket.create_server((address.host, address.port))
            self.address = Address(address.host, self.socket.getsockname()[1])

    def lines(self, world: int, limit_s: float) -> dict[int, int]:
        """Return the descriptor of a line to each rank but 0, and listen no more.

        Parameters
        ----------
        world : int
            Number of the ranks, rank 0 included.
        limit_s : float
            Seconds that they may take.

        Returns
        -------
        dict of int to int
            File descriptor of the connection, by rank.

        Raises
        ------
        EngineFailure
            When one has not come within `limit_s` seconds.
        """
        found: dict[int, int] = {}
        until = time.monotonic() + limit_s
        with closing(self.socket):
            while len(found) < world - 1:
                self.socket.settimeout(max(0.01, until - time.monotonic()))
                try:
                    accepted, _ = self.socket.accept()
                except TimeoutError:
                    missing = min(set(range(1, world)) - found.keys())
                    what = f"has no supervisor after {limit_s:g} seconds"
                    raise EngineFailure(missing, None, what, "gone") from None
                accepted.settimeout(HANDSHAKE_S)
                try:
                    rank = _greeted(accepted)
                except (OSError, ValueError, RefusedError):
                    rank = -1
                if rank in range(1, world) and rank not in found:
                    found[rank] = _line(accepted)
                else:
                    accepted.close()
        return found


def call(address: Address, rank: int, limit_s: float) -> int:
    """Return the descriptor of a line from a rank to rank 0.

    Parameters
    ----------
    address : Address
        Where rank 0 listens, or soon will.
    rank : int
        The rank of this process.
    limit_s : float
        Seconds that connecting may take.

    Returns
    -------
    int
        File descriptor of the connection.

    Raises
    ------
    OSError
        When rank 0 cannot be reached.
    RefusedError
        When who answers there is not rank 0.
    """
    until = time.monotonic() + limit_s
    while True:
        try:
            connected = _connected(address, limit_s)
            break
        except ConnectionRefusedError:
            if time.monotonic() > until:
                raise
            time.sleep(0.05)
    connected.settimeout(limit_s)
    try:
        _greet(connected, rank)
    except (OSError, RefusedError):
        connected.close()
        raise
    return _line(connected)


def _connected(address: Address, limit_s: float) -> socket.socket:
    if not address.name:
        return socket.create_connection((address.host, address.port), limit_s)
    connected = socket.socket(socket.AF_UNIX)
    try:
        connected.connect(f"\0{address.name}")
    except OSError:
        connected.close()
        raise
    return connected


# Both ends say a random number, the caller with its rank. Rank 0 then proves that it has the key,
# and the caller after it; on one machine the key is empty, and the system vouches for both ends.


def _greeted(accepted: socket.socket) -> int:
    """Rank 0's part; returns the rank of who calls."""
    key = _key_or_same_user(accepted)
    said = _heard(accepted, NONCE + 4)
    mine = os.urandom(NONCE)
    accepted.sendall(mine + _proof(key, b"rank 0", said, mine))
    if not hmac.compare_digest(_heard(accepted, PROOF), _proof(key, b"caller", said, mine)):
        raise RefusedError
    return int.from_bytes(said[NONCE:])


def _greet(connected: socket.socket, rank: int) -> None:
    """The caller's part."""
    key = _key_or_same_user(connected)
    said = os.urandom(NONCE) + rank.to_bytes(4)
    connected.sendall(said)
    answer = _heard(connected, NONCE + PROOF)
    theirs, proof = answer[:NONCE], answer[NONCE:]
    if not hmac.compare_digest(proof, _proof(key, b"rank 0", said, theirs)):
        raise RefusedError("Who answers where rank 0 should has another key.")
    connected.sendall(_proof(key, b"caller", said, theirs))


def _proof(key: bytes, role: bytes, caller: bytes, rank_0: bytes) -> bytes:
    return hmac.digest(key, role + caller + rank_0, "sha256")


def _heard(connected: socket.socket, length: int) -> bytes:
    said = b""
    while len(said) < length:
        chunk = connected.recv(length - len(said))
        if not chunk:
            raise RefusedError("The line was closed before both ends had met.")
        said += chunk
    return said


def _key_or_same_user(connected: socket.socket) -> bytes:
    """The key of the environment; none where the system says that the other end is this user."""
    if connected.family != socket.AF_UNIX:
        return os.environ[KEY].encode()
    credentials = connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)
    if struct.unpack("3i", credentials)[1] != os.getuid():
        raise RefusedError("The other end of the line is of another user.")
    return b""


def _line(connected: socket.socket) -> int:
    connected.settimeout(None)
    if connected.family != socket.AF_UNIX:
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connected.detach()


def address_of(interface: str) -> str:
    """Return the IPv4 address of a network interface of this machine.

    Parameters
    ----------
    interface : str
        Its name, such as eth0.

    Raises
    ------
    OSError
        When there is no such interface, or it has no address.

    Examples
    --------
    >>> address_of("lo")
    '127.0.0.1'
    """
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as any_socket:
        name = interface.encode()[:15]
        told = fcntl.ioctl(any_socket, SIOCGIFADDR, struct.pack("256s", name))
    return socket.inet_ntoa(told[20:24])
