"""The three facts that the proofs by running a function rest on (see `symbolic`).

They are proved with Z3's own products, and the first with Z3's own division too, whose meaning
for a positive divisor the SMT-LIB standard fixes: the quotient rounded down, as Python's `//`.
"""

from __future__ import annotations

from helix_spec.theorems.base import Integer, Natural, Size, assume, implies, theorem


@theorem(
    "euclid-exists",
    proves="",
    witness={"a": -7, "b": 3},
    native=True,
)
def exists(a: Integer, b: Size) -> bool:
    """For every a and every b > 0 there are q and r with a = q*b + r and 0 <= r < b."""
    q, r = divmod(a, b)
    return (a == q * b + r) & (r >= 0) & (r < b)


@exists.wrong()
def remainder_below_one_less(a: Integer, b: Size) -> bool:
    """The remainder is below b - 1."""
    return a % b < b - 1


@theorem(
    "euclid-unique",
    proves="",
    witness={"q": 2, "r": 1, "k": 2, "s": 1, "b": 3},
    native=True,
)
def unique(q: Integer, r: Natural, k: Integer, s: Natural, b: Size) -> bool:
    """There is only one such q and r: they are the quotient and the remainder."""
    assume(r < b, s < b, q * b + r == k * b + s)
    return (q == k) & (r == s)


@unique.wrong()
def remainder_up_to_divisor(q: Integer, r: Natural, k: Integer, s: Natural, b: Size) -> bool:
    """A remainder may be as large as the divisor."""
    assume(r <= b, s <= b, q * b + r == k * b + s)
    return q == k


@theorem(
    "products-keep-order",
    proves="",
    witness={"k": 2, "x": 1, "y": 4, "d": -3},
    native=True,
)
def keep_order(k: Natural, x: Integer, y: Integer, d: Integer) -> bool:
    """For k >= 0: x <= y + d gives x*k <= y*k + d*k, and x >= y + d gives x*k >= y*k + d*k, for all
    integers x, y and d.
    """
    at_most = implies(x <= y + d, x * k <= y * k + d * k)
    at_least = implies(x >= y + d, x * k >= y * k + d * k)
    return at_most & at_least


@keep_order.wrong()
def for_any_factor(k: Integer, x: Integer, y: Integer, d: Integer) -> bool:
    """For k below 0 too."""
    return implies(x <= y + d, x * k <= y * k + d * k)
