"""Films and runs as self-contained pages, and the README's picture, through jinja2 templates.

A page loads nothing: style and script are inside, and its content security policy forbids the
rest. Everything that comes from a trace or a stream is escaped by the templates.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import jinja2
import msgspec

from helix_conformance.judge.coverage import SITUATIONS
from helix_conformance.report import views
from helix_conformance.report.diagram import Film, film
from helix_conformance.report.show import event_text, trace_text
from helix_conformance.report.stream import Record
from helix_conformance.report.wrong import scene
from helix_spec.config import Config
from helix_spec.engine import PROFILES
from helix_spec.events import Admit, Decode, Event
from helix_spec.invariants import sentence
from helix_spec.layouts import named_layout
from helix_spec.trace import Trace

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("helix_conformance.report"),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def _px(value: float) -> str:
    """A length in few characters."""
    return f"{value:.1f}".removesuffix(".0")


def _include(name: str) -> str:
    """A style or script beside the templates; ours, so it is not escaped."""
    return files("helix_conformance.report").joinpath("templates", name).read_text("utf-8")


def _words(value: Any) -> str:
    """A value of an answer as JSON, cut where it is long; short entries of an object first."""
    if isinstance(value, dict):
        value = dict(sorted(value.items(), key=lambda item: isinstance(item[1], list)))
    text = msgspec.json.format(msgspec.json.encode(_rounded(value)), indent=0).decode()
    return text if len(text) <= 240 else text[:240] + " ..."


def _rounded(value: Any) -> Any:
    """Fractions in six digits: what an error bound is about is told beside them."""
    if isinstance(value, float):
        return float(f"{value:.6g}")
    if isinstance(value, dict):
        return {key: _rounded(item) for key, item in value.items()}
    return [_rounded(item) for item in value] if isinstance(value, list) else value


_ENVIRONMENT.filters["px"] = _px
_ENVIRONMENT.filters["words"] = _words
_ENVIRONMENT.globals |= {
    "include_text": _include,
    "PROFILES": PROFILES,
    "SITUATIONS": SITUATIONS,
    "cells": views.cells,
    "failure_of": views.failure_of,
    "event_text": event_text,
    "trace_text": trace_text,
    "sentence": sentence,
}


def render(template: str, **values: Any) -> str:
    """A template of this package with these values."""
    return _ENVIRONMENT.get_template(template).render(**values)


def show_page(trace: Trace) -> str:
    """A page with the film of one trace."""
    return render("show.html.j2", trace=trace, film=film(trace))


def run_page(record: Record) -> str:
    """The page of a whole stream."""
    return render(
        "run.html.j2",
        record=record,
        verdict=views.verdict(record),
        scenes=[scene(failure) for run in record.runs for failure in run.failures],
    )


def picture(panels: Sequence[tuple[str, Trace]]) -> str:
    """An SVG file of the placements to which traces lead, one below the other under headings."""
    stills: list[tuple[str, Film]] = [(heading, film(trace)) for heading, trace in panels]
    return render("picture.svg.j2", stills=stills)


def seed_example() -> list[tuple[str, Trace]]:
    """Pull request 9757's own example: 400 prompt tokens, pages of 100, 4 ranks, 400 steps."""

    def trace(layout: str, steps: int) -> Trace:
        rule = named_layout(layout, cp_size=4, tokens_per_block=100)
        config = Config(layout=rule, pages=[9] * 4, max_len=1000)
        decodes: list[Event] = [Decode([0], [1])] * steps
        return Trace(config=config, events=[Admit(0, 400), *decodes])

    return [
        ("The prompt", trace("pr9757", 0)),
        ("400 steps later, before pull request 9757", trace("before_9757", 400)),
        ("400 steps later, since pull request 9757", trace("pr9757", 400)),
    ]


if __name__ == "__main__":
    target = Path(__file__).parents[2] / "placement.svg"
    target.write_text(picture(seed_example()), encoding="utf-8")
    print(f"wrote {target}")
