"""Cache groups in tensors: what a layer attends to, what is exchanged, and when pages go back."""

from typing import Any

import msgspec
import pytest
from torch import Tensor

from gpu_testing.groups import (
    CONFIG,
    DIM,
    GROUPS,
    HEADS,
    KV_HEADS,
    attended,
    check,
    kv_of,
    prompt_kv,
    rows,
    scenario,
)
from gpu_testing.ranks import ThreadAllToAll, run_ranks
from helix_gpu.bookkeeping.refusals import Refused, StepError
from helix_gpu.cache import HelixCache
from helix_gpu.group_cache import GroupCache
from helix_spec.config import Config


@pytest.mark.holds("ATT-1", "REP-1", "WIN-1", "WIN-2", "POOL-1")
@pytest.mark.parametrize(
    "layout",
    [
        "pr9757/1:C=1,T=2",
        "pr9757/1:C=2,T=2",
        "pr13180/1:C=3,T=2",
        "pr17866/1:C=2,T=2",
        "vllm_dcp/1:C=3,T=2,I=1",
        "balanced/1:C=2,T=2",
    ],
)
def test_layers_attend_to_the_union_of_their_groups(layout: str) -> None:
    """Whatever groups a layer reads, each row once and none outside of its window."""
    c = int(layout.partition("C=")[2][0])
    config = msgspec.structs.replace(
        CONFIG, layout=layout, pages=[60] * c, pools={"other": [30] * c}
    )

    def body(cache: Any, rank: int) -> Any:
        return scenario(cache, rank, config)

    make: Any = GroupCache
    for dropped, free in run_ranks(config, body, make, rope=None):
        assert dropped > 0
        assert free == {"main": 60, "other": 30}


@pytest.mark.holds("ATT-1", "WIN-1", "WIN-2")
@pytest.mark.parametrize("chunk", [1, 4, 30])
def test_a_computed_prompt_keeps_its_pages_until_it_is_whole(chunk: int) -> None:
    """Each chunk sees its windows; what they left behind goes back after the last one."""

    def body(cache: Any, rank: int) -> Any:
        tokens, begun, held = list(range(17)), 0, []
        for step in cache.prefill(0, 17, chunk):
            new = tokens[begun : begun + chunk]
            outputs = attended(cache, step, new)
            check(outputs, rank, [tokens[: begun + i + 1] for i in range(len(new))], 2)
            begun += len(new)
            held.append(cache.members["near"].block_table(0).count(-1))
        return held

    make: Any = GroupCache
    for held in run_ranks(CONFIG, body, make, rope=None):
        assert held == [0] * (len(held) - 1) + [6]


def one_rank(**options: Any) -> GroupCache:
    """A cache of one rank, with NaN in fresh pages."""
    config = msgspec.structs.replace(
        CONFIG, layout="pr9757/1:C=1,T=2", pages=[60], pools={"other": [30]}
    )
    return GroupCache(config, rank=0, rope=None, poison=True, **options)


def test_layers_of_replicated_groups_make_no_exchange() -> None:
    """One exchange a layer that reads a sharded group, none else."""
    calls = list[int]()
    exchanges = ThreadAllToAll(2)

    def make(config: Config, *, rank: int, exchange: Any, **options: Any) -> Any:
        def counted(send: Tensor) -> Tensor:
            calls.append(rank)
            return exchanges.of(rank)(send)

        return GroupCache(config, rank=rank, exchange=counted, **options)

    def body(cache: Any, rank: int) -> None:
        cache.admit(0, 5, prompt_kv(list(range(5))))
        attended(cache, cache.begin([0]), [9])

    run_ranks(CONFIG, body, make, rope=None)
    assert sorted(calls) == [0] * 3 + [1] * 3


@pytest.mark.holds("WIN-2", "PAGE-3")
def test_pages_go_back_when_all_layers_have_attended() -> None:
    """A step that some layer has not attended to keeps what it sees, and may be undone."""
    cache = one_rank()
    cache.admit(0, 8, prompt_kv(list(range(8))))
    before = [cache.book.free_by_pool, cache.members["near"].block_table(0)]
    step = cache.begin([0])
    held = cache.members["near"].block_table(0)
    for layer in range(3):
        cache.attend(step, layer, rows("q", layer, [9], 0, HEADS), *kv_of(layer, [9]))
        assert cache.members["near"].block_table(0) == held
    cache.cancel(step)
    assert [cache.book.free_by_pool, cache.members["near"].block_table(0)] == before
    step = cache.begin([0])
    check(attended(cache, step, [9]), 0, [[*range(8), 9]], 1)
    with pytest.raises(StepError, match="it cannot be undone"):
        cache.cancel(step)


def test_groups_of_one_pool_lie_in_the_same_memory() -> None:
    """Pages of as many tokens are stored once for all layers that they may belong to."""
    cache = one_rank()
    pools = {name: member.pool for name, member in cache.members.items()}
    assert pools["all"].data_ptr() == pools["near"].data_ptr() != pools["wide"].data_ptr()
    assert pools["all"].shape == (2, 60, 2, 2, KV_HEADS, DIM)
    groups = [*GROUPS[:1], msgspec.structs.replace(GROUPS[1], tokens_per_block=4), GROUPS[2]]
    config = msgspec.structs.replace(cache.config, groups=groups)
    apart = GroupCache(config, rank=0).members
    assert apart["all"].pool.data_ptr() != apart["near"].pool.data_ptr()


def test_reserved_steps_are_as_wide_as_the_window() -> None:
    """Buffers of a window hold its pages; steps that begin in them attend to the same."""
    cache = one_rank()
    reserved = cache.reserve(2)
    assert [reserved.groups[group.name].tables.shape[1] for group in GROUPS] == [30, 5, 7]
    cache.admit(0, 20, prompt_kv(list(range(20))))
    step = cache.begin([0], pad=1)
    assert step.slots is reserved.slots
    outputs = [output[:1] for output in attended(cache, step, [40, 41])]
    check(outputs, 0, [[*range(20), 40]], 1)


def test_rows_that_left_the_window_cannot_be_read() -> None:
    """Those of pages that are held can."""
    cache = one_rank()
    cache.admit(0, 9, prompt_kv(list(range(9))))
    near = cache.members["near"]
    k, _ = near.read(0, 4, 5)
    assert k[0].equal(rows("near", 1, [4, 5, 6, 7, 8], 0))
    with pytest.raises(IndexError, match="this rank holds 9 of its tokens, without the first 4"):
        near.read(0, 3, 2)
    assert cache.members["all"].read(0, 0, 9)[0].shape[1] == 9


@pytest.mark.holds("REF-2", "PAGE-5")
def test_what_one_pool_lacks_is_refused_for_all() -> None:
    """A refusal of one group changes no other."""
    config = msgspec.structs.replace(
        CONFIG, layout="pr9757/1:C=1,T=2", pages=[60], pools={"other": [4]}
    )
    cache = GroupCache(config, rank=0, rope=None)
    cache.admit(0, 4, prompt_kv(list(range(4))))
    with pytest.raises(Refused, match="would need 3 pages of the pool other and has 2 free"):
        cache.admit(1, 5, prompt_kv(list(range(5))))
    assert cache.book.free_by_pool == {"main": 56, "other": 2}
    assert cache.request_ids == [0]


def test_wrong_calls_are_named() -> None:
    """What is missing or not there yet."""
    cache = one_rank()
    with pytest.raises(ValueError, match="it must map each of all, near, wide to a function"):
        cache.admit(0, 4, prompt_kv([0])["all"])
    cache.admit(0, 4, prompt_kv(list(range(4))))
    step, q = cache.begin([0]), rows("q", 2, [9], 0, HEADS)
    k, v = kv_of(2, [9])
    with pytest.raises(ValueError, match=r"K is given as \['near'\]; it must map each of"):
        cache.attend(step, 2, q, {"near": k["near"]}, v)
    with pytest.raises(ValueError, match=r"near's V is missing"):
        cache.attend(step, 2, q, k, {**v, "near": None})
    for call in (cache.local_len, cache.block_table, lambda id: cache.read(id, 0, 1)):
        with pytest.raises(ValueError, match="ask one of members"):
            call(0)
    with pytest.raises(ValueError, match="a GroupCache keeps those"):
        HelixCache(cache.config, rank=0)
    plain = msgspec.structs.replace(CONFIG, groups=[], pools={})
    with pytest.raises(ValueError, match="no cache groups"):
        GroupCache(plain, rank=0)
