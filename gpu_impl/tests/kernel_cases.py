"""The Triton kernels in the interpreter, against float64; `test_kernels` runs this file.

One by one: `TRITON_INTERPRET=1 pytest gpu_impl/tests/kernel_cases.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gpu_testing.exact import UNIT, exact_attention
from gpu_testing.pages import scattered
from helix_gpu.attention.kernels import step as kernels
from helix_gpu.attention.kernels.append import append, append_latent
from helix_gpu.attention.kernels.decode import decode
from helix_gpu.attention.kernels.merge import merge_received
from helix_gpu.attention.kernels.mla import decode_latent
from helix_gpu.attention.kernels.reduce_pack import reduce_pack
from helix_gpu.attention.kernels.rope import rotated
from helix_gpu.attention.kernels.settings import DecodeSettings, splits_for
from helix_gpu.attention.merge import merge
from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.partials import pack, unpack
from helix_gpu.attention.rope import rope_table, rotate
from helix_gpu.bookkeeping.rank_book import RankBook
from helix_spec.config import Config, ModelShape

# Numpy, which computes what the kernels say, warns at log2(0) and NaN * 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

INF = torch.inf
DTYPES = list(UNIT)
Values = Callable[..., Tensor]


def check_rows(
    output: Tensor, lse: Tensor, q: Tensor, shards: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Every row equals float64 within its bound; empty ones are exactly (0, -inf)."""
    assert (output.dtype, lse.dtype) == (torch.float32, torch.float32)
    for row, (k, v) in enumerate(shards):
        if not len(k):
            assert not output[row].any()
            assert bool((lse[row] == -INF).all())
            continue
        o, exact_lse, bound = exact_attention(q[row], [(k, v)], product=q.dtype)
        assert ((o - output[row]).norm(dim=-1) <= bound).all()
        np.testing.assert_allclose(lse[row].numpy(), exact_lse, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("kv_heads", "dim", "t"), [(1, 64, 16), (3, 80, 64), (8, 256, 1)])
def test_append_writes_the_owned_slots_alone(
    dtype: torch.dtype, heads_first: bool, kv_heads: int, dim: int, t: int, values: Values
) -> None:
    """Rows land where indexing would put them; -1 writes nothing and no other slot changes."""
    slots = torch.tensor([3 * t, -1, t - 1, 2 * t + t // 2, -1])
    # Columns of a wider projection: rows are not contiguous.
    k, v = values((5, 2, kv_heads, dim), 1, dtype=dtype).unbind(1)
    pool = scattered([(k[:0], v[:0])] * 2, t, heads_first)[0].repeat(2, 1, 1, 1, 1)
    expected = pool.clone()
    own = slots >= 0
    expected[slots[own] // t, 0, slots[own] % t] = k[own]
    expected[slots[own] // t, 1, slots[own] % t] = v[own]
    append(k, v, pool, slots.to(torch.int32 if heads_first else torch.int64))
    torch.testing.assert_close(pool, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "dim", "turned"), [(1, 2, 2), (4, 64, 64), (3, 80, 80), (40, 128, 64), (1, 576, 64)]
)
def test_a_rotation_is_ropes_to_the_bit(
    dtype: torch.dtype, heads: int, dim: int, turned: int, values: Values
) -> None:
    """All rows, heads and elements, those that stay included, at positions far apart."""
    table = rope_table(torch.tensor([0, 7, 1_000_003]), turned, 10000.0)
    rows = values((3, heads, 2 * dim), 0, dtype=dtype)[..., :dim]
    assert torch.equal(rotate(rows, *table), rotated(rows, *table))


def test_append_latent_writes_one_part(values: Values) -> None:
    """A latent cache has no heads and no second part."""
    rows, pool = values((3, 576), 1), torch.full((2, 4, 576), torch.nan)
    append_latent(rows, pool, torch.tensor([5, -1, 0]))
    assert torch.equal(rows[[0, 2]], pool.flatten(0, 1)[[5, 0]])
    assert int(pool.isnan().all(-1).sum()) == 6


SHAPES = [
    # q_heads, kv_heads, dim, page size, splits, block (None: as shipped), lengths
    (4, 4, 64, 16, 1, None, [0, 1, 15, 16, 17]),
    (4, 1, 64, 64, 3, None, [63, 64, 65, 0, 193]),
    (8, 1, 128, 128, 2, None, [127, 128, 129, 1]),
    (8, 2, 80, 16, 4, None, [47, 0, 70]),
    (3, 1, 96, 64, 2, 16, [63, 65, 2]),
    (24, 1, 16, 4, 2, 16, [3, 4, 5, 33]),
    (2, 2, 256, 16, 2, 32, [31, 34]),
    # Pages that are neither blocks' multiples nor their parts.
    (4, 2, 32, 24, 2, 16, [23, 24, 25, 60]),
    (2, 1, 2, 1, 5, 16, [7, 0, 40]),
]


@pytest.mark.parametrize(
    ("dtype", "heads", "kv_heads", "dim", "t", "splits", "block", "lengths"),
    # The interpreter takes bfloat16 as float32, so two shapes of it are enough.
    [(dtype, *shape) for dtype in DTYPES[:2] for shape in SHAPES]
    + [(torch.bfloat16, *shape) for shape in SHAPES[1:4:2]],
)
def test_decode_against_float64(
    dtype: torch.dtype, heads: int, kv_heads: int, dim: int, t: int, splits: int,
    block: int | None, lengths: list[int], values: Values, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """MHA, GQA and MQA, empty rows, one token, page edges, splits with and without keys.

    Unused slots, pages nobody holds and buffers not yet written are NaN. The CPU path says the
    same.
    """
    q = values((len(lengths), heads, dim), 0, dtype=dtype)
    shards = [
        (
            values((n, kv_heads, dim), 1, n, dtype=dtype),
            values((n, kv_heads, dim), 2, n, dtype=dtype),
        )
        for n in lengths
    ]
    if block:
        monkeypatch.setattr(
            "helix_gpu.attention.kernels.decode.decode_settings", small_blocks(block)
        )
    pool, tables, rows = scattered(shards, t, heads_first=dtype == torch.float16)
    monkeypatch.setattr(torch, "empty", poisoned)
    output, lse = kernels.attend_pages(q, pool, tables, rows, splits)
    check_rows(output, lse, q, shards)
    monkeypatch.undo()
    if dtype == torch.float32:
        plain, plain_lse = attend_pages(q, pool, tables, rows)
        torch.testing.assert_close(output, plain, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)


WINDOWS = [(0, 40), (15, 40), (16, 40), (17, 33), (39, 40), (40, 40), (20, 18), (0, 0), (100, 101)]


@pytest.mark.parametrize(
    ("splits", "t", "dtype"),
    [(1, 24, DTYPES[0]), (3, 4, DTYPES[1]), (3, 64, torch.float8_e4m3fn)],
)
def test_windows_against_float64(
    dtype: torch.dtype, splits: int, t: int, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Windows on and off borders of blocks and pages, of one key and of none, K and V or latent.

    What lies before a window is NaN, and its pages have numbers that do not exist.
    """
    for module, name in (("decode", "decode_settings"), ("mla", "latent_settings")):
        monkeypatch.setattr(f"helix_gpu.attention.kernels.{module}.{name}", small_blocks(16))
    n, heads, dim, latent = len(WINDOWS), 4, 32, 16
    product = torch.float16 if dtype.itemsize == 1 else dtype
    q = values((n, heads, dim), 0, dtype=product)
    shards = [
        tuple(values((stop, 1, dim), part, row).to(dtype) for part in (1, 2))
        for row, (_, stop) in enumerate(WINDOWS)
    ]
    for (start, _), (k, v) in zip(WINDOWS, shards, strict=True):
        k[:start] = v[:start] = torch.nan
    starts = torch.tensor([start for start, _ in WINDOWS], dtype=torch.int32)
    pool, tables, lengths = scattered(shards, t)
    for row, (start, stop) in enumerate(WINDOWS):
        tables[row, : min(start, stop) // t] = 2**30
    output, lse = kernels.attend_pages(q, pool, tables, lengths, splits, starts=starts)
    seen = [
        tuple(x[start:].to(product) for x in shard)
        for (start, _), shard in zip(WINDOWS, shards, strict=True)
    ]
    check_rows(output, lse, q, seen)

    out = torch.full((splits, n, heads, latent), torch.nan)
    lse2 = torch.full((splits, n, heads), torch.nan)
    decode_latent(q, pool[:, 0, :, 0], tables, lengths, out, lse2, starts=starts, scale=dim**-0.5)
    send = torch.empty(1, n * heads * (latent * 4 + 4), dtype=torch.uint8)
    reduce_pack(out, lse2, send, torch.float32)
    output, lse = (x[0] for x in unpack(send, n, heads, latent, torch.float32))
    check_rows(output, lse, q, [(k, k[..., :latent]) for k, _ in seen])


def small_blocks(block: int) -> Callable[..., DecodeSettings]:
    """Stands in for `decode_settings`, so that few keys fill several blocks."""
    return lambda head_dim, dtype, cached: DecodeSettings(block=block, warps=4, stages=2)


def poisoned(shape: Sequence[int], *, dtype: torch.dtype, device: Any) -> Tensor:
    """`torch.empty`, filled with what shows."""
    return torch.full(shape, torch.nan if dtype.is_floating_point else 255, dtype=dtype)


@pytest.mark.parametrize("order", [1, -1])
def test_peaky_scores(order: int, values: Values) -> None:
    """Scores of some +-1000 stay finite, whichever block and split holds the largest."""
    k = (values((70, 1, 64), 1) * 16).sort(0, descending=order < 0)[0]
    v = values((70, 1, 64), 2)
    q = values((1, 4, 64), 0) * 16
    q[0, 0] = abs(q[0, 0])
    pool, tables, lengths = scattered([(k, v)], 16)
    check_rows(*kernels.attend_pages(q, pool, tables, lengths, 2), q, [(k, v)])


def test_probe_sees_every_key(values: Values) -> None:
    """A query of 0 gives the plain mean: no key is missed, doubled or foreign."""
    shard = (values((67, 1, 64), 1), values((67, 1, 64), 2))
    q = torch.zeros(1, 2, 64)
    output, lse = kernels.attend_pages(q, *scattered([shard], 16), 4)
    mean = shard[1].double().mean(0).float()
    torch.testing.assert_close(output, mean.expand(1, 2, 64), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(lse, np.log(67), rtol=1e-6)


def test_empty_splits_say_so_and_write_nothing_else(values: Values) -> None:
    """Keys are dealt in whole blocks, the same number to each split; the last may have none."""
    lengths = [0, 5, 33, 64]
    shards = [(values((n, 1, 16), 1, n), values((n, 1, 16), 2, n)) for n in lengths]
    q = values((4, 2, 16), 0)
    out, lse2 = torch.full((3, 4, 2, 16), torch.nan), torch.full((3, 4, 2), torch.nan)
    decode(q, *scattered(shards, 16), out, lse2, settings=DecodeSettings(16, 4, 2))
    for row, sizes in enumerate([(0, 0, 0), (5, 0, 0), (16, 16, 1), (32, 32, 0)]):
        begin = 0
        for split, size in enumerate(sizes):
            if not size:
                assert out[split, row].isnan().all() and bool((lse2[split, row] == -INF).all())
                continue
            k, v = (x[begin : begin + size] for x in shards[row])
            o, lse, bound = exact_attention(q[row], [(k, v)])
            assert ((o - out[split, row]).norm(dim=-1) <= bound).all()
            np.testing.assert_allclose(lse2[split, row] * np.log(2), lse, rtol=1e-6, atol=1e-6)
            begin += size


def test_splits_divide_the_window(values: Values) -> None:
    """Blocks of 16 in which a row sees a key are dealt, however many lie before them."""
    windows = [(150, 160), (130, 200), (112, 113), (90, 90)]
    shards = [(values((n, 1, 16), 1, n), values((n, 1, 16), 2, n)) for _, n in windows]
    q, starts = values((4, 2, 16), 0), torch.tensor([start for start, _ in windows])
    out, lse2 = torch.full((3, 4, 2, 16), torch.nan), torch.full((3, 4, 2), torch.nan)
    paging = scattered(shards, 16)
    decode(q, *paging, out, lse2, starts=starts, settings=DecodeSettings(16, 4, 2))
    assert (lse2[:, :, 0] > -INF).T.tolist() == [
        [True, False, False], [True, True, True], [True, False, False], [False, False, False],
    ]  # fmt: skip
    for split, (first, end) in enumerate([(130, 160), (160, 192), (192, 200)]):
        o, lse, bound = exact_attention(q[1], [tuple(x[first:end] for x in shards[1])])
        assert ((o - out[split, 1]).norm(dim=-1) <= bound).all()
        np.testing.assert_allclose(lse2[split, 1] * np.log(2), lse, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize(("windowed", "paired"), [(False, 2), (True, 0)])
def test_windows_of_8_bits_and_of_tokens_are_read_by_the_plain_kernel(
    windowed: bool, paired: int, values: Values, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pairs are not made, and groups of tokens with a start each are attended to row by row."""
    calls = list[Any]()
    for module in ("decode", "mla"):
        monkeypatch.setattr(
            f"helix_gpu.attention.kernels.{module}.decode_narrow",
            lambda *given, **how: calls.append(given),
        )
    k, v = (values((37, 1, 32), n).to(torch.float8_e4m3fn).float() for n in (1, 2))
    pool, tables, _ = scattered([(k, v)], 16)
    q, tables = values((3, 2, 32), 0, dtype=torch.float16), tables.expand(3, -1)
    lengths, starts = torch.tensor([35, 36, 37]), torch.tensor([3, 20, 36])
    how: dict[str, Any] = {"starts": starts} if windowed else {}
    narrow = pool.to(torch.float8_e4m3fn)
    out, lse2 = torch.full((1, 3, 2, 32), torch.nan), torch.full((1, 3, 2), torch.nan)
    decode_latent(q, narrow[:, 0, :, 0], tables, lengths, out, lse2, scale=1.0, **how)
    decode(q, narrow, tables, lengths, out, lse2, **how)
    assert len(calls) == paired
    if windowed:
        send = torch.empty(1, 3 * 2 * 33 * 4, dtype=torch.uint8)
        output, lse = unpack(send, 3, 2, 32, torch.float32)
        groups = torch.tensor([0, 3])
        how |= {"packed": True, "groups": groups, "tokens": 3}
        decode(q, pool.half(), tables, lengths, output, lse, **how)
        rows = [
            (k[a:b].half(), v[a:b].half())
            for a, b in zip(starts.tolist(), lengths.tolist(), strict=True)
        ]
        check_rows(output[0], lse[0], q, rows)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "tokens", "splits"), [(4, 2, 4, 1), (6, 2, 3, 3), (20, 1, 8, 3)]
)
def test_tokens_of_a_request_attend_together(
    heads: int, kv_heads: int, tokens: int, splits: int, values: Values
) -> None:
    """Groups of one token to `tokens`, and empty ones; tokens without keys in a split or at all."""
    seen = [[0, 0, 1], [5], [15, 16, 16], [30, 31, 33], [0]]
    starts = np.cumsum([0, *map(len, seen), 0, 0])
    longest = [values((row[-1], kv_heads, 16), 1, row[-1]) for row in seen]
    pool, tables, _ = scattered([(k, k + 1) for k in longest], 16)
    lengths = torch.tensor([length for row in seen for length in row])
    tables = tables.repeat_interleave(torch.tensor([len(row) for row in seen]), 0)
    q = values((len(lengths), heads, 16), 0)
    out = torch.full((splits, len(lengths), heads, 16), torch.nan)
    lse2 = torch.full((splits, len(lengths), heads), torch.nan)
    together: dict[str, Any] = {"groups": torch.from_numpy(starts), "tokens": tokens}
    small = DecodeSettings(16, 4, 2)
    decode(q, pool, tables, lengths, out, lse2, settings=small, **together)
    send, sent = torch.full((2, 2, len(q) * heads // 2 * 68), 255, dtype=torch.uint8)
    reduce_pack(out, lse2, send, torch.float32)
    shape = (len(q), heads // 2, 16, torch.float32)
    output, lse = (x.transpose(0, 1).flatten(1, 2) for x in unpack(send, *shape))
    shards = [
        (k[:length], k[:length] + 1) for k, row in zip(longest, seen, strict=True) for length in row
    ]
    check_rows(output, lse, q, shards)
    if splits == 1:
        packed = unpack(sent, *shape)
        decode(q, pool, tables, lengths, *packed, packed=True, settings=small, **together)
        assert torch.equal(sent, send)


EVERY_NUMBER = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
EVERY_NUMBER = EVERY_NUMBER[~EVERY_NUMBER.float().isnan()]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads_first", [False, True])
@pytest.mark.parametrize(("dim", "kv_heads", "t"), [(64, 2, 16), (80, 1, 64), (2, 1, 1)])
def test_decode_reads_an_8_bit_cache(
    dtype: torch.dtype, heads_first: bool, dim: int, kv_heads: int, t: int, values: Values
) -> None:
    """K and V of float8_e4m3fn give what the values they were rounded to give."""
    lengths = [0, 1, 37]
    shards = [
        tuple(
            values((n, kv_heads, dim), part, n).to(torch.float8_e4m3fn).to(dtype) for part in (1, 2)
        )
        for n in lengths
    ]
    q = values((3, 2 * kv_heads, dim), 0, dtype=dtype)
    pool, *paging = scattered([(k, v) for k, v in shards], t, heads_first)
    for splits in (1, 2):
        found = kernels.attend_pages(q, pool.to(torch.float8_e4m3fn), *paging, splits)
        check_rows(*found, q, [(k, v) for k, v in shards])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("latent", [False, True])
def test_every_8_bit_number_is_read_exactly(dtype: torch.dtype, latent: bool) -> None:
    """One key whose values are all 254 numbers is what a row of that key alone attends to."""
    row = torch.cat((EVERY_NUMBER, EVERY_NUMBER[:2]))
    for q in (torch.zeros(1, 1, 256, dtype=dtype), torch.ones(1, 1, 256, dtype=dtype)):
        out, lse2 = torch.full((1, 1, 1, 256), torch.nan), torch.full((1, 1, 1), torch.nan)
        paging = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
        if latent:
            decode_latent(q, row.view(1, 1, 256), *paging, out, lse2, scale=2.0**-6)
        else:
            pool = row.view(1, 1, 1, 1, 256).expand(1, 2, 1, 1, 256)
            decode(q, pool, *paging, out, lse2, scale=2.0**-6)
        assert torch.equal(out.flatten(), row.float())
        # The numbers are multiples of 2**-9: their sum is exact.
        score = (q.double().flatten() * row.double()).sum() * 2**-6
        np.testing.assert_allclose(lse2.item() * np.log(2), score, rtol=1e-6)


@pytest.mark.parametrize("number", [2.0**-9, 448.0])
@pytest.mark.parametrize("size", [2.0**-14, 2.0**17, 2.0**127])
def test_queries_of_any_size_meet_8_bit_keys(number: float, size: float) -> None:
    """Scores are right wherever bfloat16 can hold the query."""
    q = torch.full((1, 1, 16), size, dtype=torch.bfloat16)
    pool = torch.full((1, 2, 1, 1, 16), number).to(torch.float8_e4m3fn)
    out, lse2 = torch.full((1, 1, 1, 16), torch.nan), torch.full((1, 1, 1), torch.nan)
    paging = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    scale = 2.0**-20
    decode(q, pool, *paging, out, lse2, scale=scale)
    np.testing.assert_allclose(lse2.item() * np.log(2), 16 * size * number * scale, rtol=1e-6)
    assert bool((out == number).all())


def test_small_elements_and_small_weights_count_beside_large_ones() -> None:
    """Elements 2**-20 of a query's largest, and 1,000 weights of 2**-26 beside one of 1."""
    q = torch.zeros(1, 1, 16, dtype=torch.bfloat16)
    q[0, 0, :2] = torch.tensor([2.0**10, 2.0**-10])
    k, v = torch.zeros(2, 1001, 1, 16)
    k[1:, 0, 1] = -448.0
    k[0, 0, 0], scale = 2.0**-6, 26 * np.log(2) / (16 + 448 * 2.0**-10)
    v[1:], v[0] = 448.0, 2.0**-9
    pool, *paging = scattered([(k, v)], 16)
    out, lse2 = torch.full((1, 1, 1, 16), torch.nan), torch.full((1, 1, 1), torch.nan)
    decode(q, pool.to(torch.float8_e4m3fn), *paging, out, lse2, scale=scale)
    rest = 1000 * 2.0**-26
    np.testing.assert_allclose(out.flatten(), (2.0**-9 + 448 * rest) / (1 + rest), rtol=1e-5)
    np.testing.assert_allclose(lse2.item(), 16 * scale / np.log(2) + np.log2(1 + rest), rtol=1e-6)


@pytest.mark.parametrize(("rope", "paired"), [(0, 1), (16, 0), (32, 1)])
def test_pairs_whose_halves_matrix_units_do_not_take_are_not_made(
    rope: int, paired: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled, a product needs 16 dims, which the interpreter does not say."""
    calls = list[Any]()
    monkeypatch.setattr(
        "helix_gpu.attention.kernels.mla.decode_narrow", lambda *given, **how: calls.append(given)
    )
    pool = torch.zeros(1, 1, 32 + rope).to(torch.float8_e4m3fn)
    paging = torch.zeros(1, 1, dtype=torch.int64), torch.ones(1, dtype=torch.int32)
    out, lse2 = torch.zeros(1, 1, 1, 32), torch.zeros(1, 1, 1)
    q = torch.zeros(1, 1, 32 + rope, dtype=torch.float16)
    decode_latent(q, pool, *paging, out, lse2, scale=1.0)
    assert len(calls) == paired


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("place", [0, 1, 31])
def test_nan_in_an_8_bit_cache_stays_nan(part: int, dtype: torch.dtype, place: int) -> None:
    """Of K in every element of the output, of V in its own."""
    pool = torch.ones(1, 2, 4, 1, 32)
    pool[0, part, 2, 0, place] = torch.nan
    q = torch.ones(1, 1, 32, dtype=dtype)
    paging = torch.zeros(1, 1, dtype=torch.int64), torch.full((1,), 3)
    output, _ = kernels.attend_pages(q, pool.to(torch.float8_e4m3fn), *paging)
    expected = torch.ones(32)
    expected[slice(None) if part == 0 else place] = torch.nan
    torch.testing.assert_close(output.flatten(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("heads", "latent", "rope", "t", "lengths"),
    [(20, 64, 16, 16, [0, 1, 17, 70]), (2, 512, 64, 64, [65]), (3, 64, 0, 16, [0, 1, 17])],
)
def test_decode_latent_against_float64(
    dtype: torch.dtype, heads: int, latent: int, rope: int, t: int, lengths: list[int],
    values: Values,
) -> None:  # fmt: skip
    """A key is (latent, rope), its value the latent, under the model's own scale."""
    scale, n = 192**-0.5, len(lengths)
    q = values((n, heads, latent + rope), 0, dtype=dtype)
    rows = [values((length, 1, latent + rope), 1, length, dtype=dtype) for length in lengths]
    pool, tables, counts = scattered([(row, row) for row in rows], t)
    out = torch.full((2, n, heads, latent), torch.nan)
    lse2 = torch.full((2, n, heads), torch.nan)
    decode_latent(q, pool[:, 0, :, 0], tables, counts, out, lse2, scale=scale)
    send = torch.empty(1, n * heads * (latent * 4 + 4), dtype=torch.uint8)
    reduce_pack(out, lse2, send, torch.float32)
    output, lse = (x[0] for x in unpack(send, n, heads, latent, torch.float32))
    for i, row in enumerate(rows):
        if not len(row):
            assert not output[i].any() and bool((lse[i] == -INF).all())
            continue
        o, exact_lse, bound = exact_attention(
            q[i], [(row, row[..., :latent])], product=dtype, scale=scale
        )
        assert ((o - output[i]).norm(dim=-1) <= bound).all()
        np.testing.assert_allclose(lse[i], exact_lse, rtol=2e-6, atol=2e-6)


def partials(ranks: int, n: int, heads: int, dim: int) -> tuple[Tensor, Tensor]:
    """Random partials and natural log-sum-exps; some empty, of which the outputs are NaN."""
    generator = torch.Generator().manual_seed(ranks * 100 + dim)
    outputs = torch.randn(ranks, n, heads, dim, generator=generator)
    lses = 4 * torch.randn(ranks, n, heads, generator=generator)
    empty = torch.rand(ranks, n, heads, generator=generator) < 0.3
    empty[:, 0, 0] = True
    outputs[empty], lses[empty] = torch.nan, -INF
    return outputs, lses


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize(
    ("splits", "n", "heads", "dim", "ranks"),
    [(1, 1, 2, 2, 2), (5, 3, 6, 80, 3), (4, 2, 4, 64, 1), (19, 2, 2, 320, 2)],
)
def test_reduce_pack_is_merge_then_pack(
    wire: torch.dtype, splits: int, n: int, heads: int, dim: int, ranks: int
) -> None:
    """Splits are joined as ranks are, and lie where `partials.pack` puts them."""
    outputs, lses = partials(splits, n, heads, dim)
    expected = pack(*merge(outputs, lses), ranks, wire)
    send = torch.full_like(expected, 255)
    reduce_pack(outputs, lses / np.log(2), send, wire)
    shape = (n, heads // ranks, dim, wire)
    for got, want in zip(unpack(send, *shape), unpack(expected, *shape), strict=True):
        # A rounding of the wire type, where both were near its middle.
        torch.testing.assert_close(got, want, rtol=2 * UNIT[got.dtype] + 2e-6, atol=2e-6)


@pytest.mark.parametrize("wire", [torch.float32, torch.float16])
@pytest.mark.parametrize("latent", [False, True])
def test_one_split_is_written_as_reduce_pack_would(
    wire: torch.dtype, latent: bool, values: Values
) -> None:
    """To the bit, for three ranks; rows without keys too, and unused slots are NaN."""
    n, heads, ranks = 4, 6, 3
    rows = [values((length, 1, 32), 1, length) for length in (0, 1, 17, 40)]
    pool, *paging = scattered([(row, row) for row in rows], 16)
    q = values((n, heads, 32), 0)
    if latent:
        pool, dim, by = pool[:, 0, :, 0], 16, partial(decode_latent, scale=0.2)
    else:
        dim, by = 32, partial(decode)
    out, lse2 = torch.full((1, n, heads, dim), torch.nan), torch.full((1, n, heads), torch.nan)
    by(q, pool, *paging, out, lse2)
    row_bytes = n * (heads // ranks) * (dim * wire.itemsize + 4)
    expected, send = torch.full((2, ranks, row_bytes), 255, dtype=torch.uint8)
    reduce_pack(out, lse2, expected, wire)
    sent = unpack(send, n, heads // ranks, dim, wire)
    by(q, pool, *paging, *sent, packed=True)
    assert torch.equal(send, expected)


@pytest.mark.parametrize("wire", DTYPES)
@pytest.mark.parametrize(
    ("ranks", "n", "heads", "dim"), [(1, 1, 1, 2), (3, 2, 4, 80), (8, 3, 2, 128)]
)
def test_merge_is_the_plain_merge(
    wire: torch.dtype, ranks: int, n: int, heads: int, dim: int
) -> None:
    """Fixed rank order, empty partials of NaN, rows empty everywhere; twice the same bits."""
    outputs, lses = partials(ranks, n, heads, dim)
    received = torch.cat([pack(o, s, 1, wire) for o, s in zip(outputs, lses, strict=True)])
    want, want_lse = merge(outputs.to(wire), lses)
    got, got_lse = torch.full((n, heads, dim), torch.nan), torch.full((n, heads), torch.nan)
    merge_received(received, got, got_lse, wire)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(got_lse, want_lse, rtol=1e-6, atol=1e-6)
    assert not got[0, 0].any() and got_lse[0, 0] == -INF
    again, again_lse = torch.empty(n, heads, dim), torch.empty(n, heads)
    merge_received(received, again, again_lse, wire)
    assert torch.equal(got, again) and torch.equal(got_lse, again_lse)


def test_merge_where_one_partial_dominates() -> None:
    """A shard ahead by e**200 or at a huge log-sum-exp is the result; nothing overflows."""
    outputs = torch.tensor([[[1.0, 2.0]], [[5.0, 6.0]]])[:, None]
    for low, high in ((-100.0, 100.0), (3e4, 3.1e4), (-3.1e4, -3e4)):
        lses = torch.tensor([low, high])[:, None, None]
        received = torch.cat(
            [pack(o, s, 1, torch.float32) for o, s in zip(outputs, lses, strict=True)]
        )
        out, lse = torch.empty(1, 1, 2), torch.empty(1, 1)
        merge_received(received, out, lse, torch.float32)
        assert torch.equal(outputs[1], out) and lse.item() == high


@pytest.mark.parametrize("wrong", [torch.nan, INF])
def test_merge_shows_a_wrong_log_sum_exp(wrong: float) -> None:
    """A NaN or +inf log-sum-exp, which no partial may have, is not read as an empty shard."""
    received = torch.cat(
        [pack(torch.ones(1, 1, 4), torch.tensor([[s]]), 1, torch.float32) for s in (0.0, wrong)]
    )
    out, lse = torch.zeros(1, 1, 4), torch.zeros(1, 1)
    merge_received(received, out, lse, torch.float32)
    assert out.isnan().all() and lse.isnan().all()


@pytest.mark.parametrize(("layout", "cp_size"), [("pr9757/1:C=2,T=2", 2), ("pr17866/1:C=3,T=4", 3)])
def test_a_whole_step_on_every_rank(layout: str, cp_size: int, values: Values) -> None:
    """Steps across an ownership boundary, over one set of buffers: merged heads equal float64.

    The ledger's slots, tables and lengths are copied into tensors that stay, as a captured graph
    needs; one row is padding.
    """
    t, heads, kv_heads, dim, prompts = int(layout[-1]), 6, 1, 16, [1, 9]
    steps, pages = 3, 8
    model = ModelShape(q_heads=heads, kv_heads=kv_heads, head_dim=dim)
    config = Config(layout=layout, pages=[pages] * cp_size, max_len=64, model=model)
    books = [RankBook(config, rank) for rank in range(cp_size)]
    total = {id: length + steps for id, length in enumerate(prompts)}
    k, v = (
        {id: values((n, kv_heads, dim), part, id) for id, n in total.items()} for part in (1, 2)
    )
    pools = torch.full((cp_size, pages, 2, t, kv_heads, dim), torch.nan)
    rows = len(prompts) + 1
    tables = torch.zeros(cp_size, rows, pages, dtype=torch.int64)
    lengths = torch.zeros(cp_size, rows, dtype=torch.int32)
    slots = torch.full((cp_size, rows), -1)
    buffers = [
        kernels.StepBuffers.allocate(
            rows, heads, kv_heads, dim, ranks=cp_size, longest=16,
            dtype=torch.float32, wire=torch.float32, device="cpu", splits=2,
        )
        for _ in books
    ]  # fmt: skip
    for id, length in enumerate(prompts):
        for rank, book in enumerate(books):
            positions = book.plan_admit(id, length).shards[rank].positions()
            book.admit(id, length)
            for index, position in enumerate(positions.tolist()):
                page = book.block_table(id)[index // t]
                pools[rank, page, 0, index % t] = k[id][position]
                pools[rank, page, 1, index % t] = v[id][position]
    owners = set()
    for step in range(steps):
        at = [length + step for length in prompts] + [0]
        q = values((rows, heads, dim), 3, step)
        new_k, new_v = (
            torch.stack([x[id][at[id]] for id in total] + [torch.full((kv_heads, dim), torch.nan)])
            for x in (k, v)
        )
        for rank, book in enumerate(books):
            placed = book.decode_step(list(total), pad=1)
            slots[rank, :-1] = torch.from_numpy(placed.slots)
            lengths[rank, :-1] = torch.from_numpy(placed.visible)
            tables[rank, :-1] = torch.from_numpy(book.tables.read(placed.rows, pages))
            owners.update(rank for active in placed.active if active)
            kernels.attend_shard(
                buffers[rank], q, new_k, new_v, pools[rank],
                slots[rank], tables[rank], lengths[rank],
            )  # fmt: skip
        for rank in range(cp_size):
            mine = buffers[rank]
            mine.received.copy_(torch.stack([other.send[rank] for other in buffers]))
            output = kernels.merge_shards(mine)
            own = slice(rank * heads // cp_size, (rank + 1) * heads // cp_size)
            seen = [(k[id][: at[id] + 1], v[id][: at[id] + 1]) for id in total]
            check_rows(output, mine.lse, q[:, own], [*seen, (k[0][:0], v[0][:0])])
    assert len(owners) > 1


def test_splits_fill_the_device() -> None:
    """Few rows are split far, many rows not at all, and never beyond one block a split.

    20 rows would leave most multiprocessors idle in their second turn: they take five full ones.
    """
    assert [
        splits_for(*case)
        for case in [
            (1, 8, 131072), (8, 8, 32768), (32, 8, 32768), (20, 8, 32768),
            (4, 8, 64), (1, 1, 1024), (0, 8, 0),
        ]
    ] == [16, 2, 1, 4, 1, 8, 1]  # fmt: skip
    # Four programs a multiprocessor: what was fastest with an 8-bit cache on an H200.
    assert [
        splits_for(*case, resident=4) for case in [(1, 8, 131072), (8, 8, 32768), (32, 8, 32768)]
    ] == [66, 8, 2]


def test_layouts_that_kernels_would_misread_are_refused(values: Values) -> None:
    """Gaps between elements that kernels take to lie side by side raise, and name the tensor."""
    k, pool = values((3, 2, 16), 1), torch.zeros(2, 2, 4, 2, 16)
    with pytest.raises(ValueError, match=r"slots has strides \(2,\)"):
        append(k, k, pool, torch.zeros(3, 2, dtype=torch.int64)[:, 0])
    with pytest.raises(ValueError, match="The last axis of v has stride 6"):
        append(k, values((3, 16, 6), 2).mT, pool, torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"cos has strides .*; it must be contiguous"):
        rotated(k, torch.zeros(3, 1, 16)[..., ::2], torch.zeros(3, 1, 8))
