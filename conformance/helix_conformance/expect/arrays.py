"""Q, K and V as arrays, exact attention and its error bound, in numpy and float64.

The same definitions as `helix_spec.values` and `helix_reference.attention`, for whole arrays at
a time; tests hold the two together. Axes: n tokens, heads, dim; S keys.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt

from helix_spec.config import CacheDType, Config, ModelShape
from helix_spec.events import Merge
from helix_spec.values import LEVELS, TENSOR_CODE, U32, UNIT_ROUNDOFF, Tensor, sink

Array = npt.NDArray[np.float64]
Singles = npt.NDArray[np.float32]
Ints = npt.NDArray[np.int64]
Words = npt.NDArray[np.uint32]

_FORMATS: dict[CacheDType, tuple[int, int]] = {
    "float32": (24, -125),
    "float16": (11, -13),
    "bfloat16": (8, -125),
    "float8_e4m3fn": (4, -5),
}
"""Of each type the bits of precision, and the least exponent of a normal number."""


def round_to(x: Array, dtype: CacheDType) -> Array:
    """Return each entry rounded to a dtype, ties to even, subnormals included.

    Parameters
    ----------
    x : Array, float64 of any shape
        Numbers that do not overflow in the dtype.
    dtype
        The dtype whose numbers are meant.

    Returns
    -------
    Array, float64, of the shape of x
        Numbers of that dtype.

    Examples
    --------
    >>> round_to(np.array([1 / 3, 1.0625]), "float8_e4m3fn").tolist()
    [0.34375, 1.0]
    """
    precision, least_exponent = _FORMATS[dtype]
    step = np.ldexp(1.0, np.maximum(np.frexp(x)[1], least_exponent) - precision)
    rounded: Array = np.rint(x / step) * step
    return rounded


# As words of 32 bits, in which sums and products wrap.
_16, _15, _M1, _M2 = (np.uint32(word) for word in (16, 15, 0x7FEB352D, 0x846CA68B))


def _fold(state: Words, field: Ints) -> Words:
    x = state + (field + 0x9E3779B9).astype(np.uint32)
    x ^= x >> _16
    x *= _M1
    x ^= x >> _15
    x *= _M2
    return x ^ (x >> _16)


@dataclass(frozen=True)
class Tokens:
    """Identity and global position of n tokens, as columns.

    Parameters
    ----------
    events : Ints, int64 (n)
        Index in the trace of the event that created each token.
    places : Ints, int64 (n)
        Each token's number in its event.
    positions : Ints, int64 (n)
        Global positions.
    """

    events: Ints
    places: Ints
    positions: Ints


def token_columns(tokens: Sequence[tuple[int, int, int]]) -> Tokens:
    """Return tokens as columns.

    Parameters
    ----------
    tokens
        For each token its event, its number in that event and its global position.

    Examples
    --------
    >>> token_columns([(0, 0, 0), (0, 1, 1), (3, 0, 2)]).positions.tolist()
    [0, 1, 2]
    """
    return Tokens(*np.array(tokens, dtype=np.int64).reshape(-1, 3).T)


def entries(
    seed: int,
    tokens: Tokens,
    layers: int | Sequence[int],
    tensor: Tensor,
    heads: Sequence[int],
    dim: int,
    group: int = 0,
) -> Array:
    """Return Q, K or V before RoPE (SPEC.md section 8).

    Parameters
    ----------
    seed
        The configuration's seed, 32 bits.
    tokens
        n tokens.
    layers
        Number of layers, or the numbers of some.
    tensor
        Which of the tokens' tensors.
    heads
        Numbers of the heads, over the whole model.
    dim
        Elements of a head.
    group
        Of K and V, the cache group that holds them, from 0.

    Returns
    -------
    Array, float64 (layers, n, heads, dim)
        Multiples of 1/16 within +-4.

    Examples
    --------
    >>> entries(7, token_columns([(3, 2, 16)]), [1], "k", heads=[0], dim=4)[0, 0, 0].tolist()
    [-3.625, -0.1875, 0.875, -2.9375]
    """
    numbers = range(layers) if isinstance(layers, int) else layers
    with np.errstate(over="ignore"):  # sums and products wrap
        state = _fold(np.zeros(1, dtype=np.uint32), np.array([seed - 0x9E3779B9], dtype=np.int64))
        for column in (tokens.events, tokens.places, tokens.positions):
            state = _fold(state, column)
        state = _fold(state, np.array(numbers, dtype=np.int64)[:, None])
        state = _fold(state, np.array(TENSOR_CODE[tensor] + 16 * group, dtype=np.int64))
        state = _fold(state[:, :, None], np.array(heads, dtype=np.int64))
        state = _fold(state[..., None], np.arange(dim, dtype=np.int64))
    entries: Array = (state % LEVELS).astype(np.float64) / 16 - 4
    return entries


def queries(model: ModelShape, seed: int, tokens: Tokens, heads: Sequence[int]) -> Array:
    """Return Q before RoPE; a head is zero where it is a probe.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    tokens
        n tokens.
    heads
        Numbers of the query heads, over the whole model.

    Returns
    -------
    Array, float64 (layers, n, heads, key_dim)
    """
    q = entries(seed, tokens, range(model.layers), "q", heads, model.key_dim)
    group = model.q_heads // model.kv_heads
    columns = np.array(heads)
    if group > 1:
        probe = np.broadcast_to(columns % group == 0, (len(tokens.positions), len(heads)))
    else:
        probe = (columns[None, :] + tokens.positions[:, None]) % 2 == 0
    q[:, probe] = 0.0
    return q


class Layers(NamedTuple):
    """The layers that read a cache group, and the group's number."""

    numbers: Sequence[int]
    group: int = 0


def values(
    model: ModelShape, seed: int, tokens: Tokens, heads: Sequence[int], of: Layers | None = None
) -> Array:
    """Return V before it is cached; with a latent cache, the latent part of K.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    tokens
        n tokens.
    heads
        Numbers of the KV heads, over the whole model.
    of
        Which layers of which cache group; None for all of the first one.

    Returns
    -------
    Array, float64 (layers, n, heads, value_dim)
    """
    tensor: Tensor = "v" if model.latent is None else "k"
    layers, group = of or Layers(range(model.layers))
    return entries(seed, tokens, layers, tensor, heads, model.value_dim, group)


class Rotated(NamedTuple):
    """Rows of n tokens after RoPE: three arrays, float64 (layers, n, heads, dim).

    Parameters
    ----------
    stored
        Entries as they are kept.
    lower, upper
        Between these, correct roundings lie; both are numbers of the dtype of `stored`.
    """

    stored: Array
    lower: Array
    upper: Array

    @property
    def uncertainty(self) -> Array:
        """How far apart two correct roundings may lie, for each entry."""
        return self.upper - self.lower

    def between(self, first: int, end: int) -> Rotated:
        """Return the rows of the tokens number `first` up to `end`, without `end`."""
        return Rotated(*(part[:, first:end] for part in self))

    def followed_by(self, rows: Rotated) -> Rotated:
        """Return the rows of these tokens, and behind them those of others."""
        pairs = zip(self, rows, strict=True)
        return Rotated(*(np.concatenate(pair, axis=1) for pair in pairs))


def rope(
    x: Array, positions: Ints, base: float | Sequence[float], *dtypes: CacheDType, still: int = 0
) -> Rotated:
    """Return rows rotated to global positions (POS-2, SPEC.md section 8).

    Of the R = dim - still last elements, element d < R/2 is rotated with element d + R/2, by the
    angle position * base**(-2d/R).

    Parameters
    ----------
    x : Array, float64 (layers, n, heads, dim)
        Rows before RoPE.
    positions : Ints, int64 (n)
        Global positions.
    base
        The model's `rope_base`, or that of each layer.
    *dtypes
        Dtypes to which the rotated elements are rounded, one after the other.
    still
        How many of the first elements are not rotated.

    Returns
    -------
    Rotated
        Rows of the shape of x.

    References
    ----------
    J. Su et al., "RoFormer", arXiv 2104.09864, section 3.4; the pairs are those of GPT-NeoX.

    Examples
    --------
    >>> row = np.array([1.0, 0.0]).reshape(1, 1, 1, 2)
    >>> rope(row, np.array([1]), 10000.0, "bfloat16").stored.tolist()  # cosine and sine of 1
    [[[[0.5390625, 0.83984375]]]]
    """
    turned = x[..., still:]
    half = turned.shape[-1] // 2
    bases = np.reshape(base, (-1, 1, 1, 1)) if isinstance(base, Sequence) else base
    inverse = bases ** (-2.0 * np.arange(half) / turned.shape[-1])
    angle = positions[:, None, None] * inverse
    cosine, sine = round_to(np.cos(angle), "float32"), round_to(np.sin(angle), "float32")
    a, b = turned[..., :half], turned[..., half:]
    exact = np.concatenate([x[..., :still], a * cosine - b * sine, b * cosine + a * sine], axis=-1)
    slack = np.zeros_like(x)
    slack[..., still:] = 3 * U32 * np.tile(np.abs(a) + np.abs(b), 2)

    def kept(row: Array) -> Array:
        for dtype in dtypes:
            row = round_to(row, dtype)
        return row

    return Rotated(kept(exact), kept(exact - slack), kept(exact + slack))


def rotated_queries(
    model: ModelShape,
    seed: int,
    tokens: Tokens,
    heads: Sequence[int],
    bases: Sequence[float] | None = None,
) -> Rotated:
    """Return Q after RoPE, rounded to `dtype`.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    tokens
        n tokens.
    heads
        Numbers of the query heads, over the whole model.
    bases
        The base of RoPE in each layer; None for that of the model.

    Returns
    -------
    Rotated
        Arrays (layers, n, heads, key_dim).
    """
    q, still = queries(model, seed, tokens, heads), model.key_dim - model.rope_dim
    return rope(q, tokens.positions, bases or model.rope_base, model.dtype, still=still)


def cached_keys(
    model: ModelShape, seed: int, tokens: Tokens, heads: Sequence[int], of: Layers | None = None
) -> Rotated:
    """Return K as it is cached: rotated, rounded to `dtype`, then to the dtype of the cache.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    tokens
        n tokens.
    heads
        Numbers of the KV heads, over the whole model.
    of
        Which layers of which cache group; None for all of the first one.

    Returns
    -------
    Rotated
        Arrays (layers, n, heads, key_dim).
    """
    layers, group = of or Layers(range(model.layers))
    k = entries(seed, tokens, layers, "k", heads, model.key_dim, group)
    types, still = (model.dtype, model.cached_dtype), model.key_dim - model.rope_dim
    return rope(k, tokens.positions, model.rope_base, *types, still=still)


def cached_values(
    model: ModelShape, seed: int, tokens: Tokens, heads: Sequence[int], of: Layers | None = None
) -> Array:
    """Return V as it is cached: rounded to the dtype of the cache.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    tokens
        n tokens.
    heads
        Numbers of the KV heads, over the whole model.
    of
        Which layers of which cache group; None for all of the first one.

    Returns
    -------
    Array, float64 (layers, n, heads, value_dim)
    """
    return round_to(values(model, seed, tokens, heads, of), model.cached_dtype)


@dataclass(frozen=True)
class KeysValues:
    """Cached keys and values of S tokens in one layer.

    Parameters
    ----------
    stored : Array, float64 (S, kv_heads, key_dim)
        Keys as they are cached.
    uncertainty : Array, float64 (S, kv_heads, key_dim)
        How far apart two correct roundings of each entry of a key may lie.
    values : Array, float64 (S, kv_heads, value_dim)
        Values as they are cached.
    """

    stored: Array
    uncertainty: Array
    values: Array


def exact_attention(
    model: ModelShape,
    q: Array,
    q_uncertainty: Array,
    kv: KeysValues,
    ranks: Ints,
    *,
    sent: bool = True,
    sinks: Array | None = None,
) -> tuple[Array, Array]:
    """Return the attention of one token over S keys, and its bound E for each head (ATT-4).

    SPEC.md section 9 has the formula and derives each term; `helix_reference.attention.error_bound`
    has the same terms for one head.

    Parameters
    ----------
    model
        The model's attention: head counts, the scale, and the dtypes that roundings come from.
    q : Array, float64 (q_heads, key_dim)
        The token's query, after RoPE, as it is stored.
    q_uncertainty : Array, float64 (q_heads, key_dim)
        How far apart two correct roundings of each of its entries may lie.
    kv
        The S keys and values that the query sees; S is at least 1.
    ranks : Ints, int64 (S)
        The cp_rank that holds each key; one number more for those of replicated groups.
    sent
        Whether partial outputs are sent; not where all groups of the layer are replicated.
    sinks : Array, float64 (q_heads), optional
        The logits of the heads' sinks; None without them.

    Returns
    -------
    output : Array, float64 (q_heads, value_dim)
    bound : Array, float64 (q_heads)
        E of each head, a Euclidean length over its value_dim elements.

    Examples
    --------
    >>> model, tokens = ModelShape(), token_columns([(0, place, place) for place in range(5)])
    >>> q = rotated_queries(model, 0, tokens, heads=range(4)).between(4, 5)
    >>> k, v = (make(model, 0, tokens, range(2)) for make in (cached_keys, cached_values))
    >>> kv = KeysValues(k.stored[0], k.uncertainty[0], v[0])
    >>> ranks = np.array([0, 0, 1, 1, 0])
    >>> output, bound = exact_attention(model, q.stored[0, 0], q.uncertainty[0, 0], kv, ranks)
    >>> output.shape, bound.shape
    ((4, 16), (4,))
    >>> for dtype in ("float32", "bfloat16"):
    ...     distance = np.linalg.norm(round_to(output, dtype) - output, axis=-1)
    ...     print(dtype, (distance <= bound).tolist())
    float32 [True, True, True, True]
    bfloat16 [False, False, False, False]
    """
    width, scale, heads = model.key_dim, model.softmax_scale, model.kv_heads
    # The query heads of a group share a KV head: they are the rows of one matrix product.
    q, q_uncertainty = (x.reshape(heads, -1, width) for x in (q, q_uncertainty))
    k, dk, v = (x.transpose(1, 0, 2) for x in (kv.stored, kv.uncertainty, kv.values))
    columns = k.transpose(0, 2, 1)
    scores = scale * (q @ columns)  # (kv_heads, group, S)
    none = scores[..., :0]
    z = none if sinks is None else sinks.reshape(heads, -1, 1)
    logits = np.concatenate([scores, z], -1)  # of a sink too, which has no value
    top = logits.max(-1, keepdims=True)
    weights = np.exp(scores - top)
    total = np.exp(logits - top).sum(-1, keepdims=True)
    p = weights / total
    lse = (top + np.log(total))[..., 0]
    output = p @ v

    largest = np.abs(logits).max(-1, keepdims=True)
    products = np.sqrt(q**2 @ columns**2)
    rounding = np.sqrt(width) * scale * products + np.sqrt(width / 3) * np.abs(scores)
    score_error = U32 * (rounding + 2 * np.abs(scores) + largest)
    score_error += scale * _rotation(q, dk, model.cached_dtype)
    apart = v[:, None] - output[:, :, None]
    squares = ((p * _norm(apart) * score_error) ** 2).sum(-1)
    squares += ((p * _norm(v)[:, None] * UNIT_ROUNDOFF[model.product_dtype]) ** 2).sum(-1)
    moved = ((scale * p)[:, :, None] * columns[:, None]) @ apart
    squares += _propagated(q_uncertainty * _norm(moved), model.dtype) ** 2
    u_wire = UNIT_ROUNDOFF[model.partial_dtype] if sent else 0.0
    u_out = UNIT_ROUNDOFF[model.dtype]
    mine = ranks == np.arange(ranks.max() + 1)[:, None, None, None]
    share = p * mine  # (ranks, kv_heads, group, S)
    weight = share.sum(-1)
    heavy = np.maximum(weight, 1e-300)
    part = (share @ v) / heavy[..., None]
    squares += ((weight * _norm(part) * u_wire) ** 2).sum(0)
    uncertainty = (np.abs(lse + np.log(heavy)) + 1) * 2 * U32
    squares += ((weight * uncertainty * _norm(part - output)) ** 2).sum(0)
    squares += (u_out * _norm(output)) ** 2
    squares += (U32 * (np.abs(lse) + 2) * _norm(output)) ** 2
    mass = p @ np.abs(v)
    squares += (U32 * (np.sqrt(logits.shape[-1]) + 2) * _norm(mass)) ** 2
    moved = np.exp(z - lse[..., None]) * _norm(output)[..., None]
    squares += ((moved * U32 * (2 * np.abs(z) + largest)) ** 2).sum(-1)
    squares += ((moved * (np.abs(z) + 1) * 2 * U32) ** 2).sum(-1)
    return output.reshape(model.q_heads, -1), np.sqrt(squares).reshape(-1)


@dataclass(frozen=True)
class Kept:
    """K and V of the S tokens of one request, as they are cached.

    Parameters
    ----------
    tokens
        Identity of the token at each global position: its event and its number in that event.
    keys
        Arrays (layers, S, kv_heads, key_dim).
    values : Array, float64 (layers, S, kv_heads, value_dim)
    """

    tokens: list[tuple[int, int]]
    keys: Rotated
    values: Array


class KeptRows:
    """K and V of requests: computed for new tokens, kept for those that stay the same.

    Parameters
    ----------
    config
        A legal configuration.
    of
        Which layers of which cache group; None for all of the first one.

    Examples
    --------
    >>> rows = KeptRows(Config(layout="pr9757/1:C=1,T=2", pages=[9], max_len=100))
    >>> rows.of(0, [(0, 0), (0, 1), (0, 2)]).values.shape
    (1, 3, 2, 16)
    >>> rows.of(0, [(0, 0), (4, 0)]).keys.stored.shape  # position 1 was rewound and decoded again
    (1, 2, 2, 16)
    """

    def __init__(self, config: Config, of: Layers | None = None) -> None:
        self.config, self.layers = config, of
        self.kept: dict[int, Kept] = {}

    def of(self, id: int, tokens: list[tuple[int, int]]) -> Kept:
        """Return K and V of all tokens of a request, by global position.

        Parameters
        ----------
        id
            The request.
        tokens
            Identity of the token at each global position: its event and its number in that event.
        """
        self.work_out({id: tokens})
        return self.kept[id]

    def forget(self, id: int) -> None:
        """Drop the rows of a request that was released."""
        self.kept.pop(id, None)

    def work_out(self, tokens_of: Mapping[int, list[tuple[int, int]]]) -> None:
        """Compute K and V of the new tokens of several requests at once, and keep them.

        Parameters
        ----------
        tokens_of
            Of each request, the identity of the token at each global position.
        """
        shape, heads = self.config.model, range(self.config.model.kv_heads)
        changed = {
            id: tokens
            for id, tokens in tokens_of.items()
            if id not in self.kept or self.kept[id].tokens != tokens
        }
        if not changed:
            return
        same = {
            id: _alike(self.kept[id].tokens, tokens) if id in self.kept else 0
            for id, tokens in changed.items()
        }
        fresh = token_columns(
            [
                (*tokens[position], position)
                for id, tokens in changed.items()
                for position in range(same[id], len(tokens))
            ]
        )
        keys = cached_keys(shape, self.config.seed, fresh, heads, self.layers)
        values = cached_values(shape, self.config.seed, fresh, heads, self.layers)
        end = 0
        for id, tokens in changed.items():
            begin, end = end, end + len(tokens) - same[id]
            k, v = keys.between(begin, end), values[:, begin:end]
            if same[id]:
                k = self.kept[id].keys.between(0, same[id]).followed_by(k)
                v = np.concatenate([self.kept[id].values[:, : same[id]], v], axis=1)
            self.kept[id] = Kept(list(tokens), k, v)


def _alike(some: Sequence[Any], others: Sequence[Any]) -> int:
    """How many entries two lists begin with alike."""
    for place, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return place
    return min(len(some), len(others))


def sinks_of(model: ModelShape, seed: int, layer: int) -> Array | None:
    """Return the logits of the sinks of a layer's query heads; None for a model without them.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    layer
        The layer, from 0.

    Returns
    -------
    Array, float64 (q_heads), or None
    """
    if not model.sinks:
        return None
    return np.array([sink(seed, layer, head) for head in range(model.q_heads)])


def token_attention(
    model: ModelShape, seed: int, query: Rotated, kept: Kept, holders: Ints
) -> tuple[Array, Array]:
    """Return the exact output of one token in every layer, and its bound E (ATT-4).

    The token sees the first S = len(holders) tokens of its request.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    query
        The query of this token alone: arrays (layers, 1, q_heads, key_dim).
    kept
        K and V of the token's request: of S tokens or more.
    holders : Ints, int64 (S)
        The cp_rank that holds each global position.

    Returns
    -------
    output : Array, float64 (layers, q_heads, value_dim)
    bound : Array, float64 (layers, q_heads)
    """
    seen = slice(0, len(holders))
    layers = [
        exact_attention(
            model,
            query.stored[layer, 0],
            query.uncertainty[layer, 0],
            KeysValues(
                kept.keys.stored[layer, seen],
                kept.keys.uncertainty[layer, seen],
                kept.values[layer, seen],
            ),
            holders,
            sinks=sinks_of(model, seed, layer),
        )
        for layer in range(model.layers)
    ]
    return np.stack([output for output, _ in layers]), np.stack([bound for _, bound in layers])


class Seen(NamedTuple):
    """The rows of one cache group that a token sees.

    Parameters
    ----------
    layers
        Numbers of the layers that read the group.
    kept
        K and V of the token's request in the group.
    holders : Ints, int64 (positions)
        The cp_rank that holds each position from 0 on; C for all where the group is replicated.
    window
        How many of the last positions are seen; None for all.
    """

    layers: Sequence[int]
    kept: Kept
    holders: Ints
    window: int | None

    def at(self, position: int) -> Seen:
        """Return what the token at a global position sees."""
        return self._replace(holders=self.holders[: position + 1])

    @property
    def span(self) -> slice:
        """The positions that are seen."""
        end = len(self.holders)
        return slice(0 if self.window is None else max(0, end - self.window), end)


def union_attention(config: Config, query: Rotated, seen: Sequence[Seen]) -> tuple[Array, Array]:
    """Return the exact output of one token that reads cache groups, and its bound E (ATT-4).

    Parameters
    ----------
    config
        The configuration: the model's attention, the number of cp_ranks, and the seed.
    query
        The query of this token alone: arrays (layers, 1, q_heads, key_dim).
    seen
        What it sees in each group.

    Returns
    -------
    output : Array, float64 (layers, q_heads, value_dim)
    bound : Array, float64 (layers, q_heads)
    """
    model, outputs, bounds = config.model, [], []
    for layer in range(model.layers):
        reads = [(one, list(one.layers).index(layer)) for one in seen if layer in one.layers]
        holders = np.concatenate([one.holders[one.span] for one, _ in reads])
        kv = KeysValues(
            np.concatenate([one.kept.keys.stored[at, one.span] for one, at in reads]),
            np.concatenate([one.kept.keys.uncertainty[at, one.span] for one, at in reads]),
            np.concatenate([one.kept.values[at, one.span] for one, at in reads]),
        )
        sent = bool((holders < config.layout.cp_size).any())
        q = query.stored[layer, 0], query.uncertainty[layer, 0]
        sinks = sinks_of(model, config.seed, layer)
        output, bound = exact_attention(model, *q, kv, holders, sent=sent, sinks=sinks)
        outputs.append(output)
        bounds.append(bound)
    return np.stack(outputs), np.stack(bounds)


def supplied_partials(config: Config, event: Merge, heads: Sequence[int]) -> tuple[Array, Array]:
    """Return all C partials that a merge of n tokens supplies (SPEC.md sections 5.6 and 8).

    Every entry is exact in float32, those of outputs in every dtype.

    Parameters
    ----------
    config
        The configuration: its seed and its model.
    event
        The merge.
    heads
        Numbers of the query heads, over the whole model.

    Returns
    -------
    outputs : Array, float64 (C, n, heads, value_dim)
        0 where a partial has no keys.
    lses : Array, float64 (C, n, heads)
        Natural log-sum-exps; -inf where a partial has no keys.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=2,T=1", pages=[1, 1], max_len=1)
    >>> outputs, lses = supplied_partials(config, Merge([[0], [None]], order=[1, 0]), range(4))
    >>> outputs.shape, lses[1, 0].tolist()
    ((2, 1, 4, 16), [-inf, -inf, -inf, -inf])
    """
    n, outputs, lses = len(event.levels[0]), [], []
    for number, row in enumerate(event.levels):
        columns = Tokens(np.full(n, number), np.arange(n), np.zeros(n, dtype=np.int64))
        output = entries(config.seed, columns, [0], "output", heads, config.model.value_dim)[0]
        lse = entries(config.seed, columns, [0], "lse", heads, 1)[0, ..., 0]
        level = np.array([-np.inf if level is None else level for level in row])[:, None]
        outputs.append(np.where(np.isinf(level)[..., None], 0.0, output))
        lses.append(level + lse)
    return np.stack(outputs), np.stack(lses)


def partial_of(config: Config, event: Merge, rank: int) -> tuple[Singles, Singles]:
    """Return what a merge of n tokens supplies to a rank: a partial for its query heads (MAP-1).

    Parameters
    ----------
    config
        The configuration. Under `config.poison` the output is NaN where the partial has no keys, as
        memory is that was never written.
    event
        The merge.
    rank
        The global rank: tp_rank * C + cp_rank.

    Returns
    -------
    output : Singles, float32 (n, heads, value_dim)
        Of the q_heads / tp_size query heads of the rank's tp_rank.
    lse : Singles, float32 (n, heads)
        Natural log-sum-exps; -inf where the partial has no keys.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=2,T=1", pages=[1, 1], max_len=1)
    >>> output, lse = partial_of(config, Merge([[0], [None]], order=[1, 0]), rank=0)
    >>> bool(np.isnan(output).all()), lse.tolist()
    (True, [[-inf, -inf, -inf, -inf]])
    """
    tp_rank, cp_rank = divmod(rank, config.layout.cp_size)
    per_shard = config.model.q_heads // config.tp_size
    heads = range(tp_rank * per_shard, (tp_rank + 1) * per_shard)
    outputs, lses = (
        x[event.order[cp_rank]].astype(np.float32) for x in supplied_partials(config, event, heads)
    )
    if config.poison:
        outputs[np.isinf(lses)] = np.nan
    return outputs, lses


def exact_merge(model: ModelShape, outputs: Array, lses: Array) -> tuple[Array, Array]:
    """Return the merge of C partials of n tokens, and its bound E (ATT-4).

    SPEC.md section 9, "Merges of supplied partials", has the formula and derives each term;
    `helix_reference.attention.merge_bound` has the same terms for one head.

    Parameters
    ----------
    model
        The model's attention: the dtypes that roundings come from.
    outputs : Array, float64 (C, n, heads, value_dim)
        Finite numbers, also where a partial has no keys.
    lses : Array, float64 (C, n, heads)
        Natural log-sum-exps; -inf where a partial has no keys.

    Returns
    -------
    output : Array, float64 (n, heads, value_dim)
        0 where no partial has keys.
    bound : Array, float64 (n, heads)
        E, a Euclidean length over value_dim elements.

    Examples
    --------
    >>> outputs = np.array([1.0, 4.0, 0.0]).reshape(3, 1, 1, 1)
    >>> lses = np.array([np.log(2), 0.0, -np.inf]).reshape(3, 1, 1)
    >>> output, bound = exact_merge(ModelShape(), outputs, lses)
    >>> bool(abs(output.item() - 2) < 1e-15), output.shape, bound.shape
    (True, (1, 1, 1), (1, 1))
    """
    top = lses.max(0)
    top = np.where(np.isinf(top), 0.0, top)
    weights = np.exp(lses - top)
    total = weights.sum(0)
    held = np.isfinite(lses)
    weights /= np.where(total > 0, total, 1.0)
    lse = top + np.log(np.where(total > 0, total, 1.0))
    output = (weights[..., None] * outputs).sum(0)

    u_wire, u_out = UNIT_ROUNDOFF[model.partial_dtype], UNIT_ROUNDOFF[model.dtype]
    uncertainty = (np.abs(np.where(held, lses, 0.0)) + 1) * 2 * U32
    squares = ((weights * _norm(outputs) * u_wire) ** 2).sum(0)
    squares += ((weights * uncertainty * _norm(outputs - output)) ** 2).sum(0)
    squares += (u_out * _norm(output)) ** 2
    squares += (U32 * (np.abs(lse) + 2) * _norm(output)) ** 2
    mass = (weights[..., None] * np.abs(outputs)).sum(0)
    squares += (U32 * (np.sqrt(held.sum(0)) + 2) * _norm(mass)) ** 2
    return output, np.sqrt(squares)


_NUMBERS: Final = re.compile("[<>|=]?[fiub][1248]")
"""What numpy calls the types of numbers; its other types can be much: text, records, objects."""


def as_array(rows: Any) -> Array:
    """Return what an engine handed over as a float64 array.

    Parameters
    ----------
    rows
        An array, nested lists of numbers, or a map of `dtype`, `shape` and `data`, its bytes.

    Returns
    -------
    Array, float64 of the shape of rows

    Raises
    ------
    TypeError, ValueError, KeyError, OverflowError
        When it is no array of numbers.

    Examples
    --------
    >>> row = np.float32([0.5, 1.5])
    >>> as_array({"dtype": row.dtype.str, "shape": [1, 2], "data": row.tobytes()}).tolist()
    [[0.5, 1.5]]
    """
    with np.errstate(invalid="ignore"):  # memory that nobody wrote to may hold signalling NaNs
        if isinstance(rows, dict):
            if not _NUMBERS.fullmatch(str(rows["dtype"])):
                raise ValueError(f"its elements are of type {rows['dtype']!r}, which is no number")
            flat = np.frombuffer(rows["data"], dtype=rows["dtype"])
            return flat.reshape(rows["shape"]).astype(np.float64)
        return np.asarray(rows, dtype=np.float64)


def _propagated(effects: Array, dtype: CacheDType) -> Array:
    """Uncertainties of one vector, together: see the reference's `_propagated`."""
    return _norm(effects) if dtype == "float32" else effects.sum(-1)


def _rotation(q: Array, uncertainties: Array, dtype: CacheDType) -> Array:
    """Uncertainties of keys propagated to scores: `_propagated` of |q| times each key's.

    q (heads, group, dim), uncertainties (heads, S, dim); returns (heads, group, S).
    """
    if dtype == "float32":
        return np.sqrt(q**2 @ (uncertainties**2).transpose(0, 2, 1))
    together: Array = np.abs(q) @ uncertainties.transpose(0, 2, 1)
    return together


def _norm(x: Array) -> Array:
    norm: Array = np.sqrt(np.einsum("...i,...i->...", x, x))
    return norm
