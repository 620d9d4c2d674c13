"""`helix_gpu` behind the engine protocol: its bookkeeping alone, and the whole of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Final

import msgspec
import numpy as np

from helix_conformance.expect.arrays import (
    Layers,
    Tokens,
    entries,
    partial_of,
    queries,
    sinks_of,
    values,
)
from helix_gpu.bookkeeping.group_book import GroupBook
from helix_gpu.bookkeeping.rank_book import RankBook, RankStep
from helix_gpu.bookkeeping.refusals import Refused, check_config
from helix_spec import events as ev
from helix_spec.config import MAIN_POOL, Config, ModelShape
from helix_spec.engine import OF_GROUPS, GroupColumns, GroupView, Outcome, RankView
from helix_spec.events import FEATURES, MERGE, Event, Reason

if TYPE_CHECKING:
    import torch
    from torch.distributed import ProcessGroup

    from helix_gpu.cache import Backend, DecodeStep, HelixCache, PromptKV
    from helix_gpu.comm.exchange import Exchange, MakeExchange
    from helix_gpu.comm.hop_b import Costs

CHUNK: Final = 5
"""Prompt tokens that are computed at a time, with `admission` prefill: across pages and turns."""
Identity = tuple[int, int]
"""What a token is: the index of the event that created it, its place in that event."""


class LedgerEngine:
    """Ledger, allocator and block tables of one rank, without tensors.

    Parameters
    ----------
    rank : int
        The global rank, tp_rank * cp_size + cp_rank (MAP-1).

    Examples
    --------
    >>> from helix_spec.layouts import named_layout
    >>> layout = named_layout("pr9757", cp_size=2, tokens_per_block=4)
    >>> engine = LedgerEngine(0)
    >>> config = Config(layout=layout, pages=[8, 8], max_len=24)
    >>> engine.start(config, engine.profiles).reason is None
    True
    >>> engine.apply(ev.Admit(1, prompt_len=5)).reason is None
    True
    >>> engine.observe().local_len
    {1: 4}
    """

    profiles: ClassVar[frozenset[str]] = frozenset(
        {"placement", "lengths", "pages", *FEATURES, *OF_GROUPS}
    )
    needs_processes: ClassVar[bool] = False

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin a new trace; see `Engine.start`.

        Parameters
        ----------
        config : Config
            What every rank is started with; it may be illegal.
        profiles : frozenset of str
            The profiles that are checked.

        Returns
        -------
        Outcome
            With `reason` None when the rank is ready, else `bad_config`.
        """
        book = GroupBook if config.groups else RankBook
        try:
            self.book: RankBook | GroupBook = book(config, self.rank % config.layout.cp_size)
        except Refused as refused:
            return Outcome(refused.reason)
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Apply one event on this rank; see `Engine.apply`."""
        try:
            match event:
                case ev.Admit(id, prompt_len):
                    self.book.admit(id, prompt_len)
                case ev.Decode(ids, query_lens, pad):
                    return _outcome(self.book.decode_step(ids, query_lens, pad))
                case ev.Resume(id):
                    self.book.resume(id)
                case ev.Merge():
                    return Outcome(Reason.UNSUPPORTED)
                case _:
                    _follow(self.book, event)
        except Refused as refused:
            return Outcome(refused.reason)
        return Outcome()

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """Return this rank's lengths and block tables; see `Engine.observe`."""
        return _view(self.book, ids)


class GpuEngine:
    """One rank of `HelixCache`, fed with the suite's Q, K and V (SPEC.md section 8).

    Parameters
    ----------
    rank : int
        The global rank, tp_rank * cp_size + cp_rank (MAP-1).
    """

    profiles: ClassVar[frozenset[str]] = LedgerEngine.profiles | {"cache", "attention", MERGE}
    needs_processes: ClassVar[bool] = True
    cp_groups: ClassVar[dict[int, list[ProcessGroup]]] = {}
    """By cp_size, the group of each tp_rank."""
    exchange: Exchange | None = None
    """Stands in for the group's all-to-all, where the ranks are threads of one process."""
    travel: ClassVar[str] = "all_to_all"
    """How partials travel in the group: a function of `helix_gpu.comm.exchange`."""
    exchanges_done: int = 0
    """Where the counter of an exchange that has one starts."""
    backend: ClassVar[Backend | None] = None
    """What attends, where it is not the device's default."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @classmethod
    def join(cls, world_size: int) -> None:
        """Make the groups of every cp_size that fits; see `Engine.join`.

        All processes make all groups, since `new_group` wants them in one order on all ranks.
        """
        import torch.distributed as dist

        for cp_size in range(2, world_size + 1):
            cls.cp_groups[cp_size] = [
                dist.new_group(list(range(first, first + cp_size)))
                for first in range(0, world_size - cp_size + 1, cp_size)
            ]

    @classmethod
    def make_exchange(cls) -> MakeExchange:
        """Return what makes the exchange by which partials travel in a group."""
        from helix_gpu.comm import exchange

        make: MakeExchange = getattr(exchange, cls.travel)
        return make

    @staticmethod
    def device() -> str:
        """Return where the cache lives: on this rank's GPU under NCCL."""
        return _device()

    @staticmethod
    def hop_b() -> Costs | None:
        """Return the costs by which a step attends in halves; None where it never does."""
        return None

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin a new trace; see `Engine.start`.

        Parameters
        ----------
        config : Config
            What every rank is started with; it may be illegal.
        profiles : frozenset of str
            The profiles that are checked.

        Returns
        -------
        Outcome
            With `reason` None when the rank is ready, else `bad_config`.
        """
        from helix_gpu.cache import HelixCache
        from helix_gpu.group_cache import GroupCache

        try:
            check_config(config)
            cp_size, exchange = config.layout.cp_size, self.exchange
            if cp_size > 1 and exchange is None:
                group = self.cp_groups[cp_size][self.rank // cp_size]
                counted = {"done": self.exchanges_done} if self.travel == "push" else {}
                exchange = self.make_exchange()(group, config.model, **counted)
            cache = GroupCache if config.groups else HelixCache
            self.cache: HelixCache = cache(
                config,
                rank=self.rank,
                device=self.device(),
                exchange=exchange,
                backend=self.backend,
                hop_b=self.hop_b(),
                poison=config.poison,
            )
        except Refused as refused:
            return Outcome(refused.reason)
        self.config = config
        self.profiles_checked = profiles
        self.events = 0
        self.tokens: dict[int, list[Identity]] = {}
        """Identities by position; those that a rewind has cut off stay until decoded again."""
        tp_rank, shape = self.rank // cp_size, config.model
        q_heads = shape.q_heads // config.tp_size
        self.kv_heads = config.kv_heads_of(tp_rank)
        self.q_heads = range(tp_rank * q_heads, (tp_rank + 1) * q_heads)
        self.layers = {
            group.name: Layers(group.layers, number)
            for number, group in enumerate(config.cache_groups)
        }
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Apply one event on this rank; see `Engine.apply`."""
        self.events += 1
        try:
            match event:
                case ev.Admit(id, prompt_len, chunk):
                    self._admit(id, prompt_len, chunk or CHUNK)
                case ev.Decode(ids, query_lens, pad):
                    return self._decode(ids, query_lens, pad)
                case ev.Resume(id):
                    self._resume(id)
                case ev.Merge():
                    return self._merge(event)
                case _:
                    _follow(self.cache, event)
            match event:
                case ev.Fork(parent, child):
                    self.tokens[child] = list(self.tokens[parent])
                case ev.Release(id):
                    del self.tokens[id]
        except Refused as refused:
            return Outcome(refused.reason)
        return Outcome()

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """Return this rank's lengths and block tables, and the cached rows; see `Engine.observe`.

        The rows are read off the pool: arrays of shape (layers, slots, kv_heads, dim), float32.
        """
        view = _view(self.cache.book, ids)
        if "cache" not in self.profiles_checked:
            return view
        if not view.groups:
            return msgspec.structs.replace(view, **self._cached(self.cache, view.block_tables))
        members = self._members()
        return msgspec.structs.replace(
            view,
            groups={
                name: msgspec.structs.replace(one, **self._cached(members[name], one.block_tables))
                for name, one in view.groups.items()
            },
        )

    def _members(self) -> dict[str, HelixCache]:
        """The caches of the cache groups."""
        cache: Any = self.cache
        members: dict[str, HelixCache] = cache.members
        return members

    def _merge(self, event: ev.Merge) -> Outcome:
        """The partials of this rank through the exchange and the merge that attention uses."""
        import torch

        output, lse = (torch.from_numpy(x) for x in partial_of(self.config, event, self.rank))
        merged = self.cache.combine(output.to(self.cache.device), lse.to(self.cache.device))
        return Outcome(output=_numbers(merged))

    def _admit(self, id: int, prompt_len: int, chunk: int) -> None:
        now = self.events - 1
        if self.config.admission == "prefill":
            self._compute(self.cache.prefill(id, prompt_len, chunk), lambda p: (now, p))
        else:
            self.cache.admit(id, prompt_len, self._prompts(lambda p: (now, p)))
        self.tokens[id] = [(now, place) for place in range(prompt_len)]

    def _resume(self, id: int) -> None:
        if self.config.admission == "prefill":
            self._compute(self.cache.recompute(id, CHUNK), lambda p: self.tokens[id][p])
        else:
            self.cache.resume(id, self._prompts(lambda p: self.tokens[id][p]))

    def _compute(self, steps: Iterable[DecodeStep], identity: Callable[[int], Identity]) -> None:
        """Every layer of a prompt that is computed here; nobody asks for its output."""
        for step in steps:
            self._attend(step, self._share(step.book.position_ids, identity))

    def _prompts(self, identity: Callable[[int], Identity]) -> Any:
        """K and V of a prompt, by cache group where there are any."""
        of_groups = {name: self._prompt_kv(identity, of) for name, of in self.layers.items()}
        return of_groups if self.config.groups else next(iter(of_groups.values()))

    def _prompt_kv(self, identity: Callable[[int], Identity], of: Layers) -> PromptKV:
        """K and V of a prompt, given the identity of the token at each position."""

        def prompt_kv(positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
            return self._kv(self._share(positions.cpu().numpy(), identity), of)

        return prompt_kv

    @staticmethod
    def _share(positions: np.ndarray, identity: Callable[[int], Identity]) -> Tokens:
        """A prompt's tokens at these positions."""
        columns = np.array([identity(int(p)) for p in positions], dtype=np.int64)
        return Tokens(columns[:, 0], columns[:, 1], positions)

    def _decode(self, ids: list[int], query_lens: list[int], pad: int) -> Outcome:
        step = self.cache.begin(ids, query_lens, pad)
        positions = step.book.position_ids
        self._remember(ids, query_lens, positions)
        event = np.full(len(positions), self.events - 1, dtype=np.int64)
        output = self._attend(step, Tokens(event, np.arange(len(positions)), positions))
        of_groups = {name: one.book for name, one in step.groups.items()}
        outcome = _outcome(of_groups or step.book)
        if "attention" not in self.profiles_checked:
            return outcome
        return msgspec.structs.replace(outcome, output=_numbers(output))

    def _attend(self, step: DecodeStep, tokens: Tokens) -> torch.Tensor:
        """The output of all layers for a step's tokens."""
        import torch

        shape, pad = self.config.model, step.book.pad
        q = self._padded(self._tensor(queries(shape, self.config.seed, tokens, self.q_heads)), pad)
        given: list[tuple[dict[str, Any], dict[str, Any]]] = [({}, {}) for _ in range(shape.layers)]
        for name, of in self.layers.items():
            k, v = self._kv(tokens, of)
            for place, layer in enumerate(of.numbers):
                ks, vs = given[layer]
                ks[name] = self._padded(k[place], pad)
                vs[name] = None if v is None else self._padded(v[place], pad)
        outputs = []
        for layer, (ks, vs) in enumerate(given):
            kv: tuple[Any, Any] = (ks, None if shape.latent else vs)
            if not self.config.groups:
                kv = next(iter(ks.values())), next(iter(vs.values()))
            outputs.append(self.cache.attend(step, layer, q[layer], *kv, sinks=self._sinks(layer)))
        return torch.stack(outputs)

    def _sinks(self, layer: int) -> Any:
        """The sinks of this tp_rank's query heads; None for a model without them."""
        import torch

        sinks = sinks_of(self.config.model, self.config.seed, layer)
        if sinks is None:
            return None
        mine = sinks[self.q_heads.start : self.q_heads.stop]
        return torch.from_numpy(mine).float().to(self.cache.device)

    def _remember(self, ids: list[int], query_lens: list[int], positions: np.ndarray) -> None:
        """The new tokens of the present decode, in place of any that were rewound."""
        place = 0
        for id, query_len in zip(ids, query_lens, strict=True):
            group = range(place, place + query_len)
            self.tokens[id][positions[place] :] = [(self.events - 1, i) for i in group]
            place += query_len

    def _kv(self, tokens: Tokens, of: Layers) -> tuple[torch.Tensor, torch.Tensor | None]:
        """K, not rotated, and V of this rank's heads; a latent row has no V of its own."""
        shape, seed, heads = self.config.model, self.config.seed, self.kv_heads
        k = entries(seed, tokens, of.numbers, "k", heads, shape.key_dim, of.group)
        v = None if shape.latent else self._tensor(values(shape, seed, tokens, heads, of))
        return self._tensor(k), v

    def _tensor(self, values: np.ndarray) -> torch.Tensor:
        import torch

        return torch.from_numpy(values).to(self.cache.device, self.cache.dtype)

    def _padded(self, rows: torch.Tensor, pad: int) -> torch.Tensor:
        """Rows of dummy requests behind the real ones, NaN: they must influence nothing."""
        import torch

        return torch.nn.functional.pad(rows, (0, 0, 0, 0, 0, pad), value=float("nan"))

    def _cached(
        self, cache: HelixCache, tables: Mapping[int, list[int]]
    ) -> dict[str, dict[int, np.ndarray]]:
        """Keys and values of requests in the pages that they hold."""
        value_dim = self.config.model.value_dim  # a latent row is key and value
        keys, values = dict[int, np.ndarray](), dict[int, np.ndarray]()
        for id, table in tables.items():
            # (layers, pages, parts, T, heads, dim), then (layers, parts, slots, heads, dim)
            pages = cache.pool[:, [page for page in table if page >= 0]]
            rows = _numbers(pages.transpose(1, 2).flatten(2, 3))
            keys[id], values[id] = rows[:, 0], rows[:, -1, ..., :value_dim]
        return {"keys": keys, "values": values}


class AllGatherEngine(GpuEngine):
    """A `GpuEngine` whose partials travel by all-gather."""

    travel = "all_gather"


class ReduceScatterEngine(GpuEngine):
    """A `GpuEngine` that gathers log-sum-exps and reduce-scatters weighted outputs.

    Its partials are float32, whatever the configuration says.
    """

    travel = "reduce_scatter"

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """See `GpuEngine.start`."""
        model = msgspec.structs.replace(config.model, partial_dtype="float32")
        return super().start(msgspec.structs.replace(config, model=model), profiles)


class HopBEngine(GpuEngine):
    """A `GpuEngine` that attends in halves, one half while the other's partials travel.

    It does so in every step of two rows or more. Cache groups never do.
    """

    profiles = GpuEngine.profiles - {*OF_GROUPS}

    @staticmethod
    def hop_b() -> Costs | None:
        """Return costs under which halves always pay: bytes cost much and all else nothing."""
        from helix_gpu.comm.hop_b import Costs

        return Costs(latency=0, exchange_speed=1, attention_speed=1, second_half=0)


class PushEngine(GpuEngine):
    """A `GpuEngine` whose ranks write their partials into their peers' memory."""

    windows: ClassVar[dict[int, Exchange]] = {}
    """By cp_size, the exchange of this rank's group, for all traces."""

    @classmethod
    def join(cls, world_size: int) -> None:
        """Make the windows of every cp_size; see `Engine.join`.

        Each rank makes as many windows, a rank that is left over in a group of its own. Torch
        counts rendezvous by process: a rank that one leaves out blocks in the next (pytorch issue
        196082).
        """
        import torch.distributed as dist

        from helix_gpu.comm.push import push

        super().join(world_size)
        alone = [dist.new_group([rank]) for rank in range(world_size)]
        for cp_size, groups in cls.cp_groups.items():
            place = dist.get_rank() // cp_size
            group = groups[place] if place < len(groups) else alone[dist.get_rank()]
            cls.windows[cp_size] = push(group, ModelShape())

    @classmethod
    def make_exchange(cls) -> MakeExchange:
        """See `GpuEngine.make_exchange`; the windows are new where another engine joined."""
        from helix_gpu.comm.push import push

        return lambda group, model: cls.windows.get(group.size()) or push(group, model)


def _follow(
    book: RankBook | GroupBook | HelixCache,
    event: ev.Skip | ev.Accept | ev.Sampled | ev.Fork | ev.Release | ev.Preempt,
) -> None:
    """Let an event happen that asks for no K, V or attention."""
    match event:
        case ev.Skip(ids, query_lens):
            book.skip(ids, query_lens)
        case ev.Accept(id, kept):
            book.accept(id, kept)
        case ev.Sampled(ids):
            book.sampled(ids)
        case ev.Fork(parent, child):
            book.fork(parent, child)
        case ev.Release(id):
            book.release(id)
        case ev.Preempt(id):
            book.preempt(id)


def _outcome(step: RankStep | Mapping[str, RankStep]) -> Outcome:
    if isinstance(step, RankStep):
        return Outcome(
            None,
            step.past_len.tolist(),
            step.position_ids.tolist(),
            step.active.tolist(),
            step.slots.tolist(),
            step.visible.tolist(),
        )
    of_groups = {
        name: GroupColumns(
            one.past_len.tolist(), one.active.tolist(), one.slots.tolist(), one.visible.tolist()
        )
        for name, one in step.items()
    }
    positions = next(iter(step.values())).position_ids.tolist()
    return Outcome(position_ids=positions, groups=of_groups)


def _view(book: RankBook | GroupBook, ids: Sequence[int] | None) -> RankView:
    asked = book.request_ids if ids is None else book.live(ids)
    if isinstance(book, RankBook):
        return RankView(*_holdings(book, asked), book.preempted_ids, book.free_pages)
    free = book.free_by_pool
    return RankView(
        {},
        preempted=book.preempted_ids,
        free_pages=free.pop(MAIN_POOL),
        groups={name: GroupView(*_holdings(one, asked)) for name, one in book.books.items()},
        pools=free,
    )


def _holdings(book: RankBook, ids: Sequence[int]) -> tuple[dict[int, int], dict[int, list[int]]]:
    """Lengths and block tables of live requests."""
    lengths, tables = book.holdings(ids)
    return dict(zip(ids, lengths, strict=True)), dict(zip(ids, tables, strict=True))


def _device() -> str:
    import torch
    import torch.distributed as dist

    nccl = dist.is_initialized() and dist.get_backend() == "nccl"
    return f"cuda:{torch.cuda.current_device()}" if nccl else "cpu"


def _numbers(tensor: torch.Tensor) -> np.ndarray:
    """The tensor as float32, which holds every float16 and bfloat16 exactly."""
    numbers: np.ndarray = tensor.float().cpu().numpy()
    return numbers
