"""For each invariant a hand-made wrong answer: the judge names what fails, and nothing else."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import msgspec
import numpy as np
import pytest

from helix_conformance.drive.driver import Answer
from helix_conformance.expect.recorder import Recorder
from helix_conformance.judge.judge import Judge
from helix_reference.attention import Token, key, raw, rope
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config, ModelShape
from helix_spec.events import Admit, Decode, Event, Fork, Reason, Release, Skip
from helix_spec.invariants import NUMBERS

PROFILES = ReferenceEngine.profiles
ONE = [Admit(0, 3), Decode([0], [1])]
TWO = [Admit(0, 3), Admit(1, 3), Decode([0], [1], 1)]
BLIND = {"EQ-1", "ATT-2", "LIVE-1"}
"""Numbers that no answer can break: a theorem, what needs a repetition, what gives no answer."""


def config(layout: str, *, pages: int = 9, tp_size: int = 1) -> Config:
    """Two ranks or four, with two query heads for each rank."""
    cp_size = int(layout.partition("C=")[2][0])
    model = ModelShape(q_heads=4 * cp_size * tp_size, kv_heads=2 * tp_size, head_dim=4)
    return Config(layout=layout, pages=[pages] * cp_size, max_len=50, model=model, tp_size=tp_size)


def right_answers(config: Config, events: list[Event]) -> list[list[Answer]]:
    """What every rank answers to each event, arrays as arrays."""
    ranks = [ReferenceEngine(rank) for rank in range(config.world_size)]
    for rank in ranks:
        rank.start(config, PROFILES)
    return [
        [Answer(_with_arrays(rank.apply(event)), _with_arrays(rank.observe())) for rank in ranks]
        for event in events
    ]


def _with_arrays(told: Any) -> Any:
    changes = {}
    for name in ("keys", "values"):
        if getattr(told, name, None):
            changes[name] = {id: np.array(rows) for id, rows in getattr(told, name).items()}
    if getattr(told, "output", None) is not None:
        changes["output"] = np.array(told.output)
    return msgspec.structs.replace(told, **changes)


@dataclass
class Change:
    """A wrong answer: what is changed in one rank's answer to the last event."""

    rank: int
    outcome: Callable[[dict[str, Any]], Any] = lambda fields: None
    view: Callable[[dict[str, Any]], Any] = lambda fields: None

    def applied(self, answer: Answer) -> Answer:
        """The answer with the change."""
        outcome, view = (
            copy.deepcopy(msgspec.structs.asdict(part)) for part in (answer.outcome, answer.view)
        )
        self.outcome(outcome)
        self.view(view)
        return Answer(
            type(answer.outcome)(**outcome),
            type(answer.view)(**view),
        )


def put(name: str, *where: Any, to: Any) -> Callable[[dict[str, Any]], None]:
    """Sets one entry of a field; `to` may be a function of what it was."""

    def change(fields: dict[str, Any]) -> None:
        target, path = fields, (name, *where)
        for step in path[:-1]:
            target = target[step]
        target[path[-1]] = to(target[path[-1]]) if callable(to) else to

    return change


def both(*changes: Callable[[dict[str, Any]], Any]) -> Callable[[dict[str, Any]], None]:
    """Several changes."""

    def change(fields: dict[str, Any]) -> None:
        for one in changes:
            one(fields)

    return change


def _another_key(keys: Any) -> Any:
    """The key of the first token, rotated as if it stood one position further on."""
    shape = ModelShape(q_heads=8, kv_heads=2, head_dim=4)
    moved = keys.copy()
    x = raw(0, Token(0, 0, 0), 0, "k", 0, 4)
    assert np.allclose(keys[0, 0, 0], key(shape, 0, Token(0, 0, 0), 0, 0).stored)
    moved[0, 0, 0] = rope(x, 1, shape.rope_base, "float32").stored
    return moved


def _more(value: Any) -> Any:
    return value + 1


STEP, ROTATED, LOCKSTEP = "pr9757/1:C=2,T=2", "balanced/1:C=2,T=2", "pr17866/1:C=2,T=2"

CASES: dict[str, tuple[Config, list[Event], list[Change], set[str]]] = {
    # pr9757, L=3: positions 0 1 on rank 0, 2 on rank 1; the token decoded is rank 0's.
    "OWN-1: a cached row is another": (
        config(STEP), ONE, [Change(0, view=put("values", 0, 0, 1, 0, 0, to=_more))], {"OWN-1"},
    ),
    "OWN-1: a row is missing": (
        config(STEP), ONE,
        [Change(0, view=put("values", 0, to=lambda rows: rows[:, :2]))], {"OWN-1"},
    ),
    "OWN-1: nobody writes": (
        config(STEP), ONE, [Change(0, put("slots", 0, to=-1))], {"OWN-1"},
    ),
    "OWN-2: two ranks claim a token": (
        config(STEP), ONE, [Change(1, put("active", 0, to=True))], {"OWN-2", "OWN-3"},
    ),
    "OWN-3: the other rank takes it": (
        config(STEP), ONE,
        [
            Change(0, both(put("active", 0, to=False), put("slots", 0, to=-1))),
            Change(1, both(put("active", 0, to=True), put("slots", 0, to=9))),
        ],
        {"OWN-3"},
    ),
    "LEN-1: one token too many": (
        config(STEP), ONE, [Change(1, view=put("local_len", 0, to=_more))], {"LEN-1"},
    ),
    "LEN-1: a live request is not known": (
        config(STEP), [Admit(0, 3)],
        [Change(1, view=both(put("local_len", to={}), put("block_tables", to={})))],
        {"LEN-1", "PAGE-3"},
    ),
    "LEN-2: past_len counts the new token": (
        config(STEP), ONE, [Change(0, put("past_len", 0, to=_more))], {"LEN-2"},
    ),
    "LEN-3: an inactive rank sees the new token": (
        config(STEP), ONE, [Change(1, put("visible", 0, to=_more))], {"LEN-3"},
    ),
    "POS-1: a position twice": (
        config(STEP), ONE, [Change(1, put("position_ids", 0, to=2))], {"POS-1"},
    ),
    "POS-2: a key rotated elsewhere": (
        config(STEP), ONE, [Change(0, view=put("keys", 0, to=_another_key))], {"POS-2"},
    ),
    "BAL-1: all on one rank": (
        config(STEP), [Admit(0, 20)],
        [Change(0, view=put("local_len", 0, to=20)), Change(1, view=put("local_len", 0, to=0))],
        {"LEN-1", "BAL-1"},
    ),
    "BAL-2: every decoded token on one rank": (
        config("pr9757/1:C=2,T=1"), [Admit(0, 2), Decode([0], [1]), Decode([0], [1])],
        [
            Change(0, both(put("active", 0, to=True), put("slots", 0, to=2))),
            Change(1, both(put("active", 0, to=False), put("slots", 0, to=-1))),
        ],
        {"OWN-3", "BAL-2"},
    ),
    "BAL-3: the start is not rotated": (
        config(ROTATED), [Admit(0, 2), Admit(1, 2)],
        [Change(0, view=put("local_len", 1, to=2)), Change(1, view=put("local_len", 1, to=0))],
        {"LEN-1", "BAL-3"},
    ),
    "GROW-1: a page moves": (
        config(STEP), [Admit(0, 3), Skip([0], [1])],
        [Change(0, view=put("block_tables", 0, 0, to=4))], {"GROW-1"},
    ),
    "PAGE-1: a page outside the pool": (
        config(STEP), [Admit(0, 3)], [Change(0, view=put("block_tables", 0, 0, to=9))], {"PAGE-1"},
    ),
    "PAGE-1: a page too many": (
        config(STEP), [Admit(0, 3)],
        [Change(0, view=put("block_tables", 0, to=lambda table: [*table, 4]))],
        {"PAGE-1", "PAGE-3"},
    ),
    "PAGE-1: a table of a request that is not live": (
        config(STEP), [Admit(0, 3)], [Change(0, view=put("block_tables", 9, to=[8]))], {"PAGE-1"},
    ),
    "PAGE-2: a page in two tables": (
        config(STEP), [Admit(0, 3), Admit(1, 3)],
        [Change(0, view=put("block_tables", 1, 0, to=8))], {"PAGE-2", "PAGE-3"},
    ),
    "PAGE-2: a write into a shared page": (
        config(STEP), [Admit(0, 1), Fork(0, 1), Decode([1], [1])],
        [
            Change(
                0,
                put("slots", 0, to=17),
                both(
                    put("block_tables", 1, 0, to=8),
                    put("values", 0, 0, 1, to=0.0),
                    put("keys", 0, 0, 1, to=0.0),
                ),
            )
        ],
        {"OWN-1", "PAGE-2", "PAGE-3", "PAGE-4"},
    ),
    "PAGE-3: a page is lost": (
        config(STEP), [Admit(0, 3), Release(0)], [Change(1, view=put("free_pages", to=8))],
        {"PAGE-3"},
    ),
    "PAGE-4: an inactive rank names a slot": (
        config(STEP), ONE, [Change(1, put("slots", 0, to=1))], {"OWN-1", "PAGE-4"},
    ),
    "PAGE-4: an inactive rank names a slot before the first": (
        config(STEP), ONE, [Change(1, put("slots", 0, to=-7))], {"PAGE-4"},
    ),
    "PAGE-4: slots that were never written are not shown": (
        config(STEP), ONE,
        [
            Change(0, view=both(
                put("keys", 0, to=lambda rows: rows[:, :3]),
                put("values", 0, to=lambda rows: rows[:, :3]),
            ))
        ],
        {"PAGE-4"},
    ),
    "PAGE-4: an inactive rank writes silently": (
        config(STEP), ONE, [Change(1, view=put("values", 0, 0, 1, to=0.5))], {"PAGE-4"},
    ),
    "PAGE-5: a refused event takes a page": (
        config(STEP), [Admit(0, 3), Admit(0, 1)], [Change(0, view=put("free_pages", to=7))],
        {"PAGE-3", "PAGE-5"},
    ),
    "ATT-1, ATT-4: an output is off": (
        config(STEP), ONE, [Change(1, put("output", 0, 0, 1, to=lambda x: x + 1e-3))],
        {"ATT-1", "ATT-4"},
    ),
    "ATT-3: an empty rank spoils an output": (
        config(STEP), [Admit(0, 1), Decode([0], [1])],
        [Change(0, put("output", 0, 0, 1, to=np.nan))], {"ATT-1", "ATT-3", "ATT-4"},
    ),
    "ATT-3 is not named where the memory is wrong as well": (
        config(STEP), [Admit(0, 1), Decode([0], [1])],
        [Change(0, put("output", 0, 0, 1, to=np.nan), put("values", 0, 0, 0, to=np.nan))],
        {"OWN-1", "ATT-1", "ATT-4"},
    ),
    "DUM-1: a dummy's row lands in a request outside the batch": (
        config(STEP), TWO, [Change(0, view=put("values", 1, 0, 0, to=np.nan))],
        {"OWN-1", "DUM-1"},
    ),
    "MAP-1: ranks hold one another's heads": (
        config(STEP), ONE, [Change(0, put("output", to="output of 1")),
                            Change(1, put("output", to="output of 0"))],
        {"ATT-1", "ATT-4", "MAP-1"},
    ),
    "MAP-1: tp_rank varies fastest": (
        config(STEP, tp_size=2), [Admit(0, 1)],
        [Change(1, view=put("local_len", 0, to=1)), Change(2, view=put("local_len", 0, to=0))],
        {"LEN-1", "MAP-1"},
    ),
    "REF-1: one rank refuses alone": (
        config(STEP), ONE, [Change(1, put("reason", to=Reason.OUT_OF_PAGES))], {"REF-1", "REF-2"},
    ),
    "REF-2: an event is refused for another reason": (
        config(STEP), [Decode([5], [0])],
        [Change(rank, put("reason", to=Reason.UNKNOWN_REQUEST)) for rank in (0, 1)], {"REF-2"},
    ),
    "REF-2: a preempted request that never was": (
        config(STEP), [Admit(0, 3)], [Change(0, view=put("preempted", to=[4]))], {"REF-2"},
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, marks=pytest.mark.holds(*sorted(expected)))
        for case, (_, _, _, expected) in CASES.items()
    ],
)
def test_the_judge_names_what_fails_and_nothing_else(case: str) -> None:
    """A wrong answer to the last event is named by exactly the invariants that it breaks."""
    setting, events, changes, expected = CASES[case]
    answers = right_answers(setting, events)
    judge, recorder = Judge(setting, PROFILES), Recorder(setting, PROFILES)
    for event, right in zip(events[:-1], answers[:-1], strict=True):
        assert judge.event(recorder.next(event), right) == []
    wrong = list(answers[-1])
    for change in changes:
        wrong[change.rank] = change.applied(wrong[change.rank])
    for rank, answer in enumerate(wrong):  # heads of another rank
        if isinstance(answer.outcome.output, str):
            other = answers[-1][int(answer.outcome.output[-1])].outcome.output
            outcome = msgspec.structs.replace(answer.outcome, output=other)
            wrong[rank] = Answer(outcome, answer.view)
    violations = judge.event(recorder.next(events[-1]), wrong)
    assert {violation.invariant for violation in violations} == expected


@pytest.mark.parametrize("case", CASES)
def test_the_judge_finds_nothing_wrong_with_right_answers(case: str) -> None:
    """The same trace, answered as the specification says, breaks no invariant."""
    setting, events, _, _ = CASES[case]
    judge, recorder = Judge(setting, PROFILES), Recorder(setting, PROFILES)
    found = [
        violation
        for event, right in zip(events, right_answers(setting, events), strict=True)
        for violation in judge.event(recorder.next(event), right)
    ]
    assert found == []


def test_every_invariant_that_an_answer_can_break_is_broken_here() -> None:
    """No number of SPEC.md is left without a wrong answer of its own."""
    named = {number for _, _, _, expected in CASES.values() for number in expected}
    assert named == set(NUMBERS) - BLIND - {"REP-1", "POOL-1", "WIN-1", "WIN-2"}  # test_groups has
