"""FlashInfer's paged decode as a backend.

Its conventions (flashinfer-python 0.6, `BatchDecodeWithPagedKVCacheWrapper`): pages
[pages, 2, tokens_per_block, kv_heads, head_dim] with layout "NHD", which are ours; page tables in
compressed rows, int32, with the number of tokens in each last page; log-sum-exps to base 2; output
in the query's type, which is also that in which probabilities meet V on its tensor cores. A row
without keys is not to be given to it: up to 0.6.18 it answers -5e4 there.
"""

from __future__ import annotations

import importlib
import math
from typing import Any, Final

import torch
from torch import Tensor

from helix_spec.config import ModelShape

WORKSPACE_BYTES: Final = 128 * 2**20
"""What FlashInfer's documentation recommends."""
ALL_ON_TENSOR_CORES: Final = 4
"""From so many query heads for a KV head its tensor-core kernels are the faster ones."""


class FlashInfer:
    """Attention by FlashInfer.

    It plans at every call, and so waits for the device: a peer to compare with, or a first step on
    other hardware, not what a CUDA graph captures.

    Parameters
    ----------
    model : ModelShape

    Raises
    ------
    ValueError
        For a model that it cannot serve, or whose declared types promise more than it keeps.
    """

    def __init__(self, model: ModelShape) -> None:
        problem = _problem(model)
        if problem is not None:
            raise ValueError(problem)
        self.module: Any = importlib.import_module("flashinfer")
        self.wrapper: Any = None
        self.tensor_cores = model.q_heads // model.kv_heads >= ALL_ON_TENSOR_CORES

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
        """Return the partial attention of each new token over its request's slots on this rank.

        Parameters
        ----------
        q, pages, tables, lengths, scale, value_dim
            As `paged.attend_pages` takes them, on one GPU; pages of q's type, no latents.
        layer, positions
            Not looked at: all layers attend alike, to all positions.

        Returns
        -------
        output : Tensor, float32 [n, q_heads, value_dim]
        lse : Tensor, float32 [n, q_heads]
        """
        output = q.new_zeros(q.shape, dtype=torch.float32)
        lse = q.new_full(q.shape[:2], -torch.inf, dtype=torch.float32)
        rows = lengths.nonzero()[:, 0]
        if len(rows):
            self._plan(q, pages, tables[rows], lengths[rows], scale)
            found, found_lse2 = self.wrapper.run(q[rows], pages, return_lse=True)
            output[rows] = found.float()
            lse[rows] = found_lse2 * math.log(2)
        return output, lse

    def _plan(
        self, q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, scale: float | None
    ) -> None:
        """Tell FlashInfer which pages each row has; every row has at least one key."""
        if self.wrapper is None:
            workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            self.wrapper = self.module.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=self.tensor_cores
            )
        t, kv_heads, head_dim = pages.shape[2:]
        counts = (lengths + t - 1) // t
        starts = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
        held = torch.arange(tables.shape[1], device=q.device) < counts[:, None]
        self.wrapper.plan(
            starts.int(), tables[held].int(), ((lengths - 1) % t + 1).int(),
            q.shape[1], kv_heads, head_dim, t,
            q_data_type=q.dtype, kv_data_type=pages.dtype, sm_scale=scale,
        )  # fmt: skip


def _problem(model: ModelShape) -> str | None:
    """Why FlashInfer cannot serve a model, as a sentence; None when it can."""
    if model.latent is not None:
        return "Backend flashinfer attends over K and V; this model caches latents."
    if model.dtype == "float32" or model.cache_dtype is not None:
        return (
            f"Backend flashinfer attends in float16 or bfloat16, K and V in the query's type; this "
            f"model has dtype {model.dtype}, cached as {model.cached_dtype}."
        )
    promised = {"partial_dtype": model.partial_dtype, "product_dtype": model.product_dtype}
    for name, dtype in promised.items():
        if dtype != model.dtype:
            return (
                f"Backend flashinfer rounds partials and probabilities to {model.dtype}; {name} is "
                f"{dtype}, which promises another precision."
            )
    return None
