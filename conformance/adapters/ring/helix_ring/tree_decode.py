"""`tree_attn_decode` of ring-attention-pytorch: a decode step's merge by three all-reduces."""

from __future__ import annotations

from functools import partial
from importlib.metadata import version
from types import SimpleNamespace
from typing import ClassVar

import torch
import torch.distributed as dist
from ring_attention_pytorch import tree_attn_decoding

from helix_ring.merging import MergeEngine

QUERY_DIM = 16
"""Its scale, 1/4, is exact; so is then every log-sum-exp that one key makes."""


class TreeDecode(MergeEngine):
    """It merges what it attends over itself, so a partial is made of one key.

    The query is the first unit vector, the key four times the log-sum-exp along it, and the value
    the partial's output. A rank without keys is handed none.
    """

    settings: ClassVar[dict[str, str]] = {
        "ring-attention-pytorch": version("ring-attention-pytorch")
    }

    def merged(self, outputs: torch.Tensor, lses: torch.Tensor) -> torch.Tensor:
        """See `MergeEngine.merged`."""
        # It reduces over all processes; here over those of this rank's group.
        tree_attn_decoding.dist = SimpleNamespace(
            all_reduce=partial(dist.all_reduce, group=self.group), ReduceOp=dist.ReduceOp
        )
        rows = [self.attended(o[None], lse[None]) for o, lse in zip(outputs, lses, strict=True)]
        return torch.cat(rows)

    def attended(self, output: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """One token, whose heads have keys together or none of them."""
        unit = torch.zeros(*lse.shape[:-1], QUERY_DIM)
        unit[..., 0] = 1
        keys = slice(0, 0) if torch.isinf(lse).all() else slice(None)
        k, v = (4 * lse * unit)[:, :, keys], output[:, :, keys]
        merged: torch.Tensor = tree_attn_decoding.tree_attn_decode(unit, k, v, shard_kv_seq=False)
        return merged


class TreeDecodeAnything(TreeDecode):
    """Rows in which no rank has keys, too."""

    cleans: ClassVar[bool] = False


class TreeDecodeNone(TreeDecode):
    """A rank without keys hands over None, which the function's signature names."""

    def attended(self, output: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
        """See `TreeDecode.attended`."""
        if not torch.isinf(lse).all():
            return super().attended(output, lse)
        unit = torch.zeros(*lse.shape[:-1], QUERY_DIM)
        merged: torch.Tensor = tree_attn_decoding.tree_attn_decode(unit, shard_kv_seq=False)
        return merged
