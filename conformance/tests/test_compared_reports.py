"""Runs beside each other: `report --compare` and `report --index`; and what a page opens first."""

import re

import msgspec
import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.judge.failure import Violation
from helix_conformance.report.html import index_page, run_page, show_page
from helix_conformance.report.stream import (
    FailureLine,
    Record,
    Row,
    Settings,
    Summary,
    encode_line,
)
from helix_spec.config import Config
from helix_spec.engine import PROFILES
from helix_spec.events import Admit, Decode, Merge
from helix_spec.trace import Trace

CONFIG = Config(layout="pr9757/1:C=2,T=2", pages=[5, 5], max_len=50)
TRACE = Trace(config=CONFIG, events=[Admit(4, 3), Decode([4], [1])])


def row(layout="pr9757", *, engine="mine", verdict="pass", seconds=2.0, profiles=("placement",)):
    """A row of 100 events."""
    return Row(
        layout=layout, engine=engine, driver="local", cp_sizes=[2], profiles=[*profiles],
        declared=[*profiles], traces=3, events=100, seconds=seconds, verdict=verdict,
    )  # fmt: skip


def failure(layout="pr9757", *, engine="mine", events=2, lost=False):
    """A failure of OWN-3 at the last of some events, or of an engine that died there."""
    trace = msgspec.structs.replace(TRACE, events=[Admit(4, 3), *[Decode([4], [1])] * (events - 1)])
    found = [] if lost else [Violation("OWN-3", "ranks", expected=[True], observed=[False])]
    return FailureLine(
        layout=layout, engine=engine, driver="local", trace_file=f"{layout}.json", trace=trace,
        event=events - 1, violations=found, engine_failure="Rank 1 died." if lost else None,
    )  # fmt: skip


def run(*rows, failures=(), engine="mine"):
    """The lines of a run with these rows and failures."""
    settings = Settings(
        command="run", engine=engine, suite_version="0.2.0", started="2026-01-01T00:00:00+00:00",
        python="3.11", machine="x86_64",
    )  # fmt: skip
    verdict = "fail" if failures else "pass"
    summary = Summary(
        engine=engine, verdict=verdict, layouts=[], traces=3, events=100, events_per_s=None,
        profiles_checked=[], profiles_not_checked=[],
    )  # fmt: skip
    return [settings, *rows, *failures, summary]


@pytest.fixture
def compare(tmp_path):
    """`report --compare` of two runs: its status and its lines."""

    def call(old, new):
        for name, one in (("old", old), ("new", new)):
            (tmp_path / name).write_bytes(b"".join(map(encode_line, one)))
        words = ["report", "--compare", str(tmp_path / "old"), str(tmp_path / "new")]
        result = CliRunner().invoke(main, words)
        return result.exit_code, result.output.splitlines()

    return call


def test_what_got_worse_is_told_first_and_is_the_status(compare):
    """A profile that passed and fails ends with 1; one that passes now is told after it."""
    good, bad = row(), row("vllm_dcp", verdict="fail")
    old = run(good, bad, failures=[failure("vllm_dcp")])
    new = run(
        row(verdict="fail", seconds=4.0),
        row("vllm_dcp", seconds=1.0),
        failures=[failure()],
        engine="b",
    )
    status, lines = compare(old, new)
    assert status == 1
    assert lines == [
        "Passed, and does not: pr9757 local placement: was pass, is fail.",
        "Passes now: vllm_dcp local placement: was fail, is pass.",
        "pr9757 local: 25 events/s, was 50 (0.50 times).",
        "vllm_dcp local: 100 events/s, was 50 (2.00 times).",
    ]


def test_what_is_not_checked_any_more_got_worse(compare):
    """A profile or layout that passed and is absent ends with 1, though nothing failed."""
    status, lines = compare(run(row(profiles=("placement", "lengths"))), run(row()))
    assert (status, lines[0]) == (
        1,
        "Passed, and does not: pr9757 local lengths: was pass, is absent.",
    )


def test_the_same_verdicts_end_with_0(compare):
    """Without a change that is said; a faster run is no worse."""
    status, lines = compare(run(row()), run(row(seconds=1.0)))
    assert (status, lines[0]) == (0, "Every layout and profile has the verdict that it had.")


@pytest.mark.parametrize("words", [["a.jsonl"], ["a.jsonl", "b.jsonl", "--html", "x.html"]])
def test_a_comparison_is_of_two_streams_alone(words, tmp_path, monkeypatch):
    """Another number of streams, or a file to be written, is bad usage."""
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["report", "--compare", *words])
    assert result.exit_code == 2
    assert "--compare takes two streams, OLD and NEW, and writes no file." in result.output


def test_an_index_has_a_table_for_each_engine():
    """Every engine, layout and verdict is in it, and what is foreign is escaped."""
    one = run(row(engine="<one>"), engine="<one>")
    two = run(row(engine="two", verdict="fail"), failures=[failure(engine="two")], engine="two")
    page = index_page(Record([*one, *two]))
    assert page.count("<table") == 2
    assert "&lt;one&gt;" in page and "<one>" not in page
    assert re.findall(r'class="cell (pass|fail)"', page) == ["pass", "fail"]


def test_the_shortest_difference_is_opened_first():
    """Before longer ones, and before an engine that died, which tells least."""
    failures = [failure("custom", lost=True), failure("balanced", events=5), failure("vllm_dcp")]
    page = run_page(Record(run(row(), failures=failures)))
    opened = re.findall(
        r'<details class="failure" id="failure-\d"( open)?>\s*<summary>.*?</span> (\w+)', page
    )
    assert opened == [(" open", "vllm_dcp"), ("", "balanced"), ("", "custom")]


def test_profiles_that_are_not_declared_are_folded_away():
    """The table has a column for what is declared; the rest is behind a summary."""
    page = run_page(Record(run(row(profiles=("placement", "lengths")))))
    assert page.count('class="profile"') == 2
    assert f"{len(PROFILES) - 2} profiles that the engine does not declare" in page


def test_a_trace_in_which_no_token_moves_has_no_slider():
    """A merge of supplied partials draws none; an admission does."""
    merge = msgspec.structs.replace(TRACE, events=[Merge([[0], [0]], order=[0, 1])])
    assert 'type="range"' not in show_page(merge, "merge.json")
    assert 'type="range"' in show_page(TRACE, "trace.json")


def test_the_page_of_a_trace_names_its_file():
    """In the title and in the heading."""
    page = show_page(TRACE, "pr9757-local-1a2b.json")
    assert "<title>pr9757-local-1a2b.json: " in page
    assert "<code>pr9757-local-1a2b.json</code>" in page
