"""Invariants of the marker `holds`, for tests that hold many."""

from __future__ import annotations

from collections.abc import Iterable

from helix_spec.invariants import NUMBERS, profiles_of


def of_profiles(profiles: Iterable[str]) -> list[str]:
    """Return the invariants that these profiles check, in the order of SPEC.md."""
    return [number for number in NUMBERS if not {*profiles}.isdisjoint(profiles_of(number))]
