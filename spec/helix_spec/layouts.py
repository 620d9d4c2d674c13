"""Layouts: the rule that says which rank holds which token, as data (SPEC.md section 3).

A layout has four parts (prompt split, decode owner, page policy, start) and two sizes
(`cp_size`, `tokens_per_block`). It carries no arithmetic; `placement` does.

An identifier names a layout in logs, in files and between transfer peers:

>>> parse_layout("pr9757/1:C=4,T=32").owner
'step'
>>> format_layout(named_layout("vllm_dcp", cp_size=4, tokens_per_block=32, interleave=1))
'vllm_dcp/1:C=4,T=32,I=1'
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Final, Literal, final, get_args

PromptSplit = Literal["contiguous", "round_robin", "interleave"]
DecodeOwner = Literal["last_rank", "step", "position", "interleave"]
PagePolicy = Literal["lazy", "lockstep"]
Start = Literal["rank_zero", "rotated"]

IDENTIFIER_VERSION: Final = 1
"""Version of the rules behind a layout name; it is part of every identifier."""


class LayoutError(ValueError):
    """A text that is no layout identifier, or not the canonical one, or names no layout."""


@final
class Layout:
    """A placement rule. Sizes are counts of ranks and of tokens.

    A layout may be illegal (see `layout_problem`): an engine has to be able to receive one
    in order to refuse it. It is a plain class, so that JSON holds its identifier instead of its
    parts. It is immutable, hashable, and equal to another when all parts are.

    Parameters
    ----------
    prompt, owner, pages, start
        The four parts of the rule.
    cp_size
        Ranks that share a sequence.
    tokens_per_block
        Tokens in a page.
    prompt_interleave
        Consecutive tokens that an `interleave` prompt split gives to one rank; None for the
        other splits.
    owner_interleave
        Consecutive tokens that an `interleave` owner rule gives to one rank; None for the other
        rules.

    Examples
    --------
    >>> str(Layout("contiguous", "step", "lazy", "rank_zero", 4, 32))
    'pr9757/1:C=4,T=32'
    """

    __slots__ = (
        *("prompt", "owner", "pages", "start", "cp_size", "tokens_per_block"),
        *("prompt_interleave", "owner_interleave"),
    )
    prompt: PromptSplit
    owner: DecodeOwner
    pages: PagePolicy
    start: Start
    cp_size: int
    tokens_per_block: int
    prompt_interleave: int | None
    owner_interleave: int | None

    def __init__(
        self,
        prompt: PromptSplit,
        owner: DecodeOwner,
        pages: PagePolicy,
        start: Start,
        cp_size: int,
        tokens_per_block: int,
        prompt_interleave: int | None = None,
        owner_interleave: int | None = None,
    ) -> None:
        rule = (prompt, owner, pages, start)
        sizes = (cp_size, tokens_per_block, prompt_interleave, owner_interleave)
        for name, part in zip(self.__slots__, (*rule, *sizes), strict=True):
            object.__setattr__(self, name, part)

    def parts(self) -> dict[str, Any]:
        """Return all parts and sizes by name, in the order of the constructor's parameters."""
        return {name: getattr(self, name) for name in self.__slots__}

    def replace(self, **changes: Any) -> Layout:
        """Return a layout with some parts or sizes changed.

        Parameters
        ----------
        **changes
            New values, by the names of the constructor's parameters.

        Examples
        --------
        >>> str(parse_layout("pr9757/1:C=4,T=32").replace(cp_size=2))
        'pr9757/1:C=2,T=32'
        """
        return Layout(**self.parts() | changes)

    def __setattr__(self, name: str, value: Any) -> None:
        raise AttributeError(f"A layout does not change; make another one to set {name}.")

    def __reduce__(self) -> tuple[type[Layout], tuple[Any, ...]]:
        return Layout, tuple(self.parts().values())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Layout) and self.parts() == other.parts()

    def __hash__(self) -> int:
        return hash(tuple(self.parts().values()))

    def __str__(self) -> str:
        return format_layout(self)

    def __repr__(self) -> str:
        return f"Layout({', '.join(f'{name}={part!r}' for name, part in self.parts().items())})"


@dataclass(frozen=True, slots=True)
class Rule:
    """The four parts of a layout without its sizes."""

    prompt: PromptSplit
    owner: DecodeOwner
    pages: PagePolicy
    start: Start


NAMED_LAYOUTS: Final[dict[str, Rule]] = {
    "before_9757": Rule("contiguous", "last_rank", "lazy", "rank_zero"),
    "pr9757": Rule("contiguous", "step", "lazy", "rank_zero"),
    "pr13180": Rule("round_robin", "step", "lazy", "rank_zero"),
    "pr17866": Rule("round_robin", "position", "lockstep", "rank_zero"),
    "vllm_dcp": Rule("interleave", "interleave", "lockstep", "rank_zero"),
    "balanced": Rule("round_robin", "position", "lazy", "rotated"),
}
"""The layouts that have a name. The first five are TensorRT-LLM's (pull requests 9757, 13180,
17866) and vLLM's; `balanced` is this project's own."""
LAYOUT_NAMES: Final = (*NAMED_LAYOUTS, "custom")
"""What the name of a layout may be: that of a named one, or `custom` for any other."""


def named_layout(
    name: str, *, cp_size: int, tokens_per_block: int, interleave: int | None = None
) -> Layout:
    """Return the layout of this name and these sizes.

    Parameters
    ----------
    name
        A key of `NAMED_LAYOUTS`.
    cp_size
        Ranks that share a sequence.
    tokens_per_block
        Tokens in a page.
    interleave
        Consecutive tokens on one rank; for `vllm_dcp` alone, where None means 1.

    Raises
    ------
    LayoutError
        When no layout has this name, or when it takes no interleave and one is given.

    Examples
    --------
    >>> str(named_layout("pr17866", cp_size=4, tokens_per_block=32))
    'pr17866/1:C=4,T=32'
    """
    rule = NAMED_LAYOUTS.get(name)
    if rule is None:
        raise LayoutError(
            f"There is no layout named {name!r}; the named layouts are {', '.join(NAMED_LAYOUTS)}."
        )
    if rule.prompt == "interleave":
        interleave = 1 if interleave is None else interleave
    elif interleave is not None:
        raise LayoutError(f"Layout {name} takes no interleave, yet I={interleave} was given.")
    return Layout(
        rule.prompt,
        rule.owner,
        rule.pages,
        rule.start,
        cp_size,
        tokens_per_block,
        prompt_interleave=interleave,
        owner_interleave=interleave,
    )


def layout_problem(layout: Layout) -> str | None:
    """Return why no engine may start with this layout, as a sentence; None when it is legal.

    Examples
    --------
    >>> layout_problem(parse_layout("vllm_dcp/1:C=4,T=32,I=5"))
    'The prompt split interleaves 5 tokens, which does not divide tokens_per_block 32.'
    >>> layout_problem(parse_layout("vllm_dcp/1:C=4,T=32,I=4")) is None
    True
    """
    if layout.cp_size < 1:
        return f"cp_size is {layout.cp_size}; it must be at least 1."
    if layout.tokens_per_block < 1:
        return f"tokens_per_block is {layout.tokens_per_block}; it must be at least 1."
    for part, rule, interleave in (
        ("prompt split", layout.prompt, layout.prompt_interleave),
        ("decode owner", layout.owner, layout.owner_interleave),
    ):
        if (rule == "interleave") != (interleave is not None):
            return f"The {part} is {rule}, and its interleave is {interleave}: one needs the other."
        if interleave is not None and (interleave < 1 or layout.tokens_per_block % interleave != 0):
            return (
                f"The {part} interleaves {interleave} tokens, which does not divide "
                f"tokens_per_block {layout.tokens_per_block}."
            )
    if layout.pages == "lockstep" and not _lockstep_is_legal(layout):
        return (
            f"Page policy lockstep with prompt split {layout.prompt} and decode owner "
            f"{layout.owner} can leave a rank without a page it needs; lockstep is legal only for "
            "round_robin with position, and for interleave with interleave of the same size."
        )
    return None


def _lockstep_is_legal(layout: Layout) -> bool:
    return (layout.prompt, layout.owner) == ("round_robin", "position") or (
        layout.prompt == layout.owner == "interleave"
        and layout.prompt_interleave == layout.owner_interleave
    )


def layout_name(layout: Layout) -> str:
    """Return the name of the layout, or `custom` when it has none.

    Examples
    --------
    >>> layout_name(Layout("contiguous", "step", "lazy", "rank_zero", 4, 32))
    'pr9757'
    """
    for name, rule in NAMED_LAYOUTS.items():
        if rule == Rule(layout.prompt, layout.owner, layout.pages, layout.start) and (
            layout.prompt_interleave == layout.owner_interleave
            and (layout.owner_interleave is not None) == (rule.owner == "interleave")
        ):
            return name
    return "custom"


def format_layout(layout: Layout) -> str:
    """Return the canonical identifier of a layout: every layout has exactly one.

    Examples
    --------
    >>> format_layout(Layout("contiguous", "step", "lazy", "rotated", 4, 32))
    'custom/1:prompt=contiguous,owner=step,pages=lazy,start=rotated,C=4,T=32'
    """
    name = layout_name(layout)
    fields = {}
    if name == "custom":
        fields = {
            "prompt": _with_interleave(layout.prompt, layout.prompt_interleave),
            "owner": _with_interleave(layout.owner, layout.owner_interleave),
            "pages": layout.pages,
            "start": layout.start,
        }
    fields |= {"C": str(layout.cp_size), "T": str(layout.tokens_per_block)}
    if name != "custom" and layout.owner_interleave is not None:
        fields["I"] = str(layout.owner_interleave)
    return f"{name}/{IDENTIFIER_VERSION}:" + ",".join(f"{k}={v}" for k, v in fields.items())


def _with_interleave(rule: str, interleave: int | None) -> str:
    return rule if interleave is None else f"{rule}({interleave})"


_NUMBER = r"0{0,9}[1-9][0-9]{0,8}"
_FIELD = rf"(?:[CTI]={_NUMBER}|[a-z]+=[a-z_]+(?:\({_NUMBER}\))?)"
_IDENTIFIER = re.compile(
    rf"(?P<name>[a-z0-9_]+)/(?P<version>[0-9]{{1,9}}):(?P<fields>{_FIELD}(?:,{_FIELD})*)"
)
"""Any spelling: fields in another order and leading zeros are understood, to name the right one."""
_NAMED_FIELDS: Final = ({"C", "T"}, {"C", "T", "I"})
_CUSTOM_FIELDS: Final = {"prompt", "owner", "pages", "start", "C", "T"}


@lru_cache(maxsize=4096)
def parse_layout(text: str) -> Layout:
    """Return the layout that an identifier names. It may be illegal (see `layout_problem`).

    Parameters
    ----------
    text
        A canonical identifier (SPEC.md section 3.7).

    Raises
    ------
    LayoutError
        When the text is no identifier of this version, or not the canonical one of its layout:
        peers compare identifiers as text.

    Examples
    --------
    >>> parse_layout("vllm_dcp/1:C=4,T=32,I=2").prompt_interleave
    2
    >>> parse_layout("vllm_dcp/1:C=4,T=32")  # doctest: +ELLIPSIS
    Traceback (most recent call last):
    helix_spec.layouts.LayoutError: ... is not canonical; this layout is written ...
    """
    match = _IDENTIFIER.fullmatch(text)
    fields = [field.split("=") for field in match["fields"].split(",")] if match else []
    part = dict(fields)
    is_custom = part.keys() == _CUSTOM_FIELDS and match is not None and match["name"] == "custom"
    whole = len(part) == len(fields) and (is_custom or part.keys() in _NAMED_FIELDS)
    if match is None or not whole:
        raise LayoutError(
            f"{text!r} is no layout identifier; one reads like pr9757/1:C=4,T=32 or "
            "custom/1:prompt=contiguous,owner=position,pages=lazy,start=rotated,C=4,T=32."
        )
    if int(match["version"]) != IDENTIFIER_VERSION:
        raise LayoutError(
            f"{text!r} is of version {match['version']}; this specification defines version "
            f"{IDENTIFIER_VERSION}."
        )
    sizes = {"cp_size": int(part["C"]), "tokens_per_block": int(part["T"])}
    if is_custom:
        layout = _custom_layout(part, **sizes)
    else:
        interleave = int(part["I"]) if "I" in part else None
        layout = named_layout(match["name"], **sizes, interleave=interleave)
    canonical = format_layout(layout)
    if canonical != text:
        raise LayoutError(f"{text!r} is not canonical; this layout is written {canonical!r}.")
    return layout


def _custom_layout(part: dict[str, str], *, cp_size: int, tokens_per_block: int) -> Layout:
    prompt, prompt_interleave = _split_interleave(part["prompt"])
    owner, owner_interleave = _split_interleave(part["owner"])
    values = {"prompt": prompt, "owner": owner, "pages": part["pages"], "start": part["start"]}
    known = {"prompt": PromptSplit, "owner": DecodeOwner, "pages": PagePolicy, "start": Start}
    for field, value in values.items():
        if value not in get_args(known[field]):
            raise LayoutError(
                f"{value!r} is no value of {field}; the values are "
                f"{', '.join(get_args(known[field]))}."
            )
    blank = Layout("contiguous", "step", "lazy", "rank_zero", cp_size, tokens_per_block)
    return blank.replace(
        **values, prompt_interleave=prompt_interleave, owner_interleave=owner_interleave
    )


def _split_interleave(rule: str) -> tuple[str, int | None]:
    name, _, rest = rule.partition("(")
    return name, int(rest[:-1]) if rest else None
