"""Sizes worth drawing, dimension by dimension: what is drawn from, and what coverage counts.

The rule behind them: below, at and above each power of two that software likes, and sizes that are
none. Small ones are drawn most, for time; real models are drawn as `REAL_SHAPES`.
"""

from __future__ import annotations

from typing import Any, Final

import msgspec

from helix_conformance.generate.narrowing import within
from helix_spec.capabilities import Box

FAR_POSITIONS: Final = (2**17, 2**20, 2**24)
"""A float32 holds every number up to the last; one trace a run has tokens there (`far_trace`)."""
FAR_LEN: Final = 2**24 + 2**11
"""A max_len that leaves room behind them."""
FAR_CHUNKS: Final = (64, 128, 256)
"""Tokens that a rank is dealt at a time there, in pages of the last size: so that the pieces of a
prompt are few."""
SIZES: Final[dict[str, tuple[Any, ...]]] = {
    "cp_size": (1, 2, 3, 4, 5, 6, 7, 8, 16),
    "tp_size": (1, 2, 4),
    "tokens_per_block": (1, 2, 3, 4, 8, 16, 32, 64, 128, 256),
    "head_dim": (16, 32, 64, 80, 96, 128, 192, 256),
    "latent": ((32, 16), (64, 16), (64, 0), (512, 64), (512, 0)),
    "q_heads_per_kv_head": (1, 2, 3, 4, 8, 16, 128),
    "layers": (1, 2, 3, 5, 7),
    "max_len": (9, 24, 200, 600, 2000, 70_000, FAR_LEN),
    "position": FAR_POSITIONS,
    "live_requests": (1, 2, 64, 65, 128, 130, 256, 260),
    "batch": (1, 2, 64, 65, 128, 130, 256, 260),
    "query_len": (1, 2, 3, 4, 5, 6, 7, 8),
}
"""Every dimension that coverage shows, with its sizes."""
FEW_CP: Final = (1, 2, 3, 4, 8)
"""Numbers of ranks of most traces in one process."""
RARE_CP: Final = (5, 6, 7, 16)
CROWDS: Final = (65, 130, 64, 128, 256, 260)
"""So many requests at once: more than tables that were doubled a few times have rows for."""
REAL_SHAPES: Final = (
    Box(
        attention=["gqa"], q_heads=[32, 64], kv_heads=[8], head_dim=[128],
        tokens_per_block=[16, 64], layers=[1],
    ),
    Box(
        attention=["latent"], q_heads=[16, 128], head_dim=[192], latent=[(512, 64), (512, 0)],
        tokens_per_block=[64], layers=[1],
    ),
    Box(attention=["gqa"], head_dim=[80, 96, 192, 256], layers=[1]),
    Box(head_dim=[16], layers=[5, 7]),
    Box(tokens_per_block=[64, 128, 256]),
)  # fmt: skip
"""Models as they ship, and sizes that small ones lack: drawn for a share of the traces."""
REAL_SHARE: Final = 12
"""One trace in so many has a real shape."""


def both(box: Box, other: Box) -> Box | None:
    """Return what two boxes allow together; None when a dimension has nothing left.

    Parameters
    ----------
    box : Box
        Where the engine works.
    other : Box
        Of lists alone.

    Examples
    --------
    >>> from helix_spec.capabilities import in_words
    >>> in_words([both(Box(head_dim=[64, 80]), Box(head_dim=[80, 96], layers=[1]))])
    'head_dim 80, layers 1'
    >>> both(Box(head_dim=[64]), Box(head_dim=[80])) is None
    True
    """
    limits = dict[str, Any]()
    for name in box.__struct_fields__:
        wanted = getattr(other, name)
        if wanted is None:
            continue
        allowed = [size for size in within(box, name, wanted) if size in wanted]
        if not allowed:
            return None
        limits[name] = allowed
    return msgspec.structs.replace(box, **limits)
