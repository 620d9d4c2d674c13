"""A trace that goes on and on: all is mixed, and the number of requests is held."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import Final

from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.actions import Action, Admit, Decode, Fork, Release, Scope
from helix_conformance.generate.choices import Choices
from helix_conformance.generate.narrowing import fitted, limits_events
from helix_conformance.generate.traces import outside_now
from helix_spec.capabilities import UNLIMITED, Box
from helix_spec.events import Event

LIVE: Final = 24
"""Requests that are kept at a time, about."""
TOKENS: Final = 120
"""Tokens of a request, for which pools have room; they run dry now and then."""
PROMPT_LENS: Final = ((1, 2, 5, 17, 40, 41, 96),)


def next_action(choices: Choices, scope: Scope, known: int) -> Action:
    """Return the next action.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    scope : Scope
        What it may ask of the engine.
    known : int
        Requests that are known now.
    """
    kind = Decode if choices.one_in(2) else choices.pick(scope.kinds)
    if kind in (Admit, Fork) and known >= LIVE:
        kind = Release
    if kind is Release and known < LIVE // 2:
        kind = Admit
    if kind is Release:
        return Release((choices.integer(0, LIVE),))
    return kind.drawn(choices, scope)


def mixed(
    recorder: Recorder, choices: Choices, scope: Scope, events: int, box: Box = UNLIMITED
) -> Iterator[Event]:
    """Yield events of all kinds, each action meant for the state in which the recorder then is.

    Parameters
    ----------
    recorder : Recorder
        It must have seen each event before the next one is taken.
    choices : Choices
        What makes the choices.
    scope : Scope
        What actions may ask of the engine.
    events : int
        How many.
    box : Box
        Where the engine works.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> from helix_spec.config import Config
    >>> recorder = Recorder(Config(layout="pr9757/1:C=2,T=4", pages=[360, 360], max_len=400))
    >>> source = mixed(recorder, Seeded("0"), Scope(frozenset(), prompt_lens=PROMPT_LENS), 500)
    >>> sum(recorder.next(event).refused is None for event in source) > 200
    True
    """
    made, last, limited = 0, list[Event](), limits_events([box])
    while made < events:
        action = next_action(choices, scope, len(recorder.state.requests))
        for meant in islice(action.events(recorder, last), events - made):
            event = fitted(box, meant) if limited and outside_now(recorder, meant, box) else meant
            if limited and outside_now(recorder, event, box):
                break
            made, last = made + 1, [event]
            yield event


def long_events(
    recorder: Recorder, choices: Choices, scope: Scope, events: int, box: Box = UNLIMITED
) -> Iterator[Event]:
    """Yield what `mixed` does; the recorder has seen each event when it is yielded.

    Parameters
    ----------
    recorder, choices, scope, events, box
        As `mixed` takes them.
    """
    for event in mixed(recorder, choices, scope, events, box):
        recorder.next(event)
        yield event
