"""`_SDPAMerger` of torch's context parallel, which merges block by block, as a ring brings them."""

from __future__ import annotations

from typing import ClassVar

import torch
import torch.distributed as dist
from torch.distributed.tensor.experimental._context_parallel import _attention

from helix_ring.merging import MergeEngine


class TorchMerger(MergeEngine):
    """Every rank begins with its own partial and takes the others in the order of the ring.

    As in torch's ring, a block of which a query sees nothing is no step.
    """

    settings: ClassVar[dict[str, str]] = {"torch": torch.__version__}

    def merged(self, outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
        """See `MergeEngine.merged`."""
        blocks = [torch.cat([outputs, lses], dim=-1) for _ in range(self.cp_size)]
        dist.all_gather(blocks, blocks[0].clone(), group=self.group)
        in_order = [blocks[(self.rank - step) % self.cp_size] for step in range(self.cp_size)]
        tokens = zip(*(block.unbind() for block in in_order), strict=True)
        return torch.stack([self.token(list(token)) for token in tokens])

    def token(self, blocks: list[torch.Tensor]) -> torch.Tensor:
        """One token's blocks, each an output and a log-sum-exp, in their order."""
        if self.cleans:
            blocks = [b for b in blocks if not torch.isinf(b[..., -1]).all()] or blocks
        merger = _attention._SDPAMerger(convert_to_f32=True, seq_dim=1)
        for block in blocks:
            merger.step(block[..., :-1], block[..., -1], partial=False)
        return merger.results()[0]


class TorchMergerAnything(TorchMerger):
    """Every block is a step, whatever memory holds where a rank has no keys."""

    cleans: ClassVar[bool] = False


class TorchMergerZeros(TorchMergerAnything):
    """Every block is a step, of output 0 where a rank has no keys."""

    def merged(self, outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
        """See `MergeEngine.merged`."""
        return super().merged(outputs.where(~torch.isinf(lses), torch.zeros(())), lses)
