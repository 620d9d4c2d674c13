"""The index of invariants, `docs/INVARIANTS.md`: what holds each.

    python -m suite_testing.index            # or `make index`: write the page
    python -m suite_testing.index --check    # fail where it is not current

Tests say by the marker `holds` which invariants they would fail for. They are collected, not run.
"""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Final

import pytest

from helix_conformance.expect.vectors import SHIPPED, load_vectors
from helix_mutants import run as _run  # registers the mutants
from helix_mutants.parts import MUTANTS
from helix_spec.invariants import NUMBERS, profiles_of, sentence
from helix_spec.theorems import catalog

assert _run
ROOT: Final = Path(__file__).parents[2]
PAGE: Final = ROOT / "docs" / "INVARIANTS.md"
FOLDERS: Final = (
    *("spec/tests", "reference/tests", "gpu_impl/tests"),
    *("conformance/tests", "conformance/driver_tests", "conformance/mutants/tests"),
)
HEAD: Final = """\
# What holds each invariant

`make index` writes this page from the code; do not edit it. It lists for each invariant of
[SPEC.md](../spec/helix_spec/SPEC.md), section 7, the theorems that prove its arithmetic for all
sizes, the mutants for which the suite must name it, the shipped vectors that are there for it, and
the tests that fail where it does not hold (those with the marker `holds`).
"""


@dataclass
class Holders:
    """What holds one invariant, by names."""

    number: str
    theorems: list[str] = field(default_factory=list)
    mutants: list[str] = field(default_factory=list)
    vectors: list[str] = field(default_factory=list)
    tests: list[str] = field(default_factory=list)
    """Node ids of test functions, without their parameters."""


class _Collected:
    """A plugin of pytest that keeps which tests are marked with which invariants."""

    def __init__(self) -> None:
        self.by_number: dict[str, dict[str, None]] = {}

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            for mark in item.iter_markers("holds"):
                for number in mark.args:
                    self.by_number.setdefault(number, {})[item.nodeid.partition("[")[0]] = None


def marked_tests(folders: Sequence[str] = FOLDERS) -> dict[str, list[str]]:
    """Return the node ids of the tests in these folders by the numbers that they are marked with.

    Raises
    ------
    RuntimeError
        When pytest cannot collect the tests.
    """
    collected, said = _Collected(), io.StringIO()
    words = ["--collect-only", "-q", "--assert=plain", "-p", "no:cacheprovider"]
    words += [f"--rootdir={ROOT}", *(str(ROOT / folder) for folder in folders)]
    with contextlib.redirect_stdout(said):
        status = pytest.main(words, plugins=[collected])
    if status != pytest.ExitCode.OK:
        raise RuntimeError(said.getvalue())
    return {number: list(tests) for number, tests in collected.by_number.items()}


def index() -> list[Holders]:
    """Return what holds each invariant, in the order of SPEC.md."""
    tests, theorems, vectors = marked_tests(), catalog.theorems(), load_vectors(SHIPPED)
    unknown = tests.keys() - set(NUMBERS)
    if unknown:
        raise RuntimeError(
            f"Tests are marked with {sorted(unknown)}, which SPEC.md does not define."
        )
    return [
        Holders(
            number,
            [id for id, one in theorems.items() if number in one.proves],
            sorted(mutant.name for mutant in MUTANTS if number in mutant.expected),
            [vector.name for vector in vectors if number in vector.invariants],
            tests.get(number, []),
        )
        for number in NUMBERS
    ]


def not_held(holders: Iterable[Holders]) -> list[str]:
    """Return a sentence for each invariant that lacks a test, or a mutant and a vector.

    An invariant that no profile checks is no engine's to break: theorems hold it.
    """
    found = []
    for one in holders:
        if not one.tests:
            found.append(f"No test is marked with {one.number}.")
        if profiles_of(one.number) == ("none",):
            if not one.theorems:
                found.append(f"No theorem proves {one.number}.")
        elif not (one.mutants or one.vectors):
            found.append(f"{one.number} has neither a mutant nor a vector.")
    return found


def page(holders: Iterable[Holders]) -> str:
    """Return the page, in Markdown."""
    parts = [HEAD]
    for one in holders:
        _, _, text = sentence(one.number).partition(" ")
        parts.append(f"\n## {one.number}\n\n{text}\n\n")
        for what in ("theorems", "mutants", "vectors"):
            names = ", ".join(f"`{name}`" for name in getattr(one, what))
            parts.append(f"- {what.capitalize()}: {names or 'none'}\n")
        parts.append("- Tests:\n" if one.tests else "- Tests: none\n")
        split = [test.split("::", 1) for test in one.tests]
        for file, of_file in groupby(split, key=lambda parts: parts[0]):
            names = ", ".join(f"`{name}`" for _, name in of_file)
            parts.append(f"  - [{file}](../{file}): {names}\n")
    return "".join(parts)


def main(words: Sequence[str], show: Callable[[str], object] = sys.stderr.write) -> int:
    """Write or check the page; return the exit status."""
    holders = index()
    problems = not_held(holders)
    if "--check" not in words:
        PAGE.parent.mkdir(exist_ok=True)
        PAGE.write_text(page(holders))
    elif not PAGE.exists() or PAGE.read_text() != page(holders):
        problems.append(f"{PAGE.relative_to(ROOT)} is not current: `make index` writes it.")
    show("".join(f"{problem}\n" for problem in problems))
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
