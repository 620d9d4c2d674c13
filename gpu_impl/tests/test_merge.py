"""The merge of partial attentions."""

from collections.abc import Callable
from itertools import permutations
from typing import Any

import pytest
import torch
from torch import Tensor

from helix_gpu.attention.merge import merge

Fixture = Callable[..., Any]
INF = torch.inf


@pytest.fixture
def partials(exact: Fixture, values: Fixture) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four shards of unequal length: their outputs, log-sum-exps, the whole and its bound."""
    q = values((4, 16), 0)
    shards = [(values((n, 2, 16), 1, n), values((n, 2, 16), 2, n)) for n in (1, 40, 7, 300)]
    parts = [exact(q, [shard], torch.float32, torch.float32) for shard in shards]
    whole, _, bound = exact(q, shards, torch.float32, torch.float32)
    return (
        torch.stack([part[0] for part in parts]).float(),
        torch.stack([part[1] for part in parts]).float(),
        whole,
        bound,
    )


@pytest.mark.holds("ATT-1", "ATT-2")
def test_merged_shards_are_the_whole(partials: tuple[Tensor, ...]) -> None:
    """Partials over disjoint keys merge into attention over all keys, in every rank order."""
    outputs, lses, whole, bound = partials
    for order in permutations(range(4)):
        merged, _ = merge(outputs[list(order)], lses[list(order)])
        assert ((whole - merged).norm(dim=-1) <= bound).all()


@pytest.mark.holds("ATT-1", "ATT-2")
def test_grouping_changes_only_rounding(partials: tuple[Tensor, ...]) -> None:
    """Merging merged pairs gives the whole too, with the whole's log-sum-exp."""
    outputs, lses, whole, bound = partials
    pairs = [merge(outputs[:2], lses[:2]), merge(outputs[2:], lses[2:])]
    merged, lse = merge(torch.stack([o for o, _ in pairs]), torch.stack([s for _, s in pairs]))
    assert ((whole - merged).norm(dim=-1) <= bound).all()
    torch.testing.assert_close(lses.double().logsumexp(0).float(), lse)


@pytest.mark.holds("ATT-3")
def test_empty_shards_are_the_identity(partials: tuple[Tensor, ...]) -> None:
    """Shards without keys change no bit, even where their output is NaN or infinite."""
    outputs, lses, _, _ = partials
    expected, expected_lse = merge(outputs, lses)
    for garbage in (0.0, torch.nan, INF):
        empty, none = torch.full((1, 4, 16), garbage), torch.full((1, 4), -INF)
        merged, lse = merge(
            torch.cat((empty, outputs[:2], empty, outputs[2:])),
            torch.cat((none, lses[:2], none, lses[2:])),
        )
        assert torch.equal(expected, merged)
        assert torch.equal(expected_lse, lse)


@pytest.mark.holds("ATT-3")
def test_all_empty_is_zero() -> None:
    """Without a key on any rank the output is 0 and the log-sum-exp -inf."""
    merged, lse = merge(torch.full((3, 2, 4), torch.nan), torch.full((3, 2), -INF))
    assert torch.equal(torch.zeros(2, 4), merged)
    assert torch.equal(torch.full((2,), -INF), lse)


@pytest.mark.holds("ATT-1")
def test_one_shard_is_itself(partials: tuple[Tensor, ...]) -> None:
    """The merge of a single partial is that partial, bit for bit."""
    outputs, lses, _, _ = partials
    merged, lse = merge(outputs[:1], lses[:1])
    assert torch.equal(outputs[0], merged)
    assert torch.equal(lses[0], lse)


@pytest.mark.holds("ATT-1")
def test_one_shard_may_dominate() -> None:
    """A shard ahead by e**200 or at a huge log-sum-exp is the result; nothing overflows."""
    outputs = torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]]])
    for low, high in ((-100.0, 100.0), (3e4, 3.1e4), (-3.1e4, -3e4)):
        merged, lse = merge(outputs, torch.tensor([[low], [high]]))
        assert torch.equal(outputs[1], merged)
        assert lse.item() == high


@pytest.mark.parametrize("wrong", [torch.nan, INF])
def test_a_wrong_log_sum_exp_stays_visible(wrong: float) -> None:
    """A NaN or +inf log-sum-exp, which no partial may have, is not read as an empty shard."""
    merged, _ = merge(torch.ones(2, 1, 4), torch.tensor([[0.0], [wrong]]))
    assert merged.isnan().all()


@pytest.mark.holds("ATT-1")
def test_partials_in_half_precision_are_merged_in_float32() -> None:
    """Bfloat16 partials of equal weight give their float32 mean."""
    outputs = torch.tensor([[[1.0]], [[1.0078125]]], dtype=torch.bfloat16)
    merged, _ = merge(outputs, torch.zeros(2, 1))
    assert merged.tolist() == [[1.00390625]]
