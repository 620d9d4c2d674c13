"""The memory into which peers write: arrivals from each rank, then slots of messages.

A window is uint8 [bytes]. It begins with int64 [ranks], the messages that have arrived from each
rank since the window was made, and padding to ALIGNMENT. Then come uint8 [SLOTS, ranks, capacity]:
SLOTS messages of at most `capacity` bytes from each rank.
"""

from __future__ import annotations

from typing import Final

import torch
from torch import Tensor

SLOTS: Final = 2
"""Messages of each rank that a window holds at a time; `push` says why two are enough."""
ALIGNMENT: Final = 16
"""Bytes: messages begin at multiples of it, so that the widest stores can be used."""


def arrivals_bytes(ranks: int) -> int:
    """Return the bytes before the slots.

    Parameters
    ----------
    ranks : int
        Ranks of the group.
    """
    return -(-8 * ranks // ALIGNMENT) * ALIGNMENT


def window_bytes(ranks: int, capacity: int) -> int:
    """Return the bytes of a window.

    Parameters
    ----------
    ranks : int
        Ranks of the group.
    capacity : int
        Bytes of a message, at most.
    """
    return arrivals_bytes(ranks) + SLOTS * ranks * capacity


def arrivals(window: Tensor, ranks: int) -> Tensor:
    """Return the counts of a window: messages arrived from each rank.

    Parameters
    ----------
    window : Tensor, uint8 [bytes]
    ranks : int
        Ranks of the group.

    Returns
    -------
    Tensor, int64 [ranks]
        A view.
    """
    return window[: 8 * ranks].view(torch.int64)


def slots(window: Tensor, ranks: int, capacity: int) -> Tensor:
    """Return the slots of a window: messages from each rank.

    Parameters
    ----------
    window : Tensor, uint8 [bytes]
    ranks : int
        Ranks of the group.
    capacity : int
        Bytes of a message, at most.

    Returns
    -------
    Tensor, uint8 [SLOTS, ranks, capacity]
        A view.
    """
    return window[arrivals_bytes(ranks) :].view(SLOTS, ranks, capacity)
