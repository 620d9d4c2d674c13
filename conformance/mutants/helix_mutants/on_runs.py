"""Mutants that are right when each trace is played on new objects, once, and looked at throughout.

And some that are wrong for one layer, one row of a batch, or right after a right was lost.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import msgspec
import torch
from torch import Tensor

from helix_conformance.engines.gpu import Identity
from helix_gpu.cache import DecodeStep, HelixCache
from helix_mutants.on_cache import attending, first_keys
from helix_mutants.parts import OverCache, OverLedger, mutant
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Accept, Decode, Event, Release, Skip


@mutant("own: what an earlier trace held is not given back", "PAGE-3")
class StartedAgainWithLess(OverLedger):
    """An object that is started again has a page less than its pool."""

    starts = 0

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin again, and lose a page."""
        self.starts += 1
        return super().start(config, profiles)

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """One page less from the second trace on."""
        view = super().observe(ids)
        lost = 1 if self.starts > 1 else 0
        return msgspec.structs.replace(view, free_pages=view.free_pages - lost)


@mutant("own: lengths that are brought up to date by whoever looks at them", "LEN-2")
class LookedIntoShape(OverLedger):
    """past_len is that of the last look: right where each event is followed by one."""

    def started(self, config: Config) -> None:
        """Nothing was looked at yet."""
        self.looked: dict[int, int] = {}

    def apply(self, event: Event) -> Outcome:
        """Report lengths as they were when somebody last looked."""
        outcome = super().apply(event)
        if outcome.reason is None and isinstance(event, Decode):
            told = [
                self.looked.get(id, now)
                for id, now in zip(event.ids, outcome.past_len, strict=True)
            ]
            return msgspec.structs.replace(outcome, past_len=told)
        return outcome

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """Bring the lengths up to date."""
        view = super().observe(ids)
        self.looked |= view.local_len
        return view


@mutant("own: a look that takes what it shows", "PAGE-3")
class SecondLookDiffers(OverLedger):
    """Two looks without an event between them: the second one shows a page too many."""

    looks = 0

    def apply(self, event: Event) -> Outcome:
        """Let one event happen."""
        self.looks = 0
        return super().apply(event)

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """Show one page more from the second look on."""
        view, self.looks = super().observe(ids), self.looks + 1
        return msgspec.structs.replace(view, free_pages=view.free_pages + (self.looks > 1))


@mutant("own: a merge whose order goes by arrival", "ATT-2")
class OtherBitsAgain(OverCache):
    """A trace that is played again differs in the last bits, and stays within the bound."""

    starts = 0

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin again, with other bits."""
        self.starts += 1
        return super().start(config, profiles)

    def _attend(self, step: DecodeStep, tokens: object) -> Tensor:
        merged: Tensor = super()._attend(step, tokens)  # type: ignore[arg-type]
        return merged if self.starts == 1 else torch.nextafter(merged, torch.zeros_like(merged))


@mutant(
    "SGLang 0.5.23: a rank without keys of a chunk leaves early", "OWN-1", "PAGE-4", "ATT-1",
)  # fmt: skip
class ChunkBelowTheRanks(OverCache):
    """A prompt in chunks of fewer tokens than there are ranks is computed up to its last chunk."""

    def _admit(self, id: int, prompt_len: int, chunk: int) -> None:
        self.short = chunk < self.config.layout.cp_size
        super()._admit(id, prompt_len, chunk)
        self.short = False

    def _compute(self, steps: Iterable[DecodeStep], identity: Callable[[int], Identity]) -> None:
        if not getattr(self, "short", False):
            super()._compute(steps, identity)
            return
        *chunks, lost = list(steps)
        super()._compute(chunks, identity)
        if lost.tokens is not None:
            for layer in range(self.config.model.layers):
                self.cache._written.give(lost.tokens, layer)


@mutant("own: a grid of 64 rows", "ATT-1")
class RowsBeyondTheGrid(OverCache):
    """Of a batch of more than 64 tokens the output of the last ones is that of the first."""

    class Wrong(HelixCache):
        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            merged: Tensor = super().attend(step, layer, *given, **how)
            merged[64:] = merged[: max(0, len(merged) - 64)][: len(merged[64:])]
            return merged

    cache_class = Wrong


@mutant("own: buffers for two layers", "ATT-1")
class ThirdLayer(OverCache):
    """The third layer attends with the scale of no model."""

    class Wrong(HelixCache):
        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            merged: Tensor = super().attend(step, layer, *given, **how)
            return merged * 1.01 if layer == 2 else merged

    cache_class = Wrong


@mutant("own: a kernel with room for 1,024 keys", "ATT-1", corner=True)
class KeysBeyondAThousand(OverCache):
    """Of more than 1,024 keys on a rank only the first ones are read."""

    cache_class = attending(first_keys(1024))


@mutant("own: a release that takes effect with the next step", "REF-1", "REF-2")
class ReleasedAStepLate(OverLedger):
    """A step that is prepared for a request right after its release is not refused."""

    released: int | None = None

    def apply(self, event: Event) -> Outcome:
        """Let one event happen; a released request may still be skipped."""
        late = isinstance(event, Skip) and event.ids == [self.released]
        outcome = Outcome() if late else super().apply(event)
        self.released = event.id if isinstance(event, Release) and not outcome.reason else None
        return outcome


@mutant("own: a group that stays open", "REF-1", "REF-2", features=["speculative"])
class AcceptedTwice(OverLedger):
    """The same acceptance right after itself is taken for a retry, and accepted."""

    last: Event | None = None

    def apply(self, event: Event) -> Outcome:
        """Let one event happen; an acceptance may come twice."""
        if isinstance(event, Accept) and event == self.last:
            self.last = None
            return Outcome()
        outcome = super().apply(event)
        self.last = event if not outcome.reason else None
        return outcome
