"""Ranks as threads; and what was compared: steps, ties, and how near the bound they came."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from gpu_testing import ranks

COMPARED: list[tuple[str, int, float, list[str]]] = []
"""Of each case its name, its steps, the share of the bound that was used, and its ties."""


@pytest.fixture
def on_ranks() -> Iterator[ranks.OnRanks]:
    """`gpu_testing.ranks.threads_with_collectives`."""
    with ranks.threads_with_collectives() as run:
        yield run


@pytest.fixture
def compared() -> list[tuple[str, int, float, list[str]]]:
    """Where a case says what was compared."""
    return COMPARED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Print it."""
    if not COMPARED:
        return
    steps, share = sum(case[1] for case in COMPARED), max(case[2] for case in COMPARED)
    terminalreporter.write_line(
        f"Models: {len(COMPARED)} runs, {steps} tokens; logits used {share:.2f} of their bound."
    )
    for name, _, _, ties in COMPARED:
        for tie in ties:
            terminalreporter.write_line(f"{name}: {tie}")
