"""Paged decode and MLA, each with log-sum-exps, over the pages of `helix_gpu`'s cache.

What is FlashInfer's is the attention of a rank over its pages. Placement, the cache, the exchange
and the merge are ours, so that with more than one rank log-sum-exps and rows without keys are
judged, too. Several ranks share one GPU: they exchange through the host.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final

import flashinfer
import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from helix_conformance.engines.gpu import GpuEngine
from helix_flashinfer import DEVICE
from helix_flashinfer.merging import MergeStates
from helix_gpu.cache import Backend
from helix_gpu.comm.exchange import Exchange, MakeExchange
from helix_spec.config import ModelShape
from helix_spec.engine import OF_GROUPS, Outcome
from helix_spec.events import MERGE, Event, Merge, Reason

WORKSPACE_BYTES: Final = 128 * 2**20
"""What FlashInfer's documentation recommends."""

SHORT: Final = {"max_len": {"max": 600}, "batch": {"max": 64}}
"""More takes the judge's arithmetic too long for a run of minutes, not FlashInfer."""


def _types(dtype: str) -> dict[str, list[str]]:
    names = ("dtype", "cache_dtype", "product_dtype", "partial_dtype")
    return {name: [dtype] for name in names}


class Decode(GpuEngine):
    """`BatchDecodeWithPagedKVCacheWrapper`, by `helix_gpu`'s own adapter.

    From four query heads for a KV head on its tensor-core kernels attend. It hands over no row
    without keys (FINDINGS.md says what they would be answered).
    """

    profiles: ClassVar[frozenset[str]] = GpuEngine.profiles - {*OF_GROUPS, MERGE}
    capabilities: ClassVar[Any] = [
        {
            "attention": ["gqa"],
            "head_dim": [64],
            "q_heads_per_kv_head": [1, 2, 3],
            **SHORT,
            **_types("float16"),
        },
        {
            "attention": ["gqa"],
            "head_dim": [128],
            "q_heads_per_kv_head": [1, 2, 4, 8, 16],
            **SHORT,
            **_types("bfloat16"),
        },
    ]
    settings: ClassVar[dict[str, str]] = MergeStates.settings
    backend: ClassVar[Backend | None] = "flashinfer"

    @staticmethod
    def device() -> str:
        """Return where the cache lives: all ranks on one GPU."""
        return DEVICE

    def apply(self, event: Event) -> Outcome:
        """See `GpuEngine.apply`; a merge alone would be ours, not FlashInfer's."""
        return Outcome(Reason.UNSUPPORTED) if isinstance(event, Merge) else super().apply(event)

    @classmethod
    def make_exchange(cls) -> MakeExchange:
        """See `GpuEngine.make_exchange`: through the host, since all ranks have one GPU."""
        make = super().make_exchange()

        def through_host(group: ProcessGroup, model: ModelShape) -> Exchange:
            exchange = make(group, model)
            return lambda send: exchange(send.cpu()).to(send.device)

        return through_host


class Mla:
    """`BatchMLAPagedAttentionWrapper` as a backend of `HelixCache`; rows without keys are its own.

    Parameters
    ----------
    kernels
        `fa2` or `fa3`.
    """

    def __init__(self, kernels: str) -> None:
        self.kernels = kernels
        self.wrapper: Any = None

    def __call__(
        self,
        q: Tensor,
        pages: Tensor,
        tables: Tensor,
        lengths: Tensor,
        *,
        scale: float | None = None,
        value_dim: int | None = None,
        layer: int | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """See `helix_gpu.attention.backends.AttendPages`."""
        assert scale is not None and value_dim is not None
        if self.wrapper is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            self.wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(
                workspace, backend=self.kernels
            )
        t, heads, rope_dim = pages.shape[2], q.shape[1], q.shape[2] - value_dim
        counts = (lengths + t - 1) // t
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        held = torch.arange(tables.shape[1], device=q.device) < counts[:, None]
        self.wrapper.plan(
            torch.arange(len(q) + 1, dtype=torch.int32, device=q.device), starts.int(),
            tables[held].int(), lengths.int(), heads, value_dim, rope_dim, t,
            False, scale, q.dtype, pages.dtype,
        )  # fmt: skip
        rows = pages[:, 0, :, 0]
        output, lse = self.wrapper.run(
            q[..., :value_dim], q[..., value_dim:], rows[..., :value_dim], rows[..., value_dim:],
            return_lse=True,
        )  # fmt: skip
        return output.float(), lse * math.log(2)


class MlaFa2(Decode):
    """MLA by the kernels of FlashAttention 2's manner."""

    capabilities: ClassVar[Any] = {
        "attention": ["latent"],
        "latent": [[512, 64]],
        **SHORT,
        "q_heads": {"min": 1, "max": 32},
        **_types("bfloat16"),
    }
    settings: ClassVar[dict[str, str]] = {**MergeStates.settings, "kernels": "fa2"}
    backend: ClassVar[Backend | None] = Mla("fa2")


class MlaFa3(MlaFa2):
    """MLA by the kernels for Hopper."""

    settings: ClassVar[dict[str, str]] = {**MergeStates.settings, "kernels": "fa3"}
    backend: ClassVar[Backend | None] = Mla("fa3")
