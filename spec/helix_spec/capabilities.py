"""Where an engine works: which configurations and events it can be asked for (SPEC.md, 10.4).

A declaration is a list of boxes. A box names, for each dimension it limits, the values that are
allowed; a dimension that it leaves out is free. A configuration is inside when one box allows all
of its values.

>>> boxes = boxes_of({"layouts": ["vllm_dcp"], "interleave": [1], "cp_size": {"min": 2, "max": 4}})
>>> config = Config(layout="vllm_dcp/1:C=8,T=4,I=2", pages=[9] * 8, max_len=20)
>>> outside(boxes[0], config)
['cp_size', 'interleave']
"""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Annotated, Any, Final, Literal

import msgspec

from helix_spec.config import Admission, CacheDType, Config, DType, Placement
from helix_spec.events import Admit, Decode, Event, Skip
from helix_spec.layouts import LayoutError, layout_name, parse_layout

Natural = Annotated[int, msgspec.Meta(ge=0, le=2**53)]


class Span(msgspec.Struct, frozen=True, forbid_unknown_fields=True, omit_defaults=True):
    """All integers from `min` to `max`, both included."""

    min: Natural = 0
    max: Natural = 2**53

    def __post_init__(self) -> None:
        if self.min > self.max:
            raise ValueError(f"A range from {self.min} to {self.max} holds no number")


Numbers = Annotated[list[Natural], msgspec.Meta(min_length=1)] | Span
"""Numbers that are allowed: those listed, or all of a range."""
_Names = Annotated[list[str], msgspec.Meta(min_length=1)]


class Box(
    msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True
):
    """What is allowed together; a dimension that is None is free.

    The first group limits configurations, the last five limit events that are to be accepted.
    """

    layouts: _Names | None = None
    """Names of layouts, or patterns of identifiers, in which `*` stands for any text."""
    attention: list[Literal["gqa", "latent"]] | None = None
    cp_size: Numbers | None = None
    tp_size: Numbers | None = None
    tokens_per_block: Numbers | None = None
    interleave: Numbers | None = None
    """Tokens that an interleave gives to one rank; free for layouts without one."""
    q_heads: Numbers | None = None
    kv_heads: Numbers | None = None
    q_heads_per_kv_head: Numbers | None = None
    head_dim: Numbers | None = None
    latent: list[tuple[Natural, Natural]] | None = None
    """Pairs of latent_dim and rope_dim; free for models without a latent."""
    rope: list[Literal["half", "none"]] | None = None
    """How RoPE rotates; `none` where Q and K are supplied as they are cached."""
    scale: list[Literal["default", "given"]] | None = None
    """Whether the factor of the scores is 1 / sqrt(head_dim), or is given."""
    sinks: list[bool] | None = None
    """Whether query heads have attention sinks."""
    dtype: list[DType] | None = None
    cache_dtype: list[CacheDType] | None = None
    """Element types of cached K and V: that of the model where no other is configured."""
    product_dtype: list[DType] | None = None
    partial_dtype: list[DType] | None = None
    layers: Numbers | None = None
    groups: Numbers | None = None
    """Cache groups; 0 where the configuration lists none."""
    placements: list[Placement] | None = None
    window: Numbers | None = None
    """Windows of cache groups; free without one."""
    max_len: Numbers | None = None
    pages: Numbers | None = None
    overlap: list[bool] | None = None
    admission: list[Admission] | None = None
    batch: Numbers | None = None
    """Rows of a decode or skip, dummies included."""
    live_requests: Numbers | None = None
    """Live requests after the event."""
    query_len: Numbers | None = None
    prompt_len: Numbers | None = None
    """Tokens that are placed as a prompt, by an admission or a resumption."""
    chunk: Numbers | None = None
    """Tokens in a chunk of a computed prompt, where an admission names them."""


class Freedoms(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Points in which engines differ rightly (SPEC.md, 10.5): what is demanded, never whether."""

    tail: Literal["as_taken", "zero", "any"] = "as_taken"
    """What a slot holds to which no token was written: what it held before, 0, or anything."""
    rewind_pages: Literal["returned", "kept"] = "returned"
    """Whether pages beyond the policy go back at an `accept`, or stay for the next tokens."""
    window_pages: Literal["returned", "kept"] = "returned"
    """Whether pages that no later query can see go back, or stay."""


STRICT: Final = Freedoms()
UNLIMITED: Final = Box()
EVERYWHERE: Final[tuple[Box, ...]] = (UNLIMITED,)
"""What an engine has that declares nothing: no limits."""
EVENT_DIMENSIONS: Final = ("batch", "live_requests", "query_len", "prompt_len", "chunk")
"""Dimensions of events; all others are of configurations."""


def boxes_of(declared: Any) -> tuple[Box, ...]:
    """Return what an engine declares as `capabilities`, checked.

    Parameters
    ----------
    declared
        A box or a list of boxes, as `Box` objects or as dictionaries; None for no limits.

    Returns
    -------
    tuple of Box
        At least one.

    Raises
    ------
    ValueError
        With a sentence without its subject, which is the engine.

    Examples
    --------
    >>> boxes_of({"head_dims": [128]})
    Traceback (most recent call last):
        ...
    ValueError: declares no capabilities: Object contains unknown field `head_dims` - at `$[0]`.
    """
    if declared is None:
        return EVERYWHERE
    listed = declared if isinstance(declared, list | tuple) else [declared]
    if not listed:
        raise ValueError("declares an empty list of capabilities; leave it out for no limits.")
    try:
        boxes = tuple(msgspec.convert(msgspec.to_builtins(list(listed)), list[Box]))
        for pattern in [pattern for box in boxes for pattern in box.layouts or []]:
            if "/" in pattern and "*" not in pattern:
                parse_layout(pattern)  # another text would be that of no layout
        return boxes
    except (msgspec.ValidationError, LayoutError, TypeError) as error:
        raise ValueError(f"declares no capabilities: {str(error).rstrip('.')}.") from error


def freedoms_of(declared: Any) -> Freedoms:
    """Return what an engine declares as `freedoms`, checked.

    Parameters
    ----------
    declared
        A `Freedoms`, or a dictionary of its fields; None for none.

    Raises
    ------
    ValueError
        With a sentence without its subject, which is the engine.

    Examples
    --------
    >>> freedoms_of({"rewind_pages": "kept"}).tail
    'as_taken'
    >>> freedoms_of({"tail": "full"})
    Traceback (most recent call last):
        ...
    ValueError: declares no freedoms: Invalid enum value 'full' - at `$.tail`.
    """
    if declared is None:
        return STRICT
    try:
        return msgspec.convert(msgspec.to_builtins(declared), Freedoms)
    except (msgspec.ValidationError, TypeError) as error:
        raise ValueError(f"declares no freedoms: {error}.") from error


def freedoms_in_words(freedoms: Freedoms) -> str:
    """Return the freedoms that an engine takes, as reports say them; empty for none.

    Examples
    --------
    >>> freedoms_in_words(Freedoms(tail="zero"))
    'tail zero'
    """
    taken = msgspec.structs.asdict(freedoms)
    return ", ".join(f"{name} {how}" for name, how in taken.items() if how != getattr(STRICT, name))


def allows(allowed: Sequence[object] | Span | None, value: Any) -> bool:
    """Return whether a dimension's declared values hold this one.

    Examples
    --------
    >>> allows([1, 2], 3), allows(Span(min=2), 3), allows(None, 3)
    (False, True, True)
    """
    if allowed is None:
        return True
    if isinstance(allowed, Span):
        return bool(allowed.min <= value <= allowed.max)
    return value in allowed


def values_of(config: Config) -> dict[str, list[Any]]:
    """Return a configuration's values in each dimension of configurations but `layouts`.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=2,T=4", pages=[3, 5], max_len=8)
    >>> [values_of(config)[name] for name in ("cp_size", "pages", "interleave")]
    [[2], [3, 5], []]
    """
    layout, shape = config.layout, config.model
    interleaves = (layout.prompt_interleave, layout.owner_interleave)
    latent = shape.latent
    return {
        "attention": ["gqa" if latent is None else "latent"],
        "cp_size": [layout.cp_size],
        "tp_size": [config.tp_size],
        "tokens_per_block": [
            layout.tokens_per_block,
            *(group.tokens_per_block for group in config.groups if group.tokens_per_block),
        ],
        "interleave": [interleave for interleave in interleaves if interleave is not None],
        "q_heads": [shape.q_heads],
        "kv_heads": [shape.kv_heads],
        "q_heads_per_kv_head": [shape.q_heads // shape.kv_heads],
        "head_dim": [shape.head_dim],
        "latent": [] if latent is None else [(latent.latent_dim, latent.rope_dim)],
        "rope": [shape.rope or "none"],
        "scale": ["default" if shape.scale is None else "given"],
        "sinks": [shape.sinks],
        "dtype": [shape.dtype],
        "cache_dtype": [shape.cached_dtype],
        "product_dtype": [shape.product_dtype],
        "partial_dtype": [shape.partial_dtype],
        "layers": [shape.layers],
        "groups": [len(config.groups)],
        "placements": [group.placement for group in config.groups],
        "window": [group.window for group in config.groups if group.window is not None],
        "max_len": [config.max_len],
        "pages": [*config.pages, *(size for pool in config.pools.values() for size in pool)],
        "overlap": [config.overlap],
        "admission": [config.admission],
    }


def outside(box: Box, config: Config) -> list[str]:
    """Return the dimensions in which a configuration lies outside a box; none when it is inside.

    Examples
    --------
    >>> outside(Box(layouts=["vllm_*"]), Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8))
    ['layouts']
    """
    layout = config.layout
    texts = (layout_name(layout), str(layout))
    names = box.layouts
    missed = names is not None and not any(fnmatchcase(t, name) for name in names for t in texts)
    return ["layouts"] * missed + [
        name
        for name, values in values_of(config).items()
        if not all(allows(getattr(box, name), value) for value in values)
    ]


def boxes_around(boxes: Sequence[Box], config: Config) -> list[Box]:
    """Return the boxes that hold a configuration; none when it is outside."""
    return [box for box in boxes if not outside(box, config)]


def event_outside(box: Box, event: Event, *, live: int, placed: int | None = None) -> list[str]:
    """Return the dimensions in which an event that is to be accepted lies outside a box.

    Parameters
    ----------
    box
        One that holds the configuration.
    event
        The event.
    live
        Live requests after it.
    placed
        Tokens that a resumption places.

    Examples
    --------
    >>> event_outside(Box(batch=[1, 2], query_len=[1]), Decode([7, 8], [1, 1], pad=1), live=2)
    ['batch']
    """
    values: dict[str, list[int]] = {"live_requests": [live]}
    if isinstance(event, Decode | Skip):
        pad = event.pad if isinstance(event, Decode) else 0
        values |= {"batch": [len(event.ids) + pad], "query_len": event.query_lens}
    if isinstance(event, Admit):
        placed = event.prompt_len
        values["chunk"] = [event.chunk] if event.chunk else []
    values["prompt_len"] = [] if placed is None else [placed]
    return [
        name
        for name in EVENT_DIMENSIONS
        if not all(allows(getattr(box, name), value) for value in values.get(name, ()))
    ]


def in_words(boxes: Sequence[Box]) -> str:
    """Return capabilities as reports say them; empty for an engine without limits.

    Examples
    --------
    >>> in_words(boxes_of({"tokens_per_block": [64], "cp_size": {"min": 2, "max": 8}}))
    'cp_size 2 to 8, tokens_per_block 64'
    """
    return "; or ".join(
        ", ".join(
            f"{name} {_values_in_words(allowed)}"
            for name in box.__struct_fields__
            if (allowed := getattr(box, name)) is not None
        )
        or "anything"
        for box in boxes
        if tuple(boxes) != EVERYWHERE
    )


def _values_in_words(allowed: Sequence[Any] | Span) -> str:
    if isinstance(allowed, Span):
        top = "" if allowed.max == Span().max else f" to {allowed.max}"
        return f"{allowed.min}{top or ' and more'}"
    pairs = ("+".join(map(str, one)) if isinstance(one, tuple) else str(one) for one in allowed)
    return " or ".join(pairs)
