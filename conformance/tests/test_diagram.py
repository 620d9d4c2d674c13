"""Diagrams: what is drawn at a stop is what the reference holds then, wrong answers marked."""

from __future__ import annotations

import re
from itertools import count
from pathlib import Path

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings

from helix_conformance.cli import main
from helix_conformance.drive.driver import Answer
from helix_conformance.generate.strategies import configs, traces
from helix_conformance.judge.failure import Violation
from helix_conformance.report.diagram import MAX_REQUESTS, MAX_STOPS, Box, Panel, diagram, scene
from helix_conformance.report.html import picture
from helix_conformance.report.stream import FailureLine
from helix_reference.model import Model
from helix_spec.config import Config, config_problem
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Accept, Admit, Decode, Fork, Reason
from helix_spec.trace import Trace, dump_trace
from suite_testing.picture import PICTURES

ROOT = Path(__file__).parents[2]


def at(panel: Panel, stop: int, kind: str) -> list[Box]:
    """The boxes of a kind that are there at a stop."""
    return [
        box
        for box in panel.boxes
        if box.since <= stop < box.until and kind in box.spot.kind.split()
    ]


def held(panel: Panel, stop: int) -> dict[int, list[int]]:
    """Positions that a panel shows on each rank, in local order."""
    found: dict[int, list[tuple[int, int]]] = {}
    for box in at(panel, stop, "token"):
        title = box.spot.title
        first, last, step = re.match(
            r"positions? (\d+)(?:\u2013(\d+))?(?: by (\d+))?,", title
        ).groups()  # type: ignore[union-attr]
        rank, index = map(int, re.search(r"on rank (\d+), local index (\d+)", title).groups())  # type: ignore[union-attr]
        positions = range(int(first), int(last or first) + 1, int(step or 1))
        found.setdefault(rank, []).extend(zip(count(index), positions))
    return {rank: [p for _, p in sorted(pairs)] for rank, pairs in found.items()}


@settings(max_examples=25, deadline=None)
@given(traces(configs=configs(contents=False)))
def test_a_diagram_shows_what_the_reference_holds(trace):
    """At each stop each request's tokens and pages are drawn where the model has them."""
    if config_problem(trace.config) is not None:
        return
    drawn, model = diagram(trace), Model(trace.config)
    assert len(drawn.stops) == len(trace.events) + 1
    for stop, event in enumerate(trace.events, 1):
        assert drawn.stops[stop].refused == model.apply(event)
        for panel in drawn.panels:
            request = model.requests.get(panel.id)
            ranks = [] if request is None else request.ranks
            expected = {rank: held for rank, held in enumerate(ranks) if held}
            assert held(panel, stop) == expected
            tables = [] if request is None else request.tables
            pages = [page.number for table in tables for page in table]
            shown = [box.spot.text for box in at(panel, stop, "page")]
            assert sorted(int(text.split()[1]) for text in shown) == sorted(pages)


def test_large_pages_are_drawn_as_runs():
    """Interleaved tokens of a large page are one box, whatever their stride, prompt apart."""
    config = Config(layout="vllm_dcp/1:C=4,T=32,I=1", pages=[9] * 4, max_len=999)
    drawn = diagram(Trace(config=config, events=[Admit(0, 64), Decode([0], [7])]))
    assert held(drawn.panels[0], 2) == {r: list(range(r, 71, 4)) for r in range(4)}
    titles = [box.spot.title for box in at(drawn.panels[0], 2, "owner0")]
    assert [title.split(",")[0] for title in titles if title] == [
        "positions 0\u201360 by 4",
        "position 64",
        "position 68",
    ]


def test_shared_pages_name_who_shares_them():
    """After a fork pages are marked as shared; the copied page no longer is."""
    config = Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=50)
    drawn = diagram(Trace(config=config, events=[Admit(0, 3), Fork(0, 7), Decode([7], [3])]))
    first, child = drawn.panels
    assert [len(at(first, stop, "shared")) for stop in (1, 2, 3)] == [0, 2, 1]
    assert [len(at(child, stop, "shared")) for stop in (1, 2, 3)] == [0, 2, 1]
    assert [box.spot.text for box in at(first, 2, "shared")] == ["page 8 \u2194 7"] * 2


def test_free_pages_are_told_at_every_stop():
    """The pools' free pages follow the events; an engine without pages has no such line."""
    config = Config(layout="pr9757/1:C=2,T=2", pages=[9, 3], max_len=50)
    trace = Trace(config=config, events=[Admit(0, 3), Decode([0], [3])])
    pools = diagram(trace).pools_panel
    assert pools is not None
    told = [{box.spot.text for box in at(pools, stop, "held")} for stop in range(3)]
    assert told == [
        {"rank 0: 9 of 9", "rank 1: 3 of 3"},
        {"rank 0: 8 of 9", "rank 1: 2 of 3"},
        {"rank 0: 7 of 9", "rank 1: 2 of 3"},
    ]
    assert diagram(trace, declared=["placement"]).pools_panel is None


def test_long_traces_are_thinned_around_the_failure():
    """At most so many stops and panels, the failing event and its neighbours among them."""
    config = Config(layout="pr9757/1:C=2,T=64", pages=[999] * 2, max_len=99999)
    admissions = [Admit(id, 1) for id in range(50)]
    events = [*admissions, *[Decode([49], [1])] * 1200]
    drawn = diagram(Trace(config=config, events=events), at=600)
    assert len(drawn.stops) <= MAX_STOPS
    assert {stop.event for stop in drawn.stops} >= {599, 600, 601, 1249}
    assert drawn.stops[drawn.first_shown].event == 600
    assert (len(drawn.panels), drawn.panels[-1].id) == (MAX_REQUESTS, 49)


def failing(events, answers, *violations, layout="pr9757/1:C=2,T=2"):
    """A failure at the last event, to which the ranks answered so."""
    config = Config(layout=layout, pages=[9, 9], max_len=50)
    return FailureLine(
        layout="pr9757",
        engine="mine",
        driver="local",
        event=len(events) - 1,
        violations=list(violations),
        trace=Trace(config=config, events=events),
        trace_file="t.json",
        declared=["placement", "lengths"],
        answers=answers,
    )


EVENTS = [Admit(0, 1), Decode([0], [1])]
RIGHT = [
    Answer(Outcome(None, [1], [1], [True], [1], [2]), RankView({0: 2})),
    Answer(Outcome(None, [0], [1], [False], [-1], [0]), RankView({0: 0})),
]


def answered(rank, **changes):
    """The right answers, one rank's changed."""
    answers = list(RIGHT)
    outcome = msgspec.structs.replace(answers[rank].outcome, **changes)
    answers[rank] = Answer(outcome, answers[rank].view)
    return answers


def test_a_rank_that_died_is_marked():
    """The rank that an engine failure names, in the requests of the event."""
    failure = failing(EVENTS, [])
    failure = msgspec.structs.replace(failure, engine_failure="Rank 1 timed out.", rank=1)
    assert [(m.request, m.rank, m.what) for m in scene(failure).marks] == [
        (0, 1, "Rank 1 timed out.")
    ]


def test_right_answers_are_not_marked():
    """Nothing is wrong where nothing is wrong."""
    found = scene(failing(EVENTS, RIGHT))
    assert found.marks == []
    assert not any(cell.wrong for row in found.ranks for cell in row.values())


def test_a_token_on_the_wrong_rank_is_marked_on_both():
    """The owner that does not claim it, and the rank that does, at the failing stop alone."""
    answers = [
        Answer(Outcome(None, [1], [1], [False], [-1]), RankView({0: 2})),
        Answer(Outcome(None, [0], [1], [True], [0]), RankView({0: 0})),
    ]
    found = scene(failing(EVENTS, answers, Violation("OWN-3", "ranks that claim")))
    assert [(mark.rank, mark.local_index) for mark in found.marks] == [(0, 1), (1, 0)]
    assert found.marks[1].what == "rank 1 claims position 1 of request 0; its owner is rank 0"
    assert found.diagram is not None
    (panel,) = found.diagram.panels
    assert (len(at(panel, 1, "wrong")), len(at(panel, 2, "wrong"))) == (0, 2)
    wrong = [(row["active"].wrong, row["past_len"].wrong) for row in found.ranks]
    assert wrong == [(True, False), (True, False)]


def test_wrong_lengths_slots_and_refusals_are_marked():
    """A length marks the rank, a slot the token, a refusal the answer."""
    short = answered(1, past_len=[3])
    found = scene(failing(EVENTS, short, Violation("LEN-2", "held", [0], [3], 1)))
    assert [(mark.rank, mark.local_index) for mark in found.marks] == [(1, None)]
    found = scene(failing(EVENTS, answered(0, slots=[6])))
    assert "names a slot with offset 0, not 1, for position 1" in found.marks[0].what
    found = scene(failing(EVENTS, answered(0, slots=[-1])))
    assert "names no slot for position 1" in found.marks[0].what
    refused = [RIGHT[0], Answer(Outcome(Reason.OUT_OF_PAGES))]
    found = scene(failing(EVENTS, refused, Violation("REF-1", "alone", None, None, 1)))
    assert [row["answer"].wrong for row in found.ranks] == [False, True]
    found = scene(failing(EVENTS, refused[::-1], Violation("REF-1", "alone", None, None, 0)))
    assert set(found.columns) >= {"answer", "past_len", "active", "slots"}


def test_a_start_that_should_have_been_refused_has_no_diagram():
    """A configuration with which no rank may start is told in words."""
    failure = failing([], [], Violation("REF-2", "start"), layout="pr9757/1:C=3,T=2")
    assert scene(msgspec.structs.replace(failure, event=None)).diagram is None


def test_show_writes_a_page(tmp_path):
    """`show --html` draws a trace with a stop for every event."""
    config = Config(layout="pr9757/1:C=4,T=2", pages=[9] * 4, max_len=50)
    events = [Admit(0, 3), Decode([0], [3]), Accept(0, 1), Decode([5], [1])]
    (tmp_path / "t.json").write_bytes(
        dump_trace(Trace(config=config, events=events, note="A note."))
    )
    words = ["show", str(tmp_path / "t.json"), "--html", str(tmp_path / "t.html")]
    assert CliRunner().invoke(main, words).exit_code == 0
    page = (tmp_path / "t.html").read_text()
    assert 'max="4"' in page and "refused: unknown_request" in page and "A note." in page


@pytest.mark.parametrize("name", PICTURES)
def test_the_pictures_are_drawn_by_this_code(name):
    """`python -m suite_testing.picture` was run after the last change of the drawing."""
    assert picture(PICTURES[name]()) == (ROOT / "conformance" / name).read_text()
    assert "conformance/placement.svg" in (ROOT / "README.md").read_text()
