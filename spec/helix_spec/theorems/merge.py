"""The merge of partial attentions, over the real numbers (ATT-1 to ATT-3).

A partial is what a rank hands on: the output over its keys, and the log-sum-exp of its scores.
Here it is the output with its *weight*, the sum of exp(score): the log-sum-exp is the weight's
logarithm, and a rank without keys has weight 0 and output 0. One component of the output stands
for all of them, since they do not mix.

Real numbers do not round, and there is no NaN among them: that float arithmetic stays within
the bound E, and that a rank without keys is left out rather than multiplied by 0, is checked on
traces. The formulas are restated here; the reference's and the implementation's own merges are
compared with the whole attention in the suite.

That a merge of any two sets of keys is the attention over both is an induction over the keys of
one: `merge-with-empty` is its base, `merge-one-key-more` its step, and `attention-one-key-more`
says that attention is built up the same way. From two sets to C ranks in any order and grouping:
`merge-commutes` and `merge-associates`.
"""

from __future__ import annotations

from fractions import Fraction
from typing import NamedTuple

from helix_spec.theorems.base import RealNumber, Wrong, assume, theorem


class Partial(NamedTuple):
    """Attention over some keys: the sum of exp(score), and the output."""

    weight: Fraction
    output: Fraction


EMPTY = Partial(Fraction(0), Fraction(0))


def merge(a: Partial, b: Partial) -> Partial:
    """Return the attention over the keys of both."""
    weight = a.weight + b.weight
    if weight == 0:
        return EMPTY
    return Partial(weight, (a.weight * a.output + b.weight * b.output) / weight)


def one_key(weight: Fraction, value: Fraction) -> Partial:
    """Return the attention over a single key: its exp(score), and its value."""
    return Partial(weight, value)


# Wrong merges.


def _mean(a: Partial, b: Partial) -> Partial:
    return Partial(a.weight + b.weight, (a.output + b.output) / 2)


def _mixed_base(a: Partial, b: Partial) -> Partial:
    """A log-sum-exp in base 2 taken for one in base 4: the weights come out squared."""
    return _merge(a._replace(weight=a.weight * a.weight), b._replace(weight=b.weight * b.weight))


def _empty_counts_as_one(a: Partial, b: Partial) -> Partial:
    """A rank without keys reports log-sum-exp 0, which is weight 1."""
    return _merge(*(p._replace(weight=Fraction(1)) if p.weight == 0 else p for p in (a, b)))


def _first_outweighs(a: Partial, b: Partial) -> Partial:
    return a if a.weight >= b.weight else b


def _weight_dropped(a: Partial, b: Partial) -> Partial:
    return _merge(a, b)._replace(weight=max(a.weight, b.weight))


_merge = merge
MEAN = Wrong("partials averaged", _mean, "theorems.merge.merge", "general")
MIXED_BASE = Wrong("log-sum-exp base mixed up", _mixed_base, "theorems.merge.merge", "vLLM #28840")
EMPTY_COUNTS = Wrong(
    "an empty rank reports log-sum-exp 0",
    _empty_counts_as_one,
    "theorems.merge.merge",
    "vLLM #38416",
)
LARGEST = Wrong("the largest partial wins", _first_outweighs, "theorems.merge.merge")
DROPPED = Wrong("weights of merged partials dropped", _weight_dropped, "theorems.merge.merge")


@theorem(
    "merge-commutes",
    proves="ATT-2",
    witness={"a": 1, "x": 3, "b": 2, "y": 5},
    kills=[LARGEST],
)
def commutes(a: RealNumber, x: RealNumber, b: RealNumber, y: RealNumber) -> bool:
    """The order of two partials does not matter."""
    assume(a >= 0, b >= 0)
    one, other = _partial(a, x), _partial(b, y)
    return _same(merge(one, other), merge(other, one))


@theorem(
    "merge-associates",
    proves="ATT-2",
    witness={"a": 1, "x": 3, "b": 2, "y": 5, "c": 4, "z": -1},
    kills=[MEAN, DROPPED],
)
def associates(
    a: RealNumber, x: RealNumber, b: RealNumber, y: RealNumber, c: RealNumber, z: RealNumber
) -> bool:
    """The grouping of three partials does not matter, however many of them are empty."""
    assume(a >= 0, b >= 0, c >= 0)
    one, two, three = _partial(a, x), _partial(b, y), _partial(c, z)
    left = merge(merge(one, two), three)
    return _same(left, merge(one, merge(two, three)))


@theorem(
    "merge-with-empty",
    proves="ATT-3 ATT-1",
    witness={"a": 1, "x": 3},
    kills=[EMPTY_COUNTS, MEAN],
)
def with_empty(a: RealNumber, x: RealNumber) -> bool:
    """A rank without keys is the identity of the merge, from either side; all ranks empty give
    output 0.
    """
    assume(a >= 0)
    one = _partial(a, x)
    return _same(merge(one, EMPTY), one) & _same(merge(EMPTY, one), one)


@theorem(
    "attention-one-key-more",
    proves="ATT-1",
    witness={"total": 3, "weighted": 6, "w": 2, "v": 5},
    kills=[MEAN, MIXED_BASE, LARGEST],
)
def attention_one_key_more(
    total: RealNumber, weighted: RealNumber, w: RealNumber, v: RealNumber
) -> bool:
    """Attention over keys with sum of weights W and output o, and one key more of weight w and
    value v, is (W*o + w*v) / (W + w): the merge with the partial of that key alone.
    """
    assume(total > 0, w > 0)
    before = Partial(total, weighted / total)  # the weighted sum of the values over the weights
    after = Partial(total + w, (weighted + w * v) / (total + w))
    return _same(merge(before, one_key(w, v)), after)


@theorem(
    "merge-one-key-more",
    proves="ATT-1",
    witness={"a": 1, "x": 3, "b": 2, "y": 5, "w": 4, "v": -1},
    kills=[MEAN, DROPPED],
)
def merge_one_key_more(
    a: RealNumber, x: RealNumber, b: RealNumber, y: RealNumber, w: RealNumber, v: RealNumber
) -> bool:
    """Merging with a partial that has one key more is merging, then adding the key."""
    assume(a >= 0, b >= 0, w > 0)
    one, other, key = _partial(a, x), _partial(b, y), one_key(w, v)
    left = merge(one, merge(other, key))
    return _same(left, merge(merge(one, other), key))


@theorem(
    "merge-from-any-pivot",
    proves="ATT-1 ATT-2",
    witness={"a": 1, "x": 3, "b": 2, "y": 5, "pivot": 7},
    kills=[MIXED_BASE, EMPTY_COUNTS],
)
def from_any_pivot(
    a: RealNumber, x: RealNumber, b: RealNumber, y: RealNumber, pivot: RealNumber
) -> bool:
    """Dividing all weights by one positive number, as exp(lse - max) does, changes no output, and
    the total weight by that number: so the stable form is the same merge.
    """
    assume(a >= 0, b >= 0, pivot > 0)
    whole = merge(_partial(a, x), _partial(b, y))
    scaled = merge(_partial(a / pivot, x), _partial(b / pivot, y))
    return _same(Partial(scaled.weight * pivot, scaled.output), whole)


@theorem(
    "merge-by-maximum-and-sum",
    proves="ATT-1",
    witness={"p": 2, "s": 3, "x": 1, "q": 5, "u": 4, "y": -1},
)
def by_maximum_and_sum(
    p: RealNumber, s: RealNumber, x: RealNumber, q: RealNumber, u: RealNumber, y: RealNumber
) -> bool:
    """Statistics (m, s) instead of a log-sum-exp, weight s*exp(m): shifting both sums to the larger
    maximum gives the same merge (p, q stand for the exp(m)).
    """
    assume(p > 0, q > 0, s > 0, u > 0)
    top = p if p >= q else q
    total = s * (p / top) + u * (q / top)
    output = (s * (p / top) * x + u * (q / top) * y) / total
    return _same(Partial(total * top, output), merge(Partial(p * s, x), Partial(q * u, y)))


@by_maximum_and_sum.wrong()
def by_maximum_alone(
    p: RealNumber, s: RealNumber, x: RealNumber, q: RealNumber, u: RealNumber, y: RealNumber
) -> bool:
    """Weighted by the maximum alone."""
    assume(p > 0, q > 0, s > 0, u > 0)
    output = (p * x + q * y) / (p + q)
    return output == merge(Partial(p * s, x), Partial(q * u, y)).output


def _partial(weight: Fraction, output: Fraction) -> Partial:
    """A partial of this weight; without keys its output is 0."""
    return EMPTY if weight == 0 else Partial(weight, output)


def _same(a: Partial, b: Partial) -> bool:
    return (a.weight == b.weight) & (a.output == b.output)
