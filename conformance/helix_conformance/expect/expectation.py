"""What every rank must answer to one event, and what all ranks must hold after it.

An `Expectation` is made by the recorder, which plays the reference, or read from a vector file.
Whatever judges, counts, draws or shows a trace reads expectations and never the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from helix_conformance.expect.arrays import Array
from helix_spec.engine import Outcome
from helix_spec.events import Event, Reason
from helix_spec.layouts import Layout


class Page(Protocol):
    """A page of one rank, whatever number an engine gives it."""

    @property
    def number(self) -> int:
        """The model's own number of it, or a vector's label."""

    @property
    def holders(self) -> int:
        """Requests that hold it; 0 when it is free."""


class Request(Protocol):
    """A request as the recorder knows it; lists are by cp_rank but for `tokens`."""

    prompt_len: int
    shift: int
    tokens: list[tuple[int, int]]
    """Of each global position: index of the event that created the token, place in that event."""
    ranks: list[list[int]]
    """Global positions, in local order."""
    tables: list[list[Any]]
    written: list[int]
    preempted: bool
    open_group: int
    outstanding: int

    @property
    def steps(self) -> int:
        """Tokens decoded so far."""


class Rows(NamedTuple):
    """Cached rows of one request on one rank, in local order.

    `min_keys`, `max_keys` (layers, n, heads, key_dim): between which the rounded K must lie.
    `values` (layers, n, heads, value_dim): V, exactly. `positions`: n global positions.
    """

    positions: Sequence[int]
    min_keys: Array
    max_keys: Array
    values: Array


class State(Protocol):
    """What all ranks hold, by live request and cp_rank. It is that of the latest expectation."""

    @property
    def requests(self) -> Mapping[int, Request] | None:
        """All requests, preempted ones too; None where a vector tells less."""

    @property
    def live(self) -> Collection[int]:
        """Requests that are not preempted."""

    @property
    def preempted(self) -> list[int]:
        """Preempted requests, rising."""

    @property
    def free_pages(self) -> list[int]:
        """Free pages of each cp_rank."""

    def lengths(self, id: int) -> Sequence[int]:
        """Return the tokens of a request on each cp_rank."""

    def tables(self, id: int) -> Sequence[Sequence[Page]]:
        """Return the pages of a request on each cp_rank."""

    def contents(self, id: int, rank: int) -> tuple[Any, int] | None:
        """Return what cached rows depend on, and how many slots were ever written.

        Equal returns mean equal rows. None where a vector tells nothing of rows.
        """

    def rows(self, id: int, rank: int, heads: range) -> Rows:
        """Return the cached rows of a request on a cp_rank, for these KV heads."""


class Decoded(NamedTuple):
    """What the ranks answer to an accepted decode; new tokens stand request after request."""

    past_len: Sequence[Sequence[int]]
    """Of each request of the batch, by cp_rank: tokens held before the step."""
    position_ids: list[int]
    owners: Sequence[int]
    """cp_rank of each new token."""
    slots: Sequence[tuple[Page, int]]
    """Page of each new token on its owner, and the offset in it."""
    visible: Sequence[Sequence[int]]
    """Of each new token, by cp_rank: keys that its query sees."""


class Output(NamedTuple):
    """The exact output of one new token, and the bound E: (layers, q_heads, D), (layers, q_heads).

    Of a merge there is one layer.
    """

    exact: Array
    bound: Array


@dataclass(frozen=True, slots=True)
class Expectation:
    """What every rank must answer to one event, and hold after it."""

    index: int
    """Place of the event in its trace."""
    event: Event
    refused: Reason | None = None
    decoded: Decoded | None = None
    """Of an accepted decode."""
    state: State | None = None
    """State after the event; None where a vector says nothing of it."""
    outputs: Callable[[], Sequence[Output]] | None = None
    """Outputs of an accepted decode or merge, worked out when asked for."""


def outcome_of(expected: Expectation | None, rank: int, layout: Layout) -> Outcome:
    """Return what a cp_rank answers, without the output, its pages numbered as the model's."""
    if expected is None or expected.decoded is None:
        return Outcome(None if expected is None else expected.refused)
    decoded, t = expected.decoded, layout.tokens_per_block
    mine = [owner == rank for owner in decoded.owners]
    return Outcome(
        None,
        [held[rank] for held in decoded.past_len],
        decoded.position_ids,
        mine,
        [
            page.number * t + offset if owned else -1
            for owned, (page, offset) in zip(mine, decoded.slots, strict=True)
        ],
        [seen[rank] for seen in decoded.visible],
    )
