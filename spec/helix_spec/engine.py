"""What an engine is, what it may declare, and what it answers (SPEC.md section 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Protocol

import msgspec

from helix_spec.config import Config
from helix_spec.events import FEATURES, MERGE, Event, Reason

LADDER: Final = ("placement", "lengths", "pages", "cache", "attention")
"""Profiles of rising depth: an engine that declares one declares those before it."""
PROFILES: Final = (*LADDER, *FEATURES, MERGE)
"""Every profile, in the order in which reports list them."""


class Outcome(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's answer to one event.

    `reason` is None when the event was accepted. After an accepted decode the columns are
    filled: `past_len` has an entry for each id of the batch, the others one for each new token,
    request after request in the order of `ids`. Dummy requests have no entries.
    """

    reason: Reason | None = None
    past_len: list[int] = []
    """Tokens of the request on this rank before the step."""
    position_ids: list[int] = []
    """Global position of the new token."""
    active: list[bool] = []
    """Whether this rank owns the new token."""
    slots: list[int] = []
    """Slot written (physical page * tokens_per_block + offset), -1 where not owned."""
    visible: list[int] | None = None
    """Keys on this rank that the new token's query sees; None from an engine without them."""
    output: Any = None
    """With the `attention` profile: an array of shape (layers, new tokens, heads of this rank's
    slice, value_dim), the merged attention output; of a `merge` (tokens, heads, value_dim)."""


class RankView(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's state between events, for the live requests that were asked for."""

    local_len: dict[int, int]
    """Tokens of each live request whose KV is on this rank."""
    block_tables: dict[int, list[int]] = {}
    """Physical page numbers of each live request, in local order (profile `pages`)."""
    preempted: list[int] = []
    """Preempted requests, in rising order, whichever requests were asked for."""
    free_pages: int = 0
    """Pages of this rank's pool that no request holds (profile `pages`)."""
    keys: dict[int, Any] = {}
    """With the `cache` profile: cached K of each request, an array of shape (layers, slots,
    kv_heads of this tp rank, key_dim) that covers the request's pages in local order."""
    values: dict[int, Any] = {}
    """Cached V, as `keys`, of value_dim; of a latent cache, the first elements of the keys."""


class Engine(Protocol):
    """One rank of an engine under test.

    `rank` is global: tp_rank * cp_size + cp_rank (MAP-1). The suite makes one object per rank,
    starts it once per trace, and never lets two threads touch it.
    """

    profiles: ClassVar[frozenset[str]]
    """The profiles it declares; others are reported as not checked."""
    needs_processes: ClassVar[bool]
    """Whether each rank needs a process of its own, with torch.distributed initialised.

    A third attribute may be there: `settings`, a dictionary of texts that reports show.
    """

    def __init__(self, rank: int) -> None: ...

    @classmethod
    def join(cls, world_size: int) -> None:
        """Called once in every process, when torch.distributed is up and before any trace.

        Traces may use fewer ranks than there are processes, so groups are made here, by all.
        Only for engines that need processes.
        """

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin anew: ready, or refused with `bad_config`. `profiles` are those to be checked."""

    def apply(self, event: Event) -> Outcome:
        """Let one event happen on this rank, or refuse it and change nothing."""

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state, of these requests or of all live ones; changes nothing.

        It must not go through the code by which `apply` places tokens.
        """


def declaration_problem(profiles: Any) -> str | None:
    """What is wrong with the profiles that an engine declares; None when nothing is."""
    try:
        declared = set(profiles)
    except TypeError:
        return f"declares {profiles!r}, which is no set of profiles."
    if not declared:
        return f"declares no profile; the profiles are {', '.join(PROFILES)}."
    unknown = sorted(map(str, declared - set(PROFILES)))
    if unknown:
        return (
            f"declares unknown profiles {', '.join(unknown)}; the profiles are "
            f"{', '.join(PROFILES)}."
        )
    steps = [profile for profile in LADDER if profile in declared]
    missing = [p for p in LADDER[: LADDER.index(steps[-1])] if p not in steps] if steps else []
    if missing:
        return f"declares {steps[-1]} without {', '.join(missing)}, which it includes."
    return None
