"""How processes of a run find each other: a torch.distributed group, and lines between supervisors.

A line is a TCP connection, so both ends learn at once when the other process is gone, however it
went.
"""

from __future__ import annotations

import hmac
import os
import socket
import time
from contextlib import closing
from datetime import timedelta
from typing import Any

import msgspec

from helix_conformance.drive.driver import EngineFailure


def hosted_store(host: str = "127.0.0.1") -> Any:
    """Return a key-value store that listens on a free port as long as the object lives.

    Parameters
    ----------
    host : str
        Name or address of this machine under which it listens.

    Returns
    -------
    torch.distributed.TCPStore
        The store; `port` says where it listens.
    """
    import torch.distributed as dist  # here, since torch is optional

    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # not in the stub


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
        dist.init_process_group(
            self.backend,
            store=joined_store(self.host, self.port, self.name),
            rank=self.rank,
            world_size=self.world,
            timeout=timedelta(seconds=self.timeout_s),
        )


class Address(msgspec.Struct, frozen=True):
    """Where rank 0 listens, and what a supervisor has to know to be let in.

    Parameters
    ----------
    host : str
        Name or address of rank 0's machine.
    port : int
        The TCP port.
    key : bytes
        A random secret of this run.
    """

    host: str
    port: int
    key: bytes

    def greeting(self, rank: int) -> bytes:
        """Return what a rank sends first; it is of one length for all ranks.

        Examples
        --------
        >>> Address("localhost", 1234, b"AB").greeting(7)
        b'4142/00000007'
        """
        return b"%s/%08d" % (self.key.hex().encode(), rank)


class Rendezvous:
    """Rank 0's end: listens until every other rank has a line.

    Parameters
    ----------
    host : str
        The name of this machine to the other ranks.

    Raises
    ------
    OSError
        When no port can be opened.
    """

    def __init__(self, host: str) -> None:
        # A machine's name may stand for its loopback there, and for the machine elsewhere.
        own = host in ("localhost", "127.0.0.1")
        self.socket = socket.create_server((host if own else "", 0))
        self.address = Address(host, self.socket.getsockname()[1], os.urandom(16))

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
                rank = self._caller(accepted)
                if rank in range(1, world):
                    found[rank] = _line(accepted)
                else:
                    accepted.close()
        return found

    def _caller(self, accepted: socket.socket) -> int:
        """The rank of who calls; -1 when it is none of ours."""
        accepted.settimeout(5)
        said, length = b"", len(self.address.greeting(0))
        try:
            while len(said) < length and (chunk := accepted.recv(length - len(said))):
                said += chunk
            rank = int(said.rpartition(b"/")[2])
        except (OSError, ValueError):
            return -1
        return rank if hmac.compare_digest(said, self.address.greeting(rank)) else -1


def call(address: Address, rank: int, limit_s: float) -> int:
    """Return the descriptor of a line from a rank to rank 0.

    Parameters
    ----------
    address : Address
        Where rank 0 listens.
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
    """
    connected = socket.create_connection((address.host, address.port), limit_s)
    connected.sendall(address.greeting(rank))
    return _line(connected)


def _line(connected: socket.socket) -> int:
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return connected.detach()
