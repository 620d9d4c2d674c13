"""The reference as an engine: one rank of the model, behind the engine protocol.

It holds a whole model and answers for one rank of it, so a run of C such engines shows that the
suite accepts what the specification says.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, ClassVar

import msgspec

from helix_reference.attention import (
    Token,
    Vector,
    attend,
    key,
    merge,
    query,
    supplied,
    value,
)
from helix_reference.groups import GroupsModel
from helix_reference.model import Model
from helix_reference.state import GONE, Request, Step
from helix_spec.capabilities import freedoms_of
from helix_spec.config import Config, config_problem
from helix_spec.engine import PROFILES, Outcome, RankView
from helix_spec.events import Event, Merge, Reason
from helix_spec.values import sink

Rows = list[list[list[Vector]]]
"""Nested lists of floats: layer, token or slot, head, dim."""


class ReferenceEngine:
    """One rank of the reference, behind the protocol of `helix_spec.engine.Engine`.

    Parameters
    ----------
    rank
        The global rank: tp_rank * cp_size + cp_rank (MAP-1).

    Examples
    --------
    >>> from helix_spec.events import Admit
    >>> engine = ReferenceEngine(rank=1)
    >>> config = Config(layout="pr9757/1:C=2,T=2", pages=[9] * 2, max_len=100)
    >>> engine.start(config, frozenset({"placement"})).reason is None
    True
    >>> engine.apply(Admit(0, 3)).reason is None
    True
    >>> engine.observe().local_len
    {0: 1}
    """

    profiles: ClassVar[frozenset[str]] = frozenset(PROFILES)
    needs_processes: ClassVar[bool] = False
    capabilities: ClassVar[Any] = {"head_dim": {"max": 64}, "cp_size": {"max": 8}}
    """It works elsewhere, too, but seconds a step: its lists are naive."""
    freedoms: ClassVar[Any] = None

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin anew with an empty cache, or refuse the configuration.

        Parameters
        ----------
        config
            What every rank is started with; it may be illegal.
        profiles
            The profiles that will be checked: outputs are computed for `attention` alone, cached
            rows for `cache`.

        Returns
        -------
        Outcome
            With `reason` None, or `bad_config`.
        """
        if config_problem(config) is not None:
            return Outcome(Reason.BAD_CONFIG)
        self.config = config
        self.checked = profiles
        freedoms = freedoms_of(self.freedoms)
        self.whole: Model | GroupsModel
        if config.groups:
            self.whole = GroupsModel(config, freedoms)
            self.model = self.whole.all[0]
        else:
            self.whole = self.model = Model(config, freedoms)
        self.tp_rank, self.cp_rank = divmod(self.rank, config.layout.cp_size)
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Let one event happen on every rank of the model, and answer for this one.

        Parameters
        ----------
        event
            The next event of the trace.

        Returns
        -------
        Outcome
            Why the event is refused; after an accepted decode the columns, and with `attention`
            the output by layer, new token, query head of this rank and element; after a merge its
            output by token, query head and element. Outputs are float64 and unrounded.
        """
        reason = self.whole.apply(event)
        if isinstance(event, Merge) and reason is None:
            return Outcome(output=self._merged(event))
        outcome = self.whole.outcome(self.cp_rank, reason)
        if "attention" not in self.checked or not self.model.last_steps:
            return outcome
        return msgspec.structs.replace(outcome, output=self._output(self.model.last_steps))

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """Return this rank's state, and change nothing.

        Parameters
        ----------
        ids
            The requests that are observed; None for all. Those that are not live are left out.

        Returns
        -------
        RankView
            With `cache`, keys and values too, by layer, slot, KV head and element: as they are
            cached, and NaN in slots that hold no token.
        """
        view = self.whole.view(self.cp_rank, ids)
        if "cache" not in self.checked:
            return view
        if isinstance(self.whole, Model):
            rows = self._cached(self.model, self.cp_rank, 0, view.local_len)
            return msgspec.structs.replace(view, **rows)
        for number, (name, one) in enumerate(view.groups.items()):
            held = self.whole.of(name, self.cp_rank)
            rows = self._cached(*held, number, one.local_len)
            view.groups[name] = msgspec.structs.replace(one, **rows)
        return view

    def _output(self, steps: list[Step]) -> Rows:
        """Attention of each new token over the whole sequence, for this rank's query heads."""
        return [
            [
                [self._attend(layer, step, place, head) for head in self._heads()]
                for step in steps
                for place in range(len(step.owners))
            ]
            for layer in range(self.config.model.layers)
        ]

    def _heads(self) -> range:
        """The query heads of this rank's slice (MAP-1)."""
        per_rank = self.config.model.q_heads // self.config.world_size
        return range(per_rank * self.rank, per_rank * (self.rank + 1))

    def _merged(self, event: Merge) -> list[list[Vector]]:
        """The merge of all ranks' partials of each token, for this rank's query heads."""
        shape, seed = self.config.model, self.config.seed
        return [
            [
                merge(
                    [
                        supplied(shape, seed, number, token, head, event.levels[number][token])
                        for number in event.order
                    ]
                ).output
                for head in self._heads()
            ]
            for token in range(len(event.levels[0]))
        ]

    def _attend(self, layer: int, step: Step, place: int, head: int) -> Vector:
        shape, seed, position = self.config.shape_of(layer), self.config.seed, step.first + place
        kv_head = head // (shape.q_heads // shape.kv_heads)
        tokens = self._tokens(self.model.requests[step.id])[: position + 1]
        seen = list(self._seen(layer, tokens))
        return attend(
            query(shape, seed, tokens[-1], layer, head).stored,
            [key(shape, seed, token, layer, kv_head, group).stored for group, token in seen],
            [value(shape, seed, token, layer, kv_head, group) for group, token in seen],
            shape.value_dim,
            shape.softmax_scale,
            sink(seed, layer, head) if shape.sinks else None,
        ).output

    def _seen(self, layer: int, tokens: list[Token]) -> Iterator[tuple[int, Token]]:
        """The rows that the last of these tokens sees in a layer: cache group and token of each."""
        for number, group in enumerate(self.config.cache_groups):
            if layer in group.layers:
                first = 0 if group.window is None else max(0, len(tokens) - group.window)
                yield from ((number, token) for token in tokens[first:])

    def _cached(
        self, model: Model, rank: int, number: int, ids: Iterable[int]
    ) -> dict[str, dict[int, Rows]]:
        """Keys and values of requests in the pages that a rank of a group's model holds."""
        keys, values = dict[int, Rows](), dict[int, Rows]()
        for id in ids:
            keys[id], values[id] = self._rows(model, rank, number, model.requests[id])
        return {"keys": keys, "values": values}

    def _rows(self, model: Model, rank: int, number: int, request: Request) -> tuple[Rows, Rows]:
        """Keys and values of a request's slots on a rank; unwritten slots hold NaN, or 0."""
        seed, heads = self.config.seed, self.config.kv_heads_of(self.tp_rank)
        tokens, table, t = (
            self._tokens(request),
            request.tables[rank],
            model.layout.tokens_per_block,
        )
        first = table.count(GONE) * t
        held = [tokens[position] for position in request.ranks[rank][first:]]
        unwritten = len(table) * t - first - len(held)
        blank = 0.0 if model.freedoms.tail == "zero" else float("nan")
        keys, values = [], []
        for layer in self.config.cache_groups[number].layers:
            shape = self.config.shape_of(layer)
            no_keys = [[[blank] * shape.key_dim for _ in heads]] * unwritten
            no_values = [[[blank] * shape.value_dim for _ in heads]] * unwritten
            keys.append(
                [[key(shape, seed, t, layer, head, number).stored for head in heads] for t in held]
                + no_keys
            )
            values.append(
                [[value(shape, seed, t, layer, head, number) for head in heads] for t in held]
                + no_values
            )
        return keys, values

    @staticmethod
    def _tokens(request: Request) -> list[Token]:
        return [
            Token(event, place, position) for position, (event, place) in enumerate(request.tokens)
        ]
