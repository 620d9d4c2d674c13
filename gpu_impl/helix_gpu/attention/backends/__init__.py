"""Attention of other libraries over this rank's pages: found where installed, never required.

Every backend is a callable like `paged.attend_pages` (`AttendPages`), so that what a library calls
a log-sum-exp, an empty row or a page table is translated in one place, its adapter:

- `flashinfer`: FlashInfer's paged decode.
"""

from __future__ import annotations

import importlib.util
from typing import Final, Protocol

from torch import Tensor

from helix_spec.config import ModelShape

PACKAGES: Final = {"flashinfer": "flashinfer-python"}
"""What can be asked for, by the name of its module, and the package that has it."""


class AttendPages(Protocol):
    """The type of a backend: a callable like `paged.attend_pages`."""

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
            As `paged.attend_pages` takes them.
        layer : int, optional
            Number of the layer, for a model whose layers attend differently. `HelixCache` gives it.
        positions : Tensor, int64 [n], optional
            Global position of each new token, 0 of a dummy. `HelixCache` gives them.

        Returns
        -------
        output : Tensor, float32 [n, q_heads, value_dim]
        lse : Tensor, float32 [n, q_heads]
            Natural log-sum-exp.
        """


def discovered() -> list[str]:
    """Return the names of the backends whose library can be imported here.

    Returns
    -------
    list of str
    """
    return [name for name in PACKAGES if importlib.util.find_spec(name) is not None]


def load(name: str, model: ModelShape) -> AttendPages:
    """Return the backend of this name for a model.

    Parameters
    ----------
    name : str
        One of PACKAGES.
    model : ModelShape

    Returns
    -------
    AttendPages

    Raises
    ------
    ValueError
        For an unknown name, a library that is not installed, or a model that it cannot serve.
    """
    if name not in PACKAGES:
        raise ValueError(f"There is no backend {name!r}; there are {', '.join(PACKAGES)}.")
    if name not in discovered():
        raise ValueError(
            f"Backend {name} needs the package {PACKAGES[name]}, which is not installed here."
        )
    from helix_gpu.attention.backends.flashinfer import FlashInfer

    return FlashInfer(model)
