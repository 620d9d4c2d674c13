"""Engines that support next to nothing, and say so; each with a defect at its only shape, too."""

from __future__ import annotations

from typing import Any, ClassVar

import msgspec

from helix_conformance.engines.gpu import GpuEngine, LedgerEngine
from helix_reference.engine import ReferenceEngine
from helix_spec.capabilities import Box, boxes_around, boxes_of
from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome
from helix_spec.events import Event, Reason
from helix_spec.layouts import named_layout


class Narrow:
    """Starts inside its capabilities alone."""

    capabilities: ClassVar[Any]

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Start, or refuse what is not declared."""
        if not boxes_around(boxes_of(self.capabilities), config):
            return Outcome(reason=Reason.BAD_CONFIG)
        outcome: Outcome = super().start(config, profiles)  # type: ignore[misc]
        return outcome


class OneGqa(Narrow, GpuEngine):
    """32 query heads over 8 KV heads of 128, pages of 64, interleave 1, two ranks, few rows."""

    capabilities: ClassVar[Any] = {
        "layouts": ["vllm_dcp"],
        "attention": ["gqa"],
        "cp_size": [2],
        "tp_size": [1],
        "tokens_per_block": [64],
        "interleave": [1],
        "q_heads": [32],
        "kv_heads": [8],
        "head_dim": [128],
        "dtype": ["bfloat16"],
        "cache_dtype": ["bfloat16"],
        "product_dtype": ["bfloat16"],
        "partial_dtype": ["float32"],
        "layers": [1],
        "overlap": [False],
        "admission": ["transfer"],
        "batch": {"max": 4},
        "query_len": {"max": 4},
    }


class OneLatent(Narrow, GpuEngine):
    """The latent of DeepSeek, 512 + 64, read by 16 heads; pages of 64; two or four ranks."""

    capabilities: ClassVar[Any] = {
        "layouts": ["vllm_dcp"],
        "attention": ["latent"],
        "cp_size": [2, 4],
        "tp_size": [1],
        "tokens_per_block": [64],
        "interleave": [1],
        "q_heads": [16],
        "head_dim": [192],
        "latent": [[512, 64]],
        "dtype": ["bfloat16"],
        "layers": [1],
        "live_requests": {"max": 16},
    }


class LastHeadLost(OneGqa):
    """Leaves the output of the last query head of a rank at zero."""

    def apply(self, event: Event) -> Outcome:
        """Answer, all but the last head."""
        outcome = super().apply(event)
        if outcome.output is None:
            return outcome
        output = outcome.output.copy()
        output[:, :, -1:] = 0
        return msgspec.structs.replace(outcome, output=output)


class WrongOffset(Narrow, LedgerEngine):
    """Bookkeeping for that latent, which counts the tokens of a page in a number that wraps."""

    capabilities: ClassVar[Any] = OneLatent.capabilities

    def apply(self, event: Event) -> Outcome:
        """Answer with slots whose offset in a page wraps."""
        outcome = super().apply(event)
        slots = [slot if slot < 0 else slot // 64 * 64 + slot % 64 % 48 for slot in outcome.slots]
        return msgspec.structs.replace(outcome, slots=slots)


class RefusesMore(Narrow, LedgerEngine):
    """Bookkeeping that refuses configurations inside its capabilities: those with small pools."""

    capabilities: ClassVar[Any] = OneGqa.capabilities

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Start with large pools alone."""
        if max(config.pages, default=0) < 10:
            return Outcome(reason=Reason.BAD_CONFIG)
        return super().start(config, profiles)


class Small(LedgerEngine):
    """Bookkeeping of two kinds: pages of three on two or four ranks, and pr* on four."""

    capabilities: ClassVar[Any] = (
        Box(cp_size=[2, 4], tokens_per_block=[3]),
        {"cp_size": [4], "layouts": ["pr*"]},
    )


class Rotated(LedgerEngine):
    """Bookkeeping of layouts that start at another rank for each request."""

    capabilities: ClassVar[Any] = {"layouts": ["balanced", "custom/*start=rotated*"]}


class OnlyRotated(LedgerEngine):
    """Bookkeeping that places tokens by `balanced`, whatever it is asked for, and does not say."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Start with another layout of the same sizes."""
        if config_problem(config) is not None:
            return super().start(config, profiles)
        c, t = config.layout.cp_size, config.layout.tokens_per_block
        layout = named_layout("balanced", cp_size=c, tokens_per_block=t)
        return super().start(msgspec.structs.replace(config, layout=layout), profiles)


class KeepsPages(ReferenceEngine):
    """The reference, which keeps the pages of rejected tokens."""

    profiles = ReferenceEngine.profiles - {"cache", "attention"}
    freedoms: ClassVar[Any] = {"rewind_pages": "kept"}
