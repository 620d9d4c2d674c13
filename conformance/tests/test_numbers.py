"""When two attention outputs are equal (ATT-4): honest runs pass, and small mistakes fail.

The arrays of the suite are first held against the plain definitions of spec and reference.
"""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_conformance.expect import arrays as numbers
from helix_gpu.attention.merge import beside_sinks, merge
from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.rope import rope_table, rotate
from helix_reference import attention
from helix_spec import values
from helix_spec.config import LatentShape, ModelShape
from helix_spec.values import sink

DTYPES = ("float32", "float16", "bfloat16")
CACHED = (None, "float8_e4m3fn")
LATENT = LatentShape(latent_dim=32, rope_dim=16)


def tokens_of(identities, first):
    """Tokens at consecutive positions from `first`."""
    places = enumerate(identities, first)
    return numbers.token_columns([(*identity, position) for position, identity in places])


@settings(max_examples=200, deadline=None)
@given(
    x=st.floats(-1e4, 1e4) | st.floats(-500, 500) | st.floats(-0.05, 0.05),
    dtype=st.sampled_from((*DTYPES, "float8_e4m3fn")),
)
def test_rounding_is_torchs(x, dtype):
    """Rounding to a type gives what torch's conversion gives, where float32 lies not between."""
    x = float(np.float32(x))
    expected = torch.tensor(x).to(getattr(torch, dtype)).float().item()
    if not abs(expected) < torch.finfo(getattr(torch, dtype)).max:
        return
    assert attention.round_to(x, dtype) == expected
    assert numbers.round_to(np.array(x), dtype) == expected


@settings(max_examples=50, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    identities=st.lists(
        st.tuples(st.integers(0, 10**6), st.integers(0, 10**6)), min_size=1, max_size=4
    ),
    first=st.integers(0, 2**31),
    tensor=st.sampled_from(["q", "k", "v"]),
    heads=st.lists(st.integers(0, 200), min_size=1, max_size=3),
)
def test_entries_are_those_of_the_specification(seed, identities, first, tensor, heads):
    """The array hash gives, entry by entry, what the plain one gives."""
    found = numbers.entries(seed, tokens_of(identities, first), 2, tensor, heads, 4)
    expected = [
        [
            [
                [
                    values.entry(
                        values.token_state(seed, event, place, first + n, layer, tensor), head, d
                    )
                    for d in range(4)
                ]
                for head in heads
            ]
            for n, (event, place) in enumerate(identities)
        ]
        for layer in range(2)
    ]
    assert found.tolist() == expected


@pytest.mark.holds("ATT-1", "ATT-4")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize(
    ("q_heads", "kv_heads", "latent"),
    [(4, 2, None), (2, 2, None), (3, 1, None), (3, 1, LatentShape(latent_dim=6, rope_dim=4))],
)
@pytest.mark.parametrize("sinks", [False, True])
def test_exact_attention_is_the_references(dtype, cached, q_heads, kv_heads, latent, sinks):
    """Output and bound of the arrays agree with the reference's, to float64's rounding."""
    shape = ModelShape(
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=8,
        latent=latent,
        dtype=dtype,
        cache_dtype=cached,
        product_dtype=dtype,
        partial_dtype=dtype,
        sinks=sinks,
    )
    identities = [(3, place) for place in range(9)] + [(7, 1)]
    ranks = [0, 0, 1, 1, 1, 1, 1, 3, 3, 0]
    outputs, bounds = _exact(shape, identities, np.array(ranks))
    tokens = [attention.Token(e, p, position) for position, (e, p) in enumerate(identities)]
    for head in range(q_heads):
        kv_head = head // (q_heads // kv_heads)
        expected, bound = attention.error_bound(
            shape,
            attention.query(shape, 5, tokens[-1], 0, head),
            [attention.key(shape, 5, token, 0, kv_head) for token in tokens],
            [attention.value(shape, 5, token, 0, kv_head) for token in tokens],
            ranks,
            sink=sink(5, 0, head) if sinks else None,
        )
        np.testing.assert_allclose(outputs[head], expected, atol=1e-13)
        np.testing.assert_allclose(bounds[head], bound, rtol=1e-9)


def _exact(shape, identities, ranks, seed=5):
    tokens = tokens_of(identities, 0)
    last = tokens_of(identities[-1:], len(identities) - 1)
    q = numbers.rotated_queries(shape, seed, last, range(shape.q_heads))
    k = numbers.cached_keys(shape, seed, tokens, range(shape.kv_heads))
    v = numbers.cached_values(shape, seed, tokens, range(shape.kv_heads))
    kv = numbers.KeysValues(k.stored[0], k.uncertainty[0], v[0])
    sinks = numbers.sinks_of(shape, seed, 0)
    given = q.stored[0, 0], q.uncertainty[0, 0], kv, ranks
    return numbers.exact_attention(shape, *given, sinks=sinks)


@pytest.mark.holds("OWN-1", "POS-2")
@pytest.mark.parametrize("latent", [None, LATENT])
@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("dtype", DTYPES)
def test_cached_keys_have_no_room_but_for_rounding(dtype, cached, latent):
    """An honest K lies between its two roundings; one unit further, or turned elsewhere, does not.

    In a narrow type the two roundings are nearly always one number.
    """
    kv_heads = 1 if latent else 2
    shape = ModelShape(q_heads=4, kv_heads=kv_heads, latent=latent, dtype=dtype, cache_dtype=cached)
    tokens = tokens_of([(0, place) for place in range(2000)], 5000)
    k = numbers.cached_keys(shape, 3, tokens, range(kv_heads))
    rows = torch.from_numpy(numbers.entries(3, tokens, 1, "k", range(kv_heads), shape.key_dim))
    positions = torch.from_numpy(tokens.positions)
    kept = getattr(torch, cached or dtype)

    def turned(by):
        table = rope_table(positions + by, shape.rope_dim, shape.rope_base)
        return rotate(rows.to(getattr(torch, dtype)), *table).to(kept)

    honest = turned(0)
    found = honest.double().numpy()
    assert ((k.lower <= found) & (found <= k.upper)).all()
    unit = {1: torch.uint8, 2: torch.int16, 4: torch.int32}[kept.itemsize]
    beyond = (honest.view(unit) + 1).view(kept).double().numpy()
    sure = k.lower == k.upper
    assert not ((k.lower <= beyond) & (beyond <= k.upper))[sure & (found != 0)].any()
    if kept != torch.float32:
        assert sure.mean() > 0.99
    else:
        assert sure[..., : shape.key_dim - shape.rope_dim].all()
    elsewhere = turned(1).double().numpy()
    assert not ((k.lower <= elsewhere) & (elsewhere <= k.upper)).all(axis=-1).any()


class Sharded:
    """One query over S keys on four ranks of unequal lengths, computed as the real thing does.

    `errors(...)` says, per query head, how many bounds E the output is off after a mistake.
    """

    def __init__(self, dtype, keys, seed, *, cached=None, latent=None, sinks=False):
        kv_heads = 1 if latent else 2
        self.shape = ModelShape(
            q_heads=8,
            kv_heads=kv_heads,
            head_dim=64,
            latent=latent,
            dtype=dtype,
            cache_dtype=cached,
            sinks=sinks,
        )
        self.seed = seed
        shares = np.array([0.55, 0.3, 0.15]) * keys
        lengths = [*np.maximum(1, shares.astype(int)), 0]
        lengths[0] += keys - sum(lengths)
        self.ranks = np.repeat(np.arange(4), lengths)
        self.identities = [(0, place) for place in range(keys)]
        self.exact, self.bound = _exact(self.shape, self.identities, self.ranks, seed)

    def errors(self, *, missing=None, lse=lambda lse: lse):
        shape, torch_type = self.shape, getattr(torch, self.shape.dtype)
        tokens = tokens_of(self.identities, 0)
        last = tokens_of(self.identities[-1:], len(self.identities) - 1)
        heads, cached = range(shape.kv_heads), getattr(torch, shape.cached_dtype)
        q = self._tensor(numbers.queries(shape, self.seed, last, range(8)))[0]
        k = self._tensor(numbers.entries(self.seed, tokens, 1, "k", heads, shape.key_dim))[0]
        v = self._tensor(numbers.values(shape, self.seed, tokens, heads))[0]
        positions = torch.from_numpy(tokens.positions)
        cos, sin = rope_table(positions, shape.rope_dim, shape.rope_base)
        k, q = rotate(k, cos, sin), rotate(q, cos[-1:], sin[-1:])
        parts = torch.stack([k] if shape.latent else [k, v]).to(cached)
        outputs, lses = [], []
        for rank in range(4):
            mine = np.flatnonzero(self.ranks == rank)
            mine = mine[mine != missing]
            page = parts[:, mine][None]
            if not len(mine):
                page = torch.full_like(parts[:, :1], torch.nan)[None]
            table, length = torch.zeros(1, 1, dtype=torch.int64), torch.tensor([len(mine)])
            output, logsum = attend_pages(
                q, page, table, length, scale=shape.softmax_scale, value_dim=shape.value_dim
            )
            outputs.append(output)
            lses.append(lse(logsum))
        merged, whole = merge(torch.stack(outputs), torch.stack(lses))
        sinks = numbers.sinks_of(shape, self.seed, 0)
        merged = beside_sinks(
            merged, whole, None if sinks is None else torch.from_numpy(sinks).float()
        )
        found = merged[0].to(torch_type).double().numpy()
        return np.sqrt(((found - self.exact) ** 2).sum(-1)) / self.bound

    def _tensor(self, x):
        return torch.from_numpy(x).to(getattr(torch, self.shape.dtype))


@pytest.mark.holds("ATT-4")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [3, 5, 64, 333, 4096])
def test_honest_runs_are_within_the_bound(dtype, keys):
    """A correct run passes in every element type, short and long, an empty rank among them."""
    worst = max(Sharded(dtype, keys, seed).errors().max() for seed in range(4))
    assert worst <= 1


@pytest.mark.holds("ATT-4")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [3, 5, 64, 333])
def test_honest_runs_with_sinks_are_within_the_bound(dtype, keys):
    """A correct run whose sinks join the merged output passes in every element type."""
    worst = max(Sharded(dtype, keys, seed, sinks=True).errors().max() for seed in range(8))
    assert worst <= 1


@pytest.mark.holds("ATT-4")
@pytest.mark.parametrize("latent", [None, LATENT])
@pytest.mark.parametrize("cached", CACHED)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("keys", [3, 333])
def test_honest_runs_of_latent_and_8_bit_caches(dtype, keys, cached, latent):
    """The same over caches of 8 bits and of latents: their rounding is in the reference."""
    runs = (Sharded(dtype, keys, seed, cached=cached, latent=latent) for seed in range(4))
    assert max(run.errors().max() for run in runs) <= 1


@pytest.mark.holds("ATT-4")
@pytest.mark.parametrize("dtype", DTYPES)
def test_mixed_up_base_is_caught(dtype):
    """A log-sum-exp in base 2 merged as if it were natural is far outside the bound."""
    errors = Sharded(dtype, 500, 1).errors(lse=lambda lse: lse / math.log(2))
    assert errors.max() > 3


@pytest.mark.holds("ATT-4")
@pytest.mark.parametrize("dtype", DTYPES)
def test_bfloat16_log_sum_exp_is_caught(dtype):
    """A log-sum-exp kept in bfloat16 is outside the bound."""
    worst = max(
        Sharded(dtype, 500, seed).errors(lse=lambda lse: lse.bfloat16().float()).max()
        for seed in range(4)
    )
    assert worst > 1


@pytest.mark.holds("ATT-4")
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_missing_key_of_4096_is_caught_at_the_probe(dtype):
    """At the probe heads one missing key among 4,096 is outside the bound, whichever it is."""
    sharded = Sharded(dtype, 4096, 2)
    probes = [head for head in range(8) if values.is_probe(head, 4, 4095)]
    for missing in (0, 1000, 3000, 4095):
        assert sharded.errors(missing=missing)[probes].max() > 1


@pytest.mark.holds("ATT-4")
@pytest.mark.parametrize(("head_dim", "cp_size"), [(16, 2), (64, 4), (128, 8), (128, 3)])
def test_a_merge_that_does_not_divide_is_within_the_bound(head_dim, cp_size):
    """25,000 heads each, merged in float32 by exp(lse_r - G) with G their float32 log-sum-exp."""
    shape = ModelShape(q_heads=5000, kv_heads=1, head_dim=head_dim)
    errors = np.concatenate([_undivided(shape, cp_size, seed) for seed in range(5)])
    assert (len(errors), errors.max() <= 1) == (25_000, True)


@pytest.mark.holds("ATT-4")
def test_a_merge_that_weights_one_rank_a_little_more_is_caught():
    """The positive control of the test above: by a hundred-thousandth."""
    shape = ModelShape(q_heads=5000, kv_heads=1, head_dim=64)
    assert _undivided(shape, 4, 0, heavier=1 + 1e-5).max() > 3


def _undivided(shape, cp_size, seed, *, heavier=1.0):
    """How many bounds E such a merge is off, head by head; the partials are exact, but float32."""
    identities = [(seed, place) for place in range(12)]
    ranks = np.arange(12) % cp_size
    exact, bound = _exact(shape, identities, ranks, seed)
    last = tokens_of(identities[-1:], len(identities) - 1)
    tokens = tokens_of(identities, 0)
    q = numbers.rotated_queries(shape, seed, last, range(shape.q_heads)).stored[0, 0]
    k = numbers.cached_keys(shape, seed, tokens, range(1)).stored[0, :, 0]
    v = numbers.cached_values(shape, seed, tokens, range(1))[0, :, 0]
    scores = shape.softmax_scale * (q @ k.T)
    outputs, lses = [], []
    for rank in range(cp_size):
        mine = scores[:, ranks == rank]
        top = mine.max(-1, keepdims=True)
        weights = np.exp(mine - top)
        outputs.append(weights @ v[ranks == rank] / weights.sum(-1, keepdims=True))
        lses.append(top[:, 0] + np.log(weights.sum(-1)))
    o, lse = np.float32(outputs), np.float32(lses)
    top = lse.max(0)
    merged = top + np.log(np.exp(lse - top).sum(0, dtype=np.float32))
    weights = np.exp(lse - merged)
    weights[0] *= np.float32(heavier)
    found = (weights[..., None] * o).sum(0, dtype=np.float32)
    return np.sqrt(((found - exact) ** 2).sum(-1)) / bound


def test_memory_that_nobody_wrote_to_is_read_without_a_warning() -> None:
    """A signalling NaN, which any bits may be, is a NaN like others."""
    bits = np.array([0x7FA00000, 0x3F800000], dtype=np.uint32).view(np.float32)
    encoded = {"dtype": bits.dtype.str, "shape": list(bits.shape), "data": bits.tobytes()}
    for told in (bits, encoded):
        with np.errstate(invalid="raise"):
            assert np.isnan(numbers.as_array(told)).tolist() == [True, False]
