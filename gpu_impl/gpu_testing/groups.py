"""A cache with three groups, the tokens that go into it, and what must come out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from gpu_testing.exact import exact_attention
from helix_gpu.group_cache import GroupCache
from helix_spec.config import CacheGroup, Config, ModelShape

HEADS, KV_HEADS, DIM = 6, 3, 16
GROUPS = [
    CacheGroup(name="all", layers=[0, 2]),
    CacheGroup(name="near", layers=[1, 2], placement="replicated", window=5),
    CacheGroup(name="wide", layers=[2, 3], window=9, pool="other"),
]
"""Layer 1 makes no exchange, layer 2 reads all three groups."""
CONFIG = Config(
    layout="pr9757/1:C=2,T=2",
    pages=[60] * 2,
    pools={"other": [30] * 2},
    max_len=60,
    model=ModelShape(layers=4, q_heads=HEADS, kv_heads=KV_HEADS, head_dim=DIM),
    groups=GROUPS,
)
CODES = {"q": 0, "all": 1, "near": 2, "wide": 3}
Made = tuple[dict[str, Tensor], dict[str, Tensor]]


def rows(code: str, layer: int, tokens: list[int], part: int, heads: int = KV_HEADS) -> Tensor:
    """Multiples of 1/16 that belong to a layer and token: [n, heads, dim]."""
    made = []
    for token in tokens:
        seed = ((CODES[code] * 10 + layer) * 2 + part) * 1000 + token
        make = torch.Generator().manual_seed(seed)
        made.append(torch.randint(-64, 65, (heads, DIM), generator=make) / 16)
    return torch.stack(made) if made else torch.zeros(0, heads, DIM)


def prompt_kv(tokens: list[int]) -> dict[str, Any]:
    """K and V of a prompt of these tokens, for each group."""

    def of(group: CacheGroup) -> Callable[[Tensor], tuple[Tensor, Tensor]]:
        def kv(positions: Tensor) -> tuple[Tensor, Tensor]:
            mine = [tokens[p] for p in positions.tolist()]
            k, v = (
                torch.stack([rows(group.name, layer, mine, part) for layer in group.layers])
                for part in range(2)
            )
            return k, v

        return kv

    return {group.name: of(group) for group in GROUPS}


def kv_of(layer: int, tokens: list[int]) -> Made:
    """K and V of new tokens for the groups that a layer reads."""
    names = [group.name for group in GROUPS if layer in group.layers]
    k, v = ({name: rows(name, layer, tokens, part) for name in names} for part in range(2))
    return k, v


def attended(cache: GroupCache, step: Any, tokens: list[int]) -> list[Tensor]:
    """The output of every layer for a step's tokens."""
    outputs = []
    for layer in range(4):
        q = rows("q", layer, tokens, 0, HEADS)
        output: Any = cache.attend(step, layer, q, *kv_of(layer, tokens))
        outputs.append(output)
    return outputs


def check(outputs: list[Tensor], rank: int, history: list[list[int]], cp_size: int) -> None:
    """Each token's output equals attention over what it sees, the last of its history."""
    heads = HEADS // cp_size
    mine = slice(rank * heads, (rank + 1) * heads)
    for place, tokens in enumerate(history):
        for layer, output in enumerate(outputs):
            seen = []
            for group in GROUPS:
                if layer in group.layers:
                    window = tokens[-group.window :] if group.window else tokens
                    seen.append(
                        (rows(group.name, layer, window, 0), rows(group.name, layer, window, 1))
                    )
            o, _, bound = exact_attention(rows("q", layer, tokens[-1:], 0, HEADS)[0], seen)
            assert ((output[place] - o[mine]).norm(dim=-1) <= bound[mine]).all(), (layer, place)


def scenario(cache: GroupCache, rank: int, config: Config) -> tuple[int, dict[str, int]]:
    """A prompt, groups of tokens with rewinds, a fork, preemption: outputs are right throughout."""
    cp_size, tokens = config.layout.cp_size, {0: list(range(7)), 1: list(range(20, 33))}
    for id, prompt in tokens.items():
        cache.admit(id, len(prompt), prompt_kv(prompt))
    for n in range(8):
        lens = {0: 1 + n % 3, 1: 2, **({2: 1} if 2 in tokens else {})}
        new = {id: [100 + 10 * n + 3 * id + i for i in range(count)] for id, count in lens.items()}
        step = cache.begin(list(lens), list(lens.values()))
        outputs = attended(cache, step, [token for some in new.values() for token in some])
        history = [tokens[id] + some[: i + 1] for id, some in new.items() for i in range(len(some))]
        check(outputs, rank, history, cp_size)
        for id, some in new.items():
            tokens[id] += some
        cache.accept(1, 1)
        tokens[1].pop()
        if n == 3:
            cache.fork(1, 2)
            tokens[2] = list(tokens[1])
        if n == 5:
            cache.preempt(0)
            cache.resume(0, prompt_kv(tokens[0]))
    held = [cache.members[group.name].block_table(0) for group in GROUPS]
    for id in tokens:
        cache.release(id)
    return sum(page < 0 for table in held for page in table), cache.book.free_by_pool
