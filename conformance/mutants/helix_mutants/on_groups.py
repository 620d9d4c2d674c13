"""Mutants of cache groups: replicated groups, windows, shared pools, and what a layer reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec

from helix_mutants.parts import LOCKSTEP, OverGroups, mutant
from helix_reference.attention import Token
from helix_reference.groups import GroupsModel
from helix_reference.model import Model
from helix_reference.refusals import pages_needed
from helix_reference.state import GONE, Request, Step
from helix_spec.config import MAIN_POOL, CacheGroup, Config
from helix_spec.engine import GroupColumns, Outcome, RankView
from helix_spec.events import Event, Reason, Resume

GROUPS = ("groups",)
WINDOWS = ("groups", "window")


def _changed(config: Config, **fields: Any) -> Config:
    """The configuration with some fields of all its cache groups set."""
    groups = [msgspec.structs.replace(group, **fields) for group in config.groups]
    return msgspec.structs.replace(config, groups=groups)


# Replicated groups


@mutant("vLLM #50493, #53598", "PAGE-1", "REP-1", features=GROUPS)
class CopySpansAllRanks(OverGroups):
    """A page of a replicated group spans T * C tokens, as that of a sharded one does."""

    class Wrong(GroupsModel):
        def _models_of(self, group: CacheGroup, model: type[Model]) -> Iterator[Model]:
            if group.placement == "replicated":
                t = self.config.layout_of(group).tokens_per_block * self.layout.cp_size
                group = msgspec.structs.replace(group, tokens_per_block=t)
            yield from super()._models_of(group, model)

    whole_class = Wrong


class _CopyReports(OverGroups):
    """Answers otherwise for replicated groups."""

    def copied(self, event: Event, columns: GroupColumns, positions: list[int]) -> GroupColumns:
        """What is answered in place of these columns."""
        raise NotImplementedError

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        outcome = super().apply(event)
        for group in self.config.groups:
            if group.placement == "replicated" and group.name in outcome.groups:
                columns = outcome.groups[group.name]
                wrong = self.copied(event, columns, outcome.position_ids)
                outcome.groups[group.name] = wrong
        return outcome


@mutant("vllm-ascend #14958, #16174", "REP-1", "OWN-2", features=GROUPS)
class CopyWrittenByOwners(_CopyReports):
    """A token of a replicated group is written by the rank whose turn it is alone."""

    def copied(self, event: Event, columns: GroupColumns, positions: list[int]) -> GroupColumns:
        """Written in turn."""
        t, c = self.config.layout.tokens_per_block, self.config.layout.cp_size
        mine = [position // t % c == self.cp_rank for position in positions]
        slots = [slot if own else -1 for slot, own in zip(columns.slots, mine, strict=True)]
        return msgspec.structs.replace(columns, active=mine, slots=slots)


@mutant("SGLang #39737", "REP-1", "LEN-3", features=GROUPS)
class CopySeenAsAShard(_CopyReports):
    """What a query sees in a replicated group is counted by the metadata of the shards."""

    def copied(self, event: Event, columns: GroupColumns, positions: list[int]) -> GroupColumns:
        """A C-th of it."""
        c = self.config.layout.cp_size
        return msgspec.structs.replace(columns, visible=[-(-n // c) for n in columns.visible or []])


@mutant("own: a replicated group's lengths are divided by C", "REP-1", "LEN-1", features=GROUPS)
class CopyLengthsOfAShard(OverGroups):
    """local_len of a replicated group is a C-th of the total."""

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state."""
        view, c = super().observe(ids), self.config.layout.cp_size
        for group in self.config.groups:
            if group.placement == "replicated":
                one = view.groups[group.name]
                lens = {id: -(-n // c) for id, n in one.local_len.items()}
                view.groups[group.name] = msgspec.structs.replace(one, local_len=lens)
        return view


# Pools and pages


class _Need(GroupsModel):
    """Counts otherwise what an event takes."""

    def need(self, model: Model, event: Event) -> list[int]:
        """Pages that an event takes in one group."""
        return pages_needed(model, event)

    def is_short(self, needs: list[tuple[Model, list[int]]]) -> bool:
        """Whether an event is refused that takes these pages in each group."""
        wanted: dict[int, int] = {}
        pools = {id(pool): pool for model, _ in needs for pool in model.pools}
        for model, pages in needs:
            for pool, count in zip(model.pools, pages, strict=True):
                wanted[id(pool)] = wanted.get(id(pool), 0) + count
        return any(wanted[key] > pools[key].free for key in wanted)

    def refusal(self, event: Event) -> Reason | None:
        """Why the event would be refused."""
        right = super().refusal(event)
        if right not in (None, Reason.OUT_OF_PAGES):
            return right
        needs = [(model, self.need(model, event)) for model in self.all]
        return Reason.OUT_OF_PAGES if self.is_short(needs) else None


@mutant("vLLM #57431", "REF-2", features=GROUPS)
class PoolPageForPage(OverGroups):
    """Every group takes as many pages of a shared pool as the one that takes most."""

    class Wrong(_Need):
        def is_short(self, needs: list[tuple[Model, list[int]]]) -> bool:
            most = max(max(pages) for _, pages in needs)
            alike = [(model, [most if any(pages) else 0] * len(pages)) for model, pages in needs]
            return super().is_short(alike)

    whole_class = Wrong


@mutant("own: each group looks at the free pages alone", "REF-2", features=GROUPS)
class NeedOfOneGroup(OverGroups):
    """An event is refused when one group needs more than is free, not all together."""

    class Wrong(_Need):
        def is_short(self, needs: list[tuple[Model, list[int]]]) -> bool:
            return any(super(type(self), self).is_short([need]) for need in needs)

    whole_class = Wrong


@mutant("own: the pools of all groups are one", "REF-2", features=GROUPS)
class PoolsAsOne(OverGroups):
    """The need is compared with the free pages of all pools together."""

    class Wrong(_Need):
        def is_short(self, needs: list[tuple[Model, list[int]]]) -> bool:
            free = sum(pool.free for pools in self.pools.values() for pool in pools)
            return sum(sum(pages) for _, pages in needs) > free

    whole_class = Wrong


@mutant(
    "own: the window is taken for what a resume places", "REF-2", features=[*WINDOWS, "preempt"]
)
class ResumeTakesTheWindow(OverGroups):
    """A resume needs pages for the window alone, though all tokens are computed anew."""

    class Wrong(_Need):
        def need(self, model: Model, event: Event) -> list[int]:
            pages = super().need(model, event)
            if not isinstance(event, Resume) or model.window is None:
                return pages
            most = 1 + -(-model.window // model.layout.tokens_per_block)
            return [min(count, most) for count in pages]

    whole_class = Wrong


@mutant("own: one size of page for all groups", "PAGE-1", features=GROUPS)
class PageOfTheLayout(OverGroups):
    """A group with pages of its own size gets those of the layout."""

    class Wrong(GroupsModel):
        def _models_of(self, group: CacheGroup, model: type[Model]) -> Iterator[Model]:
            same = msgspec.structs.replace(group, tokens_per_block=None)
            yield from super()._models_of(same, model)

    whole_class = Wrong


@mutant("own: free pages of the first pool for all", "PAGE-3", features=GROUPS)
class FreePagesOfMain(OverGroups):
    """Every pool reports the free pages of `main`."""

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state."""
        view = super().observe(ids)
        return msgspec.structs.replace(view, pools=dict.fromkeys(view.pools, view.free_pages))


@mutant("own: groups that share a pool count its pages each for itself", "POOL-1", features=GROUPS)
class PoolOfEachGroup(OverGroups):
    """Two groups of one pool are given the same pages."""

    class Wrong(GroupsModel):
        def view(self, rank: int, ids: Sequence[int] | None = None) -> RankView:
            view = super().view(rank, ids)
            main = [group.name for group in self.config.groups if group.pool == MAIN_POOL]
            first = list(view.groups[main[0]].block_tables.values())
            for name in main[1:]:
                tables = view.groups[name].block_tables
                for id, table in zip(tables, first, strict=False):
                    shared = [page for page in table if page >= 0][: len(tables[id])]
                    tables[id] = [*shared, *tables[id][len(shared) :]]
            return view

    whole_class = Wrong


@mutant("own: columns under another group's name", "LEN-1", "PAGE-1", "LEN-2", features=GROUPS)
class GroupsInOtherOrder(OverGroups):
    """Groups report in the order of the alphabet backwards, under the names in their order."""

    @staticmethod
    def turned(groups: dict[str, Any]) -> dict[str, Any]:
        """The same, under other names."""
        return dict(zip(groups, reversed(groups.values()), strict=True))

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        outcome = super().apply(event)
        return msgspec.structs.replace(outcome, groups=self.turned(outcome.groups))

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state."""
        view = super().observe(ids)
        return msgspec.structs.replace(view, groups=self.turned(view.groups))


# Windows


@mutant("own: a window page given back before a rewind", "WIN-2",
        features=[*WINDOWS, "speculative"])  # fmt: skip
class WindowBlindToRewinds(OverGroups):
    """Pages behind the window of the last token go back, though tokens may be rewound."""

    class Wrong(Model):
        def _leave_behind(self, request: Request, window: int) -> None:
            group, request.open_group = request.open_group, 0
            super()._leave_behind(request, window)
            request.open_group = group

    model_class = Wrong


@mutant("own: pages behind a window stay", "WIN-2", features=WINDOWS)
class WindowPagesStay(OverGroups):
    """No page ever goes back behind a window, and no such freedom is declared."""

    class Wrong(Model):
        def _leave_behind(self, request: Request, window: int) -> None:
            pass

    model_class = Wrong


@mutant("own: pages behind a window go back at the next event", "WIN-2", features=WINDOWS)
class WindowPagesLate(OverGroups):
    """They go back before the next event, not at the end of this one."""

    class Wrong(Model):
        def _happen(self, event: Event) -> None:
            if self.window is not None:
                for request in self.requests.values():
                    super()._leave_behind(request, self.window)
            super()._happen(event)

        def _leave_behind(self, request: Request, window: int) -> None:
            pass

    model_class = Wrong


@mutant("own: a super-block's pages go back rank by rank", "WIN-2", features=WINDOWS,
        layouts=LOCKSTEP)  # fmt: skip
class LockstepWindowByRank(OverGroups):
    """Under lockstep a rank gives a page back when its own rows are behind the window."""

    class Wrong(Model):
        def _leave_behind(self, request: Request, window: int) -> None:
            behind = len(request.tokens) - max(0, request.open_group - 1) - window
            t = self.layout.tokens_per_block
            for pool, table, rows in zip(self.pools, request.tables, request.ranks, strict=True):
                for place in range(len(rows) // t):
                    if rows[(place + 1) * t - 1] <= behind:
                        pool.give_back(table[place])
                        table[place] = GONE

    model_class = Wrong


@mutant("own: a page behind one holder's window is free", "PAGE-2", "PAGE-3", "POOL-1",
        features=[*WINDOWS, "fork"])  # fmt: skip
class WindowFreesSharedPages(OverGroups):
    """A page that a fork shares goes back when the first of its holders leaves it behind."""

    class Wrong(Model):
        def _leave_behind(self, request: Request, window: int) -> None:
            before = [list(table) for table in request.tables]
            super()._leave_behind(request, window)
            for pool, old, new in zip(self.pools, before, request.tables, strict=True):
                for page, now in zip(old, new, strict=True):
                    if page is not now and page.holders > 0:
                        pool.returned.append(page.number)

    model_class = Wrong


@mutant("own: a request's dropped pages are given back once more", "PAGE-3",
        features=[*WINDOWS, "preempt"])  # fmt: skip
class PreemptCountsDropped(OverGroups):
    """Preemption gives back a page for each place of the table, dropped ones too."""

    class Wrong(Model):
        def _preempt(self, request: Request) -> None:
            for pool, table in zip(self.pools, request.tables, strict=True):
                pool.untouched += table.count(GONE)
            super()._preempt(request)

    model_class = Wrong


@mutant("own: a window of w + 1", "WIN-1", features=WINDOWS)
class WindowOneWider(OverGroups):
    """The token at p - w is seen."""

    class Wrong(Model):
        def unseen(self, step: Step, place: int, rank: int) -> int:
            return super().unseen(step._replace(first=step.first - 1), place, rank)

    model_class = Wrong


@mutant("own: the last w rows of each rank", "WIN-1", features=WINDOWS)
class WindowOfLocalRows(OverGroups):
    """A rank counts the window in its own rows."""

    class Wrong(Model):
        def outcome(self, rank: int, reason: Reason | None) -> Outcome:
            outcome, window = super().outcome(rank, reason), self.window
            if window is None or outcome.visible is None:
                return outcome
            held = [
                step.past_len[rank] + step.owners[: place + 1].count(rank)
                for step in self.last_steps
                for place in range(len(step.owners))
            ]
            return msgspec.structs.replace(outcome, visible=[min(n, window) for n in held])

    model_class = Wrong


@mutant("vLLM #45425, of windows", "WIN-1", features=[*WINDOWS, "speculative"])
class WindowOfTheFirstToken(OverGroups):
    """All tokens of an open group see from where its first one sees."""

    class Wrong(Model):
        def unseen(self, step: Step, place: int, rank: int) -> int:
            return super().unseen(step, 0, rank)

    model_class = Wrong


@mutant("own: the first window for all groups", "WIN-1", "WIN-2", features=WINDOWS)
class WindowOfAnotherGroup(OverGroups):
    """Every group with a window has that of the first one."""

    class Wrong(GroupsModel):
        def _models_of(self, group: CacheGroup, model: type[Model]) -> Iterator[Model]:
            if group.window is not None:
                windows = [one.window for one in self.config.groups if one.window is not None]
                group = msgspec.structs.replace(group, window=windows[0])
            yield from super()._models_of(group, model)

    whole_class = Wrong


# What is cached, and what a layer reads


@mutant("own: the base of RoPE is that of the model", "POS-2", features=GROUPS, depth="cache",
        tier="contents")  # fmt: skip
class OneBaseForAllGroups(OverGroups):
    """Keys of a group with a base of its own are rotated by the model's."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.config = _changed(config, rope_base=None)
        return outcome


@mutant("vllm-ascend #14536", "OWN-1", features=GROUPS, depth="cache", tier="contents")
class RowsOfTheFirstGroup(OverGroups):
    """Rows of every group are those of the first one, as one slot mapping for two caches writes."""

    def _rows(self, model: Model, rank: int, number: int, request: Request) -> Any:
        groups = self.config.groups
        first = groups[0]
        if groups[number].layers == first.layers:
            number = 0
        return super()._rows(model, rank, number, request)


@mutant("own: a replicated group is counted on every rank", "ATT-1", features=GROUPS,
        depth="attention", tier="contents")  # fmt: skip
class CopyCountedOnEveryRank(OverGroups):
    """Beside a sharded group the rows of a replicated one enter the softmax C times."""

    def _seen(self, layer: int, tokens: list[Token]) -> Iterator[tuple[int, Token]]:
        groups, c = self.config.cache_groups, self.config.layout.cp_size
        mixed = {g.placement for g in groups if layer in g.layers} == {"sharded", "replicated"}
        for number, token in super()._seen(layer, tokens):
            times = c if mixed and groups[number].placement == "replicated" else 1
            yield from [(number, token)] * times


@mutant("own: a replicated group is left out beside a sharded one", "ATT-1", features=GROUPS,
        depth="attention", tier="contents")  # fmt: skip
class CopyLeftOut(OverGroups):
    """A layer that reads both sees the sharded group alone."""

    def _seen(self, layer: int, tokens: list[Token]) -> Iterator[tuple[int, Token]]:
        seen, groups = list(super()._seen(layer, tokens)), self.config.cache_groups
        sharded = [one for one in seen if groups[one[0]].placement == "sharded"]
        return iter(sharded or seen)


@mutant("own: a window that is not masked", "ATT-1", features=WINDOWS, depth="attention",
        tier="contents")  # fmt: skip
class WindowNotMasked(OverGroups):
    """Attention sees the whole sequence in a group with a window."""

    def _seen(self, layer: int, tokens: list[Token]) -> Iterator[tuple[int, Token]]:
        for number, group in enumerate(self.config.cache_groups):
            if layer in group.layers:
                yield from ((number, token) for token in tokens)
