"""Whether a suspicion holds: the failing trace once more, without what is blamed.

Some invariants say that something must not matter: dummy requests (DUM-1), ranks without keys
(ATT-3), the order of the ranks (ATT-2). One answer cannot show what it comes from; the same trace
without them can.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import msgspec

from helix_conformance.generate.configs import AMPLE
from helix_conformance.judge.failure import Violation, in_order
from helix_spec.config import MAX_REQUEST_LEN
from helix_spec.events import Admit, Decode, Event, Merge
from helix_spec.trace import Trace

_set = msgspec.structs.replace


def tried(
    trace: Trace, violations: Sequence[Violation], named_by: Callable[[Trace], set[str]]
) -> list[Violation]:
    """Return the violations of a trace, with DUM-1, ATT-2 and ATT-3 where trials bear them out.

    Parameters
    ----------
    trace
        The trace that failed, up to the event that was answered wrongly.
    violations
        What was wrong.
    named_by
        Plays a trace, and returns the invariants that fail then.

    Returns
    -------
    list of Violation
        The violations in the order of SPEC.md, without suspicions that did not hold, and with DUM-1
        where the same trace is right without its dummy requests.
    """
    names = {violation.invariant for violation in violations}
    if any(_padded(event) for event in trace.events):
        others = names - {"DUM-1"}
        if named_by(_without_dummies(trace)) & others:
            names = others
        elif "DUM-1" not in names:
            what = "the same trace without its dummy requests is right"
            violations = [*violations, Violation("DUM-1", what)]
            names |= {"DUM-1"}
    if "ATT-3" in names and named_by(_without_empty_ranks(trace)):
        names -= {"ATT-3"}
    if {"ATT-1", "ATT-2"} <= names and "ATT-1" in named_by(_in_rank_order(trace)):
        names -= {"ATT-2"}
    return in_order(violation for violation in violations if violation.invariant in names)


def _padded(event: Event) -> bool:
    return isinstance(event, Decode) and event.pad > 0


def _changed(trace: Trace, change: Callable[[Event], Event]) -> Trace:
    return _set(trace, events=list(map(change, trace.events)))


def _without_dummies(trace: Trace) -> Trace:
    return _changed(trace, lambda event: _set(event, pad=0) if _padded(event) else event)


def _without_empty_ranks(trace: Trace) -> Trace:
    """The trace with every prompt a super-block longer, so that each rank holds some of it.

    Supplied partials without keys get some, of the largest level of the others.
    """
    layout = trace.config.layout
    more = layout.cp_size * layout.tokens_per_block

    def longer(event: Event) -> Event:
        if isinstance(event, Admit) and 0 < event.prompt_len <= trace.config.max_len:
            return _set(event, prompt_len=event.prompt_len + more)
        return _with_keys(event) if isinstance(event, Merge) else event

    longest = min(MAX_REQUEST_LEN, trace.config.max_len + more)
    # A request has at most two pages more of each rank then.
    pages = [AMPLE + count + 2 * len(trace.events) for count in trace.config.pages]
    config = _set(trace.config, max_len=longest, pages=pages)
    return _changed(_set(trace, config=config), longer)


def _with_keys(event: Merge) -> Merge:
    tokens = zip(*event.levels, strict=True)
    top = [max((level for level in token if level is not None), default=0) for token in tokens]
    levels = [
        [most if level is None else level for level, most in zip(row, top, strict=True)]
        for row in event.levels
    ]
    return _set(event, levels=levels)


def _in_rank_order(trace: Trace) -> Trace:
    def ordered(event: Event) -> Event:
        return Merge(event.levels, sorted(event.order)) if isinstance(event, Merge) else event

    return _changed(trace, ordered)
