"""Exact attention in float64, and when two outputs are equal (SPEC.md sections 8 and 9).

Vectors are lists of floats; Python floats are float64, and sums use `math.fsum`, which rounds
once. Lengths: D is head_dim, S the number of keys.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from helix_spec.configs import DType, ModelShape
from helix_spec.values import Tensor, entry, is_probe, token_state

Vector = list[float]

UNIT_ROUNDOFF: dict[DType, float] = {
    "float32": 2.0**-24,
    "float16": 2.0**-11,
    "bfloat16": 2.0**-8,
}
"""Largest relative error of one rounding to nearest."""
U32 = UNIT_ROUNDOFF["float32"]

_SMALLEST_NORMAL_EXPONENT: dict[DType, int] = {"float32": -125, "float16": -13, "bfloat16": -125}
"""Exponent e of the smallest normal number, written m * 2**e with 0.5 <= m < 1."""


def round_to(x: float, dtype: DType) -> float:
    """The nearest number of this type, ties to even (subnormals included)."""
    precision = -int(math.log2(UNIT_ROUNDOFF[dtype]))
    exponent = max(math.frexp(x)[1], _SMALLEST_NORMAL_EXPONENT[dtype])
    step = math.ldexp(1.0, exponent - precision)
    return round(x / step) * step


@dataclass(frozen=True, slots=True)
class Rotated:
    """A vector after RoPE: `exact` in float64, `stored` once rounded to the model's type."""

    exact: Vector
    stored: Vector
    doubt: Vector
    """Per entry, how far apart two honest roundings may lie; 0 where all agree."""


def rope(x: Sequence[float], position: int, base: float, dtype: DType) -> Rotated:
    """RoPE of one head's vector at a global position (POS-2).

    Entry d turns with entry d + D/2 by the angle position * base**(-2d/D). Cosine and sine are
    rounded to float32; float32 arithmetic may then be off by 3 units of roundoff of |a| + |b|.
    """
    half = len(x) // 2
    exact, slack = [0.0] * len(x), [0.0] * len(x)
    for d in range(half):
        angle = position * base ** (-2 * d / len(x))
        cosine = round_to(math.cos(angle), "float32")
        sine = round_to(math.sin(angle), "float32")
        a, b = x[d], x[d + half]
        exact[d] = a * cosine - b * sine
        exact[d + half] = b * cosine + a * sine
        slack[d] = slack[d + half] = 3 * U32 * (abs(a) + abs(b))
    doubt = [
        round_to(value + s, dtype) - round_to(value - s, dtype)
        for value, s in zip(exact, slack, strict=True)
    ]
    return Rotated(exact, [round_to(value, dtype) for value in exact], doubt)


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
    x = raw(seed, token, layer, "q", q_head, model.head_dim)
    if is_probe(q_head, group, token.position):
        x = [0.0] * model.head_dim
    return rope(x, token.position, model.rope_base, model.dtype)


def key(model: ModelShape, seed: int, token: Token, layer: int, kv_head: int) -> Rotated:
    """One cached key."""
    x = raw(seed, token, layer, "k", kv_head, model.head_dim)
    return rope(x, token.position, model.rope_base, model.dtype)


@dataclass(frozen=True, slots=True)
class Partial:
    """Attention over some of the keys: normalised output, natural-log log-sum-exp."""

    output: Vector
    lse: float


def attend(q: Vector, keys: list[Vector], values: list[Vector], dim: int) -> Partial:
    """Softmax attention of one query over these keys; without keys (0, -inf) (ATT-3)."""
    if not keys:
        return Partial([0.0] * dim, -math.inf)
    scores = [math.fsum(a * b for a, b in zip(q, k, strict=True)) / math.sqrt(dim) for k in keys]
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
    dim = len(q.exact)
    scale = 1 / math.sqrt(dim)
    whole = attend(q.stored, [k.stored for k in keys], values, dim)
    scores = [
        scale * math.fsum(a * b for a, b in zip(q.stored, k.stored, strict=True)) for k in keys
    ]
    p = [math.exp(score - whole.lse) for score in scores]
    largest = max(abs(score) for score in scores)

    def score_error(k: Rotated, score: float) -> float:
        products = _norm([a * b for a, b in zip(q.stored, k.stored, strict=True)])
        rounding = math.sqrt(dim) * scale * products + math.sqrt(dim / 3) * abs(score)
        rotation = [abs(a) * db for a, db in zip(q.stored, k.doubt, strict=True)]
        float32 = U32 * (rounding + 2 * abs(score) + largest)
        return float32 + scale * _in_doubt(rotation, model.dtype)

    squares = []
    apart = [[a - b for a, b in zip(v, whole.output, strict=True)] for v in values]
    for k, v, off, weight, score in zip(keys, values, apart, p, scores, strict=True):
        squares.append((weight * _norm(off) * score_error(k, score)) ** 2)
        squares.append((weight * _norm(v) * U32) ** 2)
    # A doubt about an entry of q moves all scores at once, so it is followed to the output.
    turned = []
    for d in range(dim):
        pull = [weight * scale * k.stored[d] for weight, k in zip(p, keys, strict=True)]
        movement = [
            math.fsum(x * off[e] for x, off in zip(pull, apart, strict=True)) for e in range(dim)
        ]
        turned.append(q.doubt[d] * _norm(movement))
    squares.append(_in_doubt(turned, model.dtype) ** 2)
    u_wire, u_out = UNIT_ROUNDOFF[model.partial_dtype], UNIT_ROUNDOFF[model.dtype]
    for rank in sorted(set(ranks)):
        mine = [j for j, holder in enumerate(ranks) if holder == rank]
        part = attend(q.stored, [keys[j].stored for j in mine], [values[j] for j in mine], dim)
        weight = math.exp(part.lse - whole.lse)
        distance = _norm([a - b for a, b in zip(part.output, whole.output, strict=True)])
        squares.append((weight * _norm(part.output) * u_wire) ** 2)
        squares.append((weight * (abs(part.lse) + 1) * 2 * U32 * distance) ** 2)
    squares.append((u_out * _norm(whole.output)) ** 2)
    mass = [math.fsum(w * abs(v[d]) for w, v in zip(p, values, strict=True)) for d in range(dim)]
    squares.append((U32 * (math.sqrt(len(keys)) + 2) * _norm(mass)) ** 2)
    return whole.output, math.sqrt(math.fsum(squares))


def _in_doubt(effects: Sequence[float], dtype: DType) -> float:
    """What doubts about the entries of one vector do together.

    In float32 every entry is in doubt, each by little; in a 16-bit type hardly any is, by a
    whole unit in the last place.
    """
    return _norm(effects) if dtype == "float32" else math.fsum(effects)


def _norm(x: Sequence[float]) -> float:
    return math.sqrt(math.fsum(a * a for a in x))
