"""K and V in shuffled pages of a pool."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def scattered(
    shards: Sequence[tuple[Tensor, Tensor]], t: int, heads_first: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """The requests' K and V in shuffled pages of a pool of NaN; tables and lengths.

    Entries past a table's end name a page of NaN. With `heads_first` the pool lies in memory as
    [pages, 2, kv_heads, t, dim].
    """
    lengths = [len(k) for k, _ in shards]
    counts = [-(-length // t) for length in lengths]
    kv_heads, dim = shards[0][0].shape[1:]
    total = sum(counts) + 2
    order = torch.randperm(total, generator=torch.Generator().manual_seed(1)).tolist()
    pages = torch.full((total, 2, t, kv_heads, dim), torch.nan, dtype=shards[0][0].dtype)
    if heads_first:
        pages = pages.transpose(2, 3).contiguous().transpose(2, 3)
    tables = torch.full((len(shards), max(counts) + 1), order.pop())
    for row, shard in enumerate(shards):
        for column in range(counts[row]):
            page = tables[row, column] = order.pop()
            for part, x in enumerate(shard):
                chunk = x[column * t : (column + 1) * t]
                pages[page, part, : len(chunk)] = chunk
    return pages, tables, torch.tensor(lengths)
