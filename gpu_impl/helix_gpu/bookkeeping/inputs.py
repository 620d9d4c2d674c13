"""Numbers as callers give them, before anything counts with them.

What numpy or torch would cut down to an integer without a word is an error here.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any


def integer(name: str, value: Any) -> int:
    """Return an integer of any type as Python's own.

    Parameters
    ----------
    name : str
        What the value is, for the sentence.
    value
        What the caller gave.

    Returns
    -------
    int

    Raises
    ------
    ValueError

    Examples
    --------
    >>> integer("pad", 2.5)
    Traceback (most recent call last):
    ValueError: pad is 2.5; it must be an integer.
    """
    try:
        return int(operator.index(value))
    except TypeError:
        raise ValueError(f"{name} is {value!r}; it must be an integer.") from None


def integers(name: str, values: Any) -> list[int]:
    """Return a sequence of integers, an array or a tensor of them too, as a list.

    Parameters
    ----------
    name : str
        What the values are, for the sentence.
    values
        What the caller gave.

    Returns
    -------
    list of int

    Raises
    ------
    ValueError

    Examples
    --------
    >>> integers("ids", range(3))
    [0, 1, 2]
    >>> integers("ids", 7)
    Traceback (most recent call last):
    ValueError: ids is 7; it must be a sequence of integers.
    """
    listed = values.tolist() if hasattr(values, "tolist") else values
    if not isinstance(listed, Iterable) or isinstance(listed, str | bytes):
        raise ValueError(f"{name} is {values!r}; it must be a sequence of integers.")
    listed = list(listed)
    if all(type(value) is int for value in listed):
        return listed
    return [integer(f"{name}[{place}]", value) for place, value in enumerate(listed)]
