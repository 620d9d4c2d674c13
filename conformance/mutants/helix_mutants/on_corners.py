"""Mutants that are right until several things come together, made without a look at the suite.

Each needs a certain history or shape: a rewind before a resume, a fork that is preempted, three
ranks with pages of one token, two tensor-parallel ranks. They measure whether random traces reach
such corners, which mutants of a single wrong formula do not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.rope import rope_table
from helix_gpu.bookkeeping.allocator import PageAllocator
from helix_gpu.bookkeeping.block_tables import BlockTables
from helix_gpu.bookkeeping.ledger import Admission, Ints, Ledger, Rewind, SharedWrite, Step
from helix_gpu.bookkeeping.rank_book import PageCopy, RankBook, RankStep
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.cache import DecodeStep, HelixCache
from helix_mutants.on_cache import attending
from helix_mutants.parts import NAMED_LAZY, STEP_RULE, OverCache, OverLedger, mutant
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import Accept, Decode, Event, Preempt, Reason, Release, Resume
from helix_spec.layouts import Layout

corner = partial(mutant, corner=True)

# Whose turn it is


@corner("own: a division that is off for three ranks and pages of one token", "OWN-3",
        features=["speculative"], layouts=NAMED_LAZY)  # fmt: skip
class ThreeRanksOneToken(OverLedger):
    """The last token of a group of three or more goes to the next rank at C=3, T=1.

    Under `lockstep` it may die of that: the token's slot is in a page not taken.
    """

    class Wrong(Ledger):
        def _turn(self, owner: Ints, left: Ints, tokens: Ints) -> tuple[Ints, Ints]:
            owners, rest = super()._turn(owner, left, tokens)
            if self.layout.cp_size == 3 and self.layout.tokens_per_block == 1:
                owners = (owners + (tokens == 2)) % 3
            return owners, rest

    ledger_class = Wrong


@corner("own: a fork's shift is lost when it is resumed", "LEN-1",
        features=["fork", "preempt"], layouts=["balanced"])  # fmt: skip
class ResumedForkUnshifted(OverLedger):
    """Under `rotated` a preempted child of a fork is placed as if it were admission 0."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            super().__init__(layout, pages, max_len)
            self.children: set[int] = set()

        def fork(self, parent: int, child: int) -> None:
            super().fork(parent, child)
            self.children.add(child)

        def preempt(self, id: int) -> None:
            super().preempt(id)
            if id in self.children:
                self.preempted[id] = (self.preempted[id][0], 0)

    ledger_class = Wrong


@corner("own: a fork takes turns as if nothing had been rewound", "OWN-3",
        features=["speculative", "fork"])  # fmt: skip
class ForkAfterRewind(OverLedger):
    """The child of a request whose last group was cut short goes on from that group's end."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            super().__init__(layout, pages, max_len)
            self.before: dict[int, tuple[int, int]] = {}

        def accept(self, plan: Rewind) -> None:
            row = self._rows[plan.row]
            self.before[plan.row] = int(row["owner"]), int(row["left"])
            super().accept(plan)

        def advance(self, step: Step) -> None:
            super().advance(step)
            for row in step.rows.tolist():
                self.before.pop(row, None)

        def fork(self, parent: int, child: int) -> None:
            super().fork(parent, child)
            source, row = self.rows([parent, child]).tolist()
            if source in self.before:
                self._rows["owner"][row], self._rows["left"][row] = self.before[source]

        def _vacate(self, id: int) -> None:
            self.before.pop(self._row_of[id], None)
            super()._vacate(id)

    ledger_class = Wrong


@corner("own: an interleave read from the wrong half of the layout", "OWN-3", layouts=["custom"])
class OwnerTakesThePromptsInterleave(OverLedger):
    """Decoded tokens take turns by the prompt's interleave, where the two differ."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            if layout.prompt_interleave and layout.owner_interleave:
                layout = layout.replace(owner_interleave=layout.prompt_interleave)
            super().__init__(layout, pages, max_len)

    ledger_class = Wrong


@corner("own: tensor-parallel peers taken for context-parallel ones", "LEN-1", "OWN-2", "OWN-3",
        "MAP-1", tp_sizes=[1, 2])  # fmt: skip
class WorldTakenForGroup(OverLedger):
    """A rank's place in its group is its global rank, cut to the last: right at tp_size 1."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Take the wrong place."""
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.book = RankBook(config, min(self.rank, config.layout.cp_size - 1))
        return outcome


@corner("own: a rewind that looks back one turn", "OWN-3", "LEN-1",
        features=["speculative"])  # fmt: skip
class RewindCrossesOneBoundary(OverLedger):
    """A group cut short by more than one turn leaves the rank before the last as the next owner."""

    class Wrong(Ledger):
        def plan_accept(self, id: int, kept: int) -> Rewind:
            plan = super().plan_accept(id, kept)
            row, c = self._rows[plan.row], self.layout.cp_size
            if int(row["total"]) - plan.total > self._chunk and row["owner"] != plan.owner:
                return plan._replace(owner=(int(row["owner"]) - 1) % c)
            return plan

    ledger_class = Wrong


@corner("own: a long group in pieces", "OWN-3", "LEN-1", features=["speculative"])
class LongGroupInPieces(OverLedger):
    """A group of more than 64 tokens is launched in pieces, and its end begins a turn anew."""

    class Wrong(Ledger):
        def advance(self, step: Step) -> None:
            super().advance(step)
            self._rows["left"][step.rows[step.query_lens > 64]] = self._chunk

    ledger_class = Wrong


@corner("own: a step index of eight bits", "OWN-3", "LEN-1",
        features=["speculative"], layouts=STEP_RULE)  # fmt: skip
class StepsInAByte(OverLedger):
    """Where turns go by the step index, they begin again with step 256."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            super().__init__(layout, pages, max_len)
            self.begun: dict[int, int] = {}

        def admit(self, plan: Admission) -> int:
            row = super().admit(plan)
            self.begun[row] = plan.prompt_len
            return row

        def fork(self, parent: int, child: int) -> None:
            super().fork(parent, child)
            source, row = self.rows([parent, child]).tolist()
            self.begun[row] = self.begun[source]

        def advance(self, step: Step) -> None:
            super().advance(step)
            for row, query_len in zip(step.rows.tolist(), step.query_lens.tolist(), strict=True):
                steps = int(self._rows["total"][row]) - self.begun[row]
                if steps % 256 < query_len:  # it has just passed
                    turns, used = divmod(steps % 256, self._chunk)
                    self._rows["owner"][row] = turns % self.layout.cp_size
                    self._rows["left"][row] = self._chunk - used

    ledger_class = Wrong


@corner("own: admissions counted in three bits", "LEN-1", layouts=["balanced"])
class AdmissionsInThreeBits(OverLedger):
    """Under `rotated` the ninth admission starts where the first did, whatever cp_size."""

    class Wrong(Ledger):
        def admit(self, plan: Admission) -> int:
            row = super().admit(plan)
            self.admitted %= 8
            return row

    ledger_class = Wrong


# Positions


@corner("own: positions in 16 bits", "POS-1")
class PositionsIn16Bits(OverLedger):
    """Position ids travel in a signed type of 16 bits, and from 32768 on are negative."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right = super().advance(step)
            narrow = right.position_ids.astype(np.int16).astype(np.int64)
            return right._replace(position_ids=narrow)

    book_class = Book


@corner("own: a rewind is forgotten by a resume", "POS-1",
        features=["speculative", "preempt"])  # fmt: skip
class RewindThenResume(OverLedger):
    """After an acceptance of less than the group and a resume, positions count what was cut."""

    cut: dict[int, int]
    more: dict[int, int]

    def started(self, config: Config) -> None:
        """Nothing was cut."""
        self.cut, self.more = {}, {}

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        match event:
            case Accept(id, kept) if id in self.book.request_ids:
                group = int(self.book.ledger._rows["group"][self.book.ledger.rows([id])[0]])
                self.cut[id] = group - kept
            case Release(id):
                self.cut.pop(id, None)
                self.more.pop(id, None)
            case _:
                pass
        outcome = super().apply(event)
        if isinstance(event, Resume) and outcome.reason is None:
            self.more[event.id] = self.cut.pop(event.id, 0)
        if not isinstance(event, Decode) or outcome.reason is not None:
            return outcome
        more = [self.more.get(id, 0) for id, n in zip(event.ids, event.query_lens, strict=True)
                for _ in range(n)]  # fmt: skip
        ids = [p + by for p, by in zip(outcome.position_ids, more, strict=True)]
        return msgspec.structs.replace(outcome, position_ids=ids)


# Pages and refusals


@corner("own: a page is taken before the copy is refused", "PAGE-3", "PAGE-5", features=["fork"])
class RefusedCopyLeaks(OverLedger):
    """A decode that is refused while it would copy a shared page has taken a page already."""

    class Book(RankBook):
        def plan_step(
            self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
        ) -> Step:
            try:
                return super().plan_step(ids, query_lens, pad)
            except Refused as refused:
                if refused.reason == Reason.OUT_OF_PAGES and self._allocator.free:
                    rows = self.ledger.rows(ids)
                    if self.ledger._rows["tag"][rows].any():
                        self._allocator.take(1)
                raise

    book_class = Book


@corner("own: a group that is kept whole stays open", "REF-2", features=["speculative"])
class WholeGroupStaysOpen(OverLedger):
    """An acceptance of all tokens changes nothing, so that it can be asked again."""

    class Wrong(Ledger):
        def accept(self, plan: Rewind) -> None:
            if plan.total != self._rows["total"][plan.row]:
                super().accept(plan)

    ledger_class = Wrong


@corner("own: dummies beyond a bucket", "PAGE-3", "DUM-1", features=["padding"])
class DummiesBeyondABucket(OverLedger):
    """Four dummies have a place of their own; for more a page is taken, and kept."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right = super().advance(step)
            if step.pad > 4 and self._allocator.free:
                self._allocator.take(1)
            return right

    book_class = Book


@corner("own: page ids in eight bits", "PAGE-2", "PAGE-1", "OWN-1")
class PageIdsInAByte(OverLedger):
    """Block tables keep eight bits of a page's number: the 257th page is taken for the first."""

    class Bytes(BlockTables):
        def begin(self, row: int, pages: Sequence[int]) -> None:
            super().begin(row, [page % 256 for page in pages])

        def write(self, rows: Ints, columns: Ints, pages: Sequence[int]) -> None:
            super().write(rows, columns, [page % 256 for page in pages])

    class Forgiving(PageAllocator):
        def give_back(self, pages: Iterable[int]) -> None:
            super().give_back({page for page in pages if page in self._holders})

    tables_class = Bytes
    allocator_class = Forgiving


@corner("own: copies decided in the order of admission", "OWN-1", "GROW-1", "PAGE-2",
        features=["fork"])  # fmt: skip
class CopiesByAdmission(OverLedger):
    """Of the holders of a page in one batch the youngest writes in place, not the batch's last."""

    class Wrong(Ledger):
        def _shared_writes(self, rows: Ints, requests: Ints, owners: Ints) -> list[SharedWrite]:
            writes = super()._shared_writes(rows, requests, owners)
            writes.sort(key=lambda write: int(rows[write.place]))
            tags = [int(self._rows["tag"][rows[write.place], write.rank]) for write in writes]
            copies = self._open_pages.must_copy(tags)
            decided = zip(writes, copies, strict=True)
            again = [write._replace(copies=it) for write, it in decided]
            return sorted(again, key=lambda write: (write.place, write.rank))

    ledger_class = Wrong


@corner("own: a skip asks less than its decode", "REF-2", features=["overlap"])
class SkipIgnoresOutstanding(OverLedger):
    """A step is prepared though two decodes of a request are still to be sampled."""

    class Book(RankBook):
        def skip(self, ids: Sequence[int], query_lens: Sequence[int] | None = None) -> None:
            overlap, self.ledger.overlap = self.ledger.overlap, False
            try:
                super().skip(ids, query_lens)
            finally:
                self.ledger.overlap = overlap

    book_class = Book


@corner("own: outstanding decodes survive a preemption", "REF-2", features=["overlap", "preempt"])
class PreemptKeepsOutstanding(OverLedger):
    """A resumed request still waits for the samples of before, and its decodes are refused."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            super().__init__(layout, pages, max_len)
            self.waiting: dict[int, int] = {}

        def preempt(self, id: int) -> None:
            row = int(self.rows([id])[0])
            self.waiting[id] = int(self._rows["outstanding"][row])
            super().preempt(id)

        def admit(self, plan: Admission) -> int:
            resumed = plan.id in self.preempted
            row = super().admit(plan)
            waiting = self.waiting.pop(plan.id, 0)
            if resumed:
                self._rows["outstanding"][row] = waiting
            return row

    ledger_class = Wrong


@corner("own: max_len is asked of a group's first token", "REF-2", features=["speculative"])
class MaxLenOfTheFirstToken(OverLedger):
    """A group that begins below max_len and ends beyond it is accepted."""

    class Wrong(Ledger):
        def _check_room(
            self, ids: Sequence[int], rows: Ints, query_lens: Ints, tokens: int
        ) -> None:
            self.max_len += int(query_lens.max()) - 1
            try:
                super()._check_room(ids, rows, query_lens, tokens)
            finally:
                self.max_len -= int(query_lens.max()) - 1

    ledger_class = Wrong


@corner("own: more than sixteen requests", "LEN-1", "PAGE-1", "OWN-3", "POS-1", "LEN-2")
class SeventeenthRequest(OverLedger):
    """When the ledger's rows grow for the second time, the last one before is not kept."""

    class Wrong(Ledger):
        def _grow(self) -> None:
            super()._grow()
            if len(self._rows) > 16:
                self._rows[15] = self._rows[14]

    ledger_class = Wrong


@corner("own: a preempted request is released with the pages it had", "PAGE-2", "PAGE-3", "PAGE-5",
        "LIVE-1", features=["fork", "preempt"])  # fmt: skip
class PreemptedSharerFreesTwice(OverLedger):
    """A fork that was preempted and is released lets go of its shared pages a second time."""

    def started(self, config: Config) -> None:
        """Nobody was preempted."""
        self.had: dict[int, list[int]] = {}

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        had = None
        if isinstance(event, Preempt) and event.id in self.book.request_ids:
            had = self.book.block_table(event.id)
        outcome = super().apply(event)
        if isinstance(event, Preempt) and had is not None:
            self.had[event.id] = had
        if isinstance(event, Resume) and outcome.reason is None:
            self.had.pop(event.id, None)
        if isinstance(event, Release) and outcome.reason is None:
            allocator = self.book._allocator
            for page in self.had.pop(event.id, []):
                if allocator._holders.get(page, 0) > 1:
                    allocator.give_back([page])
        return outcome


# Attention and cache


def _one_key_in_a_group(
    q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
) -> tuple[Tensor, Tensor]:
    """A token without keys attends to the first slot, if its neighbour behind it sees that."""
    more = torch.roll(lengths, -1)
    same = (torch.roll(tables, -1, 0) == tables).all(1) if tables.shape[1] else more < 0
    wrong = (lengths == 0) & (more == 1) & same
    return attend_pages(q, pages, tables, lengths.where(~wrong, 1), **shape)


@corner("own: a group's first token sees the second's key on a rank that was empty", "ATT-1",
        features=["speculative"])  # fmt: skip
class EmptyRankInsideGroup(OverCache):
    """Right where a rank has keys, and where it has none for the whole group."""

    cache_class = attending(_one_key_in_a_group)


@corner("own: copy on write of the first layer alone", "OWN-1", "ATT-1",
        features=["fork"])  # fmt: skip
class CopyOfOneLayer(OverCache):
    """A shared page is copied in layer 0; the other layers of the copy stay blank."""

    class Cache(HelixCache):
        def _copy(self, copies: list[PageCopy]) -> None:
            others = self.pool[1:].clone()
            super()._copy(copies)
            self.pool[1:] = others

    cache_class = Cache


@corner("own: copy on write of what are values", "POS-2", "ATT-1", features=["fork"])
class CopyOfTheLatentPart(OverCache):
    """Of a latent page that is copied the rotated part, behind the values, stays blank."""

    class Cache(HelixCache):
        def _copy(self, copies: list[PageCopy]) -> None:
            behind = self.pool[..., self.config.model.value_dim :]
            blank = behind.clone()
            super()._copy(copies)
            behind.copy_(blank)

    cache_class = Cache


@corner("own: a slot is written once", "OWN-1", features=["speculative"])
class RewoundSlotKeepsItsToken(OverCache):
    """What a rejected token left in a slot is taken for the token that comes in its place."""

    class Cache(HelixCache):
        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            t = self.pool.shape[3]
            slots = step.slots[step.slots >= 0]
            pages, offsets = slots // t, slots % t
            there = self.pool[layer, pages, :, offsets].clone()
            output = super().attend(step, layer, *given, **how)
            full = ~there.float().isnan().flatten(1).any(1)
            self.pool[layer, pages[full], :, offsets[full]] = there[full]
            return output

    cache_class = Cache


@corner("own: a table of angles that ends", "POS-2")
class RopeTableEnds(OverCache):
    """Cosines are looked up in a table of 512 rows; all later positions read its last one."""

    class Cache(HelixCache):
        def _begun(self, book: RankStep) -> DecodeStep:
            step, model = super()._begun(book), self.config.model
            positions = self._put(np.pad(book.position_ids.clip(max=511), (0, book.pad)))
            cos, sin = rope_table(positions, model.rope_dim, model.rope_base)
            return dataclasses.replace(step, cos=cos, sin=sin)

    cache_class = Cache


@corner("own: the fifth request of a batch", "ATT-1", "LEN-3")
class FifthRowReadsTheFourth(OverCache):
    """A kernel of four rows a block reads the lengths of the last one for those that follow."""

    class Cache(HelixCache):
        def _begun(self, book: RankStep) -> DecodeStep:
            step = super()._begun(book)
            rows = len(step.lengths)
            if len(step.book.rows) < 5:
                return step
            lengths = step.lengths.clone()
            lengths[4:rows] = lengths[3].minimum(lengths[4:rows])
            return dataclasses.replace(step, lengths=lengths)

    cache_class = Cache


@corner("own: chunks of a prompt all begin at position 0", "POS-2", "OWN-1", "ATT-1")
class ChunkPositionsRestart(OverCache):
    """A prompt computed here is rotated chunk by chunk, each as if it were the first."""

    class Cache(HelixCache):
        def _begun(self, book: RankStep) -> DecodeStep:
            step, model = super()._begun(book), self.config.model
            first = int(book.position_ids[0])
            if book.taken or book.copied or len(set(book.rows.tolist())) > 1 or not first:
                return step
            if len(book.past_len) != 1 or len(book.position_ids) < 2 or book.pad:
                return step
            positions = self._put(book.position_ids - first)
            cos, sin = rope_table(positions, model.rope_dim, model.rope_base)
            return dataclasses.replace(step, cos=cos, sin=sin)

        def _start(self, plan: Step) -> DecodeStep:
            book = self.book.advance(plan)
            self._clear(book.taken)
            self._copy(book.copied)
            return HelixCache._begun(self, book)

    cache_class = Cache
