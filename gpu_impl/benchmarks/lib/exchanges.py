"""Ways to exchange and merge the partials of ranks by the kernels, and captured exchanges."""

from __future__ import annotations

import functools
from typing import Any

from lib import DRY
from lib.device import DEVICE, TYPE, again, device_time, random
from lib.models import models
from lib.ranks import differing, world

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.attention.kernels.merge import merge_partials, merge_received
from helix_gpu.attention.partials import pack
from helix_gpu.comm import exchange as exchanges
from helix_gpu.comm.exchange import Exchange, MakeExchange
from helix_gpu.comm.push import push
from helix_gpu.graphs import Replay, cuda_graph
from helix_spec.config import ModelShape

MODEL = models()["grouped queries"]


def message_bytes(rows: int, model: ModelShape) -> int:
    """Bytes that a rank sends to each other for a batch."""
    wire: torch.dtype = getattr(torch, model.partial_dtype)
    heads = rows * model.q_heads // dist.get_world_size()
    return heads * (model.value_dim * wire.itemsize + 4)


def pushing(rows: int, model: ModelShape) -> MakeExchange:
    """A push with room for the messages of a batch."""
    return functools.partial(push, message_bytes=message_bytes(rows, model))


class Merges:
    """Each way to exchange the partials of a batch and to merge those of this rank's heads.

    Outputs and log-sum-exps are random, and packed beforehand: the cache's kernels leave them so.
    """

    def __init__(self, batch: int, pushed: Exchange | None) -> None:
        ranks, heads, dim = dist.get_world_size(), MODEL.q_heads, MODEL.head_dim
        torch.manual_seed(dist.get_rank())
        output = random(batch, heads, dim, dtype=torch.float32)
        lse = random(batch, heads, dtype=torch.float32)
        self.sends = {wire: pack(output, lse, ranks, wire) for wire in (TYPE, torch.float32)}
        self.shape = (batch, heads // ranks, dim)
        self.merged = dict[str, Tensor]()
        wide = msgspec.structs.replace(MODEL, partial_dtype="float32")
        packed = exchanges.all_to_all(world(), MODEL)
        ways = {
            "all_to_all": (packed, TYPE),
            "push": (pushed, TYPE),
            "all_gather": (exchanges.all_gather(world(), MODEL), TYPE),
            "all_to_all, float32": (packed, torch.float32),
            "reduce_scatter, float32": (exchanges.reduce_scatter(world(), wide), torch.float32),
            "merge alone": (lambda send: send, TYPE),
        }
        self.runs = {
            name: self.merging(name, exchange, wire)
            for name, (exchange, wire) in ways.items()
            if exchange is not None
        }
        self.runs["two all-to-alls"] = self.two_all_to_alls("two all-to-alls")
        self.runs["collectives of reduce_scatter"] = self.collectives(output, lse)

    def room(self, name: str) -> tuple[Tensor, Tensor]:
        """Where a way writes the merged outputs and log-sum-exps."""
        self.merged[name] = torch.full(self.shape, torch.nan, device=DEVICE)
        return self.merged[name], torch.zeros(self.shape[:2], device=DEVICE)

    def merging(self, name: str, exchange: Exchange, wire: torch.dtype) -> Replay:
        """One of our exchanges, then the merge."""
        out, lse = self.room(name)
        return lambda: merge_received(exchange(self.sends[wire]), out, lse, wire)

    def two_all_to_alls(self, name: str) -> Replay:
        """Outputs and log-sum-exps in a collective each."""
        out, lse = self.room(name)
        border = out.numel() * TYPE.itemsize
        parts = self.sends[TYPE].tensor_split([border], 1)
        sends = [part.contiguous() for part in parts]

        def run() -> None:
            received = [torch.empty_like(send) for send in sends]
            for receive, send in zip(received, sends, strict=True):
                dist.all_to_all_single(receive, send)
            merge_partials(received[0].view(TYPE), received[1].view(torch.float32), out, lse)

        return run

    def collectives(self, output: Tensor, lse: Tensor) -> Replay:
        """What an all-gather and a reduce-scatter of 16 bits take before anything is computed."""
        batch, heads, dim = self.shape
        outputs, own = output.to(TYPE).view(-1, heads, dim), random(batch, heads, dim)

        def run() -> None:
            exchanges._gathered(lse, world())
            exchanges._reduce_scatter(own, outputs)

        return run

    def wrong(self, runs: dict[str, Replay]) -> dict[str, int]:
        """Elements of all ranks at which these runs do not merge to the same."""
        for out in self.merged.values():
            out.fill_(torch.nan)
        for run in runs.values():
            run()
        ours, wide = self.merged["all_to_all"], self.merged["all_to_all, float32"]
        # In 16 bits alike to the bit. The sums of a reduce-scatter are in another order.
        to = {name: (ours, 0.0) for name in ("push", "two all-to-alls", "all_gather")}
        to |= {"all_to_all": (wide, 2.0**-6), "reduce_scatter, float32": (wide, 1e-5)}
        return {name: differing(self.merged[name], *to[name]) for name in self.merged if name in to}


def exchanged(
    name: str, make: MakeExchange, replays: int, group: dist.ProcessGroup | None = None
) -> dict[str, Any]:
    """An exchange of all ranks, captured: what arrives is what this replay sends."""
    exchange = make(group or world(), models()["grouped queries"])
    rank, ranks = dist.get_rank(), dist.get_world_size()
    wrong = torch.zeros((), dtype=torch.int64, device=DEVICE)
    send = torch.zeros(ranks, 4096, dtype=torch.uint8, device=DEVICE)
    received = torch.zeros_like(send)
    peers = torch.arange(ranks, device=DEVICE)[:, None]

    def message(step: int, source: int | Tensor, target: int | Tensor) -> Tensor:
        # No byte is the same one replay earlier or later, nor from or for another rank.
        at = torch.arange(send.shape[1], device=DEVICE)
        return ((37 * at + 11 * step + 101 * source + 53 * target) % 251).to(torch.uint8)

    def work() -> None:
        received.copy_(exchange(send))

    replay = again(work) if DRY else cuda_graph(work)
    for step in range(replays):
        send.copy_(message(step, rank, peers))
        replay()
        wrong += (received != message(step, peers, rank)).sum()
    dist.all_reduce(wrong)
    us = device_time(replay)
    return {"exchange": name, "replays": replays, "wrong bytes": int(wrong), "us": us}
