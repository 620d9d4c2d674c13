"""What is found is told with the fewest ranks, the smallest pages and the fewest events."""

from __future__ import annotations

from typing import ClassVar

import msgspec
import pytest

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines.gpu import GpuEngine
from helix_conformance.expect.recorder import record
from helix_conformance.generate.choices import Choices
from helix_conformance.generate.configs import AMPLE, draw_config
from helix_conformance.generate.traces import draw_trace
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_trace, profiles_to_check
from helix_conformance.judge.shrink import reduced
from helix_conformance.session import Failure, random_traces
from helix_mutants.on_ledger import NeedCountedOneByOne, OwnerRulesMixed
from helix_mutants.parts import Stored
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import (
    FEATURES,
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Preempt,
    Release,
    Resume,
)
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace


class Broken(ReferenceEngine):
    """Answers right, until `wrong` changes it."""

    profiles = ReferenceEngine.profiles - {"cache", "attention"}
    asked: ClassVar[tuple[str, ...]] = ("pages",)

    def apply(self, event: Event) -> Outcome:
        outcome = super().apply(event)
        return outcome if outcome.reason is not None else self.wrong(event, outcome)

    def wrong(self, event: Event, outcome: Outcome) -> Outcome:
        return outcome


class Placement(Broken):
    """Rank 1 claims every token."""

    asked = ("placement",)
    layouts = ("pr9757",)  # under others the first token may be its own

    def wrong(self, event, outcome):
        active = [True] * len(outcome.active) if self.rank == 1 else outcome.active
        return msgspec.structs.replace(outcome, active=active)


class Lengths(Broken):
    """past_len is one short from five tokens on."""

    asked = ("lengths",)

    def wrong(self, event, outcome):
        past_len = [n - (n >= 5) for n in outcome.past_len]
        return msgspec.structs.replace(outcome, past_len=past_len)


class Pages(Broken):
    """Every release loses a page."""

    def start(self, config, profiles):
        self.lost = 0
        return super().start(config, profiles)

    def wrong(self, event, outcome):
        self.lost += isinstance(event, Release)
        return outcome

    def observe(self, ids=None):
        view = super().observe(ids)
        return msgspec.structs.replace(view, free_pages=view.free_pages - self.lost)


class Cache(Stored):
    """Rank 1 writes the third token of a prompt to where the second should be."""

    asked = ("cache",)

    def prompt_positions(self, request):
        positions = super().prompt_positions(request)
        if self.rank == 1 and len(positions) >= 3:
            return [positions[0], positions[2], positions[2], *positions[3:]]
        return positions


class Attention(GpuEngine):
    """Of a batch of two, rank 1 gets the rows of the output in the wrong order."""

    asked = ("attention",)

    def apply(self, event):
        outcome = super().apply(event)
        if self.rank == 1 and outcome.output is not None and len(outcome.past_len) >= 2:
            return msgspec.structs.replace(outcome, output=outcome.output[:, ::-1])
        return outcome


class Speculative(Broken):
    """The third token of a group has no position of its own."""

    asked = ("pages", "speculative")

    def wrong(self, event, outcome):
        if not isinstance(event, Decode) or len(event.ids) > 1 or event.query_lens[0] < 3:
            return outcome
        ids = [*outcome.position_ids[:2], outcome.position_ids[1], *outcome.position_ids[3:]]
        return msgspec.structs.replace(outcome, position_ids=ids)


class Forks(Broken):
    """A fork costs the rank a page."""

    asked = ("pages", "fork")

    def start(self, config, profiles):
        self.forks = 0
        return super().start(config, profiles)

    def wrong(self, event, outcome):
        self.forks += isinstance(event, Fork)
        return outcome

    def observe(self, ids=None):
        view = super().observe(ids)
        return msgspec.structs.replace(view, free_pages=view.free_pages - self.forks)


class Preemption(Broken):
    """A resumed request is one position ahead."""

    asked = ("pages", "preempt")

    def start(self, config, profiles):
        self.resumed = set()
        return super().start(config, profiles)

    def wrong(self, event, outcome):
        if isinstance(event, Resume):
            self.resumed.add(event.id)
        steps = self.model.last_steps
        ahead = [step.id in self.resumed for step in steps for _ in step.owners]
        ids = [p + by for p, by in zip(outcome.position_ids, ahead, strict=True)]
        return msgspec.structs.replace(outcome, position_ids=ids)


class Padding(Broken):
    """Two dummies or more are counted as tokens of the first request."""

    asked = ("pages", "padding")

    def wrong(self, event, outcome):
        if not isinstance(event, Decode) or event.pad < 2:
            return outcome
        past_len = [outcome.past_len[0] + event.pad, *outcome.past_len[1:]]
        return msgspec.structs.replace(outcome, past_len=past_len)


class Overlap(Broken):
    """A step issued ahead of sampling repeats the position of the one before."""

    asked = ("pages", "overlap")

    def wrong(self, event, outcome):
        ids = list(outcome.position_ids)
        for step in self.model.last_steps:
            if self.model.requests[step.id].outstanding == 2:
                ids[0] -= 1
        return msgspec.structs.replace(outcome, position_ids=ids)


def found(engine: type) -> Failure:
    """The failure of a broken engine that random traces find."""
    driver: Driver = ThreadDriver(engine) if engine is Attention else LocalDriver(engine)
    profiles = profiles_to_check(driver.profiles, engine.asked)
    features = [feature for feature in FEATURES if feature in profiles]

    def draw(choices: Choices) -> Trace:
        config = draw_config(
            choices,
            names=getattr(engine, "layouts", LAYOUT_NAMES),
            cp_sizes=(1, 2, 3, 4),
            features=features,
            contents="cache" in profiles,
        )
        return draw_trace(choices, config, features=features)

    failure = random_traces(driver, draw, profiles, examples=400, seed=2, tally=Tally())
    driver.close()
    assert failure is not None
    return failure


@pytest.mark.parametrize(
    ("engine", "ranks", "names", "events"),
    [
        (Placement, 2, "OWN-2", [Admit(0, 1), Decode([0], [1])]),
        (Lengths, 1, "LEN-2", [Admit(0, 5), Decode([0], [1])]),
        (Pages, 1, "PAGE-3", [Admit(0, 1), Release(0)]),
        (Cache, 2, "OWN-1", None),
        (Attention, 2, "ATT-1", [Admit(0, 1), Admit(1, 1), Decode([0, 1], [1, 1])]),
        (Speculative, 1, "POS-1", [Admit(0, 1), Decode([0], [3])]),
        (Forks, 1, "PAGE-3", [Admit(0, 1), Fork(0, 1)]),
        (Preemption, 1, "POS-1", [Admit(0, 1), Preempt(0), Resume(0), Decode([0], [1])]),
        (Padding, 1, "LEN-2", [Admit(0, 1), Decode([0], [1], 2)]),
        (Overlap, 1, "POS-1", [Admit(0, 1), Decode([0], [1]), Decode([0], [1])]),
    ],
)
def test_each_profile_is_told_by_its_smallest_trace(
    engine: type, ranks: int, names: str, events: list[Event] | None
) -> None:
    """A broken engine is caught, on as few ranks and with as few events as show it."""
    failure = found(engine)
    layout = failure.trace.config.layout
    assert names in {violation.invariant for violation in failure.violations}
    assert (ranks, 1) == (layout.cp_size, layout.tokens_per_block)
    if events is not None:
        assert events == failure.trace.events


def test_ranks_that_disagree_about_room_are_told_by_what_else_they_disagree_about() -> None:
    """Where one rank alone refuses, the trace goes on with more room until a token shows why."""
    config = Config(layout="pr9757/1:C=2,T=2", pages=[1, 1], max_len=20)
    trace = Trace(config=config, events=[Admit(0, 2), Decode([0], [1])])
    driver = LocalDriver(OwnerRulesMixed)
    profiles = frozenset({"placement", "lengths", "pages"})
    refused = check_trace(driver, trace, profiles)
    assert refused is not None and refused.invariants == {"REF-1", "REF-2"}
    told = random_traces(driver, lambda _: trace, profiles, examples=1, seed=0, tally=Tally())
    assert told is not None and "OWN-2" in told.invariants
    assert told.trace.config.pages == [100, 100]


def test_a_fault_on_rank_1_needs_no_more_tokens_than_reach_it() -> None:
    """The prompt is as short as puts three tokens on rank 1."""
    [admission] = found(Cache).trace.events
    assert 5 <= admission.prompt_len <= 6


CONFIG = Config(layout="pr9757/1:C=4,T=4", pages=[7, 7, 7, 7], max_len=60)


def smallest(events: list[Event], fails) -> Trace:
    """What is left of these events while `fails` holds of them."""
    trace = Trace(config=CONFIG, events=events)
    return reduced(trace, lambda trace: trace if fails(trace) else None)


def test_what_plays_no_part_is_left_out() -> None:
    """Of many events those stay that matter, with small numbers, and ids in their order."""
    noise = [Admit(3, 9), Admit(7, 12), Decode([7, 3], [2, 3], 2), Accept(7, 1), Fork(7, 9)]
    trace = smallest(
        [*noise, Release(9), Decode([3], [1])],
        lambda trace: any(isinstance(event, Release) for event in trace.events),
    )
    assert (trace.events, str(trace.config.layout)) == ([Release(0)], "pr9757/1:C=1,T=1")


def test_decodes_become_a_longer_prompt_where_only_the_length_matters() -> None:
    """Twenty decodes are told as an admission of that many tokens."""
    trace = smallest(
        [Admit(0, 1), *[Decode([0], [1])] * 20],
        lambda trace: (
            sum(e.prompt_len for e in trace.events if isinstance(e, Admit))
            + sum(isinstance(e, Decode) for e in trace.events)
            >= 15
        ),
    )
    assert trace.events == [Admit(0, 15)]


def test_a_fork_is_told_as_an_admission_where_that_is_enough() -> None:
    """What its child does is all that matters; so the parent goes too."""

    def some_decode_is_accepted(trace: Trace) -> bool:
        return any([expected.decoded is not None for expected in record(trace)])

    trace = smallest([Admit(0, 5), Fork(0, 1), Decode([1], [1])], some_decode_is_accepted)
    assert trace.events == [Admit(0, 1), Decode([0], [1])]


def test_pools_stay_small_only_where_that_matters() -> None:
    """Ample pools are simpler than exact ones."""
    [ample] = {*smallest([Admit(0, 1)], lambda trace: bool(trace.events)).config.pages}
    [tight] = {*smallest([], lambda trace: trace.config.pages[0] < 50).config.pages}
    assert (ample, tight) == (100, 1)


def test_a_pool_that_others_fill_shrinks_with_them() -> None:
    """A batch that finds no room after a hundred admissions needs none of them."""
    config = Config(layout="pr9757/1:C=1,T=2", pages=[AMPLE + 5], max_len=60)
    admissions = [Admit(id, 2) for id in range(AMPLE + 4)]
    whole = Trace(config=config, events=[*admissions, Decode([0, 1], [1, 1])])
    driver = LocalDriver(NeedCountedOneByOne)

    def fails(trace: Trace) -> Trace | None:
        failure = check_trace(driver, trace, frozenset({"pages"}))
        return failure and failure.trace

    trace = reduced(whole, fails)
    assert trace.events == [Admit(0, 2), Admit(1, 2), Decode([0, 1], [1, 1])]
    assert trace.config.pages == [3]
