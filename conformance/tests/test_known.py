"""The list of expected failures: what it covers, what it must not cover, how it goes stale."""

import json

import msgspec
import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_trace
from helix_conformance.judge.xfail import Known, LedgerError
from helix_conformance.session import layout_run
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config
from helix_spec.engine import OF_GROUPS, PROFILES, Outcome
from helix_spec.events import FEATURES, Admit, Decode, Reason
from helix_spec.invariants import NUMBERS
from helix_spec.layouts import layout_name
from helix_spec.trace import Earlier, Trace

LINK = 'link = "https://example.org/issues/7"\ndoes = "it is wrong"\n'
WRONG = 'kind = "answers_wrongly"\n' + LINK
NEVER = 'kind = "must_not_run"\n' + LINK


class Liar(LedgerEngine):
    """Rank 1 claims one token more than it held."""

    def apply(self, event):
        outcome = super().apply(event)
        if self.rank == 1 and outcome.past_len:
            outcome = msgspec.structs.replace(outcome, past_len=[n + 1 for n in outcome.past_len])
        return outcome


class TwiceWrong(Liar):
    """The same, and positions are one too far, too."""

    def apply(self, event):
        outcome = super().apply(event)
        ids = [position + 1 for position in outcome.position_ids]
        return msgspec.structs.replace(outcome, position_ids=ids)


class Squeamish(LedgerEngine):
    """Refuses prompts shorter than two tokens, as if they were empty."""

    def apply(self, event):
        if isinstance(event, Admit) and event.prompt_len == 1:
            return Outcome(Reason.EMPTY_PROMPT)
        return super().apply(event)


class Fragile(LedgerEngine):
    """Dies of a speculative group, and of a prompt that is too long."""

    def apply(self, event):
        if isinstance(event, Decode) and any(n > 1 for n in event.query_lens):
            raise RuntimeError("group")
        outcome = super().apply(event)
        if outcome.reason == Reason.TOO_LONG:
            raise RuntimeError("too long")
        return outcome


class SloppyGroups(LedgerEngine):
    """Claims every token of a group."""

    def apply(self, event):
        outcome = super().apply(event)
        if isinstance(event, Decode) and any(n > 1 for n in event.query_lens):
            active = [True] * len(outcome.active)
            outcome = msgspec.structs.replace(outcome, active=active)
        return outcome


def known(tmp_path, *entries):
    """The ledger of these entries."""
    path = tmp_path / "known.toml"
    path.write_text("".join(f"[[difference]]\n{entry}\n" for entry in entries))
    return Known.read(path)


def played(engine, ledger, *, layout="pr9757", asked=(), examples=30):
    """A run of one layout under a ledger: what was checked, and the numbers that it names."""
    tally = Tally()
    checked, failure = layout_run(
        LocalDriver(engine), layout, asked, cp_sizes=(1, 2, 3), examples=examples, seed=1,
        tally=tally, known=ledger,
    )  # fmt: skip
    numbers = failure and [v.invariant for v in failure.violations]
    if failure is not None and failure.engine_failure:
        numbers = ["LIVE-1"]
    return checked, numbers, tally


def test_a_known_difference_does_not_fail_and_the_rest_is_judged(tmp_path):
    """With LEN-2 known the run goes on to all its traces; it is met, and nothing is stale."""
    ledger = known(tmp_path, f'invariant = "LEN-2"\nlayout = "pr9757"\n{WRONG}')
    _, failed, tally = played(Liar, ledger)
    assert (failed, tally.traces, tally.cut, ledger.holds) == (None, 30, 0, True)
    assert [d.subject for d in ledger.of_layout("pr9757")] == ["LEN-2, layout pr9757"]


def test_a_known_difference_hides_no_other(tmp_path):
    """An invariant, or a layout, that is not in the ledger fails as ever."""
    assert played(TwiceWrong, known(tmp_path, f'invariant = "LEN-2"\n{WRONG}'))[1] == ["POS-1"]
    elsewhere = known(tmp_path, f'invariant = "LEN-2"\nlayout = "balanced"\n{WRONG}')
    assert played(Liar, elsewhere)[1] == ["LEN-2"]


def test_an_entry_that_no_longer_fails_is_stale(tmp_path):
    """A right engine under a ledger: each entry that was tried is named, with its link."""
    ledger = known(
        tmp_path, f'invariant = "LEN-2"\n{WRONG}', f'invariant = "POS-2"\n{WRONG}',
        f'profile = "fork"\n{WRONG}', f'reason = "too_long"\nlayout = "balanced"\n{WRONG}',
    )  # fmt: skip
    assert played(LedgerEngine, ledger)[1] is None
    assert [d.subject for d in ledger.stale] == ["LEN-2", "fork"]
    assert not ledger.holds
    text = list(ledger.sentences())
    assert "expected failure of LEN-2 no longer fails" in text[-2]
    assert "https://example.org/issues/7" in text[-2]
    assert "known (not tried): POS-2: it is wrong" in text[0]  # the engine declares no cache


def test_a_refusal_that_is_known_ends_its_trace(tmp_path):
    """Refusals for a known wrong reason pass; what led elsewhere is not judged on."""
    ledger = known(tmp_path, f'reason = "empty_prompt"\n{WRONG}')
    _, failed, tally = played(Squeamish, ledger, examples=30)
    assert (failed, ledger.holds) == (None, True)
    assert 0 < tally.cut < tally.traces
    assert played(Squeamish, known(tmp_path, f'reason = "too_long"\n{WRONG}'))[1] == ["REF-2"]


def test_what_follows_from_a_known_difference_is_not_told_as_another(tmp_path):
    """What a wrong owner breaks at once is listed; wrong past lengths (LEN-2) only follow."""

    class LastRank(ReferenceEngine):
        """Decodes as before pull request 9757, whatever the layout says."""

        profiles = ReferenceEngine.profiles - {"cache", "attention"}

        def start(self, config, profiles):
            layout = config.layout.replace(owner="last_rank")
            return super().start(msgspec.structs.replace(config, layout=layout), profiles)

    at_once = [n for n in NUMBERS if n[:4] in ("OWN-", "BAL-", "GROW", "PAGE", "POOL", "WIN-")]
    at_once += ["LEN-1", "LEN-3"]
    entries = [f'invariant = "{number}"\n{WRONG}' for number in at_once]
    ledger = known(tmp_path, *entries, f'reason = "out_of_pages"\n{WRONG}')
    _, failed, tally = played(LastRank, ledger)
    assert failed is None
    assert tally.cut > 0
    assert "LEN-2" not in at_once


def test_what_must_not_run_is_never_played(tmp_path):
    """An engine that dies of groups and of long prompts stays alive, and is judged elsewhere."""
    never = [f'profile = "speculative"\n{NEVER}', f'reason = "too_long"\n{NEVER}']
    ledger = known(tmp_path, *never)
    checked, failed, tally = played(Fragile, ledger)
    assert (failed, ledger.holds) == (None, True)
    assert "speculative" not in checked and "fork" in checked
    assert 0 < tally.cut < tally.traces
    assert played(Fragile, known(tmp_path, never[1]))[1] == ["LIVE-1"]
    assert played(Fragile, known(tmp_path, never[0]))[1] == ["LIVE-1"]


def test_a_profile_that_is_answered_wrongly_is_checked_apart(tmp_path):
    """The others must be right without it, and it must still fail."""
    ledger = known(tmp_path, f'profile = "speculative"\n{WRONG}')
    checked, failed, _ = played(SloppyGroups, ledger)
    assert (failed, ledger.holds) == (None, True)
    assert "speculative" not in checked
    assert [d.subject for d in ledger.of_layout("pr9757")] == ["speculative"]
    both = known(tmp_path, f'profile = "lengths"\n{WRONG}')
    checked, failed, _ = played(Liar, both)
    assert (checked, failed, both.holds) == (
        {"placement", *FEATURES, *OF_GROUPS, "prefix"},
        None,
        True,
    )


def test_a_ledger_that_leaves_nothing_to_judge_does_not_hold(tmp_path):
    """Where every trace ends at its first event, the run says that nothing was checked."""

    class Refuser(LedgerEngine):
        def start(self, config, profiles):
            return Outcome(Reason.BAD_CONFIG)

    ledger = known(tmp_path, f'reason = "bad_config"\n{WRONG}')
    assert played(Refuser, ledger)[1] is None
    assert (ledger.void, ledger.holds) == (["pr9757"], False)
    assert "say that the layout must_not_run" in list(ledger.sentences())[-1]
    never = known(tmp_path, f'layout = "pr9757"\n{NEVER}')
    assert played(Refuser, never)[:2] == (frozenset(), None)


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('[[difference]]\ninvariant = "LEN-2"\nkind = "answers_wrongly"\ndoes = "x"\n',
         "difference 1, field link: Object missing required field `link`"),
        (f'[[difference]]\ninvariant = "LEN-2"\n{WRONG.replace("https://", "")}',
         "difference 1, field link: Expected `str` matching regex"),
        (f'[[difference]]\ninvariant = "LEN-9"\n{WRONG}',
         "difference 1, field invariant: field `invariant` is 'LEN-9'; it must be one of OWN-1"),
        (f'[[difference]]\nprofile = "fast"\n{WRONG}', "difference 1, field profile"),
        (f'[[difference]]\nprofile = "placement"\n{NEVER}', "cannot be placement"),
        (f'[[difference]]\nreason = "tired"\n{WRONG}', "difference 1, field reason"),
        (f'[[difference]]\ninvariant = "LEN-2"\nlayout = "x"\n{WRONG}', "field layout"),
        (f'[[difference]]\ninvariant = "LEN-2"\nprofile = "fork"\n{WRONG}', "is of one"),
        (f'[[difference]]\n{WRONG}', "only a layout that must not be run may stand alone"),
        (f'[[difference]]\ninvariant = "LEN-2"\n{NEVER}', "an invariant is not run"),
        (f'[[difference]]\ninvariant = "LIVE-1"\n{WRONG}', "what kills an engine must not be run"),
        (f'[[difference]]\ninvariant = "EQ-1"\n{WRONG}', "it is a theorem"),
        (f'[[difference]]\ninvariant = "LEN-2"\n{WRONG}\n[[difference]]\nprofile = "fork"\n'
         f'{WRONG}\nsince = 3\n', "difference 2, field since: Object contains unknown field"),
        (f'[[difference]]\ninvariant = "LEN-2"\n{WRONG.replace("answers", "speaks")}',
         "difference 1, field kind"),
        ("[[differences]]\n", "field differences: Object contains unknown field"),
        ("[[difference\n", "is not TOML"),
    ],
)  # fmt: skip
def test_a_malformed_ledger_is_named_by_file_entry_and_field(tmp_path, text, sentence):
    """Nothing of a malformed ledger counts; an entry without a link is malformed."""
    (tmp_path / "known.toml").write_text(text)
    with pytest.raises(LedgerError) as error:
        Known.read(tmp_path / "known.toml")
    assert str(tmp_path / "known.toml") in str(error.value)
    assert sentence in str(error.value)
    words = ["run", "--engine", "reference", "--known", str(tmp_path / "known.toml")]
    assert CliRunner().invoke(main, words).exit_code == 2


def test_the_command_names_known_differences_and_stale_ones(tmp_path, monkeypatch):
    """Known: status 0, named in table and summary. No longer failing: status 1 and a sentence."""
    monkeypatch.chdir(tmp_path)
    known(tmp_path, f'invariant = "LEN-2"\n{WRONG}')

    def run(engine):
        words = ["run", "--engine", engine, "--layout", "pr9757", "--examples", "10"]
        result = CliRunner().invoke(main, [*words, "--known", "known.toml", "--json", "run.jsonl"])
        return result, json.loads((tmp_path / "run.jsonl").read_text().splitlines()[-1])

    result, summary = run("suite_testing.broken:Liar")
    assert (result.exit_code, summary["verdict"]) == (0, "pass"), result.output
    assert "pass, 1 xfail" in result.output
    assert "known (still fails): LEN-2: it is wrong (https://example.org/" in result.output
    assert [d["status"] for d in summary["known_differences"]] == ["still fails"]
    result, summary = run("gpu-ledger")
    assert (result.exit_code, summary["verdict"]) == (1, "fail"), result.output
    assert "The expected failure of LEN-2 no longer fails" in result.output
    assert set(PROFILES) >= set(summary["profiles_checked"])


def test_what_must_not_run_is_not_played_before_a_trace_either(tmp_path):
    """A trace that needs an earlier one leaves out what the list forbids."""
    started = []

    class Watched(LedgerEngine):
        def start(self, config, profiles):
            started.append(layout_name(config.layout))
            return super().start(config, profiles)

    config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8)
    forbidden = Config(layout="balanced/1:C=1,T=4", pages=[3], max_len=8)
    trace = Trace(config=config, events=[], before=[Earlier(forbidden, [])])
    ledger = known(tmp_path, f'layout = "balanced"\n{NEVER}')
    for differences, names in ((Known(), ["balanced", "pr9757"]), (ledger, ["pr9757"])):
        started.clear()
        driver = LocalDriver(Watched)
        assert check_trace(driver, trace, driver.profiles, known=differences) is None
        assert started == names
