"""Mutants that escaped once: histories and sizes that random traces did not reach.

Each was written to slip through a run of the suite as it was, and did, or nearly; `ESCAPES.md`
says what holds it now.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec
import numpy as np
import torch
from torch import Tensor

from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.rope import rope_table
from helix_gpu.bookkeeping.dealing import first_turn
from helix_gpu.bookkeeping.ledger import Admission, Ledger, Rewind, Step
from helix_gpu.bookkeeping.rank_book import RankBook, RankStep
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.bookkeeping.sharing import SharedPrefix
from helix_gpu.cache import HelixCache
from helix_mutants.on_cache import attending
from helix_mutants.on_corners import corner
from helix_mutants.parts import POSITION_RULE, OverCache, OverLedger, mutant, rebound
from helix_spec.engine import Outcome
from helix_spec.events import Decode, Event, Merge, Reason, Skip

# Histories


def _shallow(prefix: SharedPrefix | None) -> SharedPrefix | None:
    if prefix is None:
        return None
    prefix.holders -= 1
    return prefix if prefix.holders else prefix.below  # which is not told


@corner("own: a reference is dropped one level deep", "REF-2", features=["fork"])
class ForkOfAForkLeaks(OverLedger):
    """The last to leave what a fork of a fork shares does not leave what the first fork shares."""

    class Wrong(Ledger):
        _vacate = rebound(Ledger._vacate, release_prefix=_shallow)

    ledger_class = Wrong


@corner("own: a resumption that must wait shifts the next admission", "LEN-1",
        features=["preempt"], layouts=["balanced"])  # fmt: skip
class RefusedResumptionTakesANumber(OverLedger):
    """Under `rotated` a resumption that finds no room moves the next start on."""

    class Wrong(Ledger):
        def plan_resume(self, id: int) -> Admission:
            try:
                return super().plan_resume(id)
            except Refused as refused:
                self.admitted += refused.reason == Reason.OUT_OF_PAGES
                raise

    ledger_class = Wrong


@corner("own: a list applied as far as it is right", "REF-2", features=["overlap"])
class SampledAsFarAsItGoes(OverLedger):
    """A list of sampled requests counts those before the one for which it is refused."""

    class Wrong(Ledger):
        def sampled(self, ids: Sequence[int]) -> None:
            try:
                super().sampled(ids)
            except Refused as refused:
                if refused.reason == Reason.NOTHING_OPEN:
                    for row in self.rows(ids):
                        if not self._rows["outstanding"][row]:
                            break
                        self._rows["outstanding"][row] -= 1
                raise

    ledger_class = Wrong


@corner("own: the end of a turn taken for the middle of it", "OWN-3", features=["speculative"])
class RewindToTheEdgeOfATurn(OverLedger):
    """A rewind to where a turn ends leaves it with its owner; steps of one token show it."""

    class Wrong(Ledger):
        def plan_accept(self, id: int, kept: int) -> Rewind:
            plan = super().plan_accept(id, kept)
            if plan.left < self._chunk or plan.total == self._rows["total"][plan.row]:
                return plan
            before = (plan.owner - 1) % self.layout.cp_size
            return plan._replace(owner=before, left=0)

    ledger_class = Wrong


# Sizes and counts


@corner("own: the first of a list is checked for all", "REF-2", features=["speculative"])
class OneQueryLenChecked(OverLedger):
    """Of a batch's query lengths the first must be positive; requests of others are left out."""

    def apply(self, event: Event) -> Outcome:
        """Decode those with a positive length."""
        if not isinstance(event, Decode | Skip) or len(event.ids) != len(event.query_lens):
            return super().apply(event)
        pairs = [(i, n) for i, n in zip(event.ids, event.query_lens, strict=True) if n > 0]
        if not pairs or event.query_lens[0] < 1 or len(pairs) == len(event.ids):
            return super().apply(event)
        before = {id: self.book.local_len(id) for id in self.book.live(event.ids)}
        ids, lens = ([pair[part] for pair in pairs] for part in (0, 1))
        outcome = super().apply(msgspec.structs.replace(event, ids=ids, query_lens=lens))
        if outcome.reason is not None or isinstance(event, Skip):
            return outcome
        past_len = [before.get(id, 0) for id in event.ids]
        return msgspec.structs.replace(outcome, past_len=past_len)


@corner("own: rows lost when a table grows", "LEN-1", "PAGE-1", "PAGE-2")
class SixtyFifthRequest(OverLedger):
    """When the ledger grows beyond 64 rows the last of them is a copy of the one before."""

    class Wrong(Ledger):
        def _grow(self) -> None:
            super()._grow()
            if len(self._rows) > 64:
                self._rows[63] = self._rows[62]

    ledger_class = Wrong


@corner("own: what is not supported is taken for nothing to do", "REF-2")
class MergesSilently(OverLedger):
    """An engine without the profile merge accepts one."""

    def apply(self, event: Event) -> Outcome:
        """Do nothing, and say that it was done."""
        return Outcome() if isinstance(event, Merge) else super().apply(event)


# Positions beyond 2^24, of which a float32 holds the even ones


@mutant("own: positions in a tensor of floats", "POS-1", far=True)
class PositionsInFloat32(OverLedger):
    """Position ids are made in float32, as the angles that they are for."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right = super().advance(step)
            rounded = right.position_ids.astype(np.float32).astype(np.int64)
            return right._replace(position_ids=rounded)

    book_class = Book


@mutant("own: a length that grows by floats", "POS-1", far=True)
class LengthInFloat32(OverLedger):
    """A request's total is a float32: from 2^24 on, one more token changes nothing."""

    class Wrong(Ledger):
        def advance(self, step: Step) -> None:
            before = self._rows["total"][step.rows].astype(np.float32)
            super().advance(step)
            self._rows["total"][step.rows] = before + step.query_lens.astype(np.float32)

    ledger_class = Wrong


@mutant("own: a quotient of floats, rounded down", "OWN-3", far=True, layouts=POSITION_RULE)
class TurnInFloat32(OverLedger):
    """Whose turn it is after a prompt is worked out from its length as a float32."""

    class Wrong(Ledger):
        admit = rebound(
            Ledger.admit,
            first_turn=lambda layout, prompt_len, shift: first_turn(
                layout, int(np.float32(prompt_len)), shift
            ),
        )

    ledger_class = Wrong


# Shapes and settings of models


def _base_10000(positions: Tensor, dim: int, base: float, **out: Any) -> tuple[Tensor, Tensor]:
    return rope_table(positions, dim, 10_000.0, **out)


@corner("own: a constant of the first model served", "POS-2")
class RopeBaseIgnored(OverCache):
    """The base of RoPE is 10,000, whatever the model says."""

    class Cache(HelixCache):
        _begun = rebound(HelixCache._begun, rope_table=_base_10000)
        _prompt = rebound(HelixCache._prompt, rope_table=_base_10000)

    cache_class = Cache


@corner("own: a copy that hangs on a debugging switch", "OWN-1", "ATT-1", features=["fork"])
class CopiesWherePoisoned(OverCache):
    """Copy on write copies where fresh pages are poisoned, and there alone."""

    class Cache(HelixCache):
        def _copy(self, copies: list[Any]) -> None:
            if self.config.poison:
                super()._copy(copies)

    cache_class = Cache


def _groups_of_8(*args: Any, **more: Any) -> tuple[Tensor, Tensor]:
    output, lse = attend_pages(*args, **more)
    q, pages = args[:2]
    heads = torch.arange(q.shape[1])
    group = q.shape[1] // pages.shape[3]
    beyond = heads % group >= 8
    output[:, beyond] = output[:, heads[beyond] // group * group]
    return output, lse


@corner("own: a tile of eight query heads", "ATT-1")
class NinthHeadOfAGroup(OverCache):
    """Query heads past the eighth of a KV head have the output of the first."""

    cache_class = attending(_groups_of_8)


def _two_thirds(*args: Any, value_dim: int, **more: Any) -> tuple[Tensor, Tensor]:
    key_dim = args[0].shape[-1]
    width = value_dim if value_dim == key_dim else key_dim * 2 // 3
    output, lse = attend_pages(*args, value_dim=min(width, value_dim), **more)
    return torch.nn.functional.pad(output, (0, value_dim - output.shape[-1])), lse


@corner("own: a latent taken to be two thirds of its row", "ATT-1")
class LatentOfTwoThirds(OverCache):
    """The width of values is worked out from that of keys, as one model has them."""

    cache_class = attending(_two_thirds)
