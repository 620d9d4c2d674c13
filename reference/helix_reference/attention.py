"""Exact attention in float64, and when two outputs are equal (SPEC.md sections 8 and 9).

Vectors are lists of floats; Python floats are float64, and sums use `math.fsum`, which rounds
once. Lengths: W and D are those of a key and of a value, S is the number of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from helix_spec.config import CacheDType, ModelShape
from helix_spec.values import U32, UNIT_ROUNDOFF, Tensor, entry, is_probe, token_state

Vector = list[float]

_SMALLEST_NORMAL_EXPONENT: dict[CacheDType, int] = {
    "float32": -125,
    "float16": -13,
    "bfloat16": -125,
    "float8_e4m3fn": -5,
}
"""Exponent e of the smallest normal number, written m * 2**e with 0.5 <= m < 1."""


def round_to(x: float, dtype: CacheDType) -> float:
    """Return the nearest number of a dtype, ties to even.

    Subnormals are included. Overflow is not: all numbers here are far below each dtype's largest.

    Parameters
    ----------
    x
        The number, float64.
    dtype
        The dtype whose numbers are meant.

    Returns
    -------
    float
        A number of that dtype, as float64.

    Examples
    --------
    >>> round_to(1 / 3, "float16"), round_to(1 / 3, "bfloat16")
    (0.333251953125, 0.333984375)
    >>> round_to(1.0625, "float8_e4m3fn")  # a tie of 1.0 and 1.125
    1.0
    """
    precision = -int(math.log2(UNIT_ROUNDOFF[dtype]))
    exponent = max(math.frexp(x)[1], _SMALLEST_NORMAL_EXPONENT[dtype])
    step = math.ldexp(1.0, exponent - precision)
    return round(x / step) * step


@dataclass(frozen=True, slots=True)
class Rotated:
    """A vector after RoPE, and how uncertain its rounding is (SPEC.md sections 8 and 9).

    Parameters
    ----------
    stored
        W entries, rounded as they are kept.
    uncertainty
        Per entry, how far apart two correct roundings may lie; 0 where all agree.
    """

    stored: Vector
    uncertainty: Vector


def rope(
    x: Sequence[float], position: int, base: float, *dtypes: CacheDType, still: int = 0
) -> Rotated:
    """Return one head's vector rotated to a global position (POS-2, SPEC.md section 8).

    Of the R = W - still last elements, element d < R/2 is rotated with element d + R/2, by the
    angle position * base**(-2d/R). Cosine and sine are rounded to float32. Float32 arithmetic may
    be off by 3 * 2**-24 * (abs(a) + abs(b)) for a pair (a, b).

    Parameters
    ----------
    x
        W elements.
    position
        Global position of the token.
    base
        The model's `rope_base`.
    *dtypes
        Dtypes to which the rotated elements are rounded, one after the other.
    still
        How many of the first elements are not rotated; the others are even in number.

    Returns
    -------
    Rotated
        W elements.

    References
    ----------
    J. Su et al., "RoFormer", arXiv 2104.09864, section 3.4; the pairs are those of GPT-NeoX.

    Examples
    --------
    >>> rope([1.0, 0.0], 1, 10000.0, "bfloat16").stored  # cosine and sine of 1
    [0.5390625, 0.83984375]
    """
    turned = len(x) - still
    half = turned // 2
    exact, slack = list(x), [0.0] * len(x)
    for d in range(still, still + half):
        angle = position * base ** (-2 * (d - still) / turned)
        cosine = round_to(math.cos(angle), "float32")
        sine = round_to(math.sin(angle), "float32")
        a, b = x[d], x[d + half]
        exact[d] = a * cosine - b * sine
        exact[d + half] = b * cosine + a * sine
        slack[d] = slack[d + half] = 3 * U32 * (abs(a) + abs(b))
    uncertainty = [
        _kept(value + s, dtypes) - _kept(value - s, dtypes)
        for value, s in zip(exact, slack, strict=True)
    ]
    return Rotated([_kept(value, dtypes) for value in exact], uncertainty)


def _kept(x: float, dtypes: Sequence[CacheDType]) -> float:
    """Rounded to each type in turn."""
    for dtype in dtypes:
        x = round_to(x, dtype)
    return x


@dataclass(frozen=True, slots=True)
class Token:
    """What the Q, K and V of one token depend on: its identity and its global position.

    Parameters
    ----------
    event
        Index in the trace of the event that created the token.
    place
        The token's number in that event, from 0.
    position
        Its global position.
    """

    event: int
    place: int
    position: int


def raw(
    seed: int, token: Token, layer: int, tensor: Tensor, head: int, dim: int, group: int = 0
) -> Vector:
    """Return one head's Q, K or V before RoPE (SPEC.md section 8).

    Parameters
    ----------
    seed
        The configuration's seed, 32 bits.
    token
        The token.
    layer
        The layer, from 0.
    tensor
        Which of its tensors.
    head
        The head, numbered over the whole model.
    dim
        Number of elements.
    group
        Of K and V, the cache group that holds them, from 0.

    Returns
    -------
    list of float
        `dim` elements: multiples of 1/16 within +-4.

    Examples
    --------
    >>> raw(7, Token(event=3, place=2, position=16), layer=1, tensor="k", head=0, dim=4)
    [-3.625, -0.1875, 0.875, -2.9375]
    """
    identity = (token.event, token.place, token.position)
    state = token_state(seed, *identity, layer, tensor, group)
    return [entry(state, head, d) for d in range(dim)]


def query(model: ModelShape, seed: int, token: Token, layer: int, q_head: int) -> Rotated:
    """Return one query head after RoPE, rounded to `dtype`; zero where it is a probe.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    token
        The token.
    layer
        The layer, from 0.
    q_head
        The query head, numbered over the whole model.

    Returns
    -------
    Rotated
        key_dim elements.
    """
    group = model.q_heads // model.kv_heads
    x = raw(seed, token, layer, "q", q_head, model.key_dim)
    if is_probe(q_head, group, token.position):
        x = [0.0] * model.key_dim
    still = model.key_dim - model.rope_dim
    return rope(x, token.position, model.rope_base, model.dtype, still=still)


def key(
    model: ModelShape, seed: int, token: Token, layer: int, kv_head: int, group: int = 0
) -> Rotated:
    """Return one cached key: rotated, rounded to `dtype`, then to the dtype of the cache.

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    token
        The token.
    layer
        The layer, from 0.
    kv_head
        The KV head, numbered over the whole model.
    group
        The cache group that holds it, from 0.

    Returns
    -------
    Rotated
        key_dim elements.
    """
    x = raw(seed, token, layer, "k", kv_head, model.key_dim, group)
    still = model.key_dim - model.rope_dim
    return rope(x, token.position, model.rope_base, model.dtype, model.cached_dtype, still=still)


def value(
    model: ModelShape, seed: int, token: Token, layer: int, kv_head: int, group: int = 0
) -> Vector:
    """Return one cached value, rounded to the dtype of the cache.

    With a latent cache it is the latent part of the key (SPEC.md section 4.1).

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    token
        The token.
    layer
        The layer, from 0.
    kv_head
        The KV head, numbered over the whole model.
    group
        The cache group that holds it, from 0.

    Returns
    -------
    list of float
        value_dim elements.
    """
    tensor: Tensor = "v" if model.latent is None else "k"
    x = raw(seed, token, layer, tensor, kv_head, model.value_dim, group)
    return [round_to(entry, model.cached_dtype) for entry in x]


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some of the keys: what one rank contributes to one token and query head.

    Parameters
    ----------
    output
        D elements, normalised over these keys; 0 without keys.
    lse
        Natural log-sum-exp of the scores; -inf without keys.
    """

    output: Vector
    lse: float


def attend(
    q: Vector,
    keys: list[Vector],
    values: list[Vector],
    dim: int,
    scale: float,
    sink: float | None = None,
) -> Partial:
    """Return the softmax attention of one query over these keys; (0, -inf) without keys (ATT-3).

    Parameters
    ----------
    q
        W elements.
    keys
        S keys of W elements.
    values
        S values of D elements.
    dim
        D, elements of a value.
    scale
        Factor of the scores: 1 / sqrt(head_dim).
    sink
        A logit without a value, which counts where there are keys; None without one.

    Returns
    -------
    Partial
        D elements and the log-sum-exp, of the sink too.

    Examples
    --------
    >>> attend([0.0], [[1.0], [2.0]], [[4.0, 0.0], [8.0, 2.0]], dim=2, scale=1.0)  # a probe: a mean
    Partial(output=[6.0, 1.0], lse=0.6931471805599453)
    >>> attend([0.0], [[1.0]], [[4.0, 2.0]], dim=2, scale=1.0, sink=0.0).output
    [2.0, 1.0]
    >>> attend([0.0], [], [], dim=2, scale=1.0)
    Partial(output=[0.0, 0.0], lse=-inf)
    """
    if not keys:
        return Partial([0.0] * dim, -math.inf)
    scores = [scale * math.fsum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
    extra = [] if sink is None else [sink]
    top = max(scores + extra)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights + [math.exp(logit - top) for logit in extra])
    output = [
        math.fsum(w * v[d] for w, v in zip(weights, values, strict=True)) / total
        for d in range(dim)
    ]
    return Partial(output, top + math.log(total))


def merge(partials: Sequence[Partial]) -> Partial:
    """Return the attention over the union of disjoint sets of keys (ATT-1).

    Each output is weighted by exp(lse_r - lse). A partial without keys counts for nothing (ATT-3).

    Parameters
    ----------
    partials
        At least one partial, of any number of keys each.

    Returns
    -------
    Partial
        That of all keys; (0, -inf) when none has a key.

    References
    ----------
    Helix Parallelism, arXiv 2507.07120, section 2.1.

    Examples
    --------
    >>> one = attend([1.0], [[0.5]], [[4.0]], dim=1, scale=1.0)
    >>> two = attend([1.0], [[1.5], [0.0]], [[8.0], [2.0]], dim=1, scale=1.0)
    >>> both = attend([1.0], [[0.5], [1.5], [0.0]], [[4.0], [8.0], [2.0]], dim=1, scale=1.0)
    >>> math.isclose(merge([one, two]).output[0], both.output[0])
    True
    """
    dim = len(partials[0].output)
    held = [partial for partial in partials if partial.lse != -math.inf]
    if not held:
        return Partial([0.0] * dim, -math.inf)
    top = max(partial.lse for partial in held)
    weights = [math.exp(partial.lse - top) for partial in held]
    total = math.fsum(weights)
    output = [
        math.fsum(w * partial.output[d] for w, partial in zip(weights, held, strict=True)) / total
        for d in range(dim)
    ]
    return Partial(output, top + math.log(total))


def error_bound(
    model: ModelShape,
    q: Rotated,
    keys: list[Rotated],
    values: list[Vector],
    ranks: list[int],
    *,
    sent: bool = True,
    sink: float | None = None,
) -> tuple[Vector, float]:
    """Return the exact output of one token and query head, and the bound E around it (ATT-4).

    An output is correct when its Euclidean distance to the exact one is at most E. SPEC.md
    section 9 has the formula and derives each term.

    Parameters
    ----------
    model
        The model's attention: the scale, and the dtypes that roundings come from.
    q
        The query: W elements.
    keys
        S keys that it sees, at least one: W elements each.
    values
        Their S values: D elements each.
    ranks
        The cp_rank that holds each of the S keys; one number more for those of replicated groups.
    sent
        Whether partial outputs are sent; not where all groups are replicated.
    sink
        The head's sink; None without one.

    Returns
    -------
    output : list of float
        D elements.
    bound : float
        E, a Euclidean length.

    Examples
    --------
    >>> model, tokens = ModelShape(), [Token(0, place, place) for place in range(5)]
    >>> q = query(model, 0, tokens[-1], layer=0, q_head=1)
    >>> keys = [key(model, 0, token, layer=0, kv_head=0) for token in tokens]
    >>> values = [value(model, 0, token, layer=0, kv_head=0) for token in tokens]
    >>> output, bound = error_bound(model, q, keys, values, ranks=[0, 0, 1, 1, 0])
    >>> for dtype in ("float32", "bfloat16"):
    ...     rounded = [round_to(x, dtype) for x in output]
    ...     print(dtype, math.dist(rounded, output) <= bound)
    float32 True
    bfloat16 False
    """
    width, dim, scale = model.key_dim, model.value_dim, model.softmax_scale
    whole = attend(q.stored, [k.stored for k in keys], values, dim, scale, sink)
    scores = [
        scale * math.fsum(a * b for a, b in zip(q.stored, k.stored, strict=True)) for k in keys
    ]
    p = [math.exp(score - whole.lse) for score in scores]
    extra = [] if sink is None else [sink]
    largest = max(abs(score) for score in scores + extra)

    def score_error(k: Rotated, score: float) -> float:
        products = _norm([a * b for a, b in zip(q.stored, k.stored, strict=True)])
        rounding = math.sqrt(width) * scale * products + math.sqrt(width / 3) * abs(score)
        rotation = [abs(a) * db for a, db in zip(q.stored, k.uncertainty, strict=True)]
        float32 = U32 * (rounding + 2 * abs(score) + largest)
        return float32 + scale * _propagated(rotation, model.cached_dtype)

    u_product = UNIT_ROUNDOFF[model.product_dtype]
    squares = []
    apart = [[a - b for a, b in zip(v, whole.output, strict=True)] for v in values]
    for k, v, off, weight, score in zip(keys, values, apart, p, scores, strict=True):
        squares.append((weight * _norm(off) * score_error(k, score)) ** 2)
        squares.append((weight * _norm(v) * u_product) ** 2)
    # An uncertainty of an entry of q moves all scores at once, so it is propagated to the output.
    turned = []
    for d in range(width):
        pull = [weight * scale * k.stored[d] for weight, k in zip(p, keys, strict=True)]
        movement = [
            math.fsum(x * off[e] for x, off in zip(pull, apart, strict=True)) for e in range(dim)
        ]
        turned.append(q.uncertainty[d] * _norm(movement))
    squares.append(_propagated(turned, model.dtype) ** 2)
    u_wire = UNIT_ROUNDOFF[model.partial_dtype] if sent else 0.0
    u_out = UNIT_ROUNDOFF[model.dtype]
    for rank in sorted(set(ranks)):
        mine = [j for j, holder in enumerate(ranks) if holder == rank]
        held = [keys[j].stored for j in mine]
        part = attend(q.stored, held, [values[j] for j in mine], dim, scale)
        weight = math.exp(part.lse - whole.lse)
        distance = _norm([a - b for a, b in zip(part.output, whole.output, strict=True)])
        squares.append((weight * _norm(part.output) * u_wire) ** 2)
        squares.append((weight * (abs(part.lse) + 1) * 2 * U32 * distance) ** 2)
    squares.append((u_out * _norm(whole.output)) ** 2)
    squares.append((U32 * (abs(whole.lse) + 2) * _norm(whole.output)) ** 2)
    mass = [math.fsum(w * abs(v[d]) for w, v in zip(p, values, strict=True)) for d in range(dim)]
    squares.append((U32 * (math.sqrt(len(keys) + len(extra)) + 2) * _norm(mass)) ** 2)
    for logit in extra:  # a key of value 0, and a holder that sends nothing
        moved = math.exp(logit - whole.lse) * _norm(whole.output)
        squares.append((moved * U32 * (2 * abs(logit) + largest)) ** 2)
        squares.append((moved * (abs(logit) + 1) * 2 * U32) ** 2)
    return whole.output, math.sqrt(math.fsum(squares))


def supplied(
    model: ModelShape, seed: int, number: int, token: int, head: int, level: int | None
) -> Partial:
    """Return one token and query head of a partial that a `merge` supplies (SPEC.md section 8).

    Parameters
    ----------
    model
        The model's attention.
    seed
        The configuration's seed, 32 bits.
    number
        Number of the partial, from 0 to C - 1.
    token
        Number of the token in the event, from 0.
    head
        The query head, numbered over the whole model.
    level
        The event's `levels[number][token]`: about the log-sum-exp; None without keys.

    Returns
    -------
    Partial
        value_dim elements and the log-sum-exp; (0, -inf) without keys.
    """
    if level is None:
        return Partial([0.0] * model.value_dim, -math.inf)
    source = Token(number, token, 0)
    output = raw(seed, source, 0, "output", head, model.value_dim)
    return Partial(output, level + raw(seed, source, 0, "lse", head, 1)[0])


def merge_bound(model: ModelShape, partials: Sequence[Partial]) -> tuple[Vector, float]:
    """Return the exact merge of one token and query head, and the bound E around it (ATT-4).

    SPEC.md section 9, "Merges of supplied partials", has the formula and derives each term.

    Parameters
    ----------
    model
        The model's attention: the dtypes that roundings come from.
    partials
        C partials of D elements; they are exact.

    Returns
    -------
    output : list of float
        D elements; 0 when no partial has keys.
    bound : float
        E, a Euclidean length; 0 when no partial has keys.
    """
    whole = merge(partials)
    held = [partial for partial in partials if partial.lse != -math.inf]
    if not held:
        return whole.output, 0.0
    u_wire, u_out = UNIT_ROUNDOFF[model.partial_dtype], UNIT_ROUNDOFF[model.dtype]
    squares = []
    weights = [math.exp(partial.lse - whole.lse) for partial in held]
    for weight, part in zip(weights, held, strict=True):
        distance = _norm([a - b for a, b in zip(part.output, whole.output, strict=True)])
        squares.append((weight * _norm(part.output) * u_wire) ** 2)
        squares.append((weight * (abs(part.lse) + 1) * 2 * U32 * distance) ** 2)
    squares.append((u_out * _norm(whole.output)) ** 2)
    squares.append((U32 * (abs(whole.lse) + 2) * _norm(whole.output)) ** 2)
    mass = [
        math.fsum(w * abs(part.output[d]) for w, part in zip(weights, held, strict=True))
        for d in range(model.value_dim)
    ]
    squares.append((U32 * (math.sqrt(len(held)) + 2) * _norm(mass)) ** 2)
    return whole.output, math.sqrt(math.fsum(squares))


def _propagated(effects: Sequence[float], dtype: CacheDType) -> float:
    """Return what uncertainties of the entries of one vector of this type do together.

    In float32 every entry is uncertain, each by little; in a narrower type hardly any is, by a
    whole unit in the last place.
    """
    return _norm(effects) if dtype == "float32" else math.fsum(effects)


def _norm(x: Sequence[float]) -> float:
    return math.sqrt(math.fsum(a * a for a in x))
