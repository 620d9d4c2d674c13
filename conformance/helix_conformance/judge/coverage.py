"""How often a run visited the situations in which engines go wrong.

A `Coverage` is fed every expectation. It judges nothing: it says whether a passing run has been
where it matters, and tells what it missed from what it could not have met. It looks at what an
event touched and at nothing else, so that counting costs little beside judging.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from itertools import pairwise
from math import gcd
from typing import Any, Final

import msgspec

from helix_conformance.expect.expectation import Expectation, Page, Request, State
from helix_conformance.generate.sizes import FAR_POSITIONS, SIZES
from helix_spec import events as ev
from helix_spec.capabilities import EVERYWHERE, Box, Numbers, Span, values_of
from helix_spec.config import Config
from helix_spec.engine import OF_GROUPS
from helix_spec.events import FEATURES, Decode, Event, Reason, ids_of
from helix_spec.layouts import NAMED_LAYOUTS

HIGH_PAGE: Final = 16
"""A rank with more pages than this in use has page ids that small tests never see."""

RANKS: Final = "a cp_size of 2 or more"
TURNS: Final = "a layout whose ranks take turns"
PAGES: Final = "profile pages"
GROUPS: Final = "profile speculative or overlap"
RANDOM: Final = "random traces"
STEPS: Final = "profile placement"
"""An engine of merges alone is sent no request."""
LONG: Final = "groups of more than T*C tokens in the capabilities"

_REFUSED: Final[dict[Reason, str]] = {
    reason: f"refused: {reason}" for reason in Reason if reason != Reason.BAD_CONFIG
}

_NEEDS: Final[dict[str, tuple[str, ...]]] = {
    "prompt of whole super-blocks": (RANKS,),
    "prompt coprime to T*C": (RANKS,),
    "id admitted again": (),
    "empty rank": (RANKS,),
    "page boundary": (),
    "ownership wrap": (RANKS, TURNS),
    "page boundary inside a group": ("profile speculative",),
    "ownership boundary inside a group": (RANKS, TURNS, "profile speculative"),
    "group longer than a super-block": ("profile speculative", RANDOM, LONG),
    "rewind over a boundary": ("profile speculative",),
    "padded batch": ("profile padding",),
    "skip, then decode": (RANDOM,),
    "two decodes outstanding": ("profile overlap",),
    "fork, then divergence": ("profile fork",),
    "copy on write": ("profile fork",),
    "resumed": ("profile preempt",),
    "released page used again": (),
    "high page ids": (),
    "one pool exhausted alone": (RANKS, PAGES),
    "refusal, then retry": (PAGES,),
    "accepted, then told again and refused": (RANDOM,),
    "max_len reached": (RANDOM,),
    "a layer that reads a sharded and a replicated group": (RANKS, "profile groups"),
    "cache groups that exhaust their pool together": ("profile groups", PAGES),
    "window edge on a page edge": ("profile window",),
    "page behind a window returned": ("profile window", PAGES),
    "page kept for a rewind into a window": ("profile window", "profile speculative", PAGES),
    "fork with pages behind a window": ("profile window", "profile fork", PAGES),
    **{name: (RANDOM,) for name in _REFUSED.values()},
    _REFUSED[Reason.PREEMPTED_REQUEST]: (RANDOM, "profile preempt"),
    _REFUSED[Reason.NOT_PREEMPTED]: (RANDOM, "profile preempt"),
    _REFUSED[Reason.NOTHING_OPEN]: (RANDOM, GROUPS),
    _REFUSED[Reason.OUT_OF_PAGES]: (PAGES,),
}
SITUATIONS: Final = {name: (STEPS, *needs) for name, needs in _NEEDS.items()}
"""What is looked for, with all that it takes to happen."""

_FAR: Final = frozenset(FAR_POSITIONS)

ALL_NEEDS: Final = frozenset(need for needs in SITUATIONS.values() for need in needs)


def at_hand(
    profiles: Collection[str],
    *,
    layouts: Iterable[str],
    cp_sizes: Collection[int],
    random: bool = True,
    boxes: Sequence[Box] = EVERYWHERE,
) -> frozenset[str]:
    """Return which needs of SITUATIONS a run meets.

    Parameters
    ----------
    profiles
        Profiles that the engine declares.
    layouts
        Names of the layouts that may be drawn.
    cp_sizes
        The cp_sizes that may be drawn; at least one.
    random
        Whether traces are random. A workload only admits, decodes and releases.
    boxes
        Where the engine works.

    Returns
    -------
    frozenset of str
        Needs as SITUATIONS names them.

    Examples
    --------
    >>> needs = at_hand(["placement", "pages"], layouts=["pr9757"], cp_sizes=[2], random=False)
    >>> sorted(needs)[:2]
    ['a cp_size of 2 or more', 'a layout whose ranks take turns']
    """
    if "placement" not in profiles:
        return frozenset()
    if not random:
        profiles = {"pages"}.intersection(profiles)
    found = {STEPS, RANDOM} if random else {STEPS}
    if any(_most(box.query_len) > _least(box.tokens_per_block) * min(cp_sizes) for box in boxes):
        found.add(LONG)
    found |= {f"profile {name}" for name in ("pages", *FEATURES, *OF_GROUPS) if name in profiles}
    if {"speculative", "overlap"}.intersection(profiles):
        found.add(GROUPS)
    if max(cp_sizes) > 1:
        found.add(RANKS)
    if any(name == "custom" or NAMED_LAYOUTS[name].owner != "last_rank" for name in layouts):
        found.add(TURNS)
    return frozenset(found)


def _least(allowed: Numbers | None) -> int:
    """The smallest of these numbers."""
    if allowed is None:
        return 1
    return allowed.min if isinstance(allowed, Span) else min(allowed)


def _most(allowed: Numbers | None) -> int:
    """The largest of these numbers."""
    if allowed is None:
        return Span().max
    return allowed.max if isinstance(allowed, Span) else max(allowed)


class Coverage:
    """Counts of situations, over the traces of one run.

    Parameters
    ----------
    needs
        What the run has at hand, as `at_hand` returns it; all needs unless given.
    """

    def __init__(self, needs: Collection[str] = ALL_NEEDS) -> None:
        self.needs = needs
        self.counts = dict.fromkeys(SITUATIONS, 0)
        self.sizes: dict[str, Counter[Any]] = {name: Counter() for name in SIZES}
        """How often each size of a dimension was played."""
        self.trace: _Trace | _GroupsTrace | None = None

    def saw(self, config: Config, expected: Expectation) -> None:
        """Count the situations of one event.

        Parameters
        ----------
        config
            Configuration of the trace.
        expected
            The event's expectation; index 0 begins a new trace. Its state must still be readable.
        """
        if self.trace is None or expected.index == 0:
            assert expected.state is not None
            plain = not config.groups
            self.trace = _Trace(config, expected.state) if plain else _GroupsTrace(config)
            for dimension, values in values_of(config).items():
                if dimension in self.sizes:
                    self.sizes[dimension].update(values)
        if expected.refused is None:
            self._measure(expected)
        for name in self.trace.saw(expected):
            self.counts[name] += 1

    def add(self, other: Coverage) -> None:
        """Add what other traces of the same run have visited.

        Parameters
        ----------
        other
            Their counts.
        """
        for name, count in other.counts.items():
            self.counts[name] += count
        for dimension, sizes in other.sizes.items():
            self.sizes[dimension].update(sizes)

    def _measure(self, expected: Expectation) -> None:
        """Count the sizes of an event that is accepted."""
        event = expected.event
        if isinstance(event, Decode):
            self.sizes["batch"][len(event.ids) + event.pad] += 1
            self.sizes["query_len"].update(event.query_lens)
            assert expected.decoded is not None
            positions = _FAR.intersection(expected.decoded.position_ids)
            self.sizes["position"].update(positions)
        elif isinstance(event, ev.Admit | ev.Fork):
            assert expected.state is not None
            self.sizes["live_requests"][len(expected.state.live)] += 1

    def drawn(self) -> dict[str, dict[str, int]]:
        """Return how often each size worth drawing was played, by dimension."""
        return {
            dimension: {size_text(size): self.sizes[dimension][size] for size in sizes}
            for dimension, sizes in SIZES.items()
        }

    @property
    def missed(self) -> list[str]:
        """Return the situations that could have occurred and never did."""
        return [name for name, count in self.counts.items() if not count and not self._lacks(name)]

    @property
    def impossible(self) -> dict[str, str]:
        """Return the situations that could not occur, each with what it would have taken."""
        return {
            name: ", ".join(self._lacks(name))
            for name, count in self.counts.items()
            if not count and self._lacks(name)
        }

    def _lacks(self, name: str) -> list[str]:
        return [need for need in SITUATIONS[name] if need not in self.needs]


def size_text(size: Any) -> str:
    """Return a size as reports write it.

    Examples
    --------
    >>> size_text((512, 64)), size_text(128)
    ('512+64', '128')
    """
    return "+".join(map(str, size)) if isinstance(size, tuple) else str(size)


class _Trace:
    """What has to be remembered of one trace."""

    def __init__(self, config: Config, state: State) -> None:
        self.state, self.max_len = state, config.max_len
        self.cp, self.t = config.layout.cp_size, config.layout.tokens_per_block
        self.accepted: Event | None = None
        """The event before, when it was."""
        self.ever: set[int] = set()
        """Ids ever admitted."""
        self.skipped: set[int] = set()
        self.refused: set[tuple[type[Event], int]] = set()
        """What was refused for want of pages, until it is accepted."""
        self.shared: dict[int, Sequence[list[Page]]] = {}
        """Tables of requests that were forked."""
        self.grown: dict[int, list[int]] = {}
        """Pages on each rank of requests whose last group was longer than one."""
        self.free = list(state.free_pages)
        self.untouched = list(self.free)
        """Per rank, free pages now, and those never taken. Pools give out first what came back."""
        used = [sum(len(state.tables(id)[rank]) for id in state.live) for rank in range(self.cp)]
        self.sizes = [free + held for free, held in zip(self.free, used, strict=True)]

    def request(self, id: int) -> Request:
        """A request as it is now."""
        assert self.state.requests is not None
        return self.state.requests[id]

    def saw(self, expected: Expectation) -> set[str]:
        """The situations that this event was in."""
        event, reason = expected.event, expected.refused
        before, self.accepted = self.accepted, event if reason is None else None
        if reason is not None:
            twice = ["accepted, then told again and refused"] if event == before else []
            return {*self._refusal(event, reason), *twice}
        found: set[str] = set()
        if self.refused:
            again = {(type(event), id) for id in ids_of(event)} & self.refused
            if again:
                self.refused -= again
                found.add("refusal, then retry")
        match event:
            case Decode(ids, _, pad):
                if pad:
                    found.add("padded batch")
                if self.skipped and not self.skipped.isdisjoint(ids):
                    found.add("skip, then decode")
                    self.skipped.difference_update(ids)
                self._stepped(event, expected, found)
            case ev.Admit(id, prompt_len):
                found.update(self._admitted(id, prompt_len))
            case ev.Accept(id):
                found.update(self._rewound(id))
            case ev.Skip(ids):
                self.skipped.update(ids)
                return found
            case ev.Fork(parent, child):
                for id in (parent, child):
                    self.shared[id] = self._tables(id)
            case ev.Release(id) | ev.Preempt(id):
                self.shared.pop(id, None)
                self.grown.pop(id, None)
            case ev.Resume():
                found.add("resumed")
            case _:
                return found
        self._pages(found)
        return found

    def _refusal(self, event: Event, reason: Reason) -> Iterator[str]:
        yield _REFUSED[reason]
        if reason == Reason.OUT_OF_PAGES:
            self.refused |= {(type(event), id) for id in ids_of(event)}
            if min(self.free) == 0 < max(self.free):
                yield "one pool exhausted alone"

    def _admitted(self, id: int, prompt_len: int) -> Iterator[str]:
        if id in self.ever:
            yield "id admitted again"
        self.ever.add(id)
        if self.cp > 1 and self.t > 1 and prompt_len > 1:
            if prompt_len % (self.cp * self.t) == 0:
                yield "prompt of whole super-blocks"
            if gcd(prompt_len, self.cp * self.t) == 1:
                yield "prompt coprime to T*C"

    def _stepped(self, event: Decode, expected: Expectation, found: set[str]) -> None:
        """Each request's part in a decode. Most are of one token: that way is short."""
        decoded, token = expected.decoded, 0
        assert decoded is not None
        columns = zip(event.ids, event.query_lens, decoded.past_len, strict=True)
        for id, query_len, past_len in columns:
            request, owners = self.request(id), decoded.owners[token : token + query_len]
            first = decoded.position_ids[token]
            token += query_len
            if query_len == 1:
                held = past_len[owners[0]]
                if held and held % self.t == 0:
                    found.add("page boundary")
                if self.grown:
                    self.grown.pop(id, None)
            else:
                self._grouped(owners, past_len, request.shift, found)
                self.grown[id] = [len(table) for table in request.tables]
            if self.cp > 1:
                if not all(request.ranks):
                    found.add("empty rank")
                turn_begins = (owners[0] - request.shift) % self.cp == 0
                if turn_begins and self._last_was_last(first, past_len, request):
                    found.add("ownership wrap")
            if request.outstanding == 2:
                found.add("two decodes outstanding")
            if len(request.tokens) == self.max_len:
                found.add("max_len reached")
            if id in self.shared:
                self._diverged(id, found)

    def _diverged(self, id: int, found: set[str]) -> None:
        """A request that was forked got tokens of its own."""
        found.add("fork, then divergence")
        tables = self._tables(id)
        for old, new in zip(self.shared[id], tables, strict=True):
            if old != new[: len(old)]:
                found.add("copy on write")
        self.shared[id] = tables

    def _grouped(
        self, owners: Sequence[int], past_len: Sequence[int], shift: int, found: set[str]
    ) -> None:
        """A group of several tokens, and the boundaries inside it."""
        held = list(past_len)
        if len(owners) > self.cp * self.t:
            found.add("group longer than a super-block")
        for place, owner in enumerate(owners):
            if held[owner] and held[owner] % self.t == 0:
                found.add("page boundary")
                if place:
                    found.add("page boundary inside a group")
            held[owner] += 1
        if len(set(owners)) > 1:
            found.add("ownership boundary inside a group")
            logical = [(owner - shift) % self.cp for owner in owners]
            if (self.cp - 1, 0) in pairwise(logical):
                found.add("ownership wrap")

    def _last_was_last(self, first: int, past_len: Sequence[int], request: Request) -> bool:
        """Whether the token before position `first` was decoded, by the last rank of the turn."""
        rank = (request.shift - 1) % self.cp
        held = past_len[rank]
        return (
            first > request.prompt_len and held > 0 and request.ranks[rank][held - 1] == first - 1
        )

    def _rewound(self, id: int) -> Iterator[str]:
        if id in self.shared:
            self.shared[id] = self._tables(id)
        if id in self.grown and self.grown.pop(id) != [len(t) for t in self._tables(id)]:
            yield "rewind over a boundary"

    def _pages(self, found: set[str]) -> None:
        """What the pools show after an event that may have moved pages."""
        for rank, free in enumerate(self.state.free_pages):
            before = self.free[rank]
            if free < before:
                if before > self.untouched[rank]:
                    found.add("released page used again")
                if self.sizes[rank] - free > HIGH_PAGE:
                    found.add("high page ids")
                self.untouched[rank] = min(self.untouched[rank], free)
            self.free[rank] = free

    def _tables(self, id: int) -> Sequence[list[Page]]:
        return [list(table) for table in self.state.tables(id)]


class _GroupsTrace:
    """What has to be remembered of one trace with cache groups; only theirs are counted."""

    def __init__(self, config: Config) -> None:
        self.config = config
        readers = [
            {group.placement for group in config.groups if layer in group.layers}
            for layer in range(config.model.layers)
        ]
        self.mixed = config.layout.cp_size > 1 and any(len(kinds) > 1 for kinds in readers)
        pools = [group.pool for group in config.groups]
        self.is_shared = len(set(pools)) < len(pools)

    def saw(self, expected: Expectation) -> set[str]:
        """The situations that this event was in."""
        event, found = expected.event, set[str]()
        if expected.refused == Reason.OUT_OF_PAGES and self.is_shared:
            found.add("cache groups that exhaust their pool together")
        if expected.refused is not None:
            return found
        if isinstance(event, Decode) and self.mixed:
            found.add("a layer that reads a sharded and a replicated group")
        for part in expected.parts:
            if part.group.window is not None:
                t = self.config.layout_of(part.group).tokens_per_block
                found.update(self._behind(event, part.expected, part.group.window, t))
        return found

    def _behind(self, event: Event, expected: Expectation, window: int, t: int) -> Iterator[str]:
        """What a window did."""
        state = expected.state
        assert state is not None
        ids = [id for id in ids_of(event) if id in state.live]
        gone = [id for id in ids if any(t and t[0].number < 0 for t in state.tables(id))]
        if gone:
            yield "page behind a window returned"
            if isinstance(event, ev.Fork):
                yield "fork with pages behind a window"
        if expected.decoded is None:
            return
        if any((p + 1 - window) % t == 0 and p >= window for p in expected.decoded.position_ids):
            yield "window edge on a page edge"
        if any(self._kept(state, id, window, t) for id in ids):
            yield "page kept for a rewind into a window"

    @staticmethod
    def _kept(state: State, id: int, window: int, t: int) -> bool:
        """Whether a full page is behind the last token's window, but not behind all of a rewind."""
        assert state.requests is not None
        request = state.requests[id]
        behind = len(request.tokens) - window
        for positions, table in zip(request.ranks, state.tables(id), strict=True):
            first = sum(page.number < 0 for page in table)
            end = (first + 1) * t
            if end <= len(positions) and positions[end - 1] <= behind:
                return True
        return False


class Needed(msgspec.Struct, frozen=True):
    """Traces played until one failed, that one included, and the seconds until then."""

    traces: int
    seconds: float


class Tally(msgspec.Struct):
    """How much was played."""

    traces: int = 0
    events: int = 0
    seconds: float = 0.0
    layouts: set[str] = set()
    """Identifiers of the layouts that were played."""
    cut: int = 0
    """Traces that ended early, at an expected failure or before what must not be run."""
    needed: Needed | None = None
    """What it took to find the first failure; all after that was spent on a smaller one."""
