"""How far roundings may move a float64 result: every rounding a variable, followed by autograd.

A reference computes in float64 and says where an honest run rounds, and by how much at most. Each
such rounding is a variable e in [-1, 1] times that size, 0 in the reference. The derivative of a
result with respect to all of them, by autograd, says how far each can move it, along whatever way,
through several heads, keys or experts at once.

Roundings are taken for independent with mean 0, the model of Higham and Mary, *A New Approach to
Probabilistic Rounding Error Analysis* (SIAM J. Sci. Comput. 41, 2019). By Hoeffding's inequality
their sum then leaves t * sqrt(sum of squares) with a probability of at most 2 exp(-t^2 / 2). So t
follows from a stated chance of a false alarm, and no tolerance is picked by hand. Second-order
effects are left out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gpu_testing.exact import U32

FALSE_ALARM = 1e-9
"""Chance that one honest comparison of whole tensors fails."""


class Roundings:
    """The roundings of one computation in float64, in the order in which it names them."""

    def __init__(self) -> None:
        self.sources: list[Tensor] = []

    def off_by(self, x: Tensor, size: Tensor) -> Tensor:
        """`x`, every entry of which may be off by up to its entry of `size`."""
        source = torch.zeros_like(x, requires_grad=True)
        self.sources.append(source)
        return x + size.detach() * source

    def rounded(self, x: Tensor, unit: float) -> Tensor:
        """After one rounding in a type of this unit."""
        return self.off_by(x, unit * x.abs())

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """A matrix product summed in float32 in any order: n roundings of partial sums."""
        return self.off_by(a @ b, a.shape[-1] ** 0.5 * U32 * (a.abs() @ b.abs()))

    def summed(self, parts: Tensor, unit: float) -> Tensor:
        """Parts [n, ...], each rounded to a type and added in it, in any order."""
        largest = parts.abs().sum(0)
        squares = parts.square().sum(0) + (len(parts) - 1) * largest.square()
        return self.off_by(parts.sum(0), unit * squares.sqrt())

    def rotated(self, x: Tensor, positions: Tensor, base: float, unit: float) -> Tensor:
        """RoPE of [n, heads, dim] in float32, off by 3 units of |a| + |b|, then rounded."""
        half = x.shape[-1] // 2
        angles = positions.double()[:, None, None] * base ** (-torch.arange(half).double() / half)
        cos, sin = angles.cos(), angles.sin()
        a, b = x[..., :half], x[..., half:]
        turned = torch.cat((a * cos - b * sin, b * cos + a * sin), -1)
        turned = self.off_by(turned, 3 * U32 * (a.abs() + b.abs()).repeat(1, 1, 2))
        return self.rounded(turned, unit)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, wire: float, unit: float) -> Tensor:
        """One token [heads, dim] over S keys [S, kv_heads, dim], however ranks share them.

        Besides the scores' own sums: a weight meets S sums and at most 40 roundings (fades,
        divisions, the merge), and four differences of exponents no larger than L = max |s| + ln S,
        each off by 2 L units, maybe alike for all keys. Partial outputs are rounded for the wire.
        """
        group = q.shape[0] // k.shape[1]
        k, v = (x.repeat_interleave(group, 1).transpose(0, 1) for x in (k, v))
        scores = self.product(k, q[:, :, None])[..., 0] * q.shape[-1] ** -0.5
        p = scores.softmax(-1)
        output = torch.einsum("hs,hsd->hd", p, v)
        keys, largest = p.shape[-1], scores.abs().max() + math.log(p.shape[-1])
        mass = torch.einsum("hs,hsd->hd", p, v.abs())
        output = self.off_by(output, U32 * ((keys + 40) ** 0.5 + 8 * largest) * mass)
        return self.rounded(self.off_by(output, wire * mass), unit)

    def bound(self, result: Tensor) -> Tensor:
        """How far an honest run may be from each entry of `result`."""
        flat = result.flatten()
        squares = torch.zeros_like(flat)
        one_hot = torch.eye(len(flat), dtype=flat.dtype)
        gradients = torch.autograd.grad(flat, self.sources, one_hot, is_grads_batched=True)
        for gradient in gradients:
            squares += gradient.flatten(1).square().sum(1)
        t = math.sqrt(2 * math.log(2 * len(flat) / FALSE_ALARM))
        return t * squares.sqrt().view_as(result)
