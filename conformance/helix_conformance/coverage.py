"""How often a run visited the situations in which engines go wrong.

A `Coverage` is fed every event with the reference model after it. It judges nothing: it says
whether a green run has been where it matters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator
from itertools import pairwise
from math import gcd
from typing import Final

from helix_reference.model import Model, Page, Request, Step
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Reason,
    Release,
    Resume,
    Skip,
    ids_of,
)

HIGH_PAGE: Final = 16
"""A rank with more pages than this in use has page ids that small tests never see."""

SITUATIONS: Final[dict[str, str | None]] = {
    "prompt of whole super-blocks": None,
    "prompt that is a multiple of nothing": None,
    "id admitted again": None,
    "empty rank": None,
    "page boundary": None,
    "ownership wrap": None,
    "boundary inside a group": "speculative",
    "rewind over a boundary": "speculative",
    "padded batch": "padding",
    "skip, then decode": None,
    "two decodes outstanding": "overlap",
    "fork, then divergence": "fork",
    "copy on write": "fork",
    "resumed": "preempt",
    "released page used again": None,
    "high page ids": None,
    "one pool exhausted alone": None,
    "refusal, then retry": None,
    "max_len reached": None,
    **{f"refused: {reason}": None for reason in Reason if reason != Reason.BAD_CONFIG},
    f"refused: {Reason.PREEMPTED_REQUEST}": "preempt",
    f"refused: {Reason.NOT_PREEMPTED}": "preempt",
    f"refused: {Reason.NOTHING_OPEN}": "speculative",
}
"""What is looked for, with the feature without which it cannot happen."""


class Coverage:
    """Counts of situations, over the traces of one run of an engine with these features."""

    def __init__(self, features: Collection[str]) -> None:
        self.counts = Counter(
            {name: 0 for name, needs in SITUATIONS.items() if needs is None or needs in features}
        )
        self.trace: _Trace | None = None

    def saw(self, model: Model, event: Event, reason: Reason | None) -> None:
        """One event of a trace, and the model after it."""
        if self.trace is None or self.trace.model is not model:
            self.trace = _Trace(model)
        for name in set(self.trace.saw(event, reason)) & self.counts.keys():
            self.counts[name] += 1

    @property
    def missed(self) -> list[str]:
        """The situations that never occurred."""
        return [name for name, count in self.counts.items() if not count]


class _Trace:
    """What has to be remembered of one trace."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.ever: set[int] = set()
        """Ids ever admitted."""
        self.skipped: set[int] = set()
        self.forked: set[int] = set()
        self.refused: set[tuple[type[Event], int]] = set()
        self.tables: dict[int, list[list[Page]]] = {}
        self.used: list[set[int]] = [set() for _ in model.pools]
        self.left: list[set[int]] = [set() for _ in model.pools]
        """Per rank, pages in use and pages that were given back."""

    def saw(self, event: Event, reason: Reason | None) -> Iterator[str]:
        """The situations that this event was in."""
        if reason is not None:
            yield f"refused: {reason}"
            if reason == Reason.OUT_OF_PAGES:
                self.refused |= {(type(event), id) for id in ids_of(event)}
                free = [len(pool.free) for pool in self.model.pools]
                if min(free) == 0 < max(free):
                    yield "one pool exhausted alone"
            return
        if any((type(event), id) in self.refused for id in ids_of(event)):
            yield "refusal, then retry"
        match event:
            case Admit(id, prompt_len):
                yield from self._admitted(id, prompt_len)
            case Decode(ids, _, pad):
                yield from self._decoded(ids, pad)
            case Accept(id):
                if self._tables(self.model.requests[id]) != self.tables[id]:
                    yield "rewind over a boundary"
            case Skip(ids):
                self.skipped |= set(ids)
            case Fork(parent, child):
                self.forked |= {parent, child}
            case Resume():
                yield "resumed"
            case Release(id):
                self.forked.discard(id)
            case _:
                pass
        yield from self._pages()

    def _admitted(self, id: int, prompt_len: int) -> Iterator[str]:
        layout = self.model.layout
        c, t = layout.cp_size, layout.tokens_per_block
        if id in self.ever:
            yield "id admitted again"
        self.ever.add(id)
        if c > 1 and t > 1 and prompt_len > 1:
            if prompt_len % (c * t) == 0:
                yield "prompt of whole super-blocks"
            if gcd(prompt_len, c * t) == 1:
                yield "prompt that is a multiple of nothing"

    def _decoded(self, ids: list[int], pad: int) -> Iterator[str]:
        if pad:
            yield "padded batch"
        if self.skipped & set(ids):
            yield "skip, then decode"
            self.skipped -= set(ids)
        if self.forked & set(ids):
            yield "fork, then divergence"
        for step in self.model.last_steps:
            yield from self._stepped(step, self.model.requests[step.id])

    def _stepped(self, step: Step, request: Request) -> Iterator[str]:
        c, t = self.model.layout.cp_size, self.model.layout.tokens_per_block
        if any(not positions for positions in request.ranks):
            yield "empty rank"
        if any(step.past_len[owner] and step.past_len[owner] % t == 0 for owner in step.owners):
            yield "page boundary"
        if len(set(step.owners)) > 1:
            yield "boundary inside a group"
        before = [rank for rank, held in enumerate(request.ranks) if step.first - 1 in held]
        turns = (before if step.first > request.prompt_len else []) + step.owners
        roles = [(owner - request.shift) % c for owner in turns]
        if c > 1 and (c - 1, 0) in pairwise(roles):
            yield "ownership wrap"
        if request.outstanding == 2:
            yield "two decodes outstanding"
        if len(request.tokens) == self.model.config.max_len:
            yield "max_len reached"
        for old, new in zip(self.tables.get(step.id, []), request.tables, strict=False):
            if old != new[: len(old)]:
                yield "copy on write"

    def _pages(self) -> Iterator[str]:
        """What the pools show, after any accepted event."""
        requests = self.model.requests
        self.tables = {id: self._tables(request) for id, request in requests.items()}
        for rank, left in enumerate(self.left):
            used = {page.number for tables in self.tables.values() for page in tables[rank]}
            if len(used) > HIGH_PAGE:
                yield "high page ids"
            if used & left:
                yield "released page used again"
            left |= self.used[rank]
            left -= used
            self.used[rank] = used

    @staticmethod
    def _tables(request: Request) -> list[list[Page]]:
        return [list(table) for table in request.tables]
