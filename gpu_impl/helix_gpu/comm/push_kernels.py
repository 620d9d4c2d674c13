"""Writing messages into the peers' windows and reading them: the kernels of `push` on CUDA."""

from __future__ import annotations

from typing import Final

import torch
import triton  # type: ignore[import-untyped,import-not-found,unused-ignore]
import triton.language as tl  # type: ignore[import-untyped,import-not-found,unused-ignore]
from torch import Tensor

from helix_gpu.attention.kernels.common import FUSION
from helix_gpu.comm.windows import SLOTS, arrivals_bytes

BLOCK: Final = 1024
"""Words of 4 bytes that a program copies at a time."""
PARTS: Final = 8
"""Programs that share a message: the same in both kernels, since each signals once."""


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def put_kernel(  # type: ignore[no-untyped-def]
    send, windows, epoch,
    words, rank, slots_at, capacity_words,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program writes a part of the message to one peer, then counts it there."""
    peer, part, ranks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    slot = tl.load(epoch) % SLOTS
    window = tl.load(windows + peer)
    slots = tl.multiple_of((window + slots_at).to(tl.pointer_type(tl.int32)), 16)
    target = slots + (slot * ranks + rank) * capacity_words
    source = send + peer.to(tl.int64) * words
    for first in range(part * BLOCK, words, PARTS * BLOCK):
        at = first + tl.arange(0, BLOCK)
        tl.store(target + at, tl.load(source + at, mask=at < words), mask=at < words)
    # All threads' stores come before the one thread's signal, which releases them to the system.
    tl.debug_barrier()
    arrivals = window.to(tl.pointer_type(tl.int64))
    tl.atomic_add(arrivals + rank, tl.full((), 1, tl.int64), sem="release", scope="sys")


@triton.jit  # type: ignore[untyped-decorator,unused-ignore]
def take_kernel(  # type: ignore[no-untyped-def]
    received, arrivals, slots, epoch,
    words, capacity_words,
    SLOTS: tl.constexpr, PARTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One program waits for the message of one peer and copies a part of it."""
    peer, part, ranks = tl.program_id(0), tl.program_id(1), tl.num_programs(0)
    now = tl.load(epoch)
    none = tl.full((), 0, tl.int64)
    while tl.atomic_add(arrivals + peer, none, sem="acquire", scope="sys") < (now + 1) * PARTS:
        pass
    tl.debug_barrier()
    source = slots + (now % SLOTS * ranks + peer) * capacity_words
    target = received + peer.to(tl.int64) * words
    for first in range(part * BLOCK, words, PARTS * BLOCK):
        at = first + tl.arange(0, BLOCK)
        # Past the L1 cache, which other GPUs' writes do not reach.
        word = tl.load(source + at, mask=at < words, cache_modifier=".cg")
        tl.store(target + at, word, mask=at < words)


def put(send: Tensor, windows: Tensor, epoch: Tensor, rank: int, capacity: int) -> None:
    """Write message d into the window of rank d, for every d.

    Parameters
    ----------
    send : Tensor, uint8 [C, bytes]
        A multiple of 4 bytes each.
    windows : Tensor, int64 [C]
        Addresses of the windows.
    epoch : Tensor, int64 [1]
        Exchanges before this one.
    rank : int
        This rank.
    capacity : int
        Bytes of a slot, a multiple of 4.
    """
    ranks, words = len(send), send.shape[1] // 4
    put_kernel[(ranks, PARTS)](
        send.view(torch.int32), windows, epoch,
        words, rank, arrivals_bytes(ranks), capacity // 4,
        SLOTS=SLOTS, PARTS=PARTS, BLOCK=BLOCK, enable_fp_fusion=FUSION,
    )  # fmt: skip


def take(received: Tensor, window: Tensor, epoch: Tensor, capacity: int) -> None:
    """Wait for the messages of all ranks and copy them to `received`.

    The next `put` of this rank must follow in the same stream.

    Parameters
    ----------
    received : Tensor, uint8 [C, bytes]
    window : Tensor, uint8 [bytes]
        This rank's own; see `windows`.
    epoch : Tensor, int64 [1]
        Exchanges before this one.
    capacity : int
        Bytes of a slot, a multiple of 4.
    """
    ranks, words = len(received), received.shape[1] // 4
    border = arrivals_bytes(ranks)
    arrivals = window[: 8 * ranks].view(torch.int64)
    take_kernel[(ranks, PARTS)](
        received.view(torch.int32), arrivals, window[border:].view(torch.int32), epoch,
        words, capacity // 4,
        SLOTS=SLOTS, PARTS=PARTS, BLOCK=BLOCK, enable_fp_fusion=FUSION,
    )  # fmt: skip
