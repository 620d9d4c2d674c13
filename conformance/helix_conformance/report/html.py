"""Traces and runs as self-contained pages, and the README's picture, through jinja2 templates.

A page loads nothing: style and script are inside, and its content security policy forbids the
rest. Whatever a template prints goes through `foreign.shown`, and is escaped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import astuple
from typing import Any, get_args

import jinja2

from helix_conformance.foreign import shown
from helix_conformance.judge.coverage import SITUATIONS
from helix_conformance.report.diagram import diagram, parts, scene
from helix_conformance.report.stream import FailureLine, Record
from helix_conformance.report.text import event_text, replay_text, trace_text, value_text
from helix_spec.engine import PROFILES
from helix_spec.invariants import sentence
from helix_spec.layouts import NAMED_LAYOUTS, DecodeOwner, PagePolicy, PromptSplit, Start
from helix_spec.trace import Trace


def _foreign(value: Any) -> Any:
    """What is printed of a value: of the templates' own markup all, of text what `shown` says."""
    return shown(value) if isinstance(value, str) and not hasattr(value, "__html__") else value


_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("helix_conformance.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    finalize=_foreign,
    trim_blocks=True,
    lstrip_blocks=True,
)
_ENVIRONMENT.filters |= {
    "px": lambda length: f"{length:.1f}".removesuffix(".0"),
    "words": value_text,
}
_ENVIRONMENT.globals |= {
    "PROFILES": PROFILES,
    "SITUATIONS": SITUATIONS,
    "event_text": event_text,
    "replay_text": replay_text,
    "trace_text": trace_text,
    "sentence": sentence,
}


def _render(template: str, **values: Any) -> str:
    return _ENVIRONMENT.get_template(template).render(**values)


def show_page(trace: Trace, name: str) -> str:
    """Return a page with the diagram of one trace, and a slider over its events.

    Parameters
    ----------
    trace : Trace
        One with a configuration with which ranks may start.
    name : str
        What the page calls it, such as its file's name.

    Returns
    -------
    str
        HTML.
    """
    drawn = [(part, diagram(trace, part=number)) for number, part in enumerate(parts(trace))]
    return _render("show.html.j2", trace=trace, name=name, diagrams=drawn)


def run_page(record: Record) -> str:
    """Return the page of a whole stream.

    Parameters
    ----------
    record : Record
        What `read_stream` returns.

    Returns
    -------
    str
        HTML: verdicts, failing traces drawn, coverage, proofs, mutants, settings.
    """
    failures = sorted((one for run in record.runs for one in run.failures), key=_length_to_tell)
    return _render("run.html.j2", record=record, scenes=[scene(one) for one in failures])


def _length_to_tell(failure: FailureLine) -> tuple[bool, int, int]:
    """What sorts failures: a difference before an engine that fell silent, the shortest first."""
    trace = failure.trace
    return failure.engine_failure is not None, len(trace.events), trace.config.world_size


def index_page(record: Record) -> str:
    """Return a page with the runs of several engines: engine, layout and driver by profile.

    Parameters
    ----------
    record : Record
        What `read_stream` returns of their streams.

    Returns
    -------
    str
        HTML.
    """
    return _render("index.html.j2", record=record)


def explore_page() -> str:
    """Return a page on which layouts and sizes are chosen, and two layouts compared.

    Its closed forms are those of `helix_spec.placement`, in JavaScript (`placement.js`).

    Returns
    -------
    str
        HTML: tokens by rank and page, balance, capacity, and the tokens that move.
    """
    named = {name: astuple(rule) for name, rule in NAMED_LAYOUTS.items()}
    kinds = {"prompt": PromptSplit, "owner": DecodeOwner, "pages": PagePolicy, "start": Start}
    parts = {part: get_args(kind) for part, kind in kinds.items()}
    return _render("explore.html.j2", named=named, parts=parts)


def picture(panels: Sequence[tuple[str, Trace]]) -> str:
    """Return the placements to which traces lead, one below the other under headings.

    Parameters
    ----------
    panels : sequence of (str, Trace)
        A heading and a trace each.

    Returns
    -------
    str
        SVG.
    """
    return _render("picture.svg.j2", stills=[(head, diagram(trace)) for head, trace in panels])
