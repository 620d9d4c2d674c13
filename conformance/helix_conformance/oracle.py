"""What caches and attention outputs must be, from the model's requests and the hash of values."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from helix_conformance.numbers import (
    Array,
    KeysValues,
    Rotated,
    Tokens,
    cached_keys,
    cached_values,
    exact_attention,
    rotated_queries,
    tokens_of,
)
from helix_reference.model import Identity, Model, Step
from helix_spec.configs import Config


class Exact:
    """K and V of a request's tokens as they are cached.

    Those of the tokens that `kept` begins with alike are taken from there.
    """

    def __init__(self, config: Config, tokens: list[Identity], kept: Exact | None = None) -> None:
        self.tokens = tokens
        shape = config.model
        same = 0 if kept is None else _alike(kept.tokens, tokens)
        columns, heads = tokens_of(tokens[same:], same), range(shape.kv_heads)
        self.keys = cached_keys(shape, config.seed, columns, heads)
        self.values = cached_values(shape, config.seed, columns, heads)
        if kept is not None:
            self.keys = kept.keys.followed_by(self.keys, same)
            self.values = np.concatenate([kept.values[:, :same], self.values], axis=1)


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
        tokens = self.model.requests[id].tokens
        exact = self.kept.get(id)
        if exact is None or exact.tokens != tokens:
            exact = self.kept[id] = Exact(self.config, list(tokens), exact)
        return exact

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
        tokens = Tokens(*np.array(columns, dtype=np.int64).T)
        return rotated_queries(shape, self.config.seed, tokens, range(shape.q_heads))

    def attention(self, steps: Sequence[Step]) -> Iterator[tuple[Step, int, Array, Array]]:
        """Each new token, as its step and its place there, with its attention.

        That is the exact output (layers, q_heads, value_dim) and its bound E (layers, q_heads).
        """
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
