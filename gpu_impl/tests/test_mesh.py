"""Ranks as a mesh: who stands where, and what is refused before a group is made."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh, repurposed, slice_of, whole_group
from helix_spec.config import Config, ModelShape
from helix_spec.events import Reason

OnRanks = Callable[[int, Callable[[int], Any]], list[Any]]
MODEL = ModelShape(q_heads=8, kv_heads=2)
CONFIG = Config(layout="pr9757/1:C=2,T=2", pages=[4, 4], max_len=16, model=MODEL, tp_size=2)


@pytest.mark.holds("MAP-1")
def test_cp_varies_fastest(on_ranks: OnRanks) -> None:
    """Neighbouring ranks share a sequence, and the slice of heads is the global rank (MAP-1)."""

    def body(rank: int) -> tuple[Any, ...]:
        mesh = helix_mesh(CONFIG)
        cp = dist.get_process_group_ranks(mesh.get_group("cp"))
        tp = dist.get_process_group_ranks(mesh.get_group("tp"))
        return slice_of(mesh), cp, tp, dist.get_process_group_ranks(whole_group(mesh))

    everyone = [0, 1, 2, 3]
    assert on_ranks(4, body) == [
        (0, [0, 1], [0, 2], everyone),
        (1, [0, 1], [1, 3], everyone),
        (2, [2, 3], [0, 2], everyone),
        (3, [2, 3], [1, 3], everyone),
    ]


@pytest.mark.holds("MAP-1")
def test_a_cache_takes_its_place_from_the_mesh(on_ranks: OnRanks) -> None:
    """Each rank's cache has its cp_rank, and the heads of its tp shard."""

    def body(rank: int) -> tuple[int, int, int]:
        cache = HelixCache.on(CONFIG, helix_mesh(CONFIG))
        return cache.book.cp_rank, cache.kv_heads, cache.q_heads

    assert on_ranks(4, body) == [(0, 1, 4), (1, 1, 4), (0, 1, 4), (1, 1, 4)]


@pytest.mark.holds("MAP-1")
def test_part_of_a_larger_mesh(on_ranks: OnRanks) -> None:
    """Two pipeline stages of tp 1 x cp 2: each has a cache on its own part."""
    config = msgspec.structs.replace(CONFIG, tp_size=1)

    def body(rank: int) -> tuple[int, list[int]]:
        stages = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "tp", "cp"))
        mesh = stages["tp", "cp"]
        cache = HelixCache.on(config, mesh)
        return cache.book.cp_rank, dist.get_process_group_ranks(whole_group(mesh))

    assert on_ranks(4, body) == [(0, [0, 1]), (1, [0, 1]), (0, [2, 3]), (1, [2, 3])]


def test_more_tp_ranks_than_kv_heads(on_ranks: OnRanks) -> None:
    """A KV head cannot be split: refused with a sentence on every rank, before a group is made."""
    config = msgspec.structs.replace(CONFIG, tp_size=4, layout="pr9757/1:C=1,T=2", pages=[4])

    def body(rank: int) -> tuple[Reason, str, int]:
        before = dist.distributed_c10d._world.group_count
        with pytest.raises(Refused) as refused:
            helix_mesh(config)
        made = dist.distributed_c10d._world.group_count - before
        return refused.value.reason, str(refused.value), made

    for reason, sentence, made in on_ranks(4, body):
        assert (reason, made) == (Reason.BAD_CONFIG, 0)
        assert "tp_size 4 is above the 2 KV heads" in sentence


def test_wrong_number_of_processes(on_ranks: OnRanks) -> None:
    """The sentence names both numbers."""

    def body(rank: int) -> None:
        with pytest.raises(ValueError, match="2 processes run; tp_size 2 x cp_size 2 needs 4"):
            helix_mesh(CONFIG)

    on_ranks(2, body)


@pytest.mark.parametrize("names", [("cp", "tp"), ("tp", "kvp")])
def test_a_mesh_that_does_not_fit(names: tuple[str, str], on_ranks: OnRanks) -> None:
    """Axes in another order or of another name are refused, and so are other sizes."""

    def body(rank: int) -> None:
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=names)
        with pytest.raises(ValueError, match=r"needs \('tp', 'cp'\) of sizes \(2, 2\)"):
            HelixCache.on(CONFIG, mesh)
        right = init_device_mesh("cpu", (1, 4), mesh_dim_names=("tp", "cp"))
        with pytest.raises(ValueError, match=r"of sizes \(1, 4\); this configuration needs"):
            HelixCache.on(CONFIG, right)

    on_ranks(4, body)


@pytest.mark.parametrize(("ep_size", "tp_size"), [(1, 4), (2, 2), (4, 1)])
def test_the_ffn_uses_the_same_ranks(ep_size: int, tp_size: int, on_ranks: OnRanks) -> None:
    """Each rank is at (rank // tp, rank % tp) of the FFN's mesh."""

    def body(rank: int) -> tuple[int, ...]:
        ffn = repurposed(helix_mesh(CONFIG), ep_size)
        return ffn.get_local_rank("ep"), ffn.get_local_rank("tp")

    assert on_ranks(4, body) == [divmod(rank, tp_size) for rank in range(4)]


def test_the_ffn_on_a_part_of_a_mesh(on_ranks: OnRanks) -> None:
    """The ranks of one pipeline stage are refused before a group is made."""

    def body(rank: int) -> None:
        stages = init_device_mesh("cpu", (2, 1, 2), mesh_dim_names=("pp", "tp", "cp"))
        with pytest.raises(ValueError, match="The mesh holds 2 of 4 processes; the FFN's needs"):
            repurposed(stages["tp", "cp"])

    on_ranks(4, body)


def test_experts_do_not_divide(on_ranks: OnRanks) -> None:
    """ep_size must divide the ranks."""

    def body(rank: int) -> None:
        with pytest.raises(ValueError, match="ep_size is 3; it must divide the 4 ranks"):
            repurposed(helix_mesh(CONFIG), 3)

    on_ranks(4, body)
