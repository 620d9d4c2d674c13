"""A transformer block's two halves on the same ranks: attention as TP x CP, FFN as EP x TP.

Between them every rank holds the whole hidden state of every token: each half ends with one
all-reduce over all ranks (arXiv 2507.07120, section 2).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from helix_gpu.cache import DecodeStep, HelixCache
from helix_gpu.comm.mesh import slice_of, whole_group
from helix_spec.config import ModelShape


@dataclass(frozen=True, slots=True)
class AttentionWeights:
    """The projections of one layer, whole or a rank's share, all of the model's type."""

    q: Tensor
    """[hidden, q_heads * head_dim]."""
    k: Tensor
    """[hidden, kv_heads * head_dim]."""
    v: Tensor
    """[hidden, kv_heads * head_dim]."""
    o: Tensor
    """[q_heads * head_dim, hidden]."""

    def shard(self, mesh: DeviceMesh) -> AttentionWeights:
        """Return this rank's share of the whole.

        Q, K and V are split over tp and the same on all cp ranks: each projects all the heads of
        its tp shard, so that no query travels. O is split over all ranks, by `slice_of`.

        Parameters
        ----------
        mesh : DeviceMesh
            With axes ("tp", "cp").

        Returns
        -------
        AttentionWeights
        """
        tp_rank, tp_size = mesh.get_local_rank("tp"), mesh["tp"].size()
        q, k, v = (x.chunk(tp_size, 1)[tp_rank].contiguous() for x in (self.q, self.k, self.v))
        return AttentionWeights(q, k, v, self.o.chunk(mesh.size())[slice_of(mesh)].contiguous())


class AttentionBlock:
    """QKV projection, RoPE, Helix attention, output projection and its reduction, for one layer.

    Every rank makes the same calls.

    Parameters
    ----------
    cache : HelixCache
    layer : int
    weights : AttentionWeights
        This rank's share.
    mesh : DeviceMesh
        With axes ("tp", "cp").

    Raises
    ------
    ValueError
        For weights that are another share, and for a model with a latent cache, whose projections
        are others.
    """

    def __init__(
        self, cache: HelixCache, layer: int, weights: AttentionWeights, mesh: DeviceMesh
    ) -> None:
        _check_shapes(weights, cache)
        self.cache = cache
        self.layer = layer
        self.weights = weights
        self.group = whole_group(mesh)

    @torch.no_grad()
    def __call__(self, step: DecodeStep, x: Tensor) -> Tensor:
        """Return the layer's output for a step begun, the same on all ranks.

        The sum over ranks is in the model's type.

        Parameters
        ----------
        step : DecodeStep
        x : Tensor, the model's type [m + pad, hidden]
            The same on all ranks: a row for each new token of the step, dummies last.

        Returns
        -------
        Tensor, the model's type [m, hidden]
        """
        heads, model = (len(x), -1, self.cache.config.model.head_dim), self.weights
        q, k, v = ((x @ projection).view(heads) for projection in (model.q, model.k, model.v))
        attended = self.cache.attend(step, self.layer, q, k, v)
        output = attended.flatten(1) @ self.weights.o
        dist.all_reduce(output, group=self.group)
        return output


@dataclass(frozen=True, slots=True)
class FeedForwardWeights:
    """Gated FFNs of one layer, whole or a rank's share; a dense FFN has one expert."""

    gate: Tensor
    """[experts, hidden, width]."""
    up: Tensor
    """[experts, hidden, width]."""
    down: Tensor
    """[experts, width, hidden]."""

    def shard(self, mesh: DeviceMesh) -> FeedForwardWeights:
        """Return this rank's share of the whole.

        Experts are split over ep in equal runs, and each one's width over tp.

        Parameters
        ----------
        mesh : DeviceMesh
            With axes ("ep", "tp").

        Returns
        -------
        FeedForwardWeights

        Raises
        ------
        ValueError
            If experts or width do not divide.
        """
        (experts, _, width), (ep_size, tp_size) = self.gate.shape, mesh.shape
        if experts % ep_size or width % tp_size:
            raise ValueError(
                f"{experts} experts of width {width} do not divide over ep {ep_size} x tp "
                f"{tp_size}."
            )
        ep_rank, tp_rank = mesh.get_local_rank("ep"), mesh.get_local_rank("tp")
        gate, up, down = (x.chunk(ep_size)[ep_rank] for x in (self.gate, self.up, self.down))
        return FeedForwardWeights(
            gate.chunk(tp_size, 2)[tp_rank].contiguous(),
            up.chunk(tp_size, 2)[tp_rank].contiguous(),
            down.chunk(tp_size, 1)[tp_rank].contiguous(),
        )


class FeedForward:
    """The FFN of one layer on the ranks of an attention mesh, as `mesh.repurposed` returns them.

    Parameters
    ----------
    weights : FeedForwardWeights
        This rank's share.
    mesh : DeviceMesh
        With axes ("ep", "tp").
    """

    def __init__(self, weights: FeedForwardWeights, mesh: DeviceMesh) -> None:
        self.weights = weights
        self.first_expert = mesh.get_local_rank("ep") * len(weights.gate)
        self.group = whole_group(mesh)

    @torch.no_grad()
    def __call__(self, x: Tensor, routing: Tensor) -> Tensor:
        """Return the sum over experts of routing * down(silu(gate(x)) * up(x)).

        One all-reduce adds the parts of an expert and the experts.

        Parameters
        ----------
        x : Tensor, the weights' type [m, hidden]
            The same on all ranks.
        routing : Tensor, float32 [m, all experts]
            0 where a token does not go; the same on all ranks.

        Returns
        -------
        Tensor, the weights' type [m, hidden]
        """
        output = torch.zeros_like(x, dtype=torch.float32)
        for place, (gate, up, down) in enumerate(
            zip(self.weights.gate, self.weights.up, self.weights.down, strict=True)
        ):
            share = routing[:, self.first_expert + place]
            tokens = share.nonzero()[:, 0]
            inner = F.silu(x[tokens] @ gate) * (x[tokens] @ up)
            output.index_add_(0, tokens, (inner @ down).float() * share[tokens, None])
        output = output.to(x.dtype)
        dist.all_reduce(output, group=self.group)
        return output


def _check_shapes(weights: AttentionWeights, cache: HelixCache) -> None:
    """Raise ValueError unless these are the projections of this cache's heads."""
    model: ModelShape = cache.config.model
    if model.latent is not None:
        raise ValueError("The block projects Q, K and V by heads; this model caches latents.")
    hidden = len(weights.q)
    own = model.q_heads // cache.config.world_size * model.head_dim
    q, kv = cache.q_heads * model.head_dim, cache.kv_heads * model.head_dim
    expected = {"q": (hidden, q), "k": (hidden, kv), "v": (hidden, kv), "o": (own, hidden)}
    for name, shape in expected.items():
        found = getattr(weights, name)
        if tuple(found.shape) != shape or found.dtype != cache.dtype:
            raise ValueError(
                f"Projection {name} is {found.dtype} {tuple(found.shape)}; this rank's share is "
                f"{cache.dtype} {shape}."
            )
