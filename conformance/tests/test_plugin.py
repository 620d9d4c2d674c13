"""The pytest plugin in an engine's own repository: the right tests go red, and no others."""

import subprocess
import sys
import tomllib
from pathlib import Path
from xml.etree import ElementTree

import pytest

from helix_conformance.engines import gpu
from helix_conformance.suite import Suite
from helix_spec.invariants import NUMBERS, profiles_of, sentence

pytest_plugins = ["pytester"]
STAYS_IMPORTED = (Suite, gpu)
"""pytester forgets modules that its sessions import, and numpy cannot be imported twice."""

ENGINES = '''
import msgspec
from helix_conformance.engines.gpu import LedgerEngine
from helix_spec.events import Admit, Decode, Reason
from helix_spec.engine import Outcome

class Right(LedgerEngine):
    """As it should be."""
    settings = {"allocator": "first fit"}

class Wrong(LedgerEngine):
    def apply(self, event):
        outcome = super().apply(event)
        return self.changed(event, outcome) if outcome.past_len else outcome

class Liar(Wrong):
    """Rank 1 claims one token more than it held."""
    def changed(self, event, outcome):
        more = self.rank == 1
        return msgspec.structs.replace(outcome, past_len=[n + more for n in outcome.past_len])

class TwiceWrong(Liar):
    """The same, and positions are one too far."""
    def changed(self, event, outcome):
        ids = [p + 1 for p in outcome.position_ids]
        return msgspec.structs.replace(super().changed(event, outcome), position_ids=ids)

class SloppyGroups(Wrong):
    """Claims every token of a group."""
    def changed(self, event, outcome):
        if max(event.query_lens) > 1:
            return msgspec.structs.replace(outcome, active=[True] * len(outcome.active))
        return outcome

class Blind(Wrong):
    """Reports far too many visible keys, and does not declare attention."""
    def changed(self, event, outcome):
        return msgspec.structs.replace(outcome, visible=[n + 99 for n in outcome.position_ids])

class Squeamish(LedgerEngine):
    """Refuses prompts of one token."""
    def apply(self, event):
        if isinstance(event, Admit) and event.prompt_len == 1:
            return Outcome(Reason.EMPTY_PROMPT)
        return super().apply(event)

class Refuser(LedgerEngine):
    """Never starts."""
    def start(self, config, profiles):
        return Outcome(Reason.BAD_CONFIG)

class Raiser(Wrong):
    """Dies of a decode."""
    def changed(self, event, outcome):
        raise RuntimeError("the adapter lost its way")

class Shallow(LedgerEngine):
    """Lets nothing but placement be checked."""
    profiles = frozenset({"placement"})
'''


@pytest.fixture
def session(pytester, monkeypatch):
    """Run pytest on an engine with these options; the outcome of each of its tests by name."""
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")
    monkeypatch.setenv("PYTEST_PLUGINS", "helix_conformance.pytest_plugin")
    pytester.makepyfile(wrong=ENGINES)
    pytester.syspathinsert()

    def run(engine, *options):
        words = (f"--helix-engine=wrong:{engine}", "--helix-layout=pr9757", "--helix-cp=2")
        result = pytester.runpytest_inprocess(
            *words, "--helix-examples=20", "-rA", "--junitxml=junit.xml", *map(str, options)
        )
        return result, outcomes(pytester.path / "junit.xml")

    return run


def outcomes(path):
    """What a junit file says of each test: passed, failed, or skipped with which reason."""
    found = {}
    for case in ElementTree.parse(path).iter("testcase"):
        name = case.get("classname").removeprefix("helix-conformance.") + "." + case.get("name")
        states = [child for child in case if child.tag in ("failure", "error", "skipped")]
        found[name] = f"{states[0].tag}: {states[0].get('message')}" if states else "passed"
    return found


def red(found):
    """The names of the tests that failed."""
    return [name for name, outcome in found.items() if outcome.startswith(("failure", "error"))]


def test_a_right_engine_passes_what_it_declares_and_skips_the_rest(session):
    """One test per invariant and profile; each undeclared profile is skipped by name."""
    result, found = session("Right")
    assert result.ret == 0
    assert red(found) == []
    for number in set(NUMBERS) - {"EQ-1", "LIVE-1"}:
        for profile in profiles_of(number):
            declared = profile not in ("cache", "attention", "merge")
            outcome = found[f"pr9757.{profile}.{number}"]
            assert outcome == "passed" if declared else "skipped" in outcome, (profile, number)
    assert "the engine does not declare profile cache" in found["pr9757.cache.POS-2"]
    assert "passed" == found["pr9757.every.LIVE-1"] == found["pr9757.fork.traces"]
    result.stdout.fnmatch_lines(
        [
            "helix: engine wrong:Right, driver local",
            "helix: engine's allocator first fit",
            "helix: profiles checked placement lengths pages speculative*",
            "helix: profiles not checked cache attention*",
            "helix: cp_size 2, 20 random traces for each layout, seed 0, deadline 30 s",
        ]
    )


@pytest.mark.parametrize(
    ("engine", "expected"),
    [
        pytest.param(
            engine,
            tests,
            marks=pytest.mark.holds(*(name.partition(".")[2] for name in tests if "-" in name)),
        )
        for engine, *tests in [
            ("Liar", "lengths.LEN-2"),
            ("TwiceWrong", "placement.POS-1", "lengths.LEN-2"),
            ("Blind", "attention.LEN-3"),
            ("SloppyGroups", "placement.OWN-2", "placement.OWN-3", "speculative.traces"),
        ]
    ],
)
def test_precisely_the_violated_invariants_are_red(session, engine, expected):
    """Others pass where they were judged to the end; after a wrong owner they were not."""
    result, found = session(engine)
    assert result.ret == 1
    assert [f"pr9757.{name}" for name in expected] == red(found)
    others = {found["pr9757.pages.PAGE-1"], found["pr9757.fork.traces"]}
    if engine == "SloppyGroups":
        (why,) = others
        assert "traces ended where engine and reference part (OWN-2, OWN-3)" in why
    else:
        assert others == {"passed"}


def test_a_failure_explains_itself(session, pytester):
    """It shows the smallest trace, number and sentence of the invariant, and both values."""
    result, _ = session("Liar", "-k", "LEN-2")
    result.stdout.fnmatch_lines(
        [
            "*LEN-2 violated at event 1, decode ids=[[]0[]] query_lens=[[]1[]]*",
            "*pr9757/1:C=2,T=1*",
            "*event 0: admit id=0 prompt_len=1*",
            sentence("LEN-2"),
            "*rank 1: tokens held before the step*",
            "*expected [[]0[]]*",
            "*observed [[]1[]]*",
            "*helix-conformance replay helix-failures/pr9757-LEN-2.json --engine wrong:Liar*",
        ]
    )
    assert (pytester.path / "helix-failures/pr9757-LEN-2.json").exists()
    assert result.parseoutcomes()["failed"] == 1


def test_what_a_wrong_refusal_hides_is_not_passed(session):
    """Traces that ended at a wrong refusal were not judged to the end, and the tests say so."""
    _, found = session("Squeamish")
    assert red(found) == ["pr9757.placement.REF-2"]
    assert "traces ended where engine and reference part (REF-2)" in found["pr9757.lengths.LEN-1"]
    assert "passed" not in {found["pr9757.fork.traces"], found["pr9757.placement.OWN-1"]}


@pytest.mark.holds("LIVE-1")
def test_an_engine_that_dies_fails_one_test_and_the_rest_is_not_passed(session):
    """LIVE-1 is red, with rank and event; nothing else is known."""
    result, found = session("Raiser")
    assert red(found) == ["pr9757.every.LIVE-1"]
    assert "the engine failed (LIVE-1): Rank 0 raised RuntimeError" in found["pr9757.pages.PAGE-1"]
    assert "passed" not in found.values()
    result.stdout.fnmatch_lines(["*Rank 0 raised RuntimeError: the adapter lost its way (at *"])


def test_profiles_that_are_not_declared_or_not_asked_for_are_skipped(session):
    """Nothing passes by omission."""
    _, found = session("Shallow")
    assert "does not declare profile lengths" in found["pr9757.lengths.LEN-1"]
    assert "does not declare profile fork" in found["pr9757.fork.traces"]
    _, found = session("Right", "--helix-profile=lengths")
    assert "profile pages was not asked for" in found["pr9757.pages.PAGE-1"]
    assert found["pr9757.lengths.LEN-1"] == "passed"


LEDGER = """
[[difference]]
invariant = "LEN-2"
kind = "answers_wrongly"
does = "counts the new token"
link = "https://example.org/1"
"""


def test_a_known_difference_is_an_expected_failure(session, pytester):
    """It is named with its link; what else is wrong fails as ever; a stale entry fails."""
    (pytester.path / "known.toml").write_text(LEDGER)
    _, found = session("TwiceWrong", "--helix-xfail=known.toml")
    assert red(found) == ["pr9757.placement.POS-1"]
    assert "counts the new token (https://example.org/1)" in found["pr9757.lengths.LEN-2"]
    result, found = session("Right", "--helix-xfail=known.toml")
    assert [name.rpartition(".")[2] for name in red(found)] == ["expected failure 1: LEN-2"]
    assert found["pr9757.lengths.LEN-2"] == "passed"
    assert result.ret == 1


def test_a_ledger_that_leaves_nothing_to_judge_is_no_pass(session, pytester):
    """Where nothing may run it is bad usage; where every trace ends at once its entries fail."""
    never = LEDGER.replace('invariant = "LEN-2"', 'layout = "pr9757"')
    never = never.replace("answers_wrongly", "must_not_run")
    (pytester.path / "known.toml").write_text(never)
    result = pytester.runpytest_inprocess(
        "--helix-engine=wrong:Right", "--helix-layout=pr9757", "--helix-xfail=known.toml"
    )
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    wrongly = LEDGER.replace('invariant = "LEN-2"', 'reason = "bad_config"')
    (pytester.path / "known.toml").write_text(wrongly)
    result, found = session("Refuser", "--helix-xfail=known.toml")
    assert [name.rpartition(".")[2] for name in red(found)] == ["expected failure 1: bad_config"]
    assert "passed" not in found.values()


def test_three_lines_of_conftest(session, pytester, monkeypatch):
    """The engine may be named in conftest.py; the repository's own tests run beside."""
    pytester.makeconftest(
        "def pytest_configure(config):\n"
        '    config.option.helix_engine = "wrong:Liar"\n'
        '    config.option.helix_layouts = ["pr9757"]\n'
    )
    pytester.makepyfile(test_own="def test_own(): pass")
    result = pytester.runpytest_inprocess("--helix-examples=10", "-k", "LEN-2 or test_own")
    result.assert_outcomes(passed=1, failed=1)


def test_an_engine_that_does_not_start_fails_every_test_that_asks_it(session):
    """The header says it, no test passes, and the engine is started once."""
    result, found = session("Right", "--helix-engine=stdio:false")
    said = "did not start. Rank 0 exited with status 1"
    assert result.ret == pytest.ExitCode.TESTS_FAILED
    assert said in found["pr9757.pages.PAGE-1"]
    assert "passed" not in found.values()
    result.stdout.fnmatch_lines([f"helix: engine stdio:false {said}*"])


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--helix-engine=nobody"], "--helix-engine: 'nobody' names no engine"),
        (["--helix-driver=bus"], "--helix-driver: 'bus' is none of local, "),
        (["--helix-layout=pr1"], "--helix-layout: 'pr1' is none of before_9757"),
        (["--helix-profile=speed"], "--helix-profile: 'speed' is none of placement"),
        (["--helix-known=none.toml"], "--helix-xfail: none.toml: cannot be read"),
        (["--helix-examples=-1"], "--helix-examples: -1 is too small; it must be at least 1"),
        (["--helix-cp=0"], "--helix-cp: 0 is too small"),
    ],
)
def test_bad_usage_is_told_before_anything_runs(session, pytester, options, sentence):
    """It ends with pytest's status for bad usage and a sentence."""
    result = pytester.runpytest_inprocess("--helix-engine=wrong:Right", *options)
    assert result.ret == pytest.ExitCode.USAGE_ERROR
    result.stderr.fnmatch_lines([f"*{sentence}*"])


def test_without_an_engine_nothing_happens(session, pytester):
    """No test, no header, nothing imported that costs time."""
    pytester.makepyfile(test_own="def test_own(): pass")
    result = pytester.runpytest_inprocess()
    result.assert_outcomes(passed=1)
    assert "helix:" not in result.stdout.str()
    program = (
        "import sys, pytest, helix_conformance.pytest_plugin\n"
        "costly = {'torch', 'numpy', 'hypothesis', 'msgspec', 'helix_conformance.suite'}\n"
        "assert not costly & set(sys.modules), costly & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_pytest_finds_the_plugin():
    """The project's entry point names this very module."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    points = project["project"]["entry-points"]["pytest11"]
    assert list(points.values()) == ["helix_conformance.pytest_plugin"]
