"""Mutants after public bugs of 2026, which engines had in their own words for the same rules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import msgspec
import numpy as np
import torch
from torch import Tensor

from helix_gpu.bookkeeping.ledger import Admission, Ints, Ledger, Step
from helix_gpu.bookkeeping.rank_book import RankBook, RankStep
from helix_gpu.bookkeeping.refusals import Refused
from helix_mutants.on_cache import attending, merging, told
from helix_mutants.parts import NAMED_LAZY, OverCache, OverLedger, mutant
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import Reason
from helix_spec.layouts import Layout

# Whose turn it is, and what fits


@mutant("SGLang 0.5.23, vLLM 0.33.0: kernels that take a power of two", "OWN-3", "LEN-1",
        layouts=("pr9757", "pr13180", "balanced"))  # fmt: skip
class RanksTakenForAPowerOfTwo(OverLedger):
    """With 3, 5, 6 or 7 ranks the owner is masked by one less, where it should be divided."""

    class Wrong(Ledger):
        def _turn(self, owner: Ints, left: Ints, tokens: Ints) -> tuple[Ints, Ints]:
            owners, rest = super()._turn(owner, left, tokens)
            return owners & (self.layout.cp_size - 1), rest

    ledger_class = Wrong


@mutant("SGLang #33448", "REF-2", layouts=NAMED_LAZY)
class LongestRequestOfOnePool(OverLedger):
    """No prompt is admitted that is longer than the pool of a single rank."""

    class Wrong(Ledger):
        def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
            super().__init__(layout, pages, max_len)
            self.longest = min(pages) * layout.tokens_per_block

        def plan_admit(self, id: int, prompt_len: int) -> Admission:
            plan = super().plan_admit(id, prompt_len)
            if prompt_len > self.longest:
                raise Refused(Reason.TOO_LONG, f"{prompt_len} tokens do not fit one pool")
            return plan

    ledger_class = Wrong


@mutant("vLLM #45425", "LEN-3", "ATT-1", features=["speculative"])
class GroupByOneTokensBounds(OverCache):
    """A captured graph replays the bounds of one token for a group: all see what the first sees."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right = super().advance(step)
            firsts = np.repeat(np.cumsum(step.query_lens) - step.query_lens, step.query_lens)
            return right._replace(visible=right.visible[firsts])

    book_class = Book


# What the ranks tell each other


def _first_alone(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return outputs[0].float(), lses[0]


@mutant("vLLM #50095", "ATT-1")
class PartialsNeverMerged(OverCache):
    """Every rank goes on with one rank's partial, as if the cache were not sharded."""

    cache_class = merging(_first_alone)


def _first_heads(output: Tensor, lse: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    lse[:, 16:] = 0
    return output, lse


@mutant("ROCm aiter #3267", "ATT-1")
class LseOfTheFirstHeads(OverCache):
    """The log-sum-exp is written for the first 16 heads."""

    cache_class = attending(told(_first_heads))


def _never_written(output: Tensor, lse: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return output, torch.zeros_like(lse)


@mutant("SGLang #34355", "ATT-1", "ATT-3")
class LseNeverWritten(OverCache):
    """With several splits nobody writes the log-sum-exp: it is 0 for every row."""

    cache_class = attending(told(_never_written))


def _rows_with_keys(output: Tensor, lse: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    held = lengths > 0
    count = int(held.sum())
    packed, packed_lse = output.clone(), lse.clone()
    packed[:count], packed_lse[:count] = output[held], lse[held]
    return packed, packed_lse


@mutant("vllm-ascend #11807", "ATT-1", "ATT-3")
class RowsWithoutKeysDropped(OverCache):
    """Rows of requests without keys on a rank are left out of an index that counts all of them."""

    cache_class = attending(told(_rows_with_keys))


class _AnotherModel(OverCache):
    """Starts with a model of other fields than it is told."""

    fields: ClassVar[dict[str, Any]]

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin with what it takes the model for."""
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            model = msgspec.structs.replace(config.model, **self.fields)
            self.cache.config = msgspec.structs.replace(config, model=model)
            self.cache._rope_dim = model.rope_dim
        return outcome


@mutant("own: a scale that is always that of the head", "ATT-1")
class ScaleIgnored(_AnotherModel):
    """Scores are divided by the root of head_dim, whatever scale the model has."""

    fields: ClassVar[dict[str, Any]] = {"scale": None}


@mutant("own: keys that are rotated already, and again", "POS-2", "OWN-1")
class RotatedAgain(_AnotherModel):
    """Q and K are rotated by their positions, also where they are supplied as they are cached."""

    fields: ClassVar[dict[str, Any]] = {"rope": "half"}
