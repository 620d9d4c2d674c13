"""Engines that play the transformer block of `gpu_testing.block` in worker processes."""

from __future__ import annotations

from gpu_testing.block import Experts, Setting
from helix_conformance.engines.gpu import GpuEngine
from helix_spec.engine import Outcome, RankView


class Attention(GpuEngine):
    """Any event is the whole decode of a layer's attention; its output is the layer's."""

    def start(self, config, profiles):
        """Every rank makes the same weights and hidden states."""
        self.config = config
        return Outcome()

    def apply(self, event):
        """Projections, Helix attention and the sum over ranks, step by step."""
        return Outcome(output=self._played().double().numpy())

    def observe(self, ids=None):
        """Nothing is kept."""
        return RankView({}, {})

    def _played(self):
        return Setting(self.config).played()


class FeedForward(Attention):
    """Any event is the FFN on two groups of experts over the same ranks."""

    def _played(self):
        return Experts(self.config.model.dtype).on_this_rank(self.config, ep=2)
