"""What caches and attention outputs must be, from the model's requests and the hash of values."""

from __future__ import annotations

import numpy as np

from helix_conformance.numbers import (
    Array,
    KeysValues,
    cached_keys,
    cached_values,
    exact_attention,
    rotated_queries,
    tokens_of,
)
from helix_reference.model import Identity, Model, Step
from helix_spec.configs import Config


class Exact:
    """K and V of a request's tokens as they are cached."""

    def __init__(self, config: Config, tokens: list[Identity]) -> None:
        shape = config.model
        self.tokens = tokens
        columns, heads = tokens_of(tokens, 0), range(shape.kv_heads)
        self.keys = cached_keys(shape, config.seed, columns, heads)
        self.values = cached_values(shape, config.seed, columns, heads)


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
            exact = self.kept[id] = Exact(self.config, list(tokens))
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

    def attention(self, step: Step, place: int) -> tuple[Array, Array]:
        """Exact output (layers, q_heads, value_dim) of one new token, bound E (layers, q_heads)."""
        shape, position = self.config.model, step.first + place
        request, exact = self.model.requests[step.id], self.of(step.id)
        ranks = np.empty(len(request.tokens), dtype=np.int64)
        for rank, positions in enumerate(request.ranks):
            ranks[positions] = rank
        token = tokens_of([request.tokens[position]], position)
        q = rotated_queries(shape, self.config.seed, token, range(shape.q_heads))
        seen = slice(0, position + 1)
        layers = [
            exact_attention(
                shape,
                q.stored[layer, 0],
                q.doubt[layer, 0],
                KeysValues(
                    exact.keys.stored[layer, seen],
                    exact.keys.doubt[layer, seen],
                    exact.values[layer, seen],
                ),
                ranks[seen],
            )
            for layer in range(shape.layers)
        ]
        return np.stack([o for o, _ in layers]), np.stack([e for _, e in layers])
