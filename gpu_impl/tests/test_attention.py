"""Local attention over pages against float64, by torch's operation and by the one in C++."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from gpu_testing.pages import scattered
from helix_gpu.attention import native, paged

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
Fixture = Callable[..., Any]
Attend = Callable[..., tuple[Tensor, Tensor]]


@pytest.fixture(params=["torch", "C++"])
def attend_pages(request: pytest.FixtureRequest) -> Attend:
    """Each of the two."""
    if request.param == "torch":
        return paged.attend_pages
    if not native.available():
        pytest.skip("There is no C++ compiler or no ninja on the PATH.")
    return native.attend_pages


@pytest.mark.holds("ATT-1", "ATT-3")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "t", "lengths"),
    [
        (4, 2, 16, 4, [0, 1, 3, 4, 5, 8, 9]),
        (8, 1, 64, 16, [47, 0, 33]),
        (2, 2, 128, 64, [1030]),
        (6, 2, 2, 1, [7, 1]),
        (4, 4, 80, 2, [513, 511, 512]),
        (10, 2, 32, 8, [15, 16, 17, 2049]),
    ],
)
def test_against_float64(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, t: int, lengths: list[int],
    attend_pages: Attend, exact: Fixture, values: Fixture,
) -> None:  # fmt: skip
    """Output and log-sum-exp equal float64 for MHA, GQA, MQA, empty rows and page edges.

    Unused slots and the pages nobody holds are NaN.
    """
    q = values((len(lengths), heads, dim), 0, dtype=dtype)
    shards = [
        (
            values((n, kv_heads, dim), 1, n, dtype=dtype),
            values((n, kv_heads, dim), 2, n, dtype=dtype),
        )
        for n in lengths
    ]
    output, lse = attend_pages(q, *scattered(shards, t))
    assert (output.dtype, lse.dtype) == (torch.float32, torch.float32)
    for row, shard in enumerate(shards):
        if not lengths[row]:
            assert torch.equal(torch.zeros(heads, dim), output[row])
            assert torch.equal(torch.full((heads,), -torch.inf), lse[row])
            continue
        o, exact_lse, bound = exact(q[row], [shard], torch.float32, torch.float32)
        assert ((o - output[row]).norm(dim=-1) <= bound).all()
        torch.testing.assert_close(exact_lse, lse[row].double(), rtol=2e-6, atol=2e-6)


@pytest.mark.holds("ATT-1")
def test_scores_far_apart_do_not_overflow(
    attend_pages: Attend, exact: Fixture, values: Fixture
) -> None:
    """Scores of some +-1000 stay finite, whichever gather holds the largest."""
    q = values((1, 2, 16), 0) * 16
    k, v = values((1100, 1, 16), 1) * 16, values((1100, 1, 16), 2)
    for order in (slice(None), k.flip(0), k):
        keys = order if isinstance(order, Tensor) else k
        output, _ = attend_pages(q, *scattered([(keys, v)], 8))
        o, _, bound = exact(q[0], [(keys, v)], torch.float32, torch.float32)
        assert ((o - output[0]).norm(dim=-1) <= bound).all()


@pytest.mark.holds("ATT-3")
def test_nothing_to_see_at_all(attend_pages: Attend, values: Fixture) -> None:
    """A batch without keys on this rank has a table of width 0 and gives (0, -inf)."""
    q = values((3, 4, 16), 0)
    pages = torch.full((2, 2, 4, 2, 16), torch.nan)
    output, lse = attend_pages(
        q, pages, torch.zeros(3, 0, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
    )
    assert torch.equal(torch.zeros(3, 4, 16), output)
    assert torch.equal(torch.full((3, 4), -torch.inf), lse)


def test_rows_do_not_see_each_other(attend_pages: Attend, values: Fixture) -> None:
    """A NaN query, and stale entries past a row's pages, leave the other rows as they were."""
    shard = (values((5, 2, 16), 1), values((5, 2, 16), 2))
    pages, tables, lengths = scattered([shard, shard], 4)
    q = values((2, 4, 16), 0)
    plain, _ = attend_pages(q, pages, tables, lengths)
    q[1] = torch.nan
    lengths[1] = 0
    tables[1] = len(pages) - 1
    disturbed, lse = attend_pages(q, pages, tables, lengths)
    assert torch.equal(plain[0], disturbed[0])
    assert torch.equal(torch.zeros(4, 16), disturbed[1])
    assert torch.equal(torch.full((4,), -torch.inf), lse[1])


@pytest.mark.holds("ATT-2")
def test_gathering_in_pieces_changes_only_rounding(
    exact: Fixture, values: Fixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One page at a time is as exact as all at once."""
    monkeypatch.setattr(paged, "TOKENS_AT_ONCE", 1)
    q, shard = values((1, 4, 16), 0), (values((29, 2, 16), 1), values((29, 2, 16), 2))
    output, _ = paged.attend_pages(q, *scattered([shard], 4))
    o, _, bound = exact(q[0], [shard], torch.float32, torch.float32)
    assert ((o - output[0]).norm(dim=-1) <= bound).all()


@pytest.mark.holds("ATT-2")
def test_threads_change_no_bit(values: Fixture) -> None:
    """Pieces of 2,048 tokens are merged in order, however many threads work on them in C++."""
    if not native.available():
        pytest.skip("There is no C++ compiler or no ninja on the PATH.")
    shards = [(values((n, 2, 32), 1, n), values((n, 2, 32), 2, n)) for n in (6200, 5, 4097)]
    q, threads, seen = values((3, 4, 32), 0), torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            seen.append(native.attend_pages(q, *scattered(shards, 16)))
    finally:
        torch.set_num_threads(threads)
    for output, lse in seen[1:]:
        assert torch.equal(seen[0][0], output)
        assert torch.equal(seen[0][1], lse)


WINDOWS = [
    # q_heads, kv_heads, key_dim, value_dim, page size, windows [start, stop)
    (4, 2, 16, 16, 4, [(0, 9), (3, 9), (4, 9), (8, 9), (5, 7), (9, 9), (7, 3), (0, 0), (4, 8)]),
    (8, 1, 64, 64, 16, [(16, 47), (0, 33), (31, 32), (40, 33)]),
    (2, 2, 128, 128, 64, [(1000, 1030), (1, 1030), (64, 640)]),
    (10, 2, 32, 32, 8, [(2040, 4099), (4098, 4099), (511, 2049)]),
    # A latent, whose first elements are the values.
    (16, 1, 48, 32, 8, [(0, 20), (8, 40), (13, 70), (3, 3)]),
    (4, 1, 576, 512, 64, [(60, 300), (0, 129)]),
]


@pytest.mark.holds("ATT-1", "ATT-3")
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float8_e4m3fn])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize(("heads", "kv_heads", "dim", "value_dim", "t", "windows"), WINDOWS)
def test_windows_against_float64(
    dtype: torch.dtype, softcap: float | None, heads: int, kv_heads: int, dim: int, value_dim: int,
    t: int, windows: list[tuple[int, int]], attend_pages: Attend, exact: Fixture, values: Fixture,
) -> None:  # fmt: skip
    """Each row sees its own slots from a start on, or none; scores are capped where that is said.

    Pages before a window have numbers that do not exist, and slots before it are NaN.
    """
    q = values((len(windows), heads, dim), 0)
    shards = []
    for row, (start, stop) in enumerate(windows):
        k, v = (values((stop, kv_heads, dim), part, row).to(dtype) for part in (1, 2))
        k[:start] = v[:start] = torch.nan
        shards.append((k, k if value_dim < dim else v))
    pages, tables, lengths = scattered(shards, t)
    pages = pages[:, :1] if value_dim < dim else pages
    starts = torch.tensor([start for start, _ in windows])
    for row, (start, stop) in enumerate(windows):
        tables[row, : (start if start < stop else stop) // t] = 2**40
    output, lse = attend_pages(
        q, pages, tables, lengths, starts=starts, softcap=softcap, value_dim=value_dim, scale=0.3
    )
    for row, (start, stop) in enumerate(windows):
        if start >= stop:
            assert torch.equal(torch.zeros(heads, value_dim), output[row])
            assert torch.equal(torch.full((heads,), -torch.inf), lse[row])
            continue
        k, v = (x[start:].float() for x in shards[row])
        o, exact_lse, bound = exact(
            q[row], [(k, v[..., :value_dim])], torch.float32, torch.float32, scale=0.3,
            softcap=softcap,
        )  # fmt: skip
        assert ((o - output[row]).norm(dim=-1) <= bound).all()
        torch.testing.assert_close(exact_lse, lse[row].double(), rtol=2e-6, atol=2e-6)
