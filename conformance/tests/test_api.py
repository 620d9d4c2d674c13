"""`check` and `Report`: the public Python API."""

from __future__ import annotations

import gc
import json
import subprocess
import sys

import pytest

from helix_conformance import Report, check
from helix_reference.engine import ReferenceEngine
from helix_spec.events import Admit, Decode
from helix_spec.invariants import NUMBERS
from suite_testing.broken import Liar

SMALL = {"layouts": ["pr9757"], "cp": [2], "profiles": ["pages"], "examples": 10}


@pytest.mark.parametrize(
    "engine", [ReferenceEngine, "reference", "helix_reference.engine:ReferenceEngine"]
)
def test_a_verified_engine_passes_by_class_and_by_name(engine):
    """An engine is a class or what `--engine` takes; its situations are counted."""
    report = check(engine, **SMALL)
    assert (report.verdict, report.failures, report.not_started) == ("pass", [], None)
    assert report.coverage["page boundary"] > 0


def test_a_command_is_an_engine():
    """`stdio:COMMAND` runs in processes of its own."""
    serve = f"stdio:{sys.executable} -m helix_conformance serve --engine reference"
    assert check(serve, **SMALL).verdict == "pass"


@pytest.mark.holds("LEN-2")
def test_a_wrong_engine_fails_with_its_smallest_trace():
    """A failure holds the trace that was drawn, what is left of it, and what is wrong there."""
    report = check(Liar, layouts=["pr9757"], cp=[2], examples=20)
    assert (report.verdict, [one.layout for one in report.failures]) == ("fail", ["pr9757"])
    [failure] = report.failures
    assert failure.minimal.events == [Admit(0, 1), Decode([0], [1])]
    assert len(failure.minimal.events) <= len(failure.trace.events)
    assert {violation.invariant for violation in failure.violations} <= set(NUMBERS)
    assert "LEN-2 violated at event 1" in failure.text


def test_nothing_stays_frozen():
    """What is frozen at exit is never released, and native libraries then report leaks."""
    check(ReferenceEngine, **SMALL)
    assert gc.get_freeze_count() == 0


def test_the_report_is_the_stream_of_a_run():
    """Its JSON lines begin with settings that say what was left out, and end with the verdict."""
    report = check("reference", **SMALL)
    lines = [json.loads(line) for line in report.to_json().splitlines()]
    assert [lines[0]["kind"], lines[-1]["kind"]] == ["settings", "summary"]
    assert (lines[0]["restrictions"], lines[-1]["verdict"]) == (report.restrictions, "pass")
    assert len(report.restrictions) == 4


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"layouts": ["pr1"]}, "layouts: 'pr1' is none of before_9757, pr9757"),
        ({"profiles": ["depth"]}, "profiles: 'depth' is none of placement, lengths"),
        ({"driver": "mpi"}, "driver: 'mpi' is none of local, stdio, pool"),
        ({"examples": 0}, "examples: 0 is too small; it must be at least 1"),
        ({"cp": [2, 0]}, "cp: 0 is too small"),
        ({"ranks": -1}, "ranks: -1 is too small"),
    ],
)
def test_what_cannot_be_checked_is_refused_before_anything_runs(options, sentence):
    """The sentence names the argument, the value and what would be right."""
    with pytest.raises(ValueError, match=sentence):
        check("reference", **options)


def test_an_engine_that_does_not_start_is_an_error():
    """The verdict is `error`, and the report says why."""
    report = check("stdio:false", **SMALL)
    assert report.verdict == "error"
    assert "exited with status 1" in report.not_started


def test_the_package_loads_the_api_when_it_is_asked_for():
    """Pytest imports the plugin at each start: without an engine nothing heavy is loaded."""
    code = (
        "import sys, helix_conformance.pytest_plugin\nprint('helix_conformance.api' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
    assert Report.__module__ == "helix_conformance.api"
