"""The numbers that stand in for Q, K and V (SPEC.md section 8).

Every entry is a hash of where it belongs, so all ranks and the reference make the same ones
without shipping tensors, and a token decoded again after a rewind has new ones. Entries are
multiples of 1/16 within +-4: exact in float32, float16 and bfloat16.

The hash folds its fields one by one into 32 bits with a known integer finaliser ("lowbias32",
Chris Wellons, Hash Function Prospector, 2018).
"""

from __future__ import annotations

from typing import Final, Literal

from helix_spec.config import CacheDType

Tensor = Literal["q", "k", "v", "output", "lse"]
"""Q, K and V of tokens; output and log-sum-exp of the partials that a `merge` supplies."""
TENSOR_CODE: Final[dict[Tensor, int]] = {"q": 1, "k": 2, "v": 3, "output": 4, "lse": 5}
UNIT_ROUNDOFF: Final[dict[CacheDType, float]] = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
    "float8_e4m3fn": 2.0**-4,
}
"""Largest relative error of one rounding to nearest."""
U32: Final = UNIT_ROUNDOFF["float32"]
LEVELS: Final = 129
"""Number of different entries: -64/16 to 64/16."""


def mix(x: int) -> int:
    """Finaliser of 32-bit integers: each input bit changes each output bit about half the time."""
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def fold(state: int, field: int) -> int:
    """The hash state after one more field (only its low 32 bits count)."""
    return mix(state + field + 0x9E3779B9)


def token_state(
    seed: int, event: int, place: int, position: int, layer: int, tensor: Tensor
) -> int:
    """Hash state of one token's Q, K or V in one layer.

    `event` and `place` are the token's identity, `position` is global.
    """
    state = mix(seed)
    for field in (event, place, position, layer, TENSOR_CODE[tensor]):
        state = fold(state, field)
    return state


def entry(state: int, head: int, dim: int) -> float:
    """One entry of the token's Q, K or V: a multiple of 1/16 within +-4."""
    return (fold(fold(state, head), dim) % LEVELS - 64) / 16


def is_probe(q_head: int, group_size: int, position: int) -> bool:
    """Whether this query head has an all-zero query at this position.

    A zero query weighs every key alike, so one missing, doubled or foreign key shows there,
    which under peaky scores it would not. The first query head of each KV group is a probe; a
    group of one head is a probe at every other position.
    """
    if group_size > 1:
        return q_head % group_size == 0
    return (q_head + position) % 2 == 0
