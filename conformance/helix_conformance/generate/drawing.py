"""How random traces are drawn: one by one, every choice evenly, from a seed alone.

Hypothesis's own way serves tests that are about to be written: it begins with small examples,
varies those it has, and mixes in constants of the source code around it. A run of the suite
wants many traces that have nothing to do with one another, the same ones wherever it is started.
Strategies are the same for both.
"""

from __future__ import annotations

from random import Random
from typing import Any, ClassVar, Final

from hypothesis.internal.conjecture.providers import AVAILABLE_PROVIDERS, PrimitiveProvider

EVENLY: Final = "helix-evenly"
"""Name of the backend, for `hypothesis.settings`."""


class Evenly(PrimitiveProvider):
    """A Hypothesis backend; set `seed` before a run. It draws what the suite's strategies draw."""

    seed: ClassVar[int | str] = 0

    def __init__(self, data: Any, /) -> None:
        super().__init__(data)
        self.random = Random(self.seed)

    def draw_boolean(self, p: float = 0.5) -> bool:
        """Whether something of this probability happens."""
        return self.random.random() < p

    def draw_integer(
        self,
        min_value: int | None = None,
        max_value: int | None = None,
        *,
        weights: dict[int, float] | None = None,
        shrink_towards: int = 0,
    ) -> int:
        """A number within bounds, each as likely as any other."""
        if min_value is None or max_value is None:
            raise NotImplementedError("Numbers in traces have bounds.")
        return self.random.randint(min_value, max_value)

    def draw_float(self, **constraints: Any) -> float:
        """Not in any trace."""
        raise NotImplementedError("There are no fractions in traces.")

    def draw_string(self, *constraints: Any, **more: Any) -> str:
        """Not in any trace."""
        raise NotImplementedError("There are no texts in traces.")

    def draw_bytes(self, *constraints: Any, **more: Any) -> bytes:
        """Not in any trace."""
        raise NotImplementedError("There are no bytes in traces.")


AVAILABLE_PROVIDERS[EVENLY] = f"{Evenly.__module__}.{Evenly.__qualname__}"
