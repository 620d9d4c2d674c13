"""Attention of other libraries over this rank's pages: found where installed, never required.

Every backend is a callable like `paged.attend_pages` (`AttendPages`), so that what a library calls
a log-sum-exp, an empty row or a page table is translated in one place, its adapter.
"""

from __future__ import annotations

import importlib.util
from typing import Final, Protocol

from torch import Tensor

from helix_spec.config import ModelShape

PACKAGES: Final = {"flashinfer": "flashinfer-python"}
"""What can be asked for, by the name of its module, and the package that has it."""


class AttendPages(Protocol):
    """Partial attention of new tokens over this rank's pages; see `paged.attend_pages`."""

    def __call__(
        self,
        q: Tensor,
        pages: Tensor,
        tables: Tensor,
        lengths: Tensor,
        *,
        scale: float | None = None,
        value_dim: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Output [n, q_heads, value_dim] and natural log-sum-exp [n, q_heads], both float32."""


def discovered() -> list[str]:
    """Names of the backends whose library can be imported here."""
    return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]


def load(name: str, model: ModelShape) -> AttendPages:
    """The backend of this name for a model.

    Raises ValueError for a name that there is not, a library that is not installed, or a model
    that it cannot serve.
    """
    if name not in PACKAGES:
        raise ValueError(f"There is no backend {name!r}; there are {', '.join(PACKAGES)}.")
    if name not in discovered():
        raise ValueError(
            f"Backend {name} needs the package {PACKAGES[name]}, which is not installed here."
        )
    from helix_gpu.attention.backends.flashinfer import FlashInfer

    return FlashInfer(model)
