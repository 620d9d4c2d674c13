"""Coverage: what a run visited, and what it missed."""

from __future__ import annotations

import json

import msgspec
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.generate.choices import Choices
from helix_conformance.generate.configs import draw_config
from helix_conformance.generate.groups import GROUPED, with_groups
from helix_conformance.generate.traces import draw_trace
from helix_conformance.judge.coverage import ALL_NEEDS, SITUATIONS, Coverage, Tally, at_hand
from helix_conformance.judge.play import check_trace, profiles_to_check
from helix_conformance.session import layout_traces, random_traces
from helix_reference.engine import ReferenceEngine
from helix_spec.capabilities import UNLIMITED, Box, Span
from helix_spec.config import Config, config_problem
from helix_spec.engine import OF_GROUPS, Outcome
from helix_spec.events import (
    FEATURES,
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Preempt,
    Reason,
    Release,
    Resume,
    Skip,
    features_of,
)
from helix_spec.trace import Trace

PROFILES = profiles_to_check(ReferenceEngine.profiles, ["pages", *FEATURES, *OF_GROUPS])


def visited(events, *, layout="pr9757/1:C=2,T=2", pages=9, overlap=False) -> set[str]:
    """The situations that one trace visits."""
    config = Config(layout=layout, pages=[pages, pages], max_len=8, overlap=overlap)
    coverage = Coverage()
    trace = Trace(config=config, events=events)
    assert check_trace(LocalDriver(ReferenceEngine), trace, PROFILES, coverage=coverage) is None
    return {name for name, count in coverage.counts.items() if count}


def lesser(declared: frozenset[str]) -> type[ReferenceEngine]:
    """The reference, declaring these profiles alone."""

    class Lesser(ReferenceEngine):
        profiles = declared

        def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
            if config_problem(config) is not None:
                return super().start(config, profiles)
            pages = config.pages if "pages" in declared else [2**31 - 1] * len(config.pages)
            return super().start(msgspec.structs.replace(config, pages=pages), profiles)

        def apply(self, event: Event) -> Outcome:
            if features_of(event) <= declared:
                return super().apply(event)
            self.model.events_seen, self.model.last_steps = self.model.events_seen + 1, []
            return Outcome(Reason.UNSUPPORTED)

    return Lesser


def test_random_traces_visit_every_situation() -> None:
    """Three hundred traces of all layouts have been everywhere that matters."""
    coverage, driver = Coverage(), LocalDriver(ReferenceEngine)

    def draw(choices: Choices) -> Trace:
        config = draw_config(choices, contents=False)
        if choices.one_in(GROUPED):
            config = with_groups(choices, config, PROFILES, UNLIMITED)
        return draw_trace(choices, config, contents=False)

    failure = random_traces(
        driver, draw, PROFILES, examples=300, seed=1, tally=Tally(), coverage=coverage
    )
    assert (failure, coverage.missed) == (None, [])


def test_a_run_that_misses_a_situation_says_so() -> None:
    """Nothing is visited by nothing; what a run cannot meet is not missed, and told apart."""
    assert (Coverage().missed, Coverage().impossible) == (list(SITUATIONS), {})
    bare = Coverage(at_hand(["placement"], layouts=["before_9757"], cp_sizes=[4]))
    assert set(bare.missed) >= {"empty rank", "page boundary", "refused: bad_count"}
    assert bare.impossible["copy on write"] == "profile fork"
    assert bare.impossible["ownership wrap"] == "a layout whose ranks take turns"
    assert bare.impossible["refused: out_of_pages"] == "profile pages"
    one = Coverage(at_hand(PROFILES, layouts=["pr9757"], cp_sizes=[1]))
    assert one.impossible["empty rank"] == "a cp_size of 2 or more"
    assert not set(bare.missed) & set(bare.impossible)
    assert at_hand(PROFILES, layouts=["custom"], cp_sizes=[2]) == ALL_NEEDS


def test_what_is_said_to_be_impossible_does_not_occur() -> None:
    """Runs of fewer profiles, layouts and ranks visit nothing that they are said to lack."""
    for name, cp_sizes, profiles in (
        ("before_9757", [1, 2, 4], ["placement", "pages"]),
        ("pr9757", [1], ["placement", "pages", *FEATURES]),
        ("vllm_dcp", [1, 2, 3], ["placement", "padding", "overlap"]),
    ):
        checked = frozenset(profiles)
        driver = LocalDriver(lesser(checked))
        needs = at_hand(checked, layouts=[name], cp_sizes=cp_sizes)
        coverage = Coverage(needs)
        draw = layout_traces(driver, name, checked, cp_sizes=cp_sizes)
        assert (
            random_traces(
                driver, draw, checked, examples=60, seed=2, tally=Tally(), coverage=coverage
            )
            is None
        )
        lacking = [s for s, takes in SITUATIONS.items() if not needs.issuperset(takes)]
        assert lacking
        assert [situation for situation in lacking if coverage.counts[situation]] == []


def test_each_situation_is_known_when_it_occurs() -> None:
    """Short traces that are in one situation and not in its neighbours."""
    assert "empty rank" in visited([Admit(0, 1), Decode([0], [1])])
    assert "empty rank" not in visited([Admit(0, 3), Decode([0], [1])])
    assert "page boundary" in visited([Admit(0, 2), Decode([0], [1])])
    assert "page boundary" not in visited([Admit(0, 1), Decode([0], [1])])
    assert "ownership wrap" in visited([Admit(0, 1), *[Decode([0], [1])] * 5])
    assert "ownership wrap" not in visited([Admit(0, 1), *[Decode([0], [1])] * 4])
    owners, pages = "ownership boundary inside a group", "page boundary inside a group"
    assert owners in visited([Admit(0, 1), Decode([0], [3])])
    assert owners not in visited([Admit(0, 1), Decode([0], [2])])
    assert pages in visited([Admit(0, 1), Decode([0], [2])])
    assert pages not in visited([Admit(0, 2), Decode([0], [2])])
    whole = "group longer than a super-block"
    assert whole in visited([Admit(0, 1), Decode([0], [5])])
    assert whole not in visited([Admit(0, 1), Decode([0], [4])])
    again = "accepted, then told again and refused"
    assert again in visited([Admit(0, 1), Admit(0, 1)])
    assert again not in visited([Admit(0, 1), Admit(0, 2)])
    assert again not in visited([Admit(0, 0), Admit(0, 0)])
    rewound = "rewind over a boundary"
    assert rewound in visited([Admit(0, 1), Decode([0], [3]), Accept(0, 1)])
    assert rewound not in visited([Admit(0, 1), Decode([0], [3]), Accept(0, 3)])
    assert "skip, then decode" in visited([Admit(0, 1), Skip([0], [1]), Decode([0], [1])])
    assert "copy on write" in visited([Admit(0, 1), Fork(0, 1), Decode([0], [1])])
    assert "copy on write" not in visited([Admit(0, 2), Fork(0, 1), Decode([0], [1])])
    assert "released page used again" in visited([Admit(0, 1), Release(0), Admit(1, 1)])
    assert "id admitted again" in visited([Admit(0, 1), Release(0), Admit(0, 1)])
    assert "resumed" in visited([Admit(0, 1), Preempt(0), Resume(0)])
    assert "max_len reached" in visited([Admit(0, 7), Decode([0], [1])])
    full = [Admit(0, 3), Admit(1, 1), Release(0), Admit(1, 1), Admit(1, 1)]
    assert "refused: duplicate_request" in visited(full)
    retried = [Admit(0, 2), Admit(1, 1), Release(0), Admit(1, 1)]
    assert visited(retried, pages=1) >= {"refusal, then retry", "one pool exhausted alone"}
    assert "two decodes outstanding" in visited(
        [Admit(0, 1), Decode([0], [1]), Decode([0], [1])], overlap=True
    )


def test_the_terminal_names_what_was_missed(tmp_path, monkeypatch) -> None:
    """After a green run of few traces: counts, what was missed, and what it would have taken."""
    monkeypatch.chdir(tmp_path)
    words = "run --engine gpu-ledger --layout before_9757 --cp 1 --examples 3 --json run.jsonl"
    result = CliRunner().invoke(main, [*words.split(), "--coverage"])
    assert result.exit_code == 0, result.output
    (missed,) = [line for line in result.output.splitlines() if line.startswith("Missed by")]
    (summary,) = [json.loads(x) for x in (tmp_path / "run.jsonl").read_text().splitlines()[-1:]]
    assert summary["missed"] and all(name in missed for name in summary["missed"])
    assert "empty rank" not in missed
    assert "Impossible there without a cp_size of 2 or more" in result.output
    assert "This is a part of a run, not a whole one. Only 1 of 7" in result.output
    assert set(summary["coverage"]) == set(SITUATIONS)
    visited = [name for name, count in summary["coverage"].items() if count]
    assert visited and not set(visited) & set(summary["missed"])


def test_an_engine_of_merges_alone_can_reach_none_of_the_situations():
    """It is sent no request: what it does not visit is impossible, and not missed."""
    coverage = Coverage(at_hand(["merge"], layouts=["pr9757"], cp_sizes=[2]))
    assert coverage.missed == []
    assert set(coverage.impossible) == set(SITUATIONS)


def test_capabilities_can_rule_a_situation_out():
    """Groups of at most four tokens fill no super-block of pages of 64."""
    few = [Box(query_len=Span(max=4), tokens_per_block=[64])]
    coverage = Coverage(at_hand(PROFILES, layouts=["pr9757"], cp_sizes=[2], boxes=few))
    assert list(coverage.impossible) == ["group longer than a super-block"]
