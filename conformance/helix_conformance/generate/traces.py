"""Traces as functions of choices: drawn, and played once to know what comes next."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import Final

import msgspec

from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.actions import SHORT, Action, Admit, Scope, draw_action
from helix_conformance.generate.actions import Decode as Step
from helix_conformance.generate.choices import Choices
from helix_conformance.generate.configs import FAR_MAX_LEN, WIDE, draw_illegal_config, draw_layout
from helix_conformance.generate.narrowing import (
    NothingInsideError,
    fitted,
    limits_events,
    nearest,
    within,
)
from helix_conformance.generate.sizes import CROWDS, FAR_CHUNKS, FAR_LEN, FAR_POSITIONS, both
from helix_spec import events as ev
from helix_spec.capabilities import UNLIMITED, Box, allows, boxes_around, event_outside, outside
from helix_spec.config import Config, ModelShape, config_problem
from helix_spec.events import FEATURES, Decode, Event, Fork, Merge, Preempt, Release, Resume
from helix_spec.trace import EVERYTHING, Trace, Watch

MAX_ACTIONS: Final = 12
"""Actions of each half of a trace."""
TILES: Final = (64, 128, 256, 512, 1024)
"""Tokens on one rank that kernels work on at a time."""
LONG_CONTENTS: Final = 500
"""With contents tiles make fewer tokens than this in all."""
LONG_GROUP: Final = 100
"""With contents a group has no more tokens."""
BUDGET: Final = 4 * 10**6
"""Of a trace with a wide model: elements of queries times the keys that they meet."""
CHUNKS: Final = (0, 0, 1, 2, 3, 5, 16, 33)
"""Tokens in a chunk of a computed prompt; 0 leaves them to the engine."""
MOST_CHUNKS: Final = 12
"""A prompt is cut into about so many chunks at most, for time."""
WATCHES: Final = (
    *[EVERYTHING] * 10, Watch(twice=True), Watch(every=4), Watch(every=7, touched=False),
    Watch(every=10**6, touched=False),
)  # fmt: skip
"""When state is looked at; that it is must not matter."""
DEEP: Final = 100
"""With contents one trace in so many has thousands of keys on each rank."""
DEEP_KEYS: Final = (1023, 1025, 2049, 4097)
"""Tokens on a rank, about: past the tiles, pages and splits of kernels."""
CROWDED: Final = 40
"""One trace in so many begins with a crowd of requests, all decoded at once."""
PREFIXED: Final = 3
"""One trace in so many has prefixes, of an engine that finds them."""
TWICE: Final = 24
"""One trace in so many is played twice in a row, for the same bits."""
MAX_FAR_CP: Final = 8
MORE_PAGES: Final = 64
"""Pages of a rank at far positions, beyond those of the prompts."""
LEVELS: Final = (0, 0, None, 3, -3, 20, 90, -90, 1000, -(10**4), 2**17, -(2**17))
"""Levels of supplied partials: alike, without keys, one outweighing the rest, far apart."""


def scope_of(
    config: Config,
    *,
    features: Collection[str] = FEATURES,
    undeclared: Collection[str] = (),
    contents: bool = True,
    box: Box = UNLIMITED,
) -> Scope:
    """Return what actions ask for under a configuration.

    Prompts are of any length up to 40, of one around super-blocks and max_len, or of one around
    the tiles of kernels. One leaves some room below max_len: for tokens at positions that short
    prompts lack. Long groups are about as long as a super-block, after which turns repeat.

    Parameters
    ----------
    config : Config
        A legal configuration.
    features : collection of str
        Features that the engine declares.
    undeclared : collection of str
        Features that it does not declare, and that a wrong event may need.
    contents : bool
        Whether caches or outputs are looked at: then prompts are shorter, for time.
    box : Box
        Where the engine works; no limits unless given.

    Returns
    -------
    Scope
        Its lengths are in tokens; some prompts are a token longer than max_len.
    """
    layout, max_len = config.layout, config.max_len
    super_block = layout.cp_size * layout.tokens_per_block
    round_numbers = (1, super_block, 2 * super_block, 3 * super_block, max_len)
    near = {number + by for number in round_numbers for by in (-1, 0, 1)} | {max_len - 9}
    most = min(max_len, LONG_CONTENTS if contents else FAR_MAX_LEN)
    width = width_of(config.model)
    if contents and width > 3 * WIDE:
        most = min(most, max(2 + super_block, BUDGET // width))
        near = {number for number in near if number <= most or number > max_len}
    tiles = [layout.cp_size * tile for tile in TILES if layout.cp_size * tile < most]
    about = sorted(tile + by for tile in tiles for by in (-1, 0, 1))
    groups = {super_block + by for by in (-1, 0, 1, super_block)} | {1 + max_len // 200}
    if contents:
        groups = {group for group in groups if group <= LONG_GROUP} or {LONG_GROUP}
    prompts = [SHORT, sorted(near - {0}), *([about] if about else [])]
    if box.prompt_len is not None:  # one that is too long must be refused, and may be asked for
        prompts = [
            kept
            for lengths in prompts
            if (kept := [n for n in lengths if n > max_len or allows(box.prompt_len, n)])
        ] or [within(box, "prompt_len", [])]
    return Scope(frozenset(features), frozenset(undeclared), prompts, sorted(groups - {0}))


def draw_trace(
    choices: Choices,
    config: Config,
    *,
    features: Collection[str] = FEATURES,
    undeclared: Collection[str] = (),
    contents: bool = True,
    max_actions: int = MAX_ACTIONS,
    box: Box = UNLIMITED,
) -> Trace:
    """Return a trace over a legal configuration, or over an illegal change of it.

    `strategies.traces` says what is drawn.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    config : Config
        A legal configuration.
    features : collection of str
        Features that the engine declares.
    undeclared : collection of str
        Features that it does not declare.
    contents : bool
        Whether caches or outputs are looked at: then prompts are shorter, for time.
    max_actions : int
        The most actions of each half of a trace.
    box : Box
        Where the engine works: a box around the configuration; no limits unless given.

    Returns
    -------
    Trace
        Its configuration and its events; the reference has been played once to make it.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> from helix_spec.layouts import named_layout
    >>> layout = named_layout("pr9757", cp_size=2, tokens_per_block=4)
    >>> config = Config(layout=layout, pages=[8, 8], max_len=24)
    >>> draw_trace(Seeded("7"), config) == draw_trace(Seeded("7"), config)
    True
    """
    if choices.one_in(10):
        return Trace(config=draw_illegal_config(choices, config), events=[])
    if contents and choices.one_in(DEEP):
        deep = deep_trace(choices, config, box)
        if deep is not None:
            return deep
    width = width_of(config.model)
    crowd = choices.one_in(CROWDED) and not (contents and width > 2 * WIDE)
    if crowd:
        room = 2 * (CROWDS[0] if contents else CROWDS[-1])
        pages = [nearest(box.pages, max(pages, room)) for pages in config.pages]
        config = msgspec.structs.replace(config, pages=pages)
    scope = scope_of(config, features=features, undeclared=undeclared, contents=contents, box=box)
    lengths = choices.lists(lambda more: more.pick(more.pick(scope.prompt_lens)), 1, 3)
    actions: list[Action] = [Admit(length) for length in lengths]
    if crowd:
        actions = [
            Admit(choices.integer(1, 3), choices.pick(CROWDS[: 1 if contents else 3])),
            Step(),
        ]
        max_actions = min(2, max_actions)
    for _ in range(2):  # two lists in a row: twice the length at the same cost of shrinking
        actions += choices.lists(lambda more: draw_action(more, scope), 0, max_actions)
    recorder = Recorder(config, {*features, "pages"})
    budget = BUDGET // width if contents and width > 3 * WIDE else None
    events = played(recorder, actions, box=box, budget=budget)
    if config.admission == "prefill":
        events = [chunked(event, choices, box) for event in events]
    # All rows of many requests are too many to look at after each event.
    watch = Watch(every=len(events)) if crowd else choices.pick(WATCHES)
    again = contents and choices.one_in(TWICE)
    return Trace(config=config, events=events, watch=watch, times=1 + again)


def deep_trace(choices: Choices, config: Config, box: Box) -> Trace | None:
    """Return a trace of one long request and few steps; None where it is not for this engine.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    config : Config
        A legal configuration, whose layout stays; the model is made narrow.
    box : Box
        Where the engine works.
    """
    layout, keys = config.layout, choices.pick(DEEP_KEYS)
    c, t = layout.cp_size, layout.tokens_per_block
    prompt_len = keys * c + choices.integer(0, 2 * c * t)
    fields = {"layers": 1, "head_dim": 16, "q_heads": 2 * config.tp_size * c,
              "kv_heads": config.tp_size, "latent": None}  # fmt: skip
    deep = msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, **fields),
        pages=[5 + prompt_len // t] * c,
        max_len=2 * prompt_len,
        admission="transfer",
    )
    if config_problem(deep) is not None or outside(box, deep):
        return None
    steps = [Decode([0], [1])] * choices.integer(1, 3)
    sampled: list[Event] = [step for one in steps for step in (one, ev.Sampled([0]))]
    events: list[Event] = [ev.Admit(0, prompt_len), *(sampled if deep.overlap else steps)]
    trace = Trace(config=deep, events=events, watch=Watch(every=len(events)))
    return trace if why_outside([box], trace) is None else None


def far_trace(
    choices: Choices,
    name: str,
    cp_sizes: Sequence[int],
    features: Collection[str],
    box: Box,
) -> Trace | None:
    """Return a trace at positions beyond 2^17 and 2^24; None where it is not for this engine.

    It is for placement, lengths and pages: contents would take minutes. Requests begin a few tokens
    before such a position, the last one behind the largest, and go on until their owner changes.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    name : str
        The layout's name.
    cp_sizes : sequence of int
        Numbers of ranks that share a sequence.
    features : collection of str
        Features that are played.
    box : Box
        Where the engine works.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> trace = far_trace(Seeded("0"), "pr17866", [2], [], UNLIMITED)
    >>> trace.config.max_len, trace.events[2], len(trace.events)
    (16779264, Admit(id=2, prompt_len=16777216), 329)
    """
    t = max(FAR_CHUNKS)
    chunks = [*FAR_CHUNKS] if name in ("vllm_dcp", "custom") else None
    inside = both(box, Box(tokens_per_block=[t], interleave=chunks))
    if inside is None:
        return None
    few = [c for c in cp_sizes if 1 < c <= MAX_FAR_CP] or cp_sizes  # one rank owns all
    try:
        layout = draw_layout(choices, names=[name], cp_sizes=few, box=inside)
    except NothingInsideError:
        return None
    c = layout.cp_size
    lengths = [position - choices.integer(0, 3) for position in FAR_POSITIONS]
    lengths.append(max(FAR_POSITIONS) + 1 + 2 * choices.integer(0, 3))
    config = Config(
        layout=layout,
        pages=[sum(lengths) // (c * t) + MORE_PAGES] * c,
        max_len=FAR_LEN,
        model=ModelShape(q_heads=c, kv_heads=1, head_dim=2, dtype="float16"),
    )
    ids, far, fresh = [*range(len(lengths))], len(lengths) - 1, len(lengths)
    step, turn = Decode(ids, [1] * len(ids)), t + t // 4
    events: list[Event] = [ev.Admit(id, length) for id, length in enumerate(lengths)]
    events += [step] * 5
    if "speculative" in features and allows(box.query_len, turn):
        events += [Decode(ids, [turn] * len(ids)), ev.Accept(far, t + 1), step]
    else:
        events += [step] * turn
    if "preempt" in features:
        events += [Preempt(far), Resume(far), step]
    if "fork" in features:
        events += [Fork(far, fresh), Decode([fresh, far], [1, 1]), Release(far)]
    trace = Trace(config=config, events=events, watch=Watch(every=50, touched=False))
    return None if outside(box, config) or why_outside([box], trace) else trace


def chunked(event: Event, choices: Choices, box: Box) -> Event:
    """Return an event that says, if it is an admission, in which chunks its prompt is computed.

    Parameters
    ----------
    event : Event
        Any event.
    choices : Choices
        What makes the choices.
    box : Box
        Where the engine works.
    """
    if not isinstance(event, ev.Admit):
        return event
    chunk = choices.pick(within(box, "chunk", CHUNKS))
    least = event.prompt_len // MOST_CHUNKS
    return msgspec.structs.replace(event, chunk=chunk and nearest(box.chunk, max(chunk, least)))


def played(
    recorder: Recorder,
    actions: Iterable[Action],
    *,
    box: Box = UNLIMITED,
    budget: int | None = None,
) -> list[Event]:
    """Return the events of these actions, played once on this recorder.

    What is refused once is not tried again at once.

    Parameters
    ----------
    recorder : Recorder
        It is at the start of a trace, and afterwards at the end.
    actions : iterable of Action
        The actions, in order.
    box : Box
        Where the engine works: events that are to be accepted are made to fit, or left out.
    budget : int or None
        Keys that new tokens meet in all, after which nothing more is decoded; None for no limit.

    Returns
    -------
    list of Event
        The events that the recorder has seen, refused ones too.

    Examples
    --------
    >>> from helix_conformance.generate.actions import Release
    >>> from helix_spec.layouts import named_layout
    >>> layout = named_layout("pr9757", cp_size=2, tokens_per_block=4)
    >>> recorder = Recorder(Config(layout=layout, pages=[8, 8], max_len=24), {"pages"})
    >>> played(recorder, [Admit(5), Release(), Release()])
    [Admit(id=0, prompt_len=5), Release(id=0)]
    """
    events, limited = list[Event](), limits_events([box])
    for action in actions:
        for meant in action.events(recorder, events):
            event = meant
            if limited and outside_now(recorder, meant, box):
                event = fitted(box, meant)
                if outside_now(recorder, event, box):
                    break
            if budget is not None and isinstance(event, Decode):
                if budget <= 0:
                    return events
                budget -= _keys(recorder, event)
            events.append(event)
            if recorder.next(event).refused is not None and not action.goes_on:
                break
    return events


def width_of(model: ModelShape) -> int:
    """Return how many elements the queries of one token have.

    Examples
    --------
    >>> width_of(ModelShape(q_heads=32, kv_heads=8, head_dim=128))
    4096
    """
    return model.layers * model.q_heads * model.key_dim


def _keys(recorder: Recorder, decode: Decode) -> int:
    """How many keys the tokens of a decode meet, before themselves."""
    requests = recorder.state.requests
    pairs = zip(decode.ids, decode.query_lens, strict=False)
    return sum(len(requests[id].tokens) * max(0, n) for id, n in pairs if id in requests)


def outside_now(recorder: Recorder, event: Event, box: Box) -> list[str]:
    """Return the dimensions in which an event that is accepted now lies outside a box.

    Parameters
    ----------
    recorder : Recorder
        Its state is that before the event.
    event : Event
        The event; one that is to be refused is never outside.
    box : Box
        Where the engine works.
    """
    if recorder.refusal(event) is not None:
        return []
    requests, live = recorder.state.requests, len(recorder.state.live)
    live += isinstance(event, ev.Admit | Fork | Resume) - isinstance(event, Release | Preempt)
    placed = len(requests[event.id].tokens) if isinstance(event, Resume) else None
    return event_outside(box, event, live=live, placed=placed)


def why_outside(boxes: Sequence[Box], trace: Trace) -> str | None:
    """Return why a trace is not for an engine that works in these boxes; None when it is.

    Parameters
    ----------
    boxes : sequence of Box
        The engine's capabilities.
    trace : Trace
        The trace. With a configuration that is illegal anywhere, it is for every engine.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=2,T=4", pages=[9, 9], max_len=24)
    >>> trace = Trace(config=config, events=[ev.Admit(0, 5), ev.Decode([0], [2])])
    >>> why_outside([Box(query_len=[1])], trace)
    'event 1 lies outside the capabilities in query_len'
    """
    if config_problem(trace.config) is not None:
        return None
    around = boxes_around(boxes, trace.config)
    if not around:
        missed = min((outside(box, trace.config) for box in boxes), key=len)
        return f"its configuration lies outside the capabilities in {', '.join(missed)}"
    if not limits_events(around):
        return None
    recorder = Recorder(trace.config)
    for index, event in enumerate(trace.events):
        missed = min((outside_now(recorder, event, box) for box in around), key=len)
        if missed:
            return f"event {index} lies outside the capabilities in {', '.join(missed)}"
        recorder.next(event)
    return None


def draw_merge_trace(choices: Choices, config: Config, *, max_merges: int = 3) -> Trace:
    """Return a trace of nothing but merges over a configuration; see `strategies.merge_traces`.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    config : Config
        A legal configuration.
    max_merges : int
        The most merges that differ, at least 1.

    Returns
    -------
    Trace
        The configuration, and at least one merge.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> from helix_spec.layouts import named_layout
    >>> layout = named_layout("pr9757", cp_size=2, tokens_per_block=4)
    >>> config = Config(layout=layout, pages=[8, 8], max_len=24)
    >>> {type(event).__name__ for event in draw_merge_trace(Seeded("7"), config).events}
    {'Merge'}
    """
    c, events = config.layout.cp_size, list[Event]()

    def token(choices: Choices) -> list[int | None]:
        none = choices.one_in(2)
        return [None] * c if none else [choices.pick(LEVELS) for _ in range(c)]

    for _ in range(choices.integer(1, max_merges)):
        tokens = choices.lists(token, 1, 5)
        merge = Merge([list(row) for row in zip(*tokens, strict=True)], list(range(c)))
        events.append(merge)
        if choices.one_in(2):
            events.append(merge)
        if choices.one_in(2):
            events.append(Merge(merge.levels, choices.permutation(merge.order)))
    return Trace(config=config, events=events)
