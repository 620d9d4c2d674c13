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
    """The nearest number of this type, ties to even (subnormals included; none is too large)."""
    precision = -int(math.log2(UNIT_ROUNDOFF[dtype]))
    exponent = max(math.frexp(x)[1], _SMALLEST_NORMAL_EXPONENT[dtype])
    step = math.ldexp(1.0, exponent - precision)
    return round(x / step) * step


@dataclass(frozen=True, slots=True)
class Rotated:
    """A vector after RoPE: `exact` in float64, `stored` as it is kept."""

    exact: Vector
    stored: Vector
    uncertainty: Vector
    """Per entry, how far apart two honest roundings may lie; 0 where all agree."""


def rope(
    x: Sequence[float], position: int, base: float, *dtypes: CacheDType, still: int = 0
) -> Rotated:
    """RoPE of one head's vector at a global position (POS-2), kept in these types in turn.

    The first `still` entries are not turned. Of the D others, entry d turns with entry d + D/2 by
    the angle position * base**(-2d/D). Cosine and sine are rounded to float32; float32 arithmetic
    may then be off by 3 units of roundoff of |a| + |b|.
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
    return Rotated(exact, [_kept(value, dtypes) for value in exact], uncertainty)


def _kept(x: float, dtypes: Sequence[CacheDType]) -> float:
    """Rounded to each type in turn."""
    for dtype in dtypes:
        x = round_to(x, dtype)
    return x


@dataclass(frozen=True, slots=True)
class Token:
    """Where one token's Q, K and V come from: its identity and its global position."""

    event: int
    place: int
    position: int


def raw(seed: int, token: Token, layer: int, tensor: Tensor, head: int, dim: int) -> Vector:
    """One head's Q, K or V before RoPE, `dim` entries."""
    state = token_state(seed, token.event, token.place, token.position, layer, tensor)
    return [entry(state, head, d) for d in range(dim)]


def query(model: ModelShape, seed: int, token: Token, layer: int, q_head: int) -> Rotated:
    """One query head after RoPE; all zero where it is a probe."""
    group = model.q_heads // model.kv_heads
    x = raw(seed, token, layer, "q", q_head, model.key_dim)
    if is_probe(q_head, group, token.position):
        x = [0.0] * model.key_dim
    still = model.key_dim - model.rope_dim
    return rope(x, token.position, model.rope_base, model.dtype, still=still)


def key(
    model: ModelShape, seed: int, token: Token, layer: int, kv_head: int, at: int | None = None
) -> Rotated:
    """One cached key, turned to its own position or to `at`."""
    x = raw(seed, token, layer, "k", kv_head, model.key_dim)
    position = token.position if at is None else at
    still = model.key_dim - model.rope_dim
    return rope(x, position, model.rope_base, model.dtype, model.cached_dtype, still=still)


def value(model: ModelShape, seed: int, token: Token, layer: int, kv_head: int) -> Vector:
    """One cached value; with a latent cache, the latent part of the key."""
    tensor: Tensor = "v" if model.latent is None else "k"
    x = raw(seed, token, layer, tensor, kv_head, model.value_dim)
    return [round_to(entry, model.cached_dtype) for entry in x]


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some of the keys: normalised output, natural-log log-sum-exp."""

    output: Vector
    lse: float


def attend(q: Vector, keys: list[Vector], values: list[Vector], dim: int, scale: float) -> Partial:
    """Softmax attention of one query over these keys; `dim` is that of a value.

    Without keys it is (0, -inf) (ATT-3).
    """
    if not keys:
        return Partial([0.0] * dim, -math.inf)
    scores = [scale * math.fsum(a * b for a, b in zip(q, k, strict=True)) for k in keys]
    top = max(scores)
    weights = [math.exp(score - top) for score in scores]
    total = math.fsum(weights)
    output = [
        math.fsum(w * v[d] for w, v in zip(weights, values, strict=True)) / total
        for d in range(dim)
    ]
    return Partial(output, top + math.log(total))


def merge(partials: Sequence[Partial]) -> Partial:
    """Partials of disjoint sets of keys combined (ATT-1); empty ones count for nothing."""
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
    model: ModelShape, q: Rotated, keys: list[Rotated], values: list[Vector], ranks: list[int]
) -> tuple[Vector, float]:
    """The exact output of one query and head, and the bound E around it (ATT-4).

    `ranks[j]` is the cp_rank that holds key j. SPEC.md section 9 derives each term.
    """
    width, dim, scale = model.key_dim, model.value_dim, model.scale
    whole = attend(q.stored, [k.stored for k in keys], values, dim, scale)
    scores = [
        scale * math.fsum(a * b for a, b in zip(q.stored, k.stored, strict=True)) for k in keys
    ]
    p = [math.exp(score - whole.lse) for score in scores]
    largest = max(abs(score) for score in scores)

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
    u_wire, u_out = UNIT_ROUNDOFF[model.partial_dtype], UNIT_ROUNDOFF[model.dtype]
    for rank in sorted(set(ranks)):
        mine = [j for j, holder in enumerate(ranks) if holder == rank]
        held = [keys[j].stored for j in mine]
        part = attend(q.stored, held, [values[j] for j in mine], dim, scale)
        weight = math.exp(part.lse - whole.lse)
        distance = _norm([a - b for a, b in zip(part.output, whole.output, strict=True)])
        squares.append((weight * _norm(part.output) * u_wire) ** 2)
        squares.append((weight * (abs(part.lse) + 1) * 2 * U32 * distance) ** 2)
    squares.append((u_out * _norm(whole.output)) ** 2)
    mass = [math.fsum(w * abs(v[d]) for w, v in zip(p, values, strict=True)) for d in range(dim)]
    squares.append((U32 * (math.sqrt(len(keys)) + 2) * _norm(mass)) ** 2)
    return whole.output, math.sqrt(math.fsum(squares))


def supplied(
    model: ModelShape, seed: int, number: int, token: int, head: int, level: int | None
) -> Partial:
    """One token and head of partial `number` that a `merge` supplies; of no keys (0, -inf)."""
    if level is None:
        return Partial([0.0] * model.value_dim, -math.inf)
    source = Token(number, token, 0)
    output = raw(seed, source, 0, "output", head, model.value_dim)
    return Partial(output, level + raw(seed, source, 0, "lse", head, 1)[0])


def merge_bound(model: ModelShape, partials: Sequence[Partial]) -> tuple[Vector, float]:
    """The exact merge of one token and head, and the bound E around it (ATT-4).

    SPEC.md section 9 derives each term.
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

    In float32 every entry is in doubt, each by little; in a narrower type hardly any is, by a
    whole unit in the last place.
    """
    return _norm(effects) if dtype == "float32" else math.fsum(effects)


def _norm(x: Sequence[float]) -> float:
    return math.sqrt(math.fsum(a * a for a in x))
