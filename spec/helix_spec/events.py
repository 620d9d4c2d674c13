"""The trace language: events and the reasons of refusals.

SPEC.md section 5 says what each event does, section 6 when it is refused.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated, Final

import msgspec

RequestId = Annotated[int, msgspec.Meta(ge=0, le=2**53)]
Number = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)]
"""A count as it arrives: traces may carry wrong ones, which engines must refuse."""

Level = Annotated[int, msgspec.Meta(ge=-(2**17), le=2**17)]
"""About the log-sum-exp of a supplied partial: small enough to be exact in float32."""


class _Event(msgspec.Struct, frozen=True, forbid_unknown_fields=True, tag_field="event"):
    pass


class Prefix(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The first `len` tokens are those of the request `of`, known or released (SPEC.md, 5.8)."""

    of: RequestId
    len: Number


class Admit(_Event, frozen=True, tag="admit", omit_defaults=True, repr_omit_defaults=True):
    """A new request of `prompt_len` tokens; its KV is placed by the prompt split.

    With admission `prefill` the prompt is computed in chunks of `chunk` tokens, the last one
    shorter; 0 leaves the cut to the engine. Tokens of the `prefix` may be found in the cache, where
    requests of the same `salt` hold them.
    """

    id: RequestId
    prompt_len: Number
    chunk: Annotated[int, msgspec.Meta(ge=0, le=2**53)] = 0
    prefix: Prefix | None = None
    salt: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0


class Decode(_Event, frozen=True, tag="decode"):
    """One step for a batch: request `ids[i]` gets `query_lens[i]` new tokens.

    `pad` dummy requests fill the batch, as CUDA graphs of fixed batch sizes need.
    """

    ids: list[RequestId]
    query_lens: list[Number]
    pad: Number = 0


class Accept(_Event, frozen=True, tag="accept"):
    """Keep the first `kept` tokens of the request's last group, rewind the others."""

    id: RequestId
    kept: Number


class Sampled(_Event, frozen=True, tag="sampled"):
    """With `overlap`: the scheduler learns the tokens of each id's oldest outstanding decode."""

    ids: list[RequestId]


class Skip(_Event, frozen=True, tag="skip"):
    """A step that is prepared like a decode, and whose forward never runs."""

    ids: list[RequestId]
    query_lens: list[Number]


class Fork(_Event, frozen=True, tag="fork"):
    """`child` starts as a copy of `parent` that shares its pages on every rank."""

    parent: RequestId
    child: RequestId


class Release(_Event, frozen=True, tag="release"):
    """The request ends; pages nobody else holds go back to their pools."""

    id: RequestId


class Preempt(_Event, frozen=True, tag="preempt"):
    """The request's pages go back; the request stays known."""

    id: RequestId


class Resume(_Event, frozen=True, tag="resume", omit_defaults=True, repr_omit_defaults=True):
    """A preempted request is placed anew, as a prompt of all its tokens so far.

    Its first `prefix` tokens may be found in the cache.
    """

    id: RequestId
    prefix: Number = 0


class Merge(_Event, frozen=True, tag="merge"):
    """The ranks exchange and merge partial attentions that they are supplied with.

    `levels[k][t]` is about the log-sum-exp of partial k for token t, null where it is of no
    keys; cp_rank r is supplied with partial `order[r]` (SPEC.md section 8 says what is in it).
    No request is named and nothing changes. Raises ValueError when the lists do not fit.
    """

    levels: list[list[Level | None]]
    order: list[int]

    def __post_init__(self) -> None:
        tokens = {len(row) for row in self.levels}
        if len(tokens) != 1 or 0 in tokens:
            raise ValueError("Every partial of a merge must name a level for each of its tokens")
        if sorted(self.order) != list(range(len(self.levels))):
            raise ValueError(
                f"The order of a merge must name each of its {len(self.levels)} partials once"
            )


Event = Admit | Decode | Accept | Sampled | Skip | Fork | Release | Preempt | Resume | Merge


MERGE: Final = "merge"
"""The profile of engines whose merge can be reached by itself."""
PREFIX: Final = "prefix"
"""The profile of engines that find prefixes in their cache."""
FEATURES: Final = ("speculative", "fork", "preempt", "padding", "overlap")
"""What an engine may support beyond admit, decode, skip and release, one profile each."""


def features_of(event: Event) -> frozenset[str]:
    """Return the features without which an engine refuses this event with `unsupported`.

    Returns
    -------
    frozenset of str
        Members of `FEATURES`, `merge` and `prefix`.

    Examples
    --------
    >>> sorted(features_of(Decode([0], [2], pad=1)))
    ['padding', 'speculative']
    """
    needed = set()
    match event:
        case Decode(_, query_lens, pad):
            if any(query_len > 1 for query_len in query_lens):
                needed.add("speculative")
            if pad > 0:
                needed.add("padding")
        case Skip(_, query_lens):
            if any(query_len > 1 for query_len in query_lens):
                needed.add("speculative")
        case Accept():
            needed.add("speculative")
        case Fork():
            needed.add("fork")
        case Preempt() | Resume():
            needed.add("preempt")
            if isinstance(event, Resume) and event.prefix:
                needed.add(PREFIX)
        case Admit() if event.prefix is not None or event.salt:
            needed.add(PREFIX)
        case Sampled():
            needed.add("overlap")
        case Merge():
            needed.add(MERGE)
        case _:
            pass
    return frozenset(needed)


def ids_of(event: Event) -> list[int]:
    """Return the ids of the requests that an event names, in its order.

    Examples
    --------
    >>> ids_of(Fork(parent=3, child=8))
    [3, 8]
    """
    match event:
        case Decode(ids) | Skip(ids) | Sampled(ids):
            return ids
        case Fork(parent, child):
            return [parent, child]
        case Merge():
            return []
        case _:
            return [event.id]


def ids_by_token(event: Decode) -> list[int]:
    """Return the id of each new token of a batch whose ids and query_lens fit each other.

    Examples
    --------
    >>> ids_by_token(Decode([5, 3], [2, 1]))
    [5, 5, 3]
    """
    pairs = zip(event.ids, event.query_lens, strict=True)
    return [id for id, query_len in pairs for _ in range(query_len)]


class Reason(StrEnum):
    """Why an event was refused, in the order in which they are tried; `bad_config` at start."""

    UNSUPPORTED = "unsupported"
    BAD_COUNT = "bad_count"
    DUPLICATE_REQUEST = "duplicate_request"
    UNKNOWN_REQUEST = "unknown_request"
    PREEMPTED_REQUEST = "preempted_request"
    NOT_PREEMPTED = "not_preempted"
    NOTHING_OPEN = "nothing_open"
    EMPTY_PROMPT = "empty_prompt"
    TOO_LONG = "too_long"
    OUT_OF_PAGES = "out_of_pages"
    BAD_CONFIG = "bad_config"
