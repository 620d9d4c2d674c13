"""Engines' own closed forms: each equal to a layout for all inputs, or told apart from it.

The formulas are restated from what the engines publish, with their own order of operations:

- vLLM: `get_dcp_local_seq_lens` and the slot mapping of its block table;
- vLLM's earlier FlashInfer backend: the interleave-1 length (pull request 25438);
- FlashInfer: rank r of W holds the global positions W*k + r, and sees those below a bound;
- TensorRT-LLM: `decode_block_id % cp_size == cp_rank` with `(py_decoding_iter - 1) // T` (pull
  request 9757), the length of a rank by super-blocks, as a function of the global
  position (pull request 17866), and shares of a prompt, each of what is left.

That an engine runs what is restated here is not proved; the adapters and their traces check it.
Where two rules differ, the theorem says where for all sizes, and the wrong claim that they are
the same is refuted by the smallest inputs that tell them apart.
"""

from __future__ import annotations

from helix_spec import placement
from helix_spec.layouts import Layout
from helix_spec.theorems import mutations as m
from helix_spec.theorems.base import Natural, Size, Wrong, assume, lemma, theorem
from helix_spec.theorems.lengths import chunk_count_step
from helix_spec.theorems.ownership import owner_in_range
from helix_spec.theorems.shapes import DEALING, EVERY_PROMPT, Pair

# The formulas.


def vllm_local_len(length: int, rank: int, world: int, interleave: int) -> int:
    """Return the length by `get_dcp_local_seq_lens`: full rounds, and what is left, clipped."""
    base = length // interleave // world * interleave
    remainder = length - base * world
    return base + max(0, min(remainder - rank * interleave, interleave))


def vllm_local_len_by_rounds(length: int, rank: int, world: int, interleave: int) -> int:
    """Return the same with one division by a whole round, as in vLLM's proposals and forks."""
    rounds = length // (interleave * world)
    left = length - rounds * interleave * world
    return rounds * interleave + max(0, min(left - rank * interleave, interleave))


def vllm_local_len_one(length: int, rank: int, world: int) -> int:
    """Return the length that an early FlashInfer backend of vLLM used, for interleave 1."""
    return length // world + (rank < length % world)


def vllm_slot(position: int, world: int, block: int, interleave: int) -> tuple[int, int, int]:
    """Return owner, row of the block table and offset in the page, by vLLM's slot mapping."""
    virtual_block = world * block
    row, inside = position // virtual_block, position % virtual_block
    owner = inside // interleave % world
    offset = inside // (world * interleave) * interleave + inside % interleave
    return owner, row, offset


def flashinfer_position(key: int, rank: int, world: int) -> int:
    """Return the global position of a rank's key under FlashInfer's cyclic context parallelism."""
    return world * key + rank


def flashinfer_visible(bound: int, rank: int, world: int) -> int:
    """Return how many keys k of the rank lie below an exclusive bound: world * k + rank < bound."""
    return max(0, (bound - rank + world - 1) // world)


def tensorrt_step_owner(decoding_iter: int, tokens_per_block: int, cp_size: int) -> int:
    """Return the owner by pull request 9757; py_decoding_iter counts from 1."""
    return (decoding_iter - 1) // tokens_per_block % cp_size


def tensorrt_position_owner(
    prompt: int, group_index: int, tokens_per_block: int, cp_size: int
) -> int:
    """Return the owner by pull request 17866: that of the global position."""
    return (prompt + group_index) // tokens_per_block % cp_size


def tensorrt_local_len(length: int, rank: int, tokens_per_block: int, cp_size: int) -> int:
    """Return the length by pull request 17866: full super-blocks, and a page of the last."""
    super_block = tokens_per_block * cp_size
    full, left = length // super_block, length % super_block
    return full * tokens_per_block + min(max(left - rank * tokens_per_block, 0), tokens_per_block)


# Wrong versions of them.


def _at_most(length: int, rank: int, world: int) -> int:
    return length // world + (rank <= (length - 1) % world)


def _round_of_owner(position: int, world: int, block: int, interleave: int) -> tuple[int, int, int]:
    owner, row, _ = _vllm_slot(position, world, block, interleave)
    return owner, row, position % block


def _row_by_page(position: int, world: int, block: int, interleave: int) -> tuple[int, int, int]:
    owner, _, offset = _vllm_slot(position, world, block, interleave)
    return owner, position // block, offset


def _bound_included(bound: int, rank: int, world: int) -> int:
    return (bound - rank + world) // world


def _iter_from_zero(decoding_iter: int, tokens_per_block: int, cp_size: int) -> int:
    return decoding_iter // tokens_per_block % cp_size


def _lagging(prompt: int, group_index: int, tokens_per_block: int, cp_size: int) -> int:
    return (prompt + max(0, group_index - 1)) // tokens_per_block % cp_size


_vllm_slot = vllm_slot
AT_MOST = Wrong(
    "r <= (L-1) mod C for r < L mod C",
    _at_most,
    "theorems.engines.vllm_local_len_one",
    "vLLM #27518",
)
OFFSET_OF_POSITION = Wrong(
    "offset of the global position", _round_of_owner, "theorems.engines.vllm_slot"
)
ROW_BY_PAGE = Wrong(
    "row by single pages", _row_by_page, "theorems.engines.vllm_slot", "vLLM #48003 family"
)
BOUND_INCLUDED = Wrong(
    "the bound itself is visible", _bound_included, "theorems.engines.flashinfer_visible"
)
FROM_ZERO = Wrong(
    "iterations counted from 0", _iter_from_zero, "theorems.engines.tensorrt_step_owner"
)
LAGGING = Wrong(
    "owner from the lagging counter",
    _lagging,
    "theorems.engines.tensorrt_position_owner",
    "TensorRT-LLM #17866 review",
)


# vLLM and FlashInfer.


def _vllm(c: int, t: int, i: int) -> Layout:
    return Pair("interleave", "interleave").layout(c, t, i, i)


@theorem(
    "vllm-lengths",
    proves="LEN-1",
    witness={"prompt": 5, "total": 9, "rank": 1, "c": 2, "t": 4, "i": 2},
    about=["theorems.engines.vllm_local_len", "placement.chunk_local_len"],
    kills=[m.no_clamp_from_above, m.lengths_interleave_one],
)
def vllm_lengths(prompt: Size, total: Size, rank: Natural, c: Size, t: Size, i: Size) -> bool:
    """VLLM's get_dcp_local_seq_lens is the local length of vllm_dcp(I), whatever part of the length
    is prompt.
    """
    assume(prompt <= total, rank < c)
    ours = placement.local_len(_vllm(c, t, i), prompt, total - prompt, rank)
    return vllm_local_len(total, rank, c, i) == ours


@theorem(
    "vllm-lengths-by-rounds",
    proves="LEN-1",
    witness={"length": 9, "rank": 1, "c": 2, "i": 2},
    about=["theorems.engines.vllm_local_len_by_rounds"],
)
def vllm_lengths_by_rounds(length: Natural, rank: Natural, c: Size, i: Size) -> bool:
    """Dividing by I*W at once, as the proposals write it, is the same."""
    assume(rank < c)
    ours = placement.chunk_local_len(length, rank, c, i)
    return vllm_local_len_by_rounds(length, rank, c, i) == ours


@theorem(
    "vllm-lengths-interleave-one",
    proves="LEN-1",
    witness={"length": 9, "rank": 1, "c": 2},
    about=["theorems.engines.vllm_local_len_one"],
    kills=[AT_MOST],
)
def vllm_lengths_interleave_one(length: Natural, rank: Natural, c: Size) -> bool:
    """The early interleave-1 length L // W + (r < L mod W) is that of vllm_dcp(1)."""
    assume(rank < c)
    ours = placement.chunk_local_len(length, rank, c, 1)
    return vllm_local_len_one(length, rank, c) == ours


@theorem(
    "vllm-slots",
    proves="OWN-1 GROW-1 PAGE-1",
    witness={"position": 9, "c": 2, "k": 2, "i": 2},
    about=["theorems.engines.vllm_slot", "placement.chunk_local_len"],
    kills=[OFFSET_OF_POSITION, ROW_BY_PAGE],
)
def vllm_slots(position: Natural, c: Size, k: Size, i: Size) -> bool:
    """VLLM's slot mapping (virtual blocks of W*B positions, I divides B) gives owner, page and
    offset of vllm_dcp(I).
    """
    block = k * i
    owner, row, offset = vllm_slot(position, c, block, i)
    rank = placement.chunk_owner(position, c, i)
    index = placement.chunk_local_len(position, rank, c, i)
    ours = placement.page_and_offset(index, block)
    return (owner == rank) & (row == ours[0]) & (offset == ours[1])


@theorem(
    "flashinfer-positions",
    proves="GROW-1",
    witness={"key": 4, "rank": 1, "c": 3},
    about=["theorems.engines.flashinfer_position", "placement.chunk_position"],
)
def flashinfer_positions(key: Natural, rank: Natural, c: Size) -> bool:
    """FlashInfer's cyclic cache is vllm_dcp(1): key k of rank r is position W*k + r."""
    assume(rank < c)
    return flashinfer_position(key, rank, c) == placement.chunk_position(key, rank, c, 1)


@theorem(
    "flashinfer-visible-keys",
    proves="LEN-3",
    witness={"prompt": 5, "position": 9, "rank": 1, "c": 3, "t": 4},
    about=["theorems.engines.flashinfer_visible", "placement.visible_len"],
    kills=[BOUND_INCLUDED],
)
def flashinfer_visible_keys(prompt: Size, position: Size, rank: Natural, c: Size, t: Size) -> bool:
    """The keys that FlashInfer lets a query at position p see (bound p + 1) are the visible keys of
    vllm_dcp(1), for decoded positions p.
    """
    assume(prompt <= position, rank < c)
    ours = placement.visible_len(_vllm(c, t, 1), prompt, position, rank)
    return flashinfer_visible(position + 1, rank, c) == ours


# TensorRT-LLM.


@theorem(
    "tensorrt-step-rule",
    proves="OWN-2 OWN-3",
    witness={"prompt": 5, "step": 9, "c": 2, "t": 4},
    about=["theorems.engines.tensorrt_step_owner", "placement.decode_owner"],
    kills=[FROM_ZERO],
    cases=EVERY_PROMPT,
)
def tensorrt_step_rule(pair: Pair, prompt: Size, step: Natural, c: Size, t: Size) -> bool:
    """TensorRT-LLM's rule on py_decoding_iter = n + 1 is the owner of step n in pr9757, pr13180."""
    ours = placement.decode_owner(pair.layout(c, t, t), prompt, step)
    return tensorrt_step_owner(step + 1, t, c) == ours


@theorem(
    "tensorrt-position-rule",
    proves="OWN-2 OWN-3",
    witness={"prompt": 5, "step": 9, "c": 2, "t": 4},
    about=["theorems.engines.tensorrt_position_owner", "placement.decode_owner"],
    kills=[LAGGING, m.step_where_position_is_meant],
)
def tensorrt_position_rule(prompt: Size, step: Natural, c: Size, t: Size) -> bool:
    """TensorRT-LLM's rule on the global position is the owner of step n in pr17866 and balanced
    (before its shift).
    """
    ours = placement.decode_owner(_pr17866(c, t), prompt, step)
    return tensorrt_position_owner(prompt, step, t, c) == ours


@theorem(
    "tensorrt-length-formula",
    proves="LEN-1",
    witness={"length": 9, "rank": 1, "c": 2, "t": 4},
    about=["theorems.engines.tensorrt_local_len", "placement.chunk_local_len"],
)
def tensorrt_length_formula(length: Natural, rank: Natural, c: Size, t: Size) -> bool:
    """Its length of a rank, by super-blocks of T*C, is the share of dealing blocks in turn."""
    assume(rank < c)
    ours = placement.chunk_local_len(length, rank, c, t)
    return tensorrt_local_len(length, rank, t, c) == ours


@theorem(
    "tensorrt-lengths",
    proves="LEN-1 LEN-2",
    witness={"prompt": 5, "total": 9, "rank": 1, "c": 2, "t": 4},
    about=["theorems.engines.tensorrt_local_len"],
    kills=[m.step_where_position_is_meant, LAGGING],
    free=[
        *DEALING,
        "theorems.engines.tensorrt_local_len",
        "theorems.engines.tensorrt_position_owner",
    ],
)
def tensorrt_lengths(prompt: Size, total: Size, rank: Natural, c: Size, t: Size) -> bool:
    """Its length of a rank is the local length of pr17866; past_seen_token_num, that length with
    the step's token less one where active, is the length before the step.
    """
    assume(prompt <= total, rank < c)
    lemma(tensorrt_length_formula, total, rank, c, t)
    lemma(tensorrt_length_formula, total + 1, rank, c, t)
    lemma(tensorrt_position_rule, prompt, total - prompt, c, t)
    lemma(owner_in_range, total, c, t)
    lemma(chunk_count_step, total, rank, c, t)
    before = placement.local_len(_pr17866(c, t), prompt, total - prompt, rank)
    active = tensorrt_position_owner(prompt, total - prompt, t, c) == rank
    in_flight = tensorrt_local_len(total + 1, rank, t, c)
    return (tensorrt_local_len(total, rank, t, c) == before) & (in_flight - active == before)


@theorem(
    "tensorrt-prompt-shares",
    proves="OWN-1",
    witness={"blocks": 7, "rank": 1, "c": 4},
    kills=[m.no_rank_takes_one_more, m.rounded_up_always],
)
def tensorrt_prompt_shares(blocks: Natural, rank: Natural, c: Size) -> bool:
    """Dealing the blocks of a prompt rank by rank, each rank an equal share of what is left,
    rounded up (pull request 9757), gives the contiguous split: when the ranks before r have their
    blocks, ceil(left / (C - r)) is what rank r has.
    """
    assume(rank < c)
    before = placement.contiguous_blocks_before(blocks, rank, c)
    share = placement.ceil_div(blocks - before, c - rank)
    return placement.contiguous_blocks_before(blocks, rank + 1, c) == before + share


def _pr17866(c: int, t: int) -> Layout:
    return Pair("round_robin", "position").layout(c, t)


@theorem(
    "vllm-by-blocks-is-pr17866",
    proves="OWN-1",
    witness={"prompt": 5, "total": 9, "rank": 1, "c": 2, "t": 4},
    kills=[m.interleave_ignored],
    free=DEALING,
)
def vllm_by_blocks_is_pr17866(prompt: Size, total: Size, rank: Natural, c: Size, t: Size) -> bool:
    """vllm_dcp with I = T is pr17866: same owner of every position, same lengths."""
    assume(prompt <= total, rank < c)
    one, other, steps = _vllm(c, t, t), _pr17866(c, t), total - prompt
    same_owner = placement.owner(one, prompt, total) == placement.owner(other, prompt, total)
    lengths = placement.local_len(one, prompt, steps, rank)
    return same_owner & (lengths == placement.local_len(other, prompt, steps, rank))


# Told apart.


@theorem(
    "apart-step-and-position",
    proves="EQ-1",
    witness={"c": 2, "t": 4},
)
def apart_step_and_position(c: Size, t: Size) -> bool:
    """TensorRT-LLM's step rule and position rule differ at step 0 of every prompt of one block, for
    every C >= 2.
    """
    assume(c >= 2)
    return tensorrt_step_owner(1, t, c) != tensorrt_position_owner(t, 0, t, c)


@apart_step_and_position.wrong()
def step_is_position(prompt: Size, step: Natural, c: Size, t: Size) -> bool:
    """TensorRT-LLM's step rule and position rule are the same."""
    return tensorrt_step_owner(step + 1, t, c) == tensorrt_position_owner(prompt, step, t, c)


@theorem(
    "apart-vllm-and-pr17866",
    proves="OWN-1",
    witness={"c": 2, "k": 2, "i": 2},
)
def apart_vllm_and_pr17866(c: Size, k: Size, i: Size) -> bool:
    """vllm_dcp(I) with I < T and pr17866 put position I on different ranks, for every C >= 2."""
    assume(c >= 2, k >= 2)
    return placement.chunk_owner(i, c, i) != placement.chunk_owner(i, c, k * i)


@apart_vllm_and_pr17866.wrong()
def vllm_is_pr17866(position: Natural, c: Size, k: Size, i: Size) -> bool:
    """The owners of vllm_dcp(I) and pr17866 are the same."""
    return placement.chunk_owner(position, c, i) == placement.chunk_owner(position, c, k * i)


@theorem(
    "apart-flashinfer-and-interleave",
    proves="OWN-1",
    witness={"c": 2, "i": 2},
)
def apart_flashinfer_and_interleave(c: Size, i: Size) -> bool:
    """FlashInfer's cyclic cache and vllm_dcp(I) with I >= 2 put position 1 on different ranks, for
    every C >= 2.
    """
    assume(c >= 2, i >= 2)
    return placement.chunk_owner(1, c, 1) != placement.chunk_owner(1, c, i)


@apart_flashinfer_and_interleave.wrong()
def flashinfer_is_interleave(key: Natural, rank: Natural, c: Size, i: Size) -> bool:
    """FlashInfer's cyclic cache and vllm_dcp(I) are the same."""
    assume(rank < c)
    return flashinfer_position(key, rank, c) == placement.chunk_position(key, rank, c, i)


@theorem(
    "apart-prompt-splits",
    proves="OWN-1",
    witness={"c": 2, "t": 3},
)
def apart_prompt_splits(c: Size, t: Size) -> bool:
    """A contiguous prompt (pr9757) and one dealt in turn (pr13180) of C+1 blocks put the second
    block on different ranks, for every C >= 2.
    """
    assume(c >= 2)
    prompt = (c + 1) * t
    return placement.contiguous_owner(t, prompt, c, t) != placement.chunk_owner(t, c, t)


@apart_prompt_splits.wrong()
def contiguous_is_round_robin(position: Natural, prompt: Size, c: Size, t: Size) -> bool:
    """A contiguous prompt and one dealt in turn are the same."""
    assume(position < prompt)
    owner = placement.contiguous_owner(position, prompt, c, t)
    return owner == placement.chunk_owner(position, c, t)


@theorem(
    "apart-before-and-after-9757",
    proves="OWN-3 BAL-2",
    witness={"prompt": 4, "c": 2, "t": 3},
)
def apart_before_and_after_9757(prompt: Size, c: Size, t: Size) -> bool:
    """Before pull request 9757 rank C-1 owned every step, after it rank 0 owns step 0: they differ
    for every C >= 2.
    """
    assume(c >= 2)
    before = placement.decode_owner(Pair("contiguous", "last_rank").layout(c, t), prompt, 0)
    return before != placement.decode_owner(Pair("contiguous", "step").layout(c, t), prompt, 0)


@apart_before_and_after_9757.wrong()
def before_is_after(prompt: Size, step: Natural, c: Size, t: Size) -> bool:
    """The rules before and after pull request 9757 are the same."""
    before = placement.decode_owner(Pair("contiguous", "last_rank").layout(c, t), prompt, step)
    return before == placement.decode_owner(Pair("contiguous", "step").layout(c, t), prompt, step)
