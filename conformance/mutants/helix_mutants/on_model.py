"""Mutants of the reference: lengths, groups, forks, preemption, overlap, and what slots hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import msgspec

from helix_mutants.parts import LOCKSTEP, NAMED_LAZY, OverModel, Row, Stored, mutant
from helix_reference.attention import Token
from helix_reference.dealing import deal_prompt
from helix_reference.model import Model
from helix_reference.state import Page, Request
from helix_reference.tokens import Identity, Positions, Tokens
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Decode, Event, Preempt, Reason, Sampled, Skip
from helix_spec.layouts import Layout
from helix_spec.placement import ceil_div, chunk_local_len

# Lengths


class _Lengths(OverModel):
    """Reports lengths by a formula of its own."""

    def length(self, total: int, right: int) -> int:
        """Tokens on this rank of a request with so many in all."""
        raise NotImplementedError

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state."""
        view, requests = super().observe(ids), self.model.requests
        lens = {
            id: self.length(len(requests[id].tokens), right) for id, right in view.local_len.items()
        }
        return msgspec.structs.replace(view, local_len=lens)


@mutant("vLLM #25438", "LEN-1", layouts=["vllm_dcp"])
class InterleaveOnlyInSlots(_Lengths):
    """Slots are dealt by interleave I, lengths are counted as if it were 1."""

    def length(self, total: int, right: int) -> int:
        """Dealt one by one."""
        return chunk_local_len(total, self.cp_rank, self.model.layout.cp_size, 1)


@mutant("vLLM #27518", "LEN-1", layouts=["vllm_dcp"])
class LengthWhenDivisible(_Lengths):
    """`r <= (L-1) mod C` in place of `r < L mod C`: one too many where C divides L."""

    def length(self, total: int, right: int) -> int:
        """The formula of interleave 1."""
        layout = self.model.layout
        if layout.owner_interleave != 1:
            return right
        return total // layout.cp_size + (self.cp_rank <= (total - 1) % layout.cp_size)


@mutant("vLLM #29449", "LEN-1", layouts=["vllm_dcp"])
class BoundCeilOverRanks(_Lengths):
    """ceil(L/C) as the bound of a rank's length, which holds for interleave 1 only."""

    def length(self, total: int, right: int) -> int:
        """Clamped."""
        return min(right, ceil_div(total, self.model.layout.cp_size))


# Groups


class _Columns(OverModel):
    """Reports some columns of a decode otherwise."""

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        outcome = super().apply(event)
        decoded = isinstance(event, Decode) and outcome.reason is None
        return self.changed(event, outcome) if decoded else outcome

    def changed(self, event: Event, outcome: Outcome) -> Outcome:
        """The answer to an accepted decode."""
        raise NotImplementedError


@mutant("TensorRT-LLM #19273", "OWN-2", features=["speculative"])
class GroupOwnerPerSequence(_Columns):
    """One active flag for a whole group: a rank that owns any of its tokens claims them all."""

    def changed(self, event: Event, outcome: Outcome) -> Outcome:
        """Spread the flag over the group."""
        active: list[bool] = []
        for step in self.model.last_steps:
            active += [self.cp_rank in step.owners] * len(step.owners)
        return msgspec.structs.replace(outcome, active=active)


@mutant("vLLM #46076, review", "LEN-3", features=["speculative"])
class OffsetSubtractedLocally(_Columns):
    """Keys visible to query j of a group are taken as local_len - (q - 1 - j) on every rank."""

    def changed(self, event: Event, outcome: Outcome) -> Outcome:
        """Count back from the end of the group."""
        visible: list[int] = []
        for step in self.model.last_steps:
            q = len(step.owners)
            end = step.past_len[self.cp_rank] + step.owners.count(self.cp_rank)
            visible += [max(0, end - (q - 1 - j)) for j in range(q)]
        return msgspec.structs.replace(outcome, visible=visible)


@mutant("own: a group without a causal mask", "LEN-3", features=["speculative"])
class GroupSeesItsFuture(_Columns):
    """Every query of a group sees the whole group."""

    def changed(self, event: Event, outcome: Outcome) -> Outcome:
        """All see what the last one sees."""
        visible: list[int] = []
        for step in self.model.last_steps:
            end = step.past_len[self.cp_rank] + step.owners.count(self.cp_rank)
            visible += [end] * len(step.owners)
        return msgspec.structs.replace(outcome, visible=visible)


@mutant("own: a rewind that keeps its pages", "PAGE-1", features=["speculative"])
class RewindKeepsPages(OverModel):
    """Pages that only rewound tokens were on stay in the block table."""

    class Wrong(Model):
        def _accept(self, request: Request, kept: int) -> None:
            tables = [list(table) for table in request.tables]
            request.tables = [[] for _ in tables]
            super()._accept(request, kept)
            request.tables = tables

    model_class = Wrong


@mutant("own: a skipped step closes the group", "REF-2", features=["speculative"])
class SkipClosesTheGroup(OverModel):
    """What a prepared step looked at is taken as decoded: the group before can no longer end."""

    class Wrong(Model):
        def apply(self, event: Event) -> Reason | None:
            reason = super().apply(event)
            if reason is None and isinstance(event, Skip):
                for id in event.ids:
                    self.requests[id].open_group = 0
            return reason

    model_class = Wrong


# Steps


@mutant("TensorRT-LLM #17866", "OWN-3", "POS-1")
class StepAdvancedOnFailedAllocation(OverModel):
    """A step refused for want of pages has advanced the step index all the same."""

    class Wrong(Model):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.ahead: Counter[int] = Counter()

        def apply(self, event: Event) -> Reason | None:
            reason = super().apply(event)
            if reason == Reason.OUT_OF_PAGES and isinstance(event, Decode):
                self.ahead.update(event.ids)
            return reason

        def outcome(self, rank: int, reason: Reason | None) -> Outcome:
            right = super().outcome(rank, reason)
            ahead = [self.ahead[step.id] for step in self.last_steps for _ in step.owners]
            ids = [p + more for p, more in zip(right.position_ids, ahead, strict=True)]
            return msgspec.structs.replace(right, position_ids=ids)

    model_class = Wrong


# Overlap


class _Late(Model):
    """Says positions that are one behind, of requests that were ever a step ahead of sampling."""

    late: set[int]

    def outcome(self, rank: int, reason: Reason | None) -> Outcome:
        right = super().outcome(rank, reason)
        behind = [step.id in self.late for step in self.last_steps for _ in step.owners]
        ids = [p - late for p, late in zip(right.position_ids, behind, strict=True)]
        self.late |= {id for id, request in self.requests.items() if request.outstanding}
        return msgspec.structs.replace(right, position_ids=ids)


@mutant("TensorRT-LLM #17811", "POS-1", "POS-2", features=["overlap"])
class OverlapRepeatsPosition(Stored):
    """One step ahead of sampling, a position is used twice; all later ones are one behind."""

    model_class = _Late

    def started(self) -> None:
        """No request was ahead."""
        self.model.late = set()  # type: ignore[attr-defined]


@mutant("TensorRT-LLM #17866, review", "OWN-1", features=["overlap"])
class OverlapOwnerOneBehind(_Columns):
    """Owner and slot come from the counter that lags: the second token overwrites the first."""

    def started(self) -> None:
        """No token was placed."""
        self.last: dict[int, tuple[bool, int]] = {}

    def changed(self, event: Event, outcome: Outcome) -> Outcome:
        """Repeat the answer of the decode before, where that is not sampled yet."""
        active, slots = list(outcome.active), list(outcome.slots)
        first = 0
        for step in self.model.last_steps:
            if self.model.requests[step.id].outstanding == 2:
                active[first], slots[first] = self.last[step.id]
            self.last[step.id] = active[first], slots[first]
            first += len(step.owners)
        return msgspec.structs.replace(outcome, active=active, slots=slots)


@mutant("own: a sampled token is counted once more", "POS-1", features=["overlap"])
class SampledCountsAgain(_Columns):
    """The position advances when a step is issued, and again when its token is learned."""

    def started(self) -> None:
        """Nothing was sampled."""
        self.sampled: set[int] = set()

    def apply(self, event: Event) -> Outcome:
        """Count what was sampled."""
        outcome = super().apply(event)
        if isinstance(event, Sampled) and outcome.reason is None:
            self.sampled |= set(event.ids)
        return outcome

    def changed(self, event: Event, outcome: Outcome) -> Outcome:
        """Positions one too far."""
        more = [step.id in self.sampled for step in self.model.last_steps for _ in step.owners]
        ids = [p + by for p, by in zip(outcome.position_ids, more, strict=True)]
        return msgspec.structs.replace(outcome, position_ids=ids)


# Pages


@mutant("TensorRT-LLM #9342, design", "PAGE-1", layouts=NAMED_LAZY)
class InactiveTakesPage(OverModel):
    """When the owner takes a page, so does every other rank, under `lazy`."""

    class Wrong(Model):
        def _make_room(self, request: Request, rank: int, place: int) -> None:
            opens = place == len(request.tables[rank])
            super()._make_room(request, rank, place)
            for other in set(range(self.layout.cp_size)) - {rank} if opens else set():
                request.tables[other].append(self.pools[other].take())

    model_class = Wrong


@mutant("vLLM #48003", "PAGE-1", layouts=NAMED_LAZY)
class PagesFromGlobalLength(OverModel):
    """A prompt's pages are counted from its global length, before it is localised."""

    class Wrong(Model):
        def pages_of(self, ranks: Sequence[Sequence[int]]) -> list[int]:
            total = sum(len(positions) for positions in ranks)
            return [ceil_div(total, self.layout.tokens_per_block)] * len(ranks)

    model_class = Wrong


# Forks


@mutant("general", "PAGE-2", features=["fork"])
class NoCopyOnWrite(Stored):
    """A forked request writes into the page that it shares."""

    class Wrong(Model):
        def _make_room(self, request: Request, rank: int, place: int) -> None:
            if place == len(request.tables[rank]):
                super()._make_room(request, rank, place)

    model_class = Wrong


@mutant("own: a parent's release frees what its child holds", "PAGE-2", "PAGE-3", features=["fork"])
class SharedPagesFreedWithParent(OverModel):
    """Holders of a page are not counted when a request is released."""

    class Wrong(Model):
        def _give_pages_back(self, request: Request) -> None:
            for pool, table in zip(self.pools, request.tables, strict=True):
                pool.returned += [page.number for page in table]

    model_class = Wrong


@mutant("own: parent and child are one list", "PAGE-1", "PAGE-2", features=["fork"])
class ForkSharesTheTable(OverModel):
    """The child's block table is the parent's own object, so that both grow together."""

    class Wrong(Model):
        def _fork(self, parent: Request, child: int) -> None:
            super()._fork(parent, child)
            self.requests[child].tables = parent.tables

    model_class = Wrong


@mutant("own: under lockstep only the writer copies", "PAGE-2", "GROW-1", "PAGE-3", "REF-2",
        features=["fork"], layouts=LOCKSTEP)  # fmt: skip
class LockstepCopiesOnWriterOnly(OverModel):
    """A shared super-block is copied where a token is written, not on every rank."""

    class Wrong(Model):
        writer = 0

        def _append(self, request: Request, token: Identity, owner: int) -> None:
            self.writer = owner
            super()._append(request, token, owner)

        def _make_room(self, request: Request, rank: int, place: int) -> None:
            if place == len(request.tables[rank]) or rank == self.writer:
                super()._make_room(request, rank, place)

    model_class = Wrong


@mutant("own: pages to copy into are not counted", "REF-2", features=["fork"])
class CopiesNotCounted(OverModel):
    """A batch is accepted for the fresh pages it needs; for its copies there may be none left."""

    class Wrong(Model):
        def refusal(self, event: Event) -> Reason | None:
            tables = [table for request in self.requests.values() for table in request.tables]
            holders = {page: page.holders for table in tables for page in table}
            if isinstance(event, Decode):
                for page in holders:
                    page.holders = 1
            reason = super().refusal(event)
            for page, count in holders.items():
                page.holders = count
            return reason

    model_class = Wrong


@mutant("own: the last holder copies too", "GROW-1", "PAGE-3", features=["fork"])
class LastHolderCopiesToo(OverModel):
    """A page that was ever shared is copied, though nobody else holds it any more."""

    class Wrong(Model):
        ever: frozenset[Page] = frozenset()

        def _fork(self, parent: Request, child: int) -> None:
            super()._fork(parent, child)
            self.ever = self.ever.union(*parent.tables)

        def _make_room(self, request: Request, rank: int, place: int) -> None:
            pool, table = self.pools[rank], request.tables[rank]
            last = place < len(table) and table[place]
            if last and last in self.ever and last.holders == 1 and pool.free:
                table[place] = pool.take()
                pool.give_back(last)
            super()._make_room(request, rank, place)

    model_class = Wrong


# Preemption


@mutant("own: the step index goes on after a resume", "OWN-3", "LEN-1", features=["preempt"],
        layouts=["pr9757", "pr13180"])  # fmt: skip
class ResumeKeepsTheStep(OverModel):
    """A resumed request takes turns where it stopped, not from its new prompt's end."""

    class Wrong(Model):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            self.resumed: list[tuple[Request, int]] = []

        def _resume(self, request: Request) -> None:
            self.resumed.append((request, request.steps))
            super()._resume(request)

        def owners(self, request: Request, query_len: int) -> list[int]:
            before = max((steps for it, steps in self.resumed if it is request), default=0)
            request.prompt_len -= before
            owners = super().owners(request, query_len)
            request.prompt_len += before
            return owners

    model_class = Wrong


@mutant("own: a resume shifts the admissions after it", "LEN-1", features=["preempt"],
        layouts=["balanced"])  # fmt: skip
class ResumeTakesANumber(OverModel):
    """Under `rotated` a resumed request counts as one more admission."""

    class Wrong(Model):
        def _resume(self, request: Request) -> None:
            self.admissions += 1
            super()._resume(request)

    model_class = Wrong


@mutant("own: preempted requests keep their pages", "PAGE-3", features=["preempt"])
class PreemptLeaks(OverModel):
    """A preempted request's pages never go back."""

    class Wrong(Model):
        def _preempt(self, request: Request) -> None:
            request.tables = [[] for _ in self.pools]
            super()._preempt(request)

    model_class = Wrong


# What slots hold


@mutant("TensorRT-LLM, era of #13180", "OWN-1", layouts=["pr13180", "pr17866", "balanced"])
class PadStrippedOnLastRank(Stored):
    """Padding of the last block is cut off rank C-1, wherever that block is: real tokens go."""

    class Wrong(Model):
        def _place_prompt(self, request: Request) -> None:
            super()._place_prompt(request)
            t, c = self.layout.tokens_per_block, self.layout.cp_size
            blocks = ceil_div(request.prompt_len, t)
            rank = (c - 1 + request.shift) % c
            last = request.ranks[rank]
            if blocks % c:  # rank C-1 does not have the last block
                kept = max(0, len(last) - (blocks * t - request.prompt_len))
                request.ranks[rank] = Positions(decoded=last[:kept])

    model_class = Wrong


@mutant("TensorRT-LLM #13180", "OWN-1", layouts=["pr13180", "pr17866", "balanced"])
class TransferSplitDiffers(Stored):
    """Lengths come from a round-robin split, contents from a contiguous one."""

    def prompt_positions(self, request: Request) -> Sequence[int]:
        """Dealt as neighbours."""
        layout = self.model.layout
        contiguous = Layout(
            "contiguous", "step", "lazy", "rank_zero", layout.cp_size, layout.tokens_per_block
        )
        hands = deal_prompt(contiguous, request.prompt_len, request.shift)
        return hands[self.cp_rank][: len(request.ranks[self.cp_rank])]


@mutant("own: a prefix cache that knows requests by id", "OWN-1")
class ReusedIdKeepsOldRows(Stored):
    """An id that is admitted again is given the prompt KV that it had before."""

    def started(self) -> None:
        """Nobody was admitted."""
        self.first: dict[int, int] = {}

    def _write_prompt(self, id: int, request: Request) -> None:
        event = self.first.setdefault(id, request.tokens[0][0])
        tokens = request.tokens
        request.tokens = Tokens(0, 0, decoded=[(event, place) for _, place in tokens])
        super()._write_prompt(id, request)
        request.tokens = tokens


@mutant("SGLang #38645", "OWN-1", "PAGE-4", features=["preempt"])
class SavedByGlobalPosition(Stored):
    """What a preemption saves of a rank's buffer is looked up by global positions afterwards."""

    def started(self) -> None:
        """Nothing is saved."""
        self.saved: dict[int, list[Row | None]] = {}

    def apply(self, event: Event) -> Outcome:
        """Save the rows of a request that is preempted."""
        if isinstance(event, Preempt) and self.model.refusal(event) is None:
            held = range(len(self.model.requests[event.id].ranks[self.cp_rank]))
            slots = [self.model.slot(event.id, self.cp_rank, index) for index in held]
            self.saved[event.id] = [self.slots.get(slot) for slot in slots]
        return super().apply(event)

    def _write_prompt(self, id: int, request: Request) -> None:
        super()._write_prompt(id, request)
        saved = self.saved.pop(id, [])
        for index, position in enumerate(request.ranks[self.cp_rank] if saved else ()):
            row = saved[position] if position < len(saved) else None
            self._write(self.model.slot(id, self.cp_rank, index), row)


@mutant("ROCm ATOM #2008", "OWN-1", "PAGE-2", "PAGE-4", features=["padding"])
class DummiesWriteSlotZero(Stored):
    """Rows of padding carry slot 0, which a request may own."""

    def _write_step(self, event: int, outcome: Outcome) -> None:
        super()._write_step(event, outcome)
        if self.pad:
            self._write(0, Row(Token(event, 0, 0), 0))

    def apply(self, event: Event) -> Outcome:
        """Remember whether the step is padded."""
        self.pad = event.pad if isinstance(event, Decode) else 0
        return super().apply(event)


@mutant("SGLang 0.5.23, latents without a rotated part", "PAGE-4", "OWN-1")
class LatentAloneOnEveryRank(Stored):
    """Of latents that nothing rotates every rank writes every token, in its own next slot."""

    def _write_step(self, event: int, outcome: Outcome) -> None:
        super()._write_step(event, outcome)
        shape, t = self.config.model, self.model.layout.tokens_per_block
        if shape.latent is None or shape.rope_dim:
            return
        tokens = [
            (step.id, step.first + place)
            for step in self.model.last_steps
            for place in range(len(step.owners))
        ]
        assert outcome.visible is not None
        columns = zip(tokens, outcome.active, outcome.visible, strict=True)
        for place, ((id, position), active, held) in enumerate(columns):
            if not active and held // t < len(self.model.requests[id].tables[self.cp_rank]):
                row = Row(Token(event, place, position), position)
                self._write(self.model.slot(id, self.cp_rank, held), row)


@mutant("tpu-inference #3344", "PAGE-1", "REF-2", layouts=LOCKSTEP)
class PagesOfOneShard(OverModel):
    """Block tables are made for pages of one rank's tokens, not for those of all ranks."""

    class Wrong(Model):
        def pages_of(self, ranks: Sequence[Sequence[int]]) -> list[int]:
            pages = ceil_div(sum(map(len, ranks)), self.layout.tokens_per_block)
            return [pages] * len(ranks)

    model_class = Wrong
