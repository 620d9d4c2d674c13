"""RoPE against float64."""

import numpy as np
import pytest
import torch

from gpu_testing.exact import UNIT
from helix_gpu.attention.rope import rope_table, rotate


@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("head_dim", [2, 16, 128])
def test_rotation_is_within_the_contract(dtype: torch.dtype, head_dim: int) -> None:
    """Entries are within u|x| + 3*2**-24 (|a|+|b|) of float64 with float32 cosines and sines."""
    positions = np.array([0, 1, 2, 1000, 131_071, 10_000_000])
    half = head_dim // 2
    x = np.random.default_rng(head_dim).integers(-64, 65, (6, 3, head_dim)) / 16
    angle = positions[:, None, None] * 10000.0 ** (-2.0 * np.arange(half) / head_dim)
    cos, sin = (f(angle).astype(np.float32).astype(np.float64) for f in (np.cos, np.sin))
    a, b = x[..., :half], x[..., half:]
    expected = np.concatenate((a * cos - b * sin, b * cos + a * sin), -1)
    slack = 3 * 2.0**-24 * np.tile(np.abs(a) + np.abs(b), 2)

    table = rope_table(torch.from_numpy(positions), head_dim, 10000.0)
    got = rotate(torch.from_numpy(x).to(dtype), *table)
    assert got.dtype == dtype
    assert (np.abs(expected - got.double().numpy()) <= UNIT[dtype] * np.abs(expected) + slack).all()


def test_position_zero_changes_nothing() -> None:
    """At position 0 the rotation is the identity, bit for bit."""
    x = torch.randn(1, 2, 8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(x, rotate(x, *rope_table(torch.tensor([0]), 8, 500000.0)))


def test_leading_axes_share_the_table() -> None:
    """An axis of layers before the tokens is rotated alike."""
    x = torch.randn(2, 5, 3, 8, generator=torch.Generator().manual_seed(0))
    table = rope_table(torch.arange(5), 8, 10000.0)
    assert torch.equal(torch.stack([rotate(layer, *table) for layer in x]), rotate(x, *table))
