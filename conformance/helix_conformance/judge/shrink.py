"""A failing trace made small: the fewest events, ranks and tokens that still fail.

Traces are plain data and any list of events is a valid trace, so a smaller one is found by
trying: leave events out, take a smaller configuration, make single events simpler. It is much
faster than to draw a smaller trace from a strategy, and works for traces from anywhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from math import inf
from typing import Any, Final, TypeVar

import msgspec

from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.configs import AMPLE
from helix_spec.config import MAIN_POOL, CacheGroup, Config, ModelShape, config_problem
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Resume,
    Sampled,
    Skip,
    ids_of,
)
from helix_spec.layouts import Layout
from helix_spec.trace import Earlier, Trace

T = TypeVar("T")
StillFails = Callable[[Trace], Trace | None]
"""Plays a trace; where it still fails in the same way, the trace up to its failure."""

SHORT: Final = 20
"""Events of a trace that can be looked at after each of them."""
_Without = Callable[[list[Event], range], list[Event]]
"""Events from which those at these places are taken out."""
_set = msgspec.structs.replace


def reduced(
    trace: Trace, still_fails: StillFails, *, tries: int = 1000, limit_s: float = inf
) -> Trace:
    """Return the smallest failing trace that is found, starting from one that fails.

    Parameters
    ----------
    trace
        A trace that fails.
    still_fails
        Plays a trace; returns it up to where it fails, None when it does not.
    tries
        Most traces that are played.
    limit_s
        Seconds after which the search ends with what it has found.
    """
    search = _Search(trace, still_fails, tries, time.perf_counter() + limit_s)
    while search.round():
        pass
    return search.trace


class _Search:
    """The smallest failing trace so far, and how many tries are left."""

    def __init__(self, trace: Trace, still_fails: StillFails, tries: int, until: float) -> None:
        self.trace = trace
        self.still_fails = still_fails
        self.left = tries
        self.until = until
        """When the search ends."""

    @property
    def is_over(self) -> bool:
        """Whether no more traces are played."""
        return self.left <= 0 or time.perf_counter() > self.until

    def round(self) -> bool:
        """Every way to a smaller trace once; whether one led to it."""
        before, layout = self.trace, self.trace.config.layout
        self.plainer()
        super_block = layout.tokens_per_block * layout.cp_size
        self.with_fewer_events(_folded, least=1 + len(before.events) // 5)  # long runs go fast
        self.with_fewer_events(_without)
        self.with_fewer_events(_folded)
        while self.first(_set(self.trace, config=c) for c in _smaller_configs(self.trace.config)):
            pass
        layout = self.trace.config.layout
        super_block = layout.tokens_per_block * layout.cp_size
        self.simpler_events({1, layout.tokens_per_block, super_block})
        self.with_fewer_events(lambda events, places: _folded(events, places, super_block))
        merged = _merged(self.trace.events, super_block)
        self.first(_set(self.trace, events=events) for events in merged)
        self.renamed()
        return self.trace != before

    def plainer(self) -> None:
        """Played on new ranks, once, and looked at after every event; else after little before."""
        whole = self.trace
        plain = Trace(config=whole.config, events=whole.events, freedoms=whole.freedoms)
        # To look at all requests after each of many events would take what the search has left.
        short = len(self.trace.events) <= SHORT
        for names in (("before", "times"), ("before",), ("times",), *[("watch",)] * short):
            plainer = _set(self.trace, **{name: getattr(plain, name) for name in names})
            if plainer != self.trace:
                self.attempt(plainer)
        for place in range(len(self.trace.before)):
            self.less_before(place)
        # A trace that is cheap to play leaves time for the rest.
        for changes in ({"admission": "transfer"}, {"model": _set(plain.config.model, layers=1)}):
            config = _set(self.trace.config, **changes)
            if config != self.trace.config:
                self.attempt(_set(self.trace, config=config))

    def less_before(self, place: int) -> None:
        """Make what was played before small, too."""

        def still_fails(earlier: Trace) -> Trace | None:
            less = Earlier(earlier.config, earlier.events)
            before = _with(self.trace.before, place, less)
            return earlier if self.attempt(_set(self.trace, before=before)) else None

        earlier = self.trace.before[place]
        if earlier.events:
            smaller = Trace(config=earlier.config, events=earlier.events)
            reduced(smaller, still_fails, tries=min(200, self.left))

    def attempt(self, candidate: Trace) -> bool:
        """Whether the candidate fails; then it is the smallest so far."""
        if self.is_over:
            return False
        candidate = _set(candidate, events=[_fitted(e, candidate.config) for e in candidate.events])
        legal = config_problem(self.trace.config) is None
        if (config_problem(candidate.config) is None) != legal:
            return False
        for variant in (candidate, _with_same_room(candidate, self.trace) if legal else None):
            if variant is not None and not self.is_over:
                self.left -= 1
                failing = self.still_fails(variant)
                if failing is not None:
                    self.trace = failing
                    return True
        return False

    def first(self, candidates: Iterator[Trace]) -> bool:
        """The first of these that fails."""
        return any(self.attempt(candidate) for candidate in candidates)

    def with_fewer_events(self, without: _Without, *, least: int = 1) -> None:
        """Do without as many events as possible, longer stretches first, none below `least`."""
        size = len(self.trace.events)
        while size >= least:
            first = 0
            while first < len(self.trace.events):
                events = self.trace.events
                fewer = without(events, range(first, min(first + size, len(events))))
                if fewer == events or not self.attempt(_set(self.trace, events=fewer)):
                    first += size
            size //= 2

    def simpler_events(self, steps: Collection[int]) -> None:
        """Make each event as simple as can be; of its counts, by multiples of these steps too."""
        place = 0
        while place < len(self.trace.events):
            events = self.trace.events
            simpler = (_with(events, place, one) for one in _simpler_events(events[place], steps))
            if not self.first(_set(self.trace, events=fewer) for fewer in simpler):
                place += 1

    def renamed(self) -> None:
        """Number the requests in the order in which they appear."""
        ids = dict.fromkeys(id for event in self.trace.events for id in ids_of(event))
        names = {id: name for name, id in enumerate(ids)}
        if any(id != name for id, name in names.items()):
            events = [_renamed(event, names) for event in self.trace.events]
            self.attempt(_set(self.trace, events=events))


def with_room(trace: Trace) -> Trace:
    """Return the trace with pools that hardly run dry.

    Parameters
    ----------
    trace
        The trace; its events stay.
    """
    ample = [AMPLE] * len(trace.config.pages)
    pools = dict.fromkeys(trace.config.pools, ample)
    return _set(trace, config=_set(trace.config, pages=ample, pools=pools))


def gone_on(trace: Trace) -> Trace:
    """Return the trace with more decodes at its end, until each rank has had its turn.

    Parameters
    ----------
    trace
        The trace; up to four of the requests that live at its end are decoded.
    """
    state = _played(trace).state
    ids = list(state.live)[:4]
    if not ids:
        return trace
    turn = [Decode(ids, [1] * len(ids)), *([Sampled(ids)] if trace.config.overlap else [])]
    waiting = [Sampled([id]) for id in ids for _ in range(state.requests[id].outstanding)]
    turns = min(100, 2 * trace.config.layout.cp_size * trace.config.layout.tokens_per_block)
    return _set(trace, events=[*trace.events, *waiting, *turn * turns])


def _without(events: list[Event], places: range) -> list[Event]:
    """The events without those at these places."""
    return events[: places.start] + events[places.stop :]


def _folded(events: list[Event], places: range, times: int = 1) -> list[Event]:
    """The events with the tokens of decodes at these places put into their requests' prompts.

    A prompt may need more tokens to put as many on the same rank: so many times as many.
    """
    folded, more = list[Event](), Counter[int]()
    for place in reversed(range(len(events))):
        event = events[place]
        if isinstance(event, Decode) and place in places:
            for id, query_len in zip(event.ids, event.query_lens, strict=False):
                more[id] += max(0, query_len) * times
        elif isinstance(event, Admit):
            folded.append(_set(event, prompt_len=event.prompt_len + more.pop(event.id, 0)))
        else:
            folded.append(event)
    return folded[::-1]


def _merged(events: list[Event], super_block: int) -> Iterator[list[Event]]:
    """The events with one admission's tokens, or its pages, put into the prompt of another."""
    for source, event in enumerate(events):
        for target, other in enumerate(events):
            if isinstance(event, Admit) and isinstance(other, Admit) and source != target:
                for more in (event.prompt_len, -(-event.prompt_len // super_block) * super_block):
                    longer = _set(other, prompt_len=more + other.prompt_len)
                    yield _with(_with(events, target, longer), source)


def _smaller_configs(config: Config) -> Iterator[Config]:
    """Simpler configurations, the most wanted first; some are not legal."""
    layout, shape, ample = config.layout, config.model, [AMPLE] * len(config.pages)
    yield from _fewer_groups(config)
    simple = ModelShape(q_heads=config.world_size * config.tp_size, kv_heads=config.tp_size)
    for changes in (
        {"tp_size": 1},
        {"model": simple},
        {"model": _set(shape, layers=1)},
        {"model": _set(shape, cache_dtype=None)},
        {"model": _set(shape, dtype="float32", product_dtype="float32", partial_dtype="float32")},
        {"model": _set(shape, head_dim=simple.head_dim)},
        {"pages": ample},
        {"overlap": False},
        {"admission": "transfer"},
        {"max_len": 200},
        {"seed": 0},
    ):
        candidate = _set(config, **changes)
        if candidate != config:
            yield candidate
    for c in range(1, layout.cp_size):
        smaller = _set(
            config,
            layout=layout.replace(cp_size=c),
            model=_set(shape, q_heads=shape.kv_heads * config.tp_size * c),
        )
        for some in (slice(c), slice(-c, None)):
            pools = {name: sizes[some] for name, sizes in config.pools.items()}
            yield _set(smaller, pages=config.pages[some], pools=pools)
    for smaller_layout in _smaller_pages(layout):
        yield _set(config, layout=smaller_layout)
    for rank, pages in enumerate(config.pages if config.pages != ample else ()):
        for fewer in _fewer(pages):
            yield _set(config, pages=_with(config.pages, rank, fewer))


def _fewer_groups(config: Config) -> Iterator[Config]:
    """Without cache groups, with those of one layer alone, and with simpler ones."""
    if not config.groups:
        return
    yield _set(config, groups=[], pools={})
    for layer in range(config.model.layers if config.model.layers > 1 else 0):
        left = [group for group in config.groups if layer in group.layers]
        yield _with_groups(config, [_set(group, layers=[0]) for group in left], layers=1)
    for place, group in enumerate(config.groups):
        yield _with_groups(config, _with(config.groups, place), layers=config.model.layers)
        plain: dict[str, Any] = {"placement": "sharded", "window": None, "tokens_per_block": None,
                 "pool": MAIN_POOL, "rope_base": None}  # fmt: skip
        changes = [{name: value} for name, value in plain.items() if getattr(group, name) != value]
        changes += [{"window": fewer} for fewer in _fewer(group.window or 0)]
        for change in changes:
            groups = _with(config.groups, place, _set(group, **change))
            yield _with_groups(config, groups, layers=config.model.layers)


def _with_groups(config: Config, groups: list[CacheGroup], *, layers: int) -> Config:
    """The configuration with these groups and the pools that they name; `main` is one of them."""
    names = {group.pool for group in groups}
    if MAIN_POOL not in names and groups:
        groups = [_set(groups[0], pool=MAIN_POOL), *groups[1:]]
        names = {group.pool for group in groups}
    pools = {name: sizes for name, sizes in config.pools.items() if name in names}
    return _set(config, groups=groups, pools=pools, model=_set(config.model, layers=layers))


def _smaller_pages(layout: Layout) -> Iterator[Layout]:
    """The layout with fewer tokens in a page or an interleave."""
    for t in range(1, layout.tokens_per_block + 1):
        for i in range(1, t + 1):
            prompt = i if layout.prompt_interleave else None
            owner = i if layout.owner_interleave else None
            smaller = layout.replace(
                tokens_per_block=t, prompt_interleave=prompt, owner_interleave=owner
            )
            if smaller == layout:
                return
            if i == t or prompt or owner:
                yield smaller


def _simpler_events(event: Event, steps: Collection[int]) -> Iterator[Event]:
    match event:
        case Admit(_, prompt_len, chunk, prefix, salt):
            if prefix is not None:
                yield _set(event, prefix=None)
            if salt:
                yield _set(event, salt=0)
            if chunk:
                yield _set(event, chunk=0)
            for shorter in _fewer(prompt_len, steps=steps):
                yield _set(event, prompt_len=shorter)
                if prefix is not None and prefix.len > shorter:
                    yield _set(event, prompt_len=shorter, prefix=_set(prefix, len=shorter))
            if prefix is not None:
                for shorter in _fewer(prefix.len, steps=steps):
                    yield _set(event, prefix=_set(prefix, len=shorter))
            for fewer in _fewer(chunk, steps=steps):
                yield _set(event, chunk=fewer)
        case Accept(_, kept):
            for fewer in _fewer(kept):
                yield _set(event, kept=fewer)
        case Decode(ids, query_lens) | Skip(ids, query_lens):
            if isinstance(event, Decode):
                for pad in _fewer(event.pad, 0):
                    yield _set(event, pad=pad)
            if len(ids) == len(query_lens) and ids != sorted(ids):
                pairs = sorted(zip(ids, query_lens, strict=True))
                yield _set(event, ids=[id for id, _ in pairs], query_lens=[n for _, n in pairs])
            for place in range(len(ids) if len(ids) == len(query_lens) > 1 else 0):
                yield _set(event, ids=_with(ids, place), query_lens=_with(query_lens, place))
            for place, query_len in enumerate(query_lens):
                for shorter in _fewer(query_len, steps=steps):
                    yield _set(event, query_lens=_with(query_lens, place, shorter))
        case Resume(id, prefix_len) if prefix_len:
            yield Resume(id)
            for shorter in _fewer(prefix_len, steps=steps):
                yield Resume(id, shorter)
        case Fork(_, child):
            yield Admit(child, 1)  # where it does not matter what the child begins with
        case Sampled(ids):
            for place in range(len(ids) if len(ids) > 1 else 0):
                yield Sampled(_with(ids, place))
        case Merge(levels, order):
            if order != sorted(order):
                yield Merge(levels, sorted(order))
            for token in range(len(levels[0]) if len(levels[0]) > 1 else 0):
                yield Merge([_with(row, token) for row in levels], order)
            for number, row in enumerate(levels):
                for token, level in enumerate(row):
                    if level != 0:
                        yield Merge(_with(levels, number, _with(row, token, 0)), order)
        case _:
            pass


def _with(entries: Sequence[T], place: int, *others: T) -> list[T]:
    """The entries with others in place of one of them."""
    return [*entries[:place], *others, *entries[place + 1 :]]


def _fewer(count: int, least: int = 1, *, steps: Collection[int] = (1,)) -> list[int]:
    """Smaller counts to try, the smallest first: as in a bisection, down to one less.

    By multiples of each step, since many a fault needs a count of the right remainder.
    """
    closer = {count - step * ((count // step) >> by) for step in steps for by in range(14)}
    # Neighbours too: some faults show at every second or third count alone.
    tried = {least, least + 1, least + 2, count - 2, *(count - step for step in steps), *closer}
    return sorted(fewer for fewer in tried if least <= fewer < count)


def _fitted(event: Event, config: Config) -> Event:
    """The event with no more supplied partials than there are cp_ranks."""
    c = len(config.pages)
    if not isinstance(event, Merge) or len(event.order) <= c:
        return event
    return Merge(event.levels[:c], [number for number in event.order if number < c])


def _with_same_room(candidate: Trace, trace: Trace) -> Trace | None:
    """The candidate with smaller pools: no more pages are free before its last event."""
    pages = candidate.config.pages
    grouped = candidate.config.groups or trace.config.groups
    if grouped or pages != trace.config.pages or set(pages) == {AMPLE}:
        return None
    room = zip(pages, _free(candidate), _free(trace), strict=True)
    fitting = [count - max(0, now - then) for count, now, then in room]
    if fitting == pages or min(fitting) < 1:
        return None
    return _set(candidate, config=_set(candidate.config, pages=fitting))


def _free(trace: Trace) -> list[int]:
    """Free pages of each cp_rank before the last event, which may or may not find room."""
    return _played(_set(trace, events=trace.events[:-1])).state.free_pages


def _played(trace: Trace) -> Recorder:
    """A recorder that has seen all events."""
    recorder = Recorder(trace.config, freedoms=trace.freedoms)
    for event in trace.events:
        recorder.next(event)
    return recorder


def _renamed(event: Event, names: dict[int, int]) -> Event:
    fields = msgspec.structs.asdict(event)
    for field in ("id", "parent", "child"):
        if field in fields:
            fields[field] = names[fields[field]]
    if "ids" in fields:
        fields["ids"] = [names[id] for id in fields["ids"]]
    if fields.get("prefix") and isinstance(event, Admit):
        prefix = fields["prefix"]
        fields["prefix"] = _set(prefix, of=names.get(prefix.of, len(names)))
    return type(event)(**fields)
