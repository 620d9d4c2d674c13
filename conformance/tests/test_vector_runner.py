"""The runner of `examples/run_vectors.py`, which shares no code with the judge, beside it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import msgspec
import numpy as np
import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.expect.vectors import SHIPPED, load_vector
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_vector
from helix_reference.engine import ReferenceEngine
from helix_spec.engine import Outcome
from helix_spec.events import Decode

RUNNER = Path(__file__).parents[1] / "examples" / "run_vectors.py"
spec = importlib.util.spec_from_file_location("run_vectors", RUNNER)
runner = importlib.util.module_from_spec(spec)
spec.loader.exec_module(runner)
WALK = "walk-pr9757-c3-t-2"
QUICK = [
    *(WALK, "walk-vllm_dcp-c3-t-4-i-2", "fork-balanced", "preempt-pr17866"),
    *("refusals", "cache-of-turns", "spec-11-9-heads", "merge-unequal", "start-head-dim"),
]


def both(name: str, engine: type) -> tuple[bool, bool]:
    """Whether the runner and the judge find fault with an engine that plays a vector."""
    vector = json.loads((SHIPPED / f"{name}.json").read_text())
    failure = check_vector(LocalDriver(engine), load_vector(SHIPPED / f"{name}.json"), Tally())
    return next(runner.differences(vector, engine), None) is not None, failure is not None


def spoiled(field: str, change) -> type:
    """The reference, whose rank 0 answers accepted decodes with one column changed."""

    class Spoiled(ReferenceEngine):
        def apply(self, event):
            outcome: Outcome = super().apply(event)
            column = getattr(outcome, field)
            if self.rank != 0 or not isinstance(event, Decode) or not column:
                return outcome
            return msgspec.structs.replace(outcome, **{field: change(column)})

    return Spoiled


class Forgets(ReferenceEngine):
    """Rank 0 says that it holds one token fewer of each request."""

    def observe(self, ids=None):
        view = super().observe(ids)
        fewer = {id: max(0, held - (self.rank == 0)) for id, held in view.local_len.items()}
        return msgspec.structs.replace(view, local_len=fewer)


class Leaks(ReferenceEngine):
    """Rank 0 says that one page fewer is free."""

    def observe(self, ids=None):
        view = super().observe(ids)
        return msgspec.structs.replace(view, free_pages=view.free_pages - (self.rank == 0))


@pytest.mark.parametrize("name", QUICK)
def test_the_runner_and_the_judge_accept_the_reference(name):
    """A vector that the reference plays is right for both."""
    assert both(name, ReferenceEngine) == (False, False)


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        pytest.param(name, engine, marks=pytest.mark.holds(number))
        for number, name, engine in [
            ("LEN-2", WALK, spoiled("past_len", lambda c: [c[0] + 1, *c[1:]])),
            ("POS-1", WALK, spoiled("position_ids", lambda c: [c[0] + 1, *c[1:]])),
            ("OWN-2", WALK, spoiled("active", lambda c: [not c[0], *c[1:]])),
            ("OWN-1", "walk-vllm_dcp-c3-t-4-i-2", spoiled("slots", lambda c: [c[0] ^ 1, *c[1:]])),
            ("LEN-3", WALK, spoiled("visible", lambda c: [c[0] + 1, *c[1:]])),
            ("ATT-1", "spec-11-9-heads", spoiled("output", lambda o: (np.array(o) + 1).tolist())),
            ("LEN-1", WALK, Forgets),
            ("PAGE-3", "fork-balanced", Leaks),
        ]
    ],
)
def test_the_runner_and_the_judge_both_refuse_a_wrong_engine(name, engine):
    """What breaks one field of a vector fails for both."""
    assert both(name, engine) == (True, True)


def test_the_runner_shares_no_code_with_the_suite():
    """It imports nothing of helix_conformance and helix_reference."""
    lines = [line for line in RUNNER.read_text().splitlines() if "import" in line]
    assert [
        line for line in lines if "helix_conformance" in line or "helix_reference" in line
    ] == []
