"""Exact attention: merging equals the whole, empty partials are the identity."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_reference.attention import Partial, Token, attend, key, merge, query, raw
from helix_spec.config import ModelShape

SHAPE = ModelShape(q_heads=4, kv_heads=2, head_dim=4)
EMPTY = Partial([0.0] * 4, -math.inf)


def keys_and_values(n: int, seed: int = 0):
    """Some keys and values of one head."""
    tokens = [Token(0, p, p) for p in range(n)]
    keys = [key(SHAPE, seed, token, 0, 0).stored for token in tokens]
    return keys, [raw(seed, token, 0, "v", 0, 4) for token in tokens]


@pytest.mark.holds("ATT-1", "ATT-2", "ATT-3")
@given(
    ranks=st.lists(st.integers(0, 3), min_size=1, max_size=12),
    order=st.permutations(range(4)),
    seed=st.integers(0, 9),
)
def test_merge_of_any_split_is_the_whole(ranks, order, seed):
    """Partials of any split, in any order, empty ones among them, merge into the whole."""
    keys, values = keys_and_values(len(ranks), seed)
    q = query(SHAPE, seed, Token(0, 0, len(ranks)), 0, 1).stored
    whole = attend(q, keys, values, 4, 0.5)
    partials = []
    for rank in order:
        mine = [j for j, holder in enumerate(ranks) if holder == rank]
        partials.append(attend(q, [keys[j] for j in mine], [values[j] for j in mine], 4, 0.5))
    merged = merge(partials)
    assert merged.output == pytest.approx(whole.output, abs=1e-12)
    assert merged.lse == pytest.approx(whole.lse, abs=1e-12)


@pytest.mark.holds("ATT-3")
def test_no_keys_is_the_identity():
    """Without keys the partial is (0, -inf); merging such partials alone gives it again."""
    assert attend([1.0] * 4, [], [], 4, 0.5) == EMPTY
    assert merge([EMPTY, EMPTY]) == EMPTY
    one = attend([1.0] * 4, *keys_and_values(1), 4, 0.5)
    assert merge([EMPTY, one]) == one


@pytest.mark.holds("ATT-3")
def test_an_empty_rank_may_hold_nan():
    """What lies in the memory of a rank without keys counts for nothing (ATT-3)."""
    one = attend([1.0] * 4, *keys_and_values(3), 4, 0.5)
    assert merge([Partial([math.nan] * 4, -math.inf), one]) == one


def test_probe_weighs_all_keys_alike():
    """The output of a probe head is the mean of the values."""
    keys, values = keys_and_values(5)
    probe = query(SHAPE, 0, Token(0, 5, 5), 0, 0)
    assert probe.stored == [0.0] * 4
    mean = [sum(v[d] for v in values) / 5 for d in range(4)]
    assert attend(probe.stored, keys, values, 4, 0.5).output == pytest.approx(mean)
