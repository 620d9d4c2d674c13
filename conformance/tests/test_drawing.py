"""The generator: what is drawn from a seed, and that Hypothesis draws the same things."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import pairwise

import msgspec
import pytest
from hypothesis import find, given, settings
from hypothesis import strategies as st

from helix_conformance import testing
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.actions import ACTIONS, FAR_IDS, Repeat, Scope, draw_action
from helix_conformance.generate.choices import Choices, Seeded
from helix_conformance.generate.configs import (
    FAR_MAX_LEN,
    draw_config,
    draw_layout,
    draw_model_shape,
)
from helix_conformance.generate.sizes import CROWDS
from helix_conformance.generate.strategies import drawn
from helix_conformance.generate.traces import TILES, deep_trace, draw_merge_trace, draw_trace
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import profiles_to_check
from helix_conformance.session import layout_traces, random_traces
from helix_spec.capabilities import UNLIMITED
from helix_spec.config import Config, config_problem, decode_layout
from helix_spec.engine import Outcome
from helix_spec.events import FEATURES, PREFIX, Admit, Decode, Event, Fork, features_of
from helix_spec.layouts import layout_problem
from helix_spec.trace import Trace, dump_trace

PROFILES = profiles_to_check(LedgerEngine.profiles, [])


def draw(choices: Choices) -> Trace:
    """A trace of any layout, of which no contents are looked at."""
    return draw_trace(choices, draw_config(choices, contents=False), contents=False)


def traces(seed: int, number: int = 30) -> list[Trace]:
    """The traces that a run of this seed plays."""
    return [draw(Seeded(f"{seed} {n}")) for n in range(number)]


def parsed(text: bytes) -> Trace:
    """The trace in a file of this text."""
    return msgspec.json.decode(text, type=Trace, dec_hook=decode_layout)


MANY = traces(0, 400)


def played(seed: int, examples: int) -> list[Trace]:
    """The traces that a run asks for."""
    kept = list[Trace]()

    def keeping(choices: Choices) -> Trace:
        kept.append(draw(choices))
        return kept[-1]

    driver, tally = LocalDriver(LedgerEngine), Tally()
    failure = random_traces(driver, keeping, PROFILES, examples=examples, seed=seed, tally=tally)
    assert (failure, tally.traces) == (None, examples)
    return kept


def test_a_seed_gives_the_same_traces_again() -> None:
    """Nothing but the seed decides, and another seed gives others."""
    assert played(3, 10) == traces(3, 10)
    assert traces(3) != traces(4)


def test_a_seed_gives_the_same_traces_anywhere() -> None:
    """Neither the process nor the hashes of texts decide, nor a version of Python."""
    code = (
        "from helix_conformance.generate.choices import Seeded;"
        "from helix_conformance.generate.configs import draw_config;"
        "from helix_conformance.generate.traces import draw_trace;"
        "from helix_spec.trace import dump_trace; import sys;"
        "choices = Seeded('3 0');"
        "config = draw_config(choices, contents=False);"
        "sys.stdout.buffer.write(dump_trace(draw_trace(choices, config, contents=False)))"
    )
    environment = os.environ | {"PYTHONHASHSEED": "77"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True)
    assert done.stdout == dump_trace(traces(3, 1)[0]), done.stderr


def test_each_trace_is_drawn_for_itself() -> None:
    """Trace n is the same however many come before it, and no variation of any of them."""
    assert played(0, 20)[:5] == played(0, 5)
    layouts = [(str(trace.config.layout), str(trace.config.pages)) for trace in traces(0)]
    assert len(set(layouts)) >= 25


def test_a_run_that_an_engine_ends_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    """Its first failure ends it, and no advice is printed."""

    class Raises(LedgerEngine):
        def apply(self, event: Event) -> Outcome:
            raise RuntimeError("lost")

    driver, tally = LocalDriver(Raises), Tally()
    driver.survives_failure = False
    failure = random_traces(driver, draw, PROFILES, examples=30, seed=0, tally=tally)
    assert failure is not None
    assert (failure.verdict, capsys.readouterr()) == ("error", ("", ""))
    assert tally.needed is not None
    assert tally.needed.traces == tally.traces


def test_a_failure_that_does_not_repeat_says_so() -> None:
    """The trace is played again at once; when that passes, it is told whole with a note."""

    class Once(LedgerEngine):
        lies = 1

        def apply(self, event: Event) -> Outcome:
            outcome = super().apply(event)
            if outcome.past_len and Once.lies:
                Once.lies -= 1
                outcome.past_len[0] += 1
            return outcome

    failure = random_traces(LocalDriver(Once), draw, PROFILES, examples=30, seed=0, tally=Tally())
    assert failure is not None
    assert failure.trace.note == (
        "This failure did not repeat when the same trace was played again."
    )


def test_every_kind_of_action_is_drawn_and_means_events() -> None:
    """Each kind occurs, and in some state it means something."""
    scope, kinds = Scope(frozenset({*FEATURES, PREFIX})), set()
    for seed in range(40):
        choices = Seeded(f"actions {seed}")
        recorder, told = Recorder(draw_config(choices, contents=False)), list[Event]()
        for _ in range(30):
            action = draw_action(choices, scope)
            for event in action.events(recorder, told):
                kinds.add(type(action))
                told.append(event)
                recorder.next(event)
    assert kinds == set(ACTIONS)


@pytest.mark.parametrize("kind", ACTIONS)
def test_hypothesis_draws_every_kind_of_action(kind: type) -> None:
    """The same classes, with the same bounds."""
    found = find(
        testing.actions(features=[*FEATURES, PREFIX]),
        lambda action: type(action) is kind,
        settings=settings(max_examples=2000, database=None, derandomize=True),
    )
    assert type(found) is kind


def test_an_action_needs_no_feature_that_is_not_declared() -> None:
    """But a wrong one may, of those that are named."""
    bare = Scope(frozenset())
    kinds = {kind.__name__ for kind in bare.kinds}
    assert kinds == {
        "Admit",
        "Decode",
        "Release",
        "Skip",
        "Repeat",
        "Fill",
        "Late",
        "Stray",
        "Wrong",
    }
    for n in range(60):
        choices = Seeded(f"bare {n}")
        config = draw_config(choices, features=())
        trace = draw_trace(choices, config, features=())
        needed = [features_of(event) for event in trace.events]
        assert all(needs <= {"overlap", "speculative"} for needs in needed), "wrong events alone"


def test_traces_go_where_engines_have_failed() -> None:
    """Far ids, a crowd, tiles of kernels, long groups and requests, events repeated, bad starts."""
    events = [event for trace in MANY for event in trace.events]
    admissions = [event for event in events if isinstance(event, Admit)]
    assert len({type(event) for event in events}) == 9
    assert all(any(event.id >= far for event in admissions) for far in FAR_IDS)
    assert any(event.child >= FAR_IDS[0] for event in events if isinstance(event, Fork))
    ones = [sum(e == Admit(e.id, 1) for e in t.events if isinstance(e, Admit)) for t in MANY]
    assert any(count >= min(CROWDS) for count in ones)
    tiles = {c * tile for tile in TILES for c in (1, 2, 3, 4, 8)}
    assert len(tiles & {event.prompt_len for event in admissions}) >= 10
    decodes = [event for event in events if isinstance(event, Decode)]
    assert any(length > 100 for event in decodes for length in event.query_lens)
    assert any(event.pad == 33 for event in decodes)
    assert any(event == before for t in MANY for before, event in pairwise(t.events))
    assert any(trace.config.max_len == FAR_MAX_LEN for trace in MANY)
    refused = [trace for trace in MANY if config_problem(trace.config) is not None]
    assert 20 <= len(refused) <= 60
    assert not any(trace.events for trace in refused)
    assert {trace.config.layout.cp_size for trace in MANY} == {1, 2, 3, 4, 8}


def test_a_repeat_is_the_event_before() -> None:
    """Of nothing there is no repetition."""
    recorder = Recorder(Config(layout="pr9757/1:C=1,T=2", pages=[2], max_len=20))
    assert Repeat().events(recorder, []) == []
    assert Repeat().events(recorder, [Admit(0, 1), Decode([0], [1])]) == [Decode([0], [1])]


@settings(max_examples=50)
@given(testing.traces(configs=testing.configs(cp_sizes=(1, 2, 3), tp_sizes=(1, 2))))
def test_hypothesis_draws_valid_traces(trace: Trace) -> None:
    """They can be written and read; their configurations are legal, or without events."""
    assert parsed(dump_trace(trace)) == trace
    assert config_problem(trace.config) is None or trace.events == []


@settings(max_examples=50)
@given(
    testing.layouts(names=["custom"], block_sizes=(4,)),
    testing.illegal_configs(configs=testing.configs()),
    testing.merge_traces(configs=testing.configs(), max_merges=2),
    testing.model_shapes(cp_size=3, tp_size=2, max_layers=1),
)
def test_hypothesis_draws_what_it_is_asked_for(layout, illegal, merges, shape) -> None:
    """Bounds hold, what is to be illegal is, and merges are all there is."""
    assert (layout.tokens_per_block, layout_problem(layout)) == (4, None)
    assert config_problem(illegal) is not None
    assert 1 <= len(merges.events) <= 6
    assert (shape.layers, shape.q_heads % 6) == (1, 0)


@settings(max_examples=20)
@given(st.data())
def test_a_run_and_hypothesis_draw_by_the_same_function(data) -> None:
    """What `layout_traces` returns is drawn by either."""
    function = layout_traces(LocalDriver(LedgerEngine), "pr17866", PROFILES, cp_sizes=[2])
    for trace in (data.draw(drawn(function)), function(Seeded("0 0"))):
        assert trace.config.layout.cp_size == 2


def test_the_simplest_comes_first() -> None:
    """Hypothesis shrinks to one short prompt on one rank, in an ample pool."""
    trace = find(
        testing.traces(configs=testing.configs(contents=False), max_actions=4),
        lambda trace: bool(trace.events),
        settings=settings(database=None, derandomize=True),
    )
    assert trace.events == [Admit(0, 1)]
    assert (str(trace.config.layout), trace.config.pages) == ("before_9757/1:C=1,T=1", [100])


def test_impossible_bounds_raise() -> None:
    """They name what is wrong."""
    with pytest.raises(ValueError, match="no layout named 'none'"):
        draw_layout(Seeded(""), names=["none"])
    with pytest.raises(ValueError, match="fits 2 ranks"):
        draw_config(Seeded(""), cp_sizes=[4], max_world=2)


def test_draws_without_hypothesis_are_as_valid() -> None:
    """Random draws of every function: legal layouts, shapes, configurations and merges."""
    for n in range(200):
        choices = Seeded(f"valid {n}")
        config = draw_config(choices, tp_sizes=(1, 2, 3))
        assert config_problem(config) is None
        assert layout_problem(draw_layout(choices)) is None
        assert draw_model_shape(choices, cp_size=8).q_heads % 8 == 0
        assert parsed(dump_trace(draw_merge_trace(choices, config))).events
    assert {draw_layout(Seeded(str(n))).cp_size for n in range(100)} == {1, 2, 3, 4, 8}


def test_a_deep_trace_is_accepted_and_has_a_thousand_keys_on_each_rank():
    """Whatever the layout; with few steps, and a model so narrow that it costs little."""
    for n in range(20):
        choices = Seeded(f"deep {n}")
        config = draw_config(choices, cp_sizes=(1, 2, 3), tp_sizes=(1, 2))
        trace = deep_trace(choices, config, UNLIMITED)
        recorder = Recorder(trace.config)
        assert [recorder.next(event).refused for event in trace.events] == [None] * len(
            trace.events
        )
        lengths = recorder.state.lengths(0)
        assert sum(lengths) >= 1023 * len(lengths)
