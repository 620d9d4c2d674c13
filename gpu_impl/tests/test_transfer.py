"""Resharding a prompt: the plan, and caches of N ranks that fill those of M."""

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from helix_gpu.bookkeeping.dealing import deal_prompt
from helix_gpu.cache import HelixCache
from helix_gpu.transfer import Move, transfer
from helix_spec.config import Config, ModelShape
from helix_spec.layouts import parse_layout

TEXTS = [
    "pr9757/1:C=1,T=4",
    "pr9757/1:C=3,T=2",
    "pr13180/1:C=4,T=4",
    "vllm_dcp/1:C=2,T=6,I=3",
    "custom/1:prompt=interleave(1),owner=step,pages=lazy,start=rotated,C=5,T=2",
]
Fixture = Callable[..., Any]


@pytest.mark.holds("OWN-1")
@given(st.sampled_from(TEXTS), st.sampled_from(TEXTS), st.integers(1, 60), st.data())
def test_every_token_moves_once(one: str, other: str, prompt_len: int, data: st.DataObject) -> None:
    """Each token goes from where the source's shards have it to where the target's have it."""
    dealt = []
    for text in (one, other):
        layout = parse_layout(text)
        shift = data.draw(st.integers(0, layout.cp_size - 1))
        dealt.append(deal_prompt(layout, prompt_len, shift))
    source, target = ([shard.positions().tolist() for shard in side] for side in dealt)
    moved = []
    for move in transfer(*dealt):
        tokens = list(range(move.position, move.position + move.tokens))
        for positions, index in (
            (source[move.source], move.source_index),
            (target[move.target], move.target_index),
        ):
            assert positions[index : index + move.tokens] == tokens
        moved += tokens
    assert moved == list(range(prompt_len))


def test_from_a_single_rank() -> None:
    """Ten tokens on one rank in pages of 4, to round-robin blocks of 3 on two."""
    single = deal_prompt(parse_layout("pr9757/1:C=1,T=4"), 10, 0)
    pair = deal_prompt(parse_layout("pr13180/1:C=2,T=3"), 10, 0)
    assert transfer(single, pair) == [
        Move(0, 0, 0, 3, 0, 0),
        Move(0, 1, 3, 1, 3, 0),
        Move(0, 1, 4, 2, 4, 1),
        Move(0, 0, 6, 2, 6, 3),
        Move(0, 0, 8, 1, 8, 5),
        Move(0, 1, 9, 1, 9, 3),
    ]


def test_a_move_cannot_be_changed() -> None:
    """A plan is sent to both sides: no field can be set."""
    dealt = deal_prompt(parse_layout("pr9757/1:C=2,T=2"), 3, 0)
    for field in dataclasses.fields(Move):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(transfer(dealt, dealt)[0], field.name, 1)


@pytest.mark.parametrize(("here", "there"), [(5, 6), (6, 5)])
def test_two_prompts_do_not_match(here: int, there: int) -> None:
    """Hands of two lengths are an error, whichever is the longer."""
    layout = parse_layout("pr9757/1:C=2,T=2")
    with pytest.raises(ValueError, match=f"deals {here} tokens and the target {there}"):
        transfer(deal_prompt(layout, here, 0), deal_prompt(layout, there, 0))


def caches(text: str) -> list[HelixCache]:
    """All ranks of a small cache; nothing is exchanged while prompts are admitted."""
    layout = parse_layout(text)
    model = ModelShape(layers=2, q_heads=120, kv_heads=2, head_dim=4)
    config = Config(layout=text, pages=[30] * layout.cp_size, max_len=90, model=model)
    return [HelixCache(config, rank=r, exchange=lambda x: x) for r in range(layout.cp_size)]


@pytest.mark.holds("OWN-1")
@pytest.mark.parametrize("source", TEXTS)
@pytest.mark.parametrize("target", TEXTS)
def test_caches_reshard(source: str, target: str, values: Fixture) -> None:
    """M ranks that read their share off N others hold what they would have been given at once."""
    prompt_len = 29
    k, v = (values((2, prompt_len, 2, 4), code) for code in (1, 2))
    senders, receivers, plain = caches(source), caches(target), caches(target)
    for cache in (*senders, *plain):
        cache.admit(7, prompt_len, lambda at: (k[:, at], v[:, at]))
    dealt = [deal_prompt(side[0].book.layout, prompt_len, 0) for side in (senders, receivers)]
    moves = transfer(*dealt)
    for rank, receiver in enumerate(receivers):

        def prompt_kv(positions: Tensor, rank: int = rank) -> tuple[Tensor, Tensor]:
            pieces = [
                senders[move.source].read(7, move.source_index, move.tokens)
                for move in moves
                if move.target == rank
            ]
            return torch.cat([k for k, _ in pieces], 1), torch.cat([v for _, v in pieces], 1)

        receiver.admit(7, prompt_len, prompt_kv, rotated=True)
        held = receiver.local_len(7)
        for got, wanted in zip(
            receiver.read(7, 0, held), plain[rank].read(7, 0, held), strict=True
        ):
            assert torch.equal(got, wanted)


def test_reading_what_is_elsewhere(values: Fixture) -> None:
    """Tokens that are not on this rank are an error, not stale rows."""
    cache = caches("pr9757/1:C=3,T=2")[0]
    cache.admit(7, 4, lambda at: (values((2, len(at), 2, 4), 1), values((2, len(at), 2, 4), 2)))
    assert cache.read(7, 0, 2)[0].shape == (2, 2, 2, 4)
    for first, tokens in ((1, 2), (-1, 1), (0, -1)):
        with pytest.raises(IndexError, match="this rank holds 2"):
            cache.read(7, first, tokens)
