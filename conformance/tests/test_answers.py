"""What counts as an answer: nothing passes by omission, and nothing the engine says is a crash."""

import os
import subprocess
import sys

import msgspec
import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.judge.play import check_trace
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import Admit, Decode, Release
from helix_spec.trace import Trace

TRACE = Trace(
    config=Config(layout="pr9757/1:C=2,T=2", pages=[5, 5], max_len=50),
    events=[Admit(4, 3), Decode([4], [1]), Release(4)],
)
LENGTHS = frozenset({"placement", "lengths", "pages"})


class Bookkeeping(ReferenceEngine):
    """The reference, declaring no more than pages."""

    profiles = LENGTHS


class Spoiled(Bookkeeping):
    """Rank 1 changes what it answers to a decode, and what it observes after it."""

    def apply(self, event):
        self.decoded = isinstance(event, Decode)
        outcome = super().apply(event)
        return self.outcome(outcome) if self.decoded and self.rank == 1 else outcome

    def observe(self, ids=None):
        view = super().observe(ids)
        return self.view(view) if self.decoded and self.rank == 1 else view

    def outcome(self, outcome):
        return outcome

    def view(self, view):
        return view


def changed(struct, **changes):
    """The struct with other values in these fields."""
    return msgspec.structs.replace(struct, **changes)


@pytest.mark.parametrize(
    ("method", "spoil", "what"),
    [
        ("outcome", lambda o: None, "its answer is of type NoneType, not an Outcome"),
        ("outcome", lambda o: changed(o, slots=[]), "its slots has 0 entries, not 1"),
        ("outcome", lambda o: changed(o, past_len=[]), "its past_len has 0 entries, not 1"),
        ("outcome", lambda o: changed(o, past_len=None), "Expected `array`, got `null`"),
        ("outcome", lambda o: changed(o, position_ids=["3"]), "Expected `int`, got `str`"),
        ("outcome", lambda o: changed(o, reason="so there"), "Invalid enum value 'so there'"),
        ("outcome", lambda o: changed(o, slots=[object()]), "type object is unsupported"),
        ("view", lambda v: None, "its state is of type NoneType, not a RankView"),
        ("view", lambda v: changed(v, local_len=None), "its local_len is of type NoneType"),
        ("view", lambda v: changed(v, local_len={4: None}), "Expected `int`, got `null`"),
        ("view", lambda v: changed(v, block_tables=None), "Expected `object`, got `null`"),
        ("view", lambda v: changed(v, block_tables={4: None}), "Expected `array`, got `null`"),
        ("view", lambda v: changed(v, preempted=None), "Expected `array`, got `null`"),
    ],
)
def test_answer_that_is_none(method, spoil, what):
    """An answer of another type or size than asked for is an error that names rank and event."""
    engine = type("Engine", (Spoiled,), {method: lambda self, answer: spoil(answer)})
    failure = check_trace(LocalDriver(engine), TRACE, LENGTHS)
    assert failure is not None
    assert failure.verdict == "error", failure
    assert "Rank 1 gave a malformed answer: " in failure.engine_failure
    assert what in failure.engine_failure
    assert (1, TRACE.events[:2]) == (failure.event, failure.trace.events)


@pytest.mark.parametrize("outcome", [None, Outcome(reason=["bad_config"])])
def test_answer_to_an_illegal_start_that_is_none(outcome):
    """It is the engine's error, too, at the start."""
    refuses = {"start": lambda self, config, profiles: outcome}
    engine = type("Engine", (Bookkeeping,), refuses)
    illegal = Trace(config=Config(layout="pr9757/1:C=2,T=2", pages=[5], max_len=50), events=[])
    failure = check_trace(LocalDriver(engine), illegal, LENGTHS)
    assert (failure.verdict, failure.event) == ("error", None)
    assert "Rank 0 gave a malformed answer: " in failure.engine_failure


def test_answer_for_another_request():
    """A view that tells of a request that it was not asked for is an error."""
    from helix_spec.trace import Watch

    class Other(Spoiled):
        def view(self, view):
            return changed(view, local_len={9: 1})

    watch = Watch(every=100, touched=True)
    failure = check_trace(LocalDriver(Other), TRACE, LENGTHS, watch=watch)
    assert "tells of requests [9], not of [4] alone" in failure.engine_failure


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize(("module", "exit_name"), [(sys, "exit"), (os, "_exit")])
@pytest.mark.parametrize("name", ["start", "apply", "observe"])
def test_engine_that_exits_has_failed(name, module, exit_name):
    """An engine that exits with status 0, in whichever call, does not end the run green."""
    leaving = {name: lambda self, *_: getattr(module, exit_name)(0)}
    engine = type("Engine", (Bookkeeping,), leaving)
    failure = check_trace(LocalDriver(engine), TRACE, LENGTHS)
    assert "Rank 0 exited with status 0" in failure.engine_failure


def test_placement_alone_needs_no_lengths():
    """An engine that declares placement only may leave out past_len and its whole view."""

    class Placement(ReferenceEngine):
        profiles = frozenset({"placement"})

        def apply(self, event):
            return changed(super().apply(event), past_len=[], visible=None)

        def observe(self, ids=None):
            return changed(super().observe(ids), local_len={}, block_tables={}, free_pages=0)

    assert check_trace(LocalDriver(Placement), TRACE, Placement.profiles) is None


@pytest.mark.holds("LIVE-1")
def test_hanging_engine_in_one_process(tmp_path):
    """An engine that hangs in Python ends a run in one process with status 3, rank and event."""
    (tmp_path / "hanging.py").write_text(
        "import time\n"
        "from helix_reference.engine import ReferenceEngine\n"
        "class Engine(ReferenceEngine):\n"
        "    profiles = frozenset({'placement'})\n"
        "    def apply(self, event):\n"
        "        time.sleep(100 * self.rank)\n"
        "        return super().apply(event)\n"
    )
    words = ["run", "--engine", "hanging:Engine", "--layout", "pr9757", "--cp", "2"]
    done = subprocess.run(
        [sys.executable, "-m", "helix_conformance", *words, "--deadline", "0.5"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
    )
    assert done.returncode == 3, done.stderr
    text = "Rank 1 timed out: no answer within 0.5 s (at event 0)."
    assert text in done.stdout
