"""Stands in for FlashInfer where there is no GPU: what the adapter calls, right, in plain torch.

Its conventions are FlashInfer's: base 2, -5e4 for no keys; MLA's empty rows are -inf.
"""

import math
from types import SimpleNamespace

import torch

__version__ = "0 (stand-in)"
EMPTY = -5e4


def merge_states(v, s):
    """The merge of all states; a row below -5e4 is lost, as it is there."""
    top = s.amax(1).clamp(min=EMPTY)
    weights = torch.exp2(s - top[:, None])
    total = weights.sum(1) + torch.exp2(EMPTY - top)
    merged = (weights[..., None] * v.float()).sum(1) / total[..., None]
    return merged.to(v.dtype), top + torch.log2(total)


def merge_state(v_a, s_a, v_b, s_b):
    """The merge of two."""
    top = torch.maximum(s_a, s_b)
    a, b = torch.exp2(s_a - top), torch.exp2(s_b - top)
    merged = (a[..., None] * v_a.float() + b[..., None] * v_b.float()) / (a + b)[..., None]
    return merged.to(v_a.dtype), top + torch.log2(a + b)


def _attention(q, k, v, scale, empty):
    """One row: q (heads, width), k and v (keys, kv_heads, width)."""
    if len(k) == 0:
        return q.new_zeros(len(q), v.shape[-1]), torch.full((len(q),), empty)
    group = len(q) // k.shape[1]
    k, v = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    scores = torch.einsum("hd,khd->hk", q.float(), k) * scale
    output = torch.einsum("hk,khd->hd", scores.softmax(-1), v)
    return output.to(q.dtype), scores.logsumexp(-1) / math.log(2)


class BatchDecodeWithPagedKVCacheWrapper:
    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert layout == "NHD"

    def plan(self, starts, indices, last, q_heads, kv_heads, dim, page, sm_scale=None, **types):
        self.starts, self.indices, self.last = starts.tolist(), indices, last.tolist()
        self.scale = sm_scale or dim**-0.5

    def run(self, q, pool, return_lse):
        rows = []
        for row, (first, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            pages = pool[self.indices[first:end].long()].transpose(1, 2).flatten(0, 1)
            held = max(0, (end - first - 1) * pool.shape[2] + self.last[row])
            rows.append(_attention(q[row], *pages[:held].unbind(1), self.scale, EMPTY))
        return tuple(torch.stack(part) for part in zip(*rows, strict=True))


class _Mla:
    def __init__(self, workspace, backend):
        assert backend in ("fa2", "fa3")

    def plan(self, queries, starts, indices, lengths, *shape):
        self.starts, self.indices, self.lengths = starts.tolist(), indices, lengths.tolist()
        self.scale = shape[5]

    def run(self, q, q_rotated, latents, rotated, return_lse, return_lse_base_on_e=False):
        rows = []
        for row, (first, end) in enumerate(zip(self.starts, self.starts[1:], strict=False)):
            pages = self.indices[first:end].long()
            k = torch.cat([latents[pages], rotated[pages]], dim=-1).flatten(0, 1)
            k = k[: self.lengths[row], None]
            query = torch.cat([q[row], q_rotated[row]], dim=-1)
            rows.append(_attention(query, k, k[..., : q.shape[-1]], self.scale, -torch.inf))
        output, lse = (torch.stack(part) for part in zip(*rows, strict=True))
        return output, lse * math.log(2) if return_lse_base_on_e else lse


mla = SimpleNamespace(BatchMLAPagedAttentionWrapper=_Mla)
