"""The real code of SGLang 0.5.23 behind the engine protocol, on a machine without a GPU.

Only for an environment of its own (`make conform-sglang`): SGLang pins its own torch. Its Triton
kernels run in Triton's interpreter, on CPU tensors; nothing of SGLang is copied or replaced. What
this module does itself: it numbers requests, gives positions, and tells refusals apart; SGLang's
scheduler, which would do so, schedules by rules of its own.

A location is SGLang's number of a token's slot, "widened": T * C of them make a page, and location
l lies on rank l mod C, in row l // C. So its layout is `vllm_dcp` with I = 1, and a page of SPEC.md
is a widened page; page 0 is SGLang's own.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, ClassVar, Final

from helix_sglang import on_cpu  # first: it lets SGLang be imported

import numpy as np
import sglang
import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.distributed.parallel_state import GroupCoordinator
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.dcp import (
    cp_lse_ag_out_rs_mha,
    cp_lse_ag_out_rs_mla,
    dcp_a2a_lse_reduce,
    update_local_kv_lens_for_dcp,
)
from sglang.srt.layers.dcp.layout import get_dcp_chain_spec_lens, localize_dcp_indices
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.managers.schedule_batch import ReqKvInfo
from sglang.srt.mem_cache import allocation
from sglang.srt.mem_cache.allocator.paged import PagedTokenToKVPoolAllocator
from sglang.srt.mem_cache.kv_index_translator import KVIndexTranslator
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, MLATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardBatch, ForwardMode
from sglang.srt.runtime_context import get_parallel

from helix_adapters.requests import refusal
from helix_conformance.expect.arrays import Tokens, entries, partial_of, queries, values
from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome, RankView
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Merge,
    Preempt,
    Reason,
    Release,
    Resume,
)
from helix_spec.layouts import layout_name

MAX_REQUESTS: Final = 512
"""Rows of SGLang's table of locations: more than any trace of the suite needs."""
OWN_PAGE: Final = 1
"""SGLang keeps page 0 of a pool for itself; page p of the suite is its page p + 1."""
POWERS: Final = [1, 2, 4, 8, 16, 32, 64, 128, 256]
"""What `tl.arange` takes, of the products T * C that the kernels hand it."""
SHORT: Final = {"max_len": {"max": 64}, "batch": {"max": 8}}
"""The interpreter takes milliseconds for a token: larger ones are not tried, for time alone."""


@dataclass
class Request:
    """One request; `kv` is SGLang's record of its row and of the locations that it holds."""

    kv: ReqKvInfo
    total: int = 0
    open: int | None = None
    preempted: bool = False
    tokens: list[tuple[int, int]] = field(default_factory=list)
    """By position, the event that created the token and its place in that event."""


class Cache:
    """Allocator and KV pool of one rank, with latent rows (MLA), written as SGLang's models do."""

    profiles: ClassVar[frozenset[str]] = frozenset(
        {"placement", "lengths", "pages", "cache", "speculative", "preempt"}
    )
    needs_processes: ClassVar[bool] = False
    capabilities: ClassVar[Any] = {
        "layouts": ["vllm_dcp"],
        "interleave": [1],
        "attention": ["latent"],
        "rope": ["none"],
    }
    freedoms: ClassVar[Any] = {"rewind_pages": "kept"}
    settings: ClassVar[dict[str, str]] = {"sglang": sglang.__version__, "kernels": "torch"}
    triton: ClassVar[bool] = False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`; any layout but `vllm_dcp` with I = 1 is."""
        layout = config.layout
        if config_problem(config) is not None or layout_name(layout) != "vllm_dcp":
            return Outcome(Reason.BAD_CONFIG)
        if layout.owner_interleave != 1:
            return Outcome(Reason.BAD_CONFIG)
        self.config, self.profiles_checked = config, profiles
        self.cp_size, self.t = layout.cp_size, layout.tokens_per_block
        self.tp_rank, self.cp_rank = divmod(self.rank, self.cp_size)
        self.requests: dict[int, Request] = {}
        self.events = 0
        with self._topology():
            self._make_pools()
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Let one event happen on this rank."""
        self.events += 1
        reason = refusal(event, self.requests, self.config, self.profiles)
        if reason is not None:
            return Outcome(reason)
        with self._topology():
            return self._happen(event)

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's lengths, by SGLang's formula; pages and rows, as its table names them."""
        live = [id for id, request in self.requests.items() if not request.preempted]
        asked = [id for id in live if ids is None or id in ids]
        tables = {id: self._table(self.requests[id]) for id in asked}
        with self._topology():
            lens = self._local_lens([self.requests[id].total for id in asked])
            rows = {id: self._rows(table) for id, table in tables.items()}
        used = min(self.config.pages) - self.allocator.available_size() // (self.t * self.cp_size)
        return RankView(
            dict(zip(asked, lens, strict=True)),
            tables,
            preempted=sorted(self.requests.keys() - set(live)),
            free_pages=self.config.pages[self.cp_rank] - used,
            keys={id: keys for id, (keys, _) in rows.items()},
            values={id: values for id, (_, values) in rows.items()},
        )

    @contextmanager
    def _topology(self) -> Iterator[None]:
        """What SGLang's process-wide context says to this rank."""
        on_cpu.launch_triton(self.triton)
        ranks = self.cp_size * self.config.tp_size
        with get_parallel().override(
            **dict.fromkeys(("tp_size", "attn_tp_size", "moe_tp_size"), ranks),
            **dict.fromkeys(("tp_rank", "attn_tp_rank"), self.rank),
            **dict.fromkeys(("dcp_size", "attn_dcp_size"), self.cp_size),
            **dict.fromkeys(("dcp_rank", "attn_dcp_rank"), self.cp_rank),
            dcp_enabled=self.cp_size > 1,
            **self._groups(),
        ):
            yield

    def _groups(self) -> dict[str, Any]:
        return {}

    def _make_pools(self) -> None:
        # All ranks allocate alike, so SGLang has every pool as large as the smallest.
        size = min(self.config.pages) * self.t
        self.kv_pool = self._make_kv_pool(size)
        self.allocator = PagedTokenToKVPoolAllocator(
            size * self.cp_size,
            page_size=self.t * self.cp_size,
            dtype=self.kv_pool.dtype,
            device="cpu",
            kvcache=self.kv_pool,
            need_sort=False,
        )
        # Kept pages may reach beyond the longest request.
        self.rows = ReqToTokenPool(MAX_REQUESTS, 2 * self.config.max_len, "cpu", False)
        # Without sharing of prefixes there is nothing to evict.
        self.tree = SimpleNamespace(
            token_to_kv_pool_allocator=self.allocator,
            supports_prefix_sharing=lambda: False,
            available_and_evictable_str=lambda: "",
            pretty_print=lambda: None,
        )

    def _make_kv_pool(self, size: int) -> Any:
        latent = self.config.model.latent
        assert latent is not None
        return MLATokenToKVPool(
            size,
            page_size=self.t,
            dtype=getattr(torch, self.config.model.cached_dtype),
            kv_lora_rank=latent.latent_dim,
            qk_rope_head_dim=latent.rope_dim,
            layer_num=self.config.model.layers,
            device="cpu",
            enable_memory_saver=False,
        )

    def _buffers(self) -> list[Any]:
        """Every buffer of the pool, whose rows are slots of this rank."""
        return list(self.kv_pool.kv_buffer)

    def _happen(self, event: Event) -> Outcome:
        match event:
            case Admit(id, prompt_len, chunk):
                request = Request(ReqKvInfo())
                request.tokens = [(self.events - 1, place) for place in range(prompt_len)]
                if not self._place(request, prompt_len, chunk):
                    return Outcome(Reason.OUT_OF_PAGES)
                self.requests[id] = request
            case Resume(id):
                request = self.requests[id]
                if not self._place(request, request.total, 0):
                    return Outcome(Reason.OUT_OF_PAGES)
                request.preempted = False
            case Decode(ids, query_lens):
                return self._decode([self.requests[id] for id in ids], query_lens)
            case Accept(id, kept):
                request = self.requests[id]
                assert request.open is not None
                request.total -= request.open - kept
                request.open = None
                del request.tokens[request.total :]
            case Preempt(id):
                self._free(self.requests[id])
                self.requests[id].preempted = True
            case Release(id):
                request = self.requests.pop(id)
                if not request.preempted:
                    self._free(request)
            case _:  # a skip: nothing was prepared
                return self._skip(event)
        return Outcome()

    def _skip(self, event: Any) -> Outcome:
        requests = [self.requests[id] for id in event.ids]
        fits = self._fits(requests, event.query_lens)
        return Outcome() if fits else Outcome(Reason.OUT_OF_PAGES)

    def _place(self, request: Request, total: int, chunk: int) -> bool:
        """Place a prompt, chunk by chunk; False when its pages are not there."""
        page = self.t * self.cp_size
        if -(-total // page) * page > self.allocator.available_size():
            return False
        self.rows.alloc([request])
        request.kv.kv_allocated_len = request.total = 0
        request.open = None
        for start in range(0, total, chunk or total):
            more = min(chunk or total, total - start)
            before = self._locations(request)
            locations = allocation.alloc_paged_token_slots_extend(
                self.tree,
                *_twice([start]),
                *_twice([start + more]),
                last_loc=before[-1:] if start else _ints([-1]),
                extend_num_tokens=more,
            )
            allocation.write_cache_indices(
                locations,
                *[_ints([request.kv.req_pool_idx])] * 2,
                *_twice([start]),
                *_twice([start + more]),
                *_twice([more]),
                [before],
                self.rows,
            )
            request.kv.kv_allocated_len = start + more
            self._poison(before, locations)
            self._prefill(request, start, locations)
            request.total = start + more
        return True

    def _fits(self, requests: list[Request], query_lens: list[int]) -> bool:
        page = self.t * self.cp_size
        need = sum(
            max(0, -(-(r.total + more) // page) - -(-r.kv.kv_allocated_len // page))
            for r, more in zip(requests, query_lens, strict=True)
        )
        return bool(need * page <= self.allocator.available_size())

    def _decode(self, requests: list[Request], query_lens: list[int]) -> Outcome:
        if not self._fits(requests, query_lens):
            return Outcome(Reason.OUT_OF_PAGES)
        totals = [request.total for request in requests]
        pairs = list(zip(totals, query_lens, strict=True))
        before = torch.cat([self._locations(request) for request in requests])
        single = all(more == 1 for more in query_lens)
        if single and totals == [request.kv.kv_allocated_len for request in requests]:
            self._allocate_step(requests, totals)
        else:
            self._allocate_groups(requests, [total + more for total, more in pairs])
        place = 0
        for request, more in zip(requests, query_lens, strict=True):
            request.tokens += [(self.events - 1, place + n) for n in range(more)]
            place += more
        positions = [total + n for total, more in pairs for n in range(more)]
        locations = torch.cat(
            [
                self.rows.req_to_token[request.kv.req_pool_idx, total : total + more].long()
                for request, (total, more) in zip(requests, pairs, strict=True)
            ]
        )
        self._poison(before, locations)
        slots = localize_dcp_indices(locations, self.cp_size, self.cp_rank).tolist()
        past_len = self._local_lens(totals)
        visible = [
            int(seen)
            for total, more in pairs
            for seen in get_dcp_chain_spec_lens(
                _ints([total + more]), more, self.cp_size, self.cp_rank
            )
        ]
        output = self._step(requests, totals, query_lens, locations)
        for request, more in zip(requests, query_lens, strict=True):
            request.total += more
            request.open = more
        return Outcome(
            None,
            past_len,
            positions,
            [slot >= 0 for slot in slots],
            [slot - OWN_PAGE * self.t if slot >= 0 else -1 for slot in slots],
            visible,
            output,
        )

    def _allocate_step(self, requests: list[Request], totals: list[int]) -> None:
        """A location for one token of each request, as `alloc_for_decode` does."""
        rows = _ints([request.kv.req_pool_idx for request in requests])
        ends = _ints([total + 1 for total in totals])
        last = self.rows.req_to_token[rows, ends - 2].long()
        locations = allocation.alloc_paged_token_slots_decode(self.tree, ends, ends, last)
        self.rows.write((rows, ends - 1), locations.to(torch.int32))
        for request in requests:
            request.kv.kv_allocated_len += 1

    def _allocate_groups(self, requests: list[Request], ends: list[int]) -> None:
        """Locations up to these lengths, by what speculative decoding calls."""
        held = [request.kv.kv_allocated_len for request in requests]
        ends = [max(have, end) for have, end in zip(held, ends, strict=True)]
        allocation.alloc_for_spec_decode(
            self.tree,
            self.rows,
            reqs=requests,
            req_pool_indices=_ints([request.kv.req_pool_idx for request in requests]),
            cur_kv_lens=_ints(held),
            cur_kv_lens_cpu=_ints(held),
            nxt_kv_lens=_ints(ends),
            nxt_kv_lens_cpu=_ints(ends),
            num_needed_tokens=sum(ends) - sum(held),
            batch=SimpleNamespace(device="cpu", hisparse_coordinator=None),
        )

    def _free(self, request: Request) -> None:
        self.allocator.free(self._locations(request))
        self.rows.free(request)
        request.open = None

    def _locations(self, request: Request) -> Any:
        """The locations that a request holds, by position."""
        held = self.rows.req_to_token[request.kv.req_pool_idx, : request.kv.kv_allocated_len]
        return held.long()

    def _table(self, request: Request) -> list[int]:
        page = self.t * self.cp_size
        table: list[int] = (self._locations(request)[::page] // page - OWN_PAGE).tolist()
        return table

    def _local_lens(self, totals: list[int]) -> list[int]:
        lens = torch.tensor(totals, dtype=torch.int32)
        update_local_kv_lens_for_dcp(lens)
        local: list[int] = lens.tolist()
        return local

    def _poison(self, before: Any, locations: Any) -> None:
        """Fill the pages that were just taken with NaN, where the configuration asks for it."""
        if not self.config.poison:
            return
        page = self.t * self.cp_size
        for number in set((locations // page).tolist()) - set((before // page).tolist()):
            for buffer in self._buffers():
                buffer[number * self.t : (number + 1) * self.t] = _nan(buffer.dtype)

    def _prefill(self, request: Request, start: int, locations: Any) -> None:
        """Write the tokens of a prompt from `start` on."""
        self._write(self._tokens([request], [start], [len(locations)]), locations)

    def _step(
        self, requests: list[Request], totals: list[int], query_lens: list[int], locations: Any
    ) -> Any:
        """Write a step's tokens; return the attention output of an engine that has one."""
        self._write(self._tokens(requests, totals, query_lens), locations)

    def _write(self, tokens: Tokens, locations: Any) -> None:
        latent, model = self.config.model.latent, self.config.model
        assert latent is not None
        rows = self._tensor(
            entries(self.config.seed, tokens, model.layers, "k", [0], model.key_dim)
        )
        for layer, row in enumerate(rows):
            self.kv_pool.set_mla_kv_buffer(
                SimpleNamespace(layer_id=layer),
                locations,
                row[..., : latent.latent_dim].contiguous(),
                row[..., latent.latent_dim :].contiguous(),
            )

    def _rows(self, table: list[int]) -> tuple[Any, Any]:
        slots = _slots(table, self.t)
        keys = torch.stack(
            [self.kv_pool.get_key_buffer(i)[slots] for i in range(self.config.model.layers)]
        )
        numbers = keys.float().numpy()
        return numbers, numbers[..., : self.config.model.value_dim]

    def _tokens(self, requests: list[Request], starts: list[int], lens: list[int]) -> Tokens:
        """Identities and positions of tokens, request after request."""
        spans = [range(start, start + more) for start, more in zip(starts, lens, strict=True)]
        named = [
            (*request.tokens[position], position)
            for request, span in zip(requests, spans, strict=True)
            for position in span
        ]
        return Tokens(*np.array(named, dtype=np.int64).reshape(-1, 3).T)

    def _tensor(self, numbers: Any) -> Any:
        return torch.from_numpy(numbers).to(getattr(torch, self.config.model.dtype))


class CacheStrict(Cache):
    """Without a word of the pages that it keeps."""

    freedoms: ClassVar[Any] = None


class CacheTriton(Cache):
    """The same by SGLang's Triton kernels, which take powers of two."""

    capabilities: ClassVar[Any] = {
        **Cache.capabilities,
        **SHORT,
        "cp_size": POWERS,
        "tokens_per_block": POWERS,
        "latent": [[32, 16], [64, 16]],
    }
    settings: ClassVar[dict[str, str]] = {"sglang": sglang.__version__, "kernels": "triton"}
    triton: ClassVar[bool] = True


class CacheTritonAnySize(CacheTriton):
    """Without a word of what the kernels do not take."""

    capabilities: ClassVar[Any] = {**Cache.capabilities, **SHORT}


def _ints(numbers: Sequence[Any]) -> Any:
    return torch.tensor(numbers, dtype=torch.int64)


def _twice(numbers: list[int]) -> tuple[Any, Any]:
    """The same on the device and on the CPU, as SGLang's functions take lengths."""
    return _ints(numbers), _ints(numbers)


def _slots(table: list[int], tokens_per_block: int) -> Any:
    """The rows of a rank's buffers that these pages are, in local order."""
    pages = _ints(table)[:, None] + OWN_PAGE
    return (pages * tokens_per_block + torch.arange(tokens_per_block)).flatten()


def _nan(dtype: Any) -> Any:
    """NaN, as it is kept in a buffer of this type; SGLang keeps 8-bit floats as bytes."""
    return 0x7F if dtype == torch.uint8 else math.nan


class Groups:
    """The ranks' groups, made by SGLang's own `GroupCoordinator` over gloo."""

    needs_processes: ClassVar[bool] = True
    groups: ClassVar[dict[int, Any]] = {}
    """By cp_size, this rank's group."""

    @classmethod
    def join(cls, world_size: int) -> None:
        """Make a group of every cp_size; ranks that are left over have a smaller one."""
        for size in range(1, world_size + 1):
            ranks = [range(first, first + size) for first in range(0, world_size, size)]
            cls.groups[size] = GroupCoordinator(
                [[rank for rank in some if rank < world_size] for some in ranks],
                local_rank=torch.distributed.get_rank(),
                torch_distributed_backend="gloo",
                use_pynccl=False,
                use_mscclpp=False,
                use_custom_allreduce=False,
                use_torch_symm_mem_all_reduce=False,
                use_hpu_communicator=False,
                use_xpu_communicator=False,
                group_name=f"dcp{size}",
            )


class Attention(Groups, CacheTriton):
    """`TritonAttnBackend` over `MHATokenToKVPool`, decode and chunked prefill."""

    profiles: ClassVar[frozenset[str]] = frozenset(
        {"placement", "lengths", "pages", "cache", "attention", "preempt"}
    )
    # Probabilities meet V in its dtype. The interpreter multiplies bfloat16 and 8-bit floats as the
    # integers that it keeps them as. A first chunk below C tokens hangs (FINDINGS.md, 11).
    capabilities: ClassVar[Any] = [
        {
            **Cache.capabilities,
            **SHORT,
            "attention": ["gqa"],
            "cp_size": [cp_size],
            "chunk": {"min": cp_size},
            "tokens_per_block": POWERS,
            "dtype": [dtype],
            "cache_dtype": [dtype],
            "product_dtype": [dtype],
        }
        for cp_size in (1, 2, 4, 8)
        for dtype in ("float32", "float16")
    ]
    freedoms: ClassVar[Any] = None
    settings: ClassVar[dict[str, str]] = {
        "sglang": sglang.__version__,
        "kernels": "triton",
        "attention backend": "triton",
    }

    def _groups(self) -> dict[str, Any]:
        return {"dcp_group": self.groups[self.cp_size]}

    def _make_kv_pool(self, size: int) -> Any:
        model = self.config.model
        self.kv_heads = self.config.kv_heads_of(self.tp_rank)
        return MHATokenToKVPool(
            size,
            page_size=self.t,
            dtype=getattr(torch, model.cached_dtype),
            head_num=len(self.kv_heads),
            head_dim=model.head_dim,
            layer_num=model.layers,
            device="cpu",
            enable_memory_saver=False,
            enable_alt_stream=False,
        )

    def _buffers(self) -> list[Any]:
        return [*self.kv_pool.k_buffer, *self.kv_pool.v_buffer]

    def _make_pools(self) -> None:
        super()._make_pools()
        model = self.config.model
        heads = model.q_heads // (self.cp_size * self.config.tp_size)
        self.q_heads = range(self.rank * heads, (self.rank + 1) * heads)
        self.translator = KVIndexTranslator(
            req_to_token=self.rows.req_to_token,
            token_to_kv_pool_allocator=self.allocator,
            token_to_kv_pool=self.kv_pool,
            page_size=self.t,
            device="cpu",
        )
        self.backend = TritonAttnBackend(self._runner())
        self.layers = [
            RadixAttention(
                num_heads=heads,
                head_dim=model.head_dim,
                scaling=model.scale or 1 / math.sqrt(model.head_dim),
                num_kv_heads=len(self.kv_heads),
                layer_id=layer,
            )
            for layer in range(model.layers)
        ]

    def _runner(self) -> Any:
        """What the backend reads of SGLang's model runner."""
        model, text = self.config.model, SimpleNamespace(architectures=["Any"])
        text.get_text_config = lambda: text
        shape = SimpleNamespace(
            attention_arch=AttentionArch.MHA,
            context_len=self.config.max_len,
            head_dim=model.head_dim,
            v_head_dim=model.head_dim,
            swa_v_head_dim=model.head_dim,
            is_encoder_decoder=False,
            hf_config=text,
            hf_text_config=text,
            linear_attn_registry_result=None,
            get_max_num_attention_heads=lambda: model.q_heads,
            get_num_kv_heads=lambda tp_size, dcp_size=1: model.kv_heads // (tp_size // dcp_size),
        )
        return SimpleNamespace(
            req_to_token_pool=self.rows,
            token_to_kv_pool=self.kv_pool,
            token_to_kv_pool_allocator=self.allocator,
            kv_index_translator=self.translator,
            sliding_window_size=None,
            page_size=self.t,
            decode_num_tokens_per_req=lambda: 1,
            model_config=shape,
            device="cpu",
            gpu_id=0,
            is_draft_worker=False,
        )

    def _batch(
        self, mode: ForwardMode, requests: list[Request], ends: list[int], positions: Any, to: Any
    ) -> ForwardBatch:
        """A batch of requests of so many tokens, the last of which are new."""
        batch = ForwardBatch(
            forward_mode=mode,
            batch_size=len(requests),
            input_ids=torch.zeros(len(to), dtype=torch.int64),
            req_pool_indices=_ints([request.kv.req_pool_idx for request in requests]),
            seq_lens=_ints(ends),
            seq_lens_cpu=_ints(ends),
            out_cache_loc=to,
            seq_lens_sum=sum(ends),
            positions=_ints(positions),
        )
        self.translator.bind_own_plan(batch)
        return batch

    def _prefill(self, request: Request, start: int, locations: Any) -> None:
        more = len(locations)
        tokens = self._tokens([request], [start], [more])
        mode = ForwardMode.EXTEND
        batch = self._batch(mode, [request], [start + more], tokens.positions, locations)
        batch.extend_prefix_lens, batch.extend_prefix_lens_cpu = _ints([start]), [start]
        batch.extend_seq_lens, batch.extend_seq_lens_cpu = _ints([more]), [more]
        batch.extend_num_tokens = more
        if self.config.admission == "prefill":
            self._attend(batch, tokens, self.backend.forward_extend)
            return
        for layer, (k, v) in zip(self.layers, self._kv(tokens), strict=True):
            self.backend._set_kv_buffer(batch, layer, None, k, v)

    def _step(
        self, requests: list[Request], totals: list[int], query_lens: list[int], locations: Any
    ) -> Any:
        tokens = self._tokens(requests, totals, query_lens)
        ends = [total + 1 for total in totals]
        batch = self._batch(ForwardMode.DECODE, requests, ends, tokens.positions, locations)
        return self._attend(batch, tokens, self.backend.forward_decode)

    def _attend(self, batch: ForwardBatch, tokens: Tokens, forward: Any) -> Any:
        """The output of every layer: (layers, tokens, heads of this rank, head_dim)."""
        self.backend.init_forward_metadata(batch)
        model = self.config.model
        q = self._tensor(queries(model, self.config.seed, tokens, self.q_heads))
        outputs = [
            forward(q[i].flatten(1), k, v, self.layers[i], batch)
            for i, (k, v) in enumerate(self._kv(tokens))
        ]
        shape = (model.layers, len(tokens.positions), len(self.q_heads), model.head_dim)
        return torch.stack(outputs).float().numpy().reshape(shape)

    def _kv(self, tokens: Tokens) -> list[tuple[Any, Any]]:
        """K and V of each layer."""
        model, seed, heads = self.config.model, self.config.seed, self.kv_heads
        keys = self._tensor(entries(seed, tokens, model.layers, "k", heads, model.head_dim))
        return list(zip(keys, self._tensor(values(model, seed, tokens, heads)), strict=True))

    def _rows(self, table: list[int]) -> tuple[Any, Any]:
        slots, layers = _slots(table, self.t), range(self.config.model.layers)
        keys, values = (
            torch.stack([get(layer)[slots] for layer in layers]).float().numpy()
            for get in (self.kv_pool.get_key_buffer, self.kv_pool.get_value_buffer)
        )
        return keys, values


class AttentionAnyChunk(Attention):
    """Without a word of the chunks that hang."""

    capabilities: ClassVar[Any] = {**Cache.capabilities, **SHORT, "attention": ["gqa"]}


class AgRsMla(Groups):
    """`cp_lse_ag_out_rs_mla`: log-sum-exps all-gathered, corrected outputs reduce-scattered.

    It is handed what SGLang's MLA backends hand it: an output of 0 where a rank has no keys.
    """

    profiles: ClassVar[frozenset[str]] = frozenset({"merge"})
    capabilities: ClassVar[Any] = {"cp_size": POWERS}
    settings: ClassVar[dict[str, str]] = {"sglang": sglang.__version__, "dcp_comm_backend": "ag_rs"}
    cleans: ClassVar[bool] = True

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        if config_problem(config) is not None:
            return Outcome(Reason.BAD_CONFIG)
        self.config, self.group = config, self.groups[config.layout.cp_size]
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Merge the partials of the ranks.

        With an even number of tokens in base 2, empty ranks told by +inf, as FlashMLA tells them;
        else in base e, by -inf.
        """
        if not isinstance(event, Merge):
            return Outcome(Reason.UNSUPPORTED)
        outputs, lses = (torch.from_numpy(x) for x in partial_of(self.config, event, self.rank))
        if self.cleans:
            outputs[torch.isinf(lses)] = 0
        model = self.config.model
        partials = outputs.to(getattr(torch, model.partial_dtype))
        merged = self.merged(partials, lses, natural=bool(len(lses) % 2))
        return Outcome(output=merged.to(getattr(torch, model.dtype)).float().numpy())

    def merged(self, partials: Any, lses: Any, *, natural: bool) -> Any:
        """The heads of this rank's slice: (tokens, heads, elements)."""
        lses = self.in_base(lses, natural=natural)
        merged = cp_lse_ag_out_rs_mla(partials, lses, self.group, is_lse_base_on_e=natural)
        # SGLang's caller turns the axes back, where there is more than one rank.
        return merged if self.group.world_size == 1 else merged.transpose(0, 1)

    @staticmethod
    def in_base(lses: Any, *, natural: bool) -> Any:
        """The log-sum-exps as a backend hands them over."""
        return lses if natural else (lses / math.log(2)).where(~torch.isinf(lses), math.inf)

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """A merge leaves nothing behind."""
        return RankView({})


class A2a(AgRsMla):
    """`dcp_a2a_lse_reduce`: outputs and log-sum-exps in one all-to-all, merged on arrival."""

    capabilities: ClassVar[Any] = None
    settings: ClassVar[dict[str, str]] = {"sglang": sglang.__version__, "dcp_comm_backend": "a2a"}

    def merged(self, partials: Any, lses: Any, *, natural: bool) -> Any:
        """See `AgRsMla.merged`."""
        lses = self.in_base(lses, natural=natural)
        return dcp_a2a_lse_reduce(partials, lses, self.group, is_lse_base_on_e=natural)


class AgRsMha(AgRsMla):
    """`cp_lse_ag_out_rs_mha`: outputs weighted in torch and all-reduced, in base e alone."""

    capabilities: ClassVar[Any] = None
    settings: ClassVar[dict[str, str]] = {"sglang": sglang.__version__, "merge": "mha"}
    cleans: ClassVar[bool] = False

    def merged(self, partials: Any, lses: Any, *, natural: bool) -> Any:
        """See `AgRsMla.merged`; SGLang's callers hand it partials in float32."""
        return cp_lse_ag_out_rs_mha(partials.float(), lses, self.group)


class AgRsMlaAnything(AgRsMla):
    """Handed what memory holds where a rank has no keys; any number of ranks."""

    capabilities: ClassVar[Any] = None
    cleans: ClassVar[bool] = False


class A2aAnything(A2a):
    """Handed what memory holds where a rank has no keys."""

    cleans: ClassVar[bool] = False


class AgRsMhaPlusInf(AgRsMha):
    """Handed +inf by a rank without keys, as FlashAttention tells it."""

    def merged(self, partials: Any, lses: Any, *, natural: bool) -> Any:
        """See `AgRsMla.merged`."""
        return super().merged(partials, lses.abs().where(torch.isinf(lses), lses), natural=True)
