"""Heads that do not divide over the ranks: padded, so that any model runs at any tp x cp.

After the exchange each rank holds an equal slice of the query heads, and no KV head is split. A
model whose heads do not divide so is given heads that count for nothing: 0 in, and left out of what
comes back. KV heads are repeated where there are fewer than tensor-parallel ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from helix_gpu.bookkeeping.inputs import integer


@dataclass(frozen=True, slots=True)
class PaddedHeads:
    """Which head of the model stands where; -1 for none.

    `q_heads` and `kv_heads` are those for `ModelShape`.
    """

    q_source: tuple[int, ...]
    """[q_heads] query heads of the model."""
    kv_source: tuple[int, ...]
    """[kv_heads] KV heads of the model."""

    @property
    def q_heads(self) -> int:
        """Return the query heads, padding included."""
        return len(self.q_source)

    @property
    def kv_heads(self) -> int:
        """Return the KV heads, repeated ones and padding included."""
        return len(self.kv_source)

    @property
    def cost(self) -> str:
        """Return what the padding costs, as a sentence."""
        q, kv = max(self.q_source) + 1, max(self.kv_source) + 1
        return (
            f"{self.q_heads} query heads in place of {q}: {self.q_heads / q:.2f} times the "
            f"products and the bytes of the exchange. {self.kv_heads} KV heads in place of {kv}: "
            f"{self.kv_heads / kv:.2f} times the cache."
        )

    def pad_q(self, q: Tensor, dim: int = -2) -> Tensor:
        """Return all query heads in their places, and 0 where none stands.

        Parameters
        ----------
        q : Tensor
            Queries [..., heads, head_dim], or what makes them: a projection, a bias.
        dim : int
            Its axis of the model's query heads.

        Returns
        -------
        Tensor
        """
        return _placed(q, self.q_source, dim)

    def pad_kv(self, k: Tensor, dim: int = -2) -> Tensor:
        """Return all KV heads in their places, and 0 where none stands.

        Parameters
        ----------
        k : Tensor
            Keys or values [..., heads, head_dim], or what makes them.
        dim : int
            Its axis of the model's KV heads.

        Returns
        -------
        Tensor
        """
        return _placed(k, self.kv_source, dim)

    def real(self, output: Tensor, dim: int = -2) -> Tensor:
        """Return the model's own query heads, in its order, of all heads.

        Parameters
        ----------
        output : Tensor [..., q_heads, value_dim]
            Of all ranks, as `HelixCache.gather` returns it.
        dim : int
            Its axis of query heads.

        Returns
        -------
        Tensor
        """
        if _in_place(self.q_source):
            return output
        places = sorted(
            (source, place) for place, source in enumerate(self.q_source) if source >= 0
        )
        index = torch.tensor([place for _, place in places], device=output.device)
        return output.index_select(dim, index)


def padded_heads(
    q_heads: int, kv_heads: int, tp_size: int, cp_size: int, *, latent: bool = False
) -> PaddedHeads:
    """Return where a model's heads stand so that they divide over tp_size x cp_size ranks.

    Parameters
    ----------
    q_heads, kv_heads : int
        Of the model; the KV heads divide the query heads.
    tp_size, cp_size : int
    latent : bool
        Whether the model caches latents, which all ranks hold whole: kv_heads is 1 and stays so.

    Returns
    -------
    PaddedHeads

    Raises
    ------
    ValueError

    Examples
    --------
    >>> heads = padded_heads(q_heads=9, kv_heads=3, tp_size=1, cp_size=2)
    >>> heads.q_source
    (0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1)
    >>> heads.cost  # doctest: +NORMALIZE_WHITESPACE
    '12 query heads in place of 9: 1.33 times the products and the bytes of the exchange. 3 KV heads
    in place of 3: 1.00 times the cache.'
    """
    counts = {"q_heads": q_heads, "kv_heads": kv_heads, "tp_size": tp_size, "cp_size": cp_size}
    for name, count in counts.items():
        if integer(name, count) < 1:
            raise ValueError(f"{name} is {count}; it must be at least 1.")
    if q_heads % kv_heads or (latent and kv_heads != 1):
        raise ValueError(
            f"{q_heads} query heads and {kv_heads} KV heads: the KV heads must divide them"
            f"{', and be 1 with a latent' if latent else ''}."
        )
    split = 1 if latent else tp_size
    copies = -(-split // kv_heads)
    places = -(-kv_heads * copies // split) * split
    group = q_heads // kv_heads
    width = -(-group // copies)
    while places * width % (tp_size * cp_size):
        width += 1
    kv_source, q_source = list[int](), list[int]()
    for place in range(places):
        head, copy = divmod(place, copies)
        real = head < kv_heads
        kv_source.append(head if real else -1)
        share = range(group)[copy::copies] if real else range(0)
        mine = [head * group + member for member in share]
        q_source += mine + [-1] * (width - len(mine))
    return PaddedHeads(tuple(q_source), tuple(kv_source))


def _placed(heads: Tensor, source: tuple[int, ...], dim: int) -> Tensor:
    given = max(source) + 1
    if heads.shape[dim] != given:
        raise ValueError(
            f"Axis {dim} of shape {tuple(heads.shape)} must hold the model's {given} heads."
        )
    if _in_place(source):
        return heads
    index = torch.tensor(source, device=heads.device)
    placed = heads.index_select(dim, index.clamp(min=0))
    blank = [1] * heads.ndim
    blank[dim] = len(source)
    return placed.where((index >= 0).view(blank), 0)


def _in_place(source: tuple[int, ...]) -> bool:
    """Whether every head stands where it does in the model: nothing is moved, or waited for."""
    return source == tuple(range(len(source)))
