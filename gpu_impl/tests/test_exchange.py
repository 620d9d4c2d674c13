"""Packing and unpacking of what travels."""

import pytest
import torch

from helix_gpu.exchange import pack, unpack


@pytest.mark.parametrize("wire", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("n", "heads", "dim", "ranks"), [(1, 2, 2, 2), (5, 12, 16, 3), (3, 4, 8, 4), (3, 4, 8, 1)]
)
def test_round_trip(wire: torch.dtype, n: int, heads: int, dim: int, ranks: int) -> None:
    """Rank d gets heads slice d of every rank's partials, in the order of the ranks."""
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(ranks, n, heads, dim, generator=generator)
    lses = torch.randn(ranks, n, heads, generator=generator)
    lses[0, 0, 0] = -torch.inf
    sent = torch.stack([pack(o, s, ranks, wire) for o, s in zip(outputs, lses, strict=True)])
    own = heads // ranks
    for rank in range(ranks):
        got_outputs, got_lses = unpack(sent[:, rank], n, own, dim, wire)
        mine = slice(rank * own, (rank + 1) * own)
        assert torch.equal(outputs[:, :, mine].to(wire), got_outputs)
        assert torch.equal(lses[:, :, mine], got_lses)


def test_bytes_on_the_wire() -> None:
    """A rank sends each other head_dim elements and one float32 per row and head, no more."""
    sent = pack(torch.zeros(8, 64, 128), torch.zeros(8, 64), 4, torch.bfloat16)
    assert (4, 8 * 16 * (128 * 2 + 4)) == sent.shape
