"""Long runs of one engine, and counters that begin where they would wrap."""

from __future__ import annotations

import msgspec
import pytest
from click.testing import CliRunner

from helix_conformance.api import check
from helix_conformance.cli import main
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.report.stream import Row
from helix_conformance.session import Session, SessionError
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Admit, Decode, Event, Merge


class Tires(LedgerEngine):
    """After 1,500 events it shows a page too many."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        self.events = 0
        return super().start(config, profiles)

    def apply(self, event: Event) -> Outcome:
        self.events += 1
        return super().apply(event)

    def observe(self, ids: list[int] | None = None) -> RankView:
        view = super().observe(ids)
        return msgspec.structs.replace(view, free_pages=view.free_pages + (self.events > 1500))


class LateTurn(ReferenceEngine):
    """Says the wrong position of the token that opens a request's sixth turn over the ranks."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        self.turn = config.layout.cp_size * config.layout.tokens_per_block
        self.prompt_lens = dict[int, int]()
        return super().start(config, profiles)

    def apply(self, event: Event) -> Outcome:
        outcome = super().apply(event)
        if outcome.reason is None and isinstance(event, Admit):
            self.prompt_lens[event.id] = event.prompt_len
        if outcome.reason is None and isinstance(event, Decode):
            first = outcome.position_ids[0]
            late = first - self.prompt_lens.get(event.ids[0], 0) == 6 * self.turn
            outcome.position_ids[0] = first + late
        return outcome


class SignedSlot(ReferenceEngine):
    """An exchange picks its slot by a signed counter of 32 bits (b12x #97)."""

    profiles = frozenset({"merge"})
    exchanges_done = 0

    def apply(self, event: Event) -> Outcome:
        outcome = super().apply(event)
        if isinstance(event, Merge) and outcome.reason is None:
            self.exchanges_done += 1
            if self.exchanges_done >= 2**31:
                return Outcome(output=outcome.output * 0)
        return outcome


@pytest.mark.holds("POS-1")
def test_a_late_turn_is_met_by_a_default_run() -> None:
    """Each layout's long trace has short turns, so that a request goes through many of them."""
    report = check(LateTurn, layouts=["pr9757"], profiles=["placement"], examples=1)
    assert [one.invariant for failure in report.failures for one in failure.violations] == ["POS-1"]


@pytest.mark.holds("PAGE-3")
def test_what_tires_is_found_by_a_long_run() -> None:
    """One start, thousands of events; random traces are too short for it."""
    for steps, verdict in ((1000, "pass"), (4000, "fail")):
        session = Session(Tires)
        session.begin("run", {"seed": 0}, "One long trace was played")
        session.soak(["pr9757"], [2], steps)
        [row] = session.stream.of(Row)
        assert (row.verdict, row.traces) == (verdict, 1)
        assert row.events == (steps if verdict == "pass" else 1600)


def test_the_command_plays_one_long_trace() -> None:
    """Of our own bookkeeping, which does not tire."""
    words = "run --engine gpu --driver local --soak 3000 --layout balanced"
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 0
    assert "PASS: 1 trace of balanced" in result.output


@pytest.mark.holds("ATT-1")
def test_a_counter_that_wraps_is_found_where_it_starts_late() -> None:
    """And not where it starts at 0."""
    verdicts = []
    for done in (0, 2**31 - 3):
        session = Session(SignedSlot, exchanges_done=done)
        session.begin("run", {"seed": 0}, "Merges were played")
        session.random(["pr9757"], [2], 20)
        verdicts.append(session.stream.of(Row)[0].verdict)
    assert verdicts == ["pass", "fail"]


def test_an_engine_without_a_counter_says_so() -> None:
    """A start value that nobody takes would be a check that cannot fail."""
    with pytest.raises(SessionError, match="takes no start value of its counter"):
        Session(ReferenceEngine, exchanges_done=5).random(["pr9757"], [2], 1)
