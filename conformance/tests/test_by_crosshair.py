"""The integer properties once more, with Hypothesis searching by CrossHair's symbolic backend.

A bug finder, not a proof: it solves for inputs that reach a branch, where random numbers would
rarely get, and falls back to random ones when it is done. What is proved is in `theorems`.
"""

from __future__ import annotations

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from helix_reference import dealing
from helix_spec import placement
from helix_spec.layouts import Layout

pytest.importorskip("hypothesis_crosshair_provider")

symbolically = settings(
    backend="crosshair",
    deadline=None,
    max_examples=5,
    database=None,
    # As in Hypothesis' own profile for this backend: solving is slow, and it does filter.
    suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
)
sizes = st.integers(1, 2**20)
counts = st.integers(0, 2**31 - 1)


@pytest.mark.holds("LEN-1")
@symbolically
@given(length=counts, rank=counts, c=sizes, i=sizes)
def test_one_token_grows_one_rank(length: int, rank: int, c: int, i: int) -> None:
    """The owner's share grows by one, all others stay (LEN-1)."""
    assume(rank < c)
    before = placement.chunk_local_len(length, rank, c, i)
    grown = placement.chunk_owner(length, c, i) == rank
    assert placement.chunk_local_len(length + 1, rank, c, i) == before + grown


@pytest.mark.holds("OWN-1", "GROW-1")
@symbolically
@given(index=counts, rank=counts, c=sizes, i=sizes)
def test_index_and_position_undo_each_other(index: int, rank: int, c: int, i: int) -> None:
    """The position of a local index is on its rank and has that index (GROW-1)."""
    assume(rank < c)
    position = placement.chunk_position(index, rank, c, i)
    assert placement.chunk_owner(position, c, i) == rank
    assert placement.chunk_local_len(position, rank, c, i) == index


@pytest.mark.holds("OWN-1")
@symbolically
@given(position=counts, length=counts, c=sizes, t=sizes)
def test_contiguous_owner_holds_the_position(position: int, length: int, c: int, t: int) -> None:
    """A prompt position lies within its rank's part (OWN-1)."""
    assume(position < length)
    rank = placement.contiguous_owner(position, length, c, t)
    assert placement.contiguous_start(length, rank, c, t) <= position
    assert position < placement.contiguous_start(length, rank + 1, c, t)


@pytest.mark.holds("PAGE-1")
@symbolically
@given(length=counts, t=sizes)
def test_lazy_pages_are_enough_and_no_more(length: int, t: int) -> None:
    """Rounded up, so that less than a page is to spare (PAGE-1)."""
    assert 0 <= placement.ceil_div(length, t) * t - length < t


@pytest.mark.holds("OWN-3")
@pytest.mark.parametrize("owner", ["last_rank", "step", "position"])
def test_reference_and_closed_form_name_the_same_owner(owner: str) -> None:
    """The reference's rule and the closed form of each owner rule (OWN-3)."""

    @symbolically
    @given(prompt=sizes, step=counts, shift=counts, c=sizes, t=sizes)
    def same(prompt: int, step: int, shift: int, c: int, t: int) -> None:
        assume(shift < c)
        layout = Layout("round_robin", owner, "lazy", "rotated", c, t)
        named = dealing.decode_owner(layout, prompt, step, shift)
        assert named == placement.decode_owner(layout, prompt, step, shift)

    same()


def test_the_backend_finds_a_needle() -> None:
    """One input in a billion is found: the symbolic backend is really at work."""

    @settings(symbolically, max_examples=30)
    @given(position=counts, c=sizes, i=sizes)
    def never(position: int, c: int, i: int) -> None:
        assert not (i == 4096 and c == 8 and placement.chunk_owner(position, c, i) == 7)

    with pytest.raises(AssertionError):
        never()
