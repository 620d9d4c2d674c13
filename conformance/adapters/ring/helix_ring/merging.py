"""What the two engines share: partials in, the heads of this rank's slice out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
import torch.distributed as dist

from helix_conformance.expect.arrays import partial_of
from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Event, Merge, Reason


class MergeEngine:
    """An engine whose merge alone can be reached; every rank of it computes all heads."""

    profiles: ClassVar[frozenset[str]] = frozenset({"merge"})
    needs_processes: ClassVar[bool] = True
    cleans: ClassVar[bool] = True
    """Whether it is used as its callers use it: an output of 0 where a rank has no keys, and a row
    without any keys is never asked for. The adapter then answers such a row by 0 itself."""
    groups: ClassVar[dict[int, Any]] = {}
    """By cp_size, this rank's group."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    @classmethod
    def join(cls, world_size: int) -> None:
        """Make a group of every cp_size; ranks that are left over have a smaller one."""
        for size in range(1, world_size + 1):
            for first in range(0, world_size, size):
                ranks = list(range(first, min(first + size, world_size)))
                group = dist.new_group(ranks)
                if dist.get_rank() in ranks:
                    cls.groups[size] = group

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        if config_problem(config) is not None:
            return Outcome(Reason.BAD_CONFIG)
        self.config, self.cp_size = config, config.layout.cp_size
        self.group = self.groups[self.cp_size]
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Merge the partials of the ranks."""
        if not isinstance(event, Merge):
            return Outcome(Reason.UNSUPPORTED)
        outputs, lses = (torch.from_numpy(x) for x in partial_of(self.config, event, self.rank))
        if self.cleans:
            outputs[torch.isinf(lses)] = 0
        # Axes as ring attention has them: tokens stand for batches of one query.
        merged = self.merged(outputs[:, :, None], lses[:, :, None, None])[:, :, 0]
        if self.cleans:
            merged[[set(levels) == {None} for levels in zip(*event.levels, strict=True)]] = 0
        cp_rank = self.rank % self.cp_size
        heads = merged.shape[1] // self.cp_size
        mine = merged[:, cp_rank * heads : (cp_rank + 1) * heads]
        return Outcome(output=mine.to(getattr(torch, self.config.model.dtype)).float().numpy())

    def merged(self, outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
        """All heads, merged, of partials (tokens, heads, 1, elements) and (tokens, heads, 1, 1)."""
        raise NotImplementedError

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """A merge leaves nothing behind."""
        return RankView({})
