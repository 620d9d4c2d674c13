"""The key-value stores at which processes meet; the one place that names torch's."""

from __future__ import annotations

from datetime import timedelta
from typing import Any, Final

import torch.distributed as dist


def hosted_store() -> Any:
    """A store that listens on a free local port as long as the object lives."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # not in the stub


def joined_store(host: str, port: int, name: str) -> Any:
    """The store at this address; its keys are apart from those under other names."""
    store = dist.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]  # not in the stub
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # not in the stub


PART: Final = 4 * 2**20
"""Bytes of a frame that go under one key: the store takes no more than 8 MiB."""


def write(store: Any, key: str, frame: bytes) -> None:
    """Put a frame of any size under a key."""
    parts = [frame[first : first + PART] for first in range(0, len(frame), PART)]
    for number, part in enumerate(parts):
        store.set(f"{key}/{number}", part)
    store.set(key, str(len(parts)))


def read(store: Any, key: str, limit_s: float) -> bytes:
    """The frame under a key, once it is there.

    Raises RuntimeError (torch's DistStoreError) when it is not there in time.
    """
    store.wait([key], timedelta(seconds=limit_s))
    return b"".join(bytes(store.get(f"{key}/{part}")) for part in range(int(store.get(key))))
