"""The choices that layouts, configurations, actions and traces are functions of.

`Seeded` makes them for runs of the suite, from a text alone. `strategies` makes them through
Hypothesis. Whatever is drawn calls `Choices` and knows neither.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from random import Random
from typing import TypeVar

T = TypeVar("T")


class Choices(ABC):
    """Choices among values of which the simplest comes first."""

    @abstractmethod
    def integer(self, low: int, high: int) -> int:
        """Return an integer between these bounds.

        Parameters
        ----------
        low, high : int
            The bounds, both included; `low` is the simplest value.

        Returns
        -------
        int
            At least `low` and at most `high`.
        """

    def pick(self, options: Sequence[T]) -> T:
        """Return one of these options; one that stands there twice is twice as likely."""
        return options[self.integer(0, len(options) - 1)]

    def one_in(self, times: int) -> bool:
        """Return True once in so many times."""
        return self.integer(1, times) == times

    def lists(self, draw: Callable[[Choices], T], low: int, high: int) -> list[T]:
        """Return a list of what `draw` makes.

        Parameters
        ----------
        draw : function of Choices
            Makes one item; it must take all its choices from its argument.
        low, high : int
            The fewest and the most items.

        Returns
        -------
        list
            At least `low` and at most `high` items.
        """
        return [draw(self) for _ in range(self.integer(low, high))]

    def permutation(self, items: Sequence[T]) -> list[T]:
        """Return the items in some order; the order given is the simplest."""
        left = list(items)
        return [left.pop(self.integer(0, len(left) - 1)) for _ in items]


class Seeded(Choices):
    """Choices that depend on a text alone, every option as likely as any other.

    Parameters
    ----------
    seed : str
        Equal texts make equal choices, on every machine and version of Python.

    Examples
    --------
    >>> Seeded("0 pr9757 17").lists(lambda choices: choices.integer(1, 40), 3, 3)
    [3, 34, 27]
    >>> Seeded("0 pr9757 18").permutation(["a", "b", "c"])
    ['a', 'c', 'b']
    """

    def __init__(self, seed: str) -> None:
        # Of all methods of Random only this one promises the same numbers in later versions.
        self._fraction = Random(seed).random

    def integer(self, low: int, high: int) -> int:
        """Return an integer between `low` and `high`, each as likely as any other."""
        return low + int(self._fraction() * (high - low + 1))
