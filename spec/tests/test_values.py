"""The numbers that stand in for Q, K and V (SPEC.md section 8)."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_spec.values import LEVELS, Tensor, entry, is_probe, mix, token_state

WORDS = st.integers(0, 2**32 - 1)
EVERY_ENTRY = [level / 16 for level in range(-64, 65)]


def row(state: int, *, heads: int, dims: int) -> list[float]:
    """The entries of one token, head after head."""
    return [entry(state, head, dim) for head in range(heads) for dim in range(dims)]


@given(WORDS, WORDS, WORDS)
def test_entries_are_multiples_of_a_sixteenth_within_four(state: int, head: int, dim: int) -> None:
    """Every entry is one of the 129 levels."""
    assert entry(state, head, dim) in EVERY_ENTRY


def test_all_levels_come_about_equally_often() -> None:
    """Of 12,900 entries each level gets about 100: none is missing, none is doubled."""
    drawn = row(token_state(0, 0, 0, 0, 0, "v"), heads=100, dims=LEVELS)
    counts = [drawn.count(level) for level in EVERY_ENTRY]
    assert sum(counts) == len(drawn)
    assert 50 < min(counts) <= max(counts) < 170


def test_entries_are_exact_in_every_type() -> None:
    """No level changes when it is stored in a type that a cache may have.

    A bfloat16 is a float32 whose low 16 bits are zero.
    """
    single = np.array(EVERY_ENTRY, dtype=np.float32)
    assert single.tolist() == EVERY_ENTRY
    assert single.astype(np.float16).tolist() == EVERY_ENTRY
    assert not (single.view(np.uint32) & 0xFFFF).any()


@given(WORDS)
def test_the_finaliser_agrees_with_machine_arithmetic(x: int) -> None:
    """Python's integers, masked, do what unsigned 32-bit registers do."""
    y = np.array([x], dtype=np.uint32)
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        y ^= y >> np.uint32(shift)
        y *= np.uint32(factor)
    y ^= y >> np.uint32(16)
    assert mix(x) == int(y[0])


def test_the_finaliser_is_a_bijection_on_a_sample() -> None:
    """Different words stay different, so no field of the hash is lost."""
    assert len({mix(x << 8) for x in range(2**16)}) == 2**16


@pytest.mark.parametrize("field", ["seed", "event", "place", "position", "layer"])
def test_tokens_that_differ_anywhere_have_different_rows(field: str) -> None:
    """Changing one field of where an entry belongs changes the row."""
    base = {"seed": 0, "event": 0, "place": 0, "position": 0, "layer": 0}
    states = [token_state(**{**base, field: value}, tensor="k") for value in range(200)]
    assert len({tuple(row(state, heads=1, dims=8)) for state in states}) == 200


def test_q_k_and_v_of_a_token_differ() -> None:
    """The three tensors of one token share no row."""
    tensors: tuple[Tensor, ...] = ("q", "k", "v")
    rows = {tuple(row(token_state(1, 2, 3, 4, 5, t), heads=2, dims=8)) for t in tensors}
    assert len(rows) == 3


def test_fields_are_not_interchangeable() -> None:
    """A place is not an event is not a position: swapped fields give another token."""
    assert len(
        {
            token_state(0, event, place, position, 0, "k")
            for event, place, position in (
                (1, 2, 3), (1, 3, 2), (2, 1, 3), (2, 3, 1), (3, 1, 2), (3, 2, 1),
            )
        }
    ) == 6  # fmt: skip


@given(st.integers(2, 16), st.integers(1, 8), st.integers(0, 10**6))
def test_each_group_has_one_probe(group_size: int, kv_heads: int, position: int) -> None:
    """In groups of several query heads the first is the probe, at every position."""
    probes = [h for h in range(group_size * kv_heads) if is_probe(h, group_size, position)]
    assert probes == [group_size * kv_head for kv_head in range(kv_heads)]


@given(st.integers(0, 64), st.integers(0, 10**6))
def test_a_group_of_one_probes_every_other_position(q_head: int, position: int) -> None:
    """Without a group the head is a probe where head + position is even."""
    assert [is_probe(q_head, 1, p) for p in (position, position + 1)] == [
        (q_head + p) % 2 == 0 for p in (position, position + 1)
    ]
