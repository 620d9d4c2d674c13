"""Records what every rank must answer, by playing the reference; only this module imports it."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Final

import msgspec
import numpy as np

from helix_conformance.expect.arrays import (
    KeptRows,
    exact_merge,
    rotated_queries,
    supplied_partials,
    token_attention,
    token_columns,
)
from helix_conformance.expect.expectation import Decoded, Expectation, Output, Page, Request, Rows
from helix_reference.model import Model
from helix_spec.capabilities import STRICT, Freedoms
from helix_spec.config import Config
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
        pools = config.pages if "pages" in declared else [ENDLESS] * len(config.pages)
        self.model = Model(msgspec.structs.replace(config, pages=pools), freedoms)
        self.state = ModelState(self.model)

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
            refused, model.last_steps = Reason.UNSUPPORTED, []
            model.events_seen += 1
        if refused is not None:
            return Expectation(index, event, refused, state=self.state)
        self.state.keep(event)
        if model.last_steps:
            decoded = self._decoded()
            return Expectation(index, event, None, decoded, self.state, self.state.outputs)
        if isinstance(event, Merge):
            return Expectation(index, event, state=self.state, outputs=lambda: self._merged(event))
        return Expectation(index, event, state=self.state)

    def refusal(self, event: Event) -> Reason | None:
        """Return why the event would be refused now; None when it would not."""
        return self.model.refusal(event) if self._supports(event) else Reason.UNSUPPORTED

    def _supports(self, event: Event) -> bool:
        return features_of(event) <= self.declared

    def _decoded(self) -> Decoded:
        model = self.model
        t, steps, requests = model.layout.tokens_per_block, model.last_steps, model.requests
        positions, owners = list[int](), list[int]()
        slots, visible = list[tuple[Page, int]](), list[list[int]]()
        for step in steps:
            tables, held = requests[step.id].tables, step.past_len
            for place, owner in enumerate(step.owners):
                page, offset = divmod(held[owner], t)
                slots.append((tables[owner][page], offset))
                held = [*held]
                held[owner] += 1
                visible.append(held)
                positions.append(step.first + place)
            owners += step.owners
        return Decoded([step.past_len for step in steps], positions, owners, slots, visible)

    def _merged(self, event: Merge) -> list[Output]:
        shape = self.config.model
        partials = supplied_partials(self.config, event, range(shape.q_heads))
        exact, bound = exact_merge(shape, *partials)
        return [Output(o[None], e[None]) for o, e in zip(exact, bound, strict=True)]


class ModelState:
    """The state of the reference's model; see `expectation.State`.

    Parameters
    ----------
    model
        The model; it is read anew at each call.
    """

    def __init__(self, model: Model) -> None:
        self._model = model
        self.requests: Mapping[int, Request] = model.requests
        self._kept = KeptRows(model.config)

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
        return [pool.free for pool in self._model.pools]

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
        tokens = [*request.tokens]
        held = [(position, tokens[position]) for position in request.ranks[rank]]
        return held, request.written[rank]

    def rows(self, id: int, rank: int, heads: range) -> Rows:
        """Return rows of request `id` on cp_rank `rank`, for KV heads `heads`; see `State.rows`."""
        request = self.requests[id]
        positions, mine = [*request.ranks[rank]], slice(heads.start, heads.stop)
        kept = self._kept.of(id, [*request.tokens])
        return Rows(
            positions,
            kept.keys.lower[:, positions, mine],
            kept.keys.upper[:, positions, mine],
            kept.values[:, positions, mine],
        )

    def outputs(self) -> list[Output]:
        """Return the attention output of each new token of the last decode."""
        shape, steps = self._model.config.model, self._model.last_steps
        tokens_of = {step.id: [*self.requests[step.id].tokens] for step in steps}
        self._kept.work_out(tokens_of)
        fresh = [
            (*tokens_of[step.id][position], position)
            for step in steps
            for position in range(step.first, step.first + len(step.owners))
        ]
        queries = rotated_queries(
            shape, self._model.config.seed, token_columns(fresh), range(shape.q_heads)
        )
        found = list[Output]()
        for step in steps:
            kept = self._kept.of(step.id, tokens_of[step.id])
            holders = np.empty(len(kept.tokens), dtype=np.int64)
            for rank, positions in enumerate(self.requests[step.id].ranks):
                holders[[*positions]] = rank
            for position in range(step.first, step.first + len(step.owners)):
                query = queries.between(len(found), len(found) + 1)
                output = token_attention(shape, query, kept, holders[: position + 1])
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
