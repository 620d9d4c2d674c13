"""Records what every rank must answer, by playing the reference; only this module imports it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

import msgspec
import numpy as np

from helix_conformance.expect.arrays import (
    Ints,
    Kept,
    KeptRows,
    Layers,
    Seen,
    exact_merge,
    rotated_queries,
    supplied_partials,
    token_attention,
    token_columns,
    union_attention,
)
from helix_conformance.expect.expectation import (
    Decoded,
    Expectation,
    Output,
    Page,
    Part,
    Request,
    Rows,
)
from helix_reference.groups import GroupsModel
from helix_reference.model import Model
from helix_spec.capabilities import STRICT, Freedoms
from helix_spec.config import CacheGroup, Config
from helix_spec.engine import PROFILES
from helix_spec.events import Event, Merge, Reason, Release, features_of
from helix_spec.trace import Trace

ENDLESS: Final = 2**31 - 1
"""Pages of each pool beside an engine that allocates none."""


class Recorder:
    """Plays one trace on the reference, one event after the other.

    Parameters
    ----------
    config
        A legal configuration.
    declared
        Profiles that the engine declares. An event that needs another is `unsupported`, and
        without `pages` no pool is ever exhausted.

    Examples
    --------
    >>> from helix_spec.events import Admit
    >>> recorder = Recorder(Config(layout="pr9757/1:C=2,T=2", pages=[2, 2], max_len=9))
    >>> recorder.next(Admit(7, 3)).refused, recorder.state.lengths(7)
    (None, [2, 1])
    """

    def __init__(
        self,
        config: Config,
        declared: Collection[str] = PROFILES,
        freedoms: Freedoms = STRICT,
    ) -> None:
        self.config = config
        self.declared = frozenset(declared)
        self.model: Model | GroupsModel
        if config.groups:
            self.model = GroupsModel(self._with_pools(config), freedoms)
            self.groups = _groups_of(self.model)
            self.state = self.groups[0].state
        else:
            self.model, self.groups = Model(self._with_pools(config), freedoms), []
            self.state = ModelState(self.model)

    def _with_pools(self, config: Config) -> Config:
        """The configuration with endless pools where the engine allocates no pages."""
        if "pages" in self.declared:
            return config
        endless = [ENDLESS] * len(config.pages)
        pools = dict.fromkeys(config.pools, endless)
        return msgspec.structs.replace(config, pages=endless, pools=pools)

    def next(self, event: Event) -> Expectation:
        """Return the expectation of the next event; its state must be read before the one after.

        Parameters
        ----------
        event
            The next event of the trace. A refused one counts, too: tokens are identified by the
            index of their event.

        Returns
        -------
        Expectation
            Outputs are computed when they are read, which must be before the next event.
        """
        model, index = self.model, self.model.events_seen
        if self._supports(event):
            refused = model.apply(event)
        else:  # it counts, since tokens are told apart by the index of their event
            refused = Reason.UNSUPPORTED
            model.follow(event, refused)
        if refused is not None:
            parts = [part.expects(index, event, refused) for part in self.groups]
            return Expectation(index, event, refused, state=self.state, parts=parts)
        self.state.keep(event)
        parts = [part.expects(index, event) for part in self.groups]
        if model.last_steps:
            if parts:
                seen, outputs = _least_seen(parts, self.config.layout.cp_size), self._union
                decoded = parts[0].expected.decoded
                assert decoded is not None
                decoded = decoded._replace(visible=seen)
            else:
                decoded, outputs = decoded_by(self.state.model), self.state.outputs
            return Expectation(index, event, None, decoded, self.state, outputs, parts)
        if isinstance(event, Merge):
            merged = Expectation(index, event, state=self.state, parts=parts)
            return replace(merged, outputs=lambda: self._merged(event))
        return Expectation(index, event, state=self.state, parts=parts)

    def refusal(self, event: Event) -> Reason | None:
        """Return why the event would be refused now; None when it would not."""
        return self.model.refusal(event) if self._supports(event) else Reason.UNSUPPORTED

    def _supports(self, event: Event) -> bool:
        return features_of(event) <= self.declared

    def _union(self) -> list[Output]:
        """Outputs of the new tokens of the last decode, over the groups that each layer reads."""
        config, c, found = self.config, self.config.layout.cp_size, list[Output]()
        steps, shape = self.model.last_steps, config.model
        fresh = [
            (*self.model.requests[step.id].tokens[position], position)
            for step in steps
            for position in range(step.first, step.first + len(step.owners))
        ]
        bases = [config.shape_of(layer).rope_base for layer in range(shape.layers)]
        queries = rotated_queries(
            shape, config.seed, token_columns(fresh), range(shape.q_heads), bases
        )
        for step in steps:
            whole = [part.seen(step.id, c) for part in self.groups if part.cp_rank in (None, 0)]
            for position in range(step.first, step.first + len(step.owners)):
                query = queries.between(len(found), len(found) + 1)
                seen = [one.at(position) for one in whole]
                found.append(Output(*union_attention(config, query, seen)))
        return found

    def _merged(self, event: Merge) -> list[Output]:
        shape = self.config.model
        partials = supplied_partials(self.config, event, range(shape.q_heads))
        exact, bound = exact_merge(shape, *partials)
        return [Output(o[None], e[None]) for o, e in zip(exact, bound, strict=True)]


@dataclass(frozen=True)
class _Group:
    """A cache group, or one cp_rank of a replicated one, as the reference has it."""

    group: CacheGroup
    cp_rank: int | None
    state: ModelState

    @property
    def name(self) -> str:
        """The group's name, with the rank of a replicated one."""
        return self.group.name + ("" if self.cp_rank is None else f", on rank {self.cp_rank}")

    def seen(self, id: int, cp_size: int) -> Seen:
        """Return the rows of a request in the group, all of them."""
        holders = self.state.holders(id) if self.cp_rank is None else np.array([cp_size])
        tokens = len(self.state.model.requests[id].tokens)
        ranks = np.broadcast_to(holders, tokens)
        return Seen(self.group.layers, self.state.kept_rows(id), ranks, self.group.window)

    def expects(self, index: int, event: Event, refused: Reason | None = None) -> Part:
        """Return what is expected of the group after an event."""
        state, decoded = self.state, None
        if refused is None:
            state.keep(event)
            decoded = decoded_by(state.model) if state.model.last_steps else None
        expected = Expectation(index, event, refused, decoded, state)
        return Part(self.group, self.cp_rank, expected)


def _groups_of(model: GroupsModel) -> list[_Group]:
    """The groups of a model in their order; the copies of a replicated one share its rows."""
    found = list[_Group]()
    for number, group in enumerate(model.config.groups):
        models = model.models[group.name]
        rows = KeptRows(models[0].config, Layers(group.layers, number))
        for rank, one in enumerate(models):
            cp_rank = rank if group.placement == "replicated" else None
            found.append(_Group(group, cp_rank, ModelState(one, rows)))
    return found


def _least_seen(parts: Sequence[Part], cp_size: int) -> list[list[int]]:
    """Of each new token, by cp_rank: the fewest keys that it sees there in a sharded group."""
    found = [part.expected.decoded for part in parts if part.expected.decoded is not None]
    sharded = [one.visible for one, part in zip(found, parts, strict=True) if part.cp_rank is None]
    if not sharded:
        return [[row[0]] * cp_size for row in found[0].visible]
    return [list(map(min, zip(*rows, strict=True))) for rows in zip(*sharded, strict=True)]


def decoded_by(model: Model) -> Decoded:
    """Return what the ranks of a model answer to the decode that it has just accepted.

    Parameters
    ----------
    model
        The model, after the decode.
    """
    t, steps = model.layout.tokens_per_block, model.last_steps
    positions, owners = list[int](), list[int]()
    slots, visible = list[tuple[Page, int]](), list[Sequence[int]]()
    for step in steps:
        held = step.past_len
        for place, owner in enumerate(step.owners):
            slots.append((step.pages[place], held[owner] % t))
            held = [*held]
            held[owner] += 1
            visible.append(
                held
                if model.window is None
                else [n - model.unseen(step, place, rank) for rank, n in enumerate(held)]
            )
            positions.append(step.first + place)
        owners += step.owners
    return Decoded([step.past_len for step in steps], positions, owners, slots, visible)


class ModelState:
    """The state of the reference's model; see `expectation.State`.

    Parameters
    ----------
    model
        The model; it is read anew at each call.
    kept
        Its rows; None for those of a cache without groups.
    """

    def __init__(self, model: Model, kept: KeptRows | None = None) -> None:
        self.model = model
        self.requests: Mapping[int, Request] = model.requests
        self._kept = kept or KeptRows(model.config)

    @property
    def live(self) -> Collection[int]:
        """See `State.live`."""
        if not any([request.preempted for request in self.requests.values()]):
            return self.requests.keys()
        return [id for id, request in self.requests.items() if not request.preempted]

    @property
    def preempted(self) -> list[int]:
        """See `State.preempted`."""
        return sorted([id for id, request in self.requests.items() if request.preempted])

    @property
    def free_pages(self) -> list[int]:
        """See `State.free_pages`."""
        return [pool.free for pool in self.model.pools]

    def keep(self, event: Event) -> None:
        """Drop the kept rows of a request that this event released."""
        if isinstance(event, Release):
            self._kept.forget(event.id)

    def lengths(self, id: int) -> Sequence[int]:
        """See `State.lengths`."""
        return list(map(len, self.requests[id].ranks))

    def tables(self, id: int) -> Sequence[Sequence[Page]]:
        """See `State.tables`."""
        return self.requests[id].tables

    def contents(self, id: int, rank: int) -> tuple[list[tuple[int, tuple[int, int]]], int]:
        """Return what rows of request `id` on cp_rank `rank` depend on; see `State.contents`."""
        request = self.requests[id]
        first, tokens = self._first(request, rank), [*request.tokens]
        held = [(position, tokens[position]) for position in [*request.ranks[rank]][first:]]
        return held, request.written[rank] - first

    def rows(self, id: int, rank: int, heads: range) -> Rows:
        """Return rows of request `id` on cp_rank `rank`, for KV heads `heads`; see `State.rows`."""
        request = self.requests[id]
        positions = [*request.ranks[rank]][self._first(request, rank) :]
        mine = slice(heads.start, heads.stop)
        kept = self.kept_rows(id)
        return Rows(
            positions,
            kept.keys.lower[:, positions, mine],
            kept.keys.upper[:, positions, mine],
            kept.values[:, positions, mine],
        )

    def _first(self, request: Request, rank: int) -> int:
        """The first local index whose page is still held."""
        gone = [page.number for page in request.tables[rank]].count(-1)
        return gone * self.model.layout.tokens_per_block

    def kept_rows(self, id: int) -> Kept:
        """Return K and V of all tokens of a request."""
        return self._kept.of(id, [*self.model.requests[id].tokens])

    def holders(self, id: int) -> Ints:
        """Return the cp_rank that holds each position of a request."""
        request = self.model.requests[id]
        holders = np.empty(len(request.tokens), dtype=np.int64)
        for rank, positions in enumerate(request.ranks):
            holders[[*positions]] = rank
        return holders

    def outputs(self) -> list[Output]:
        """Return the attention output of each new token of the last decode."""
        shape, steps = self.model.config.model, self.model.last_steps
        tokens_of = {step.id: [*self.requests[step.id].tokens] for step in steps}
        self._kept.work_out(tokens_of)
        fresh = [
            (*tokens_of[step.id][position], position)
            for step in steps
            for position in range(step.first, step.first + len(step.owners))
        ]
        queries = rotated_queries(
            shape, self.model.config.seed, token_columns(fresh), range(shape.q_heads)
        )
        found = list[Output]()
        for step in steps:
            kept, holders = self.kept_rows(step.id), self.holders(step.id)
            for position in range(step.first, step.first + len(step.owners)):
                query = queries.between(len(found), len(found) + 1)
                seed = self.model.config.seed
                output = token_attention(shape, seed, query, kept, holders[: position + 1])
                found.append(Output(*output))
        return found


def record(trace: Trace, declared: Collection[str] = PROFILES) -> Iterator[Expectation]:
    """Yield the expectation of each event of a trace.

    Each must be read before the next is asked for: they share one state.

    Parameters
    ----------
    trace
        A trace whose configuration is legal.
    declared
        Profiles that the engine declares, as in `Recorder`.

    Examples
    --------
    >>> from helix_spec.events import Admit, Decode
    >>> config = Config(layout="pr9757/1:C=2,T=2", pages=[2, 2], max_len=9)
    >>> trace = Trace(note="", config=config, events=[Admit(7, 3), Decode([7], [1]), Admit(7, 1)])
    >>> [expected.refused and expected.refused.value for expected in record(trace)]
    [None, None, 'duplicate_request']
    """
    recorder = Recorder(trace.config, declared)
    for event in trace.events:
        yield recorder.next(event)
