"""Mutants of `HelixCache`: what is written, rotated, attended, exchanged and merged.

The ranks are threads and their exchange is real, so a wrong partial is merged as it would be.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from helix_gpu.attention.merge import beside_sinks, merge
from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.partials import pack
from helix_gpu.attention.rope import rope_table
from helix_gpu.bookkeeping.ledger import Admission, Step
from helix_gpu.bookkeeping.rank_book import PageCopy, RankBook, RankStep
from helix_gpu.cache import DecodeStep, HelixCache, PromptKV
from helix_mutants.parts import OverCache, mutant, rebound
from helix_spec.config import Config
from helix_spec.engine import Outcome

Attend = Callable[..., tuple[Tensor, Tensor]]


def attending(function: Attend) -> type[HelixCache]:
    """A cache whose attention of a rank is this function."""

    class Cache(HelixCache):
        _attended = rebound(HelixCache._attended, attend_pages=function)

    return Cache


def packing(function: Callable[[Tensor, Tensor, int, torch.dtype], Tensor]) -> type[HelixCache]:
    """A cache that packs partials for its peers with this function."""

    class Cache(HelixCache):
        combine = rebound(HelixCache.combine, pack=function)

    return Cache


def merging(function: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]) -> type[HelixCache]:
    """A cache that merges partials with this function."""

    class Cache(HelixCache):
        combine = rebound(HelixCache.combine, merge=function)

    return Cache


# What a rank sees


@mutant("TensorRT-LLM #11507 and others", "LEN-3", "ATT-1")
class InactiveSeesNewToken(OverCache):
    """An inactive rank's attention counts the token in flight: it reads a slot not written."""

    class Book(RankBook):
        def advance(self, step: Step) -> RankStep:
            right = super().advance(step)
            return right._replace(visible=right.past_len + 1)

    book_class = Book


def _without_first_key(
    q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
) -> tuple[Tensor, Tensor]:
    blank = pages.clone()
    first = tables[lengths > 1][:, :1].flatten()
    blank[first, :, 0] = 0
    return attend_pages(q, blank, tables, lengths, **shape)


@mutant("own: a key that is counted and not read", "ATT-1")
class FirstKeyReadAsZero(OverCache):
    """The first key of a rank is masked to zero, where it should take its share."""

    cache_class = attending(_without_first_key)


def first_keys(most: int) -> Attend:
    """Attention over the first so many keys of a rank."""

    def attend(
        q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
    ) -> tuple[Tensor, Tensor]:
        return attend_pages(q, pages, tables, lengths.clamp(max=most), **shape)

    return attend


@mutant("own: attention stops after its first chunk", "ATT-1")
class OneChunkAttended(OverCache):
    """Keys are gathered chunk by chunk (here of 24 slots), and only the first chunk is read."""

    cache_class = attending(first_keys(24))


# RoPE


@mutant("TensorRT-LLM #8104, #9369, SGLang #32098", "POS-2")
class RopeByLocalIndex(OverCache):
    """RoPE of new tokens uses the number of tokens on this rank, not the global position."""

    class Cache(HelixCache):
        def _start(self, plan: Step) -> DecodeStep:
            step, model = super()._start(plan), self.config.model
            local = self._put(np.pad(step.book.past_len, (0, plan.pad)))
            cos, sin = rope_table(local, model.rope_dim, model.rope_base)
            return dataclasses.replace(step, cos=cos, sin=sin)

    cache_class = Cache


@mutant("TensorRT-LLM #9647", "ATT-1")
class InactiveSkipsQuery(OverCache):
    """An inactive rank leaves out the query's RoPE together with the write."""

    class Cache(HelixCache):
        def _start(self, plan: Step) -> DecodeStep:
            step = super()._start(plan)
            owns = (step.slots >= 0)[:, None, None]
            cos, sin = step.cos.where(owns, 1), step.sin.where(owns, 0)
            return dataclasses.replace(step, cos=cos, sin=sin)

    cache_class = Cache


def _half_angles(positions: Tensor, dim: int, base: float) -> tuple[Tensor, Tensor]:
    powers = torch.tensor([base ** (-2 * d / dim) for d in range(dim // 2)])
    angles = (positions[:, None, None] * powers).half().double()
    return angles.cos().float(), angles.sin().float()


@mutant("own: RoPE angles in half precision", "POS-2")
class RopeAnglesInHalf(OverCache):
    """Angles are rounded to 11 bits: fine at the first positions, worse at each one after."""

    class Cache(HelixCache):
        _prompt = rebound(HelixCache._prompt, rope_table=_half_angles)

    cache_class = Cache


@mutant("own: a sign that is 0 at position 0", "POS-2")
class SignOfPositionZero(OverCache):
    """Keys are turned by the sign of their position, and the very first key is wiped out."""

    class Cache(HelixCache):
        def _prompt(
            self, plan: Admission, prompt_kv: PromptKV, rotated: bool
        ) -> tuple[Tensor, Tensor | None] | None:
            def signed(positions: Tensor) -> tuple[Tensor, Tensor | None]:
                k, v = prompt_kv(positions)
                return k * positions.sign()[:, None, None].to(k.dtype), v

            return super()._prompt(plan, signed, rotated)

    cache_class = Cache


# What is written


@mutant("own: a write that is reported nowhere", "PAGE-4")
class InactiveWritesSilently(OverCache):
    """An inactive rank says -1 and writes its next slot all the same, where its page is open."""

    class Cache(HelixCache):
        def _start(self, plan: Step) -> DecodeStep:
            step, t = super()._start(plan), self.book.layout.tokens_per_block
            index, here = step.book.past_len, self.book.cp_rank
            rows = np.flatnonzero(index % t + step.book.active)  # a page begun, or its own token
            pages = self.book.tables.page(step.book.rows[rows], index[rows] // t)
            assert here >= 0
            slots = step.slots.clone()
            slots[self._put(rows)] = self._put(pages * t + index[rows] % t)
            return dataclasses.replace(step, slots=slots)

    cache_class = Cache


@mutant("own: the last layer is left out", "OWN-1")
class LastLayerNotAppended(OverCache):
    """New tokens are appended in all layers but the last of several."""

    class Cache(HelixCache):
        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            if layer and layer == self.config.model.layers - 1:
                step = dataclasses.replace(step, slots=torch.full_like(step.slots, -1))
            return super().attend(step, layer, *given, **how)

    cache_class = Cache


@mutant("own: a page cleared too late", "OWN-1")
class PageClearedTooLate(OverCache):
    """Clearing a page that was just taken overtakes the write of the token that opened it."""

    class Cache(HelixCache):
        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            output = super().attend(step, layer, *given, **how)
            self._clear(step.book.taken)
            return output

    cache_class = Cache


@mutant("own: a copy on write that is a token short", "OWN-1", features=["fork", "speculative"])
class CopyOneTokenShort(OverCache):
    """The last token before the one that is written is not copied."""

    class Cache(HelixCache):
        def _copy(self, copies: list[PageCopy]) -> None:
            super()._copy([copy._replace(tokens=max(0, copy.tokens - 1)) for copy in copies])

    cache_class = Cache


# Graphs and padding


@mutant("TensorRT-LLM #10141, vLLM #36070", "OWN-2", "ATT-1")
class GraphReplaysStaleFlags(OverCache):
    """A captured graph keeps the owner flags of its first step of that batch size.

    No graph is captured here: the rows that write are those of the first such step, while
    slots and lengths are fresh. So past a boundary the new owner attends to what nobody wrote.
    """

    class Cache(HelixCache):
        def _start(self, plan: Step) -> DecodeStep:
            step = super()._start(plan)
            if not hasattr(self, "captured"):
                self.captured: dict[int, Tensor] = {}
            kept = self.captured.setdefault(len(step.slots), step.slots >= 0)
            return dataclasses.replace(step, slots=step.slots.where(kept, -1))

    cache_class = Cache


@mutant("vLLM #36580", "DUM-1", "PAGE-4", features=["padding"])
class StalePaddingSlots(OverCache):
    """Behind the real rows the buffer of slots keeps what the last, larger step left there."""

    class Cache(HelixCache):
        def _start(self, plan: Step) -> DecodeStep:
            step = super()._start(plan)
            if not hasattr(self, "buffer"):
                self.buffer = np.full(64, -1)
            n = len(step.book.slots)
            self.buffer[:n] = step.book.slots
            slots = self._put(self.buffer[: n + plan.pad].copy())
            return dataclasses.replace(step, slots=slots)

    cache_class = Cache


@mutant("vLLM #49757", "DUM-1", features=["padding"])
class DummyWritesLivePages(OverCache):
    """Dummy rows find their slot through the block tables' rows behind those of the batch."""

    class Cache(HelixCache):
        def _start(self, plan: Step) -> DecodeStep:
            step = super()._start(plan)
            n, t = len(step.book.rows), self.book.layout.tokens_per_block
            rows = np.arange(n, n + plan.pad)
            self.book.tables.begin(n + plan.pad, [])  # a row for each of the largest batch
            pages = self.book.tables.read(rows, 1)[:, 0]
            slots = torch.cat([step.slots[:n], self._put(pages * t)])
            return dataclasses.replace(step, slots=slots)

    cache_class = Cache


# Partials


def told(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> Attend:
    """Attention whose output and log-sum-exp are changed, given them and the lengths."""

    def attend(
        q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
    ) -> tuple[Tensor, Tensor]:
        return change(*attend_pages(q, pages, tables, lengths, **shape), lengths)

    return attend


def _base_two(output: Tensor, lse: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    return output, lse * torch.tensor(2.0).log().reciprocal()


@mutant("vLLM #28840", "ATT-1")
class LseBaseMixed(OverCache):
    """A log-sum-exp of base 2 is merged with the natural exponential."""

    cache_class = attending(told(_base_two))


def _emptied(output: float, lse: float) -> Attend:
    """Attention that gives a request without keys these."""

    def attend(
        q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
    ) -> tuple[Tensor, Tensor]:
        outputs, lses = attend_pages(q, pages, tables, lengths, **shape)
        empty = lengths == 0
        outputs[empty], lses[empty] = output, lse
        return outputs, lses

    return attend


def _weighted_sum(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """The merge without care for partials of weight 0."""
    weights = (lses - lses.amax(0)).exp()
    shares = (weights / weights.sum(0))[..., None]
    return (shares * outputs.float()).sum(0), lses.logsumexp(0)


@mutant("TensorRT-LLM #15383, vLLM #46076, SGLang 0.5.23", "ATT-3")
class EmptyNanTimesZero(OverCache):
    """An empty rank's output is 0/0, and the merge multiplies it by its weight of 0."""

    class Cache(HelixCache):
        _attended = rebound(
            HelixCache._attended, attend_pages=_emptied(float("nan"), -float("inf"))
        )
        combine = rebound(HelixCache.combine, merge=_weighted_sum)

    cache_class = Cache


@mutant("vLLM #38416", "ATT-3")
class EmptyFiniteLse(OverCache):
    """An empty rank reports a log-sum-exp of 0 with what lay in its memory."""

    cache_class = attending(_emptied(1.5, 0.0))


@mutant("SGLang 0.5.23, merge of MHA", "ATT-3")
class EmptyPlusInf(OverCache):
    """An empty rank reports a log-sum-exp of +inf."""

    cache_class = attending(_emptied(0.0, float("inf")))


def _by_local_query(
    q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
) -> tuple[Tensor, Tensor]:
    heads, kv_heads = q.shape[1], pages.shape[3]
    group = max(1, heads // kv_heads // 2)
    kv_of = (torch.arange(heads) // group).clamp(max=kv_heads - 1)
    return attend_pages(q, pages[:, :, :, kv_of], tables, lengths, **shape)


@mutant("SGLang #34161", "ATT-1")
class KvHeadByLocalQuery(OverCache):
    """The KV head of a query head comes from a head count that is too small by half.

    As when the count is that of the heads after the exchange, at cp_size 2.
    """

    cache_class = attending(_by_local_query)


def _in_bfloat16(
    q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
) -> tuple[Tensor, Tensor]:
    return attend_pages(q, pages.bfloat16(), tables, lengths, **shape)


@mutant("own: attention reads a copy of the cache in less precision", "ATT-4")
class CacheReadInBfloat16(OverCache):
    """Cached rows are exact, yet attention converts them to bfloat16 on the way."""

    cache_class = attending(_in_bfloat16)


# Exchange and merge


def _transposed(output: Tensor, lse: Tensor, ranks: int, wire: torch.dtype) -> Tensor:
    n, heads, dim = output.shape
    strided = output.view(n, heads // ranks, ranks, dim).transpose(1, 2).reshape(n, heads, dim)
    lses = lse.view(n, heads // ranks, ranks).transpose(1, 2).reshape(n, heads)
    return pack(strided, lses, ranks, wire)


@mutant("TensorRT-LLM, layouts of heads", "MAP-1")
class HeadChunkTransposed(OverCache):
    """Rank d is sent heads d, d + C, d + 2C and so on, in place of a chunk of neighbours."""

    cache_class = packing(_transposed)


def _to_the_left(output: Tensor, lse: Tensor, ranks: int, wire: torch.dtype) -> Tensor:
    return pack(output, lse, ranks, wire).roll(1, 0)


@mutant("own: every chunk is sent to the next rank", "MAP-1")
class ChunksSentToTheNext(OverCache):
    """The exchange is off by one rank, for output and log-sum-exp alike."""

    cache_class = packing(_to_the_left)


def _in_fp8(output: Tensor, lse: Tensor, ranks: int, wire: torch.dtype) -> Tensor:
    return pack(output.to(torch.float8_e4m3fn).float(), lse, ranks, wire)


@mutant("TensorRT-LLM _attn_impl", "ATT-4")
class PartialsQuantized(OverCache):
    """Partials are cast to fp8 before the merge, whatever `partial_dtype` says."""

    cache_class = packing(_in_fp8)


def _narrow_lse(output: Tensor, lse: Tensor, ranks: int, wire: torch.dtype) -> Tensor:
    return pack(output, lse.to(torch.bfloat16).float(), ranks, wire)


@mutant("own: a log-sum-exp narrowed in the send buffer", "ATT-4")
class SendBufferNarrowed(OverCache):
    """The log-sum-exp shares a buffer of bfloat16 with 16-bit outputs."""

    cache_class = packing(_narrow_lse)


def _mean(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    held = (lses > -torch.inf).float()[..., None]
    return (outputs.float() * held).sum(0) / held.sum(0).clamp(min=1), lses.logsumexp(0)


@mutant("general", "ATT-1")
class MergeMean(OverCache):
    """Partials are averaged, each rank that has keys alike."""

    cache_class = merging(_mean)


def _largest_only(
    q: Tensor, pages: Tensor, tables: Tensor, lengths: Tensor, **shape: Any
) -> tuple[Tensor, Tensor]:
    output, _ = attend_pages(q, pages, tables, lengths, **shape)
    sharp = 2.0**12
    _, lse = attend_pages(q.float() * sharp, pages.float(), tables, lengths, **shape)
    return output, lse / sharp  # tends to the largest score


@mutant("general", "ATT-1")
class MergeByMaximum(OverCache):
    """Partials are weighted by their largest score alone, not by the sum of their weights."""

    cache_class = attending(_largest_only)


def _by_arrival(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    return merge(outputs.flip(0), lses)


@mutant("own: a sink on every rank", "ATT-1")
class SinkOnEveryRank(OverCache):
    """Each rank counts a head's sink among its own keys, so that C of them are merged."""

    class Cache(HelixCache):
        sinks: Tensor | None = None

        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            self.sinks = how["sinks"]
            if self.sinks is not None:
                how["sinks"] = torch.full_like(self.sinks, -torch.inf)
            return super().attend(step, layer, *given, **how)

        def _attended(self, *given: Any) -> tuple[Tensor, Tensor]:
            output, lse = super()._attended(*given)
            if self.sinks is None:
                return output, lse
            return beside_sinks(output, lse, self.sinks), torch.logaddexp(lse, self.sinks)

    cache_class = Cache


@mutant("own: sinks ignored", "ATT-1")
class SinksIgnored(OverCache):
    """The merged output is handed out as if no head had a sink."""

    class Cache(HelixCache):
        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            if how["sinks"] is not None:
                how["sinks"] = torch.full_like(how["sinks"], -torch.inf)
            return super().attend(step, layer, *given, **how)

    cache_class = Cache


@mutant("own: sinks of the first rank's heads", "ATT-1")
class SinksOfTheFirstSlice(OverCache):
    """After the exchange every rank takes the sinks of the first heads."""

    class Cache(HelixCache):
        def _checked_sinks(self, sinks: Tensor | None, shape: tuple[int, ...]) -> list[Tensor]:
            heads = self.q_heads // self.book.layout.cp_size
            return [] if sinks is None else [sinks[..., :heads]]

    cache_class = Cache


@mutant("own: outputs in the order of arrival", "ATT-1")
class MergeInArrivalOrder(OverCache):
    """Outputs are merged as they come in, here the last rank first, with weights in rank order."""

    cache_class = merging(_by_arrival)


@mutant("vLLM 0.33.0, cp_lse_ag_out_rs at world size 1", "ATT-1")
class MergeOfOneRank(OverCache):
    """With one rank nothing is merged, and row 0 is handed out for the whole batch."""

    class Cache(HelixCache):
        def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
            output = super().attend(step, layer, *given, **how)
            return output if self.book.layout.cp_size > 1 else output[:1].expand_as(output)

    cache_class = Cache


@mutant("TensorRT-LLM #10350", "MAP-1", tp_sizes=[2, 1])
class RankOrderTpFastest(OverCache):
    """The tensor-parallel rank varies fastest: right at tp_size 1 or cp_size 1."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Take the other rank's place."""
        cp_size = config.world_size // config.tp_size
        cp_rank, tp_rank = divmod(self.rank, config.tp_size)
        self.rank = tp_rank * cp_size + cp_rank
        return super().start(config, profiles)


# Liveness


class _SkipsWhenEmpty(HelixCache):
    def attend(self, step: DecodeStep, layer: int, *given: Any, **how: Any) -> Any:
        if self.book.layout.cp_size > 1 and not step.lengths.any():
            n, heads = len(step.book.rows), self.q_heads // self.book.layout.cp_size
            return given[0].new_zeros(n, heads, self.config.model.value_dim)
        return super().attend(step, layer, *given, **how)


@mutant("vLLM #40996", "LIVE-1")
class RankLocalBranchGuardsCollective(OverCache):
    """A rank without keys for any request of the batch skips the exchange."""

    cache_class = _SkipsWhenEmpty


@mutant("vLLM #40996, its ranks in processes over gloo", "LIVE-1", tier="pool")
class ProcessLeavesOutCollective(OverCache):
    """The same in real processes: the peers would wait for ever, and the rank is named in time."""

    cache_class = _SkipsWhenEmpty
