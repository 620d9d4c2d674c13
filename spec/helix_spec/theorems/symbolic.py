"""Running a Python function on integers that stand for all integers.

A claim about `placement` must be about the very functions that run, not about formulas that
somebody copied from them. So a proof calls the function itself, with `Whole` numbers in place
of integers. A `Whole` is a polynomial over named unknowns: `+`, `-`, `*` compute with it,
comparisons give a `Truth` (a Z3 formula), and where Python asks a `Truth` for its truth value
(`if`, `min`, `max`, `and`) the run takes one branch and is later repeated for the other, until
every branch that can happen has been seen. On each of these paths Z3 is asked whether the claim
follows from what is known there.

Division needs no theory of division. For `a // b` the run first shows b > 0, then finds Q and R
with a = Q*b + R and 0 <= R < b. By theorem `euclid-unique` Q is then the quotient, and Python's
`//` and `%` round down, so they are Q and R. Three ways, in this order:

1. polynomial division of a by b leaves an R that is provably in range;
2. it leaves an R within one b of the range, and the run branches on which side it is;
3. Q and R are new unknowns (they exist by theorem `euclid-exists`), and an unknown that occurs
   alone in what was left is replaced by its value in terms of them from there on.

Products of unknowns are unknowns of their own to Z3, which so has linear arithmetic only and
always ends. Whenever Z3 answers with values under which a product x*k is not x times k, the
facts of theorem `products-keep-order` that these values break are added, and it is asked again.

Everything here is deterministic: Z3 is bounded by its own resource count, never by a clock.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any, Final

import z3  # type: ignore[import-untyped]  # it has no stubs

Monomial = tuple[str, ...]
"""Names of the unknowns multiplied, in order; () for a constant."""
Polynomial = dict[Monomial, int]
"""Coefficients that are not 0."""

SOLVER_BUDGET: Final = 4_000_000
"""Z3 resource units for one question; the largest question asked takes a tenth of it."""
CLAIM_ROUNDS: Final = 40
"""How often a claim is asked again with more facts about products."""
BRANCH_ROUNDS: Final = 1
"""The same for the question whether a branch can happen: to walk one that cannot is no error."""
MAX_PATHS: Final = 5_000


class Abandoned(Exception):
    """What was assumed cannot hold on this path, so nothing is claimed about it."""


class ProofError(Exception):
    """The proof itself is wrong: a division by what may be 0, too many paths."""


class Path:
    """One way through a claim: what is known on it, and the answers that led there.

    `replay` holds the answers given up to the branch where this path leaves an earlier one.
    """

    def __init__(self, replay: list[bool], native: bool = False) -> None:
        self.replay = replay
        self.native = native
        """Products and quotients are Z3's own: for the theorems that the rules here rest on."""
        self.answers: list[bool] = []
        self.others: list[list[bool]] = []
        """Where other paths branch off, as answers to replay."""
        self.solver = z3.Solver()
        self.solver.set("rlimit", SOLVER_BUDGET)
        self.products: set[Monomial] = set()
        self.alike: dict[Monomial, list[tuple[str, Monomial]]] = {}
        """The products that have all factors but one in common, with that one."""
        self.values: dict[str, Polynomial] = {}
        """Unknowns that were replaced."""
        self.divisions: dict[object, tuple[Polynomial, Polynomial]] = {}
        self.free: dict[str, list[tuple[tuple[Any, ...], Whole]]] = {}
        """Results of functions about which only their arguments are known."""
        self.using = False
        """A theorem is being used: what it assumes is to be shown here."""
        self.names = 0

    # Unknowns and polynomials.

    def fresh(self, hint: str) -> Polynomial:
        """Return a new unknown."""
        self.names += 1
        return {(f"{hint}{self.names}",): 1}

    def normal(self, poly: Polynomial) -> Polynomial:
        """Return the polynomial without unknowns that were replaced."""
        while True:
            old = next(((n, m) for m in poly for n in m if n in self.values), None)
            if old is None:
                return poly
            name, monomial = old
            rest = list(monomial)
            rest.remove(name)
            value = _times(self.values[name], {tuple(rest): poly[monomial]})
            poly = _plus({m: k for m, k in poly.items() if m != monomial}, value)

    def replace(self, name: str, value: Polynomial) -> None:
        """Use `value` for an unknown from here on (that they are equal is already known)."""
        self.values[name] = value
        for product in [m for m in self.products if name in m]:
            expanded = self.normal({product: 1})
            self.solver.add(_product(product) == self.term(expanded))

    def term(self, poly: Polynomial) -> Any:
        """Return the polynomial as a linear Z3 term over unknowns and products."""
        if self.native:
            return _native_term(poly)
        for monomial in poly:
            self._meet(monomial)
        return _term(tuple(poly.items()))

    def _meet(self, product: Monomial) -> None:
        """Tells Z3 how a product that is new compares with what shares a factor with it."""
        if len(product) < 2 or product in self.products:
            return
        self.products.add(product)
        for x in sorted(set(product)):
            factors = list(product)
            factors.remove(x)
            rest = tuple(factors)
            self._meet(rest)
            self.solver.add(*(f for d in (-1, 0, 1) for f in _order_facts(rest, x, product, d)))
            for y, other in self.alike.setdefault(rest, []):
                self.solver.add(
                    *(f for d in (-1, 0, 1) for f in _order_facts(rest, x, product, d, y, other))
                )
            self.alike[rest].append((x, product))

    # Questions.

    def proves(self, formula: Any, rounds: int = BRANCH_ROUNDS) -> bool:
        """Return whether the formula follows from what is known on this path."""
        at = len(self.answers)
        answer = self.replay[at] if at < len(self.replay) else self._ask(formula, rounds) is None
        self.answers.append(answer)
        return answer

    def refutation(self, formula: Any) -> str | None:
        """Return None when the formula follows; else what Z3 says, with values that break it."""
        return self._ask(formula, CLAIM_ROUNDS)

    def _ask(self, formula: Any, rounds: int) -> str | None:
        learned: list[Any] = []
        said = "no answer within the rounds allowed"
        self.solver.push()
        self.solver.add(z3.Not(formula))
        for _ in range(rounds):
            answer = self.solver.check()
            if answer == z3.unsat:
                said = ""
                break
            if answer == z3.unknown:
                said = f"unknown ({self.solver.reason_unknown()})"
                break
            broken = self._broken_facts(self.solver.model())
            if not broken:
                said = f"false for {self.solver.model()}"
                break
            learned += broken
            self.solver.add(*broken)
        self.solver.pop()
        self.solver.add(*learned)
        return said or None

    def _broken_facts(self, model: Any) -> list[Any]:
        """Instances of `products-keep-order` that these values break; [] when they break none."""

        def value(m: Monomial) -> int:
            return int(model.eval(_product(m), model_completion=True).as_long())

        broken: list[Any] = []
        for rest, members in self.alike.items():
            k = value(rest)
            for at, (x, xk) in enumerate(members):
                if value(xk) != value((x,)) * k:
                    broken += _order_facts(rest, x, xk, value((x,)))
                for y, yk in members[at + 1 :]:
                    d = value((x,)) - value((y,))
                    if value(xk) - value(yk) != d * k:
                        broken += _order_facts(rest, x, xk, d, y, yk)
        return broken

    # Branches.

    def branch(self, formula: Any) -> bool:
        """Return the truth of a formula on this path; where both can be, one now and one later."""
        if self.proves(formula):
            taken = True
        elif self.proves(z3.Not(formula)):
            taken = False
        else:
            at = len(self.answers)
            taken = self.replay[at] if at < len(self.replay) else True
            if at >= len(self.replay):
                self.others.append([*self.answers, False])
            self.answers.append(taken)
        self.solver.add(formula if taken else z3.Not(formula))
        return taken

    def divide(self, a: Polynomial, b: Polynomial) -> tuple[Polynomial, Polynomial]:
        """Return quotient and remainder; see the module's text for the three ways."""
        zb = self.term(b)
        if not self.proves(zb > 0, CLAIM_ROUNDS):
            raise ProofError(f"division by {_text(b)}, which is not known to be positive")
        if self.native:
            q, r = self.fresh("q"), self.fresh("r")
            self.solver.add(self.term(q) == self.term(a) / zb, self.term(r) == self.term(a) % zb)
            return q, r
        quotient, rest = _divide(a, b)
        zr = self.term(rest)
        if self.proves(z3.And(0 <= zr, zr < zb)):
            return quotient, rest
        if self.proves(z3.And(-zb <= zr, zr < 2 * zb)):
            if self.branch(zr < 0):
                return _plus(quotient, _ONE, -1), _plus(rest, b)
            if self.branch(zr >= zb):
                return _plus(quotient, _ONE), _plus(rest, b, -1)
            return quotient, rest
        key = (frozenset(rest.items()), frozenset(b.items()))
        if key not in self.divisions:
            q, r = self.fresh("q"), self.fresh("r")
            if self.proves(zr <= 0):
                q = _times(q, {(): -1})  # so that the new unknown itself is not negative
            self.divisions[key] = q, r
            value = _plus(_times(q, b), r)
            zq, zr_new = self.term(q), self.term(r)
            # The sign of q follows from the rest, but only by a product; so it is said here.
            self.solver.add(zr == self.term(value), 0 <= zr_new, zr_new < zb)
            self.solver.add((zr >= 0) == (zq >= 0))
            self._replace_one_of(rest, b, value)
        q, r = self.divisions[key]
        return _plus(quotient, q), r

    def _replace_one_of(self, rest: Polynomial, b: Polynomial, value: Polynomial) -> None:
        """Rest == value: where an unknown occurs alone in rest, it is replaced by its value."""
        for monomial, factor in rest.items():
            if len(monomial) != 1 or factor not in (1, -1):
                continue
            name = monomial[0]
            if sum(name in m for m in rest) == 1 and not any(name in m for m in b):
                others = {m: k for m, k in rest.items() if m != monomial}
                self.replace(name, _times(_plus(value, others, -1), {(): factor}))
                return


_PATH: ContextVar[Path] = ContextVar("path")
_ONE: Final[Polynomial] = {(): 1}


def _plus(a: Polynomial, b: Polynomial, factor: int = 1) -> Polynomial:
    total = dict(a)
    for monomial, k in b.items():
        total[monomial] = total.get(monomial, 0) + factor * k
        if total[monomial] == 0:
            del total[monomial]
    return total


def _times(a: Polynomial, b: Polynomial) -> Polynomial:
    total: Polynomial = {}
    for m, j in a.items():
        total = _plus(total, {tuple(sorted(m + n)): j * k for n, k in b.items()})
    return total


def _divide(a: Polynomial, b: Polynomial) -> tuple[Polynomial, Polynomial]:
    """Q and R with a = Q*b + R, by the leading monomial of b; R in range is not promised."""
    lead = max(b, key=lambda m: (len(m), m))
    quotient: Polynomial = {}
    rest = a
    while True:
        for monomial, k in rest.items():
            left = list(monomial)
            if k // b[lead] != 0 and all(_take(left, name) for name in lead):
                step: Polynomial = {tuple(left): k // b[lead]}
                break
        else:
            return quotient, rest
        quotient, rest = _plus(quotient, step), _plus(rest, _times(step, b), -1)


def _take(names: list[str], name: str) -> bool:
    if name in names:
        names.remove(name)
        return True
    return False


@cache
def _term(poly: tuple[tuple[Monomial, int], ...]) -> Any:
    terms = [z3.IntVal(k) if m == () else k * _product(m) for m, k in poly]
    return z3.Sum(terms) if terms else z3.IntVal(0)


def _native_term(poly: Polynomial) -> Any:
    total = z3.IntVal(0)
    for monomial, k in poly.items():
        part = z3.IntVal(k)
        for name in monomial:
            part = part * z3.Int(name)
        total = total + part
    return total


@cache
def _product(monomial: Monomial) -> Any:
    return z3.Int("*".join(monomial))


@cache
def _order_facts(
    rest: Monomial, x: str, xk: Monomial, d: int, y: str | None = None, yk: Monomial = ()
) -> list[Any]:
    """With k >= 0, x <= y + d gives x*k <= y*k + d*k, and the same for >=. Without y it is 0."""
    k, zx, zxk = _product(rest), z3.Int(x), _product(xk)
    zy, zyk = (z3.IntVal(0), z3.IntVal(0)) if y is None else (z3.Int(y), _product(yk))
    return [
        z3.Implies(z3.And(k >= 0, zx <= zy + d), zxk <= zyk + d * k),
        z3.Implies(z3.And(k >= 0, zx >= zy + d), zxk >= zyk + d * k),
    ]


def _text(poly: Polynomial) -> str:
    return " + ".join(f"{k}*{'*'.join(m)}" if m else str(k) for m, k in poly.items()) or "0"


class Truth:
    """A formula about unknowns. Its truth value is a branch of the run."""

    __hash__ = None  # type: ignore[assignment]  # equality is a formula

    def __init__(self, formula: Any) -> None:
        self.formula = formula

    def __bool__(self) -> bool:
        return _PATH.get().branch(self.formula)

    def __and__(self, other: object) -> Truth:
        return Truth(z3.And(self.formula, _formula(other)))

    def __or__(self, other: object) -> Truth:
        return Truth(z3.Or(self.formula, _formula(other)))

    def __invert__(self) -> Truth:
        return Truth(z3.Not(self.formula))

    def __eq__(self, other: object) -> Truth:  # type: ignore[override]  # a formula, not a bool
        return Truth(self.formula == _formula(other))

    __rand__, __ror__ = __and__, __or__

    # As in Python, a truth value counts as 0 or 1.

    def __index__(self) -> int:
        return int(bool(self))

    def __add__(self, other: Any) -> Any:
        return int(bool(self)) + other

    def __rsub__(self, other: Any) -> Any:
        return other - int(bool(self))

    def __mul__(self, other: Any) -> Any:
        return int(bool(self)) * other

    __radd__, __rmul__ = __add__, __mul__


class Whole:
    """An integer that stands for all integers that the assumptions allow."""

    __hash__ = None  # type: ignore[assignment]  # equality is a formula
    __slots__ = ("_poly",)

    def __init__(self, poly: Polynomial) -> None:
        self._poly = poly

    @property
    def poly(self) -> Polynomial:
        """The number in terms of the unknowns that are left."""
        return _PATH.get().normal(self._poly)

    def __add__(self, other: Any) -> Whole:
        return Whole(_plus(self.poly, _poly(other)))

    def __sub__(self, other: Any) -> Whole:
        return Whole(_plus(self.poly, _poly(other), -1))

    def __rsub__(self, other: Any) -> Whole:
        return Whole(_plus(_poly(other), self.poly, -1))

    def __mul__(self, other: Any) -> Whole:
        return Whole(_times(self.poly, _poly(other)))

    __radd__, __rmul__ = __add__, __mul__

    def __neg__(self) -> Whole:
        return Whole(_times(self.poly, {(): -1}))

    def __divmod__(self, other: Any) -> tuple[Whole, Whole]:
        quotient, rest = _PATH.get().divide(self.poly, _poly(other))
        return Whole(quotient), Whole(rest)

    def __rdivmod__(self, other: Any) -> tuple[Whole, Whole]:
        return Whole(_poly(other)).__divmod__(self)

    def __floordiv__(self, other: Any) -> Whole:
        return self.__divmod__(other)[0]

    def __mod__(self, other: Any) -> Whole:
        return self.__divmod__(other)[1]

    def __rfloordiv__(self, other: Any) -> Whole:
        return self.__rdivmod__(other)[0]

    def __rmod__(self, other: Any) -> Whole:
        return self.__rdivmod__(other)[1]

    def __lt__(self, other: Any) -> Truth:
        return self._compare(other, lambda difference: difference < 0)

    def __le__(self, other: Any) -> Truth:
        return self._compare(other, lambda difference: difference <= 0)

    def __gt__(self, other: Any) -> Truth:
        return self._compare(other, lambda difference: difference > 0)

    def __ge__(self, other: Any) -> Truth:
        return self._compare(other, lambda difference: difference >= 0)

    def __eq__(self, other: object) -> Truth:  # type: ignore[override]  # a formula, not a bool
        return self._compare(other, lambda difference: difference == 0)

    def __ne__(self, other: object) -> Truth:  # type: ignore[override]  # a formula, not a bool
        return self._compare(other, lambda difference: difference != 0)

    def __bool__(self) -> bool:
        return bool(self != 0)

    def _compare(self, other: Any, holds: Callable[[Any], Any]) -> Truth:
        difference = _plus(self.poly, _poly(other), -1)
        if set(difference) <= {()}:
            return Truth(z3.BoolVal(holds(difference.get((), 0))))
        return Truth(holds(_PATH.get().term(difference)))


class Real:
    """A real number that stands for all real numbers; Z3 decides their arithmetic by itself."""

    __hash__ = None  # type: ignore[assignment]  # equality is a formula
    __slots__ = ("term",)

    def __init__(self, term: Any) -> None:
        self.term = term

    def __add__(self, other: Any) -> Real:
        return Real(self.term + _real(other))

    def __sub__(self, other: Any) -> Real:
        return Real(self.term - _real(other))

    def __rsub__(self, other: Any) -> Real:
        return Real(_real(other) - self.term)

    def __mul__(self, other: Any) -> Real:
        return Real(self.term * _real(other))

    __radd__, __rmul__ = __add__, __mul__

    def __truediv__(self, other: Any) -> Real:
        divisor = _real(other)
        if not _PATH.get().proves(divisor != 0, CLAIM_ROUNDS):
            raise ProofError("division by a real number that may be 0")
        return Real(self.term / divisor)

    def __rtruediv__(self, other: Any) -> Real:
        return Real(_real(other)) / self

    def __lt__(self, other: Any) -> Truth:
        return Truth(self.term < _real(other))

    def __le__(self, other: Any) -> Truth:
        return Truth(self.term <= _real(other))

    def __gt__(self, other: Any) -> Truth:
        return Truth(self.term > _real(other))

    def __ge__(self, other: Any) -> Truth:
        return Truth(self.term >= _real(other))

    def __eq__(self, other: object) -> Truth:  # type: ignore[override]  # a formula, not a bool
        return Truth(self.term == _real(other))


def _real(value: Any) -> Any:
    return value.term if isinstance(value, Real) else z3.RealVal(value)


def _poly(value: Any) -> Polynomial:
    if isinstance(value, Whole):
        return value.poly
    if isinstance(value, (int, Truth)):
        number = int(value)
        return {(): number} if number else {}
    raise TypeError(f"{value!r} is no integer")


def _formula(value: object) -> Any:
    return value.formula if isinstance(value, Truth) else z3.BoolVal(bool(value))


def proving() -> bool:
    """Return whether a claim is being proved, and neither run on integers nor used as a lemma."""
    path = _PATH.get(None)
    return path is not None and not path.using


def assume(*conditions: object) -> None:
    """Add conditions to what is known. Raises Abandoned where they cannot hold.

    Where the claim is used for another proof, these are what is to be shown.
    """
    path = _PATH.get(None)
    for condition in conditions:
        if path is not None and path.using:
            if not path.proves(_formula(condition), CLAIM_ROUNDS):
                raise ProofError("a theorem is used where what it assumes is not known")
        elif path is not None and isinstance(condition, Truth):
            path.solver.add(condition.formula)
        elif not condition:
            raise Abandoned


def implies(condition: bool, consequence: bool) -> bool:
    """Return whether the consequence holds where the condition does."""
    if isinstance(condition, Truth) or isinstance(consequence, Truth):
        both: Any = Truth(z3.Implies(_formula(condition), _formula(consequence)))
        return both
    return not condition or consequence


def use(claim: Callable[[], object]) -> None:
    """Add to what is known a claim that is proved elsewhere; what it assumes is shown here."""
    path = _PATH.get()
    path.using, before = True, path.using
    try:
        known = claim()
    finally:
        path.using = before
    path.solver.add(_formula(known))


def established(claim: object) -> str | None:
    """Return None when the claim follows on the path at hand; else what stands against it."""
    return _PATH.get().refutation(_formula(claim))


def free_function(name: str) -> Callable[..., Whole]:
    """Return a function about which only one thing is known: equal arguments have equal results."""

    def call(*arguments: Any) -> Whole:
        path = _PATH.get()
        seen = path.free.setdefault(name, [])
        alike = [z3.And(*map(_alike, earlier, arguments)) for earlier, _ in seen]
        for same, (_, result) in zip(alike, seen, strict=True):
            if path.proves(same):
                return result
        new = Whole(path.fresh(f"{name}_"))
        for same, (_, result) in zip(alike, seen, strict=True):
            path.solver.add(z3.Implies(same, _formula(new == result)))
        seen.append((arguments, new))
        return new

    return call


def _alike(a: Any, b: Any) -> Any:
    same = a == b
    return same.formula if isinstance(same, Truth) else z3.BoolVal(bool(same))


def every_path(run: Callable[[], str | None], native: bool = False) -> tuple[int, str | None]:
    """Repeat the run for every path; return their number and the first thing that it returned."""
    todo: list[list[bool]] = [[]]
    paths = 0
    while todo:
        paths += 1
        if paths > MAX_PATHS:
            raise ProofError(f"more than {MAX_PATHS} paths")
        path = Path(todo.pop(), native)
        with _on(path):
            try:
                found = run()
            except Abandoned:
                found = None
        if found is not None:
            return paths, found
        todo += path.others
    return paths, None


def unknown(name: str, real: bool = False) -> Whole | Real:
    """Return the unknown of this name."""
    return Real(z3.Real(name)) if real else Whole({(name,): 1})


@contextmanager
def _on(path: Path) -> Iterator[None]:
    token = _PATH.set(path)
    try:
        yield
    finally:
        _PATH.reset(token)
