"""What an engine is, what it may declare, and what it returns (SPEC.md section 10)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar, Final, Protocol

import msgspec

from helix_spec.config import Config
from helix_spec.events import FEATURES, MERGE, PREFIX, Event, Reason

CUMULATIVE: Final = ("placement", "lengths", "pages", "cache", "attention")
"""Profiles of rising depth: an engine that declares one declares those before it."""
OF_GROUPS: Final = ("groups", "window")
"""Profiles of configurations with cache groups, and of windows in them."""
PROFILES: Final = (*CUMULATIVE, *FEATURES, MERGE, *OF_GROUPS, PREFIX)
"""Every profile, in the order in which reports list them."""


class GroupColumns(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What one rank answers to an accepted decode of one cache group; see `Outcome`."""

    past_len: list[int] = []
    active: list[bool] = []
    """Whether this rank holds the new token; of a replicated group always."""
    slots: list[int] = []
    visible: list[int] | None = None


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
    groups: dict[str, GroupColumns] = {}
    """With cache groups: their columns by name; those above but `position_ids` are empty."""
    hit: int | None = None
    """Of an accepted `admit` or `resume` that names a prefix: its tokens found in the cache."""

    def of_group(self, name: str) -> Outcome:
        """Return the outcome as that of an engine whose only cache is this group.

        Raises
        ------
        KeyError
            When an accepted decode lacks the group.
        """
        if self.reason is not None or not self.position_ids:
            return Outcome(self.reason)
        columns = self.groups[name]
        return Outcome(
            None,
            columns.past_len,
            self.position_ids,
            columns.active,
            columns.slots,
            columns.visible,
        )


class GroupView(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's state of one cache group; see `RankView`."""

    local_len: dict[int, int]
    """Tokens of each live request whose KV is, or was before it left the window, on this rank."""
    block_tables: dict[int, list[int]] = {}
    """Physical page numbers in local order; -1 for a page that went back behind the window."""
    keys: dict[int, Any] = {}
    """Cached K of the pages that are held, of the layers that read the group."""
    values: dict[int, Any] = {}


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
    groups: dict[str, GroupView] = {}
    """With cache groups: their state by name; `local_len`, tables and rows above are empty."""
    pools: dict[str, int] = {}
    """Free pages of each pool beside `main`, whose are `free_pages`."""

    def of_group(self, name: str) -> RankView:
        """Return the view as that of an engine whose only cache is this group, in pool `main`.

        Raises
        ------
        KeyError
            When the view lacks the group.
        """
        one = self.groups[name]
        return RankView(
            one.local_len, one.block_tables, self.preempted, self.free_pages, one.keys, one.values
        )


class Engine(Protocol):
    """One rank of an engine under test.

    The suite makes one object for each rank and trace, starts it before the trace, and calls it
    from one thread at a time. Now and then it starts an object again, for another trace. Two more
    attributes are optional: `capabilities`, where it works, as `helix_spec.capabilities.boxes_of`
    takes it; and `settings`, a dictionary of texts that reports show. One with an attribute
    `exchanges_done` has its counter of exchanges start there.

    Parameters
    ----------
    rank
        The global rank: tp_rank * cp_size + cp_rank (MAP-1).
    """

    profiles: ClassVar[frozenset[str]]
    """The profiles it declares; others are reported as not checked."""
    needs_processes: ClassVar[bool]
    """Whether each rank needs a process of its own, with torch.distributed initialised."""

    def __init__(self, rank: int) -> None: ...

    @classmethod
    def join(cls, world_size: int) -> None:
        """Make whatever groups of processes the engine needs; called once in every process.

        It is called when torch.distributed is up and before any trace. Traces may use fewer ranks
        than there are processes, so all processes make all groups here. Only for engines that need
        processes.

        Parameters
        ----------
        world_size
            Number of processes.
        """

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin anew: forget every earlier trace.

        Parameters
        ----------
        config
            What every rank is started with; it may be illegal.
        profiles
            The profiles that will be checked.

        Returns
        -------
        Outcome
            With `reason` None when the rank is ready, else `bad_config`.
        """

    def apply(self, event: Event) -> Outcome:
        """Apply an event on this rank, or refuse it and change nothing."""

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """Return this rank's state, and change nothing.

        It must not go through the code by which `apply` places tokens.

        Parameters
        ----------
        ids
            The requests that are asked for; None for all live ones. The view leaves out those that
            are not live.
        """


def features_of_config(config: Config) -> frozenset[str]:
    """Return the profiles without which an engine need not start with a configuration.

    Examples
    --------
    >>> from helix_spec.config import CacheGroup
    >>> near = CacheGroup(name="near", layers=[0], window=4)
    >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8, groups=[near])
    >>> sorted(features_of_config(config))
    ['groups', 'window']
    """
    needed = {"overlap"} if config.overlap else set[str]()
    if config.groups:
        needed.add("groups")
    if any(group.window is not None for group in config.groups):
        needed.add("window")
    return frozenset(needed)


def declaration_problem(profiles: Any) -> str | None:
    """Return what is wrong with the profiles that an engine declares; None when nothing is.

    Parameters
    ----------
    profiles
        What the engine has as `profiles`: any object.

    Returns
    -------
    str or None
        A sentence without its subject, which is the engine.

    Examples
    --------
    >>> declaration_problem({"lengths"})
    'declares lengths without placement, which it includes.'
    >>> declaration_problem({"placement", "fork"}) is None
    True
    """
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
    if "window" in declared and "groups" not in declared:
        return "declares window without groups, which it needs."
    steps = [profile for profile in CUMULATIVE if profile in declared]
    included = CUMULATIVE[: CUMULATIVE.index(steps[-1])] if steps else ()
    missing = [profile for profile in included if profile not in steps]
    if missing:
        return f"declares {steps[-1]} without {', '.join(missing)}, which it includes."
    return None
