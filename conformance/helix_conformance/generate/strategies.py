"""Hypothesis strategies of layouts, configurations and traces, for an engine's own tests.

They draw what a run of the suite draws: both call the same functions of choices. A strategy says
what is valid, not how likely. Simple values come first, so that failures shrink to few ranks,
small pages and few events. Bounds are keyword-only; impossible ones raise ValueError.

Examples
--------
>>> from hypothesis import given, settings
>>> @settings(max_examples=10, database=None)
... @given(layouts(names=["pr9757"], cp_sizes=[2, 4]))
... def test_names_its_layout(layout):
...     assert str(layout).startswith("pr9757/1:C=")
>>> test_names_its_layout()
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from functools import wraps
from typing import Concatenate, ParamSpec, TypeVar

from hypothesis import strategies as st

from helix_conformance.generate.actions import ACTIONS, SHORT, Action, Scope
from helix_conformance.generate.choices import Choices
from helix_conformance.generate.configs import (
    draw_config,
    draw_illegal_config,
    draw_layout,
    draw_model_shape,
)
from helix_conformance.generate.traces import MAX_ACTIONS, draw_merge_trace, draw_trace
from helix_spec.config import Config
from helix_spec.events import FEATURES
from helix_spec.trace import Trace

P = ParamSpec("P")
T = TypeVar("T")


class _Drawn(Choices):
    """Choices that Hypothesis makes, and shrinks."""

    def __init__(self, draw: st.DrawFn) -> None:
        self._draw = draw

    def integer(self, low: int, high: int) -> int:
        return self._draw(st.integers(low, high))

    def lists(self, draw: Callable[[Choices], T], low: int, high: int) -> list[T]:
        return self._draw(st.lists(drawn(draw), min_size=low, max_size=high))


@st.composite
def drawn(draw: st.DrawFn, function: Callable[[Choices], T]) -> T:
    """Draw what a function of choices returns.

    Parameters
    ----------
    function : function of Choices
        For example what `session.layout_traces` returns.
    """
    return function(_Drawn(draw))


def _strategy(
    function: Callable[Concatenate[Choices, P], T],
) -> Callable[P, st.SearchStrategy[T]]:
    """Return a function of the same arguments, whose choices Hypothesis makes."""

    @st.composite
    @wraps(function)
    def strategy(draw: st.DrawFn, /, *args: P.args, **kwargs: P.kwargs) -> T:
        return function(_Drawn(draw), *args, **kwargs)

    return strategy


layouts = _strategy(draw_layout)
"""Draw legal layouts; see `draw_layout`."""
model_shapes = _strategy(draw_model_shape)
"""Draw shapes whose heads divide over these ranks; see `draw_model_shape`."""
configs = _strategy(draw_config)
"""Draw legal configurations; see `draw_config`."""


@st.composite
def illegal_configs(draw: st.DrawFn, *, configs: st.SearchStrategy[Config]) -> Config:
    """Draw configurations that every engine must refuse to start with.

    Parameters
    ----------
    configs : strategy of Config
        Legal ones, which are changed; their numbers of ranks stay.
    """
    return draw_illegal_config(_Drawn(draw), draw(configs))


@st.composite
def actions(
    draw: st.DrawFn,
    *,
    features: Collection[str] = FEATURES,
    undeclared: Collection[str] = (),
    prompt_lens: Sequence[int] = SHORT,
    long_groups: Sequence[int] = (8, 17),
    kinds: Sequence[type[Action]] = ACTIONS,
) -> Action:
    """Draw actions that an engine of these features can be asked for.

    Parameters
    ----------
    features : collection of str
        Features that the engine declares.
    undeclared : collection of str
        Features that it does not declare, and that a wrong event needs now and then.
    prompt_lens : sequence of int
        Lengths of prompts, in tokens.
    long_groups : sequence of int
        Lengths of long groups, in tokens.
    kinds : sequence of types
        Classes of `generate.actions`; those that need other features are left out.
    """
    scope = Scope(frozenset(features), frozenset(undeclared), (prompt_lens,), long_groups)
    choices = _Drawn(draw)
    return choices.pick([kind for kind in scope.kinds if kind in kinds]).drawn(choices, scope)


@st.composite
def traces(
    draw: st.DrawFn,
    *,
    configs: st.SearchStrategy[Config],
    features: Collection[str] = FEATURES,
    undeclared: Collection[str] = (),
    contents: bool = True,
    max_actions: int = MAX_ACTIONS,
) -> Trace:
    """Draw traces, with events that need these features or none.

    Now and then an event needs one of the features that the engine does not declare. One trace in
    10 is a configuration that must be refused, without events. Where no contents are looked at
    one in 20 begins with many requests.

    Parameters
    ----------
    configs : strategy of Config
        Legal configurations.
    features : collection of str
        Features that the engine declares.
    undeclared : collection of str
        Features that it does not declare.
    contents : bool
        Whether caches or outputs are looked at: then prompts are shorter, for time.
    max_actions : int
        The most actions of each half of a trace.
    """
    return draw_trace(
        _Drawn(draw),
        draw(configs),
        features=features,
        undeclared=undeclared,
        contents=contents,
        max_actions=max_actions,
    )


@st.composite
def merge_traces(
    draw: st.DrawFn, *, configs: st.SearchStrategy[Config], max_merges: int = 3
) -> Trace:
    """Draw traces of nothing but merges (SPEC.md, 5.6).

    Tokens that no rank has keys for are among them. A merge may come again, as it was or with its
    partials on other ranks.

    Parameters
    ----------
    configs : strategy of Config
        Legal configurations.
    max_merges : int
        The most merges that differ.
    """
    return draw_merge_trace(_Drawn(draw), draw(configs), max_merges=max_merges)
