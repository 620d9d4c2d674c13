"""The control channel between the supervisors: rank 0 listens, each of the others has a line to it.

A line is a TCP connection, so both ends learn at once when the other process is gone, however it
went. It carries frames; over MPI it carries only that a frame is there (see `mpi`).
"""

from __future__ import annotations

import hmac
import os
import socket
import time
from contextlib import closing
from multiprocessing.connection import Connection

import msgspec

from helix_conformance.drive.driver import EngineFailure


class Address(msgspec.Struct, frozen=True):
    """Where rank 0 listens, and what a supervisor has to know to be let in."""

    host: str
    port: int
    key: bytes


class Line:
    """Frames to and from one other supervisor."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def fileno(self) -> int:
        """What can be waited for: a frame, or the end of the line."""
        return self.connection.fileno()

    def send(self, frame: bytes) -> None:
        """Send one frame. Raises OSError when the other end is gone."""
        self.connection.send_bytes(frame)

    def receive(self) -> bytes:
        """The next frame. Raises EOFError or OSError when the other end is gone."""
        return self.connection.recv_bytes()

    def close(self) -> None:
        """Hang up."""
        self.connection.close()


class Switchboard:
    """Rank 0's end: listens until every other rank has a line. `host` is its name to them."""

    def __init__(self, host: str) -> None:
        # A machine's name may stand for its loopback there, and for the machine elsewhere.
        own = host in ("localhost", "127.0.0.1")
        self.socket = socket.create_server((host if own else "", 0))
        self.address = Address(host, self.socket.getsockname()[1], os.urandom(16))

    def lines(self, world: int, limit_s: float) -> dict[int, Connection]:
        """A connection to each rank but 0. Raises EngineFailure when one does not come."""
        found: dict[int, Connection] = {}
        until = time.monotonic() + limit_s
        with closing(self.socket):
            while len(found) < world - 1:
                self.socket.settimeout(max(0.01, until - time.monotonic()))
                try:
                    accepted, _ = self.socket.accept()
                except TimeoutError:
                    missing = min(set(range(1, world)) - found.keys())
                    raise EngineFailure(
                        missing, None, f"has no supervisor after {limit_s:g} seconds", "gone"
                    ) from None
                connection = _connection(accepted)
                rank = self._let_in(connection)
                if rank in range(1, world):
                    found[rank] = connection
        return found

    def _let_in(self, connection: Connection) -> int:
        """The rank of who calls; -1 when it is none of ours, and then it is hung up on."""
        try:
            if connection.poll(5):
                key, _, rank = connection.recv_bytes(64).partition(b"/")
                if hmac.compare_digest(key, self.address.key.hex().encode()):
                    return int(rank)
        except (OSError, EOFError, ValueError):
            pass
        connection.close()
        return -1


def call(address: Address, rank: int, limit_s: float) -> Connection:
    """The other end, at a rank but 0."""
    connected = socket.create_connection((address.host, address.port), limit_s)
    connection = _connection(connected)
    connection.send_bytes(address.key.hex().encode() + b"/" + str(rank).encode())
    return connection


def _connection(connected: socket.socket) -> Connection:
    connected.setblocking(True)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return Connection(connected.detach())
