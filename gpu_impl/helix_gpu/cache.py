"""`HelixCache`: one rank's share of a sharded decode KV cache, with RoPE, GQA and padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal, Self

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from helix_gpu.attention.backends import AttendPages
from helix_gpu.attention.merge import merge
from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.partials import pack, unpack
from helix_gpu.attention.rope import rope_table, rotate
from helix_gpu.bookkeeping.ledger import Admission, Ints, Step
from helix_gpu.bookkeeping.rank_book import PageCopy, RankBook, RankStep
from helix_gpu.bookkeeping.refusals import check_config
from helix_gpu.comm.exchange import Exchange, MakeExchange, all_to_all
from helix_gpu.comm.hop_b import Costs, Lane, SameLane
from helix_gpu.comm.mesh import check_mesh, slice_of
from helix_spec.config import Config

if TYPE_CHECKING:
    from helix_gpu.attention.kernels.step import StepBuffers

Backend = Literal["torch", "triton"] | AttendPages
"""What attends over a rank's own pages: see `HelixCache`."""
PromptKV = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From int64 positions [n] to K (not yet rotated) and V, each [layers, n, kv_heads, head_dim].

With a latent cache K is the latent and the part to rotate, [layers, n, 1, latent_dim + rope_dim],
and V is None."""


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """A decode step, or a piece of a prompt, begun: what each of this rank's layers needs.

    `book` says where the new tokens are. The tensors lie on the cache's device and have a row for
    each new token, then one for each dummy request, which has position 0, sees nothing and is
    written nowhere.
    """

    book: RankStep
    outputs: int
    """Rows that `attend` returns: those of the new tokens."""
    cos: Tensor
    sin: Tensor
    tables: Tensor
    lengths: Tensor
    slots: Tensor
    """int64: where each row's K and V are written, -1 where that is not on this rank."""
    buffers: StepBuffers | None
    """What the kernels write on the way, where these rows go through them together."""
    halves: tuple[DecodeStep, ...] = ()
    """With HOP-B, where it pays: two steps over parts of these very tensors."""

    def split(self) -> tuple[DecodeStep, DecodeStep]:
        """Return the first half of the rows, and the others."""
        border = len(self.lengths) // 2
        first, second = (
            replace(
                self, cos=self.cos[part], sin=self.sin[part], tables=self.tables[part],
                lengths=self.lengths[part], slots=self.slots[part],
            )
            for part in (slice(0, border), slice(border, None))
        )  # fmt: skip
        return first, second

    def parts(self) -> list[tuple[slice, DecodeStep]]:
        """Return what attends and travels together: rows, and the step that they are."""
        if not self.halves:
            return [(slice(None), self)]
        border = len(self.halves[0].lengths)
        return list(zip((slice(0, border), slice(border, None)), self.halves, strict=True))


class HelixCache:
    """The KV cache of one rank, all layers.

    `HelixCache.on` takes rank, group and device from a mesh. Every rank makes the same calls. Heads
    are counted per rank: `kv_heads` and `q_heads` of its tensor-parallel shard before the exchange;
    after it the rank holds slice `rank` of all query heads, of q_heads / (tp_size * cp_size) heads
    (MAP-1).

    With a latent cache (MLA, `config.model.latent`) every rank caches the one latent: K is its
    latent and rotated parts side by side, V is None, Q is absorbed (multiplied by the up-projection
    of K) with its part to rotate behind, and outputs are over the latent. For `head_dim` read
    latent_dim + rope_dim, in outputs latent_dim.

    With `cache_dtype` K and V are rounded to it as they are stored, without a scale: what lies
    beyond its largest number, 448, must be divided by a scale before, and Q or the output
    multiplied by it.

    Methods that change something raise Refused before they do, the same on all ranks, and
    ValueError for tensors of the wrong shape or type.

    The cache holds the group: drop it before `destroy_process_group`, for torch 2.13 often aborts a
    process that still refers to a gloo group when it exits.

    Parameters
    ----------
    config : Config
    rank : int
        Global rank, tp_rank * cp_size + cp_rank.
    group : ProcessGroup, optional
        The ranks of this tp_rank, in the order of their cp_rank; not needed when cp_size is 1.
    device : torch.device or str
    exchange : Exchange, optional
        Used in place of the group's all-to-all.
    backend : {"torch", "triton"} or AttendPages, optional
        What attends: `torch` (only on the CPU, where it is the default), `triton`, the kernels of
        `attention.kernels`, or a function such as `attention.native.attend_pages` and those of
        `attention.backends`. The steps of `triton` wait for nothing on the host, and can be
        captured in a CUDA graph: see `reserve` and `graphs`.
    hop_b : Costs, optional
        What attending and exchanging cost here, the same on every rank. With it a step's rows
        attend in two halves, the first of which travels meanwhile, wherever that saves time.

    Raises
    ------
    Refused
        With `bad_config`.
    ValueError
        For a rank or group that does not fit.

    Examples
    --------
    >>> from helix_spec.config import ModelShape
    >>> model = ModelShape(layers=1, q_heads=2, kv_heads=1, head_dim=4, dtype="float32")
    >>> config = Config(layout="pr9757/1:C=1,T=2", pages=[8], max_len=16, model=model)
    >>> cache = HelixCache(config, rank=0)
    >>> cache.admit(7, 3, lambda positions: (torch.zeros(1, 3, 1, 4), torch.ones(1, 3, 1, 4)))
    >>> k, v = torch.zeros(1, 1, 1, 4), torch.full((1, 1, 1, 4), 5.0)
    >>> cache.decode([7], torch.zeros(1, 1, 2, 4), k, v).mean().item()  # of values 1, 1, 1, 5
    2.0
    >>> cache.local_len(7), cache.block_table(7)
    (4, [0, 1])
    """

    @classmethod
    def on(
        cls,
        config: Config,
        mesh: DeviceMesh,
        make_exchange: MakeExchange = all_to_all,
        backend: Backend | None = None,
        hop_b: Costs | None = None,
    ) -> Self:
        """Return the cache of this process on a mesh; every rank calls it.

        Parameters
        ----------
        config : Config
        mesh : DeviceMesh
            With axes ("tp", "cp"), as `helix_mesh` makes it.
        make_exchange : MakeExchange
            One of `comm.exchange`, or `comm.push.push`.
        backend, hop_b
            As the class takes them.

        Raises
        ------
        Refused
            With `bad_config`, before anything else happens.
        ValueError
            For a mesh that does not fit, before anything else happens.
        """
        check_config(config)
        check_mesh(config, mesh)
        exchange = None
        if config.layout.cp_size > 1:
            exchange = make_exchange(mesh.get_group("cp"), config.model)
        return cls(
            config,
            rank=slice_of(mesh),
            device=mesh.device_type,
            exchange=exchange,
            backend=backend,
            hop_b=hop_b,
        )

    def __init__(
        self,
        config: Config,
        *,
        rank: int,
        group: dist.ProcessGroup | None = None,
        device: torch.device | str = "cpu",
        exchange: Exchange | None = None,
        backend: Backend | None = None,
        hop_b: Costs | None = None,
    ) -> None:
        check_config(config)
        if not 0 <= rank < config.world_size:
            raise ValueError(
                f"rank is {rank}; with tp_size * cp_size = {config.world_size} it must lie "
                f"between 0 and {config.world_size - 1}."
            )
        cp_size, model = config.layout.cp_size, config.model
        self.config = config
        self.book = RankBook(config, rank % cp_size)
        self.device = torch.device(device)
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.kv_heads = 1 if model.latent else model.kv_heads // config.tp_size
        self.q_heads = model.q_heads // config.tp_size
        self.pool = torch.empty(
            model.layers,
            config.pages[self.book.cp_rank],
            1 if model.latent else 2,
            config.layout.tokens_per_block,
            self.kv_heads,
            model.key_dim,
            dtype=getattr(torch, model.cached_dtype),
            device=self.device,
        )
        """[layers, pages, 2, tokens_per_block, kv_heads, head_dim]: rotated K, then V.

        With a latent cache [layers, pages, 1, tokens_per_block, 1, latent_dim + rope_dim].
        """
        self._exchange = exchange or _group_exchange(config, group, self.book.cp_rank)
        self.backend: Backend = backend or ("torch" if self.device.type == "cpu" else "triton")
        if self.backend == "torch" and self.device.type != "cpu":
            raise ValueError(f"The backend torch attends on the CPU alone, not on {self.device}.")
        self._reserved: dict[int, DecodeStep] = {}
        self._hop_b = hop_b
        self._lane = Lane(self.device) if hop_b else SameLane()

    @property
    def request_ids(self) -> list[int]:
        """Return the live requests, in the order in which they were placed."""
        return self.book.request_ids

    @property
    def preempted_ids(self) -> list[int]:
        """Return the preempted requests, in rising order."""
        return self.book.preempted_ids

    @property
    def free_pages(self) -> int:
        """Return the number of pages of this rank's pool that no request holds."""
        return self.book.free_pages

    def local_len(self, id: int) -> int:
        """Return the tokens of a live request on this rank.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not live.
        """
        return self.book.local_len(id)

    def block_table(self, id: int) -> list[int]:
        """Return the physical pages of a live request on this rank, in local order.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not live.
        """
        return self.book.block_table(id)

    @torch.no_grad()
    def admit(
        self, id: int, prompt_len: int, prompt_kv: PromptKV, *, rotated: bool = False
    ) -> None:
        """Take this rank's share of a prompt whose KV exists already.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.
        prompt_kv : PromptKV
            Asked once for the rank's positions, after the admission is certain and before anything
            changes; not asked when the rank holds none.
        rotated : bool
            Whether its K is rotated already, as that of another cache is. Otherwise it is rotated
            here.

        Raises
        ------
        Refused
            For an id that is known, an empty prompt, one that is too long, and exhausted pools.
        ValueError
            For K or V of the wrong shape or type.
        """
        self._place(self.book.plan_admit(id, prompt_len), prompt_kv, rotated)

    @torch.no_grad()
    def resume(self, id: int, prompt_kv: PromptKV, *, rotated: bool = False) -> None:
        """Place a preempted request anew, as a prompt of all its tokens so far.

        Parameters
        ----------
        id : int
        prompt_kv : PromptKV
            Asked as `admit` asks it, now for decoded tokens too: K and V come again.
        rotated : bool
            As `admit` takes it.

        Raises
        ------
        Refused
            For a request that is not preempted, and exhausted pools.
        ValueError
            For K or V of the wrong shape or type.
        """
        self._place(self.book.plan_resume(id), prompt_kv, rotated)

    @torch.no_grad()
    def read(self, id: int, first: int, tokens: int) -> tuple[Tensor, Tensor | None]:
        """Return K (rotated) and V of a live request's local indices [first, first + tokens).

        Parameters
        ----------
        id : int
        first : int
            Local index on this rank.
        tokens : int

        Returns
        -------
        k : Tensor, the model's type [layers, tokens, kv_heads, head_dim]
        v : Tensor or None
            As `k`; None where a latent is cached.

        Raises
        ------
        Refused
            For a request that is not live.
        IndexError
            For tokens that are not on this rank.
        """
        table, held = self.book.block_table(id), self.book.local_len(id)
        if not 0 <= first <= first + tokens <= held:
            raise IndexError(
                f"Local indices {first} to {first + tokens - 1} of request {id} are not all here; "
                f"this rank holds {held} of its tokens."
            )
        pages, offsets = self._slots(table, np.arange(first, first + tokens))
        k, *v = (part[:, pages, offsets].to(self.dtype) for part in self.pool.unbind(2))
        return k, v[0] if v else None

    def prefill(self, id: int, prompt_len: int, chunk: int) -> Iterator[DecodeStep]:
        """Take a prompt whose KV is computed here, and return its steps.

        Pages are taken at once. Call `attend` for every layer of each step, in order, before
        anything else that names the request.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.
        chunk : int
            Tokens of a step, at most.

        Returns
        -------
        iterator of DecodeStep

        Raises
        ------
        Refused
            As `admit`.
        ValueError
            For a chunk below one token.
        """
        return self._chunks(self.book.plan_admit(id, prompt_len), chunk)

    def recompute(self, id: int, chunk: int) -> Iterator[DecodeStep]:
        """Resume a preempted request like `prefill`, computing all its tokens again.

        Parameters
        ----------
        id : int
        chunk : int
            Tokens of a step, at most.

        Returns
        -------
        iterator of DecodeStep

        Raises
        ------
        Refused
            As `resume`.
        ValueError
            For a chunk below one token.
        """
        return self._chunks(self.book.plan_resume(id), chunk)

    @torch.no_grad()
    def begin(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> DecodeStep:
        """Begin a step of new tokens for each request: pages are taken, lengths advance.

        Call `attend` once for each layer next. The new tokens stand request after request, m in
        all.

        Parameters
        ----------
        ids : sequence of int, [n]
        query_lens : sequence of int, [n], optional
            New tokens of each request; one unless given.
        pad : int
            Dummy requests behind the real ones.

        Returns
        -------
        DecodeStep

        Raises
        ------
        Refused
            For a batch or a count that is not right, a request that is not live or would be too
            long, and exhausted pools.
        """
        return self._start(self.book.plan_step(ids, query_lens, pad))

    @torch.no_grad()
    def attend(
        self, step: DecodeStep, layer: int, q: Tensor, k: Tensor, v: Tensor | None = None
    ) -> Tensor:
        """Do one layer of a step begun: append K and V where owned, attend, exchange, merge.

        Each token sees those before it and itself, of its own group too.

        Parameters
        ----------
        step : DecodeStep
        layer : int
        q : Tensor, the model's type [m + pad, q_heads, head_dim]
            Not rotated; dummies last, whose content counts for nothing.
        k : Tensor, the model's type [m + pad, kv_heads, head_dim]
            Not rotated.
        v : Tensor, the model's type [m + pad, kv_heads, head_dim], optional
            None exactly where a latent is cached.

        Returns
        -------
        Tensor, the model's type [m, q_heads / cp_size, head_dim]
            The output of this rank's slice of the query heads.

        Raises
        ------
        ValueError
            For tensors of the wrong shape or type.
        """
        model, rows, pool = self.config.model, len(step.lengths), self.pool[layer]
        self._check("Q", q, (rows, self.q_heads, model.key_dim))
        self._check_kv(k, v, (rows, self.kv_heads, model.key_dim))
        v = None if v is None else self._cached(v)
        if self.backend == "triton":
            return self._launch(step, pool, q, k, v)[: step.outputs]
        q, k = rotate(q, step.cos, step.sin), self._cached(rotate(k, step.cos, step.sin))
        own, t = (step.slots >= 0).nonzero()[:, 0], pool.shape[2]
        page, offset = step.slots[own] // t, step.slots[own] % t
        pool[page, 0, offset] = k[own]
        if v is not None:
            pool[page, 1, offset] = v[own]
        local, merged = self.backend if callable(self.backend) else attend_pages, []
        for part, half in step.parts():
            output, lse = local(
                q[part], pool, half.tables, half.lengths,
                scale=model.scale, value_dim=model.value_dim,
            )  # fmt: skip
            merged.append(self._lane.hand(self.combine, output, lse))
        return _joined(merged)[: step.outputs]

    @torch.no_grad()
    def combine(self, output: Tensor, lse: Tensor) -> Tensor:
        """Exchange the partials of all ranks and merge those of this rank's slice of the heads.

        Every rank of the group calls it.

        Parameters
        ----------
        output : Tensor, float32 [n, q_heads, value_dim]
        lse : Tensor, float32 [n, q_heads]
            Natural log-sum-exp, -inf where this rank has no keys.

        Returns
        -------
        Tensor, the model's type [n, q_heads / cp_size, value_dim]
        """
        model, cp_size = self.config.model, self.book.layout.cp_size
        partials = output[None], lse[None]
        if cp_size > 1:
            received = self._exchange(pack(output, lse, cp_size, self._wire))
            heads = self.q_heads // cp_size
            partials = unpack(received, len(lse), heads, model.value_dim, self._wire)
        merged, _ = merge(*partials)
        return merged.to(self.dtype)

    @torch.no_grad()
    def reserve(self, rows: int) -> DecodeStep:
        """Return a step of dummies, in whose buffers every later step of as many rows begins.

        Capture `attend` over it in a CUDA graph, with every rank alike, and replay the graph after
        each `begin` of `rows` new tokens and dummies in all: its tensors then say where this step's
        tokens are. `attend` returns all `rows` for it. A step is good until the next one of as many
        rows begins: attend to all its layers, or replay, before that. Tables are made for the
        longest request that the configuration allows, and for those HOP-B is decided. Reserving
        again gives the same buffers.

        Parameters
        ----------
        rows : int
            New tokens and dummies together.

        Returns
        -------
        DecodeStep

        Raises
        ------
        ValueError
            For less than one row.
        """
        if rows < 1:
            raise ValueError(f"rows is {rows}; a step has at least one.")
        if rows not in self._reserved:
            t, pages = self.book.layout.tokens_per_block, self.pool.shape[1]
            longest = self.config.max_len
            width = min(pages, -(-longest // t))
            self._reserved[rows] = self._blank(rows, width, rows * longest)
        return self._reserved[rows]

    @torch.no_grad()
    def decode(
        self,
        ids: Sequence[int],
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        pad: int = 0,
        query_lens: Sequence[int] | None = None,
    ) -> Tensor:
        """Do a whole step: `begin`, then `attend` for every layer.

        Parameters
        ----------
        ids : sequence of int, [n]
        q, k, v : Tensor
            As `attend` takes them, with a first axis of layers.
        pad : int
            Dummy requests behind the real ones.
        query_lens : sequence of int, [n], optional
            New tokens of each request; one unless given.

        Returns
        -------
        Tensor, the model's type [layers, m, q_heads / cp_size, head_dim]

        Raises
        ------
        Refused
            As `begin`.
        ValueError
            For tensors of the wrong shape or type.
        """
        plan = self.book.plan_step(ids, query_lens, pad)
        model, rows = self.config.model, len(plan.positions) + pad
        self._check("Q", q, (model.layers, rows, self.q_heads, model.key_dim))
        self._check_kv(k, v, (model.layers, rows, self.kv_heads, model.key_dim))
        step, layers = self._start(plan), range(model.layers)
        values = [None if v is None else v[i] for i in layers]
        return torch.stack([self.attend(step, i, q[i], k[i], values[i]) for i in layers])

    def skip(self, ids: Sequence[int], query_lens: Sequence[int] | None = None) -> None:
        """Prepare a step that never runs; nothing changes.

        Parameters
        ----------
        ids, query_lens
            As `begin` takes them.

        Raises
        ------
        Refused
            As `begin`.
        """
        self.book.skip(ids, query_lens)

    def accept(self, id: int, kept: int) -> None:
        """Keep the first tokens of a request's last group; the others were never decoded.

        Parameters
        ----------
        id : int
        kept : int
            Tokens that stay.

        Raises
        ------
        Refused
            For a count outside the group, a request that is not live, and one without an open
            group.
        """
        self.book.accept(id, kept)

    def sampled(self, ids: Sequence[int]) -> None:
        """Count each request's oldest outstanding decode as sampled; with `config.overlap` alone.

        Parameters
        ----------
        ids : sequence of int

        Raises
        ------
        Refused
            Without overlap, for an empty or repeated list, and for a request without such a decode.
        """
        self.book.sampled(ids)

    def fork(self, parent: int, child: int) -> None:
        """Begin a request as a copy of another, whose pages it shares until it writes.

        Parameters
        ----------
        parent : int
            A live request.
        child : int
            Id of the new one.

        Raises
        ------
        Refused
            For a parent that is not live, and a child that is known.
        """
        self.book.fork(parent, child)

    def preempt(self, id: int) -> None:
        """Free the pages of a live request, which stays known until `resume` or `release`.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not live.
        """
        self.book.preempt(id)

    def release(self, id: int) -> None:
        """End a request, live or preempted; pages that no other request holds are free again.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not known.
        """
        self.book.release(id)

    def _place(self, plan: Admission, prompt_kv: PromptKV, rotated: bool) -> None:
        """Ask for the KV of this rank's share of a prompt, then take pages and write it."""
        shard = plan.shards[self.book.cp_rank]
        if not shard.tokens:
            self._clear(self.book.place(plan))
            return
        positions = torch.from_numpy(shard.positions()).to(self.device)
        k, v = prompt_kv(positions)
        model = self.config.model
        shape = (model.layers, shard.tokens, self.kv_heads, model.key_dim)
        self._check_kv(k, v, shape, "The prompt's ")
        if not rotated:
            k = rotate(k, *rope_table(positions, model.rope_dim, model.rope_base))
        table = self.book.place(plan)
        self._clear(table)
        pages, offsets = self._slots(table, np.arange(shard.tokens))
        self.pool[:, pages, 0, offsets] = self._cached(k)
        if v is not None:
            self.pool[:, pages, 1, offsets] = self._cached(v)

    def _chunks(self, plan: Admission, chunk: int) -> Iterator[DecodeStep]:
        if chunk < 1:
            raise ValueError(f"chunk is {chunk}; it must be at least one token.")
        self._clear(self.book.place(plan))
        return map(self._begun, self.book.prompt_chunks(plan, chunk))

    def _start(self, plan: Step) -> DecodeStep:
        book = self.book.advance(plan)
        self._clear(book.taken)
        self._copy(book.copied)
        return self._begun(book)

    def _begun(self, book: RankStep) -> DecodeStep:
        """The tensors of a step, in the buffers reserved for its number of rows if there are."""
        tokens, rows = len(book.rows), len(book.rows) + book.pad
        width = -(-int(book.visible.max()) // self.book.layout.tokens_per_block)
        seen = int(book.position_ids.sum()) + tokens
        step = self._reserved.get(rows) or self._blank(rows, width, seen)
        model = self.config.model
        places = np.zeros((3, rows), dtype=np.int64)  # dummies: position 0, no key, no slot
        places[2] = -1
        places[:, :tokens] = book.position_ids, book.visible, book.slots
        positions, lengths, slots = self._put(places)
        cos, sin = rope_table(positions, model.rope_dim, model.rope_base)
        step.cos.copy_(cos)
        step.sin.copy_(sin)
        step.lengths.copy_(lengths)
        step.slots.copy_(slots)
        tables = self.book.tables.read(book.rows, width)
        step.tables[:tokens, :width] = self._put(tables)
        return replace(step, book=book, outputs=tokens)

    def _blank(self, rows: int, width: int, seen: int) -> DecodeStep:
        """Buffers of a step that does nothing yet: `rows` dummies, tables of `width` pages.

        `seen` are the keys that its rows will see on all ranks together.
        """
        half = self.config.model.rope_dim // 2

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        step = DecodeStep(
            RankStep.of_dummies(rows),
            outputs=rows,
            cos=zeros(rows, 1, half, dtype=torch.float32),
            sin=zeros(rows, 1, half, dtype=torch.float32),
            tables=zeros(rows, width, dtype=torch.int64),
            lengths=zeros(rows, dtype=torch.int64),
            slots=zeros(rows, dtype=torch.int64) - 1,
            buffers=None,
        )
        if not self._halves_pay(rows, seen):
            return self._with_buffers(step)
        return replace(step, halves=tuple(map(self._with_buffers, step.split())))

    def _halves_pay(self, rows: int, seen: int) -> bool:
        """Whether HOP-B saves time for a step, decided by what all ranks know, and so alike."""
        model, cp_size = self.config.model, self.book.layout.cp_size
        if self._hop_b is None or rows < 2 or cp_size == 1:
            return False
        token = self.pool[0, 0, :, 0].nbytes
        message = rows * self.q_heads / cp_size * (model.value_dim * self._wire.itemsize + 4)
        return self._hop_b.saved(seen / cp_size * token, message * (cp_size - 1)) > 0

    @property
    def _wire(self) -> torch.dtype:
        """The type in which partial outputs travel."""
        wire: torch.dtype = getattr(torch, self.config.model.partial_dtype)
        return wire

    def _with_buffers(self, step: DecodeStep) -> DecodeStep:
        """The step, with what the kernels write on the way if it is theirs."""
        if self.backend != "triton":
            return step
        return replace(step, buffers=self._step_buffers(*step.tables.shape))

    def _step_buffers(self, rows: int, width: int) -> StepBuffers:
        from helix_gpu.attention.kernels.settings import decode_settings, latent_settings
        from helix_gpu.attention.kernels.step import StepBuffers

        model, ranks = self.config.model, self.book.layout.cp_size
        product = getattr(torch, model.product_dtype)
        if model.latent:
            settings = latent_settings(product, self.pool.dtype)
        else:
            settings = decode_settings(model.head_dim, product, self.pool.dtype)
        return StepBuffers.allocate(
            rows,
            self.q_heads,
            -(-self.q_heads // 64) if model.latent else self.kv_heads,
            model.value_dim,
            ranks=ranks,
            longest=width * self.book.layout.tokens_per_block,
            dtype=self.dtype,
            # One rank sends nothing: what it merges with nothing is not rounded for the way.
            wire=self._wire if ranks > 1 else torch.float32,
            device=self.device,
            resident=settings.resident,
        )

    def _launch(
        self, step: DecodeStep, pool: Tensor, q: Tensor, k: Tensor, v: Tensor | None
    ) -> Tensor:
        """One layer by the kernels: nothing here waits for the device, or reads from it."""
        from helix_gpu.attention.kernels.merge import merge_received
        from helix_gpu.attention.kernels.rope import rotated
        from helix_gpu.attention.kernels.step import attend_shard

        model, merged = self.config.model, []
        q, k = rotated(q, step.cos, step.sin), self._cached(rotated(k, step.cos, step.sin))
        for part, half in step.parts():
            buffers = half.buffers
            assert buffers is not None
            attend_shard(
                buffers, q[part], k[part], None if v is None else v[part], pool,
                half.slots, half.tables, half.lengths,
                scale=model.scale, wide=model.product_dtype != model.dtype,
            )  # fmt: skip

            def combine(send: Tensor, buffers: StepBuffers = buffers) -> Tensor:
                output = torch.empty_like(buffers.output)  # layers share only the buffers
                merge_received(self._exchange(send), output, buffers.lse, buffers.wire)
                return output

            merged.append(self._lane.hand(combine, buffers.send))
        return _joined(merged)

    def _slots(self, table: list[int], index: Ints) -> tuple[Tensor, Tensor]:
        """Page and offset of these local indices."""
        t = self.book.layout.tokens_per_block
        return self._put(np.array(table, dtype=np.int64)[index // t]), self._put(index % t)

    def _clear(self, pages: list[int]) -> None:
        """With `poison`, fill pages just taken with NaN: whoever reads an unwritten slot shows."""
        if self.config.poison and pages:
            nan = self.pool.new_full((), torch.nan)  # on the device: a number would be waited for
            self.pool[:, self._put(np.array(pages))] = nan

    def _copy(self, copies: list[PageCopy]) -> None:
        """Copy on write, before anything is appended; slots not yet used stay as they are."""
        if copies:
            counts = [copy.tokens for copy in copies]
            offsets = self._put(np.concatenate([np.arange(count) for count in counts]))
            sources, targets = (
                self._put(np.repeat(pages, counts))
                for pages in zip(*((copy.source, copy.target) for copy in copies), strict=True)
            )
            self.pool[:, targets, :, offsets] = self.pool[:, sources, :, offsets]

    def _put(self, array: np.ndarray) -> Tensor:
        """A copy on the device, which the host does not wait for."""
        there = torch.from_numpy(array)
        if self.device.type == "cpu":
            return there
        return there.pin_memory().to(self.device, non_blocking=True)

    def _cached(self, rows: Tensor) -> Tensor:
        """K or V in the type in which it is cached."""
        return rows.to(self.pool.dtype)

    def _check_kv(self, k: Tensor, v: Tensor | None, shape: tuple[int, ...], of: str = "") -> None:
        """K and V have this shape; with a latent cache there is no V."""
        self._check(f"{of}K", k, shape)
        if (v is None) != (self.config.model.latent is not None):
            given = "missing" if v is None else "given"
            raise ValueError(f"{of}V is {given}; there is none exactly where a latent is cached.")
        if v is not None:
            self._check(f"{of}V", v, shape)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {self.dtype} {shape}."
            )


def _joined(merged: Sequence[Callable[[], Tensor]]) -> Tensor:
    """The rows of all parts, waited for in order; those of a single one are not copied."""
    rows = [wait() for wait in merged]
    return rows[0] if len(rows) == 1 else torch.cat(rows)


def _group_exchange(config: Config, group: dist.ProcessGroup | None, cp_rank: int) -> Exchange:
    """The group's all-to-all, once it is seen to be the group of this cp_rank."""
    cp_size = config.layout.cp_size
    if cp_size == 1:
        return lambda send: send
    if group is None or (group.size(), group.rank()) != (cp_size, cp_rank):
        held = "no group" if group is None else f"rank {group.rank()} of {group.size()}"
        raise ValueError(
            f"group gives {held}; cp_size {cp_size} needs a group of that size in which this "
            f"rank is {cp_rank}."
        )
    return all_to_all(group, config.model)
