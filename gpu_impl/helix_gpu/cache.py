"""`HelixCache`: one rank's share of a sharded decode KV cache, with RoPE, GQA and padding."""

from __future__ import annotations

import atexit
import gc
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, Self, overload

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from helix_gpu.attention.backends import PACKAGES, AttendPages, load
from helix_gpu.attention.merge import beside_sinks, merge
from helix_gpu.attention.paged import attend_pages, runs_of
from helix_gpu.attention.partials import pack, unpack
from helix_gpu.attention.rope import rope_table, rotate
from helix_gpu.bookkeeping.inputs import integer, integers
from helix_gpu.bookkeeping.ledger import Admission, Ints, Step
from helix_gpu.bookkeeping.rank_book import PageCopy, PromptChunk, RankBook, RankStep
from helix_gpu.bookkeeping.refusals import StepError, check_config
from helix_gpu.bookkeeping.written import StepTokens, Written
from helix_gpu.comm.agreement import RanksDisagree, compare, config_points, error_in_words
from helix_gpu.comm.exchange import Exchange, MakeExchange, all_to_all
from helix_gpu.comm.hop_b import Costs, Lane, SameLane
from helix_gpu.comm.mesh import check_mesh, slice_of, whole_group
from helix_spec.config import Config, ModelShape

if TYPE_CHECKING:
    from helix_gpu.attention.kernels.step import StepBuffers

Backend = Literal["torch", "triton", "flashinfer"] | AttendPages
"""What attends over a rank's own pages: see `HelixCache`."""
PromptKV = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""From int64 positions [n] to K (not yet rotated) and V, each [layers, n, kv_heads, head_dim].

With a latent cache K is the latent and the part to rotate, [layers, n, 1, latent_dim + rope_dim],
and V is None."""
Rope = Literal["config"] | None
"""What is done to Q and K before they meet: RoPE by the configuration, or nothing."""


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
    positions: Tensor
    """int64 [m + pad]: global positions."""
    cos: Tensor
    sin: Tensor
    tables: Tensor
    lengths: Tensor
    """int64: where in its table the slots that a row sees end."""
    slots: Tensor
    """int64: where each row's K and V are written, -1 where that is not on this rank."""
    places: Tensor
    """int64 [3, m + pad]: positions, lengths and slots, which lie in it, as one piece."""
    buffers: StepBuffers | None
    """What the kernels write on the way, where these rows go through them together."""
    halves: tuple[DecodeStep, ...] = ()
    """With HOP-B, where it pays: two steps over parts of these very tensors."""
    runs: Sequence[slice] = ()
    """Rows that are many consecutive tokens of one request."""
    tokens: StepTokens | None = None
    """Which tokens of which requests these are; None of a step of `reserve`."""
    of_prompt: bool = False
    """Whether these are tokens of prompts that are computed here."""
    starts: Tensor | None = None
    """int64: where in its table the slots that a row sees start; None for all at 0. The tables of
    a cache group with a window begin with the first page that a row of the request sees."""
    groups: Mapping[str, DecodeStep] = field(default_factory=dict)
    """Of a `group_cache.GroupCache`, the step in each cache group; the above is the first one's."""

    def split(self) -> tuple[DecodeStep, DecodeStep]:
        """Return the first half of the rows, and the others."""
        border = len(self.lengths) // 2
        first, second = (
            replace(
                self, positions=self.positions[part], cos=self.cos[part], sin=self.sin[part],
                tables=self.tables[part], lengths=self.lengths[part], slots=self.slots[part],
                starts=None if self.starts is None else self.starts[part],
                places=self.places[:, part],
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

    def of_book(self, book: RankStep) -> DecodeStep:
        """Return the step with a book and, where no kernels read it, its runs, in its halves too.

        Parameters
        ----------
        book : RankStep
        """
        if self.buffers is not None or any(half.buffers is not None for half in self.halves):
            return replace(self, book=book, outputs=len(book.rows))
        halves = tuple(
            replace(half, runs=runs_of(book.rows[part]))
            for part, half in self.parts()
            if self.halves
        )
        runs = () if self.halves else runs_of(book.rows)
        return replace(self, book=book, outputs=len(book.rows), runs=runs, halves=halves)


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

    What is wrong with a call is said before anything changes: Refused for what no rank may do,
    StepError for steps that are over and tokens that are not there yet, ValueError for arguments,
    RanksDisagree where ranks would do different things. A step that has begun is attended to by
    every layer, or undone by `cancel`; until then its requests take no other step.

    A cache is a context manager. Without `close` or the end of its `with`, its memory goes when it
    is collected, and its hold on the group at the end of the program at the latest.

    Parameters
    ----------
    config : Config
        Without cache groups, for which there is `group_cache.GroupCache`.
    rank : int
        Global rank, tp_rank * cp_size + cp_rank.
    group : ProcessGroup, optional
        The ranks of this tp_rank, in the order of their cp_rank; not needed when cp_size is 1.
    device : torch.device or str
    exchange : Exchange, optional
        Used in place of the group's all-to-all.
    backend : {"torch", "triton", "flashinfer"} or AttendPages, optional
        What attends: `torch` (only on the CPU, where it is the default), `triton`, the kernels of
        `attention.kernels`, a library of `attention.backends`, or a function such as
        `attention.native.attend_pages`. The steps of `triton` wait for nothing on the host, and can
        be captured in a CUDA graph: see `reserve` and `graphs`.
    hop_b : Costs, optional
        What attending and exchanging cost here, the same on every rank. With it a step's rows
        attend in two halves, the first of which travels meanwhile, wherever that saves time.
    all_ranks : ProcessGroup, optional
        The ranks of all tp_ranks, in the order of `rank`; `group` where tp_size is 1. Only with it
        ranks hear of each other's errors, and `gather` gathers.
    rope : {"config"} or None
        None for Q and K that are rotated already, on every path: as the model likes it, or not at
        all.
    poison : bool
        Whether pages are filled with NaN when taken, so that whoever reads a slot that was not
        written shows. It takes time, and `config.poison` has no say here.
    debug : bool
        Whether ranks compare every call before they do it, and errors in the middle of it. A
        collective each time, through the host; HOP-B then does one thing after the other.

    Raises
    ------
    Refused
        With `bad_config`.
    ValueError
        For a rank, a group or a backend that does not fit.

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
        *,
        rope: Rope = "config",
        poison: bool = False,
        debug: bool = False,
    ) -> Self:
        """Return the cache of this process on a mesh; every rank calls it.

        Ranks compare what they are given, once.

        Parameters
        ----------
        config : Config
        mesh : DeviceMesh
            With axes ("tp", "cp"), as `helix_mesh` makes it.
        make_exchange : MakeExchange
            One of `comm.exchange`, or `comm.push.push`.
        backend, hop_b, rope, poison, debug
            As the class takes them.

        Raises
        ------
        Refused
            With `bad_config`, before anything else happens.
        ValueError
            For a mesh that does not fit, before anything else happens.
        RanksDisagree
            With what differs, before anything else happens.
        """
        error = None
        try:
            check_config(config)
            check_mesh(config, mesh)
        except Exception as found:
            error = found
        all_ranks = whole_group(mesh) if mesh.size() > 1 else None
        if all_ranks is not None:
            options = {"make_exchange": getattr(make_exchange, "__name__", "")}
            options |= {"hop_b": str(hop_b), "rope": str(rope), "debug": str(debug)}
            points = config_points(config) | options | {"error": error_in_words(error)}
            compare("What HelixCache.on is given", points, all_ranks)
        if error is not None:
            raise error
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
            all_ranks=all_ranks,
            rope=rope,
            poison=poison,
            debug=debug,
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
        all_ranks: dist.ProcessGroup | None = None,
        rope: Rope = "config",
        poison: bool = False,
        debug: bool = False,
    ) -> None:
        check_config(config)
        if not 0 <= integer("rank", rank) < config.world_size:
            raise ValueError(
                f"rank is {rank}; with tp_size * cp_size = {config.world_size} it must lie "
                f"between 0 and {config.world_size - 1}."
            )
        if rope not in ("config", None):
            raise ValueError(f"rope is {rope!r}; it must be 'config', or None for rotated Q and K.")
        cp_size, model = config.layout.cp_size, config.model
        resolved = _resolved(backend, torch.device(device), model)
        if model.sinks and resolved == "triton":
            raise ValueError("Sinks have no backend triton yet; give torch or a function.")
        self.config = config
        self.rank = rank
        """tp_rank * cp_size + cp_rank."""
        self.device = torch.device(device)
        self.backend: Backend = resolved
        self.book = self._new_book(rank % cp_size)
        self.dtype: torch.dtype = getattr(torch, model.dtype)
        self.kv_heads = 1 if model.latent else model.kv_heads // config.tp_size
        self.q_heads = model.q_heads // config.tp_size
        exchange = exchange or _group_exchange(config, group, self.book.cp_rank)
        link = _Link(exchange, all_ranks or (group if config.tp_size == 1 else None))
        weakref.finalize(self, link.cut)
        if debug and config.world_size > 1 and link.all_ranks is None:
            raise ValueError("Ranks compare their calls through all_ranks, which is not given.")
        self._link, self._exchange = link, link.exchange
        self.pool = self._new_pool()
        """[layers, pages, 2, tokens_per_block, kv_heads, head_dim]: rotated K, then V.

        With a latent cache [layers, pages, 1, tokens_per_block, 1, latent_dim + rope_dim].
        """
        self._rope_dim = model.rope_dim if rope == "config" else 0
        self._poison, self._debug = poison, debug
        self._written = Written(model.layers)
        self._reserved: dict[int, DecodeStep] = {}
        self._lodgers: dict[int, StepTokens] = {}
        """The last step that began in the reserved buffers, by its number of rows."""
        self._hop_b = hop_b
        self._lane = Lane(self.device) if hop_b and not debug else SameLane()

    def _new_book(self, cp_rank: int) -> RankBook:
        if self.config.groups:
            raise ValueError("The configuration has cache groups; a GroupCache keeps those.")
        return RankBook(self.config, cp_rank)

    def _new_pool(self) -> Tensor:
        config, model = self.config, self.config.model
        pages, t = config.pages[self.book.cp_rank], config.layout.tokens_per_block
        return self._new_pages(model.layers, pages, t)

    def _new_pages(self, layers: int, pages: int, tokens_per_block: int) -> Tensor:
        model = self.config.model
        return torch.empty(
            layers,
            pages,
            1 if model.latent else 2,
            tokens_per_block,
            self.kv_heads,
            model.key_dim,
            dtype=getattr(torch, model.cached_dtype),
            device=self.device,
        )

    def close(self) -> None:
        """Give up the memory and the group; every call but this one is an error from now on."""
        self._lane.close()
        self._link.cut()
        closed: Any = _Closed()
        self.book = self.pool = self._written = self._reserved = closed

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    @property
    def rotates(self) -> bool:
        """Return whether Q and K are rotated here, by the configuration's RoPE."""
        return self._rope_dim > 0

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
            here, unless the cache has rope None.

        Raises
        ------
        Refused
            For an id that is known, an empty prompt, one that is too long, and exhausted pools.
        ValueError
            For K or V of the wrong shape or type.
        RanksDisagree
            Where one rank cannot have its KV, on the others; it names the rank and its error. That
            rank raises its own. Nothing is placed on any.
        """
        id, prompt_len = integer("id", id), integer("prompt_len", prompt_len)
        with self._together("admit", id, prompt_len, always=True):
            plan = self.book.plan_admit(id, prompt_len)
            given = self._prompt(plan, prompt_kv, rotated)
        self._place(plan, given)

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
        RanksDisagree
            As `admit`.
        """
        id = integer("id", id)
        with self._together("resume", id, always=True):
            plan = self.book.plan_resume(id)
            given = self._prompt(plan, prompt_kv, rotated)
        self._place(plan, given)

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
            For tokens that are not on this rank, or not any more.
        StepError
            While layers lack tokens of the request.
        """
        first, tokens = integer("first", first), integer("tokens", tokens)
        table, held = self.book.block_table(id), self.book.local_len(id)
        self._written.check_whole([id], self.book.ledger.rows([id]))
        behind = (np.array(table) < 0).sum() * self.book.layout.tokens_per_block
        if not (0 <= first <= first + tokens <= held and first >= min(behind, first + tokens)):
            raise IndexError(
                f"Local indices {first} to {first + tokens - 1} of request {id} are not all here; "
                f"this rank holds {held} of its tokens"
                + (f", without the first {behind}." if behind else ".")
            )
        pages, offsets = self._slots(table, np.arange(first, first + tokens))
        k, *v = (part[:, pages, offsets].to(self.dtype) for part in self.pool.unbind(2))
        return k, v[0] if v else None

    def prefill(
        self, id: int | Sequence[int], prompt_len: int | Sequence[int], chunk: int
    ) -> PromptSteps:
        """Take prompts whose KV is computed here, and return their steps.

        Pages are taken at once. Call `attend` for every layer of each step, in order. The rows of
        a step stand request after request; one may hold the end of a prompt and the next ones.

        Parameters
        ----------
        id : int or sequence of int, [n]
        prompt_len : int or sequence of int, [n]
            Tokens of each prompt.
        chunk : int
            Tokens of a step, at most, of all prompts together.

        Returns
        -------
        PromptSteps
            An iterator of DecodeStep. A request that is released before its steps ends it.

        Raises
        ------
        Refused
            As `admit`, for all prompts together.
        ValueError
            For a chunk below one token.

        Examples
        --------
        >>> from helix_spec.config import ModelShape
        >>> config = Config(layout="pr9757/1:C=1,T=2", pages=[8], max_len=16, model=ModelShape())
        >>> cache = HelixCache(config, rank=0)
        >>> steps = cache.prefill([7, 8], [5, 2], chunk=4)
        >>> step = next(steps)
        >>> step.book.position_ids.tolist()
        [0, 1, 2, 3]
        >>> q, k, v = (torch.zeros(4, heads, 16) for heads in (4, 2, 2))
        >>> cache.attend(step, 0, q, k, v).shape
        torch.Size([4, 4, 16])
        >>> next(steps).book.position_ids.tolist()  # the last one of 7, and those of 8
        [4, 0, 1]
        """
        if not hasattr(id, "__iter__"):
            id, prompt_len = [integer("id", id)], [integer("prompt_len", prompt_len)]
        ids, prompt_lens = integers("id", id), integers("prompt_len", prompt_len)
        chunk = _checked_chunk(chunk)
        with self._together("prefill", ids, prompt_lens, chunk):
            plans = self.book.plan_admissions(ids, prompt_lens)
        return self._steps(plans, chunk)

    def recompute(self, id: int, chunk: int) -> PromptSteps:
        """Resume a preempted request like `prefill`, computing all its tokens again.

        Parameters
        ----------
        id : int
        chunk : int
            Tokens of a step, at most.

        Returns
        -------
        PromptSteps

        Raises
        ------
        Refused
            As `resume`.
        ValueError
            For a chunk below one token.
        """
        id, chunk = integer("id", id), _checked_chunk(chunk)
        with self._together("recompute", id, chunk):
            plan = self.book.plan_resume(id)
        return self._steps([plan], chunk)

    @torch.no_grad()
    def begin(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> DecodeStep:
        """Begin a step of new tokens for each request: pages are taken, lengths advance.

        Call `attend` once for each layer next, or `cancel`. The new tokens stand request after
        request, m in all.

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
        StepError
            For a request whose tokens layers still lack, and where the buffers reserved for so many
            rows hold another step that is not done.
        """
        ids, query_lens, pad = _batch(ids, query_lens, pad)
        with self._together("begin", ids, query_lens, pad):
            plan = self.book.plan_step(ids, query_lens, pad)
            self._check_whole(plan, ids)
        return self._tracked(self._start(plan), plan, ids)

    def cancel(self, step: DecodeStep) -> None:
        """Undo a step of `begin`, attended to or not: its tokens were never there.

        Nothing else may have happened to its requests since. A group of tokens that the step closed
        stays closed, and pages that it copied stay the requests' own.

        Parameters
        ----------
        step : DecodeStep

        Raises
        ------
        StepError
            For a step that is over, and one of a prompt, which ends by `release` alone.

        Examples
        --------
        >>> from helix_spec.config import ModelShape
        >>> config = Config(layout="pr9757/1:C=1,T=2", pages=[8], max_len=16, model=ModelShape())
        >>> cache = HelixCache(config, rank=0)
        >>> cache.admit(7, 2, lambda at: (torch.zeros(1, 2, 2, 16), torch.zeros(1, 2, 2, 16)))
        >>> step = cache.begin([7])
        >>> cache.local_len(7), cache.free_pages
        (3, 6)
        >>> cache.cancel(step)
        >>> cache.local_len(7), cache.free_pages
        (2, 7)
        """
        with self._together("cancel", _named(_checked_step(step))):
            tokens = self._tokens(step)
            self._written.check_step(tokens)
            if step.of_prompt:
                raise StepError("The step is of a prompt; release its requests to end them.")
        self.book.cancel(tokens.ids)
        for row, first in zip(tokens.rows.tolist(), tokens.firsts.tolist(), strict=True):
            self._written.rewind(row, first)

    def finish(self, step: DecodeStep) -> None:
        """Count a step as attended to by all layers, since a captured graph has replayed it.

        Parameters
        ----------
        step : DecodeStep
            One that began in buffers of `reserve`.

        Raises
        ------
        StepError
            For a step that is over, and one that lies elsewhere, where no graph has seen it.
        """
        with self._together("finish", _named(_checked_step(step))):
            tokens = self._tokens(step)
            self._written.check_step(tokens)
            reserved = self._reserved.get(len(step.lengths))
            if reserved is None or reserved.slots is not step.slots:
                raise StepError(
                    f"The step is not in buffers reserved for {len(step.lengths)} rows, where a "
                    "graph would have found it; attend to it."
                )
        self._written.give_all(tokens)

    @overload
    def attend(
        self, step: DecodeStep, layer: int, q: Tensor, k: Tensor, v: Tensor | None = None,
        *, scale: float | None = None, return_lse: Literal[False] = False,
        sinks: Tensor | None = None,
    ) -> Tensor: ...  # fmt: skip

    @overload
    def attend(
        self, step: DecodeStep, layer: int, q: Tensor, k: Tensor, v: Tensor | None = None,
        *, scale: float | None = None, return_lse: Literal[True], sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...  # fmt: skip

    @torch.no_grad()
    def attend(
        self,
        step: DecodeStep,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor | None = None,
        *,
        scale: float | None = None,
        return_lse: bool = False,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Do one layer of a step begun: append K and V where owned, attend, exchange, merge.

        Each token sees those before it and itself, of its own group too. After an error a layer may
        attend again.

        Parameters
        ----------
        step : DecodeStep
        layer : int
            From 0 on.
        q : Tensor, the model's type [m + pad, q_heads, head_dim]
            Not rotated, unless the cache has rope None; dummies last, whose content counts for
            nothing.
        k : Tensor, the model's type [m + pad, kv_heads, head_dim]
            As `q`.
        v : Tensor, the model's type [m + pad, kv_heads, head_dim], optional
            None exactly where a latent is cached.
        scale : float, optional
            Of the scores; the configuration's, 1 / sqrt(head_dim), unless given.
        return_lse : bool
            Whether the log-sum-exp comes too: by it a model adds what no key stands for.
        sinks : Tensor, float32 [q_heads], optional
            Given exactly where the configuration's model has sinks: a logit for each query head of
            this tp_rank, which counts once, whatever the number of ranks.

        Returns
        -------
        output : Tensor, the model's type [m, q_heads / cp_size, head_dim]
            The output of this rank's slice of the query heads.
        lse : Tensor, float32 [m, q_heads / cp_size]
            With `return_lse`: the natural log-sum-exp of the scaled scores over all keys, without
            sinks.

        Raises
        ------
        StepError
            For a step that is over, and while the layer lacks earlier tokens of a request.
        ValueError
            For a layer that is not there, and tensors of the wrong shape, type or device.
        """
        model, rows = self.config.model, len(_checked_step(step).lengths)
        with self._together("attend", _named(step), layer, unless=step.tokens is None):
            layer = self._check_attend(step, layer)
            self._check("Q", q, (rows, self.q_heads, model.key_dim))
            self._check_kv(k, v, (rows, self.kv_heads, model.key_dim))
            slices = self._checked_sinks(sinks, (self.q_heads,))
        pool, scale = self.pool[layer], model.softmax_scale if scale is None else float(scale)
        if self.backend == "triton":
            v = None if v is None else self._cached(v)
            found = self._launch(step, pool, q, k, v, scale, return_lse)
        else:
            q = self._rotated(step, q)
            self._append(step, pool, k, v)
            merged = []
            for part, half in step.parts():
                with self._together("attention", _named(step), layer, unless=step.tokens is None):
                    local = self._attended(half, pool, q[part], layer, scale)
                merged.append(self._lane.hand(self._combined, *local, *slices))
            found = _joined(merged)
        if step.tokens is not None:
            self._written.give(step.tokens, layer)
        output, lse = (x[: step.outputs] for x in found)
        return (output, lse) if return_lse else output

    def _rotated(self, step: DecodeStep, rows: Tensor) -> Tensor:
        return rotate(rows, step.cos, step.sin)

    def _append(self, step: DecodeStep, pool: Tensor, k: Tensor, v: Tensor | None) -> None:
        """Write K, not rotated yet, and V into a layer's pages where this rank owns the tokens."""
        own, t = (step.slots >= 0).nonzero()[:, 0], pool.shape[2]
        page, offset = step.slots[own] // t, step.slots[own] % t
        pool[page, 0, offset] = self._cached(self._rotated(step, k))[own]
        if v is not None:
            pool[page, 1, offset] = self._cached(v)[own]

    def _attended(
        self, step: DecodeStep, pool: Tensor, q: Tensor, layer: int, scale: float
    ) -> tuple[Tensor, Tensor]:
        """The partial of rotated queries over a layer's pages on this rank."""
        given, value_dim = (q, pool, step.tables, step.lengths), self.config.model.value_dim
        bounds: dict[str, Any] = {} if step.starts is None else {"starts": step.starts}
        if not callable(self.backend):
            return attend_pages(*given, scale=scale, value_dim=value_dim, runs=step.runs, **bounds)
        output, lse = self.backend(
            *given, scale=scale, value_dim=value_dim, layer=layer, positions=step.positions,
            **bounds,
        )  # fmt: skip
        # Libraries differ in what they deliver for a row without keys.
        empty = step.lengths <= (0 if step.starts is None else step.starts)
        return output, lse.masked_fill(empty[:, None], -torch.inf)

    @overload
    def combine(
        self,
        output: Tensor,
        lse: Tensor,
        *,
        return_lse: Literal[False] = False,
        sinks: Tensor | None = None,
    ) -> Tensor: ...

    @overload
    def combine(
        self,
        output: Tensor,
        lse: Tensor,
        *,
        return_lse: Literal[True],
        sinks: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    @torch.no_grad()
    def combine(
        self,
        output: Tensor,
        lse: Tensor,
        *,
        return_lse: bool = False,
        sinks: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Exchange the partials of all ranks and merge those of this rank's slice of the heads.

        Every rank of the group calls it.

        Parameters
        ----------
        output : Tensor, float32 [n, q_heads, value_dim]
        lse : Tensor, float32 [n, q_heads]
            Natural log-sum-exp, -inf where this rank has no keys.
        return_lse : bool
            Whether the merged log-sum-exp comes too.
        sinks : Tensor, float32 [q_heads / cp_size], optional
            Logits of this rank's slice of the heads, which join what is merged.

        Returns
        -------
        output : Tensor, the model's type [n, q_heads / cp_size, value_dim]
        lse : Tensor, float32 [n, q_heads / cp_size]
            With `return_lse`.

        Raises
        ------
        ValueError
            For partials of another shape.
        """
        model, cp_size = self.config.model, self.book.layout.cp_size
        wanted = (len(lse), self.q_heads, model.value_dim)
        if tuple(output.shape) != wanted or tuple(lse.shape) != wanted[:2]:
            raise ValueError(
                f"Partials have shapes {tuple(output.shape)} and {tuple(lse.shape)}; they must "
                f"have {wanted} and {wanted[:2]}."
            )
        partials = output[None], lse[None]
        if cp_size > 1:
            received = self._exchange(pack(output, lse, cp_size, self._wire))
            heads = self.q_heads // cp_size
            partials = unpack(received, len(lse), heads, model.value_dim, self._wire)
        merged, merged_lse = merge(*partials)
        merged = beside_sinks(merged, merged_lse, sinks).to(self.dtype)
        return (merged, merged_lse) if return_lse else merged

    def _combined(
        self, output: Tensor, lse: Tensor, sinks: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        return self.combine(output, lse, return_lse=True, sinks=sinks)

    def _checked_sinks(self, sinks: Tensor | None, shape: tuple[int, ...]) -> list[Tensor]:
        """Sinks of this rank's slice of the heads; none for a model without them."""
        if (sinks is not None) != self.config.model.sinks:
            has = "has sinks" if self.config.model.sinks else "has no sinks"
            raise ValueError(f"sinks must be given exactly where the model has some; it {has}.")
        if sinks is None:
            return []
        if tuple(sinks.shape) != shape or sinks.dtype != torch.float32:
            raise ValueError(
                f"sinks has shape {tuple(sinks.shape)} and type {sinks.dtype}; it must have "
                f"{shape} and torch.float32."
            )
        heads = self.q_heads // self.book.layout.cp_size
        return [sinks[..., self.book.cp_rank * heads :][..., :heads].to(self.device)]

    @torch.no_grad()
    def gather(self, output: Tensor) -> Tensor:
        """Return the outputs of all heads from the slices that the ranks hold; every rank calls it.

        A model that splits its output projection by heads needs no gather: see
        `block.AttentionBlock`.

        Parameters
        ----------
        output : Tensor [..., q_heads / (tp_size * cp_size), dim]
            What `attend` or `decode` returned here.

        Returns
        -------
        Tensor [..., q_heads, dim]
            The same on all ranks.

        Raises
        ------
        ValueError
            Without `all_ranks`, and for another number of heads.
        """
        ranks = self.config.world_size
        heads = self.config.model.q_heads // ranks
        with self._together("gather", *output.shape):
            if output.ndim < 2 or output.shape[-2] != heads:
                raise ValueError(
                    f"The output has shape {tuple(output.shape)}; its last axis but one must hold "
                    f"this rank's {heads} heads."
                )
            if ranks > 1 and self._link.all_ranks is None:
                raise ValueError("Outputs are gathered through all_ranks, which is not given.")
        if ranks == 1:
            return output
        mine = output.contiguous()
        slices = [torch.empty_like(mine) for _ in range(ranks)]
        dist.all_gather(slices, mine, group=self._link.all_ranks)
        return torch.cat(slices, -2)

    @torch.no_grad()
    def reserve(self, rows: int) -> DecodeStep:
        """Return a step of dummies, in whose buffers every later step of as many rows begins.

        Capture `attend` over it in a CUDA graph, with every rank alike, and replay the graph after
        each `begin` of `rows` new tokens and dummies in all: its tensors then say where this step's
        tokens are. `attend` returns all `rows` for it. A step is good until the next one of as many
        rows begins: attend to all its layers, or replay, before that. Tables are made for the
        longest request that the configuration allows, and for those HOP-B is decided. Reserving
        again gives the same buffers. Say `finish` of a step that was replayed.

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
        if integer("rows", rows) < 1:
            raise ValueError(f"rows is {rows}; a step has at least one.")
        if rows not in self._reserved:
            t, pages = self.book.layout.tokens_per_block, self.pool.shape[1]
            longest = self.config.max_len
            if self.book.ledger.window is not None:  # of all rows one may see the first part
                longest = min(longest, self.book.ledger.window + rows + t)
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
        sinks: Tensor | None = None,
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
        sinks : Tensor, float32 [layers, q_heads], optional
            As `attend` takes them.

        Returns
        -------
        Tensor, the model's type [layers, m, q_heads / cp_size, head_dim]

        Raises
        ------
        Refused, StepError
            As `begin`.
        ValueError
            For tensors of the wrong shape or type.
        """
        ids, query_lens, pad = _batch(ids, query_lens, pad)
        with self._together("decode", ids, query_lens, pad):
            plan = self.book.plan_step(ids, query_lens, pad)
            model, rows = self.config.model, len(plan.positions) + pad
            self._check_whole(plan, ids)
            self._check("Q", q, (model.layers, rows, self.q_heads, model.key_dim))
            self._check_kv(k, v, (model.layers, rows, self.kv_heads, model.key_dim))
            self._checked_sinks(sinks, (model.layers, self.q_heads))
        step, layers = self._tracked(self._start(plan), plan, ids), range(model.layers)
        values = [None if v is None else v[i] for i in layers]
        of_layers = [None if sinks is None else sinks[i] for i in layers]
        return torch.stack(
            [self.attend(step, i, q[i], k[i], values[i], sinks=of_layers[i]) for i in layers]
        )

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
        ids, query_lens, _ = _batch(ids, query_lens, 0)
        with self._together("skip", ids, query_lens):
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
        StepError
            While layers lack tokens of the group.
        """
        id, kept = integer("id", id), integer("kept", kept)
        with self._together("accept", id, kept):
            self.book.ledger.plan_accept(id, kept)
            rows = self.book.ledger.rows([id])
            self._written.check_whole([id], rows)
        self.book.accept(id, kept)
        self._written.rewind(int(rows[0]), self.book.ledger.total(id))

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
        ids = integers("ids", ids)
        with self._together("sampled", ids):
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
        StepError
            While layers lack tokens of the parent.
        """
        parent, child = integer("parent", parent), integer("child", child)
        with self._together("fork", parent, child):
            self.book.ledger.plan_fork(parent, child)
            self._written.check_whole([parent], self.book.ledger.rows([parent]))
        self.book.fork(parent, child)
        source, row = self.book.ledger.rows([parent, child]).tolist()
        self._written.fork(source, row, self.book.ledger.total(child))

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
        id = integer("id", id)
        with self._together("preempt", id):
            (row,) = self.book.ledger.rows([id]).tolist()
        self.book.preempt(id)
        self._written.end(row)

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
        id = integer("id", id)
        with self._together("release", id):
            live = [] if id in self.book.preempted_ids else self.book.ledger.rows([id]).tolist()
        self.book.release(id)
        for row in live:
            self._written.end(row)

    @contextmanager
    def _together(
        self, call: str, *given: object, always: bool = False, unless: bool = False
    ) -> Iterator[None]:
        """What a call checks and plans: with `debug`, or `always`, the ranks then compare it.

        An error of one rank ends it on all of them.
        """
        all_ranks = self._link.all_ranks
        if all_ranks is None or not (always or self._debug) or unless:
            yield
            return
        error = None
        try:
            yield
        except Exception as found:
            error = found
        said = {"call": f"{call}({', '.join(map(repr, given))})", "error": error_in_words(error)}
        try:
            compare("What the ranks do next", said, all_ranks)
        except RanksDisagree as disagree:
            raise (error or disagree) from (disagree if error else None)
        if error is not None:
            raise error

    def _check_attend(self, step: DecodeStep, layer: int) -> int:
        """A layer that is there, as a number, and a step to which it may attend."""
        layers = self.config.model.layers
        if not 0 <= integer("layer", layer) < layers:
            raise ValueError(f"layer is {layer}; this cache has layers 0 to {layers - 1}.")
        if step.tokens is not None:
            self._written.check_layer(step.tokens, layer)
        elif all(step is not reserved for reserved in self._reserved.values()):
            raise StepError("The step is none that this cache has begun or reserved.")
        return layer

    def _tokens(self, step: DecodeStep) -> StepTokens:
        tokens = _checked_step(step).tokens
        if tokens is None:
            raise StepError("The step is of dummies, as `reserve` returns it; it has no tokens.")
        return tokens

    def _check_whole(self, plan: Step, ids: Sequence[int]) -> None:
        """A step may begin: its requests are whole, and buffers reserved for it are free."""
        self._written.check_whole(ids, plan.rows)
        self._check_reserved(len(plan.positions) + plan.pad)

    def _check_reserved(self, rows: int) -> None:
        lodger = self._lodgers.get(rows) if rows in self._reserved else None
        layers = self._written.lacking(lodger) if lodger is not None else []
        if layers:
            raise StepError(
                f"The buffers reserved for {rows} rows hold a step to which layer {layers[0]} has "
                "not attended; attend to it, or finish or cancel it, before the next one begins."
            )

    def _tracked(self, step: DecodeStep, plan: Step, ids: Sequence[int]) -> DecodeStep:
        """The step, with what says which tokens of which requests it holds."""
        firsts = plan.positions[plan.firsts]
        tokens = self._written.begin(ids, plan.rows, firsts, firsts + plan.query_lens)
        return self._lodged(step, tokens)

    def _lodged(self, step: DecodeStep, tokens: StepTokens) -> DecodeStep:
        """The step of these tokens, noted where it lies in buffers that another will need."""
        if len(step.lengths) in self._reserved:
            self._lodgers[len(step.lengths)] = tokens
        return replace(step, tokens=tokens)

    def _prompt(
        self, plan: Admission, prompt_kv: PromptKV, rotated: bool
    ) -> tuple[Tensor, Tensor | None] | None:
        """Ask for the KV of this rank's share of a prompt, and return it as it is cached."""
        shard = plan.shards[self.book.cp_rank]
        if not callable(prompt_kv):
            raise ValueError(f"prompt_kv is {prompt_kv!r}; it must be a function of positions.")
        if not shard.tokens:
            return None
        positions = torch.from_numpy(shard.positions()).to(self.device)
        given = prompt_kv(positions)
        if not isinstance(given, tuple | list) or len(given) != 2:
            raise ValueError(
                f"prompt_kv returned a {type(given).__name__}; it must return K and V."
            )
        k, v = given
        model = self.config.model
        self._check_kv(
            k, v, (model.layers, shard.tokens, self.kv_heads, model.key_dim), "The prompt's "
        )
        if not rotated:
            k = rotate(k, *rope_table(positions, self._rope_dim, model.rope_base))
        return self._cached(k), None if v is None else self._cached(v)

    def _place(self, plan: Admission, given: tuple[Tensor, Tensor | None] | None) -> None:
        """Take pages for a prompt, and write this rank's share of it."""
        table = self.book.place(plan)
        self._clear(table)
        (row,) = self.book.ledger.rows([plan.id]).tolist()
        self._written.place(row, plan.prompt_len, given=True)
        if given is not None:
            k, v = given
            pages, offsets = self._slots(table, np.arange(k.shape[1]))
            self.pool[:, pages, 0, offsets] = k
            if v is not None:
                self.pool[:, pages, 1, offsets] = v

    def _steps(self, plans: Sequence[Admission], chunk: int) -> PromptSteps:
        """Take pages for prompts that are computed here."""
        for plan in plans:
            self._clear(self.book.place(plan))
            (row,) = self.book.ledger.rows([plan.id]).tolist()
            self._written.place(row, plan.prompt_len, given=False)
        return PromptSteps(self, plans, chunk)

    def _begun_chunk(self, chunk: PromptChunk, generations: Ints) -> DecodeStep:
        """Begin a piece of prompts that have these generations since they were placed."""
        tokens = StepTokens(
            self._written, chunk.ids, chunk.rows, chunk.firsts, chunk.ends, generations
        )
        self._written.check_step(tokens)
        self._check_reserved(len(chunk.step.rows))
        return replace(self._lodged(self._begun(chunk.step), tokens), of_prompt=True)

    def _start(self, plan: Step) -> DecodeStep:
        book = self.book.advance(plan)
        self._clear(book.taken)
        self._copy(book.copied)
        return self._begun(book)

    def _begun(self, book: RankStep) -> DecodeStep:
        """The tensors of a step, in the buffers reserved for its number of rows if there are."""
        tokens, rows = len(book.rows), len(book.rows) + book.pad
        ends, first = book.visible, np.zeros(0, dtype=np.int64)
        if book.starts is not None:
            ends, first = book.starts + book.visible, self._first_pages(book)
            ends = ends - first * self.book.layout.tokens_per_block
        width = -(-int(ends.max()) // self.book.layout.tokens_per_block)
        seen = int(book.position_ids.sum()) + tokens
        step = self._reserved.get(rows) or self._blank(rows, width, seen)
        model = self.config.model
        places = np.zeros((3, rows), dtype=np.int64)  # dummies: position 0, no key, no slot
        places[2] = -1
        places[:, :tokens] = book.position_ids, ends, book.slots
        step.places.copy_(self._staged(places), non_blocking=True)
        if step.starts is None:
            tables = self.book.tables.read(book.rows, width)
        else:
            tables = self.book.tables.read_from(book.rows, first, width)
            starts = np.zeros(rows, dtype=np.int64)
            starts[:tokens] = ends - book.visible
            step.starts.copy_(self._staged(starts), non_blocking=True)
        step.tables[:tokens, :width].copy_(self._staged(tables), non_blocking=True)
        if self._rope_dim:
            rope_table(step.positions, self._rope_dim, model.rope_base, out=(step.cos, step.sin))
        return step.of_book(book)

    def _first_pages(self, book: RankStep) -> Ints:
        """The first local page that some token of the same request sees, for each token."""
        assert book.starts is not None
        # The windows of a request's tokens start one after the other, with its first token's.
        begins = np.concatenate(([True], book.rows[1:] != book.rows[:-1]))
        of_request = np.maximum.accumulate(np.where(begins, np.arange(len(begins)), 0))
        first: Ints = book.starts[of_request] // self.book.layout.tokens_per_block
        return first

    def _blank(self, rows: int, width: int, seen: int) -> DecodeStep:
        """Buffers of a step that does nothing yet: `rows` dummies, tables of `width` pages.

        `seen` are the keys that its rows will see on all ranks together.
        """
        half = self._rope_dim // 2

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(shape, dtype=dtype, device=self.device)

        places = zeros(3, rows, dtype=torch.int64)
        places[2] = -1
        positions, lengths, slots = places
        step = DecodeStep(
            RankStep.of_dummies(rows),
            outputs=rows,
            positions=positions,
            cos=zeros(rows, 1, half, dtype=torch.float32),
            sin=zeros(rows, 1, half, dtype=torch.float32),
            tables=zeros(rows, width, dtype=torch.int64),
            lengths=lengths,
            slots=slots,
            places=places,
            buffers=None,
            starts=None if self.book.ledger.window is None else zeros(rows, dtype=torch.int64),
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
            settings = latent_settings(self.q_heads, product, self.pool.dtype)
        else:
            settings = decode_settings(model.head_dim, product, self.pool.dtype)
        return StepBuffers.allocate(
            rows,
            self.q_heads,
            -(-self.q_heads // settings.heads_of(self.q_heads)) if model.latent else self.kv_heads,
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
        self, step: DecodeStep, pool: Tensor, q: Tensor, k: Tensor, v: Tensor | None,
        scale: float, return_lse: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """One layer by the kernels: nothing here waits for the device, or reads from it."""
        from helix_gpu.attention.kernels.merge import merge_received
        from helix_gpu.attention.kernels.rope import rotated
        from helix_gpu.attention.kernels.step import attend_shard

        model, merged = self.config.model, []
        q, k = rotated(q, step.cos, step.sin), self._cached(rotated(k, step.cos, step.sin))
        for part, half in step.parts():
            buffers = half.buffers
            assert buffers is not None
            with self._together("attention", _named(step), unless=step.tokens is None):
                attend_shard(
                    buffers, q[part], k[part], None if v is None else v[part], pool,
                    half.slots, half.tables, half.lengths,
                    scale=scale, wide=model.product_dtype != model.dtype,
                )  # fmt: skip

            def combine(send: Tensor, buffers: StepBuffers = buffers) -> tuple[Tensor, Tensor]:
                # Layers share only the buffers.
                output = torch.empty_like(buffers.output)
                lse = torch.empty_like(buffers.lse) if return_lse else buffers.lse
                merge_received(self._exchange(send), output, lse, buffers.wire)
                return output, lse

            merged.append(self._lane.hand(combine, buffers.send))
        return _joined(merged)

    def _slots(self, table: list[int], index: Ints) -> tuple[Tensor, Tensor]:
        """Page and offset of these local indices."""
        t = self.book.layout.tokens_per_block
        return self._put(np.array(table, dtype=np.int64)[index // t]), self._put(index % t)

    def _clear(self, pages: list[int]) -> None:
        """With `poison`, fill pages just taken with NaN: whoever reads an unwritten slot shows."""
        if self._poison and pages:
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
        return self._staged(array).to(self.device, non_blocking=True)

    def _staged(self, array: np.ndarray) -> Tensor:
        """An array where the device copies from without the host's waiting."""
        there = torch.from_numpy(array)
        return there if self.device.type == "cpu" else there.pin_memory()

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
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} is a {type(tensor).__name__}; it must be a Tensor.")
        if tuple(tensor.shape) != shape or tensor.dtype != self.dtype:
            raise ValueError(
                f"{name} is {tensor.dtype} {tuple(tensor.shape)}; it must be {self.dtype} {shape}."
            )
        if tensor.device.type != self.device.type:
            raise ValueError(f"{name} is on {tensor.device}; the cache is on {self.device}.")


class PromptSteps(Iterator[DecodeStep]):
    """The steps of prompts that are computed here, each begun when it is asked for.

    Parameters
    ----------
    cache : HelixCache
    plans : sequence of Admission
        Prompts that were placed just now.
    chunk : int
        Tokens of a step, at most.
    """

    def __init__(self, cache: HelixCache, plans: Sequence[Admission], chunk: int) -> None:
        self._cache = cache
        self._chunks = cache.book.prompt_chunks(plans, chunk)
        self._next: PromptChunk | None = None
        ids = [plan.id for plan in plans]
        placed = cache._written.generations(cache.book.ledger.rows(ids))
        self._generations = dict(zip(ids, placed.tolist(), strict=True))

    def __next__(self) -> DecodeStep:
        """Begin the next step.

        Raises
        ------
        StepError
            For a request that has ended or gone on, and while the buffers reserved for so many rows
            hold another step that is not done; then it may be asked for again.
        """
        chunk = self._next = self._next or next(self._chunks)
        generations = np.array([self._generations[id] for id in chunk.ids])
        step = self._cache._begun_chunk(chunk, generations)
        self._next = None
        return step


class _Link:
    """What a cache holds of the outside: all of it is let go by `cut`, which keeps no cache alive.

    A thread of a gloo group that lets a tensor go while Python is ending aborts the process (torch
    2.13), so groups must end before: a cache in a circle of references would hold them until then.
    """

    def __init__(self, exchange: Exchange, all_ranks: dist.ProcessGroup | None) -> None:
        self.inner: Exchange | None = exchange
        self.all_ranks = all_ranks
        if dist.is_initialized():
            atexit.unregister(_end_gloo)
            atexit.register(_end_gloo)

    def exchange(self, send: Tensor) -> Tensor:
        if self.inner is None:
            raise ValueError("This cache is closed.")
        return self.inner(send)

    def cut(self) -> None:
        self.inner = self.all_ranks = None


def _end_gloo() -> None:
    """End the groups of a program that ends without having done so, by an error say.

    Destroyed groups live on in a mesh. One that nothing but itself refers to (`_flatten` makes a
    circle) is collected; for one that the program still holds the threads are given Python once
    more.
    """
    if dist.is_initialized() and dist.get_backend() == "gloo":
        dist.destroy_process_group()
    gc.collect()
    time.sleep(0.01)


class _Closed:
    """Stands for the parts of a cache that was closed."""

    def __getattr__(self, name: str) -> Any:
        raise ValueError("This cache is closed.")

    def __getitem__(self, key: object) -> Any:
        raise ValueError("This cache is closed.")


def _batch(
    ids: Sequence[int], query_lens: Sequence[int] | None, pad: int
) -> tuple[list[int], list[int] | None, int]:
    """A batch as lists of Python's integers."""
    lens = None if query_lens is None else integers("query_lens", query_lens)
    return integers("ids", ids), lens, integer("pad", pad)


def _checked_step(step: DecodeStep) -> DecodeStep:
    if not isinstance(step, DecodeStep):
        raise ValueError(f"step is {step!r}; it must be a step that `begin` or `prefill` returned.")
    return step


def _named(step: DecodeStep) -> str:
    """A step as ranks compare it."""
    if step.tokens is None:
        return "reserved"
    return f"{list(step.tokens.ids)} at {step.tokens.firsts.tolist()}"


def _checked_chunk(chunk: int) -> int:
    if integer("chunk", chunk) < 1:
        raise ValueError(f"chunk is {chunk}; it must be at least one token.")
    return int(chunk)


def _resolved(backend: Backend | None, device: torch.device, model: ModelShape) -> Backend:
    """What attends, where it can."""
    if backend is None:
        return "torch" if device.type == "cpu" else "triton"
    if backend == "torch":
        if device.type != "cpu":
            raise ValueError(f"The backend torch attends on the CPU alone, not on {device}.")
    elif backend == "triton":
        if device.type == "cpu" and not _kernels_are_interpreted():
            raise ValueError(
                "The backend triton attends on a GPU, and on the CPU under TRITON_INTERPRET=1 "
                "alone."
            )
    elif not callable(backend):
        if backend not in PACKAGES:
            raise ValueError(
                f"There is no backend {backend!r}; there are torch, triton, {', '.join(PACKAGES)}, "
                "and any function like attention.paged.attend_pages."
            )
        return load(backend, model)
    return backend


def _kernels_are_interpreted() -> bool:
    try:
        from helix_gpu.attention.kernels.common import interpreted
        from helix_gpu.attention.kernels.merge import merge_kernel
    except ImportError:
        return False
    return interpreted(merge_kernel)


def _joined(merged: Sequence[Callable[[], tuple[Tensor, ...]]]) -> tuple[Tensor, Tensor]:
    """The rows of all parts, waited for in order; those of a single one are not copied."""
    parts = [wait() for wait in merged]
    output, lse = parts[0] if len(parts) == 1 else map(torch.cat, zip(*parts, strict=True))
    return output, lse


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
