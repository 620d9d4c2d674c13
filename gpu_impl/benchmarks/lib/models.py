"""The models whose steps the GPU benchmarks run."""

from __future__ import annotations

from typing import Any

from lib import DRY

from helix_spec.config import LatentShape, ModelShape

DTYPE = "float16" if DRY else "bfloat16"  # the interpreter does not round to bfloat16, it cuts

NARROW = "float8_e4m3fn"
LATENT = LatentShape(latent_dim=32, rope_dim=16) if DRY else LatentShape()


def models() -> dict[str, ModelShape]:
    """The models whose steps are replayed: probabilities meet V on the matrix units."""
    layers, heads, kv_heads, dim = (2, 4, 2, 16) if DRY else (4, 32, 8, 128)
    types: dict[str, Any] = {"dtype": DTYPE, "product_dtype": DTYPE, "partial_dtype": DTYPE}
    grouped = {"layers": layers, "q_heads": heads, "kv_heads": kv_heads, "head_dim": dim}
    latent = {
        "layers": layers,
        "q_heads": 4 * heads,
        "kv_heads": 1,
        "head_dim": 192,
        "latent": LATENT,
    }
    return {
        "grouped queries": ModelShape(**grouped, **types),
        "grouped queries, 8-bit cache": ModelShape(**grouped, **types, cache_dtype=NARROW),
        "latents": ModelShape(**latent, **types),
        "latents, 8-bit cache": ModelShape(**latent, **types, cache_dtype=NARROW),
    }
