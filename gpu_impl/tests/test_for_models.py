"""What a model needs: its own rotation and scale, log-sum-exps, many prompts at a time, heads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec
import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from gpu_testing.exact import exact_attention
from gpu_testing.pages import scattered
from gpu_testing.ranks import run_ranks
from helix_gpu.attention import paged
from helix_gpu.attention.heads import padded_heads
from helix_gpu.attention.rope import rope_table, rotate
from helix_gpu.bookkeeping.rank_book import RankBook
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.bookkeeping.sizing import pages_for
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_spec.config import Config, LatentShape, ModelShape
from helix_spec.layouts import parse_layout

Fixture = Callable[..., Any]
LAYERS, Q_HEADS, KV_HEADS, DIM = 2, 8, 2, 16
LAYOUTS = [
    "pr9757/1:C=1,T=4",
    "pr9757/1:C=4,T=2",
    "pr17866/1:C=2,T=2",
    "vllm_dcp/1:C=2,T=4,I=2",
    "balanced/1:C=4,T=2",
]


def config(layout: str, **changes: Any) -> Config:
    """Room for everything here."""
    model = ModelShape(layers=LAYERS, q_heads=Q_HEADS, kv_heads=KV_HEADS, head_dim=DIM)
    cp_size = parse_layout(layout).cp_size
    given = {"layout": layout, "pages": [60] * cp_size, "max_len": 200, "model": model}
    return Config(**(given | changes))


def numbers(id: int, positions: list[int], heads: int, code: int) -> Tensor:
    """[layers, n, heads, dim] that belong to a request, its positions and what they are."""
    rows = []
    for position in positions:
        generator = torch.Generator().manual_seed(1000 * id + 10 * position + code)
        rows.append(torch.randn(LAYERS, 1, heads, DIM, generator=generator))
    return torch.cat(rows, 1)


def three(id: int, positions: list[int]) -> list[Tensor]:
    """Q, K and V, not rotated."""
    return [
        numbers(id, positions, heads, code)
        for code, heads in enumerate((Q_HEADS, KV_HEADS, KV_HEADS))
    ]


def rotated(x: Tensor, positions: list[int]) -> Tensor:
    """As the configuration's RoPE does it."""
    return rotate(x, *rope_table(torch.tensor(positions), DIM, 10000.0))


@pytest.mark.holds("POS-2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_model_may_rotate_itself(layout: str) -> None:
    """With rope None rotated Q and K give the bits that the cache's own RoPE gives, on each path.

    Admission, prompts computed here, decodes, resumption and recomputation.
    """

    def body(own: bool) -> Callable[[HelixCache, int], list[Tensor]]:
        def given(id: int, positions: list[int]) -> list[Tensor]:
            q, k, v = three(id, positions)
            return [rotated(q, positions), rotated(k, positions), v] if own else [q, k, v]

        def play(cache: HelixCache, rank: int) -> list[Tensor]:
            outputs = []

            def computed(id: int, steps: Any) -> None:
                for step in steps:
                    q, k, v = given(id, step.book.position_ids.tolist())
                    outputs.extend(cache.attend(step, i, q[i], k[i], v[i]) for i in range(LAYERS))

            cache.admit(0, 9, lambda at: tuple(given(0, at.tolist())[1:]))
            computed(1, cache.prefill(1, 13, 6))
            for id, position in ((0, 9), (1, 13)):
                outputs.append(cache.decode([id], *given(id, [position])))
                cache.preempt(id)
            cache.resume(0, lambda at: tuple(given(0, at.tolist())[1:]))
            computed(1, cache.recompute(1, 20))
            pool = cache.pool.nan_to_num(7)
            return [*outputs, *(pool[:, cache.block_table(id)] for id in (0, 1))]

        return play

    plain = run_ranks(config(layout), body(own=False))
    for one, other in zip(plain, run_ranks(config(layout), body(own=True), rope=None), strict=True):
        assert all(map(torch.equal, one, other))


@pytest.mark.holds("ATT-1")
@pytest.mark.parametrize("scale", [None, 0.5])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_scale_and_log_sum_exp(layout: str, scale: float | None) -> None:
    """Outputs and log-sum-exps of every rank's slice are those of attention over all tokens."""

    def body(cache: HelixCache, rank: int) -> tuple[Tensor, Tensor]:
        cache.admit(0, 11, lambda at: tuple(three(0, at.tolist())[1:]))
        step = cache.begin([0], [2], pad=1)
        q, k, v = (
            torch.nn.functional.pad(x, (0, 0, 0, 0, 0, 1), value=torch.nan)
            for x in three(0, [11, 12])
        )
        found = [
            cache.attend(step, i, q[i], k[i], v[i], scale=scale, return_lse=True)
            for i in range(LAYERS)
        ]
        outputs, lses = zip(*found, strict=True)
        return torch.stack(outputs), torch.stack(lses)

    outputs, lses = (
        torch.cat(parts, 2) for parts in zip(*run_ranks(config(layout), body), strict=True)
    )
    assert lses.shape == (LAYERS, 2, Q_HEADS)
    for row, position in enumerate((11, 12)):
        everything = list(range(position + 1))
        q, k, v = three(0, everything)
        q, k = rotated(q, everything), rotated(k, everything)
        for layer in range(LAYERS):
            o, lse, bound = exact_attention(q[layer, -1], [(k[layer], v[layer])], scale=scale)
            assert ((o - outputs[layer, row]).norm(dim=-1) <= 2 * bound).all()
            torch.testing.assert_close(lses[layer, row], lse.float(), rtol=2e-6, atol=2e-6)


def test_a_sink_by_the_log_sum_exp() -> None:
    """An output times sigmoid(lse - s) is attention with one more key of logit s and no value."""
    cache = HelixCache(config("pr9757/1:C=1,T=4"), rank=0, rope=None)
    cache.admit(0, 5, lambda at: tuple(three(0, at.tolist())[1:]))
    q, k, v = three(0, list(range(6)))
    step, sink = cache.begin([0]), torch.linspace(-1, 3, Q_HEADS)
    output, lse = cache.attend(step, 0, q[0, 5:], k[0, 5:], v[0, 5:], return_lse=True)
    scores = torch.einsum("hd,nhd->hn", q[0, 5], k[0].repeat_interleave(4, 1)) / 4
    weights = torch.cat((scores, sink[:, None]), 1).softmax(1)[:, :-1]
    expected = torch.einsum("hn,nhd->hd", weights, v[0].repeat_interleave(4, 1))
    torch.testing.assert_close(
        output[0] * (lse[0] - sink).sigmoid()[:, None], expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.holds("OWN-1", "LEN-3", "ATT-1")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("chunk", [3, 8, 100])
def test_prompts_are_computed_together(layout: str, chunk: int) -> None:
    """Several prompts a step give the cache and the outputs of one after the other."""
    prompts = {4: 9, 2: 1, 7: 14}

    def together(cache: HelixCache, rank: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        outputs = {id: [] for id in prompts}
        for step in cache.prefill(list(prompts), list(prompts.values()), chunk):
            assert len(step.lengths) <= chunk
            of_each, at = [], 0
            for id, first, end in zip(
                step.tokens.ids, step.tokens.firsts.tolist(), step.tokens.ends.tolist(), strict=True
            ):
                of_each.append(three(id, list(range(first, end))))
            q, k, v = (torch.cat(parts, 1) for parts in zip(*of_each, strict=True))
            found = torch.stack([cache.attend(step, i, q[i], k[i], v[i]) for i in range(LAYERS)])
            for id, parts in zip(step.tokens.ids, of_each, strict=True):
                outputs[id].append(found[:, at : at + parts[0].shape[1]])
                at += parts[0].shape[1]
        return held(cache), {id: torch.cat(parts, 1) for id, parts in outputs.items()}

    def apart(cache: HelixCache, rank: int) -> tuple[list[Tensor], dict[int, Tensor]]:
        outputs = {}
        for id, prompt_len in prompts.items():
            (step,) = cache.prefill(id, prompt_len, 100)
            q, k, v = three(id, list(range(prompt_len)))
            outputs[id] = torch.stack(
                [cache.attend(step, i, q[i], k[i], v[i]) for i in range(LAYERS)]
            )
        return held(cache), outputs

    def held(cache: HelixCache) -> list[Tensor]:
        return [cache.pool[:, cache.block_table(id)].nan_to_num(7) for id in prompts]

    whole = run_ranks(config(layout), apart)
    for (pool, outputs), (others, wanted) in zip(
        run_ranks(config(layout), together), whole, strict=True
    ):
        assert all(map(torch.equal, others, pool))
        for id in prompts:
            torch.testing.assert_close(outputs[id], wanted[id], rtol=1e-5, atol=1e-5)


@pytest.mark.holds("ATT-1", "LEN-3")
@pytest.mark.parametrize("ranks", [1, 4])
@pytest.mark.parametrize("window", [None, 2, 40])
@pytest.mark.parametrize("softcap", [None, 1.0])
@pytest.mark.parametrize(
    ("heads", "kv_heads", "latent", "dtype"),
    [
        (4, 4, False, torch.float32),
        (6, 2, False, torch.float16),
        (8, 1, True, torch.float32),
        (8, 1, True, torch.bfloat16),
    ],
)
def test_a_run_of_tokens_attends_as_each_alone(
    ranks: int,
    window: int | None,
    softcap: float | None,
    heads: int,
    kv_heads: int,
    latent: bool,
    dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Blocks of rows, pieces of keys, tokens that see none, and rows between runs: float64's.

    Of a window of 2 tokens a rank of 4 often holds none.
    """
    paged._plan.cache_clear()  # made for other sizes of blocks and pieces
    monkeypatch.setattr(paged, "ROWS_OF_A_RUN", 24)
    monkeypatch.setattr(paged, "SLOTS_OF_A_RUN", 32)
    monkeypatch.setattr(paged, "KEYS_OF_A_CALL", 16)
    generator = torch.Generator().manual_seed(heads)
    n, value_dim = 90, 8 if latent else DIM
    shards = []
    for length in (n // ranks, 7, n // ranks):
        drawn = torch.randn(2, length, kv_heads, DIM, generator=generator)
        k, v = drawn.to(dtype).float().unbind()
        shards.append((k, k if latent else v))
    pages, tables, lengths = scattered(shards, 4)
    pages = (pages[:, :1] if latent else pages).to(dtype)
    rising = [torch.arange(n).div(ranks, rounding_mode="floor"), torch.arange(1, n + 1) // ranks]
    seen = torch.cat((rising[0], lengths[1:2], rising[1]))
    behind = torch.arange(n) - (window or n)
    first = -(-behind.clamp(min=0) // ranks)
    starts = torch.cat((first, torch.tensor([2 if window else 0]), first))
    request = torch.tensor([0] * n + [1] + [2] * n)
    q = torch.randn(len(seen), heads, DIM, generator=generator).to(dtype)
    runs = paged.runs_of(request.numpy())
    assert runs == [slice(0, n), slice(n + 1, 2 * n + 1)]
    output, lse = paged.attend_pages(
        q, pages, tables[request], seen, starts=starts if window else None, scale=0.25,
        softcap=softcap, value_dim=value_dim, runs=runs,
    )  # fmt: skip
    paged._plan.cache_clear()
    for row, (start, keys) in enumerate(zip(starts.tolist(), seen.tolist(), strict=True)):
        if start >= keys:
            assert not output[row].any() and bool((lse[row] == -torch.inf).all())
            continue
        k, v = (x[start:keys] for x in shards[request[row]])
        o, exact_lse, bound = exact_attention(
            q[row].float(), [(k, v[..., :value_dim])], scale=0.25, softcap=softcap
        )
        assert ((o - output[row]).norm(dim=-1) <= 2 * bound).all()
        torch.testing.assert_close(lse[row], exact_lse.float(), rtol=2e-6, atol=2e-6)


@pytest.mark.holds("MAP-1")
@pytest.mark.parametrize(("tp", "cp"), [(1, 1), (1, 3), (2, 2), (3, 1), (4, 2)])
@pytest.mark.parametrize(("q_heads", "kv_heads"), [(9, 3), (7, 7), (5, 1)])
def test_any_head_count_at_any_size(
    tp: int, cp: int, q_heads: int, kv_heads: int, on_ranks: Fixture
) -> None:
    """Padded, split, gathered and stripped, the heads are those of attention on one rank."""
    heads = padded_heads(q_heads, kv_heads, tp, cp)
    model = ModelShape(q_heads=heads.q_heads, kv_heads=heads.kv_heads, head_dim=DIM)
    setting = config(f"pr9757/1:C={cp},T=2", model=model, tp_size=tp)
    generator = torch.Generator().manual_seed(0)
    q = torch.randn(1, q_heads, DIM, generator=generator)
    k, v = torch.randn(2, 10, kv_heads, DIM, generator=generator).unbind()

    def body(rank: int) -> Tensor:
        with HelixCache.on(setting, helix_mesh(setting), rope=None) as cache:
            at = rank // cp
            mine_q = heads.pad_q(q).chunk(tp, 1)[at]
            mine_k, mine_v = (heads.pad_kv(x).chunk(tp, 1)[at] for x in (k, v))
            cache.admit(0, 9, lambda at: (mine_k[None, at], mine_v[None, at]))
            step = cache.begin([0])
            attended = cache.attend(step, 0, mine_q, mine_k[9:], mine_v[9:])
            return heads.real(cache.gather(attended))

    expected, _, bound = exact_attention(q[0], [(k, v)])
    for found in on_ranks(tp * cp, body):
        assert found.shape == (1, q_heads, DIM)
        assert ((expected - found[0]).norm(dim=-1) <= 2 * bound).all()


def test_a_latent_is_not_repeated() -> None:
    """Query heads alone are padded."""
    heads = padded_heads(5, 1, 4, 2, latent=True)
    assert (heads.q_heads, heads.kv_heads) == (8, 1)
    model = ModelShape(q_heads=8, kv_heads=1, latent=LatentShape())
    RankBook(config("pr9757/1:C=2,T=4", model=model, tp_size=4), 0)


@pytest.mark.parametrize("counts", [(6, 4, 1, 1), (0, 1, 1, 1), (4, 2, 0, 1), (4, 2, 1, 1.5)])
def test_heads_that_make_no_model(counts: tuple[Any, ...]) -> None:
    """Counts below 1, and KV heads that do not divide, are a sentence."""
    with pytest.raises(ValueError, match="must"):
        padded_heads(*counts)


@pytest.mark.holds("PAGE-1")
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", [1, 2, None])
def test_pages_for_some_work(layout: str, batch: int | None) -> None:
    """They are enough in any order of requests, and one page less is not, for some order."""
    prompts, decoded = [3, 13, 1, 8], [9, 2, 30, 1]
    pages = pages_for(layout, prompts, decoded, batch)

    def refused(pages: list[int]) -> bool:
        """Whether any window of requests, each begun at any shift, is refused a page."""
        size = batch or len(prompts)
        order = sorted(range(len(prompts)), key=lambda i: prompts[i] + decoded[i])
        for shift in range(len(pages)):
            for first in range(len(prompts) - size + 1):
                book = RankBook(config(layout, pages=pages), 0)
                book.ledger.admitted = shift
                try:
                    for id in order[first : first + size]:
                        book.admit(id, prompts[id])
                        book.decode_step([id], [decoded[id]])
                except Refused:
                    return True
        return False

    assert not refused(pages)
    if "balanced" not in layout:  # rotated: the bound is for the worst shift of every request
        for rank in (rank for rank, count in enumerate(pages) if count > 1):
            if len(set(pages)) == 1 or batch is None:
                assert refused([count - (r == rank) for r, count in enumerate(pages)])


def test_work_that_is_none() -> None:
    """A sentence for each."""
    for given in ([], 1, None), ([0], 1, None), ([3], -1, None), ([3], [1, 2], None), ([3], 1, 0):
        with pytest.raises(ValueError, match="must"):
            pages_for("pr9757/1:C=1,T=4", *given)


@pytest.mark.holds("PAGE-3", "LEN-1")
@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_cancelled_step_was_never_there(layout: str, overlap: bool) -> None:
    """Pages, lengths, and all that comes after are those of a history without it.

    Groups over pages and turns, of a request and of a fork that copies; free pages differ only by
    the copies.
    """
    books = [RankBook(config(layout, overlap=overlap), 0) for _ in range(2)]
    for book in books:
        book.admit(0, 5)
        book.decode_step([0], [2])
        book.admit(1, 3)
        book.fork(0, 2)
    once, never = books
    for ids, lens in (([1], [7]), ([0, 1], [1, 9]), ([2, 1], [4, 1])):
        once.decode_step(ids, lens)
        once.cancel(ids)
        assert [once.local_len(id) for id in (0, 1, 2)] == [never.local_len(id) for id in (0, 1, 2)]
        for _ in range(2):
            one, other = (book.decode_step(ids, lens) for book in books)
            assert one.position_ids.tolist() == other.position_ids.tolist()
            assert one.active.tolist() == other.active.tolist()
            if overlap:
                for book in books:
                    book.sampled(ids)
    if overlap:
        once.sampled([0])
        never.sampled([0])
    for book in books:
        for id in (0, 1, 2):
            book.release(id)
        assert book.free_pages == 60
        assert book.ledger.free.tolist() == [60] * len(book.ledger.free)


@pytest.mark.holds("ATT-1")
def test_outputs_do_not_know_of_poison() -> None:
    """A cache alone does not clear pages, whatever the configuration says; asked to, it does."""
    setting = config("pr9757/1:C=1,T=4")
    assert setting.poison
    outputs = []
    for poison in (False, True):
        cache = HelixCache(setting, rank=0, poison=poison)
        cache.pool.fill_(3)
        cache.admit(0, 5, lambda at: tuple(three(0, at.tolist())[1:]))
        outputs.append(cache.decode([0], *three(0, [5])))
        assert bool(cache.pool.isnan().any()) == poison
    assert torch.equal(*outputs)


def test_gathered_is_the_same_everywhere(on_ranks: Fixture) -> None:
    """Every rank holds the slices of all, in their order."""
    setting = config("pr9757/1:C=2,T=2", tp_size=2)

    def body(rank: int) -> Tensor:
        cache = HelixCache.on(setting, helix_mesh(setting))
        assert dist.get_rank() == rank
        return cache.gather(torch.full((3, 2, DIM), float(rank)))

    first, *others = on_ranks(4, body)
    assert first[0, :, 0].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert all(torch.equal(first, other) for other in others)


def test_a_latent_may_come_rotated() -> None:
    """MLA with rope None: the row is cached as it came."""
    model = ModelShape(q_heads=4, kv_heads=1, latent=LatentShape(latent_dim=32, rope_dim=16))
    setting = msgspec.structs.replace(config("pr9757/1:C=1,T=4"), model=model)
    cache = HelixCache(setting, rank=0, rope=None)
    k = torch.randn(1, 5, 1, 48)
    cache.admit(0, 5, lambda at: (k[:, at], None))
    assert torch.equal(k, cache.read(0, 0, 5)[0])
