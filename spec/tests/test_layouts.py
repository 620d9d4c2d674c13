"""Layouts as data: identifiers and what makes a layout illegal (SPEC.md section 3)."""

import re
from contextlib import suppress
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_spec.layouts import (
    NAMED_LAYOUTS,
    DecodeOwner,
    Layout,
    LayoutError,
    PagePolicy,
    PromptSplit,
    Start,
    format_layout,
    layout_name,
    layout_problem,
    named_layout,
    parse_layout,
)

PR9757 = named_layout("pr9757", cp_size=4, tokens_per_block=32)
SIZES = st.integers(1, 999_999_999)


@st.composite
def written_layouts(draw: st.DrawFn) -> Layout:
    """Layouts whose interleaves are given exactly where a rule needs one; not always legal."""
    prompt = draw(st.sampled_from(get_args(PromptSplit)))
    owner = draw(st.sampled_from(get_args(DecodeOwner)))
    return Layout(
        prompt,
        owner,
        draw(st.sampled_from(get_args(PagePolicy))),
        draw(st.sampled_from(get_args(Start))),
        draw(SIZES),
        draw(SIZES),
        prompt_interleave=draw(SIZES) if prompt == "interleave" else None,
        owner_interleave=draw(SIZES) if owner == "interleave" else None,
    )


@given(written_layouts())
def test_identifiers_round_trip(layout: Layout) -> None:
    """Every layout whose parts are complete is the one that its identifier names."""
    assert parse_layout(format_layout(layout)) == layout


@given(st.sampled_from(list(NAMED_LAYOUTS)), SIZES, SIZES)
def test_a_layout_with_a_name_is_written_with_it(name: str, c: int, t: int) -> None:
    """The identifier of a named layout starts with its name, in version 1."""
    layout = named_layout(name, cp_size=c, tokens_per_block=t)
    assert layout_name(layout) == name
    assert str(layout).startswith(f"{name}/1:C={c},T={t}")


@pytest.mark.parametrize(
    "text",
    [
        "pr9757/1:C=4,T=32",
        "vllm_dcp/1:C=4,T=32,I=1",
        "custom/1:prompt=contiguous,owner=position,pages=lazy,start=rotated,C=4,T=32",
        "custom/1:prompt=interleave(2),owner=last_rank,pages=lazy,start=rank_zero,C=4,T=32",
    ],
)
def test_the_identifiers_of_the_specification_are_canonical(text: str) -> None:
    """Each example is the one text of its layout."""
    assert str(parse_layout(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("pr9757/01:C=4,T=32", "pr9757/1:C=4,T=32"),
        ("pr9757/1:T=32,C=4", "pr9757/1:C=4,T=32"),
        ("pr9757/1:C=04,T=32", "pr9757/1:C=4,T=32"),
        ("vllm_dcp/1:I=2,C=4,T=32", "vllm_dcp/1:C=4,T=32,I=2"),
        (
            "custom/1:C=4,T=32,start=rotated,pages=lazy,owner=step,prompt=interleave(08)",
            "custom/1:prompt=interleave(8),owner=step,pages=lazy,start=rotated,C=4,T=32",
        ),
        ("vllm_dcp/1:C=4,T=32", "vllm_dcp/1:C=4,T=32,I=1"),
        (
            "custom/1:prompt=contiguous,owner=step,pages=lazy,start=rank_zero,C=4,T=32",
            "pr9757/1:C=4,T=32",
        ),
        (
            "custom/1:prompt=interleave(2),owner=interleave(2),pages=lockstep,start=rank_zero,C=4,T=4",
            "vllm_dcp/1:C=4,T=4,I=2",
        ),
    ],
)
def test_a_second_spelling_is_refused_with_the_first(text: str, canonical: str) -> None:
    """Peers compare identifiers as text, so a layout has one, and the error names it."""
    expected = f"{text!r} is not canonical; this layout is written {canonical!r}."
    with pytest.raises(LayoutError, match=re.escape(expected)):
        parse_layout(text)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("pr9757", "is no layout identifier"),
        ("", "is no layout identifier"),
        ("pr9757/1:C=4,T=32\n", "is no layout identifier"),
        ("pr9757/1:C=4, T=32", "is no layout identifier"),
        ("pr9757/1:C=0,T=32", "is no layout identifier"),
        ("pr9757/1:C=4,T=32,C=4", "is no layout identifier"),
        ("pr9757/1:C=4,T=32,T=16", "is no layout identifier"),
        ("pr9757/1:C=4", "is no layout identifier"),
        (
            "pr9757/1:prompt=contiguous,owner=step,pages=lazy,start=rank_zero,C=4,T=32",
            "is no layout identifier",
        ),
        ("vllm_dcp/1:C=4,T=32,I=2,prompt=interleave(2)", "is no layout identifier"),
        ("pr9757/1:C=1000000000,T=32", "is no layout identifier"),
        ("pr9757/1:C=-4,T=32", "is no layout identifier"),
        ("pr9757/2:C=4,T=32", "is of version 2; this specification defines version 1"),
        ("pr9758/1:C=4,T=32", "There is no layout named 'pr9758'"),
        ("custom/1:C=4,T=32", "There is no layout named 'custom'"),
        ("pr9757/1:C=4,T=32,I=1", "Layout pr9757 takes no interleave, yet I=1 was given"),
        (
            "custom/1:prompt=step,owner=step,pages=lazy,start=rotated,C=4,T=32",
            "'step' is no value of prompt; the values are contiguous, round_robin, interleave",
        ),
        (
            "custom/1:prompt=contiguous,owner=step,pages=eager,start=rotated,C=4,T=32",
            "'eager' is no value of pages; the values are lazy, lockstep",
        ),
    ],
)
def test_what_is_no_identifier_is_refused(text: str, complaint: str) -> None:
    """The error says what is wrong with the text."""
    with pytest.raises(LayoutError, match=re.escape(complaint)):
        parse_layout(text)


@given(st.text(max_size=60))
def test_any_text_parses_or_raises_a_layout_error(text: str) -> None:
    """No text makes the parser fail in another way, and what parses is canonical."""
    with suppress(LayoutError):
        assert str(parse_layout(text)) == text


def test_every_named_layout_is_legal() -> None:
    """An engine may start with each named layout, for one rank and for many."""
    for name in NAMED_LAYOUTS:
        for c, t in ((1, 1), (4, 32), (7, 3)):
            assert layout_problem(named_layout(name, cp_size=c, tokens_per_block=t)) is None


@pytest.mark.parametrize(
    ("layout", "problem"),
    [
        (PR9757.replace(cp_size=0), "cp_size is 0; it must be at least 1."),
        (PR9757.replace(tokens_per_block=-1), "tokens_per_block is -1; it must be at least 1."),
        (
            PR9757.replace(prompt_interleave=2),
            "The prompt split is contiguous, and its interleave is 2: one needs the other.",
        ),
        (
            PR9757.replace(owner="interleave"),
            "The decode owner is interleave, and its interleave is None: one needs the other.",
        ),
        (
            PR9757.replace(owner="interleave", owner_interleave=5),
            "The decode owner interleaves 5 tokens, which does not divide tokens_per_block 32.",
        ),
        (
            PR9757.replace(owner="interleave", owner_interleave=0),
            "The decode owner interleaves 0 tokens, which does not divide tokens_per_block 32.",
        ),
        (
            named_layout("vllm_dcp", cp_size=4, tokens_per_block=32, interleave=64),
            "The prompt split interleaves 64 tokens, which does not divide tokens_per_block 32.",
        ),
        (
            PR9757.replace(pages="lockstep"),
            "Page policy lockstep with prompt split contiguous and decode owner step can leave a "
            "rank without a page it needs; lockstep is legal only for round_robin with position, "
            "and for interleave with interleave of the same size.",
        ),
    ],
)
def test_an_illegal_layout_is_explained(layout: Layout, problem: str) -> None:
    """Each way to be illegal has its own sentence."""
    assert layout_problem(layout) == problem


@given(written_layouts())
def test_lockstep_is_legal_only_where_the_specification_says(layout: Layout) -> None:
    """Under `lazy` every pair of rules is legal; under `lockstep` two kinds of pair are."""
    legal = (layout.prompt, layout.owner) == ("round_robin", "position") or (
        (layout.prompt, layout.owner) == ("interleave", "interleave")
        and layout.prompt_interleave == layout.owner_interleave
    )
    fine_sizes = layout.replace(tokens_per_block=_product(layout))
    assert (layout_problem(fine_sizes) is None) == (layout.pages == "lazy" or legal)


def _product(layout: Layout) -> int:
    """A page size that both interleaves divide."""
    return (layout.prompt_interleave or 1) * (layout.owner_interleave or 1)
