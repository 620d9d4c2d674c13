"""Cache groups under the suite: what is drawn, judged, sent and made small."""

import msgspec
import numpy as np
import pytest

from helix_conformance.drive.asking import MalformedAnswer
from helix_conformance.drive.driver import Answer
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.messages import (
    GroupColumns,
    GroupView,
    Outcome,
    View,
    spec_outcome,
    spec_view,
)
from helix_conformance.drive.process import StdioDriver
from helix_conformance.engines import load_engine
from helix_conformance.expect.arrays import (
    KeptRows,
    Layers,
    Seen,
    rotated_queries,
    token_columns,
    union_attention,
)
from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.configs import draw_config, draw_illegal_config
from helix_conformance.generate.groups import with_groups
from helix_conformance.generate.traces import draw_trace
from helix_conformance.judge.coverage import Coverage, Tally
from helix_conformance.judge.judge import Judge
from helix_conformance.judge.play import Player
from helix_conformance.report.html import show_page
from helix_conformance.report.text import trace_text
from helix_conformance.session import random_traces
from helix_reference.attention import Token, error_bound, key, query, value
from helix_spec.capabilities import UNLIMITED, Box, Span, outside
from helix_spec.config import CacheGroup, Config, ModelShape, config_problem
from helix_spec.engine import PROFILES, RankView
from helix_spec.engine import Outcome as Accepted
from helix_spec.events import Admit, Decode
from helix_spec.trace import Trace

SMALL = Box(head_dim=[16], q_heads=Span(max=8), layers=Span(max=2), max_len=[24, 9])
ALL = CacheGroup(name="all", layers=[0])
NEAR = CacheGroup(name="near", layers=[0], placement="replicated", window=3)


def drawn(seed: int, box: Box = SMALL, cp_sizes: tuple[int, ...] = (1, 2, 3)) -> Config:
    """A configuration that may have cache groups."""
    choices = Seeded(f"groups {seed}")
    plain = draw_config(choices, cp_sizes=cp_sizes, box=box)
    return with_groups(choices, plain, PROFILES, box)


def test_configurations_with_groups_are_legal_and_spoiled_ones_are_not():
    """Of hundreds, both kinds, placements, pools and shared layers are among them."""
    configs = [one for seed in range(200) if (one := drawn(seed)).groups]
    assert [config_problem(config) for config in configs] == [None] * len(configs)
    placements = {group.placement for config in configs for group in config.groups}
    assert placements == {"sharded", "replicated"}
    assert any(config.pools for config in configs)
    assert any(len(config.groups) == 3 for config in configs)
    assert {group.window for config in configs for group in config.groups} > {None, 1, 2, 3}
    for seed, config in enumerate(configs[:60]):
        assert config_problem(draw_illegal_config(Seeded(f"{seed}"), config)) is not None


@pytest.mark.parametrize(
    "box",
    [
        Box(groups=[0]),
        Box(groups=[0, 1]),
        Box(placements=["sharded"]),
        Box(window=Span(max=4)),
        Box(tokens_per_block=[4]),
    ],
)
def test_groups_are_drawn_inside_capabilities_alone(box):
    """None is outside of the box; where it allows groups, some are drawn."""
    configs = [drawn(seed, box) for seed in range(40)]
    assert [outside(box, config) for config in configs] == [[]] * len(configs)
    assert any(config.groups for config in configs) == (box.groups != [0])


def test_the_reference_passes_traces_with_groups():
    """Its own recorder and the judge agree on columns, states, rows and outputs."""
    driver, tally, coverage = LocalDriver(load_engine("reference")), Tally(), Coverage()
    player = Player(driver, frozenset(PROFILES), tally)
    played = 0
    for seed in range(15):
        config = drawn(seed)
        if config.groups:
            trace = draw_trace(Seeded(f"{seed}"), config, contents=True, max_actions=4)
            failure = player.judged(trace, coverage=coverage)
            assert failure is None, failure
            played += len(trace.events)
    assert played > 60
    assert coverage.counts["page behind a window returned"] > 0
    assert coverage.counts["a layer that reads a sharded and a replicated group"] > 0


@pytest.mark.holds("ATT-1", "ATT-4")
def test_outputs_over_several_groups_are_those_of_the_reference():
    """The union of a full sharded and a window replicated group: output and bound, head by head."""
    shape = ModelShape(layers=1, q_heads=4, kv_heads=2, dtype="bfloat16")
    config = Config(
        layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=30, model=shape, groups=[ALL, NEAR]
    )
    tokens = [(0, place) for place in range(7)]
    columns = token_columns([(*token, place) for place, token in enumerate(tokens)])
    seen, holders = [], [np.array([0, 0, 1, 1, 0, 0, 1]), np.full(7, 2)]
    for number, group in enumerate(config.groups):
        kept = KeptRows(config.alone(group), Layers([0], number)).of(0, tokens)
        seen.append(Seen(group.layers, kept, holders[number], group.window))
    queries = rotated_queries(shape, 0, columns, range(4)).between(6, 7)
    output, bound = union_attention(config, queries, seen)
    named = [Token(*token, place) for place, token in enumerate(tokens)]
    rows = [(0, token, int(holders[0][token.position])) for token in named]
    rows += [(1, token, 2) for token in named[-3:]]
    for head in range(4):
        right = error_bound(
            shape,
            query(shape, 0, named[-1], 0, head),
            [key(shape, 0, token, 0, head // 2, group) for group, token, _ in rows],
            [value(shape, 0, token, 0, head // 2, group) for group, token, _ in rows],
            [rank for _, _, rank in rows],
        )
        np.testing.assert_allclose(output[0, head], right[0], rtol=1e-12)
        np.testing.assert_allclose(bound[0, head], right[1], rtol=1e-9)


def test_an_engine_in_another_process_answers_with_groups():
    """Columns, tables and rows of each group travel and are judged right."""
    config = Config(
        layout="pr17866/1:C=2,T=2",
        pages=[6, 6],
        max_len=30,
        groups=[ALL, msgspec.structs.replace(NEAR, pool="second")],
        pools={"second": [5, 5]},
    )
    trace = draw_trace(Seeded("7"), config, contents=True, max_actions=3)
    driver = StdioDriver("reference")
    try:
        assert Player(driver, frozenset(PROFILES), Tally()).judged(trace) is None
    finally:
        driver.close()


def test_what_a_group_lacks_is_named():
    """Of columns and of a view: the group and the field."""
    columns = Outcome(2, position_ids=[3], groups={"near": GroupColumns(slots=[4])})
    with pytest.raises(MalformedAnswer, match="of cache group near lacks active"):
        spec_outcome(columns, Decode([0], [1]), {"placement"})
    view = View(2, groups={"near": GroupView(local_len={0: 3})})
    with pytest.raises(MalformedAnswer, match="of cache group near lacks block_tables"):
        spec_view(View(2, free_pages=1, groups=view.groups), None, {"lengths", "pages"})


def test_an_answer_without_a_group_is_malformed():
    """It is said which."""
    config = Config(layout="pr9757/1:C=1,T=2", pages=[6], max_len=9, groups=[ALL, NEAR])
    recorder, judge = Recorder(config), Judge(config, frozenset({"placement", "lengths"}))
    expected = recorder.next(Admit(0, 3))
    with pytest.raises(MalformedAnswer, match="lacks the cache group 'all'"):
        judge.event(expected, [Answer(Accepted(), RankView({}))])


def test_a_failure_is_reduced_to_the_group_that_fails():
    """Of three groups and two pools one is left, with few events."""
    driver = LocalDriver(load_engine("helix_mutants.on_groups:WindowOneWider"))
    profiles = frozenset({"placement", "lengths", "pages", "groups", "window"})

    def draw(choices):
        config = with_groups(choices, draw_config(choices, contents=False), profiles, UNLIMITED)
        return draw_trace(choices, config, features=[], contents=False)

    failure = random_traces(driver, draw, profiles, examples=50, seed=1, tally=Tally())
    assert failure is not None and "WIN-1" in failure.invariants
    assert len(failure.trace.config.groups) == 1
    assert len(failure.trace.events) <= 3
    assert "cache group" in failure.violations[0].message


def test_a_trace_is_shown_group_by_group():
    """As text and as a page, with pages that went back behind a window."""
    config = Config(layout="pr17866/1:C=2,T=2", pages=[9, 9], max_len=30, groups=[NEAR, ALL])
    trace = Trace(config=config, events=[Admit(0, 5), Decode([0], [2])])
    lines = list(trace_text(trace))
    assert "cache group near: layers [0], replicated, window 3" in lines
    assert "request 0 in near, on rank 1: 7 tokens, prompt of 5, 2 decoded" in lines
    assert any("0-1 (gone) | 2-3 (gone) | 4-5 (page" in line for line in lines)
    page = show_page(trace, "two groups")
    assert page.count("<h2>Cache group") == 3
    assert "went back behind the window" in page
