"""The placement that a trace leads to, as text: each request, rank by rank and page by page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import msgspec
from msgspec import NODEFAULT

from helix_conformance.expect.expectation import Request
from helix_conformance.expect.recorder import Recorder
from helix_spec.config import Config, config_problem
from helix_spec.events import Event, Merge
from helix_spec.trace import Trace


def trace_text(trace: Trace) -> Iterator[str]:
    """Lines: the configuration, each event with its refusal, and the placement at the end."""
    settings = "".join(f", {setting}" for setting in _set_apart(trace.config))
    yield f"{trace.config.layout}, pools of {trace.config.pages} pages{settings}"
    problem = config_problem(trace.config)
    if problem is not None:
        yield f"must be refused: {problem}"
        return
    recorder = Recorder(trace.config)
    for index, event in enumerate(trace.events):
        reason = recorder.next(event).refused
        yield f"event {index}: {event_text(event)}" + (f" -> refused: {reason}" if reason else "")
    for id, request in recorder.state.requests.items():
        yield ""
        yield from placement_text(id, request, trace.config.layout.tokens_per_block)


def _set_apart(config: Config) -> Iterator[str]:
    """Whatever is not as by default, beside what every configuration says."""
    for part in (config, config.model):
        for field in msgspec.structs.fields(part):
            value = getattr(part, field.name)
            if field.name not in ("model", "seed") and field.default not in (NODEFAULT, value):
                yield f"{field.name}={value}"


def event_text(event: Event) -> str:
    """One event in a few words, such as `decode ids=[0, 1] query_lens=[1, 1]`."""
    fields = {name: getattr(event, name) for name in event.__struct_fields__}
    if fields.get("pad") == 0:
        del fields["pad"]
    if isinstance(event, Merge) and event.order == sorted(event.order):
        del fields["order"]
    given = " ".join(f"{name}={value}" for name, value in fields.items())
    return f"{type(event).__name__.lower()} {given}"


def placement_text(id: int, request: Request, tokens_per_block: int) -> Iterator[str]:
    """Where one request's tokens are: one line for each rank, pages between bars."""
    state = ", preempted" if request.preempted else ""
    yield (
        f"request {id}: {len(request.tokens)} tokens, prompt of {request.prompt_len}, "
        f"{request.steps} decoded{state}"
    )
    t = tokens_per_block
    for rank, (positions, table) in enumerate(zip(request.ranks, request.tables, strict=True)):
        pages = [
            f"{ranges(positions[i * t : (i + 1) * t])} (page {page.number})"
            for i, page in enumerate(table)
        ]
        yield f"  rank {rank}, {len(positions)} tokens: " + (" | ".join(pages) or "-")


def ranges(positions: Sequence[int]) -> str:
    """Rising positions in few words: `0-3 8 12-13`; `-` for none."""
    if not positions:
        return "-"
    breaks = [i for i, (a, b) in enumerate(pairwise(positions), 1) if b != a + 1]
    runs = [
        (positions[first], positions[last - 1])
        for first, last in pairwise([0, *breaks, len(positions)])
    ]
    return " ".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)
