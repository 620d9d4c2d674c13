"""What mutants are made of: engines of this project with a part swapped for a wrong one."""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import msgspec

from helix_conformance.engines.gpu import GpuEngine, LedgerEngine
from helix_gpu.bookkeeping.allocator import PageAllocator
from helix_gpu.bookkeeping.block_tables import BlockTables
from helix_gpu.bookkeeping.ledger import Ledger
from helix_gpu.bookkeeping.rank_book import RankBook
from helix_reference.attention import Token, raw, rope, value
from helix_reference.engine import ReferenceEngine
from helix_reference.groups import GroupsModel
from helix_reference.model import Model
from helix_reference.state import Request
from helix_spec.config import Config, ModelShape
from helix_spec.engine import OF_GROUPS, Outcome, RankView
from helix_spec.events import PREFIX, Admit, Decode, Event, Resume
from helix_spec.layouts import LAYOUT_NAMES


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """An engine that is wrong in one way, and what the suite should say of it."""

    name: str
    source: str
    """Where an engine really had this defect; `own` where none is known."""
    engine: str
    """`module:Class`, as on the command line."""
    expected: tuple[str, ...]
    """The invariants by one of which it should be named."""
    tier: str
    """The cheapest on which it can show: bookkeeping, contents, threads or pool."""
    profiles: tuple[str, ...]
    """What the engine lets be checked: how deep, and the features it has."""
    layouts: tuple[str, ...] = LAYOUT_NAMES
    """Layouts on which it can show."""
    tp_sizes: tuple[int, ...] = (1,)
    corner: bool = False
    """Whether it needs several things to come together, and so many more traces."""
    far: bool = False
    """Whether it shows at far positions alone, of which a run has one trace."""


MUTANTS: list[Mutant] = []

NAMED_LAZY = ("before_9757", "pr9757", "pr13180", "balanced")
STEP_RULE = ("pr9757", "pr13180")
POSITION_RULE = ("pr17866", "vllm_dcp", "balanced")
LOCKSTEP = ("pr17866", "vllm_dcp")
TAKING_TURNS = ("pr9757", "pr13180", "pr17866", "vllm_dcp", "balanced")


def mutant(
    source: str,
    *expected: str,
    features: Sequence[str] = (),
    depth: str | None = None,
    tier: str | None = None,
    layouts: Sequence[str] = LAYOUT_NAMES,
    tp_sizes: Sequence[int] = (1,),
    corner: bool = False,
    far: bool = False,
) -> Callable[[type], type]:
    """Register an engine class as a mutant, under its own name in small letters.

    `depth` is the deepest profile that is checked, by default all that its kind of engine has.
    """

    def register(engine: type) -> type:
        usual_tier, usual_depth = next(
            usual for kind, usual in _USUAL.items() if issubclass(engine, kind)
        )
        engine.__doc__ = f"{engine.__doc__}\n\nSource: {source}."
        words = "".join(f"_{c.lower()}" if c.isupper() else c for c in engine.__name__)
        MUTANTS.append(
            Mutant(
                name=words.removeprefix("_"),
                source=source,
                engine=f"{engine.__module__}:{engine.__name__}",
                expected=expected,
                tier=tier or usual_tier,
                profiles=(depth or usual_depth, *features),
                layouts=tuple(layouts),
                tp_sizes=tuple(tp_sizes),
                corner=corner,
                far=far,
            )
        )
        return engine

    return register


def rebound(function: Callable[..., Any], **names: Any) -> Any:
    """The same code, with some of the global names that it uses bound to something else."""
    inner = inspect.unwrap(function)
    assert isinstance(inner, types.FunctionType)
    unused = names.keys() - set(inner.__code__.co_names)
    if unused:
        raise ValueError(f"{inner.__qualname__} does not use {', '.join(sorted(unused))}.")
    copy = types.FunctionType(
        inner.__code__,
        {**inner.__globals__, **names},
        inner.__name__,
        inner.__defaults__,
        inner.__closure__,
    )
    copy.__kwdefaults__ = inner.__kwdefaults__
    return copy


def _book(config: Config, cp_rank: int, book: type[RankBook], **parts: Any) -> RankBook:
    """A rank's bookkeeping in which classes that it is built of are swapped by name."""
    made = book.__new__(book)
    rebound(RankBook.__init__, **parts)(made, config, cp_rank)
    return made


class OverLedger(LedgerEngine):
    """The bookkeeping of `helix_gpu`, with some of its classes swapped."""

    book_class: ClassVar[type[RankBook]] = RankBook
    ledger_class: ClassVar[type[Ledger]] = Ledger
    tables_class: ClassVar[type[BlockTables]] = BlockTables
    allocator_class: ClassVar[type[PageAllocator]] = PageAllocator
    profiles = LedgerEngine.profiles - {*OF_GROUPS, PREFIX}
    book: RankBook

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.book = _book(
                config,
                self.rank % config.layout.cp_size,
                self.book_class,
                Ledger=self.ledger_class,
                BlockTables=self.tables_class,
                PageAllocator=self.allocator_class,
            )
            self.started(config)
        return outcome

    def started(self, config: Config) -> None:
        """What a mutant changes in what was built."""


class OverCache(GpuEngine):
    """`HelixCache` with the whole exchange, a thread for each rank, with classes swapped."""

    cache_class: ClassVar[Any] = None
    profiles = GpuEngine.profiles - {*OF_GROUPS}
    book_class: ClassVar[type[RankBook]] = RankBook

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.cache.book = _book(config, self.rank % config.layout.cp_size, self.book_class)
            if self.cache_class is not None:
                self.cache.__class__ = self.cache_class
        return outcome


class OverGroups(ReferenceEngine):
    """The reference with cache groups, with its models swapped."""

    whole_class: ClassVar[type[GroupsModel]] = GroupsModel
    model_class: ClassVar[type[Model]] = Model

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        outcome = super().start(config, profiles)
        if outcome.reason is None and config.groups:
            self.whole = self.whole_class(config, model=self.model_class)
            self.model = self.whole.all[0]
        return outcome


class OverModel(ReferenceEngine):
    """The reference, with its model swapped."""

    model_class: ClassVar[type[Model]] = Model
    profiles = ReferenceEngine.profiles - {"cache", "attention", *OF_GROUPS, PREFIX}

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.whole = self.model = self.model_class(config)
            self.started()
        return outcome

    def started(self) -> None:
        """What a mutant sets up for each trace."""


@dataclass(frozen=True)
class Row:
    """One cached row: whose K and V, and at which position K was rotated."""

    token: Token
    rotated_at: int


class Stored(OverModel):
    """The reference with slots that hold what was written into them, and nothing else.

    Rows are written where the outcome says, K rotated by the position id that it says. So a
    mutant need only report a wrong slot or position to have it in its memory, too.
    """

    profiles = ReferenceEngine.profiles - {"attention", *OF_GROUPS, PREFIX}

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        self.slots: dict[int, Row] = {}
        return super().start(config, profiles)

    def apply(self, event: Event) -> Outcome:
        """Let one event happen, and write what it writes."""
        before = {id: self._pages(request) for id, request in self.model.requests.items()}
        held = {page for pages in before.values() for page in pages}
        slots, index = dict(self.slots), self.model.events_seen
        outcome = super().apply(event)
        if outcome.reason is not None:
            return outcome
        t = self.model.layout.tokens_per_block
        for id, request in self.model.requests.items():
            old = before.get(id, [])
            for place, page in enumerate(self._pages(request)):
                for offset in range(0 if page in held else t):  # a fresh page
                    copied = old[place] * t + offset if place < len(old) else None
                    self._write(page * t + offset, None if copied is None else slots.get(copied))
        match event:
            case Admit(id) | Resume(id):
                self._write_prompt(id, self.model.requests[id])
            case Decode():
                self._write_step(index, outcome)
            case _:
                pass
        return outcome

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state, the cached rows read off its slots."""
        view = self.model.view(self.cp_rank, ids)
        if "cache" not in self.checked:
            return view
        shape, t = self.config.model, self.model.layout.tokens_per_block
        heads = tuple(self.config.kv_heads_of(self.tp_rank))
        cached: dict[str, dict[int, Any]] = {"keys": {}, "values": {}}
        for id, table in view.block_tables.items():
            rows = [self.slots.get(page * t + offset) for page in table for offset in range(t)]
            layers = range(shape.layers)
            for name, part in (("keys", 0), ("values", 1)):
                cached[name][id] = [
                    [_numbers(shape, self.config.seed, row, layer, heads)[part] for row in rows]
                    for layer in layers
                ]
        return msgspec.structs.replace(view, **cached)

    def prompt_positions(self, request: Request) -> Sequence[int]:
        """The prompt positions whose KV is put on this rank, in local order."""
        return request.ranks[self.cp_rank]

    def _write_prompt(self, id: int, request: Request) -> None:
        room = len(request.tables[self.cp_rank]) * self.model.layout.tokens_per_block
        for index, position in enumerate(self.prompt_positions(request)[:room]):
            token = Token(*request.tokens[position], position)
            self._write(self.model.slot(id, self.cp_rank, index), Row(token, position))

    def _write_step(self, event: int, outcome: Outcome) -> None:
        positions = [
            step.first + place
            for step in self.model.last_steps
            for place, _ in enumerate(step.owners)
        ]
        for place, (position, slot, rotated_at) in enumerate(
            zip(positions, outcome.slots, outcome.position_ids, strict=True)
        ):
            if slot >= 0:
                self._write(slot, Row(Token(event, place, position), rotated_at))

    def _write(self, slot: int, row: Row | None) -> None:
        if row is None:
            self.slots.pop(slot, None)
        else:
            self.slots[slot] = row

    def _pages(self, request: Request) -> list[int]:
        return [page.number for page in request.tables[self.cp_rank]]


Numbers = list[list[float]]


@lru_cache(maxsize=2**14)
def _numbers(
    shape: ModelShape, seed: int, row: Row | None, layer: int, heads: tuple[int, ...]
) -> tuple[Numbers, Numbers]:
    """K and V of one slot, NaN where nothing was written."""
    if row is None:
        nothing = [[float("nan")] * shape.key_dim for _ in heads]
        return nothing, [row[: shape.value_dim] for row in nothing]
    v = [value(shape, seed, row.token, layer, head) for head in heads]
    still = shape.key_dim - shape.rope_dim
    dtypes = shape.dtype, shape.cached_dtype
    unturned = [raw(seed, row.token, layer, "k", head, shape.key_dim) for head in heads]
    rows = [rope(k, row.rotated_at, shape.rope_base, *dtypes, still=still) for k in unturned]
    return [rotated.stored for rotated in rows], v


_USUAL: dict[type, tuple[str, str]] = {
    Stored: ("contents", "cache"),
    OverModel: ("bookkeeping", "pages"),
    OverGroups: ("bookkeeping", "pages"),
    OverLedger: ("bookkeeping", "pages"),
    OverCache: ("threads", "attention"),
    ReferenceEngine: ("bookkeeping", "pages"),
}
"""Tier and depth of a mutant, by what it is made from."""
