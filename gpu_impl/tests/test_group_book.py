"""Several cache groups, their pools and windows, against a model made of lists."""

import copy
import random
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from helix_gpu.bookkeeping.block_tables import BlockTables
from helix_gpu.bookkeeping.dealing import tokens_before
from helix_gpu.bookkeeping.group_book import GroupBook
from helix_gpu.bookkeeping.ledger import Drop, Ints, Ledger
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.bookkeeping.sharing import SharedWindows
from helix_spec.config import CacheGroup, Config, ModelShape
from helix_spec.events import Reason
from helix_spec.layouts import Layout, parse_layout

LAYOUTS = (
    "before_9757/1:C=2,T=2",
    "pr9757/1:C=3,T=2",
    "pr13180/1:C=2,T=2",
    "pr17866/1:C=3,T=2",
    "vllm_dcp/1:C=3,T=2,I=1",
    "vllm_dcp/1:C=2,T=4,I=2",
    "balanced/1:C=3,T=2",
    "custom/1:prompt=interleave(1),owner=step,pages=lazy,start=rotated,C=3,T=2",
    "custom/1:prompt=contiguous,owner=interleave(1),pages=lazy,start=rotated,C=2,T=2",
    "custom/1:prompt=round_robin,owner=last_rank,pages=lazy,start=rank_zero,C=3,T=4",
    "custom/1:prompt=contiguous,owner=position,pages=lazy,start=rank_zero,C=4,T=1",
    "pr9757/1:C=1,T=2",
)


@dataclass(eq=False)
class NaivePage:
    """A page, and the requests that hold it."""

    holders: set[int]


class NaiveShare:
    """What one request has in one cache group: positions and pages of each rank, as lists."""

    def __init__(self, ranks: int) -> None:
        self.positions: list[list[int]] = [[] for _ in range(ranks)]
        self.tables: list[list[NaivePage | None]] = [[] for _ in range(ranks)]


class NaiveGroup:
    """Places the tokens of one cache group on all ranks, one token after the other."""

    def __init__(self, layout: Layout, ranks: int, window: int | None, pool: str) -> None:
        self.layout, self.ranks, self.window, self.pool = layout, ranks, window, pool
        self.copies = ranks // layout.cp_size  # ranks that hold what one rank of the layout holds

    def owner_in_prompt(self, position: int, prompt_len: int) -> int:
        """The logical rank of a prompt token."""
        rule, t, c = self.layout.prompt, self.layout.tokens_per_block, self.layout.cp_size
        if rule == "contiguous":
            shares = np.array_split(np.arange(-(-prompt_len // t)), c)
            return next(rank for rank, share in enumerate(shares) if position // t in share)
        return position // (self.layout.prompt_interleave or t) % c

    def owner_of_step(self, step: int, prompt_len: int) -> int:
        """The logical rank of a decoded token."""
        rule, t, c = self.layout.owner, self.layout.tokens_per_block, self.layout.cp_size
        if rule == "last_rank":
            return c - 1
        if rule == "step":
            return step // t % c
        return (prompt_len + step) // (self.layout.owner_interleave or t) % c

    def holders(self, owner: int, shift: int) -> list[int]:
        """The ranks that hold a token of this logical rank."""
        if self.copies > 1:
            return list(range(self.ranks))
        return [(owner + shift) % self.layout.cp_size]

    def append(self, id: int, share: NaiveShare, position: int, holders: list[int]) -> list[int]:
        """Place one token, and return on how many pages each rank took for it."""
        t, taken = self.layout.tokens_per_block, [0] * self.ranks
        lockstep = self.layout.pages == "lockstep"
        block = t * self.layout.cp_size
        for rank in range(self.ranks) if lockstep else holders:
            table, index = share.tables[rank], len(share.positions[rank])
            column = position // block if lockstep else index // t
            held = table[column] if column < len(table) else None
            if held is None or len(held.holders) > 1:
                if held is not None:
                    held.holders.discard(id)
                table[column:] = [NaivePage({id})]
                taken[rank] += 1
        for rank in holders:
            share.positions[rank].append(position)
        return taken

    def drop(self, id: int, share: NaiveShare, next_query: int) -> None:
        """Let pages go whose last position is outside of every window to come."""
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        for table, positions in zip(share.tables, share.positions, strict=True):
            for column, page in enumerate(table):
                last = (column + 1) * t - 1
                if self.layout.pages == "lockstep":
                    final: float = (column + 1) * t * c - 1
                else:
                    final = positions[last] if last < len(positions) else float("inf")
                passed = self.window is not None and final <= next_query - self.window
                if page is not None and passed:
                    page.holders.discard(id)
                    table[column] = None

    def rewind(self, id: int, share: NaiveShare, total: int) -> None:
        """Take the tokens from `total` on, and the pages that the policy does not want then."""
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        for table, positions in zip(share.tables, share.positions, strict=True):
            positions[:] = [p for p in positions if p < total]
            wanted = -(-len(positions) // t)
            if self.layout.pages == "lockstep":
                wanted = -(-total // (t * c))
            for page in table[wanted:]:
                assert page is not None
                page.holders.discard(id)
            del table[wanted:]


class Naive:
    """All ranks of a configuration; an event is tried on copies, and kept if there are pages."""

    def __init__(self, config: Config) -> None:
        self.config, self.c = config, config.layout.cp_size
        self.groups = [
            NaiveGroup(config.layout_of(group), self.c, group.window, group.pool)
            for group in config.groups
        ]
        self.requests: dict[int, list[NaiveShare]] = {}
        self.totals: dict[int, int] = {}
        self.open: dict[int, int] = {}
        self.prompts: dict[int, int] = {}
        self.shifts: dict[int, int] = {}
        self.admitted = 0

    def pages(self, pool: str, rank: int) -> set[NaivePage]:
        """The pages of a pool that some request holds."""
        return {
            page
            for shares in self.requests.values()
            for group, share in zip(self.groups, shares, strict=True)
            for page in share.tables[rank]
            if page is not None and group.pool == pool
        }

    def free(self, pool: str) -> list[int]:
        """Free pages of a pool on each rank."""
        sizes = self.config.pool_sizes(pool)
        return [size - len(self.pages(pool, rank)) for rank, size in enumerate(sizes)]

    def place(self, id: int, prompt_len: int) -> dict[str, Any]:
        """Place a prompt; the pages that each pool gives on each rank."""
        self.requests[id] = [NaiveShare(self.c) for _ in self.groups]
        self.totals[id] = self.prompts[id] = 0
        return self.extend([id], [prompt_len], prompt=True)

    def extend(self, ids: list[int], lens: list[int], *, prompt: bool) -> dict[str, Any]:
        """Place tokens of each request, one after the other."""
        need = {pool: np.zeros(self.c, int) for pool in ("main", *self.config.pools)}
        for id, count in zip(ids, lens, strict=True):
            if prompt:
                self.prompts[id] = count
            for position in range(self.totals[id], self.totals[id] + count):
                for group, share in zip(self.groups, self.requests[id], strict=True):
                    length = self.prompts[id]
                    owner = (
                        group.owner_in_prompt(position, length)
                        if prompt
                        else group.owner_of_step(position - length, length)
                    )
                    shift = self.shifts[id] % group.layout.cp_size
                    holders = group.holders(owner, shift)
                    need[group.pool] += group.append(id, share, position, holders)
            self.totals[id] += count
        return need

    def end_event(self, id: int) -> None:
        """Windows leave pages behind."""
        next_query = self.totals[id] - max(self.open.get(id, 0) - 1, 0)
        for group, share in zip(self.groups, self.requests[id], strict=True):
            group.drop(id, share, next_query)

    def leave(self, id: int) -> None:
        """A request gives up all its pages."""
        for share in self.requests.pop(id):
            for table in share.tables:
                for page in table:
                    if page is not None:
                        page.holders.discard(id)
        self.open.pop(id, None)


def drawn_config(layout: str, choose: random.Random) -> Config:
    """One to four cache groups in one or two pools."""
    rules = parse_layout(layout)
    sizes = [[choose.randint(8, 28) for _ in range(rules.cp_size)] for _ in range(2)]
    groups = [
        CacheGroup(
            name=f"g{place}",
            layers=[0],
            placement=choose.choice(["sharded", "replicated"]),
            window=choose.choice([None, 1, 2, 3, 5, 9]),
            tokens_per_block=choose.choice([None, rules.tokens_per_block * 2]),
            pool=choose.choice(["main", "other"]) if place else "main",
        )
        for place in range(choose.randint(1, 4))
    ]
    pools = {"other": sizes[1]} if any(group.pool == "other" for group in groups) else {}
    model = ModelShape(q_heads=12, kv_heads=1)
    return Config(
        layout=layout, pages=sizes[0], max_len=60, model=model, groups=groups, pools=pools
    )


class Played:
    """Random events at the books of all ranks and at the naive model, compared after each."""

    def __init__(self, config: Config, choose: random.Random) -> None:
        self.config, self.choose, self.naive = config, choose, Naive(config)
        self.books = [GroupBook(config, rank) for rank in range(config.layout.cp_size)]
        self.totals: dict[int, int] = {}
        self.numbers: dict[tuple[str, int, int], NaivePage] = {}
        self.refused = self.accepted = self.next_id = 0

    def event(self) -> None:
        """One random event."""
        naive, choose = self.naive, self.choose
        live, known = list(naive.requests), [i for i in self.totals if i not in naive.requests]
        kinds = ["admit"] + ["decode"] * 6 * bool(live) + ["skip", "fork"] * bool(live)
        kinds += ["accept"] * 3 * bool(naive.open) + ["resume"] * 2 * bool(known)
        kinds += ["release", "preempt"] * (len(live) > 1)
        kind = choose.choice(kinds)
        id = choose.choice(live) if live else -1
        if kind == "admit":
            self._placing("admit", self._new(), choose.randint(1, 22))
        elif kind == "resume":
            id = choose.choice(known)
            self._placing("resume", id, self.totals[id])
        elif kind in ("decode", "skip"):
            ids = choose.sample(live, choose.randint(1, min(4, len(live))))
            lens = [choose.choice([1, 1, 1, 2, 4, 7]) for _ in ids]
            if all(naive.totals[i] + n <= 60 for i, n in zip(ids, lens, strict=True)):
                self._decode(kind, ids, lens)
        elif kind == "accept":
            id = choose.choice(list(naive.open))
            kept = choose.randint(1, naive.open[id])
            for book in self.books:
                book.accept(id, kept)
            naive.totals[id] -= naive.open.pop(id) - kept
            for group, share in zip(naive.groups, naive.requests[id], strict=True):
                group.rewind(id, share, naive.totals[id])
            naive.end_event(id)
        elif kind == "fork":
            child = self._new()
            for book in self.books:
                book.fork(id, child)
            naive.open.pop(id, None)
            self._naive_fork(id, child)
            naive.end_event(id)
            naive.end_event(child)
        else:
            for book in self.books:
                getattr(book, kind)(id)
            self.totals[id] = naive.totals[id]
            naive.leave(id)
            if kind == "release":
                del self.totals[id]
        self.compare()

    def _new(self) -> int:
        self.next_id += 1
        return self.next_id

    def _naive_fork(self, parent: int, child: int) -> None:
        naive = self.naive
        naive.requests[child] = []
        for share in naive.requests[parent]:
            shared = NaiveShare(naive.c)
            shared.positions = [list(positions) for positions in share.positions]
            shared.tables = [list(table) for table in share.tables]
            for page in (page for table in shared.tables for page in table if page is not None):
                page.holders.add(child)
            naive.requests[child].append(shared)
        for of in (naive.totals, naive.prompts, naive.shifts, self.totals):
            of[child] = of.get(parent, 0)

    def _placing(self, kind: str, id: int, tokens: int) -> None:
        naive = self.naive
        free = {pool: naive.free(pool) for pool in self.books[0].pools}
        if kind == "admit":
            naive.shifts[id] = naive.admitted if self.config.layout.start == "rotated" else 0
        need = naive.place(id, tokens)
        if any((need[pool] > free[pool]).any() for pool in need):
            naive.leave(id)
            self._refused(kind, id, *[tokens] * (kind == "admit"))
            return
        self.accepted += 1
        for book in self.books:
            getattr(book, kind)(id, *[tokens] * (kind == "admit"))
        naive.admitted += kind == "admit"
        self.totals[id] = tokens
        naive.end_event(id)

    def _decode(self, kind: str, ids: list[int], lens: list[int]) -> None:
        naive = self.naive
        if kind == "decode":
            need = self._dry_need(ids, lens)
            if any((need[pool] > naive.free(pool)).any() for pool in need):
                self._refused("decode_step", ids, lens)
                return
        elif any((n > naive.free(pool)).any() for pool, n in self._dry_need(ids, lens).items()):
            self._refused("skip", ids, lens)
            return
        else:
            for book in self.books:
                book.skip(ids, lens)
            return
        self.accepted += 1
        before = {id: [[list(p) for p in s.positions] for s in naive.requests[id]] for id in ids}
        naive.extend(ids, lens, prompt=False)
        for id, count in zip(ids, lens, strict=True):
            naive.open[id] = count
        numbers = [book.plan_step(ids, lens) for book in self.books]
        steps = [book.advance(plan) for book, plan in zip(self.books, numbers, strict=True)]
        self._compare_steps(ids, lens, before, steps)
        for book, plan in zip(self.books, numbers, strict=True):
            book.drop(plan.rows)
        for id in ids:
            naive.end_event(id)

    def _dry_need(self, ids: list[int], lens: list[int]) -> dict[str, Any]:
        """The need of a decode, found by doing it on a deep copy."""
        return copy.deepcopy(self.naive).extend(ids, lens, prompt=False)

    def _refused(self, call: str, *given: Any) -> None:
        self.refused += 1
        for book in self.books:
            with pytest.raises(Refused) as refused:
                getattr(book, call)(*given)
            assert refused.value.reason == Reason.OUT_OF_PAGES

    def _compare_steps(
        self, ids: list[int], lens: list[int], before: Any, steps: list[dict[str, Any]]
    ) -> None:
        naive = self.naive
        for rank, of_groups in enumerate(steps):
            for place, (group, step) in enumerate(
                zip(naive.groups, of_groups.values(), strict=True)
            ):
                t, wanted = group.layout.tokens_per_block, list[tuple[Any, ...]]()
                for id, count in zip(ids, lens, strict=True):
                    share = naive.requests[id][place]
                    table = self.books[rank].books[f"g{place}"].block_table(id)
                    for p in range(naive.totals[id] - count, naive.totals[id]):
                        here = share.positions[rank]
                        low = 0 if group.window is None else max(0, p - group.window + 1)
                        index = here.index(p) if p in here else -1
                        slot = table[index // t] * t + index % t if index >= 0 else -1
                        seen = [q for q in here if low <= q <= p]
                        start = len([q for q in here if q < low])
                        wanted.append((p, index >= 0, slot, len(seen), start))
                starts = np.zeros(len(step.visible), int) if step.starts is None else step.starts
                found = zip(
                    step.position_ids.tolist(), step.active.tolist(), step.slots.tolist(),
                    step.visible.tolist(), starts.tolist(), strict=True,
                )  # fmt: skip
                assert list(found) == wanted
                assert step.past_len.tolist() == [len(before[id][place][rank]) for id in ids]

    def compare(self) -> None:
        """Tables, lengths and free pages of every rank and group are those of the model."""
        naive, numbers = self.naive, dict[tuple[str, int, int], NaivePage]()
        for rank, book in enumerate(self.books):
            assert book.free_by_pool == {pool: naive.free(pool)[rank] for pool in book.pools}
            for pool, held in book.pools.items():
                assert held.free.tolist() == naive.free(pool)
            assert sorted(book.request_ids) == sorted(naive.requests)
            for place, group in enumerate(naive.groups):
                one = book.books[f"g{place}"]
                for id, shares in naive.requests.items():
                    table, pages = one.block_table(id), shares[place].tables[rank]
                    assert one.local_len(id) == len(shares[place].positions[rank])
                    assert [page < 0 for page in table] == [page is None for page in pages]
                    for number, page in zip(table, pages, strict=True):
                        if page is not None:
                            key = (group.pool, rank, number)
                            assert numbers.setdefault(key, page) is page
        assert len(set(numbers.values())) == len(numbers)


def play(layout: str, seeds: int) -> tuple[int, int]:
    """Play random events; how many placings and decodes were accepted, and refused."""
    accepted = refused = 0
    for seed in range(seeds):
        choose = random.Random(f"{layout} {seed}")
        played = Played(drawn_config(layout, choose), choose)
        for _ in range(30):
            played.event()
        accepted, refused = accepted + played.accepted, refused + played.refused
    return accepted, refused


@pytest.mark.holds("REP-1", "POOL-1", "WIN-1", "WIN-2", "PAGE-1", "PAGE-2", "PAGE-3", "REF-2")
@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_are_what_lists_say(layout: str) -> None:
    """Random events: tables, dropped places, lengths, slots, windows, pools and refusals agree."""
    accepted, refused = play(layout, seeds=3)
    assert accepted > 20
    assert refused > 0


def _total(ledger: Ledger, rows: Ints) -> Ints:
    """As if every token of an open group were sure to be accepted."""
    total: Ints = ledger._rows["total"][rows]
    return total


def _drop_from_tables_alone(ledger: Ledger, rows: Ints, next_queries: Ints) -> Drop | None:
    """The counters from which refusals come do not hear of it."""
    free = ledger.free.copy()
    dropped = _drop(ledger, rows, next_queries)
    ledger.free[:] = free
    return dropped


def _unshifted(ledger: Ledger, rows: Ints, positions: Ints, ranks: Any) -> Ints:
    """Where a request starts does not matter."""
    c, prompt_lens = ledger.layout.cp_size, ledger._rows["prompt_len"][rows]
    return tokens_before(ledger.layout, positions, prompt_lens, ranks % c)


def _each_alone(book: GroupBook, needs: list[Ints]) -> None:
    """Groups that fit one by one are taken to fit together."""
    for ledger, need in zip(book._ledgers, needs, strict=True):
        ledger._check_pages(need)


def _a_token_early(ledger: Ledger, rows: Ints, next_queries: Ints) -> Drop | None:
    """A window is taken to be a token shorter than it is."""
    return _drop(ledger, rows, next_queries + 1)


def _forgets_sharers(shared: SharedWindows, row: int, rank: int, count: int) -> int:
    """A page goes back when the first of its holders drops it."""
    _shared_drop(shared, row, rank, count)
    return 0


_drop, _shared_drop = Ledger.drop, SharedWindows.drop


@pytest.mark.parametrize(
    ("part", "wrong", "layout"),
    [
        ((Ledger, "next_queries"), _total, "pr9757/1:C=1,T=1"),
        ((Ledger, "drop"), _drop_from_tables_alone, "pr17866/1:C=3,T=2"),
        ((Ledger, "drop"), _a_token_early, "pr13180/1:C=2,T=2"),
        ((Ledger, "tokens_before"), _unshifted, "balanced/1:C=3,T=2"),
        ((GroupBook, "_check_pages"), _each_alone, "pr9757/1:C=3,T=2"),
        ((SharedWindows, "drop"), _forgets_sharers, "pr13180/1:C=2,T=2"),
    ],
)
def test_the_model_sees_what_is_wrong(
    part: tuple[type, str], wrong: Any, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of these mistakes differs from the lists within a few traces."""
    monkeypatch.setattr(*part, wrong)
    with pytest.raises((AssertionError, RuntimeError, pytest.fail.Exception)):
        play(layout, seeds=20)


def test_a_window_costs_by_what_leaves_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a long request's steps only those look at its pages in which one may leave."""
    near = CacheGroup(name="near", layers=[0], placement="replicated", window=64)
    config = Config(layout="pr9757/1:C=2,T=32", pages=[9999] * 2, max_len=2**20, groups=[near])
    book, cleared = GroupBook(config, 0), list[int]()
    clear = BlockTables.clear

    def counted(tables: BlockTables, row: int, first: int, end: int) -> list[int]:
        cleared.append(end - first)
        return clear(tables, row, first, end)

    monkeypatch.setattr(BlockTables, "clear", counted)
    book.admit(0, 100_000)
    for _ in range(320):
        book.decode_step([0])
    assert cleared[1:] == [1] * 10
