"""The merges of cascades, `merge_state` and `merge_states`, as engines of the suite.

Every rank is given the partials of all ranks for its own slice of the heads: how they travel is no
affair of FlashInfer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import flashinfer
import torch

from helix_conformance.expect.arrays import partial_of
from helix_flashinfer import DEVICE, EMPTY, LOG_2_E
from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Event, Merge, Reason


def _boxes(heads: dict[int, int] | None) -> list[dict[str, Any]]:
    """What the kernels take: two types, and of each head dim so many heads (FINDINGS.md, 24)."""
    shapes: list[dict[str, Any]] = [
        {"attention": ["gqa"], "head_dim": [64]},
        {"attention": ["gqa"], "head_dim": [128]},
        {"attention": ["gqa"], "head_dim": [256]},
        {"attention": ["latent"], "latent": [[64, 16], [64, 0]]},
        {"attention": ["latent"], "latent": [[512, 64], [512, 0]]},
    ]
    boxes = []
    for shape in shapes:
        dim = shape["latent"][0][0] if "latent" in shape else shape["head_dim"][0]
        most = {} if heads is None else {"q_heads": {"min": 1, "max": heads[dim]}}
        for dtype in ("float16", "bfloat16"):
            types = {"dtype": [dtype], "partial_dtype": [dtype]}
            boxes.append({**shape, **most, **types})
    return boxes


class MergeStates:
    """All partials in one call.

    Used as FlashInfer's own kernels use it: a partial without keys is 0, of log-sum-exp -5e4. A row
    all of whose log-sum-exps lie below that is lifted first (FINDINGS.md, 21).
    """

    profiles: ClassVar[frozenset[str]] = frozenset({"merge"})
    needs_processes: ClassVar[bool] = False
    capabilities: ClassVar[Any] = _boxes({64: 128, 128: 64, 256: 32, 512: 32})
    settings: ClassVar[dict[str, str]] = {
        "flashinfer": flashinfer.__version__,
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if DEVICE == "cuda" else "cpu",
    }
    cleans: ClassVar[bool] = True
    """Whether the output of a partial without keys is 0, or what memory holds."""
    lifts: ClassVar[bool] = True
    """Whether rows below its floor are lifted."""
    empty: ClassVar[float] = EMPTY
    """The log-sum-exp of a partial without keys."""

    def __init__(self, rank: int) -> None:
        self.rank = rank

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        if config_problem(config) is not None:
            return Outcome(Reason.BAD_CONFIG)
        self.config, self.cp_size = config, config.layout.cp_size
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Merge the partials of the ranks."""
        if not isinstance(event, Merge):
            return Outcome(Reason.UNSUPPORTED)
        tp_rank, cp_rank = divmod(self.rank, self.cp_size)
        ranks = range(tp_rank * self.cp_size, (tp_rank + 1) * self.cp_size)
        pairs = [partial_of(self.config, event, rank) for rank in ranks]
        outputs, lses = (
            torch.stack([torch.from_numpy(x) for x in xs]) for xs in zip(*pairs, strict=True)
        )
        heads = outputs.shape[2] // self.cp_size
        mine = slice(cp_rank * heads, (cp_rank + 1) * heads)
        outputs, lses = outputs[:, :, mine], lses[:, :, mine].double() * LOG_2_E
        if self.cleans:
            outputs[torch.isinf(lses)] = 0
        if self.lifts:
            top = lses.amax(0)
            low = (top < EMPTY / 2) & ~torch.isinf(top)
            lses = lses - top.where(low, torch.zeros(()).double())
        lses[torch.isinf(lses)] = self.empty
        dtype = getattr(torch, self.config.model.partial_dtype)
        merged = self.merged(outputs.to(DEVICE, dtype), lses.to(DEVICE, torch.float32))
        return Outcome(output=merged.float().cpu().numpy())

    def merged(self, outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
        """The output of partials (ranks, tokens, heads, elements) and (ranks, tokens, heads)."""
        v, s = outputs.transpose(0, 1).contiguous(), lses.transpose(0, 1).contiguous()
        merged: torch.Tensor = flashinfer.merge_states(v, s)[0]
        return merged

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """A merge leaves nothing behind."""
        return RankView({})


class MergeState(MergeStates):
    """One partial after another, the first of them with the second."""

    def merged(self, outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
        """See `MergeStates.merged`."""
        output, lse = outputs[0].contiguous(), lses[0].contiguous()
        for other, its_lse in zip(outputs[1:], lses[1:], strict=True):
            output, lse = flashinfer.merge_state(
                output, lse, other.contiguous(), its_lse.contiguous()
            )
        return output


class MergeStatesInfinite(MergeStates):
    """A partial without keys has a log-sum-exp of -inf, as `BatchMLAPagedAttentionWrapper` says."""

    empty: ClassVar[float] = -torch.inf


class MergeStateInfinite(MergeState):
    """A partial without keys has a log-sum-exp of -inf, as `BatchMLAPagedAttentionWrapper` says."""

    empty: ClassVar[float] = -torch.inf


class MergeStatesLow(MergeStatesInfinite):
    """Without a word of its floor."""

    lifts: ClassVar[bool] = False


class MergeStateLow(MergeState):
    """Without a word of its floor; a partial without keys has -5e4, as its decode says."""

    lifts: ClassVar[bool] = False


class MergeStatesAnything(MergeStates):
    """Whatever memory holds where a partial has no keys."""

    cleans: ClassVar[bool] = False


class MergeStateManyHeads(MergeState):
    """Without a word of how many heads it takes."""

    capabilities: ClassVar[Any] = _boxes(None)


class MergeStatesManyHeads(MergeStates):
    """Without a word of how many heads it takes."""

    capabilities: ClassVar[Any] = _boxes(None)
