"""What an engine is started with, and when it must refuse to start (SPEC.md section 4)."""

from __future__ import annotations

import math
from functools import cache
from types import NoneType, UnionType
from typing import Annotated, Any, Final, Literal, get_args, get_origin, get_type_hints

import msgspec

from helix_spec.layouts import Layout, LayoutError, layout_problem, parse_layout

DType = Literal["float32", "float16", "bfloat16"]
CacheDType = Literal["float32", "float16", "bfloat16", "float8_e4m3fn"]
Admission = Literal["transfer", "prefill"]
Rope = Literal["half"]
Placement = Literal["sharded", "replicated"]
PoolSize = Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)]
Count = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]

MAX_REQUEST_LEN: Final = 2**31 - 1
"""Largest `max_len`: positions fit a signed 32-bit integer, as in every engine's kernels."""


def encode_layout(value: Any) -> str:
    """Return a layout as its identifier: the `enc_hook` of whatever writes a `Config`.

    Raises
    ------
    NotImplementedError
        When the value is no layout, as msgspec asks of such a hook.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8)
    >>> msgspec.to_builtins(config, enc_hook=encode_layout)["layout"]
    'pr9757/1:C=1,T=4'
    """
    if isinstance(value, Layout):
        return str(value)
    raise NotImplementedError(f"A {type(value).__name__} has no JSON form.")


def decode_layout(kind: type[Any], value: Any) -> Any:
    """Return the layout that an identifier names: the `dec_hook` of whatever reads a `Config`.

    Parameters
    ----------
    kind
        The type that msgspec wants; only `Layout`.
    value
        What the JSON text holds in its place.

    Raises
    ------
    LayoutError
        When the value is no canonical identifier.
    NotImplementedError
        When another type is wanted.

    Examples
    --------
    >>> config = {"layout": "pr9757/1:C=1,T=4", "pages": [3], "max_len": 8}
    >>> msgspec.convert(config, Config, dec_hook=decode_layout).layout.cp_size
    1
    """
    if kind is not Layout:
        raise NotImplementedError(f"A {kind.__name__} has no JSON form.")
    if not isinstance(value, str):
        raise LayoutError(f"Expected `str`, got `{type(value).__name__}`")
    return parse_layout(value)


def layout_schema(kind: type[Any]) -> dict[str, str]:
    """Return the schema of a layout: the `schema_hook` of whatever publishes a `Config`.

    Raises
    ------
    NotImplementedError
        When another type is wanted.
    """
    if kind is not Layout:
        raise NotImplementedError
    return {"type": "string"}


class LatentShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What multi-head latent attention (MLA) caches of a token: one row, read by all heads.

    The row is its key. Its first `latent_dim` elements are also its value; RoPE rotates the
    `rope_dim` elements after them, which may be none. DeepSeek: kv_lora_rank 512 and
    qk_rope_head_dim 64.
    """

    latent_dim: Count = 512
    rope_dim: Annotated[int, msgspec.Meta(ge=0, le=2**31 - 1)] = 64


class ModelShape(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """The attention of one model: head counts, dimensions in elements, element types."""

    layers: Count = 1
    q_heads: Count = 4
    kv_heads: Count = 2
    head_dim: Count = 16
    """Elements of a head of Q, K and V; with `latent`, of Q and K before absorption."""
    latent: LatentShape | None = None
    """The cached row of a model with MLA, whose queries arrive absorbed; None without MLA."""
    dtype: DType = "float32"
    """Dtype of Q, of K and V before they are cached, and of the output."""
    cache_dtype: Literal["float8_e4m3fn"] | None = None
    """Dtype of the cached K and V where it is not `dtype`; there is no scale."""
    product_dtype: DType = "float32"
    """Dtype of the P·V product: the least precise that an engine may use there."""
    partial_dtype: DType = "float32"
    """Dtype of partial outputs on the wire; their log-sum-exp is always float32."""
    rope_base: float = 10000.0
    rope: Rope | None = "half"
    """Which elements RoPE rotates with each other: d and d + R/2; None for Q and K that are
    supplied as they are cached."""
    scale: Annotated[float, msgspec.Meta(gt=0, le=16)] | None = None
    """The factor of the scores; None for 1 / sqrt(head_dim)."""
    sinks: bool = False
    """Whether each query head has an attention sink: a logit in its softmax without a value."""

    @property
    def cached_dtype(self) -> CacheDType:
        """Dtype of the cached K and V."""
        return self.cache_dtype or self.dtype

    @property
    def key_dim(self) -> int:
        """Elements of a cached key, and of a query head that meets it: W of SPEC.md."""
        return self.latent.latent_dim + self.latent.rope_dim if self.latent else self.head_dim

    @property
    def value_dim(self) -> int:
        """Elements of a cached value, and of a head's output: D of SPEC.md."""
        return self.latent.latent_dim if self.latent else self.head_dim

    @property
    def rope_dim(self) -> int:
        """How many of the last elements of a query head and a key RoPE rotates: R of SPEC.md."""
        if self.rope is None:
            return 0
        return self.latent.rope_dim if self.latent else self.head_dim

    @property
    def softmax_scale(self) -> float:
        """The factor of the scores: `scale`, or 1 / sqrt(head_dim).

        Examples
        --------
        >>> ModelShape(head_dim=64).softmax_scale, ModelShape(scale=0.5).softmax_scale
        (0.125, 0.5)
        """
        return 1.0 / math.sqrt(self.head_dim) if self.scale is None else self.scale


MAIN_POOL: Final = "main"
"""Name of the pool whose sizes are `Config.pages`."""
GroupName = Annotated[str, msgspec.Meta(pattern="^[a-z][a-z0-9_]{0,30}$")]


class CacheGroup(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Layers whose KV is placed by one rule (SPEC.md section 4.2)."""

    name: GroupName
    layers: list[Annotated[int, msgspec.Meta(ge=0)]]
    """The layers that read it, rising."""
    placement: Placement = "sharded"
    window: Count | None = None
    """A query at position p sees positions above p - window alone; None for all up to p."""
    tokens_per_block: Count | None = None
    """Tokens in a page; None for that of the layout."""
    pool: GroupName = MAIN_POOL
    rope_base: float | None = None
    """None for that of the model."""


class Config(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Everything that every rank knows from the start.

    `layout` is a layout, written as its identifier. `pages[r]` is the pool size, in pages, of the
    ranks with cp_rank r (tensor-parallel peers hold the same tokens, so they need the same pages):
    all ranks know all of it, so each derives every refusal without asking. `max_len` is the number
    of global tokens a request may reach.
    """

    layout: Layout
    pages: list[PoolSize]
    max_len: Annotated[int, msgspec.Meta(ge=1, le=MAX_REQUEST_LEN)]
    model: ModelShape = ModelShape()
    groups: list[CacheGroup] = []
    """What is kept of a request; none for one cache group of all layers (SPEC.md section 4.2)."""
    pools: dict[GroupName, list[PoolSize]] = {}
    """Pools beside `pages`, by name: a size for each cp_rank."""
    tp_size: Count = 1
    overlap: bool = False
    admission: Admission = "transfer"
    seed: Annotated[int, msgspec.Meta(ge=0, le=2**32 - 1)] = 0
    poison: bool = True

    def __post_init__(self) -> None:
        # An identifier is taken too. Raises LayoutError when the text is none.
        if isinstance(self.layout, str):
            msgspec.structs.force_setattr(self, "layout", parse_layout(self.layout))

    @property
    def world_size(self) -> int:
        """Number of ranks: tp_size * cp_size (MAP-1).

        Examples
        --------
        >>> Config(layout="pr9757/1:C=2,T=4", pages=[3, 3], max_len=8, tp_size=2).world_size
        4
        """
        return self.tp_size * self.layout.cp_size

    @property
    def cache_groups(self) -> list[CacheGroup]:
        """What is kept of a request: `groups`, or one of all layers where none are listed.

        Examples
        --------
        >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8)
        >>> [(group.name, group.layers) for group in config.cache_groups]
        [('all', [0])]
        """
        return self.groups or [CacheGroup(name="all", layers=list(range(self.model.layers)))]

    def shape_of(self, layer: int) -> ModelShape:
        """Return the model as one of its layers sees it: with the base that its groups give RoPE.

        Parameters
        ----------
        layer
            A layer, from 0.
        """
        bases = [group.rope_base for group in self.groups if layer in group.layers]
        if not bases or bases[0] is None:
            return self.model
        return msgspec.structs.replace(self.model, rope_base=bases[0])

    def pool_sizes(self, pool: str) -> list[int]:
        """Return the sizes of a pool, in pages, by cp_rank.

        Parameters
        ----------
        pool
            `main`, or a name in `pools`.
        """
        return self.pages if pool == MAIN_POOL else self.pools[pool]

    def layout_of(self, group: CacheGroup) -> Layout:
        """Return the layout by which a cache group is placed (SPEC.md section 4.2).

        Examples
        --------
        >>> near = CacheGroup(name="near", layers=[0], placement="replicated", tokens_per_block=2)
        >>> config = Config(layout="pr9757/1:C=2,T=4", pages=[3, 3], max_len=8, groups=[near])
        >>> str(config.layout_of(near))
        'pr9757/1:C=1,T=2'
        """
        return self.layout.replace(
            cp_size=1 if group.placement == "replicated" else self.layout.cp_size,
            tokens_per_block=group.tokens_per_block or self.layout.tokens_per_block,
        )

    def alone(self, group: CacheGroup, cp_rank: int = 0) -> Config:
        """Return the configuration in which a cache group is all that is kept.

        Parameters
        ----------
        group
            One of `groups`.
        cp_rank
            The rank of which a replicated group is asked; a sharded one is that of all ranks.

        Returns
        -------
        Config
            Without `groups`: the group's layout, pool, layers and rope_base. Its values differ from
            the group's where that is not the first (SPEC.md section 8), and it has no window.

        Examples
        --------
        >>> near = CacheGroup(name="near", layers=[0], placement="replicated")
        >>> config = Config(layout="pr9757/1:C=2,T=4", pages=[3, 5], max_len=8, groups=[near])
        >>> config.alone(near, cp_rank=1).pages
        [5]
        """
        sizes = self.pool_sizes(group.pool)
        base = self.model.rope_base if group.rope_base is None else group.rope_base
        return msgspec.structs.replace(
            self,
            layout=self.layout_of(group),
            pages=[sizes[cp_rank]] if group.placement == "replicated" else sizes,
            model=msgspec.structs.replace(self.model, layers=len(group.layers), rope_base=base),
            groups=[],
            pools={},
        )

    def kv_heads_of(self, tp_rank: int) -> range:
        """Return the KV heads that the ranks of a tp_rank cache; every one of them caches a latent.

        Parameters
        ----------
        tp_rank
            A tensor-parallel rank, 0 to tp_size - 1.

        Returns
        -------
        range
            Numbers of KV heads of the whole model.

        Examples
        --------
        >>> config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8, tp_size=2)
        >>> config.kv_heads_of(1)
        range(1, 2)
        """
        if self.model.latent is not None:
            return range(1)
        heads = self.model.kv_heads // self.tp_size
        return range(tp_rank * heads, (tp_rank + 1) * heads)


def config_problem(config: Config) -> str | None:
    """Return why no engine may start with this configuration, as a sentence; None when it may.

    An engine refuses each of these with `bad_config`.

    Examples
    --------
    >>> config_problem(Config(layout="pr9757/1:C=2,T=4", pages=[3], max_len=8))
    'pages lists 1 pool sizes for cp_size 2; it must list one for each cp_rank.'
    >>> config_problem(Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=1e5))
    'max_len is 100000.0; it must be an integer.'
    """
    problem = _field_problem(config)
    if problem is not None:
        return problem
    layout = config.layout
    problem = layout_problem(layout)
    if problem is not None:
        return problem
    if len(config.pages) != layout.cp_size:
        return (
            f"pages lists {len(config.pages)} pool sizes for cp_size {layout.cp_size}; "
            "it must list one for each cp_rank."
        )
    for rank, pages in enumerate(config.pages):
        if pages < 1:
            return f"The pool of cp_rank {rank} has {pages} pages; it must hold at least one."
    problem = _heads_problem(config.model, config.tp_size, layout.cp_size)
    return problem or _groups_problem(config)


_IN_WORDS: Final = {"int": "an integer", "float": "a number", "bool": "true or false"}


def _field_problem(part: msgspec.Struct | Layout, inside: str = "") -> str | None:
    """Why JSON cannot hold a part of a configuration.

    Msgspec checks what it reads, and nothing that Python's constructors are given.
    """
    kind_of_part: Any = type(part)
    for name, kind in _field_types(kind_of_part).items():
        value = getattr(part, name)
        try:
            msgspec.convert(value, kind)
        except msgspec.ValidationError as error:
            return f"{inside}{name} is {value!r}; it must be {_wanted(kind, str(error))}."
        within = {f"{inside}{name}.": value}
        if isinstance(value, list):
            within = {f"{inside}{name}[{place}].": entry for place, entry in enumerate(value)}
        for where, entry in within.items():
            if isinstance(entry, msgspec.Struct | Layout):
                problem = _field_problem(entry, where)
                if problem is not None:
                    return problem
    return None


@cache
def _field_types(kind: Any) -> dict[str, Any]:
    """Return the fields' types by name, which take long to find."""
    return get_type_hints(kind, include_extras=True)


def _wanted(kind: Any, error: str) -> str:
    """What a field of this type holds, given what msgspec says of something else."""
    choices = [kind, *get_args(kind)]
    values = [value for one in choices if get_origin(one) is Literal for value in get_args(one)]
    if values:
        return f"one of {', '.join(values)}"
    if isinstance(kind, UnionType):
        kinds = ("None" if one is NoneType else f"a {one.__name__}" for one in choices[1:])
        return " or ".join(kinds)
    if kind is GroupName:
        return "up to 31 lower-case letters, digits and _, a letter first"
    wanted, _, place = error.removeprefix("Expected `").partition(" - at `$")
    word, _, bound = wanted.partition(", got")[0].partition("`")
    name = f"a {getattr(kind, '__name__', word)}"
    return f"{_IN_WORDS.get(word, name)}{bound}" + (f" at {place.rstrip('`')}" if place else "")


def _heads_problem(model: ModelShape, tp_size: int, cp_size: int) -> str | None:
    if model.latent is not None and model.kv_heads != 1:
        return (
            f"The model has {model.kv_heads} KV heads and a latent cache; all heads read the one "
            "latent, so kv_heads must be 1."
        )
    if model.q_heads % model.kv_heads != 0:
        return (
            f"{model.q_heads} query heads do not divide into {model.kv_heads} KV heads; "
            "the KV heads must divide the query heads."
        )
    if model.latent is None and tp_size > model.kv_heads:
        return (
            f"tp_size {tp_size} is above the {model.kv_heads} KV heads; a KV head cannot be "
            "split, so tp_size may be at most their number."
        )
    if model.latent is None and model.kv_heads % tp_size != 0:
        return f"tp_size {tp_size} does not divide the {model.kv_heads} KV heads."
    if model.q_heads % (tp_size * cp_size) != 0:
        return (
            f"{model.q_heads} query heads do not divide by tp_size * cp_size = "
            f"{tp_size} * {cp_size}; after the exchange each rank holds an equal slice of them."
        )
    if model.value_dim % 2 != 0 and model.latent is not None:
        return (
            f"latent_dim is {model.value_dim}; it must be even, so that what travels in 16 bits "
            "fills whole words."
        )
    name, pairs = "head_dim", model.head_dim
    if model.latent is not None:
        name, pairs = "rope_dim", model.latent.rope_dim
    if pairs % 2 != 0:
        return f"{name} is {pairs}; RoPE rotates pairs, so it must be even."
    if not 1.0 < model.rope_base < 1e12:
        return f"rope_base is {model.rope_base}; it must lie between 1 and 1e12."
    return None


def _groups_problem(config: Config) -> str | None:
    """Why no engine may start with these cache groups and pools (SPEC.md section 4.2)."""
    groups, names = config.groups, [group.name for group in config.groups]
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        return f"Two cache groups are named {twice}; each must have a name of its own."
    for group in groups:
        problem = _group_problem(config, group)
        if problem is not None:
            return f"The cache group {group.name} {problem}"
    for layer in range(config.model.layers) if groups else ():
        bases = {group.rope_base for group in groups if layer in group.layers}
        if not bases:
            return f"No cache group names layer {layer}; every layer must read at least one."
        if len(bases) > 1:
            return (
                f"The cache groups of layer {layer} have other bases of RoPE; their keys meet one "
                "query, so rope_base must be the same."
            )
    drawn = {group.pool for group in groups} if groups else {MAIN_POOL}
    for name in (MAIN_POOL, *config.pools):
        if name not in drawn:
            return f"No cache group takes pages from the pool {name}; leave it out or name it."
    for name, sizes in config.pools.items():
        if name == MAIN_POOL:
            return "pools names the pool main, whose sizes are those of pages."
        if len(sizes) != config.layout.cp_size or min(sizes) < 1:
            return (
                f"The pool {name} lists the sizes {sizes}; it must list at least one page for each "
                f"of {config.layout.cp_size} cp_ranks."
            )
    return None


def _group_problem(config: Config, group: CacheGroup) -> str | None:
    """What is wrong with one cache group, after its name."""
    layers, last = group.layers, config.model.layers - 1
    if not layers or sorted(set(layers)) != layers or layers[-1] > last:
        return f"names the layers {layers}; they must be rising numbers from 0 to {last}."
    problem = layout_problem(config.layout_of(group))
    if problem is not None:
        return f"cannot be placed: {problem}"
    if group.pool != MAIN_POOL and group.pool not in config.pools:
        return f"takes pages from the pool {group.pool}, of which pools tells no sizes."
    if group.rope_base is not None and not 1.0 < group.rope_base < 1e12:
        return f"has the rope_base {group.rope_base}; it must lie between 1 and 1e12."
    return None
