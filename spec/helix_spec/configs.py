"""What an engine is started with, and when it must refuse to start (SPEC.md section 4)."""

from __future__ import annotations

from typing import Annotated, Final, Literal

import msgspec

from helix_spec.layouts import Layout, LayoutError, layout_problem, parse_layout

DType = Literal["float32", "float16", "bfloat16"]
Admission = Literal["transfer", "prefill"]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

LARGEST_MAX_LEN: Final = 2**31 - 1
"""Positions fit a signed 32-bit integer, as in every engine's kernels."""


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The attention of one model: head counts, head_dim in elements, element types."""

    layers: Count = 1
    q_heads: Count = 4
    kv_heads: Count = 2
    head_dim: Count = 16
    dtype: DType = "float32"
    """Type of Q, of the cached K and V, and of the output."""
    partial_dtype: DType = "float32"
    """Type in which partial outputs travel between ranks; log-sum-exp is always float32."""
    rope_base: float = 10000.0


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that every rank knows from the start.

    `layout` is a layout identifier. `pages[r]` is the pool size, in pages, of the ranks with
    cp_rank r (tensor-parallel peers hold the same tokens, so they need the same pages): all
    ranks know all of it, so each derives every refusal without asking. `max_len` is the number
    of global tokens a request may reach.
    """

    layout: str
    pages: list[Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]]
    max_len: Annotated[int, msgspec.Meta(ge=1, le=LARGEST_MAX_LEN)]
    model: ModelShape = ModelShape()
    tp_size: Count = 1
    overlap: bool = False
    admission: Admission = "transfer"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0
    poison: bool = True

    @property
    def rules(self) -> Layout:
        """The layout as data. Raises LayoutError when the identifier is none."""
        return parse_layout(self.layout)

    @property
    def world_size(self) -> int:
        """Number of ranks: tp_size * cp_size (MAP-1)."""
        return self.tp_size * self.rules.cp_size


def config_problem(config: Config) -> str | None:
    """Why no engine may start with this configuration, as a sentence; None when it may.

    An engine answers each of these with `bad_config`.
    """
    try:
        layout = config.rules
    except LayoutError as error:
        return str(error)
    problem = layout_problem(layout)
    if problem is not None:
        return problem
    if len(config.pages) != layout.cp_size:
        return (
            f"pages lists {len(config.pages)} pool sizes for cp_size {layout.cp_size}; "
            "it must list one for each cp_rank."
        )
    for rank, pages in enumerate(config.pages):
        if pages < 1:
            return f"The pool of cp_rank {rank} has {pages} pages; it must hold at least one."
    return _heads_problem(config.model, config.tp_size, layout.cp_size)


def _heads_problem(model: ModelShape, tp_size: int, cp_size: int) -> str | None:
    if model.q_heads % model.kv_heads != 0:
        return (
            f"{model.q_heads} query heads do not divide into {model.kv_heads} KV heads; "
            "the KV heads must divide the query heads."
        )
    if tp_size > model.kv_heads:
        return (
            f"tp_size {tp_size} is above the {model.kv_heads} KV heads; a KV head cannot be "
            "split, so tp_size may be at most their number."
        )
    if model.kv_heads % tp_size != 0:
        return f"tp_size {tp_size} does not divide the {model.kv_heads} KV heads."
    if model.q_heads % (tp_size * cp_size) != 0:
        return (
            f"{model.q_heads} query heads do not divide by tp_size * cp_size = "
            f"{tp_size} * {cp_size}; after the exchange each rank holds an equal slice of them."
        )
    if model.head_dim % 2 != 0:
        return f"head_dim is {model.head_dim}; RoPE rotates pairs, so it must be even."
    if not 1.0 < model.rope_base < 1e12:
        return f"rope_base is {model.rope_base}; it must lie between 1 and 1e12."
    return None
