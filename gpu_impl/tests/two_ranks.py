"""What one of two gloo ranks does for `test_two_ranks`; results are written as JSON.

`python two_ranks.py RANK FOLDER`. Ranks are told different things here, so nothing is judged: a
judge of one rank would not know what the other has found.
"""

from __future__ import annotations

import json
import random
import sys
import weakref
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import msgspec
import torch
import torch.distributed as dist
from torch import Tensor

from gpu_testing import groups
from helix_gpu.attention.paged import attend_pages
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_gpu.group_cache import GroupCache
from helix_spec.config import Config, ModelShape

LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 4, 2, 8
MODEL = ModelShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM)
CONFIG = Config(layout="pr9757/1:C=2,T=2", pages=[14, 14], max_len=40, model=MODEL)
CALLS, SEEDS, LOOK = 120, 3, 12
IDS = range(4)
Result = dict[str, Any]


def tried(call: Callable[[], Any]) -> Result:
    """What a call comes to: the words of its error, if it has one."""
    try:
        call()
    except Exception as error:
        return {"error": type(error).__name__, "text": str(error)}
    return {"error": None, "text": ""}


def state(cache: HelixCache) -> list[Any]:
    """All that a refused call must leave as it was."""
    return [
        cache.request_ids, cache.preempted_ids, cache.free_pages, cache.pool.clone().tolist(),
        [(cache.local_len(id), cache.block_table(id)) for id in cache.request_ids],
        cache.book.ledger.free.tolist(), cache.book.ledger.admitted,
    ]  # fmt: skip


def numbers(tokens: Iterable[int], code: int) -> Tensor:
    """Q (code 0), K (1) or V (2) of tokens [layers, n, heads, dim], the same on both ranks."""
    heads = KV_HEADS if code else Q_HEADS
    rows = [
        torch.randn(LAYERS, heads, DIM, generator=torch.Generator().manual_seed(3 * token + code))
        for token in tokens
    ]
    return torch.stack(rows, 1) if rows else torch.zeros(LAYERS, 0, heads, DIM)


def of_positions(tokens: Sequence[int]) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
    """K and V of a prompt of these tokens."""

    def prompt_kv(positions: Tensor) -> tuple[Tensor, Tensor]:
        mine = [tokens[p] for p in positions.tolist()]
        return numbers(mine, 1), numbers(mine, 2)

    return prompt_kv


def disagreements(rank: int, mesh: Any) -> Result:
    """What differs is said on both ranks, before anything has happened; then all goes on."""
    found: Result = {}
    other = msgspec.structs.replace(CONFIG, layout="pr17866/1:C=2,T=2") if rank else CONFIG
    found["mesh of two layouts"] = tried(lambda: helix_mesh(other))
    bad = msgspec.structs.replace(CONFIG, pages=64) if rank else CONFIG
    found["mesh of a wrong configuration"] = tried(lambda: helix_mesh(bad))
    longer = msgspec.structs.replace(CONFIG, max_len=40 + rank)
    found["caches of two lengths"] = tried(lambda: HelixCache.on(longer, mesh))
    rope: Any = None if rank else "config"
    found["caches of two ropes"] = tried(lambda: HelixCache.on(CONFIG, mesh, rope=rope))

    cache = HelixCache.on(CONFIG, mesh)
    cache.pool.zero_()
    before, prompt = state(cache), list(range(10))

    def failing(positions: Tensor) -> Any:
        if rank:
            raise OSError("the peer is gone.")
        return of_positions(prompt)(positions)

    found["prompts of two lengths"] = tried(lambda: cache.admit(0, 7 + rank, of_positions(prompt)))
    found["a prompt that one rank cannot have"] = tried(lambda: cache.admit(0, 7, failing))
    found["unchanged by admissions"] = before == state(cache)
    cache.admit(0, 7, of_positions(prompt))
    cache.preempt(0)
    before = state(cache)
    found["a resumption that one rank cannot have"] = tried(lambda: cache.resume(0, failing))
    found["unchanged by a resumption"] = before == state(cache)

    broken = [False]

    def attend(*given: Any, **how: Any) -> Any:
        if broken[0]:
            raise MemoryError("no memory here.")
        return attend_pages(*given, **how)

    cache = HelixCache.on(CONFIG, mesh, debug=True, backend=attend)
    cache.pool.zero_()
    for id in (0, 1):
        cache.admit(id, 5, of_positions(prompt))
    before = state(cache)
    ids = [1, 0] if rank else [0, 1]
    found["ids in two orders"] = tried(lambda: cache.begin(ids))
    found["two batches"] = tried(lambda: cache.begin(ids[: 1 + rank]))
    found["two calls"] = tried(lambda: cache.release(0) if rank else cache.fork(0, 2))
    q, k, v = (numbers([100, 101], code) for code in range(3))
    found["a wrong tensor"] = tried(lambda: cache.decode([0, 1], q[:, :, rank:], k, v))
    found["unchanged by calls"] = before == state(cache)
    step = cache.begin([0, 1])
    broken[0] = bool(rank)
    found["an error in the middle"] = tried(lambda: cache.attend(step, 0, q[0], k[0], v[0]))
    cache.cancel(step)
    broken[0] = False
    found["afterwards"] = tried(lambda: cache.decode([0, 1], q, k, v))
    return found


class Caller:
    """Random calls, right and wrong, at a cache, and at another of one rank that none disturbs."""

    def __init__(self, rank: int, mesh: Any, seed: int) -> None:
        self.rank, self.choose = rank, random.Random(seed)
        self.cache = HelixCache.on(CONFIG, mesh, debug=True)
        self.cache.pool.zero_()
        one = msgspec.structs.replace(CONFIG, layout="pr9757/1:C=1,T=8", pages=[200])
        self.whole = HelixCache(one, rank=0)
        self.tokens: dict[int, list[int]] = {}
        self.steps: list[tuple[Any, Any, list[int]]] = []
        self.prompts: list[tuple[Any, Any]] = []
        self.fresh = 0

    def some(self, count: int) -> list[int]:
        """Tokens that were not there before, alike on ranks that ask for other counts."""
        self.fresh += 100
        return list(range(self.fresh, self.fresh + count))

    def call(self) -> Result:
        """One call, sometimes another or a failing one on rank 1, and what it comes to."""
        name = self.choose.choice(
            ["admit", "decode", "decode", "decode", "begin", "attend", "attend", "layers", "layers",
             "cancel", "prefill", "next", "next", "resume", "preempt", "release", "fork", "accept",
             "skip", "gather"]
        )  # fmt: skip
        twist = self.choose.choice([None, None, None, "value", "failure"])
        mine = twist if self.rank else None
        before = state(self.cache)
        result = tried(lambda: getattr(self, name)(mine))
        return result | {
            "name": name, "twist": twist, "unchanged": before == state(self.cache)
        }  # fmt: skip

    def id(self, mine: str | None) -> int:
        """A request, another one on a rank that is told so."""
        return self.choose.choice(IDS) + (mine == "value")

    def kv(self, tokens: Sequence[int], mine: str | None) -> Callable[[Tensor], Any]:
        """A prompt's K and V, which fail to come on a rank that is told so."""
        if mine != "failure":
            return of_positions(tokens)

        def failing(positions: Tensor) -> Any:
            raise OSError("the peer is gone.")

        return failing

    def same(self, mine: Tensor, whole: Tensor) -> None:
        """Whether this rank's slice of heads is that of the other cache."""
        heads = slice(self.rank * Q_HEADS // 2, (self.rank + 1) * Q_HEADS // 2)
        if not torch.allclose(mine, whole[..., heads, :], rtol=1e-4, atol=1e-4):
            raise AssertionError("The output is wrong.")

    def admit(self, mine: str | None) -> None:
        """Prompts of no token and of too many, too."""
        id, n = self.id(mine), self.choose.choice([0, 1, 3, 7, 12, 50])
        tokens = self.some(n)
        self.cache.admit(id, n, self.kv(tokens, mine))
        self.whole.admit(id, n, of_positions(tokens))
        self.tokens[id] = tokens

    def resume(self, mine: str | None) -> None:
        """Of any request."""
        id = self.id(mine)
        self.cache.resume(id, self.kv(self.tokens.get(id, []), mine))
        self.whole.resume(id, of_positions(self.tokens[id]))

    def batch(self, mine: str | None) -> tuple[list[int], list[int], int]:
        """Ids, some of them twice or unknown, lengths and dummies."""
        ids = self.choose.choices(IDS, k=self.choose.randint(0, 3))
        lens = [self.choose.choice([1, 1, 2, 6]) for _ in ids]
        if mine == "value":
            ids = [*ids[::-1], 3]
            lens.append(1)
        return ids, lens, self.choose.choice([0, 0, 1])

    def rows(self, tokens: list[int], pad: int, mine: str | None) -> list[Tensor]:
        """Q, K and V with dummies; too few heads on a rank that is told so."""
        given = [
            torch.nn.functional.pad(numbers(tokens, code), (0, 0, 0, 0, 0, pad), value=torch.nan)
            for code in range(3)
        ]
        return [x[:, :, 1:] for x in given] if mine == "failure" else given

    def decode(self, mine: str | None) -> None:
        """A whole step."""
        ids, lens, pad = self.batch(mine)
        tokens = self.some(sum(lens))
        given = self.rows(tokens, pad, mine)
        found = self.cache.decode(ids, *given, pad, lens)
        self.same(found, self.whole.decode(ids, *self.rows(tokens, pad, None), pad, lens))
        self.grow(ids, lens, tokens)

    def grow(self, ids: list[int], lens: list[int], tokens: list[int]) -> None:
        """The requests' new tokens."""
        for id, count in zip(ids, lens, strict=True):
            self.tokens[id] = self.tokens[id] + tokens[:count]
            tokens = tokens[count:]

    def begin(self, mine: str | None) -> None:
        """A step that may be attended to, cancelled or forgotten."""
        ids, lens, pad = self.batch(mine)
        tokens = self.some(sum(lens))
        step = self.cache.begin(ids, lens, pad)
        self.steps.append((step, self.whole.begin(ids, lens, pad), [*tokens, *[-1] * pad]))
        self.grow(ids, lens, tokens)

    def attend(self, mine: str | None) -> None:
        """One layer, also one that is not there, of a step that may be over."""
        step, whole, tokens = self.choose.choice(self.steps[-3:] or [(None, None, [])])
        layer = self.choose.choice([-1, 0, 0, 1, 1, 2]) + (mine == "value")
        self.layer(step, whole, tokens, layer, mine)

    def layers(self, mine: str | None) -> None:
        """All layers of the last step."""
        step, whole, tokens = (self.steps or [(None, None, [])])[-1]
        for layer in range(LAYERS):
            self.layer(step, whole, tokens, layer + (mine == "value"), mine)

    def layer(self, step: Any, whole: Any, tokens: list[int], layer: int, mine: str | None) -> None:
        """A layer on both caches."""
        pad = tokens.count(-1)
        real = tokens[: len(tokens) - pad]
        q, k, v = (x[max(0, layer) % LAYERS] for x in self.rows(real, pad, mine))
        found = self.cache.attend(step, layer, q, k, v)
        q, k, v = (x[layer] for x in self.rows(real, pad, None))
        self.same(found, self.whole.attend(whole, layer, q, k, v))

    def cancel(self, mine: str | None) -> None:
        """Of a step that may be over, or a prompt's."""
        place = self.choose.randrange(max(1, len(self.steps)))
        step, whole, _ = (self.steps or [(None, None, [])])[place - (mine == "value")]
        self.cache.cancel(step)
        self.whole.cancel(whole)
        for id, first in zip(step.tokens.ids, step.tokens.firsts.tolist(), strict=True):
            del self.tokens[id][first:]

    def prefill(self, mine: str | None) -> None:
        """Of one or two prompts."""
        ids = [self.choose.choice(IDS) for _ in range(self.choose.choice([1, 2]))]
        lens = [self.choose.choice([1, 5, 9]) + (mine == "value") for _ in ids]
        chunk = self.choose.choice([0, 3, 8])
        tokens = [self.some(10) for _ in ids]
        steps = self.cache.prefill(ids, lens, chunk)
        self.prompts.append((steps, self.whole.prefill(ids, lens, chunk)))
        for id, n, mine_of in zip(ids, lens, tokens, strict=True):
            self.tokens[id] = mine_of[:n]

    def next(self, mine: str | None) -> None:
        """The next step of a prompt whose requests may be gone."""
        steps, whole = self.choose.choice(self.prompts or [(iter(()), iter(()))])
        step = next(steps, None)
        if step is not None:
            both = zip(
                step.tokens.ids, step.tokens.firsts.tolist(), step.tokens.ends.tolist(), strict=True
            )
            tokens = [t for id, first, end in both for t in self.tokens[id][first:end]]
            self.steps.append((step, next(whole), tokens))

    def preempt(self, mine: str | None) -> None:
        """Of any request."""
        id = self.id(mine)
        self.cache.preempt(id)
        self.whole.preempt(id)

    def release(self, mine: str | None) -> None:
        """Of any request."""
        id = self.id(mine)
        self.cache.release(id)
        self.whole.release(id)

    def fork(self, mine: str | None) -> None:
        """To an id that may be known."""
        parent, child = self.choose.choice(IDS), self.id(mine)
        self.cache.fork(parent, child)
        self.whole.fork(parent, child)
        self.tokens[child] = list(self.tokens[parent])

    def accept(self, mine: str | None) -> None:
        """Of a group that may not be open."""
        id, kept = self.choose.choice(IDS), self.choose.choice([0, 1, 1, 2]) + (mine == "value")
        group = int(self.cache.book.ledger._rows["group"][self.cache.book.ledger.rows([id])[0]])
        self.cache.accept(id, kept)
        self.whole.accept(id, kept)
        del self.tokens[id][len(self.tokens[id]) - group + kept :]

    def skip(self, mine: str | None) -> None:
        """Of any batch."""
        ids, lens, _ = self.batch(mine)
        self.cache.skip(ids, lens)

    def gather(self, mine: str | None) -> None:
        """Of the right number of heads, and of another."""
        heads = self.choose.choice([2, 2, 3]) + (mine == "value")
        found = self.cache.gather(torch.full((1, heads, DIM), float(self.rank)))
        if found[0, :, 0].tolist() != [0, 0, 1, 1]:
            raise AssertionError("The gathered heads are wrong.")

    def places(self) -> list[Any]:
        """Which positions of each whole request this rank holds, found by their V, and its length.

        A row that is none of the request's own is at position -1.
        """
        found, lengths = {}, {}
        for id in self.cache.request_ids:
            try:
                _, v = self.cache.read(id, 0, self.cache.local_len(id))
            except ValueError:  # layers lack tokens
                continue
            assert v is not None
            own = numbers(self.tokens[id], 2)
            same = (own[:, :, None] == v[:, None]).flatten(3).all(-1).all(0)
            found[id] = [int(row.nonzero()[0]) if row.any() else -1 for row in same.T]
            lengths[id] = len(self.tokens[id])
        return [found, lengths]


def main() -> None:
    """Everything, in an order that both ranks keep."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2,
        timeout=timedelta(seconds=20),
    )  # fmt: skip
    mesh = helix_mesh(CONFIG)
    results: Result = {"disagreements": disagreements(rank, mesh), "calls": [], "places": []}
    grouped = GroupCache.on(groups.CONFIG, helix_mesh(groups.CONFIG), rope=None, debug=True)
    results["groups"] = tried(lambda: groups.scenario(grouped, rank, groups.CONFIG))
    for seed in range(SEEDS):
        caller = Caller(rank, mesh, seed)
        for n in range(CALLS):
            results["calls"].append(caller.call())
            if n % LOOK == LOOK - 1:
                results["places"].append(caller.places())
    Path(folder, f"{rank}.json").write_text(json.dumps(results))
    EXITS.append(weakref.finalize(dist.Store, leave, folder, rank))
    left_open: Any = HelixCache.on(CONFIG, mesh)
    left_open.circle = left_open
    LINKS.append(left_open._link)
    dist.destroy_process_group()


LINKS: list[Any] = []
EXITS: list[Any] = []
"""What is done at the end of the program: the later it was made, the earlier."""


def leave(folder: Path, rank: int) -> None:
    """Say what caches that nobody closed still hold of their group."""
    held = [[link.all_ranks, link.inner] for link in LINKS]
    Path(folder, f"{rank}.exit").write_text(str(held))


if __name__ == "__main__":
    main()
