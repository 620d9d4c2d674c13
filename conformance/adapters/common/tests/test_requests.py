"""Refusals that adapters tell by what they know of each request."""

from dataclasses import dataclass

from hypothesis import given, settings

from helix_adapters.requests import refusal
from helix_conformance.testing import configs, traces
from helix_reference.engine import ReferenceEngine
from helix_spec.events import (
    FEATURES,
    Accept,
    Admit,
    Decode,
    Preempt,
    Reason,
    Release,
    Resume,
    features_of,
)

DECLARED = frozenset({"speculative", "preempt", "padding"})
PROFILES = DECLARED | {"placement"}
"""Without `pages`, so that the reference never runs out of them."""
SOME = traces(
    configs=configs(features=DECLARED, contents=False),
    features=DECLARED,
    undeclared=set(FEATURES) - DECLARED,
    contents=False,
)


@dataclass
class Request:
    """What an adapter keeps of a request."""

    total: int
    open: int | None = None
    preempted: bool = False


def follow(known, event):
    """Let an accepted event change what is known."""
    match event:
        case Admit(id, prompt_len):
            known[id] = Request(prompt_len)
        case Decode(ids, query_lens):
            for id, more in zip(ids, query_lens, strict=True):
                known[id].total, known[id].open = known[id].total + more, more
        case Accept(id, kept):
            known[id].total, known[id].open = known[id].total - known[id].open + kept, None
        case Preempt(id):
            known[id].open, known[id].preempted = None, True
        case Resume(id):
            known[id].preempted = False
        case Release(id):
            del known[id]


@settings(max_examples=40, deadline=None)
@given(SOME)
def test_an_adapter_refuses_as_the_reference_does(trace):
    """Whatever the event: the same reason, or none."""
    engine, known = ReferenceEngine(0), {}
    if engine.start(trace.config, PROFILES).reason is Reason.BAD_CONFIG:
        return
    for event in trace.events:
        if not features_of(event) <= PROFILES:
            assert refusal(event, known, trace.config, PROFILES) is Reason.UNSUPPORTED
            continue
        expected = engine.apply(event).reason
        if expected is Reason.OUT_OF_PAGES:
            continue
        assert refusal(event, known, trace.config, PROFILES) == expected, event
        if expected is None:
            follow(known, event)
