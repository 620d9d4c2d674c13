"""The reference as an engine: one rank of the model, behind the engine protocol.

It holds a whole model and answers for one rank of it, so a run of C such engines shows that the
suite accepts what the specification says.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

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
from helix_reference.model import Model
from helix_reference.state import Request, Step
from helix_spec.capabilities import freedoms_of
from helix_spec.config import Config, config_problem
from helix_spec.engine import PROFILES, Outcome, RankView
from helix_spec.events import Event, Merge, Reason

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
        self.model = Model(config, freedoms_of(self.freedoms))
        self.cp_rank = self.rank % self.model.layout.cp_size
        self.tp_rank = self.rank // self.model.layout.cp_size
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
        reason = self.model.apply(event)
        if isinstance(event, Merge) and reason is None:
            return Outcome(output=self._merged(event))
        outcome = self.model.outcome(self.cp_rank, reason)
        if "attention" not in self.checked or not self.model.last_steps:
            return outcome
        return Outcome(
            None,
            outcome.past_len,
            outcome.position_ids,
            outcome.active,
            outcome.slots,
            outcome.visible,
            self._output(self.model.last_steps),
        )

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
        view = self.model.view(self.cp_rank, ids)
        if "cache" not in self.checked:
            return view
        rows = {id: self._cached(self.model.requests[id]) for id in view.local_len}
        return RankView(
            view.local_len,
            view.block_tables,
            view.preempted,
            view.free_pages,
            {id: keys for id, (keys, _) in rows.items()},
            {id: values for id, (_, values) in rows.items()},
        )

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
        shape, seed = self.config.model, self.config.seed
        kv_head = head // (shape.q_heads // shape.kv_heads)
        seen = self._tokens(self.model.requests[step.id])[: step.first + place + 1]
        return attend(
            query(shape, seed, seen[-1], layer, head).stored,
            [key(shape, seed, token, layer, kv_head).stored for token in seen],
            [value(shape, seed, token, layer, kv_head) for token in seen],
            shape.value_dim,
            shape.softmax_scale,
        ).output

    def _cached(self, request: Request) -> tuple[Rows, Rows]:
        """Keys and values of this rank's slots for a request; unwritten slots hold NaN, or 0."""
        shape, seed = self.config.model, self.config.seed
        heads = self.config.kv_heads_of(self.tp_rank)
        tokens = self._tokens(request)
        held = [tokens[position] for position in request.ranks[self.cp_rank]]
        slots = len(request.tables[self.cp_rank]) * self.model.layout.tokens_per_block
        unwritten = slots - len(held)
        blank = 0.0 if self.model.freedoms.tail == "zero" else float("nan")
        no_keys = [[[blank] * shape.key_dim for _ in heads]] * unwritten
        no_values = [[[blank] * shape.value_dim for _ in heads]] * unwritten
        keys, values = [], []
        for layer in range(shape.layers):
            keys.append(
                [[key(shape, seed, t, layer, head).stored for head in heads] for t in held]
                + no_keys
            )
            values.append(
                [[value(shape, seed, t, layer, head) for head in heads] for t in held] + no_values
            )
        return keys, values

    @staticmethod
    def _tokens(request: Request) -> list[Token]:
        return [
            Token(event, place, position) for position, (event, place) in enumerate(request.tokens)
        ]
