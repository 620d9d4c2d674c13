"""Engines that play the transformer block of `gpu_testing.block` in worker processes."""

from __future__ import annotations

from gpu_testing.block import Experts, Setting
from helix_conformance.engines.gpu import GpuEngine
from helix_spec.engine import Outcome, RankView


class Block(GpuEngine):
    """`Release(0)` is the whole decode of a layer's attention, `Release(1)` that of its FFN."""

    def start(self, config, profiles):
        """Every rank makes the same weights and hidden states."""
        self.config = config
        return Outcome()

    def apply(self, event):
        """Step by step; the output is the layer's."""
        output = self._feed_forward() if event.id else Setting(self.config).played()
        return Outcome(output=output.double().numpy())

    def observe(self, ids=None):
        """Nothing is kept."""
        return RankView({}, {})

    def _feed_forward(self):
        """Two groups of experts over the same ranks."""
        return Experts(self.config.model.dtype).on_this_rank(self.config, ep=2)
