"""What every rank must answer to one event, and what all ranks must hold after it.

An `Expectation` is made by the recorder, which plays the reference, or read from a vector file.
Whatever judges, counts, draws or shows a trace reads expectations and never the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from helix_conformance.expect.arrays import Array
from helix_spec.config import CacheGroup
from helix_spec.engine import Outcome
from helix_spec.events import Event, Reason
from helix_spec.layouts import Layout


class Page(Protocol):
    """A page of one rank, whatever number an engine gives it; equal only to itself."""

    @property
    def number(self) -> int:
        """The model's own number of it, or a vector's label."""

    @property
    def holders(self) -> int:
        """Number of requests that hold it; 0 when it is free."""

    @property
    def contents(self) -> Collection[Any]:
        """What others may find in it: equal for the same tokens."""

    @property
    def found(self) -> bool:
        """Whether it was taken for the tokens that it held, though it was free."""


class Request(Protocol):
    """A request as the recorder knows it: what `helix_reference.state.Request` has.

    The lists are by cp_rank, except for `tokens`. A prompt in `tokens` and `ranks` may be longer
    than a list can be: all of their entries are read for contents alone.
    """

    prompt_len: int
    shift: int
    tables: list[list[Any]]
    written: list[int]
    preempted: bool
    open_group: int
    outstanding: int

    @property
    def tokens(self) -> Sequence[tuple[int, int]]:
        """Of each global position: index of the event that created it, place in that event."""

    @property
    def ranks(self) -> Sequence[Sequence[int]]:
        """Global positions, in local order."""

    @property
    def steps(self) -> int:
        """Number of tokens decoded since its prompt was placed."""


class Rows(NamedTuple):
    """Cached rows of n tokens of one request on one rank, in local order.

    Parameters
    ----------
    positions
        n global positions.
    min_keys, max_keys : Array, float64 (layers, n, heads, key_dim)
        The rounded K must lie between them.
    values : Array, float64 (layers, n, heads, value_dim)
        V, exactly.
    """

    positions: Sequence[int]
    min_keys: Array
    max_keys: Array
    values: Array


class State(Protocol):
    """What all ranks hold, by live request and cp_rank, after the latest expectation.

    One object is updated from event to event, so it must be read before the next expectation.
    """

    @property
    def requests(self) -> Mapping[int, Request] | None:
        """All requests, preempted ones too; None of a vector, which shows less."""

    @property
    def live(self) -> Collection[int]:
        """Ids of the requests that are not preempted."""

    @property
    def preempted(self) -> list[int]:
        """Ids of the preempted requests, rising."""

    @property
    def free_pages(self) -> list[int]:
        """Number of free pages of each cp_rank."""

    def lengths(self, id: int) -> Sequence[int]:
        """Return how many tokens of request `id` each cp_rank holds."""

    def tables(self, id: int) -> Sequence[Sequence[Page]]:
        """Return the pages of request `id` on each cp_rank, in local order."""

    def contents(self, id: int, rank: int) -> tuple[Any, int] | None:
        """Return what cached rows depend on, and how many slots were ever written.

        Equal returns mean equal rows.

        Parameters
        ----------
        id
            A live request.
        rank
            The cp_rank.

        Returns
        -------
        tuple or None
            Something to compare, and a number of slots: those from this local index on were never
            written. None where a vector shows no rows.
        """

    def rows(self, id: int, rank: int, heads: range) -> Rows:
        """Return the cached rows of a request on a rank.

        Parameters
        ----------
        id
            A live request.
        rank
            The cp_rank.
        heads
            Consecutive KV heads, numbered over the whole model.
        """


class Decoded(NamedTuple):
    """What the ranks answer to an accepted decode; new tokens are in the order of its batch.

    `position_ids` are the global positions of new tokens.
    """

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
    """The exact output of one new token, and its bound E (ATT-4); of a merge there is one layer.

    Parameters
    ----------
    exact : Array, float64 (layers, q_heads, value_dim)
    bound : Array, float64 (layers, q_heads)
        E, a Euclidean length over value_dim elements.
    """

    exact: Array
    bound: Array


class Hit(NamedTuple):
    """What may be found of the first tokens of a request that is placed (SPEC.md, 5.8)."""

    taken: int
    """What the state after the event goes by: the reported hit, where it is right."""
    least: int
    """So many tokens are held by live requests."""
    most: int
    """So many were ever in pages where they could be found."""
    unit: int
    """A hit is a multiple of it; 0 where the layout lets nothing be found."""
    limit: int
    """The event allows no larger one."""
    unsalted: int
    """What could be found if salts did not count."""


@dataclass(frozen=True, slots=True)
class Expectation:
    """What every rank must answer to one event, and hold after it.

    `event` is refused with the reason `refused`, or accepted where that is None.
    """

    index: int
    """Index of the event in its trace."""
    event: Event
    refused: Reason | None = None
    decoded: Decoded | None = None
    """Of an accepted decode."""
    state: State | None = None
    """State after the event; None where a vector does not show it."""
    outputs: Callable[[], Sequence[Output]] | None = None
    """Outputs of an accepted decode or merge, computed when they are read."""
    parts: Sequence[Part] = ()
    """With cache groups: what is expected of each; `decoded` and `state` are of the first."""
    hit: Hit | None = None
    """Of an accepted event that names a prefix."""


class Part(NamedTuple):
    """What ranks must answer and hold of one cache group, as if it were all that is cached."""

    group: CacheGroup
    cp_rank: int | None
    """The rank that is asked, of a replicated group; None where it is all of them."""
    expected: Expectation


def outcome_of(expected: Expectation | None, rank: int, layout: Layout) -> Outcome:
    """Return what one rank must answer, without the attention output.

    Parameters
    ----------
    expected
        The expectation of the event; None before the first one, of a start that is not refused.
    rank
        The cp_rank.
    layout
        The layout; a slot is page * tokens_per_block + offset.

    Returns
    -------
    Outcome
        Its pages have the model's own numbers.

    Examples
    --------
    >>> from helix_spec.events import Admit
    >>> from helix_spec.layouts import parse_layout
    >>> expected = Expectation(3, Admit(0, 99), refused=Reason.OUT_OF_PAGES)
    >>> outcome_of(expected, rank=0, layout=parse_layout("pr9757/1:C=2,T=2")).reason.value
    'out_of_pages'
    """
    if expected is None or expected.decoded is None:
        hit = expected.hit.taken if expected is not None and expected.hit else None
        return Outcome(None if expected is None else expected.refused, hit=hit)
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
