"""What a sharded cache costs on paper: bytes, pages and the time of one decode step.

Times are those of a rank that reads its memory at full bandwidth and waits for its links: the
roofline of appendix A of the Helix paper (arXiv 2507.07120), with the exchange, the merge and the
reductions added as terms of their own. Token counts per rank are the closed forms of helix_spec,
so a layout's skew shows. All sizes are bytes, all times seconds, all rates bytes per second.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from pathlib import Path
from typing import Final, TypeVar

import msgspec

from helix_spec.layouts import Layout
from helix_spec.placement import ceil_div, local_len, pages_needed

LSE_BYTES: Final = 4
"""A log-sum-exp travels as float32."""


class PlanError(ValueError):
    """A plan that cannot be made; the message says what would be right."""


class Latent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Multi-head latent attention: what is cached is one row for all heads (DeepSeek-V2)."""

    kv_rank: int
    """Width of the cached latent."""
    rope_dim: int
    """Width of the cached rotary key."""
    q_rank: int
    """Width of the query's own latent."""


class Experts(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A mixture of experts in place of the feed-forward network."""

    routed: int
    active: int
    """Routed experts that a token visits."""
    shared: int
    ffn: int
    """Inner width of one expert."""
    dense_layers: int
    """Layers, the first ones, that have a plain feed-forward network."""


class ModelCard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The sizes of a model that a plan needs."""

    layers: int
    hidden: int
    q_heads: int
    kv_heads: int
    """KV heads; 1 with `latent`, whose row serves all query heads."""
    head_dim: int
    """Width of a head's value and, without `latent`, of its key."""
    ffn: int
    """Inner width of the gated feed-forward network (three matrices)."""
    vocabulary: int
    latent: Latent | None = None
    experts: Experts | None = None


class Hardware(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One rank's memory and its link to the others."""

    memory: float
    memory_bandwidth: float
    link_bandwidth: float
    """Per direction."""
    link_latency: float
    """Of one collective, however small."""
    step_overhead: float = 0.0
    """Of a layer, whatever its sizes: launches, or an interpreter."""


MODELS: Final = {
    # Meta, The Llama 3 Herd of Models, table 3.
    "llama-405b": ModelCard(126, 16384, 128, 8, 128, 53248, 128256),
    # DeepSeek-V3 technical report, section 4.2; R1 has the same shape.
    "deepseek-r1": ModelCard(
        61, 7168, 128, 1, 128, 18432, 129280, Latent(512, 64, 1536), Experts(256, 8, 1, 2048, 3)
    ),
}
HARDWARE: Final = {
    # NVIDIA data sheets; the latency of a small collective is that of TensorRT-LLM and vLLM
    # discussions, 10 microseconds over NVLink.
    "h200": Hardware(141e9, 4.8e12, 450e9, 10e-6),
    "gb200": Hardware(186e9, 8e12, 900e9, 10e-6),
}
Card = TypeVar("Card", ModelCard, Hardware)


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """What is served: a batch of requests of equal length, and the types."""

    batch: int
    prompt_len: int
    decoded: int = 0
    """Tokens decoded so far; context = prompt_len + decoded."""
    weight_bytes: float = 1.0
    """Bytes of one weight (fp8: 1)."""
    kv_bytes: float = 1.0
    """Bytes of one cached number (fp8: 1)."""
    partial_bytes: float = 2.0
    """Bytes of one number of a partial on the wire (bfloat16: 2)."""


class Split(msgspec.Struct, frozen=True, kw_only=True):
    """What one tp x cp split costs on its fullest rank; times are of one step, all layers."""

    tp: int
    cp: int
    tokens: int
    """Tokens of the whole batch on the fullest cp_rank."""
    pages: int
    """Pages of the whole batch there."""
    kv_bytes: float
    """Cache of the whole batch there, in whole pages."""
    weight_bytes: float
    weights: float
    kv: float
    exchange: float
    merge: float
    reduce: float
    overhead: float
    largest_batch: int
    """Requests of this length that fit beside the weights."""
    largest_context: int
    """Tokens that each request of this batch may have."""
    fits: bool

    @property
    def step(self) -> float:
        """Seconds from one token to the next."""
        return (
            self.weights + self.kv + self.exchange + self.merge + self.reduce + self.overhead
        )  # fmt: skip


def read_card(kind: type[Card], given: str, known: dict[str, Card]) -> Card:
    """A preset by its name, or a JSON file with the fields of `kind`. Raises PlanError."""
    if given in known:
        return known[given]
    try:
        return msgspec.json.decode(Path(given).read_bytes(), type=kind)
    except OSError as error:
        raise PlanError(
            f"{given!r} is neither {', '.join(known)} nor a readable JSON file: {error.strerror}."
        ) from None
    except msgspec.DecodeError as error:
        raise PlanError(f"{given} does not describe a {kind.__name__}: {error}.") from None


def parameters(model: ModelCard) -> float:
    """All weights of the model, embedding and output head included."""
    dense, mixture = _ffn_weights(model)
    sparse = _sparse_layers(model)
    attention = sum(_attention_weights(model))
    embeddings = 2 * model.vocabulary * model.hidden
    return (
        model.layers * attention + (model.layers - sparse) * dense + sparse * mixture + embeddings
    )


def splits(model: ModelCard, ranks: int) -> list[tuple[int, int]]:
    """(tp, cp) with tp * cp = ranks, tp at most the KV heads and dividing them. Raises PlanError.

    More than one rank for a KV head would store it twice: the limit that Helix removes by cp.
    """
    if ranks < 1 or model.q_heads % ranks:
        right = [n for n in range(1, model.q_heads + 1) if model.q_heads % n == 0]
        raise PlanError(
            f"{ranks} ranks do not divide {model.q_heads} query heads; {_listed(right)} do."
        )
    return [
        (tp, ranks // tp) for tp in range(1, ranks + 1) if not (ranks % tp or model.kv_heads % tp)
    ]


def plan(model: ModelCard, hardware: Hardware, layout: Layout, load: Load, tp: int) -> Split:
    """The cost of serving this load on tp * layout.cp_size ranks."""
    cp = layout.cp_size
    ranks = tp * cp
    tokens, pages = _fullest(layout, load.batch, load.prompt_len, load.decoded)
    row = kv_row(model, tp) * load.kv_bytes
    per_page = row * layout.tokens_per_block * model.layers
    weights = rank_weights(model, tp, cp) * load.weight_bytes
    read = rank_weights(model, tp, cp, load.batch) * load.weight_bytes
    partials = load.batch * (model.q_heads // tp) * _partial(model, load)
    # Of the partials of its query heads a rank keeps those of its own slice.
    wire = partials * (cp - 1) / cp
    merged = load.batch * (model.q_heads // ranks) * _partial_width(model) * load.partial_bytes
    # Two reductions of a hidden vector in each layer: after attention, after the feed-forward.
    hidden = 2 * load.batch * model.hidden * load.partial_bytes * (ranks - 1) / ranks
    room = max(0, (hardware.memory - weights) // per_page)
    return Split(
        tp=tp,
        cp=cp,
        tokens=tokens,
        pages=pages,
        kv_bytes=pages * per_page,
        weight_bytes=weights,
        weights=read / hardware.memory_bandwidth,
        kv=model.layers * tokens * row / hardware.memory_bandwidth,
        exchange=model.layers * _transfer(hardware, wire),
        merge=model.layers * (partials + merged) / hardware.memory_bandwidth if cp > 1 else 0.0,
        reduce=2 * model.layers * _transfer(hardware, hidden),
        overhead=model.layers * hardware.step_overhead,
        largest_batch=_largest(
            lambda batch: _fullest(layout, batch, load.prompt_len, load.decoded)[1] <= room
        ),
        largest_context=_largest(
            lambda context: _fullest(layout, load.batch, context, 0)[1] <= room
        ),
        fits=pages <= room,
    )


def best(plans: list[Split]) -> Split | None:
    """The fastest of those that fit."""
    return min((one for one in plans if one.fits), key=lambda one: one.step, default=None)


def kv_row(model: ModelCard, tp: int) -> int:
    """Numbers cached for one token and layer on one rank: 2 * ceil(K / tp) * D, or the latent."""
    if model.latent is not None:
        return model.latent.kv_rank + model.latent.rope_dim
    return 2 * ceil_div(model.kv_heads, tp) * model.head_dim


def rank_weights(model: ModelCard, tp: int, cp: int, batch: int | None = None) -> float:
    """Weights on one rank; with `batch` those that a step reads, experts nobody visits left out.

    Query, key and value projections are split over tp and replicated over cp; the output
    projection, feed-forward and output head are split over all ranks (Helix paper, section 2).
    With cp = 1 a layer has appendix A's (2 H Q/TPA + 2 H ceil(K/TPA)) Hsz + 3 H F/TPF.
    """
    ranks = tp * cp
    replicated, by_tp, by_all = _attention_weights(model)
    if model.latent is None:
        by_tp = model.hidden * model.head_dim * (
            model.q_heads / tp + 2 * ceil_div(model.kv_heads, tp)
        )  # fmt: skip
    else:
        by_tp /= tp
    dense, mixture = _ffn_weights(model, batch)
    sparse = _sparse_layers(model)
    spread = (model.layers - sparse) * dense + sparse * mixture + model.vocabulary * model.hidden
    embedding = 0 if batch is not None else model.vocabulary * model.hidden
    return (
        model.layers * (replicated + by_tp + by_all / ranks) + (spread + embedding) / ranks
    )  # fmt: skip


def _attention_weights(model: ModelCard) -> tuple[float, float, float]:
    """Weights of a layer's attention: on every rank, split over tp, split over all ranks."""
    h, q, d = model.hidden, model.q_heads, model.head_dim
    output = q * d * h
    if model.latent is None:
        return 0, h * d * (q + 2 * model.kv_heads), output
    r, rope = model.latent.kv_rank, model.latent.rope_dim
    down = h * (model.latent.q_rank + r + rope)
    up = model.latent.q_rank * q * (d + rope) + r * q * 2 * d
    return down, up, output


def _ffn_weights(model: ModelCard, batch: int | None = None) -> tuple[float, float]:
    """Weights of a plain feed-forward network, and of a mixture of experts.

    With `batch` the experts that so many tokens visit, if each visits any of them alike:
    routed * (1 - (1 - active/routed)^batch) of them are expected.
    """
    dense = 3 * model.hidden * model.ffn
    if model.experts is None:
        return dense, 0.0
    e = model.experts
    visited = e.routed if batch is None else e.routed * (1 - (1 - e.active / e.routed) ** batch)
    return dense, 3 * model.hidden * e.ffn * (visited + e.shared)


def _sparse_layers(model: ModelCard) -> int:
    return 0 if model.experts is None else model.layers - model.experts.dense_layers


def _partial_width(model: ModelCard) -> int:
    """Numbers of one head's partial output: with absorbed latent attention it is the latent."""
    return model.head_dim if model.latent is None else model.latent.kv_rank


def _partial(model: ModelCard, load: Load) -> float:
    return _partial_width(model) * load.partial_bytes + LSE_BYTES


def _transfer(hardware: Hardware, size: float) -> float:
    return hardware.link_latency + size / hardware.link_bandwidth if size else 0.0


def _fullest(layout: Layout, batch: int, prompt_len: int, decoded: int) -> tuple[int, int]:
    """Tokens and pages of a batch of equal requests on the cp_ranks that hold most."""
    c = layout.cp_size
    # Requests by their start shift: under `rotated` they take the shifts in turn.
    shifts = {0: batch}
    if layout.start == "rotated":
        shifts = {shift: len(range(shift, batch, c)) for shift in range(min(c, batch))}
    held = [local_len(layout, prompt_len, decoded, rank) for rank in range(c)]
    pages = [pages_needed(layout, prompt_len, decoded, rank) for rank in range(c)]

    def most(of: list[int]) -> int:
        return max(
            sum(count * of[(rank - shift) % c] for shift, count in shifts.items())
            for rank in range(c)
        )

    return most(held), most(pages)


def _largest(fits: Callable[[int], bool]) -> int:
    """The largest number that fits, where every smaller one does too; 0 when not even 1 does."""
    high = 1
    while fits(high):
        high *= 2
    low = high // 2
    return low + bisect_left(range(low + 1, high), True, key=lambda number: not fits(number))


def _listed(numbers: list[int]) -> str:
    return f"{', '.join(map(str, numbers[:-1]))} and {numbers[-1]}"
