"""Several cache groups: one model for each, with one fate (SPEC.md section 4.2).

A sharded group is a `Model` of all cp_ranks. A replicated one is a model of one rank on every
cp_rank. All take pages from the pools that their groups name.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from helix_reference.model import Model
from helix_reference.refusals import pages_needed, reason_but_pages
from helix_reference.state import Pool, Request, Step
from helix_spec.capabilities import STRICT, Freedoms
from helix_spec.config import MAIN_POOL, CacheGroup, Config
from helix_spec.engine import GroupColumns, GroupView, Outcome, RankView
from helix_spec.events import PREFIX, Event, Reason, features_of


class GroupsModel:
    """All ranks of a cache of one or more cache groups, which events change.

    Parameters
    ----------
    config
        A legal configuration (`helix_spec.config.config_problem` says None).
    freedoms
        What differs from the strictest engine.
    model
        What each group is a model of; another class in tests of wrong engines.

    Examples
    --------
    >>> groups = [
    ...     CacheGroup(name="all", layers=[0]),
    ...     CacheGroup(name="near", layers=[0], placement="replicated", window=3),
    ... ]
    >>> layout = "pr17866/1:C=2,T=2"
    >>> model = GroupsModel(Config(layout=layout, pages=[9, 9], max_len=99, groups=groups))
    >>> from helix_spec.events import Admit
    >>> model.apply(Admit(0, 5))
    >>> [[len(ranks) for ranks in one.requests[0].ranks] for one in model.all]
    [[3, 2], [5], [5]]
    >>> model.view(0).groups["near"].block_tables  # page 0 went back
    {0: [-1, 5, 4]}
    """

    def __init__(
        self, config: Config, freedoms: Freedoms = STRICT, model: type[Model] = Model
    ) -> None:
        self.config, self.freedoms = config, freedoms
        self.layout = config.layout
        self.pools = {
            name: [Pool(size) for size in config.pool_sizes(name)]
            for name in (MAIN_POOL, *config.pools)
        }
        self.models = {
            group.name: list(self._models_of(group, model)) for group in config.cache_groups
        }
        """Of each group its model; of a replicated one, those of the cp_ranks."""

    def _models_of(self, group: CacheGroup, model: type[Model]) -> Iterator[Model]:
        pools = self.pools[group.pool]
        if group.placement == "sharded":
            yield model(self.config.alone(group), self.freedoms, pools, group.window)
            return
        for cp_rank, pool in enumerate(pools):
            yield model(self.config.alone(group, cp_rank), self.freedoms, [pool], group.window)

    @property
    def all(self) -> list[Model]:
        """The models of all groups."""
        return [model for models in self.models.values() for model in models]

    def of(self, name: str, cp_rank: int) -> tuple[Model, int]:
        """Return the model of a group that holds what a rank has, and the rank's number in it.

        Parameters
        ----------
        name
            Name of a group.
        cp_rank
            A rank, from 0 to C - 1.
        """
        models = self.models[name]
        sharded = len(models[0].pools) == self.layout.cp_size
        return (models[0], cp_rank) if sharded else (models[cp_rank], 0)

    @property
    def events_seen(self) -> int:
        """Number of events until now, refused ones too."""
        return self.all[0].events_seen

    @property
    def last_steps(self) -> list[Step]:
        """What the last event did for each request of its batch, as the first group tells it."""
        return self.all[0].last_steps

    @property
    def requests(self) -> dict[int, Request]:
        """The requests, as the first group tells of them; their tokens are those of every group."""
        return self.all[0].requests

    def apply(self, event: Event) -> Reason | None:
        """Let the event happen in every group, or return why it is refused and change nothing.

        Parameters
        ----------
        event
            The next event of the trace.

        Returns
        -------
        Reason or None
            None when the event has happened.
        """
        reason = self.refusal(event)
        self.follow(event, reason)
        return reason

    def follow(self, event: Event, reason: Reason | None) -> None:
        """Let the event happen where `reason` is None; else it counts, and changes nothing."""
        for model in self.all:
            model.follow(event, reason)

    def refusal(self, event: Event) -> Reason | None:
        """Return why the event would be refused now; None when it may happen."""
        if PREFIX in features_of(event):
            return Reason.UNSUPPORTED  # nothing is found for several cache groups
        reason = reason_but_pages(self.all[0], event)
        if reason is not None:
            return reason
        wanted = Counter[Pool]()
        for model in self.all:
            for pool, pages in zip(model.pools, pages_needed(model, event), strict=True):
                wanted[pool] += pages
        short = any(pages > pool.free for pool, pages in wanted.items())
        return Reason.OUT_OF_PAGES if short else None

    def outcome(self, rank: int, reason: Reason | None) -> Outcome:
        """Return what a rank answers to the last event, without the attention output.

        Parameters
        ----------
        rank
            Its cp_rank.
        reason
            What `apply` returned for the event.
        """
        outcomes = dict[str, Outcome]()
        for name in self.models:
            model, there = self.of(name, rank)
            outcomes[name] = model.outcome(there, reason)
        first = next(iter(outcomes.values()))
        if reason is not None or not self.last_steps:
            return Outcome(reason)
        return Outcome(
            position_ids=first.position_ids,
            groups={
                name: GroupColumns(one.past_len, one.active, one.slots, one.visible)
                for name, one in outcomes.items()
            },
        )

    def view(self, rank: int, ids: Sequence[int] | None = None) -> RankView:
        """Return what a rank observes, without cached rows.

        Parameters
        ----------
        rank
            Its cp_rank.
        ids
            The requests that are observed; None for all. Those that are not live are left out.
        """
        views = dict[str, RankView]()
        for name in self.models:
            model, there = self.of(name, rank)
            views[name] = model.view(there, ids)
        free = {name: pools[rank].free for name, pools in self.pools.items()}
        return RankView(
            {},
            preempted=next(iter(views.values())).preempted,
            free_pages=free.pop(MAIN_POOL),
            groups={
                name: GroupView(view.local_len, view.block_tables) for name, view in views.items()
            },
            pools=free,
        )
