"""Mutants of `helix_gpu`'s bookkeeping: whose turn it is, lengths, pages, slots, refusals."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from helix_gpu.bookkeeping.allocator import PageAllocator
from helix_gpu.bookkeeping.block_tables import BlockTables
from helix_gpu.bookkeeping.dealing import FOREVER
from helix_gpu.bookkeeping.ledger import Admission, Ints, Ledger, Step
from helix_gpu.bookkeeping.rank_book import RankBook, RankStep
from helix_gpu.bookkeeping.refusals import Refused
from helix_mutants.parts import (
    LOCKSTEP,
    STEP_RULE,
    TAKING_TURNS,
    OverLedger,
    mutant,
    rebound,
)
from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome, RankView
from helix_spec.events import FEATURES, Decode, Event, Reason
from helix_spec.layouts import Layout


class _Boundless(PageAllocator):
    """Hands out pages beyond the pool rather than none."""

    def take(self, count: int) -> list[int]:
        """Take `count` pages, whether there are or not."""
        self.pages += max(0, count - self.free)
        return super().take(count)


# Whose turn it is


@mutant("TensorRT-LLM before #9757", "OWN-3", "BAL-2", layouts=TAKING_TURNS)
class AppendToLastRank(OverLedger):
    """Only rank C-1 is ever active, under a layout whose ranks take turns."""

    class Wrong(Ledger):
        admit = rebound(Ledger.admit, first_turn=lambda layout, *_: (layout.cp_size - 1, FOREVER))

    ledger_class = Wrong


@mutant("TensorRT-LLM #9757, #17866", "OWN-2", layouts=STEP_RULE)
class OwnerRulesMixed(OverLedger):
    """The last rank follows the position rule, the others the step rule."""

    def started(self, config: Config) -> None:
        """Swap the rule of one rank."""
        ledger = self.book.ledger
        if self.book.cp_rank == ledger.layout.cp_size - 1:
            ledger.layout = ledger.layout.replace(owner="position")


@mutant("TensorRT-LLM #9342", "OWN-1", "PAGE-4")
class TwoRanksWrite(OverLedger):
    """Inactive ranks append and write too, at their own next slot."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right, t = super().advance(step), self.layout.tokens_per_block
            pages = self.tables.read(right.rows, int(right.past_len.max()) // t + 1)
            page = pages[np.arange(len(right.rows)), right.past_len // t]
            return right._replace(slots=page * t + right.past_len % t)

    book_class = Book


@mutant("vLLM 0.33.0, --dcp-kv-cache-interleave-size without a KV connector", "OWN-3",
        depth="placement", layouts=["vllm_dcp"])  # fmt: skip
class InterleaveIgnored(OverLedger):
    """The configured interleave never takes effect: tokens are dealt one by one.

    As it shows in the metadata of a step, which vLLM makes without allocating anything.
    """

    profiles = frozenset({"placement", *FEATURES})

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            one = layout.replace(prompt_interleave=1, owner_interleave=1)
            super().__init__(one, pages, max_len)

        def _check_pages(self, pages: Ints) -> None:
            pass

    ledger_class = Wrong
    allocator_class = _Boundless


@mutant("own: a step that never ran moves the turn on", "OWN-3",
        layouts=sorted({*TAKING_TURNS} - {*LOCKSTEP}))  # fmt: skip
class SkipTakesTheTurn(OverLedger):
    """A step that was prepared and dropped counts as one of the owner's turn.

    Under `lockstep` it may die of that at once: the wrong owner's slot is in a page not taken.
    """

    class Book(RankBook):
        def skip(self, ids: Sequence[int], query_lens: Sequence[int] | None = None) -> None:
            rows, state = self.plan_step(ids, query_lens).rows, self.ledger._rows
            owner, left = self.ledger._turn(
                state["owner"][rows], state["left"][rows], np.ones_like(rows)
            )
            state["owner"][rows], state["left"][rows] = owner, left

    book_class = Book


@mutant("own: an admission that was refused shifts the next one", "LEN-1", layouts=["balanced"])
class RefusedAdmissionTakesANumber(OverLedger):
    """Under `rotated` every admission that was tried moves the start on."""

    class Wrong(Ledger):
        def plan_admit(self, id: int, prompt_len: int) -> Admission:
            try:
                return super().plan_admit(id, prompt_len)
            except Refused:
                self.admitted += 1
                raise

    ledger_class = Wrong


@mutant("own: answers come back in the batch's sorted order", "POS-1", "LEN-2", "OWN-3",
        "PAGE-2")  # fmt: skip
class BatchAnsweredSorted(OverLedger):
    """The scheduler sorts a batch by id, and hands the rows out in that order."""

    def apply(self, event: Event) -> Outcome:
        """Sort the batch of a decode."""
        if isinstance(event, Decode) and len(event.ids) == len(event.query_lens):
            event = msgspec.structs.replace(event, ids=sorted(event.ids))
        return super().apply(event)


# Slots and block tables


@mutant("own: the page of the token before", "OWN-1", "PAGE-2", "GROW-1")
class PageOfPreviousToken(OverLedger):
    """The page of a slot is looked up with the index of the token before: off at page starts."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right, t = super().advance(step), self.layout.tokens_per_block
            slots, index = right.slots.copy(), right.past_len
            late = right.active & (index > 0)
            page = self.tables.page(right.rows[late], (index[late] - 1) // t)
            slots[late] = page * t + index[late] % t
            return right._replace(slots=slots)

    book_class = Book


@mutant("own: overflow of slot ids, scaled down", "OWN-1")
class SlotIdsOverflow(OverLedger):
    """Slots travel in a type too narrow for them (here 7 bits and a sign) and turn negative."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right = super().advance(step)
            return right._replace(slots=right.slots.astype(np.int8).astype(np.int64))

    book_class = Book


@mutant("SGLang #35424", "PAGE-2", layouts=LOCKSTEP)
class HeadroomByLocalPage(OverLedger):
    """One flat table whose rows have no room for a last, partial super-block.

    Near max_len a request writes the page number into its neighbour's row.
    """

    class Flat(BlockTables):
        stride = 1
        _flat: Ints

        def begin(self, row: int, pages: Sequence[int]) -> None:
            self._flat[row * self.stride :][: len(pages)] = pages

        def write(self, rows: Ints, columns: Ints, pages: Sequence[int]) -> None:
            self._flat[rows * self.stride + columns] = pages

        def read(self, rows: Ints, width: int) -> Ints:
            pages: Ints = self._flat[rows[:, None] * self.stride + np.arange(width)]
            return pages

        def lists(self, rows: Ints, widths: Ints) -> list[list[int]]:
            starts = zip((rows * self.stride).tolist(), widths.tolist(), strict=True)
            return [self._flat[first : first + n].tolist() for first, n in starts]

        def page(self, rows: Ints, columns: Ints) -> Ints:
            pages: Ints = self._flat[rows * self.stride + columns]
            return pages

    tables_class = Flat

    def started(self, config: Config) -> None:
        """Size the rows."""
        layout = config.layout
        block = layout.tokens_per_block * layout.cp_size
        tables: Any = self.book.tables
        tables.stride = max(1, config.max_len // block)
        tables._flat = np.zeros(100 * tables.stride, dtype=np.int64)


@mutant("SGLang #36886", "PAGE-1")
class VirtualIdsOnLocalBuffer(OverLedger):
    """Pages are numbered over all ranks, and these numbers index the buffer of one rank.

    The first pages lie inside it, so small tests pass.
    """

    class Wrong(PageAllocator):
        ranks, rank = 1, 0

        def take(self, count: int) -> list[int]:
            return [page * self.ranks + self.rank for page in super().take(count)]

        def give_back(self, pages: Iterable[int]) -> None:
            super().give_back(page // self.ranks for page in pages)

    allocator_class = Wrong

    def started(self, config: Config) -> None:
        """Tell the allocator how many ranks there are."""
        allocator: Any = self.book._allocator
        allocator.ranks, allocator.rank = config.layout.cp_size, self.book.cp_rank


@mutant("own: a block table not compacted after a release", "PAGE-2", "OWN-1", "GROW-1", "PAGE-1")
class TableNotCompacted(OverLedger):
    """The last row of the ledger moves into the hole that a release leaves; its pages do not."""

    class Book(RankBook):
        def release(self, id: int) -> None:
            ledger = self.ledger
            hole = int(ledger.rows([id])[0])
            super().release(id)
            row_of = ledger._row_of
            last = max(row_of, key=row_of.__getitem__, default=id)
            if row_of.get(last, -1) > hole:
                ledger._rows[hole] = ledger._rows[row_of[last]]
                ledger._free_rows[-1] = row_of[last]
                row_of[last] = hole

    book_class = Book


# Pages and pools


@mutant("SGLang", "PAGE-3", layouts=LOCKSTEP)
class TailFreedAtWrongUnit(OverLedger):
    """Pages are taken in super-blocks of T*C tokens, and given back for each full one only."""

    class Book(RankBook):
        def release(self, id: int) -> None:
            total, layout = int(self.ledger.local_lens([id]).sum()), self.layout
            pages = self.block_table(id)
            self.ledger.release(id)
            full = total // layout.tokens_per_block // layout.cp_size
            self._allocator.give_back(pages[:full])

    book_class = Book


@mutant("TensorRT-LLM #17866", "PAGE-1", "REF-2", layouts=LOCKSTEP)
class CapacityInLocalTokens(OverLedger):
    """Room is counted in local tokens, as if requests could share a page's empty slots."""

    class Wrong(Ledger):
        def plan_admit(self, id: int, prompt_len: int) -> Admission:
            plan = super().plan_admit(id, prompt_len)
            self._check_tokens([prompt_len])
            return plan

        def plan_step(self, ids: Sequence[int], query_lens: Sequence[int], pad: int = 0) -> Step:
            plan = super().plan_step(ids, query_lens, pad)
            self._check_tokens([])
            return plan

        def _check_pages(self, pages: Ints) -> None:
            pass

        def _check_tokens(self, more: list[int]) -> None:
            c, t = self.layout.cp_size, self.layout.tokens_per_block
            totals = more + self.local_lens(self.ids).sum(1).tolist()
            pools = self.free + self.held(self.ids).sum(0)
            if sum(-(-total // c) for total in totals) > min(pools) * t:
                raise Refused(Reason.OUT_OF_PAGES, "There are not enough slots.")

    ledger_class = Wrong
    allocator_class = _Boundless


@mutant("own: dummy requests take a page", "DUM-1", "PAGE-3", features=["padding"])
class DummiesTakeAPage(OverLedger):
    """A padded batch takes a page for its dummies and keeps it."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right = super().advance(step)
            if step.pad and self._allocator.free:
                self._allocator.take(1)
            return right

    book_class = Book


# Refusals


@mutant("TensorRT-LLM #15383", "REF-2")
class ShortPromptRefused(OverLedger):
    """A prompt of fewer blocks than ranks is refused."""

    class Wrong(Ledger):
        def plan_admit(self, id: int, prompt_len: int) -> Admission:
            plan = super().plan_admit(id, prompt_len)
            if -(-prompt_len // self.layout.tokens_per_block) < self.layout.cp_size:
                raise Refused(Reason.EMPTY_PROMPT, "Some rank would hold nothing.")
            return plan

    ledger_class = Wrong


@mutant("vllm-ascend #10442", "OWN-1", "REF-2", layouts=["vllm_dcp"])
class InterleaveExceedsBlock(OverLedger):
    """An interleave that does not divide the page is accepted at start."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, whatever the interleave."""
        outcome = super().start(config, profiles)
        problem = config_problem(config)
        if problem is not None and "does not divide tokens_per_block" in problem:
            return Outcome()
        return outcome


@mutant("TensorRT-LLM #14020 and others", "REF-1")
class OneRankRefusesAlone(OverLedger):
    """A rank looks at its own pool only: it refuses while its peers go on."""

    class Wrong(Ledger):
        rank = 0

        def _check_pages(self, pages: Ints) -> None:
            own = np.zeros_like(pages)
            own[self.rank] = pages[self.rank]
            super()._check_pages(own)

    ledger_class = Wrong

    def started(self, config: Config) -> None:
        """Tell the ledger whose it is."""
        self.book.ledger.rank = self.book.cp_rank  # type: ignore[attr-defined]


@mutant("own: the need of a batch counted request by request", "REF-2")
class NeedCountedOneByOne(OverLedger):
    """A batch is accepted when each of its requests would fit alone."""

    class Wrong(Ledger):
        def _check_pages(self, pages: Ints) -> None:
            super()._check_pages(np.minimum(pages, 1))

        def plan_admit(self, id: int, prompt_len: int) -> Admission:
            plan = super().plan_admit(id, prompt_len)
            super()._check_pages(plan.pages)
            return plan

    ledger_class = Wrong
    allocator_class = _Boundless


@mutant("own: pools taken to be alike", "REF-2")
class PoolsTakenAsAlike(OverLedger):
    """Room is looked up in the pool of rank 0, for every rank."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            super().__init__(layout, [pages[0]] * len(pages), max_len)

    ledger_class = Wrong
    allocator_class = _Boundless


@mutant("own: the scheduler's count of free pages forgets releases", "REF-2")
class ReleaseNotCounted(OverLedger):
    """Pages go back to the allocator, but the ledger that refuses events does not hear of it."""

    class Wrong(Ledger):
        def release(self, id: int) -> None:
            free = self.free.copy()
            super().release(id)
            self.free = free

    ledger_class = Wrong


@mutant("own: request ids in 32 bits", "REF-2")
class IdsIn32Bits(OverLedger):
    """Ids are cut to 32 bits: two requests may be taken for one."""

    def apply(self, event: Event) -> Outcome:
        """Cut the ids."""
        fields = msgspec.structs.asdict(event)
        for name in {"id", "parent", "child"} & fields.keys():
            fields[name] %= 2**32
        if "ids" in fields:
            fields["ids"] = [id % 2**32 for id in fields["ids"]]
        return super().apply(type(event)(**fields))

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state."""
        return super().observe(None if ids is None else [id % 2**32 for id in ids])


@mutant("own: what was there is lost when a table grows", "LEN-1", "PAGE-1", "GROW-1", "PAGE-2")
class GrowthLosesRows(OverLedger):
    """The block tables are made anew, and blank, when they have no room for a row."""

    class Wrong(BlockTables):
        def _grow(self, rows: int, columns: int) -> None:
            if rows > len(self._pages) > 0:
                self._pages = np.zeros_like(self._pages)
            super()._grow(max(rows, 4), max(columns, 4))

    tables_class = Wrong


@mutant("own: a float comparison that comes out otherwise on one rank", "REF-1", "REF-2")
class FloatUtilisation(OverLedger):
    """A rank compares the free share of its pool with the share it needs, as floats.

    At the last page 1 - used/pool is a little less than 1/pool, for some sizes of pools.
    """

    class Wrong(Ledger):
        rank = 0

        def _check_pages(self, pages: Ints) -> None:
            super()._check_pages(pages)
            free = int(self.free[self.rank])
            pool = free + int(self.held(self.ids)[:, self.rank].sum())
            if 1.0 - (pool - free) / pool < pages[self.rank] / pool:
                raise Refused(Reason.OUT_OF_PAGES, "The pool is full.")

    ledger_class = Wrong

    def started(self, config: Config) -> None:
        """Tell the ledger whose it is."""
        self.book.ledger.rank = self.book.cp_rank  # type: ignore[attr-defined]


@mutant("own: max_len taken as exclusive", "REF-2")
class MaxLenIsExclusive(OverLedger):
    """The last token that max_len allows is refused."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            super().__init__(layout, pages, max_len - 1)

    ledger_class = Wrong


@mutant("own: reasons tried in another order", "REF-2")
class UnknownBeforeDuplicate(OverLedger):
    """Whether the ids are known is asked before whether one of them stands twice."""

    class Wrong(Ledger):
        def _batch_rows(self, ids: Sequence[int], query_lens: Sequence[int], pad: int) -> Any:
            try:
                rows: NDArray[np.int64] = super()._batch_rows(ids, query_lens, pad)
            except Refused as refused:
                if refused.reason == Reason.DUPLICATE_REQUEST:
                    self.rows(ids)
                raise
            return rows

    ledger_class = Wrong
