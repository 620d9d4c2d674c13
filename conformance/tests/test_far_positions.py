"""Positions beyond 2^17 and 2^24: one trace of a run has them, for placement and lengths alone."""

from __future__ import annotations

from pathlib import Path

import pytest

from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.sizes import FAR_LEN, FAR_POSITIONS
from helix_conformance.generate.traces import far_trace
from helix_conformance.report.diagram import diagram
from helix_conformance.report.stream import CoverageLine
from helix_conformance.report.text import trace_text
from helix_conformance.session import Session, SessionError
from helix_spec.capabilities import UNLIMITED, Box, Span
from helix_spec.events import FEATURES
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace, dump_trace, load_trace


def far(name: str = "pr17866", box: Box = UNLIMITED) -> Trace | None:
    """A trace at far positions."""
    return far_trace(Seeded("3"), name, [2], FEATURES, box)


@pytest.mark.parametrize("profiles", [["placement"], ["pages", *FEATURES]])
def test_a_run_has_one_trace_there(profiles: list[str]) -> None:
    """The coverage report shows its max_len once, and the positions themselves."""
    session = Session("gpu-ledger", profiles=profiles)
    session.random(["balanced", "vllm_dcp"], [], 1)
    assert session.summary() == "pass"
    (coverage,) = session.stream.of(CoverageLine)
    assert coverage.sizes["max_len"][str(FAR_LEN)] == 1
    assert all(coverage.sizes["position"][str(position)] for position in FAR_POSITIONS)


def test_contents_are_not_compared_there(tmp_path: Path) -> None:
    """A stored one is refused where contents would be checked; the message says what to do."""
    trace, path = far(), tmp_path / "pr17866-far.json"
    assert trace is not None
    path.write_bytes(dump_trace(trace))
    with pytest.raises(SessionError, match="give --profile pages"):
        Session("reference").replay(load_trace(path), path)
    again = Session("reference", profiles=["pages"])
    again.replay(load_trace(path), path)
    assert again.summary() == "pass"


@pytest.mark.parametrize("name", LAYOUT_NAMES)
def test_every_layout_has_one(name: str) -> None:
    """What is drawn can be stored, and goes beyond 2^24."""
    trace = far(name)
    assert trace is not None
    assert max(event.prompt_len for event in trace.events[:4]) > 2**24  # type: ignore[union-attr]


@pytest.mark.parametrize(
    "box",
    [
        Box(tokens_per_block=[64]),
        Box(max_len=Span(max=70_000)),
        Box(pages=Span(max=1000)),
        Box(prompt_len=Span(max=2**20)),
        Box(layouts=["pr17866/1:C=2,T=16"]),
    ],
)
def test_none_is_drawn_beyond_the_capabilities(box: Box) -> None:
    """Pages of fewer tokens would be too many; limits of lengths and pools hold here too."""
    assert far(box=box) is None


def test_it_is_shown_in_few_words() -> None:
    """The middle of long block tables is left out, and a diagram draws the trace without them."""
    trace = far()
    assert trace is not None
    lines = list(trace_text(trace))
    assert max(map(len, lines)) < 4000
    assert "... 32705 pages ..." in "".join(lines)
    drawn = diagram(trace)
    assert (len(drawn.panels), drawn.requests) == (1, 5)
