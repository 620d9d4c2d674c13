"""The exchange of partial attentions among the ranks that share a sequence.

Each rank attends with all query heads of its tensor-parallel shard and ends up with the attention
over all keys for its own slice of them. Outputs and log-sum-exps are packed into one message for
each rank (`partials.pack`), since decode exchanges are bound by latency (arXiv 2507.07120; vLLM
pull request 41160). How the messages travel is an `Exchange`:

| exchange | collectives | bytes sent per rank | order of the sum |
|---|---|---|---|
| `all_to_all` | 1 | (C-1)/C (O + L) | fixed |
| `all_gather` | 1 | (C-1) (O + L) | fixed |
| `reduce_scatter` | 2 | (C-1) L + (C-1)/C O, O in float32 | the collective's |
| `push.push` | none | (C-1)/C (O + L) | fixed |

with C ranks, O the bytes of a rank's output and L those of its log-sum-exps.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.attention.merge import shares, weighted
from helix_gpu.attention.partials import pack, unpack
from helix_spec.config import ModelShape

Exchange = Callable[[Tensor], Tensor]
"""From the message to each rank to the partials of this rank's own heads.

uint8 [C, bytes] -> uint8 [P, bytes], rows as `partials.pack` lays them out. P is C, row s from rank
s; or 1, where the exchange has merged on the way. Every rank of the group calls it alike. The
result is only good until the next call.
"""
MakeExchange = Callable[[dist.ProcessGroup, ModelShape], Exchange]
"""The exchange among the ranks of a group, for a model; every rank of the group calls it."""


def all_to_all(group: dist.ProcessGroup, model: ModelShape) -> Exchange:
    """Return the exchange by one all-to-all: every rank gets the messages for it. The default.

    Parameters
    ----------
    group : ProcessGroup
        The ranks that share a sequence.
    model : ModelShape

    Returns
    -------
    Exchange
    """

    def exchange(send: Tensor) -> Tensor:
        receive = torch.empty_like(send)
        dist.all_to_all_single(receive, send, group=group)
        return receive

    return exchange


def all_gather(group: dist.ProcessGroup, model: ModelShape) -> Exchange:
    """Return the exchange by which every rank gets all messages and picks its own.

    It sends C times the bytes.

    Parameters
    ----------
    group : ProcessGroup
        The ranks that share a sequence.
    model : ModelShape

    Returns
    -------
    Exchange
    """

    def exchange(send: Tensor) -> Tensor:
        return _gathered(send, group)[:, group.rank()]

    return exchange


def reduce_scatter(group: dist.ProcessGroup, model: ModelShape) -> Exchange:
    """Return the exchange that gathers log-sum-exps, then sums outputs and scatters them by heads.

    What vLLM (`ag_rs`) and SGLang do by default. They add in the model's type, and the error grows
    with the ranks; here sums are float32.

    Parameters
    ----------
    group : ProcessGroup
        The ranks that share a sequence.
    model : ModelShape

    Returns
    -------
    Exchange
        It merges on the way: one row comes back.

    Raises
    ------
    ValueError
        When partials should travel in less than float32: rounding them once more would leave the
        bound of ATT-4.
    """
    if model.partial_dtype != "float32":
        raise ValueError(
            f"partial_dtype is {model.partial_dtype}; the sums of a reduce-scatter travel, and "
            "are added, in float32."
        )

    def exchange(send: Tensor) -> Tensor:
        items = send.shape[1] // (4 * model.value_dim + 4)
        outputs, lses = unpack(send, items, 1, model.value_dim, torch.float32)
        all_shares, merged_lses = shares(_gathered(lses.contiguous(), group))
        contribution = weighted(outputs, all_shares[group.rank()])
        merged = torch.empty_like(outputs[0])
        _reduce_scatter(merged, contribution.flatten(0, 1), group=group)
        return pack(merged, merged_lses[group.rank()], 1, torch.float32)

    return exchange


def _gathered(mine: Tensor, group: dist.ProcessGroup) -> Tensor:
    """[C, ...]: this tensor of every rank."""
    gathered = mine.new_empty(group.size() * mine.shape[0], *mine.shape[1:])
    _all_gather(gathered, mine, group=group)
    return gathered.view(group.size(), *mine.shape)


# torch 2.13 renames both and warns of the old names, which are all that 2.11 has.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
