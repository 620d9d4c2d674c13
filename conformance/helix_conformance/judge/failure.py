"""What a red run is made of: invariants that failed, and answers that are none."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec

from helix_spec import invariants


class Violation(msgspec.Struct, frozen=True):
    """One invariant that failed: where, what was expected, what was observed."""

    invariant: str
    message: str
    expected: Any = None
    observed: Any = None
    rank: int | None = None
    request: int | None = None


class GarbageError(Exception):
    """An answer that cannot be read as one: wrong columns, wrong shapes. It names the rank."""

    def __init__(self, rank: int, message: str) -> None:
        super().__init__(message)
        self.rank = rank


def in_order(violations: Iterable[Violation]) -> list[Violation]:
    """Sorted as SPEC.md numbers them, ranks rising."""
    return sorted(
        violations,
        key=lambda v: (invariants.NUMBERS.index(v.invariant), -1 if v.rank is None else v.rank),
    )
