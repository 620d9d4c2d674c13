"""Calls that compile the kernels of the random traces; see `conform.COMPILED`."""

from __future__ import annotations

import torch

from helix_flashinfer import DEVICE
from helix_gpu.attention.backends.flashinfer import FlashInfer
from helix_spec.config import ModelShape


def decode(q_heads: int) -> bool:
    """One row of so many query heads for a KV head of 128; whether its log-sum-exp is a number."""
    names = ("dtype", "product_dtype", "partial_dtype")
    types = dict.fromkeys(names, "bfloat16")
    model = ModelShape(q_heads=q_heads, kv_heads=1, head_dim=128, **types)  # type: ignore[arg-type]
    pages = torch.ones(2, 2, 16, 1, 128, dtype=torch.bfloat16, device=DEVICE)
    tables = torch.zeros(1, 1, dtype=torch.int64, device=DEVICE)
    lengths = torch.full((1,), 4, device=DEVICE)
    q = torch.ones(1, q_heads, 128, dtype=torch.bfloat16, device=DEVICE)
    return bool(FlashInfer(model)(q, pages, tables, lengths)[1].isfinite().all())
