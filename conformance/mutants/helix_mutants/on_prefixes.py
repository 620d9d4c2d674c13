"""Mutants that find wrong prefixes in their cache (SPEC.md, section 5.8)."""

from __future__ import annotations

from typing import ClassVar

import msgspec

from helix_mutants.parts import mutant
from helix_reference.engine import ReferenceEngine
from helix_reference.prefix import NOTHING, Hit, hit_of
from helix_spec.engine import Outcome
from helix_spec.events import Event


class OverHits(ReferenceEngine):
    """The reference, which takes and reports what a mutant says."""

    profiles: ClassVar = frozenset(
        {"placement", "lengths", "pages", "prefix", "speculative", "fork", "preempt"}
    )
    right: Hit = NOTHING
    """What may be found by the present event."""

    def told(self, hit: int) -> int:
        """Return what is reported in place of this hit."""
        return hit

    def taken(self) -> int | None:
        """Return what is taken; None for what is right."""
        return None

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        reason = self.model.refusal(event)
        self.right = NOTHING if reason else hit_of(self.model, event)
        self.model.follow(event, reason, None if reason else self.taken())
        outcome = self.model.outcome(self.cp_rank, reason)
        told = None if outcome.hit is None else self.told(outcome.hit)
        return msgspec.structs.replace(outcome, hit=told)


@mutant(
    "Dynamo #12765, SGLang #35298: who looks up hashes T tokens, who keeps them T*C",
    "HIT-5", features=("prefix",),
)  # fmt: skip
class HashesOtherBlocks(OverHits):
    """Nothing is ever found."""

    def taken(self) -> int | None:
        """Nothing."""
        return 0


@mutant("ATOM #1994: hits counted in one block size, and skipped in another", "HIT-2",
        features=("prefix",))  # fmt: skip
class SkipsInOtherBlocks(OverHits):
    """The hit that is reported lacks a page of one rank."""

    def told(self, hit: int) -> int:
        """A page less."""
        return max(0, hit - self.model.layout.tokens_per_block)


@mutant("own: the whole prompt is found, and nothing is left to compute", "HIT-1",
        features=("prefix",))  # fmt: skip
class FindsTheLastToken(OverHits):
    """The last block counts as found."""

    def told(self, hit: int) -> int:
        """A block more, where all that may be found is."""
        return hit + self.right.unit if hit + self.right.unit > self.right.limit else hit


@mutant("own: each rank looks into its own index", "HIT-3", features=("prefix",))
class RanksLookAlone(OverHits):
    """Rank 1 has lost its index."""

    def told(self, hit: int) -> int:
        """Nothing on rank 1."""
        return 0 if self.cp_rank == 1 else hit


@mutant("own: an index that is not told when pages are given to others", "HIT-4",
        features=("prefix",))  # fmt: skip
class FindsPagesGivenAway(OverHits):
    """Pages that hold other tokens by now are found."""

    def taken(self) -> int | None:
        """All that was ever there."""
        return self.right.ever


@mutant("own: the salt is no part of the hash", "HIT-6", features=("prefix",))
class ForgetsSalts(OverHits):
    """What another salt's request holds is found."""

    def told(self, hit: int) -> int:
        """As if there were none."""
        return max(hit, self.right.unsalted)


@mutant("own: decoded tokens are found, though the ranks took them in another turn", "SHARE-1",
        features=("prefix",))  # fmt: skip
class FindsWhatWasDealtOtherwise(OverHits):
    """A block is found that no prompt's deal has filled."""

    def told(self, hit: int) -> int:
        """A block more, where the event allows one."""
        return hit + self.right.unit if hit + self.right.unit <= self.right.limit else hit
