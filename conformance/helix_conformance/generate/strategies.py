"""Hypothesis strategies for layouts, configurations and traces.

They are part of the package: an engine's own tests may draw from them. A strategy says what is
valid, not how likely; simple values come first, so that failures shrink to few ranks, small
pages and few events. Bounds are keyword-only; impossible ones raise.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import lru_cache
from itertools import count, islice, permutations
from typing import Any, Final, get_args

import msgspec
from hypothesis import strategies as st

from helix_conformance.expect.recorder import Recorder
from helix_spec.config import Admission, Config, DType, LatentShape, ModelShape, config_problem
from helix_spec.events import (
    FEATURES,
    MERGE,
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Preempt,
    Release,
    Resume,
    Sampled,
    Skip,
)
from helix_spec.layouts import (
    NAMED_LAYOUTS,
    DecodeOwner,
    Layout,
    PagePolicy,
    PromptSplit,
    Start,
    named_layout,
)
from helix_spec.trace import Trace

BLOCK_SIZES: Final = (1, 2, 3, 4, 8, 16, 32)
WIDE: Final = 256
"""Query heads times elements: a wider model has one layer."""
AMPLE: Final = 100
"""Pages of a pool that random traces rarely exhaust."""
MAX_LENS: Final = (200, 24, 2000, 200, 24, 2000, 9)
"""The last is less than a page may hold; a model of long requests is narrow, for time."""
LONG_PREFILL: Final = 600
"""Of a request whose prompt the engine itself attends over: its cost is quadratic."""
FAR_MAX_LEN: Final = 70_000
"""Where contents are not looked at: positions, steps and pages that 16 or 8 bits do not hold."""
LAYOUT_NAMES: Final = (*NAMED_LAYOUTS, "custom")
_LOCKSTEP_RULES: Final[list[tuple[PromptSplit, DecodeOwner]]] = [
    ("round_robin", "position"),
    ("interleave", "interleave"),
]


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
    pages = draw(st.sampled_from(get_args(PagePolicy)))
    if pages == "lazy":
        prompt = draw(st.sampled_from(get_args(PromptSplit)))
        owner = draw(st.sampled_from(get_args(DecodeOwner)))
    else:  # lockstep is legal for few rules only
        prompt, owner = draw(st.sampled_from(_LOCKSTEP_RULES))
    prompt_interleave = draw(divisors) if prompt == "interleave" else None
    owner_interleave = draw(divisors) if owner == "interleave" else None
    if pages == "lockstep" and owner == "interleave":
        owner_interleave = prompt_interleave
    return Layout(
        prompt,
        owner,
        pages,
        draw(st.sampled_from(get_args(Start))),
        cp_size,
        t,
        prompt_interleave=prompt_interleave,
        owner_interleave=owner_interleave,
    )


@st.composite
def model_shapes(
    draw: st.DrawFn,
    *,
    cp_size: int,
    tp_size: int = 1,
    dtypes: Sequence[DType] = get_args(DType),
    head_dims: Sequence[int] = (16, 32, 64, 16, 32, 64, 128),
    latents: Sequence[LatentShape] = (
        LatentShape(latent_dim=32, rope_dim=16),
        LatentShape(latent_dim=64, rope_dim=16),
    ),
    max_layers: int = 3,
) -> ModelShape:
    """Shapes whose heads divide over these ranks: MHA, GQA, MQA and MLA, caches of 8 bits too.

    A wide one has a single layer, so that no trace takes long.
    """
    latent = draw(st.sampled_from(latents)) if draw(st.sampled_from([0, 0, 0, 1])) else None
    kv_heads = tp_size * draw(st.sampled_from([1, 2, 3, 1, 2, 4])) if latent is None else 1
    world = tp_size * cp_size
    # The fewest query heads that divide both by the KV heads and by the ranks, or twice that.
    least = next(q for q in range(kv_heads, kv_heads * world + 1, kv_heads) if q % world == 0)
    dtype = draw(st.sampled_from(list(dtypes)))
    wider = st.sampled_from(list(dict.fromkeys(("float32", dtype))))
    q_heads = least * draw(st.sampled_from([1, 2, 1, 2, 9 if kv_heads == 1 else 2]))
    head_dim = draw(st.sampled_from(list(head_dims)))
    return ModelShape(
        layers=1 if q_heads * head_dim > WIDE else draw(st.integers(1, max_layers)),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        latent=latent,
        dtype=dtype,
        cache_dtype=draw(st.sampled_from([None, None, "float8_e4m3fn"])),
        product_dtype=draw(wider),
        partial_dtype=draw(wider),
        rope_base=draw(st.sampled_from([10_000.0, 500_000.0])),
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
    contents: bool = True,
) -> Config:
    """Legal configurations; pools are ample, or often too small, alike or one for each rank.

    Without `contents` nothing that only caches and outputs depend on is drawn.
    """
    world = max_world or max(cp_sizes) * max(tp_sizes)
    fitting = [c for c in cp_sizes if c <= world]
    if not fitting:
        raise ValueError(f"None of the cp_sizes {list(cp_sizes)} fits {world} ranks.")
    layout = draw(layouts(names=names, cp_sizes=fitting))
    c = layout.cp_size
    tp_size = draw(st.sampled_from([p for p in tp_sizes if p * c <= world]))
    max_len = draw(st.sampled_from([*MAX_LENS, *(() if contents else (FAR_MAX_LEN,) * 2)]))
    model = ModelShape(q_heads=2 * tp_size * c, kv_heads=2 * tp_size)
    admission: Admission = "transfer"
    if contents:
        model = draw(model_shapes(cp_size=c, tp_size=tp_size))
        admission = draw(st.sampled_from(get_args(Admission)))
        if max_len > MAX_LENS[0]:
            model = msgspec.structs.replace(model, layers=1, head_dim=16)
            if admission == "prefill":
                max_len = draw(st.sampled_from([*MAX_LENS[:2] * 4, LONG_PREFILL]))
    # Ample first: a trace that shrinks keeps small pools only where the failure needs them.
    some = st.integers(1, max_pages)
    match draw(st.sampled_from(["ample", "alike", "each its own", "many", "the longest request"])):
        case "ample":
            pages = [AMPLE] * c
        case "alike":
            pages = [draw(some)] * c
        case "each its own":
            pages = draw(st.lists(some, min_size=c, max_size=c))
        case "many":
            pages = [40 + count for count in draw(st.lists(some, min_size=c, max_size=c))]
        case _:
            pages = [-(-max_len // layout.tokens_per_block) + draw(some)] * c
    return Config(
        layout=layout,
        pages=pages,
        max_len=max_len,
        model=model,
        tp_size=tp_size,
        overlap="overlap" in features and draw(st.booleans()),
        admission=admission,
        seed=draw(st.integers(0, 3)) if contents else 0,
        poison=draw(st.sampled_from([True, True, True, False])) if contents else True,
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
    """Which of the fitting requests: each modulo their number; all of them when empty."""
    query_lens: tuple[int, ...] = (1,)
    times: int = 1
    far: int = 0
    """Of an admission or a fork: ids below this one are not taken."""
    pad: int = 0
    kept: int = 1
    event: str = "decode"
    """Of a wish for something wrong: the kind of event."""
    uneven: int = 0
    """Of a wish for something wrong: by how many query_lens are more than ids."""


_KINDS: Final[dict[str, str | None]] = {
    "admit": None,
    "decode": None,
    "release": None,
    "skip": None,
    "accept": "speculative",
    "fork": "fork",
    "preempt": "preempt",
    "resume": "preempt",
    "sampled": "overlap",
}
"""Kinds of wishes for an event that may well be accepted, with the feature that each needs."""
EVENTS: Final = tuple(_KINDS)
"""Kinds of events. Other wishes: `wrong`; `again`, the event before once more, as a scheduler that
has missed the answer sends it; `leap`, one long group; `fill`, a prompt that takes all the room, or
one token more; `starve`, a resumption for which others have left no room; `stray`, a batch with one
request that does not fit in, then without it; `lineage`, a fork of a fork, all of whom end before a
prompt takes all the room."""
_GOES_ON: Final = ("starve", "stray", "lineage")
"""Wishes that go on after a refusal, which is what they are about."""
_SHORT: Final = st.integers(1, 40)
LONG_ENOUGH: Final = 1000
"""The most slots of pools that a prompt is made to fill."""
LONG: Final = 100
"""Prompts of more tokens are admitted one at a time."""
FARS: Final = (2**32, 2**40, 2**53 - 2**10)
"""Large ids begin here: kept in 32 or 40 bits they are the small ones, or those a float32 holds."""
BEYOND: Final = 2**32 + 1
"""A number that is 1 in 32 bits."""
CROWD: Final = 66
"""So many requests at once: more than tables that were doubled a few times have rows for."""
TILES: Final = (64, 128, 256, 512, 1024)
"""Tokens on one rank that kernels work on at a time; with contents those that make 500 in all."""


def intents(
    *,
    features: Collection[str] = FEATURES,
    undeclared: Collection[str] = (),
    prompt_lens: st.SearchStrategy[int] = _SHORT,
    leaps: Collection[int] = (8, 17),
) -> st.SearchStrategy[Intent]:
    """Wishes that an engine of these features can be asked to fulfil; `leaps` are long groups.

    Now and then an event is wrong, or needs one of the features that the engine does not
    declare. Only what a kind of wish uses is drawn: simpler to shrink, and faster.
    """
    kinds = [kind for kind, needs in _KINDS.items() if needs is None or needs in features]
    kinds += ["again", "fill", "stray"]
    kinds += ["leap"] if "speculative" in features else []
    kinds += ["starve"] if "preempt" in features else []
    kinds += ["lineage"] if "fork" in features else []
    askable = {None, "overlap", *features, *undeclared}
    lens = [1, 1, 1, 0, -1, BEYOND] + ([2, 9] if "speculative" in askable else [])
    one = st.tuples(st.integers(0, 7))
    some = st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple)
    batch = some | st.just(())
    groups: st.SearchStrategy[tuple[int, ...]] = st.just((1,))
    if "speculative" in features:
        groups |= st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
    far = st.sampled_from([0] * 9 + [*FARS])
    long = st.sampled_from(sorted(leaps))
    steps: dict[str, st.SearchStrategy[Any]] = {
        "picks": batch,
        "query_lens": groups,
        "times": st.sampled_from([1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9]),
    }
    if "padding" in features:
        steps["pad"] = st.sampled_from([0, 0, 0, 1, 2, 3, 33])
    wishes: dict[str, dict[str, st.SearchStrategy[Any]]] = {
        "admit": {
            "size": prompt_lens,
            "times": st.sampled_from([1, 1, 1, 1, 1, 1, 1, 2, 9, 17]),
            "far": far,
        },
        "fill": {"size": st.integers(-1, 3)},
        "decode": steps,
        "leap": {
            "picks": one | st.tuples(st.integers(0, 7), st.integers(0, 7)),
            "query_lens": st.tuples(long) | st.tuples(long, st.just(1)),
        },
        "again": {},
        "skip": {"picks": batch, "query_lens": groups},
        "accept": {"picks": one, "kept": st.integers(1, 7)},
        "fork": {
            "picks": st.tuples(st.integers(-1, 4)),  # a fork of the latest fork, too
            "times": st.sampled_from([1, 1, 2, 3]),
            "far": far,
        },
        "sampled": {"picks": batch},
        "release": {"picks": st.sampled_from([*((pick,) for pick in range(8)), (), ()])},
        "starve": {"picks": one, "size": st.integers(0, 3)},
        "lineage": {"picks": one, "kept": st.integers(0, 5), "size": st.integers(-1, 1)},
        "stray": {
            "picks": some,
            "event": st.sampled_from(
                ["decode", "skip", *(["sampled"] if "overlap" in features else [])]
            ),
            "kept": st.integers(0, 4),
        },
        "wrong": {
            "event": st.sampled_from(
                [
                    *("decode", "decode"),
                    *(kind for kind, needs in _KINDS.items() if needs in askable),
                    *([MERGE] if MERGE in askable else []),
                ]
            ),
            "picks": st.lists(st.sampled_from([0, 1, 2, -1]), max_size=3).map(tuple),
            "query_lens": st.lists(st.sampled_from(lens), min_size=1, max_size=2).map(tuple),
            "uneven": st.sampled_from([0, 0, 0, 1, -1]),
            "size": st.sampled_from([1, 10**6, 0, -1, BEYOND]),
            "kept": st.sampled_from([1, 9, 0, -1, BEYOND]),
            "pad": st.sampled_from([0, 0, 1, -1] if "padding" in askable else [0, 0, 0, -1]),
        },
    }

    @st.composite
    def intent(draw: st.DrawFn) -> Intent:
        kind = draw(st.sampled_from(["admit", "decode", "decode", *kinds, "wrong", "wrong"]))
        fields = wishes.get(kind, {"picks": one})
        return Intent(kind, **{name: draw(strategy) for name, strategy in fields.items()})

    return intent()


def prompt_lengths(
    *, super_block: int, max_len: int, tiles: Collection[int] = ()
) -> st.SearchStrategy[int]:
    """Prompt lengths: any up to 40, the shortest, and those around super-blocks and max_len.

    One of them leaves some room below max_len: for tokens at positions that short prompts lack.
    `tiles` are lengths that are likely as well, and one token less or more.
    """
    round_numbers = [1, super_block, 2 * super_block, 3 * super_block, max_len]
    near = {number + by for number in round_numbers for by in (-1, 0, 1)} | {max_len - 9}
    lengths = _SHORT | st.sampled_from(sorted(near - {0}))
    about = sorted(tile + by for tile in tiles for by in (-1, 0, 1))
    return lengths | st.sampled_from(about) if about else lengths


def long_groups(*, super_block: int, max_len: int) -> set[int]:
    """Lengths of groups about as long as a super-block, after which turns repeat; one longer."""
    return {super_block + by for by in (-1, 0, 1, super_block)} - {0} | {1 + max_len // 200}


def realise(recorder: Recorder, intent: Intent) -> Iterable[Event]:
    """The events that an intent means in this state; none when it fits none.

    Those of some wishes depend on the ones before, which the recorder must have seen.
    """
    requests = recorder.state.requests
    first = intent.far
    free = [id for id in range(first, first + len(requests) + intent.times) if id not in requests]
    fresh = free[0]
    if intent.kind == "wrong":
        preempted_first = sorted(requests, key=lambda id: not requests[id].preempted)
        return [_careless(intent, [*preempted_first, fresh], recorder.config.layout.cp_size)]
    if intent.kind == "fill":
        return [Admit(fresh, max(1, _longest(recorder, fresh) - intent.size))]
    if intent.kind == "admit":
        times = intent.times if intent.size <= LONG else 1  # many short ones, or a long one
        return [Admit(id, intent.size) for id in free[:times]]
    gone = [id for id, request in requests.items() if request.preempted]
    fitting = [id for id in requests if id not in gone]
    if intent.kind == "resume" and gone:
        return [Resume(gone[intent.picks[0] % len(gone)])]
    if intent.kind == "release":
        fitting = list(requests)
    if intent.kind == "stray":
        return _with_a_stray(recorder, intent, fresh)
    if intent.kind == "accept":
        fitting = [id for id in fitting if requests[id].open_group]
    if intent.kind == "sampled":
        fitting = [id for id in fitting if requests[id].outstanding]
    if not fitting:
        return []
    picked = list(dict.fromkeys(fitting[pick % len(fitting)] for pick in intent.picks)) or fitting
    lens = [intent.query_lens[i % len(intent.query_lens)] for i in range(len(picked))]
    id = picked[0]
    match intent.kind:
        case "decode" | "leap":
            return _repeated(recorder, Decode(picked, lens, intent.pad), intent.times)
        case "skip":
            return [Skip(picked, lens)]
        case "accept":
            waiting: list[Event] = [Sampled([id])] * requests[id].outstanding
            return [*waiting, Accept(id, 1 + (intent.kept - 1) % requests[id].open_group)]
        case "fork":
            return [Fork(id, child) for child in free[: intent.times]]
        case "preempt":
            return [Preempt(id)]
        case "resume":
            return [Preempt(id), Resume(id)]
        case "starve":
            return _starved(recorder, id, intent.size)
        case "lineage":
            return _lineage(recorder, id, intent)
        case "sampled":
            return [Sampled(picked)]
        case _:
            return [Release(one) for one in picked]


def _longest(recorder: Recorder, id: int) -> int:
    """The longest prompt that there is room for now; 0 where pools are too large to fill."""
    slots = sum(recorder.state.free_pages) * recorder.config.layout.tokens_per_block
    if slots > LONG_ENOUGH:
        return 0
    lengths = range(1, 1 + min(slots, recorder.config.max_len))
    return bisect_left(lengths, True, key=lambda n: recorder.refusal(Admit(id, n)) is not None)


def _starved(recorder: Recorder, id: int, spare: int) -> Iterator[Event]:
    """A request is preempted, others take nearly all its room, and it must wait to resume."""
    yield Preempt(id)
    first, second = islice((new for new in count() if new not in recorder.state.requests), 2)
    yield Admit(first, max(1, _longest(recorder, first) - spare))
    yield Resume(id)
    yield Admit(second, 1)
    yield Release(first)
    yield Resume(id)


def _lineage(recorder: Recorder, id: int, intent: Intent) -> Iterator[Event]:
    """A fork grows and is forked too; they end in some order, and one takes all their room."""
    child, grandchild = islice((new for new in count() if new not in recorder.state.requests), 2)
    yield Fork(id, child)
    yield from _repeated(
        recorder, Decode([child], [1]), min(8, recorder.config.layout.tokens_per_block)
    )
    yield Fork(child, grandchild)
    for one in list(permutations((id, child, grandchild)))[intent.kept]:
        yield Release(one)
    yield Admit(child, max(1, _longest(recorder, child) - intent.size))


def _with_a_stray(recorder: Recorder, intent: Intent, fresh: int) -> list[Event]:
    """An event for several requests, one of which it does not fit; then for the others alone."""
    requests = recorder.state.requests
    fitting = [
        id
        for id, request in requests.items()
        if not request.preempted and (intent.event != "sampled" or request.outstanding)
    ]
    if not fitting:
        return []
    ids = list(dict.fromkeys(fitting[pick % len(fitting)] for pick in intent.picks))
    stray = next((id for id in requests if id not in fitting), fresh)
    more = list(ids)
    more.insert(intent.kept % (len(ids) + 1), stray)
    match intent.event:
        case "sampled":
            return [Sampled(more), Sampled(ids)]
        case "skip":
            return [Skip(more, [1] * len(more)), Skip(ids, [1] * len(ids))]
        case _:
            return [Decode(more, [1] * len(more)), Decode(ids, [1] * len(ids))]


def _repeated(recorder: Recorder, decode: Decode, times: int) -> list[Event]:
    """A decode again and again; with overlap the scheduler samples as late as it may."""
    events = list[Event]()
    behind = {id: recorder.state.requests[id].outstanding for id in decode.ids}
    for _ in range(times):
        late = [id for id in decode.ids if behind[id] == 2]
        if late:
            events.append(Sampled(late))
        events.append(decode)
        behind = {
            id: count - (id in late) + recorder.config.overlap for id, count in behind.items()
        }
    return events


def _careless(intent: Intent, anyone: list[int], cp_size: int) -> Event:
    """An event whose ids and counts were not looked at: most of them must be refused.

    The last of those it may name (pick -1) is not known.
    """
    ids = [anyone[pick % len(anyone)] for pick in intent.picks]
    first, last = (ids[0], ids[-1]) if ids else (anyone[-1], anyone[-1])
    lens = [intent.query_lens[place % len(intent.query_lens)] for place in range(len(ids))]
    lens = [*lens, 1] if intent.uneven > 0 else lens[: len(lens) + intent.uneven]
    match intent.event:
        case "admit":
            return Admit(first, intent.size)
        case "decode":
            return Decode(ids, lens, intent.pad)
        case "skip":
            return Skip(ids, lens)
        case "accept":
            return Accept(first, intent.kept)
        case "fork":
            return Fork(first, last)
        case "preempt":
            return Preempt(first)
        case "resume":
            return Resume(first)
        case "sampled":
            return Sampled(ids)
        case "merge":
            return Merge([[0]] * cp_size, list(range(cp_size)))
        case _:
            return Release(first)


def realised(config: Config, features: Collection[str], wishes: Sequence[Intent]) -> Trace:
    """The trace that these wishes make of a configuration.

    What is refused once is not tried again at once.
    """
    recorder, events = Recorder(config, {*features, "pages"}), list[Event]()
    for wish in wishes:
        for event in events[-1:] if wish.kind == "again" else realise(recorder, wish):
            events.append(event)
            if recorder.next(event).refused is not None and wish.kind not in _GOES_ON:
                break
    return Trace(config=config, events=events)


_SPOILED: Final[list[Callable[[Config], dict[str, Any]]]] = [
    lambda config: {"pages": config.pages[:-1]},
    lambda config: {"pages": [*config.pages, 1]},
    lambda config: {"pages": [*config.pages[:-1], 0]},
    lambda config: {"pages": [0, *config.pages[1:]]},
    lambda config: {"layout": _relaid(config, pages="lockstep")},
    lambda config: {"layout": _relaid(config, prompt_interleave=2, owner_interleave=2)},
    lambda config: {
        "layout": _relaid(config, prompt_interleave=1 + config.layout.tokens_per_block)
    },
    lambda config: {"model": _reshaped(config, kv_heads=config.model.q_heads + 1)},
    lambda config: {"model": _reshaped(config, q_heads=config.model.kv_heads)},
    lambda config: {"model": _reshaped(config, q_heads=config.model.q_heads + 1)},
    lambda config: {"model": _reshaped(config, q_heads=config.world_size, kv_heads=1)},
    lambda config: {
        "model": _reshaped(
            config,
            kv_heads=config.tp_size + 1,
            q_heads=(config.tp_size + 1) * config.world_size,
        )
    },
    lambda config: {"model": _reshaped(config, head_dim=7)},
    lambda config: {"model": _reshaped(config, kv_heads=1, latent=LatentShape(latent_dim=33))},
    lambda config: {"model": _reshaped(config, kv_heads=1, latent=LatentShape(rope_dim=7))},
    lambda config: {"model": _reshaped(config, kv_heads=2, latent=LatentShape())},
    lambda config: {"model": _reshaped(config, rope_base=1.0)},
    lambda config: {"model": _reshaped(config, rope_base=1e12)},
]
"""Changes that make most configurations illegal, whose ranks are the same."""


def _relaid(config: Config, **changes: Any) -> Layout:
    layout = config.layout
    for part in ("prompt_interleave", "owner_interleave"):
        if getattr(layout, part) is None:
            changes.pop(part, None)
    return layout.replace(**changes)


def _reshaped(config: Config, **changes: Any) -> ModelShape:
    return msgspec.structs.replace(config.model, **changes)


@st.composite
def illegal_configs(draw: st.DrawFn, *, configs: st.SearchStrategy[Config]) -> Config:
    """Configurations made from these that every engine must refuse to start with.

    Their layout is an identifier, since without one there is no number of ranks to start.
    """
    config = draw(configs)
    changed = [msgspec.structs.replace(config, **spoil(config)) for spoil in _SPOILED]
    illegal = [candidate for candidate in changed if config_problem(candidate) is not None]
    return draw(st.sampled_from(illegal))


@lru_cache(maxsize=256)  # strategies are slow to make, and the same for many configurations
def _beginnings_and_wishes(
    features: frozenset[str],
    undeclared: frozenset[str],
    super_block: int,
    max_len: int,
    tiles: tuple[int, ...],
    max_wishes: int,
) -> tuple[st.SearchStrategy[list[int]], st.SearchStrategy[list[Intent]]]:
    """Lengths of a trace's first prompts, and what else is wished for."""
    prompt_lens = prompt_lengths(super_block=super_block, max_len=max_len, tiles=tiles)
    intent = intents(
        features=features,
        undeclared=undeclared,
        prompt_lens=prompt_lens,
        leaps=long_groups(super_block=super_block, max_len=max_len),
    )
    return st.lists(prompt_lens, min_size=1, max_size=3), st.lists(intent, max_size=max_wishes)


@st.composite
def traces(
    draw: st.DrawFn,
    *,
    configs: st.SearchStrategy[Config],
    features: Collection[str] = FEATURES,
    undeclared: Collection[str] = (),
    contents: bool = True,
    max_wishes: int = 12,
) -> Trace:
    """Traces over these configurations, with events that need these features or none.

    Now and then an event needs one of the features that the engine does not declare; and one
    trace in 10 is a configuration that must be refused, without events. Where no contents are
    looked at one in 20 begins with a crowd.
    """
    if draw(st.sampled_from([False] * 9 + [True])):
        return Trace(config=draw(illegal_configs(configs=configs)), events=[])
    config = draw(configs)
    layout, most = config.layout, min(config.max_len, LONG_ENOUGH // 2 if contents else FAR_MAX_LEN)
    begin, wishes = _beginnings_and_wishes(
        frozenset(features),
        frozenset(undeclared),
        super_block=layout.cp_size * layout.tokens_per_block,
        max_len=config.max_len,
        tiles=tuple(layout.cp_size * tile for tile in TILES if layout.cp_size * tile < most),
        max_wishes=max_wishes,
    )
    admissions = [Intent("admit", size=size) for size in draw(begin)]
    if not contents and draw(st.sampled_from([False] * 19 + [True])):
        admissions.append(Intent("admit", size=1, times=CROWD))
    # Two lists in a row: twice the length at the same cost of shrinking.
    return realised(config, features, admissions + draw(wishes) + draw(wishes))


_LEVELS: Final = st.sampled_from([0, 0, None, 3, -3, 20, 90, -90, 1000, -(10**4), 2**17, -(2**17)])
"""Levels of supplied partials: alike, without keys, one outweighing the rest, far apart."""


@st.composite
def merge_traces(
    draw: st.DrawFn, *, configs: st.SearchStrategy[Config], max_merges: int = 3
) -> Trace:
    """Traces of nothing but merges over these configurations.

    Tokens that no rank has keys for are among them. A merge may come again, as it was or with
    its partials on other ranks.
    """
    config = draw(configs)
    c, events = config.layout.cp_size, list[Event]()
    token = st.lists(_LEVELS, min_size=c, max_size=c) | st.just([None] * c)
    for _ in range(draw(st.integers(1, max_merges))):
        tokens = draw(st.lists(token, min_size=1, max_size=5))
        merge = Merge([list(row) for row in zip(*tokens, strict=True)], list(range(c)))
        events.append(merge)
        if draw(st.booleans()):
            events.append(merge)
        if draw(st.booleans()):
            events.append(Merge(merge.levels, draw(st.permutations(merge.order))))
    return Trace(config=config, events=events)
