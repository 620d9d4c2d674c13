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

Tensor = Literal["q", "k", "v", "output", "lse", "sink"]
"""Q, K, V of tokens; output and log-sum-exp of the partials of a `merge`; sinks of a layer."""
TENSOR_CODE: Final[dict[Tensor, int]] = {
    "q": 1,
    "k": 2,
    "v": 3,
    "output": 4,
    "lse": 5,
    "sink": 6,
}
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
    """Return the finaliser of a 32-bit integer.

    Each input bit changes each output bit about half the time.

    Parameters
    ----------
    x
        Any integer; its low 32 bits count.

    Returns
    -------
    int
        An integer from 0 to 2**32 - 1.

    Examples
    --------
    >>> hex(mix(1))
    '0x688990c0'
    """
    x &= 0xFFFFFFFF
    x ^= x >> 16
    x = x * 0x7FEB352D & 0xFFFFFFFF
    x ^= x >> 15
    x = x * 0x846CA68B & 0xFFFFFFFF
    return x ^ (x >> 16)


def fold(state: int, field: int) -> int:
    """Return the hash state after one more field.

    Parameters
    ----------
    state
        The state before, 32 bits.
    field
        The field; its low 32 bits count.
    """
    return mix(state + field + 0x9E3779B9)


def token_state(
    seed: int, event: int, place: int, position: int, layer: int, tensor: Tensor, group: int = 0
) -> int:
    """Return the hash state of one token's Q, K or V in one layer.

    Parameters
    ----------
    seed
        The configuration's seed, 32 bits.
    event, place
        The token's identity: index of the event that created it, and its number in that event.
    position
        Its global position.
    layer
        The layer, from 0.
    tensor
        Which of its tensors.
    group
        Of K and V, the cache group that holds them, from 0.

    Examples
    --------
    >>> hex(token_state(7, event=3, place=2, position=16, layer=1, tensor="k"))  # example 11.8
    '0x872136de'
    """
    state = mix(seed)
    for field in (event, place, position, layer, TENSOR_CODE[tensor] + 16 * group):
        state = fold(state, field)
    return state


def entry(state: int, head: int, dim: int) -> float:
    """Return one entry of a token's Q, K or V: a multiple of 1/16 within +-4.

    Parameters
    ----------
    state
        The token's state, from `token_state`.
    head
        The head, numbered over the whole model.
    dim
        The element of the head.

    Examples
    --------
    >>> [entry(0x872136DE, 0, dim) for dim in range(4)]
    [-3.625, -0.1875, 0.875, -2.9375]
    """
    return (fold(fold(state, head), dim) % LEVELS - 64) / 16


def sink(seed: int, layer: int, head: int) -> float:
    """Return the logit of a query head's attention sink (SPEC.md section 8).

    Parameters
    ----------
    seed
        The configuration's seed, 32 bits.
    layer
        The layer, from 0.
    head
        The query head, numbered over the whole model.

    Examples
    --------
    >>> [sink(7, 1, head) for head in range(3)]
    [-0.0625, 1.75, -1.125]
    """
    return entry(token_state(seed, 0, 0, 0, layer, "sink"), head, 0)


def is_probe(q_head: int, group_size: int, position: int) -> bool:
    """Return whether a query head has an all-zero query at a position.

    A zero query weighs every key alike, so that a missing, doubled or foreign key shows there,
    which it would not under peaky scores. The first query head of each KV group is a probe; a
    group of one head is a probe at every other position.

    Parameters
    ----------
    q_head
        The query head, numbered over the whole model.
    group_size
        Query heads for each KV head.
    position
        The token's global position.

    Examples
    --------
    >>> [head for head in range(8) if is_probe(head, group_size=4, position=0)]
    [0, 4]
    """
    if group_size > 1:
        return q_head % group_size == 0
    return (q_head + position) % 2 == 0
