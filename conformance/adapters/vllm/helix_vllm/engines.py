"""The real code of vLLM 0.33.0 behind the engine protocol, on a machine without a GPU.

Only for an environment of its own (`make conform-vllm`): vLLM pins its own torch. Its Triton
kernels run in Triton's interpreter, on CPU tensors; nothing of vLLM is copied or replaced. What
this module does itself: it numbers requests, gives positions, and tells refusals apart; vLLM's
scheduler, which would do so, schedules by rules of its own.

Not declared, because nothing of it can be reached without a GPU or because vLLM has no such
thing: `cache` and `attention` (its KV writes and attention are CUDA kernels), `fork` (vLLM shares
whole pages by their contents, never one that is being filled), `padding` (dummy rows write to
no slot that could be seen) and `overlap`.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any, ClassVar, Final

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

import torch
import vllm.platforms
from vllm.platforms.interface import Platform

Platform.is_pin_memory_available = classmethod(lambda cls: False)

from vllm.platforms.cpu import CpuPlatform

vllm.platforms._current_platform = CpuPlatform()

from helix_adapters import triton_on_cpu
from helix_conformance.expect.arrays import partial_of
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
    Skip,
)
from helix_spec.layouts import layout_name

triton_on_cpu.mend()

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import parallel_state
from vllm.sampling_params import SamplingParams
from vllm.v1.attention.backends.utils import get_dcp_local_seq_lens
from vllm.v1.attention.ops.dcp import cp_lse_ag_out_rs, dcp_a2a_lse_reduce
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.request import Request, RequestStatus
from vllm.v1.worker import block_table as tables_v1
from vllm.v1.worker.gpu import buffer_utils
from vllm.v1.worker.gpu.block_table import BlockTables
from vllm.v1.worker.gpu.cp_utils import prepare_dcp_local_seq_lens

buffer_utils.is_uva_available = lambda: False  # it takes a CPU to have pinned memory

MAX_REQUESTS: Final = 512
MAX_TOKENS: Final = 4096
"""Sizes of vLLM's persistent buffers: more than any trace of the suite needs."""
NULL_BLOCK: Final = 1
"""vLLM keeps block 0 of a pool for itself; page p of the suite is its block p + 1."""


class TablesV1:
    """The persistent batch of model runner V1: a row of `MultiGroupBlockTable` for each request."""

    def __init__(self, config: Config, rank: int, interleave: int) -> None:
        layout = config.layout
        # The classes ask vLLM's groups for the ranks; nothing is sent.
        group = SimpleNamespace(world_size=layout.cp_size, rank_in_group=rank)
        alone = SimpleNamespace(world_size=1, rank_in_group=0)
        tables_v1.get_dcp_group, tables_v1.get_pcp_group = lambda: group, lambda: alone
        self.sharding = (layout.cp_size, rank, interleave)
        self.tables = tables_v1.MultiGroupBlockTable(
            max_num_reqs=MAX_REQUESTS,
            max_num_batched_tokens=MAX_TOKENS,
            pin_memory=False,
            device=torch.device("cpu"),
            block_sizes=[layout.tokens_per_block],
            max_num_blocks=[_most_blocks(config)],
            cp_kv_cache_interleave_size=interleave,
        )
        self.rows: list[int] = []
        """The request of each row."""

    def add(self, id: int, blocks: list[int]) -> None:
        """A request joins the batch."""
        self.tables.add_row((blocks,), len(self.rows))
        self.rows.append(id)

    def extend(self, id: int, blocks: list[int]) -> None:
        """A request has got more blocks."""
        self.tables.append_row((blocks,), self.rows.index(id))

    def remove(self, id: int) -> None:
        """A request leaves; the last row takes its place."""
        row, last = self.rows.index(id), len(self.rows) - 1
        if row == last:
            self.tables.clear_row(row)
        else:
            self.tables.move_row(last, row)
            self.rows[row] = self.rows[last]
        self.rows.pop()

    def slots(self, ids: list[int], query_lens: list[int], positions: list[int]) -> list[int]:
        """The slot of each new token, by the kernel that the runner launches."""
        for row, id in enumerate(ids):
            other = self.rows.index(id)
            if other != row:
                self.tables.swap_row(row, other)
                self.rows[row], self.rows[other] = self.rows[other], self.rows[row]
        self.tables.commit_block_table(len(ids))
        self.tables.compute_slot_mapping(
            len(ids), _starts(query_lens), torch.tensor(positions, dtype=torch.int64)
        )
        slots: list[int] = self.tables[0].slot_mapping.gpu[: len(positions)].tolist()
        return slots

    def local_lens(self, totals: list[int]) -> list[int]:
        """Tokens on this rank of requests of so many tokens."""
        lens = get_dcp_local_seq_lens(torch.tensor(totals, dtype=torch.int32), *self.sharding)
        return [int(length) for length in lens]


class TablesV2:
    """The block tables of model runner V2, whose requests keep an index for life."""

    def __init__(self, config: Config, rank: int, interleave: int) -> None:
        layout = config.layout
        self.sharding = (layout.cp_size, rank, interleave)
        self.tables = BlockTables(
            block_sizes=[layout.tokens_per_block],
            max_num_reqs=MAX_REQUESTS,
            max_num_batched_tokens=MAX_TOKENS,
            max_num_blocks_per_group=[_most_blocks(config)],
            device=torch.device("cpu"),
            cp_size=layout.cp_size,
            cp_rank=rank,
            cp_interleave=interleave,
        )
        self.free = list(reversed(range(MAX_REQUESTS)))
        self.index: dict[int, int] = {}
        self.lens = torch.zeros(MAX_REQUESTS, dtype=torch.int32)

    def add(self, id: int, blocks: list[int]) -> None:
        """A request joins; its index may have been another's."""
        self.index[id] = self.free.pop()
        self.tables.append_block_ids(self.index[id], (blocks,), overwrite=True)

    def extend(self, id: int, blocks: list[int]) -> None:
        """A request has got more blocks."""
        self.tables.append_block_ids(self.index[id], (blocks,), overwrite=False)

    def remove(self, id: int) -> None:
        """A request leaves."""
        self.free.append(self.index.pop(id))

    def slots(self, ids: list[int], query_lens: list[int], positions: list[int]) -> list[int]:
        """The slot of each new token, by the kernel that the runner launches."""
        self.tables.apply_staged_writes()
        slots = self.tables.compute_slot_mappings(
            torch.tensor([self.index[id] for id in ids], dtype=torch.int32),
            _starts(query_lens),
            torch.tensor(positions, dtype=torch.int64),
            num_tokens_padded=len(positions),
        )
        mine: list[int] = slots[0].tolist()
        return mine

    def local_lens(self, totals: list[int]) -> list[int]:
        """Tokens on this rank of requests of so many tokens."""
        if self.sharding[0] == 1:
            return totals  # the runner calls the kernel with more ranks only
        lens = prepare_dcp_local_seq_lens(
            self.lens, torch.tensor(totals, dtype=torch.int32), len(totals), *self.sharding
        )
        assert lens is not None
        return [int(length) for length in lens[: len(totals)]]


class VllmV1:
    """`KVCacheManager` and the block tables of model runner V1, as one rank sees them.

    vLLM has one manager for all ranks, sized by the smallest pool; here each rank has one of its
    own that is told the same.
    """

    profiles: ClassVar[frozenset[str]] = frozenset(
        {"placement", "lengths", "pages", "speculative", "preempt"}
    )
    needs_processes: ClassVar[bool] = False
    capabilities: ClassVar[Any] = {"layouts": ["vllm_dcp"]}
    freedoms: ClassVar[Any] = {"rewind_pages": "kept"}
    settings: ClassVar[dict[str, str]] = {"vllm": vllm.__version__, "model runner": "V1"}
    tables_class: ClassVar[type[TablesV1] | type[TablesV2]] = TablesV1
    prefix_caching: ClassVar[bool] = False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`; any layout but `vllm_dcp` is."""
        if config_problem(config) is not None or layout_name(config.layout) != "vllm_dcp":
            return Outcome(Reason.BAD_CONFIG)
        layout = config.layout
        self.config, self.cp_size, self.t = config, layout.cp_size, layout.tokens_per_block
        self.requests: dict[int, Any] = {}
        self.open: dict[int, int] = {}
        """Tokens of each request's last group, while some of them may still be rejected."""
        self.tables = self.tables_class(config, self.rank % self.cp_size, self.interleave())
        cache = KVCacheConfig(
            num_blocks=min(config.pages) + NULL_BLOCK,
            kv_cache_tensors=[],
            kv_cache_groups=[_cache_group(self.t)],
        )
        self.manager = KVCacheManager(
            cache,
            max_model_len=config.max_len,
            scheduler_block_size=self.t * self.cp_size,
            hash_block_size=self.t * self.cp_size,
            enable_caching=self.prefix_caching,
            dcp_world_size=self.cp_size,
        )
        return Outcome()

    def interleave(self) -> int:
        """The interleave that vLLM is configured with."""
        interleave = self.config.layout.owner_interleave
        assert interleave is not None
        return interleave

    def apply(self, event: Event) -> Outcome:
        """Let one event happen on this rank."""
        reason = self._refusal(event)
        if reason is not None:
            return Outcome(reason)
        match event:
            case Admit(id, prompt_len):
                return self._place(id, self._request(id, prompt_len), prompt_len)
            case Resume(id):
                request = self.requests[id]
                return self._place(id, request, request.held)
            case Decode(ids, query_lens):
                return self._decode(ids, query_lens)
            case Accept(id, kept):
                self.requests[id].num_computed_tokens -= self.open.pop(id) - kept
            case Preempt(id):
                request = self.requests[id]
                request.held, request.status = request.num_computed_tokens, RequestStatus.PREEMPTED
                request.num_computed_tokens = 0
                self._free(id)
            case Release(id):
                if self.requests[id].status != RequestStatus.PREEMPTED:
                    self._free(id)
                del self.requests[id]
        return Outcome()

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's lengths, by vLLM's formula, and blocks, as its manager has them."""
        live = [id for id, r in self.requests.items() if r.status == RequestStatus.RUNNING]
        asked = [id for id in live if ids is None or id in ids]
        lens = self.tables.local_lens([self.requests[id].num_computed_tokens for id in asked])
        used = min(self.config.pages) - self.manager.block_pool.get_num_free_blocks()
        return RankView(
            dict(zip(asked, lens, strict=True)),
            {id: self._pages(id) for id in asked},
            preempted=sorted(self.requests.keys() - set(live)),
            free_pages=self.config.pages[self.rank % self.cp_size] - used,
        )

    def _refusal(self, event: Event) -> Reason | None:
        """SPEC.md, section 6, but for `out_of_pages`, which vLLM decides."""
        match event:
            case Admit(id, prompt_len):
                if id in self.requests:
                    return Reason.DUPLICATE_REQUEST
                if prompt_len < 1:
                    return Reason.EMPTY_PROMPT
                return Reason.TOO_LONG if prompt_len > self.config.max_len else None
            case Decode(ids, query_lens) | Skip(ids, query_lens):
                if getattr(event, "pad", 0) > 0:
                    return Reason.UNSUPPORTED
                return self._batch_refusal(ids, query_lens, getattr(event, "pad", 0))
            case Accept(id, kept):
                if kept < 1 or kept > self.open.get(id, kept):
                    return Reason.BAD_COUNT
                return self._not_running(id) or (None if id in self.open else Reason.NOTHING_OPEN)
            case Release(id):
                return None if id in self.requests else Reason.UNKNOWN_REQUEST
            case Preempt(id):
                return self._not_running(id)
            case Resume(id):
                if id not in self.requests:
                    return Reason.UNKNOWN_REQUEST
                preempted = self.requests[id].status == RequestStatus.PREEMPTED
                return None if preempted else Reason.NOT_PREEMPTED
        return Reason.UNSUPPORTED

    def _batch_refusal(self, ids: list[int], query_lens: list[int], pad: int) -> Reason | None:
        if not ids or len(ids) != len(query_lens) or min(query_lens) < 1 or pad < 0:
            return Reason.BAD_COUNT
        if len(set(ids)) < len(ids):
            return Reason.DUPLICATE_REQUEST
        for id in ids:
            reason = self._not_running(id)
            if reason is not None:
                return reason
        sizes = dict(zip(ids, query_lens, strict=True))
        if any(self._total(id) + more > self.config.max_len for id, more in sizes.items()):
            return Reason.TOO_LONG
        need = sum(self._need(id, more) for id, more in sizes.items())
        free = self.manager.block_pool.get_num_free_blocks()
        return Reason.OUT_OF_PAGES if need > free else None

    def _not_running(self, id: int) -> Reason | None:
        if id not in self.requests:
            return Reason.UNKNOWN_REQUEST
        running = self.requests[id].status == RequestStatus.RUNNING
        return None if running else Reason.PREEMPTED_REQUEST

    def _request(self, id: int, prompt_len: int) -> Any:
        sampling = SamplingParams(max_tokens=1)
        return Request(str(id), list(range(prompt_len)), sampling, None)

    def _total(self, id: int) -> int:
        total: int = self.requests[id].num_computed_tokens
        return total

    def _need(self, id: int, more: int) -> int:
        """Blocks that a request's next tokens take, as the manager counts them."""
        total = self._total(id)
        need: int = self.manager.coordinator.get_num_blocks_to_allocate(
            request_id=str(id),
            num_tokens=total + more,
            new_computed_blocks=self.manager.empty_kv_cache_blocks.blocks,
            num_encoder_tokens=0,
            total_computed_tokens=total,
            num_local_computed_tokens=total,
            num_tokens_main_model=total + more,
        )
        return need

    def _place(self, id: int, request: Any, total: int) -> Outcome:
        """All tokens of a request at once, as a prompt that is one chunk."""
        cached, found = None, 0
        if self.prefix_caching:
            cached, found, _ = self.manager.get_computed_blocks(request)
        blocks = self.manager.allocate_slots(
            request, total - found, found, cached, full_sequence_must_fit=True
        )
        if blocks is None:
            return Outcome(Reason.OUT_OF_PAGES)
        request.num_computed_tokens, request.status = total, RequestStatus.RUNNING
        self.requests[id] = request
        self.tables.add(id, self.manager.get_block_ids(str(id))[0])
        return Outcome()

    def _decode(self, ids: list[int], query_lens: list[int]) -> Outcome:
        totals = [self._total(id) for id in ids]
        sizes = list(zip(ids, totals, query_lens, strict=True))
        for id, _, more in sizes:
            blocks = self.manager.allocate_slots(self.requests[id], more)
            assert blocks is not None, "the manager has less room than it counted"
            self.tables.extend(id, blocks.get_block_ids()[0])
            self.open[id] = more
        positions = [total + n for _, total, more in sizes for n in range(more)]
        slots = [
            slot - NULL_BLOCK * self.t if slot >= 0 else -1
            for slot in self.tables.slots(ids, query_lens, positions)
        ]
        past_len = self.tables.local_lens(totals)
        for id, total, more in sizes:
            self.requests[id].num_computed_tokens = total + more
        return Outcome(None, past_len, positions, [slot >= 0 for slot in slots], slots)

    def _free(self, id: int) -> None:
        self.open.pop(id, None)
        self.manager.free(SimpleNamespace(request_id=str(id)))
        self.tables.remove(id)

    def _pages(self, id: int) -> list[int]:
        return [block - NULL_BLOCK for block in self.manager.get_block_ids(str(id))[0]]


class VllmV2(VllmV1):
    """`KVCacheManager` and the block tables of model runner V2."""

    settings: ClassVar[dict[str, str]] = {"vllm": vllm.__version__, "model runner": "V2"}
    tables_class: ClassVar[type[TablesV1] | type[TablesV2]] = TablesV2


class VllmV1Strict(VllmV1):
    """V1 without a word of the pages that it keeps."""

    freedoms: ClassVar[Any] = None


class VllmV2Strict(VllmV2):
    """V2 likewise."""

    freedoms: ClassVar[Any] = None


class VllmOldFlag(VllmV1):
    """The interleave is given by `--dcp-kv-cache-interleave-size`, without a KV connector."""

    def interleave(self) -> int:
        """What the model runner reads, once the engine core has adjusted the configuration."""
        parallel = ParallelConfig(dcp_kv_cache_interleave_size=super().interleave())
        parallel.tensor_parallel_size = parallel.decode_context_parallel_size = self.cp_size
        configured = VllmConfig(parallel_config=parallel)
        configured.adjust_dcp_kv_cache_interleave_size([_cache_group(self.t)])
        interleave: int = configured.parallel_config.cp_kv_cache_interleave_size
        return interleave


class VllmPrefixReuse(VllmV1):
    """With prefix caching, on requests whose prompts begin alike."""

    prefix_caching: ClassVar[bool] = True

    def _request(self, id: int, prompt_len: int) -> Any:
        from vllm.utils.hashing import sha256
        from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash

        init_none_hash(sha256)
        return Request(
            str(id),
            list(range(prompt_len)),
            SamplingParams(max_tokens=1),
            None,
            block_hasher=get_request_block_hasher(self.t * self.cp_size, sha256),
        )


class VllmAgRs:
    """`cp_lse_ag_out_rs`: log-sum-exps all-gathered, corrected outputs reduce-scattered."""

    profiles: ClassVar[frozenset[str]] = frozenset({"merge"})
    needs_processes: ClassVar[bool] = True
    settings: ClassVar[dict[str, str]] = {"vllm": vllm.__version__, "dcp_comm_backend": "ag_rs"}
    combine: ClassVar[Any] = staticmethod(cp_lse_ag_out_rs)
    groups: ClassVar[dict[int, Any]] = {}
    """By cp_size, this rank's group."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @classmethod
    def join(cls, world_size: int) -> None:
        """Make a group of every cp_size by vLLM's own function, on vLLM's communicator."""
        rank, ranks = torch.distributed.get_rank(), list(range(world_size))
        with set_current_vllm_config(VllmConfig()):
            parallel_state.init_distributed_environment(
                world_size, rank, local_rank=rank, backend="gloo"
            )
            for size in range(1, world_size + 1):
                groups = [ranks[first : first + size] for first in range(0, world_size, size)]
                cls.groups[size] = parallel_state.init_model_parallel_group(
                    groups, rank, "gloo", group_name=f"dcp{size}"
                )

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        if config_problem(config) is not None:
            return Outcome(Reason.BAD_CONFIG)
        self.config = config
        self.group = self.groups[config.layout.cp_size]
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Merge the partials of the ranks, as one of vLLM's backends hands them over.

        With an even number of tokens as FlashInfer does: in base 2, empty ranks told by
        `seq_lens` while their log-sum-exp is what memory holds. Else in base e, -inf where empty.
        """
        if not isinstance(event, Merge):
            return Outcome(Reason.UNSUPPORTED)
        outputs, lses = (torch.from_numpy(x) for x in partial_of(self.config, event, self.rank))
        natural, empty = bool(len(lses) % 2), dict[str, Any]()
        if not natural:
            held = torch.isfinite(lses[:, 0])
            lses = (lses / math.log(2)).where(held[:, None], 0.25)
            starts = torch.arange(len(lses) + 1, dtype=torch.int32)
            empty = {"seq_lens": held.to(torch.int32), "query_start_loc": starts}
        model = self.config.model
        partials = outputs.to(getattr(torch, model.partial_dtype))
        merged = self.combine(partials, lses, self.group, is_lse_base_on_e=natural, **empty)
        return Outcome(output=merged.to(getattr(torch, model.dtype)).float().numpy())

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """A merge leaves nothing behind."""
        return RankView({})


class VllmA2a(VllmAgRs):
    """`dcp_a2a_lse_reduce`: outputs and log-sum-exps in one all-to-all, merged on arrival."""

    settings: ClassVar[dict[str, str]] = {"vllm": vllm.__version__, "dcp_comm_backend": "a2a"}
    combine: ClassVar[Any] = staticmethod(dcp_a2a_lse_reduce)


def _cache_group(block_size: int) -> Any:
    """The one group of layers of a model whose layers all attend to everything."""
    spec = FullAttentionSpec(
        block_size=block_size, num_kv_heads=1, head_size=16, dtype=torch.float32
    )
    return KVCacheGroupSpec(["layer"], spec)


def _most_blocks(config: Config) -> int:
    """Blocks of a row of the block table: those of the longest request."""
    layout = config.layout
    return -(-config.max_len // (layout.tokens_per_block * layout.cp_size))


def _starts(query_lens: list[int]) -> torch.Tensor:
    """Where each request's tokens begin, and where the last one's end."""
    ends = torch.tensor([0, *query_lens], dtype=torch.int32).cumsum(0)
    return ends.to(torch.int32)
