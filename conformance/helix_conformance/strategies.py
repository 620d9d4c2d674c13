"""Hypothesis strategies for layouts, configurations and traces.

They are part of the package: an engine's own tests may draw from them. A strategy says what is
valid, not how likely; simple values come first, so that failures shrink to few ranks, small
pages and few events. Bounds are keyword-only; impossible ones raise.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Sequence
from typing import Final, get_args

import msgspec
from hypothesis import strategies as st

from helix_reference.model import Model
from helix_spec.configs import Config, DType, ModelShape
from helix_spec.events import (
    FEATURES,
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Preempt,
    Release,
    Resume,
    Sampled,
    Skip,
    features_of,
)
from helix_spec.layouts import (
    NAMED_LAYOUTS,
    DecodeOwner,
    Layout,
    PagePolicy,
    PromptSplit,
    Start,
    format_layout,
    layout_problem,
    named_layout,
)
from helix_spec.traces import Trace

BLOCK_SIZES: Final = (1, 2, 3, 4, 8)
LAYOUT_NAMES: Final = (*NAMED_LAYOUTS, "custom")


@st.composite
def layouts(
    draw: st.DrawFn,
    *,
    names: Sequence[str] = LAYOUT_NAMES,
    cp_sizes: Sequence[int] = (1, 2, 3, 4, 8),
    block_sizes: Sequence[int] = BLOCK_SIZES,
) -> Layout:
    """Legal layouts: the named ones asked for, and with `custom` any other legal combination."""
    unknown = set(names) - set(LAYOUT_NAMES)
    if unknown:
        raise ValueError(f"There is no layout named {sorted(unknown)[0]!r}.")
    name = draw(st.sampled_from(list(names)))
    cp_size = draw(st.sampled_from(list(cp_sizes)))
    t = draw(st.sampled_from(list(block_sizes)))
    divisors = st.sampled_from([i for i in range(1, t + 1) if t % i == 0])
    if name != "custom":
        takes_interleave = NAMED_LAYOUTS[name].prompt == "interleave"
        interleave = draw(divisors) if takes_interleave else None
        return named_layout(name, cp_size=cp_size, tokens_per_block=t, interleave=interleave)
    prompt = draw(st.sampled_from(get_args(PromptSplit)))
    owner = draw(st.sampled_from(get_args(DecodeOwner)))
    layout = Layout(
        prompt,
        owner,
        draw(st.sampled_from(get_args(PagePolicy))),
        draw(st.sampled_from(get_args(Start))),
        cp_size,
        t,
        prompt_interleave=draw(divisors) if prompt == "interleave" else None,
        owner_interleave=draw(divisors) if owner == "interleave" else None,
    )
    return layout if layout_problem(layout) is None else _made_lazy(layout)


def _made_lazy(layout: Layout) -> Layout:
    """The same rules under the page policy that is legal for all of them."""
    return dataclasses.replace(layout, pages="lazy")


@st.composite
def model_shapes(
    draw: st.DrawFn,
    *,
    cp_size: int,
    tp_size: int = 1,
    dtypes: Sequence[DType] = get_args(DType),
    head_dims: Sequence[int] = (8, 16, 64),
    max_layers: int = 2,
) -> ModelShape:
    """Shapes whose heads divide over these ranks: MHA, GQA and MQA."""
    kv_heads = tp_size * draw(st.integers(1, 2))
    world = tp_size * cp_size
    # The fewest query heads that divide both by the KV heads and by the ranks, or twice that.
    least = next(q for q in range(kv_heads, kv_heads * world + 1, kv_heads) if q % world == 0)
    dtype = draw(st.sampled_from(list(dtypes)))
    return ModelShape(
        layers=draw(st.integers(1, max_layers)),
        q_heads=least * draw(st.integers(1, 2)),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from(list(head_dims))),
        dtype=dtype,
        partial_dtype=draw(st.sampled_from(list(dict.fromkeys(("float32", dtype))))),
    )


@st.composite
def configs(
    draw: st.DrawFn,
    *,
    names: Sequence[str] = LAYOUT_NAMES,
    cp_sizes: Sequence[int] = (1, 2, 3, 4, 8),
    tp_sizes: Sequence[int] = (1,),
    max_world: int | None = None,
    features: Collection[str] = FEATURES,
    max_pages: int = 12,
) -> Config:
    """Legal configurations; pools differ from rank to rank, and are often too small."""
    world = max_world or max(cp_sizes) * max(tp_sizes)
    fitting = [c for c in cp_sizes if c <= world]
    if not fitting:
        raise ValueError(f"None of the cp_sizes {list(cp_sizes)} fits {world} ranks.")
    layout = draw(layouts(names=names, cp_sizes=fitting))
    tp_size = draw(st.sampled_from([p for p in tp_sizes if p * layout.cp_size <= world]))
    pages = draw(
        st.lists(st.integers(1, max_pages), min_size=layout.cp_size, max_size=layout.cp_size)
    )
    return Config(
        layout=format_layout(layout),
        # Spare pages on every rank now and then: high page numbers, and room for long requests.
        pages=[count + spare for spare in [draw(st.sampled_from([0, 40]))] for count in pages],
        max_len=draw(st.sampled_from([200, 24])),
        model=draw(model_shapes(cp_size=layout.cp_size, tp_size=tp_size)),
        tp_size=tp_size,
        overlap="overlap" in features and draw(st.booleans()),
        seed=draw(st.integers(0, 3)),
    )


class Intent(msgspec.Struct, frozen=True):
    """One wish about the next event, in numbers that mean something whatever the state.

    `realise` turns it into events that fit the state, so that dropping one wish from a list
    leaves the others meaningful, and lists of wishes shrink well.
    """

    kind: str
    size: int = 1
    """Prompt length of an admission."""
    picks: tuple[int, ...] = (0,)
    """Which of the fitting requests: each modulo their number."""
    query_lens: tuple[int, ...] = (1,)
    times: int = 1
    pad: int = 0
    kept: int = 1


_KINDS: Final[dict[str, str | None]] = {
    "decode": None,
    "admit": None,
    "release": None,
    "skip": None,
    "accept": "speculative",
    "fork": "fork",
    "preempt": "preempt",
    "resume": "preempt",
    "sampled": "overlap",
    "wrong": None,
}
"""Kinds of intents, with the feature that each needs."""


@st.composite
def intents(draw: st.DrawFn, *, features: Collection[str] = FEATURES) -> Intent:
    """Wishes that an engine of these features can be asked to fulfil."""
    kinds = [kind for kind, needs in _KINDS.items() if needs is None or needs in features]
    kind = draw(st.sampled_from(["decode", "decode", "admit", *kinds]))
    longest = 7 if "speculative" in features else 1
    most = 3 if "padding" in features else 0
    return Intent(
        kind,
        size=draw(st.integers(1, 40)),
        picks=tuple(draw(st.lists(st.integers(0, 7), min_size=1, max_size=4))),
        query_lens=tuple(draw(st.lists(st.integers(1, longest), min_size=1, max_size=3))),
        times=draw(st.sampled_from([1, 2, 5, 9])) if kind == "decode" else 1,
        pad=draw(st.integers(0, most)),
        kept=draw(st.integers(1, longest)),
    )


def realise(model: Model, intent: Intent) -> list[Event]:
    """The events that an intent means in this state of the model."""
    live = [id for id, request in model.requests.items() if not request.preempted]
    gone = [id for id, request in model.requests.items() if request.preempted]
    fresh = next(id for id in range(len(model.requests) + 1) if id not in model.requests)
    picked = list(dict.fromkeys(live[pick % len(live)] for pick in intent.picks)) if live else []
    lens = [intent.query_lens[i % len(intent.query_lens)] for i in range(len(picked))]
    if intent.kind == "wrong":
        return [_wrong_event(intent, live, fresh)]
    if intent.kind == "resume" and gone:
        return [Resume(gone[intent.picks[0] % len(gone)])]
    if not live or intent.kind == "admit":
        return [Admit(fresh, intent.size)]
    match intent.kind:
        case "decode":
            return [Decode(picked, lens, intent.pad)] * intent.times
        case "skip":
            return [Skip(picked, lens)]
        case "accept":
            group = model.requests[picked[0]].open_group
            return [Accept(picked[0], min(intent.kept, group) if group else intent.kept)]
        case "fork":
            return [Fork(picked[0], fresh)]
        case "preempt":
            return [Preempt(picked[0])]
        case "sampled":
            return [Sampled(picked)]
        case _:
            return [Release(picked[0])]


def _wrong_event(intent: Intent, live: list[int], stranger: int) -> Event:
    """An event that must be refused, or nearly so: one of each mistake."""
    id = live[intent.picks[0] % len(live)] if live else stranger
    mistakes: list[Event] = [
        Decode([stranger], [1]),
        Release(stranger),
        Admit(id, intent.size),
        Admit(stranger, 0),
        Admit(stranger, 10**6),
        Decode([], []),
        Decode([id, id], [1, 1]),
        Decode([id], [0]),
        Decode([id], [1, 1]),
        Skip([stranger], [1]),
        Admit(stranger, -1),
        Decode([id], [1], -1),
        Decode([id, stranger], [1, 1]),
        Decode([id], [2]),
        Decode([id], [1], 1),
        Accept(id, 9),
        Accept(stranger, 1),
        Sampled([stranger]),
        Fork(stranger, stranger),
        Fork(id, id),
        Preempt(stranger),
        Resume(id),
        Resume(stranger),
    ]
    return mistakes[(intent.size + intent.picks[-1]) % len(mistakes)]


def realised(config: Config, features: Collection[str], wishes: Sequence[Intent]) -> Trace:
    """The trace that these wishes make of a configuration."""
    model, events = Model(config, features), list[Event]()
    for wish in wishes:
        for event in realise(model, wish):
            events.append(event)
            model.apply(event)
    return Trace(config=config, events=events)


@st.composite
def traces(
    draw: st.DrawFn,
    *,
    configs: st.SearchStrategy[Config],
    features: Collection[str] = FEATURES,
    max_wishes: int = 12,
) -> Trace:
    """Traces over these configurations, with events that need these features or none."""
    wishes = st.lists(intents(features=features), max_size=max_wishes)
    config = draw(configs)
    # Two lists in a row: twice the length at the same cost of shrinking.
    return realised(config, features, draw(wishes) + draw(wishes))
