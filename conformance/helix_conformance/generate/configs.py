"""Layouts, model shapes and configurations as functions of choices.

Simple values come first, so that what Hypothesis shrinks has few ranks, small pages and ample
pools. Bounds are keyword-only; impossible ones raise.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from typing import Any, Final, Literal, get_args

import msgspec

from helix_conformance.generate.choices import Choices
from helix_conformance.generate.narrowing import (
    NothingInsideError,
    heads,
    nearest,
    only,
    within,
)
from helix_conformance.generate.sizes import FEW_CP
from helix_spec.capabilities import UNLIMITED, Box, allows, outside
from helix_spec.config import Admission, Config, DType, LatentShape, ModelShape, config_problem
from helix_spec.events import FEATURES, MERGE
from helix_spec.layouts import (
    LAYOUT_NAMES,
    NAMED_LAYOUTS,
    DecodeOwner,
    Layout,
    PagePolicy,
    PromptSplit,
    Start,
    named_layout,
)

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
HEAD_DIMS: Final = (16, 32, 64, 16, 32, 64, 128)
LATENTS: Final = ((32, 16), (64, 16), (32, 16), (64, 16), (64, 0))
"""Pairs of latent_dim and rope_dim."""
_TRIES: Final = 200
"""Custom layouts that are drawn to find one of a pattern."""
_LOCKSTEP_RULES: Final[list[tuple[PromptSplit, DecodeOwner]]] = [
    ("round_robin", "position"),
    ("interleave", "interleave"),
]


def draw_layout(
    choices: Choices,
    *,
    names: Sequence[str] = LAYOUT_NAMES,
    cp_sizes: Sequence[int] = FEW_CP,
    block_sizes: Sequence[int] = BLOCK_SIZES,
    box: Box = UNLIMITED,
) -> Layout:
    """Return a legal layout (SPEC.md section 3).

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    names : sequence of str
        Named layouts; `custom` is any other legal combination of rules.
    cp_sizes : sequence of int
        Numbers of ranks that share a sequence.
    block_sizes : sequence of int
        Numbers of tokens in a page.
    box : Box
        Where the engine works; no limits unless given.

    Returns
    -------
    Layout
        Of one of these names and sizes, inside the box.

    Raises
    ------
    ValueError
        When there is no layout of such a name, or none inside the box.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> str(draw_layout(Seeded("0"), names=["pr9757"], cp_sizes=[4], block_sizes=[32]))
    'pr9757/1:C=4,T=32'
    """
    unknown = set(names) - set(LAYOUT_NAMES)
    if unknown:
        raise ValueError(f"There is no layout named {sorted(unknown)[0]!r}.")
    for _ in range(_TRIES):
        layout = _layout(
            choices, names, cp_sizes, within(box, "tokens_per_block", block_sizes), box
        )
        if not outside(Box(layouts=box.layouts), Config(layout=layout, pages=[], max_len=1)):
            return layout
    raise NothingInsideError("layouts", f"it holds no layout of {', '.join(names)}")


def _layout(
    choices: Choices, names: Sequence[str], cp_sizes: Sequence[int], sizes: Sequence[int], box: Box
) -> Layout:
    cp_sizes = only(box, "cp_size", cp_sizes, f"asked for are C {_listed(cp_sizes)}")
    name, cp_size, t = choices.pick(names), choices.pick(cp_sizes), choices.pick(sizes)
    takes_interleave = name == "custom" or NAMED_LAYOUTS[name].prompt == "interleave"
    divisors: Sequence[int] = [i for i in range(1, t + 1) if t % i == 0]
    if takes_interleave:
        what = f"in a page of {t} tokens an interleave is {_listed(divisors)}"
        divisors = only(box, "interleave", divisors, what)
    if name != "custom":
        interleave = choices.pick(divisors) if takes_interleave else None
        return named_layout(name, cp_size=cp_size, tokens_per_block=t, interleave=interleave)
    pages = choices.pick(get_args(PagePolicy))
    if pages == "lazy":
        prompt = choices.pick(get_args(PromptSplit))
        owner = choices.pick(get_args(DecodeOwner))
    else:  # lockstep is legal for few rules only
        prompt, owner = choices.pick(_LOCKSTEP_RULES)
    prompt_interleave = choices.pick(divisors) if prompt == "interleave" else None
    owner_interleave = choices.pick(divisors) if owner == "interleave" else None
    if pages == "lockstep" and owner == "interleave":
        owner_interleave = prompt_interleave
    return Layout(
        prompt,
        owner,
        pages,
        choices.pick(get_args(Start)),
        cp_size,
        t,
        prompt_interleave=prompt_interleave,
        owner_interleave=owner_interleave,
    )


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, dict.fromkeys(numbers)))


def draw_model_shape(
    choices: Choices,
    *,
    cp_size: int,
    tp_size: int = 1,
    max_layers: int = 3,
    box: Box = UNLIMITED,
) -> ModelShape:
    """Return a shape whose heads divide over these ranks: MHA, GQA, MQA or MLA.

    Caches of 8 bits are among them. A wide model has a single layer, so that no trace takes long.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    cp_size, tp_size : int
        Numbers of ranks.
    max_layers : int
        The most layers, where the box asks for no more.
    box : Box
        Where the engine works; no limits unless given. One shape in four has a latent (MLA;
        SPEC.md, 4.1), where it allows both.

    Returns
    -------
    ModelShape
        Legal for tp_size * cp_size ranks, and inside the box.

    Raises
    ------
    ValueError
        When there is none inside the box.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> draw_model_shape(Seeded("0"), cp_size=3, tp_size=2).q_heads % 6
    0
    """
    kinds = within(box, "attention", ("gqa", "latent"))
    is_latent = choices.one_in(4) if len(kinds) > 1 else "latent" in kinds
    latents = within(box, "latent", LATENTS)
    pair = choices.pick(latents) if is_latent else None
    latent = pair and LatentShape(latent_dim=pair[0], rope_dim=pair[1])
    q_heads, kv_heads = _heads(choices, box, tp_size, cp_size, latent=is_latent)
    dtype = choices.pick(within(box, "dtype", get_args(DType)))
    wider = list(dict.fromkeys(("float32", dtype)))
    head_dim = choices.pick(within(box, "head_dim", HEAD_DIMS))
    layers = within(box, "layers", range(1, max_layers + 1))
    ropes = within(box, "rope", ("half", "half", "half", "half", "half", "none"))
    scales = within(box, "scale", ("default", "default", "default", "default", "given"))
    sinks = within(box, "sinks", (False, False, False, True))
    rope, is_given = choices.pick(ropes), choices.pick(scales) == "given"
    caches: tuple[Literal["float8_e4m3fn"] | None, ...] = (None, None, "float8_e4m3fn")
    cached = [one for one in caches if allows(box.cache_dtype, one or dtype)]
    if not cached:
        raise NothingInsideError("cache_dtype", f"drawn are {dtype} and float8_e4m3fn")
    return ModelShape(
        layers=min(layers) if q_heads * head_dim > WIDE else choices.pick(layers),
        q_heads=q_heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        latent=latent,
        dtype=dtype,
        cache_dtype=choices.pick(cached),
        product_dtype=choices.pick(only(box, "product_dtype", wider, f"drawn are {wider}")),
        partial_dtype=choices.pick(only(box, "partial_dtype", wider, f"drawn are {wider}")),
        rope_base=choices.pick((10_000.0, 500_000.0)),
        rope=None if rope == "none" else "half",
        scale=choices.pick((0.5, 1.5)) / math.sqrt(head_dim) if is_given else None,
        sinks=choices.pick(sinks),
    )


def _heads(
    choices: Choices, box: Box, tp_size: int, cp_size: int, *, latent: bool
) -> tuple[int, int]:
    """Numbers of query heads and KV heads: few where nothing is limited."""
    if (box.q_heads, box.kv_heads, box.q_heads_per_kv_head) != (None, None, None):
        return choices.pick(heads(box, tp_size, cp_size, latent=latent))
    kv_heads = 1 if latent else tp_size * choices.pick((1, 2, 3, 1, 2, 4))
    world = tp_size * cp_size
    # The fewest query heads that divide both by the KV heads and by the ranks, or twice that.
    least = next(q for q in range(kv_heads, kv_heads * world + 1, kv_heads) if q % world == 0)
    return least * choices.pick((1, 2, 1, 2, 9 if kv_heads == 1 else 2)), kv_heads


def draw_config(
    choices: Choices,
    *,
    names: Sequence[str] = LAYOUT_NAMES,
    cp_sizes: Sequence[int] = FEW_CP,
    tp_sizes: Sequence[int] = (1,),
    max_world: int | None = None,
    features: Collection[str] = FEATURES,
    max_pages: int = 12,
    contents: bool = True,
    box: Box = UNLIMITED,
) -> Config:
    """Return a legal configuration; pools are ample, or often too small, alike or each its own.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    names, cp_sizes : sequence of str, sequence of int
        See `draw_layout`.
    tp_sizes : sequence of int
        Numbers of ranks over which KV heads are split.
    max_world : int or None
        The most ranks in all; as many as the sizes allow when None.
    features : collection of str
        Only with `overlap` among them some configurations overlap.
    max_pages : int
        The most pages of a small pool.
    contents : bool
        Without it little is drawn that only caches and outputs depend on.
    box : Box
        Where the engine works; no limits unless given.

    Returns
    -------
    Config
        One inside the box, with which every engine may start that declares it (SPEC.md section 4).

    Raises
    ------
    ValueError
        When no cp_size fits the world, there is no layout of such a name, or nothing is inside the
        box.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> config = draw_config(Seeded("0"), names=["pr9757"], cp_sizes=[2], tp_sizes=[2])
    >>> config.layout.cp_size, config.world_size, config_problem(config)
    (2, 4, None)
    """
    world = max_world or max(cp_sizes) * max(tp_sizes)
    fitting = [c for c in cp_sizes if c <= world]
    if not fitting:
        raise ValueError(f"None of the cp_sizes {list(cp_sizes)} fits {world} ranks.")
    for attempt in range(_TRIES):  # what is drawn first may leave nothing of what comes later
        try:
            drawn = _config(
                choices, names, fitting, tp_sizes, world, features, max_pages, contents, box
            )
            _refuse_unfit(box, drawn)
            return drawn
        except NothingInsideError as error:
            if error.dimension == "layouts" or attempt == _TRIES - 1:
                raise
    raise AssertionError


def soaked_config(
    choices: Choices,
    name: str,
    cp_sizes: Sequence[int],
    features: Collection[str],
    profiles: Collection[str],
    box: Box,
    tokens: int,
) -> Config:
    """Return a configuration for a long run: pools of unlike sizes that run dry now and then.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    name : str
        The layout's name.
    cp_sizes : sequence of int
        Numbers of ranks that share a sequence.
    features, profiles : collection of str
        What the engine declares, and what is checked.
    box : Box
        Where the engine works.
    tokens : int
        Tokens of all requests, for which the pools have room.

    Returns
    -------
    Config
        One inside the box.
    """
    small = (1, 2, 4, 8)
    sizes = [t for t in small if allows(box.tokens_per_block, t)]
    within_small = msgspec.structs.replace(box, tokens_per_block=sizes) if sizes else box
    contents = not {"cache", MERGE}.isdisjoint(profiles)
    config = draw_config(
        choices, names=[name], cp_sizes=cp_sizes, features=features, contents=contents,
        box=within_small,
    )  # fmt: skip
    least = -(-tokens // (config.layout.tokens_per_block * len(config.pages)))
    pages = [nearest(box.pages, least + choices.integer(0, 20)) for _ in config.pages]
    max_len = config.max_len if box.max_len else 400
    return msgspec.structs.replace(config, pages=pages, max_len=max_len)


def _refuse_unfit(box: Box, config: Config) -> None:
    """Raise NothingInsideError when what a box led to is illegal, or outside of it after all."""
    if box == UNLIMITED:
        return
    missed, problem = outside(box, config), config_problem(config)
    if problem is not None:
        named = [name for name in box.__struct_fields__ if name in problem]
        raise NothingInsideError((*named, "capabilities")[0], problem.rstrip("."))
    if missed:
        raise NothingInsideError(missed[0], "what is drawn beside it does not go with it")


def _config(
    choices: Choices,
    names: Sequence[str],
    fitting: Sequence[int],
    tp_sizes: Sequence[int],
    world: int,
    features: Collection[str],
    max_pages: int,
    contents: bool,
    box: Box,
) -> Config:
    layout = draw_layout(choices, names=names, cp_sizes=fitting, box=box)
    c = layout.cp_size
    room = [p for p in tp_sizes if p * c <= world]
    tp_size = choices.pick(only(box, "tp_size", room, f"asked for are {_listed(room)}"))
    far = () if contents else (FAR_MAX_LEN,) * 2
    max_len = choices.pick(within(box, "max_len", (*MAX_LENS, *far)))
    model = ModelShape(q_heads=2 * tp_size * c, kv_heads=2 * tp_size)
    admission: Admission = "transfer"
    if contents or box != UNLIMITED:
        model = draw_model_shape(choices, cp_size=c, tp_size=tp_size, box=box)
        admission = choices.pick(within(box, "admission", get_args(Admission)))
        if contents and max_len > MAX_LENS[0]:
            model = _narrow(model, box)
            if admission == "prefill":
                short = (*MAX_LENS[:2] * 4, LONG_PREFILL)
                max_len = choices.pick(within(box, "max_len", short))
    modes: Sequence[bool] = (False, True) if "overlap" in features else (False,)
    modes = only(box, "overlap", modes, "overlap is no feature that is played")
    return Config(
        layout=layout,
        pages=_pages(choices, layout, max_len, max_pages, box),
        max_len=max_len,
        model=model,
        tp_size=tp_size,
        overlap=choices.pick(modes) if len(modes) > 1 else modes[0],
        admission=admission,
        seed=choices.integer(0, 3) if contents else 0,
        poison=not (contents and choices.one_in(4)),
    )


def _narrow(model: ModelShape, box: Box) -> ModelShape:
    """The model with one layer and small heads, where the box allows that: for long requests."""
    small = {"layers": 1, "head_dim": 16}
    changes = {name: size for name, size in small.items() if allows(getattr(box, name), size)}
    return msgspec.structs.replace(model, **changes)


def _pages(choices: Choices, layout: Layout, max_len: int, max_pages: int, box: Box) -> list[int]:
    """Return the sizes of the pools.

    Ample first: a trace that shrinks keeps small pools only where the failure needs them.
    """
    c = layout.cp_size
    kind = choices.pick(("ample", "alike", "each its own", "many", "the longest request"))
    if kind == "ample":
        pools = [AMPLE] * c
    elif kind in ("each its own", "many"):
        least = 40 if kind == "many" else 0
        pools = [least + choices.integer(1, max_pages) for _ in range(c)]
    else:
        longest = 0 if kind == "alike" else -(-max_len // layout.tokens_per_block)
        pools = [longest + choices.integer(1, max_pages)] * c
    return [nearest(box.pages, pages) for pages in pools]


def _spoiled(config: Config) -> Iterator[Config]:
    """Yield changes that make most configurations illegal; their numbers of ranks stay."""
    pages, model, per_block = config.pages, config.model, config.layout.tokens_per_block
    for pools in (pages[:-1], [*pages, 1], [*pages[:-1], 0], [0, *pages[1:]]):
        yield msgspec.structs.replace(config, pages=pools)
    layouts: list[dict[str, Any]] = [
        {"pages": "lockstep"},
        {"prompt_interleave": 2, "owner_interleave": 2},
        {"prompt_interleave": 1 + per_block},
    ]
    for changes in layouts:
        yield msgspec.structs.replace(config, layout=_relaid(config.layout, changes))
    kv_heads = config.tp_size + 1
    shapes: list[dict[str, Any]] = [
        {"kv_heads": model.q_heads + 1},
        {"q_heads": model.kv_heads},
        {"q_heads": model.q_heads + 1},
        {"q_heads": config.world_size, "kv_heads": 1},
        {"q_heads": kv_heads * config.world_size, "kv_heads": kv_heads},
        {"head_dim": 7},
        {"kv_heads": 1, "latent": LatentShape(latent_dim=33)},
        {"kv_heads": 1, "latent": LatentShape(rope_dim=7)},
        {"kv_heads": 2, "latent": LatentShape()},
        {"rope_base": 1.0},
        {"rope_base": 1e12},
    ]
    for changes in shapes:
        yield msgspec.structs.replace(config, model=msgspec.structs.replace(model, **changes))
    groups: list[dict[str, Any]] = [
        {"layers": [*range(model.layers + 1)]},
        {"layers": []},
        {"pool": "elsewhere"},
        {"tokens_per_block": 1},
        {"rope_base": 1.0},
    ]
    for changes in groups if config.groups else ():
        spoiled = msgspec.structs.replace(config.groups[0], **changes)
        yield msgspec.structs.replace(config, groups=[spoiled, *config.groups[1:]])
    if config.groups:
        yield msgspec.structs.replace(config, groups=[*config.groups, config.groups[0]])
        yield msgspec.structs.replace(config, pools=config.pools | {"elsewhere": pages})


def _relaid(layout: Layout, changes: dict[str, Any]) -> Layout:
    """Return a layout with these changes, interleaves only where it has one."""
    parts = ("prompt_interleave", "owner_interleave")
    absent = {part for part in parts if getattr(layout, part) is None}
    return layout.replace(**{part: to for part, to in changes.items() if part not in absent})


def draw_illegal_config(choices: Choices, config: Config) -> Config:
    """Return a change of a legal configuration that every engine must refuse to start with.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    config : Config
        A legal configuration; its number of ranks stays.

    Returns
    -------
    Config
        It breaks a rule of SPEC.md, section 4; a start with it is refused with `bad_config`.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> legal = draw_config(Seeded("0"))
    >>> config_problem(draw_illegal_config(Seeded("0"), legal)) is None
    False
    """
    return choices.pick([one for one in _spoiled(config) if config_problem(one) is not None])
