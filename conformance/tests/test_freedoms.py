"""Points in which engines differ rightly: honoured by the reference, demanded of who takes them."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar

import hypothesis
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import StdioDriver
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.play import check_trace
from helix_conformance.judge.xfail import Known
from helix_conformance.report.diagram import diagram
from helix_conformance.report.text import failure_text, trace_text
from helix_conformance.session import layout_run
from helix_conformance.testing import engine_machine
from helix_mutants.parts import Stored
from helix_reference.engine import ReferenceEngine
from helix_reference.model import Model
from helix_spec.capabilities import Freedoms, freedoms_of
from helix_spec.config import Config
from helix_spec.engine import OF_GROUPS, RankView
from helix_spec.events import PREFIX, Accept, Admit, Decode, Fork, Preempt, Release
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace, Watch, dump_trace, load_trace


class Keeps(ReferenceEngine):
    """Keeps the pages of rejected tokens."""

    profiles = ReferenceEngine.profiles - {"cache", "attention", *OF_GROUPS, PREFIX}
    freedoms: ClassVar = {"rewind_pages": "kept"}


class KeepsAndDoesNotSay(Keeps):
    """Does the same without a word."""

    def start(self, config, profiles):
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.model.freedoms = Freedoms(rewind_pages="kept")
        return outcome

    freedoms: ClassVar = None


class SaysAndReturns(Keeps):
    """Says that it keeps them, and returns them."""

    def start(self, config, profiles):
        outcome = super().start(config, profiles)
        if outcome.reason is None:
            self.model.freedoms = Freedoms()
        return outcome


class SharesKeptPages(Keeps):
    """Lets a fork's child hold the kept pages, too."""

    def apply(self, event):
        outcome = super().apply(event)
        if isinstance(event, Fork) and outcome.reason is None:
            parent, child = (self.model.requests[id] for id in (event.parent, event.child))
            for table, shared in zip(parent.tables, child.tables, strict=True):
                for page in table[len(shared) :]:
                    page.holders += 1
                    shared.append(page)
        return outcome


class Zeroed(Stored):
    """Its fresh pages hold zeros."""

    freedoms: ClassVar = {"tail": "zero"}

    def observe(self, ids=None) -> RankView:
        view = super().observe(ids)
        fields = {
            name: {
                id: np.nan_to_num(np.asarray(rows, dtype=np.float64))
                for id, rows in getattr(view, name).items()
            }
            for name in ("keys", "values")
        }
        return msgspec.structs.replace(view, **fields)


class ZeroedUnsaid(Zeroed):
    """The same without a word."""

    freedoms: ClassVar = None


class Careless(ZeroedUnsaid):
    """Promises nothing of its tails."""

    freedoms: ClassVar = {"tail": "any"}


class SaysZero(Stored):
    """Says zeros, and leaves what was there."""

    freedoms: ClassVar = {"tail": "zero"}


def played(engine: type, layout: str = "pr9757", examples: int = 60) -> Failure | None:
    """The failure of random traces."""
    driver = LocalDriver(engine)
    _, failure = layout_run(
        driver, layout, (), cp_sizes=[1, 2, 3], examples=examples, seed=1, tally=Tally(),
        known=Known(),
    )  # fmt: skip
    return failure


@pytest.mark.holds("PAGE-1", "PAGE-3")
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_an_engine_that_keeps_pages_and_says_so_passes(layout: str) -> None:
    """Under every layout, whatever page policy it has."""
    assert played(Keeps, layout) is None


@pytest.mark.holds("PAGE-4")
@pytest.mark.parametrize("engine", [Zeroed, Careless])
def test_an_engine_that_says_what_its_tails_hold_passes(engine: type) -> None:
    """Zeros, or anything."""
    assert played(engine, examples=20) is None


@pytest.mark.holds("PAGE-1", "PAGE-2", "PAGE-4")
@pytest.mark.parametrize(
    ("engine", "named"),
    [
        (KeepsAndDoesNotSay, {"PAGE-1"}),
        (SaysAndReturns, {"PAGE-1"}),
        (SharesKeptPages, {"PAGE-1", "PAGE-2"}),
        (ZeroedUnsaid, {"PAGE-4"}),
        (SaysZero, {"PAGE-4"}),
    ],
)
def test_who_does_otherwise_than_it_says_is_named(engine: type, named: set[str]) -> None:
    """A freedom changes what is demanded, and never whether."""
    failure = played(engine, examples=400)
    assert failure is not None
    assert failure.invariants & named


def test_kept_pages_are_the_requests_until_it_ends() -> None:
    """They take none from the pool again, and a child gets none of them."""
    model = Model(
        Config(layout="pr9757/1:C=1,T=2", pages=[9], max_len=20), Freedoms(rewind_pages="kept")
    )
    free = list[int]()
    for event in (
        Admit(0, 2), Decode([0], [4]), Accept(0, 1), Decode([0], [3]), Accept(0, 1), Fork(0, 1),
        Preempt(0), Release(1),
    ):  # fmt: skip
        assert model.apply(event) is None
        free.append(model.pools[0].free)
    assert free == [8, 6, 6, 6, 6, 6, 7, 9]


def test_a_traces_smallest_form_is_judged_by_the_same_freedoms() -> None:
    """An accept that keeps two pages is right for one engine and wrong for another."""
    config = Config(layout="pr9757/1:C=1,T=2", pages=[9], max_len=20)
    trace = Trace(config=config, events=[Admit(0, 2), Decode([0], [4]), Accept(0, 1)])
    for engine, right in ((Keeps, True), (KeepsAndDoesNotSay, False)):
        driver = LocalDriver(engine)
        assert (check_trace(driver, trace, driver.profiles) is None) == right


REWOUND = Trace(
    config=Config(layout="pr9757/1:C=1,T=2", pages=[3], max_len=40),
    events=[Admit(0, 2), Decode([0], [3]), Accept(0, 1), Admit(1, 1)],
)
"""Of three pages one is kept, or is there for request 1."""


def test_a_failure_is_shown_by_the_freedoms_it_was_played_under(tmp_path: Path) -> None:
    """Terminal, file and `show` tell the refusal and the pages of that engine, and say so."""

    class Wrong(Keeps):
        def observe(self, ids=None):
            view = super().observe(ids)
            return msgspec.structs.replace(view, free_pages=view.free_pages + 1)

    trace = msgspec.structs.replace(REWOUND, watch=Watch(every=4, touched=False))
    failure = check_trace(LocalDriver(Wrong), trace, Wrong.profiles)
    assert failure is not None
    path = tmp_path / "failing.json"
    path.write_bytes(dump_trace(failure.trace))
    assert load_trace(path) == failure.trace
    shown = CliRunner().invoke(main, ["show", str(path)]).output.splitlines()
    for lines in (list(trace_text(failure.trace)), shown, list(failure_text(failure))):
        told = "\n".join(line.strip() for line in lines)
        assert "on an engine with the freedoms rewind_pages kept" in told
        assert "event 3: admit id=1 prompt_len=1 -> refused: out_of_pages" in told
        assert told.count("(page ") == 3
    strict = "\n".join(trace_text(REWOUND))
    assert ("refused" in strict, "freedoms" in strict, strict.count("(page ")) == (False, False, 3)


def test_a_diagram_has_the_pages_of_that_engine() -> None:
    """A kept page is drawn after the rewind, and request 1 is not."""
    kept = msgspec.structs.replace(REWOUND, freedoms=Freedoms(rewind_pages="kept"))
    assert [panel.id for panel in diagram(kept).panels] == [0]
    assert [panel.id for panel in diagram(REWOUND).panels] == [0, 1]


def test_refusals_are_shown_by_the_profiles_that_the_engine_declares() -> None:
    """Pools of an engine without `pages` have no end."""
    config = msgspec.structs.replace(REWOUND.config, pages=[1])
    trace = Trace(config=config, events=[Admit(0, 9)])
    assert "refused: out_of_pages" in "".join(trace_text(trace))
    assert "refused" not in "".join(trace_text(trace, ["placement"]))


class TestMachineOfAnEngineThatKeepsPages(engine_machine(Keeps).TestCase):
    """`helix_conformance.testing` goes by the freedoms that an engine declares."""

    settings = hypothesis.settings(max_examples=25, stateful_step_count=20, deadline=None)


def test_freedoms_travel() -> None:
    """Through the stdio protocol, as through a class."""
    driver = StdioDriver("suite_testing.narrow:KeepsPages", deadline_s=30.0)
    try:
        assert driver.freedoms == Freedoms(rewind_pages="kept")
    finally:
        driver.close()


def test_what_is_no_freedom_is_refused() -> None:
    """By name and by value."""
    for declared in ({"tails": "zero"}, {"tail": 0}, "zero"):
        with pytest.raises(ValueError, match="declares no freedoms"):
            freedoms_of(declared)
