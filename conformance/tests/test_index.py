"""The index of invariants is current, and every invariant that an engine can break has a test."""

import subprocess
import sys

import pytest

from suite_testing.index import Holders, not_held


def test_the_index_is_current_and_every_invariant_is_held():
    """`make index` was run after the last change of a marker, theorem, mutant or vector.

    Pytest collects in a process of its own: it imports each test module once.
    """
    done = subprocess.run(
        [sys.executable, "-m", "suite_testing.index", "--check"], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    ("holders", "problem"),
    [
        (Holders("OWN-1", ["t"], ["m"], ["v"]), ["No test is marked with OWN-1."]),
        (Holders("OWN-1", ["t"], tests=["a"]), ["OWN-1 has neither a mutant nor a vector."]),
        (Holders("PAGE-5", vectors=["v"], tests=["a"]), []),
        (Holders("LIVE-1", mutants=["m"], tests=["a"]), []),
        (Holders("EQ-1", tests=["a"]), ["No theorem proves EQ-1."]),
        (Holders("EQ-1", ["t"], tests=["a"]), []),
    ],
)
def test_an_invariant_that_is_not_held_is_named(holders, problem):
    """Each way to be held too little has its sentence; a theorem alone is enough for EQ-1."""
    assert not_held([holders]) == problem
