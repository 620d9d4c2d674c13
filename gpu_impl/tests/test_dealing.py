"""Dealing a prompt: DESIGN's worked examples, and that nothing is lost or dealt twice."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_gpu.bookkeeping.dealing import deal_prompt, first_turn
from helix_spec.layouts import named_layout, parse_layout

SPLITS = ["contiguous", "round_robin", "interleave(1)", "interleave(2)", "interleave(4)"]


def positions(text: str, prompt_len: int, shift: int = 0) -> list[list[int]]:
    """Positions on each rank."""
    return [
        shard.positions().tolist() for shard in deal_prompt(parse_layout(text), prompt_len, shift)
    ]


def test_a_hand_cannot_be_changed() -> None:
    """Hands go from plan to plan: no field can be set."""
    shard = deal_prompt(parse_layout("pr9757/1:C=2,T=2"), 3, 0)[0]
    for field in dataclasses.fields(shard):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(shard, field.name, None)


@pytest.mark.holds("OWN-1")
def test_contiguous_example() -> None:
    """L=13, T=2, C=4: contiguous puts 0-3, 4-7, 8-11 and 12 on the ranks."""
    expected = [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    assert positions("pr9757/1:C=4,T=2", 13) == expected


@pytest.mark.holds("OWN-1")
def test_round_robin_example() -> None:
    """L=13, T=2, C=4: round_robin deals blocks in turn."""
    expected = [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12], [6, 7]]
    assert positions("pr13180/1:C=4,T=2", 13) == expected


@pytest.mark.holds("OWN-1")
def test_pr9757_example() -> None:
    """L=400, T=100, C=4: rank r holds [100r, 100r + 100)."""
    expected = [list(range(100 * r, 100 * r + 100)) for r in range(4)]
    assert positions("pr9757/1:C=4,T=100", 400) == expected


@pytest.mark.holds("OWN-1")
def test_short_prompt_leaves_ranks_empty() -> None:
    """A prompt shorter than C blocks leaves ranks without tokens, which is legal."""
    assert positions("pr9757/1:C=4,T=2", 3) == [[0, 1], [2], [], []]


@pytest.mark.holds("OWN-1", "LEN-1")
@given(st.sampled_from(SPLITS), st.integers(1, 5), st.integers(1, 200), st.integers(0, 4))
def test_every_token_is_dealt_once(split: str, c: int, prompt_len: int, shift: int) -> None:
    """Hands are rising, of the length they claim, and together hold each position once."""
    layout = parse_layout(
        f"custom/1:prompt={split},owner=last_rank,pages=lazy,start=rotated,C={c},T=4"
    )
    shards = deal_prompt(layout, prompt_len, shift % c)
    dealt = [shard.positions() for shard in shards]
    assert sorted(np.concatenate(dealt).tolist()) == list(range(prompt_len))
    assert [shard.tokens for shard in shards] == [len(shard) for shard in dealt]
    assert all((np.diff(shard) > 0).all() for shard in dealt)


@pytest.mark.holds("OWN-1")
@pytest.mark.parametrize("name", ["pr9757", "pr13180", "vllm_dcp"])
def test_shift_turns_the_table(name: str) -> None:
    """Under a shift of s, rank r + s gets what rank r would get."""
    layout = named_layout(name, cp_size=4, tokens_per_block=2)
    plain = [shard.chunks for shard in deal_prompt(layout, 13, 0)]
    assert [shard.chunks for shard in deal_prompt(layout, 13, 1)] == plain[-1:] + plain[:-1]


def test_absurd_prompt_costs_nothing() -> None:
    """A prompt of 2**53 tokens is dealt without memory for each token."""
    shards = deal_prompt(parse_layout("vllm_dcp/1:C=4,T=1,I=1"), 2**53, 0)
    assert sum(shard.tokens for shard in shards) == 2**53


@pytest.mark.holds("OWN-3")
@pytest.mark.parametrize("shift", range(4))
def test_a_rotated_last_rank_moves_forward(shift: int) -> None:
    """Under `last_rank` with a rotated start the owner is C-1 moved on by the shift, for ever."""
    layout = parse_layout(
        "custom/1:prompt=contiguous,owner=last_rank,pages=lazy,start=rotated,C=4,T=2"
    )
    owner, left = first_turn(layout, 5, shift)
    assert owner == (3 + shift) % 4
    assert left > 2**60
