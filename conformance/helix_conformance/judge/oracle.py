"""What caches and attention outputs must be, from the model's requests and the hash of values."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from helix_conformance.expect.arrays import (
    Array,
    KeysValues,
    Rotated,
    Tokens,
    cached_keys,
    cached_values,
    exact_attention,
    rotated_queries,
)
from helix_reference.model import Identity, Model, Step
from helix_spec.config import Config
from helix_spec.events import Event, Release


@dataclass(frozen=True)
class Exact:
    """K and V of a request's tokens as they are cached."""

    tokens: list[Identity]
    keys: Rotated
    values: Array


Attended = tuple[Step, int, Array, Array]
"""A new token, as its step and its place there; its exact output (layers, q_heads, value_dim) and
the bound E (layers, q_heads)."""


def _columns(tokens: Sequence[tuple[int, int, int]]) -> Tokens:
    """Tokens by event, place in it, and position."""
    return Tokens(*np.array(tokens, dtype=np.int64).reshape(-1, 3).T)


def _alike(some: list[Identity], others: list[Identity]) -> int:
    """How many tokens two lists begin with alike."""
    for place, (one, other) in enumerate(zip(some, others, strict=False)):
        if one != other:
            return place
    return min(len(some), len(others))


class Oracle:
    """Exact K, V and outputs of the model's requests, kept while their tokens stay the same."""

    def __init__(self, config: Config, model: Model) -> None:
        self.config = config
        self.model = model
        self.kept: dict[int, Exact] = {}

    def of(self, id: int) -> Exact:
        """K and V of all tokens of a live request."""
        if not self._knows(id):
            batch = {id, *(step.id for step in self.model.last_steps)}
            self._work_out([one for one in batch if not self._knows(one)])
        return self.kept[id]

    def _knows(self, id: int) -> bool:
        return id in self.kept and self.kept[id].tokens == self.model.requests[id].tokens

    def _work_out(self, ids: Sequence[int]) -> None:
        """K and V of the tokens of these requests that are new, of all in one go."""
        shape, heads = self.config.model, range(self.config.model.kv_heads)
        tokens = [self.model.requests[id].tokens for id in ids]
        same = [
            _alike(self.kept[id].tokens, now) if id in self.kept else 0
            for id, now in zip(ids, tokens, strict=True)
        ]
        fresh = _columns(
            [(*now[place], place) for now, first in zip(tokens, same, strict=True)
             for place in range(first, len(now))]
        )  # fmt: skip
        keys = cached_keys(shape, self.config.seed, fresh, heads)
        values = cached_values(shape, self.config.seed, fresh, heads)
        end = 0
        for id, now, first in zip(ids, tokens, same, strict=True):
            begin, end = end, end + len(now) - first
            k, v = keys.between(begin, end), values[:, begin:end]
            if first:
                k = self.kept[id].keys.between(0, first).followed_by(k)
                v = np.concatenate([self.kept[id].values[:, :first], v], axis=1)
            self.kept[id] = Exact(list(now), k, v)

    def forget(self, id: int) -> None:
        """A request was released."""
        self.kept.pop(id, None)

    def cached(self, id: int, positions: list[int], heads: slice) -> tuple[Array, Array, Array]:
        """The least and the most a cached K may be, and V: (layers, n, heads, dim) each."""
        exact = self.of(id)
        return (
            exact.keys.least[:, positions, heads],
            exact.keys.most[:, positions, heads],
            exact.values[:, positions, heads],
        )

    def queries(self, steps: Sequence[Step]) -> Rotated:
        """Q of all new tokens of these steps, one after the other, for all query heads."""
        shape, columns = self.config.model, list[tuple[int, int, int]]()
        for step in steps:
            for position in range(step.first, step.first + len(step.owners)):
                columns.append((*self.model.requests[step.id].tokens[position], position))
        return rotated_queries(shape, self.config.seed, _columns(columns), range(shape.q_heads))

    def attention(self, steps: Sequence[Step]) -> Iterator[Attended]:
        """Each new token with its attention."""
        shape, q, token = self.config.model, self.queries(steps), 0
        for step in steps:
            request, exact = self.model.requests[step.id], self.of(step.id)
            ranks = np.empty(len(request.tokens), dtype=np.int64)
            for rank, positions in enumerate(request.ranks):
                ranks[positions] = rank
            for place in range(len(step.owners)):
                seen = slice(0, step.first + place + 1)
                layers = [
                    exact_attention(
                        shape,
                        q.stored[layer, token],
                        q.doubt[layer, token],
                        KeysValues(
                            exact.keys.stored[layer, seen],
                            exact.keys.doubt[layer, seen],
                            exact.values[layer, seen],
                        ),
                        ranks[seen],
                    )
                    for layer in range(shape.layers)
                ]
                yield (
                    step,
                    place,
                    np.stack([o for o, _ in layers]),
                    np.stack([e for _, e in layers]),
                )
                token += 1


@dataclass(frozen=True)
class Foreseen:
    """What an event's batch attends to, and K and V of its requests after it."""

    attention: list[Attended]
    exact: dict[int, Exact]


class Foresight:
    """The attention of a trace's events, worked out in a thread while the ranks play them."""

    def __init__(self, config: Config, model: Model) -> None:
        self.oracle = Oracle(config, model)
        self.thread = ThreadPoolExecutor(1)
        self.events: deque[Future[Foreseen]] = deque()

    def add(self, event: Event) -> None:
        """The next event of the trace."""
        self.events.append(self.thread.submit(self._after, event))

    def next(self) -> Foreseen:
        """What there is to say of the first event that this was not yet asked for."""
        return self.events.popleft().result()

    def close(self) -> None:
        """Leave the rest."""
        self.thread.shutdown(cancel_futures=True)

    def _after(self, event: Event) -> Foreseen:
        oracle = self.oracle
        refused = oracle.model.apply(event) is not None
        if isinstance(event, Release) and not refused:
            oracle.forget(event.id)
        steps = oracle.model.last_steps
        attention = list(oracle.attention(steps))
        return Foreseen(attention, {step.id: oracle.kept[step.id] for step in steps})
