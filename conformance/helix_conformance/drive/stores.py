"""The key-value stores at which processes meet; the one place that names torch's."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist


def hosted_store(host: str = "127.0.0.1") -> Any:
    """A store that listens on a free port of this machine as long as the object lives."""
    return dist.TCPStore(host, 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]  # not in the stub


def joined_store(host: str, port: int, name: str) -> Any:
    """The store at this address; its keys are apart from those under other names."""
    store = dist.TCPStore(host, port, is_master=False)  # type: ignore[attr-defined]  # not in the stub
    return dist.PrefixStore(name, store)  # type: ignore[attr-defined]  # not in the stub
