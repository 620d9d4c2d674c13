"""What a theorem is, and what has to hold before one counts as confirmed.

A theorem is a Python function that takes integers, assumes something about them and returns
whether its claim holds. That one text is run three ways:

- on unknowns that stand for all integers (`symbolic`), which proves it;
- on the integers of its stored witness, which shows that its assumptions can be met;
- on small integers with a wrong formula in place of a right one, until the claim is false: the
  smallest such integers are what the wrong formula is refuted by. A theorem that no wrong
  formula breaks says nothing, and does not count.

Claims call the functions of `helix_spec.placement` themselves, as `placement.local_len(...)`, so
that what is proved is what runs, and so that a wrong one can be put in its place.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import count
from typing import Annotated, Any, Final, Literal, get_args, get_type_hints

import msgspec

from helix_spec.theorems import symbolic
from helix_spec.theorems.crosshair import contract_problem
from helix_spec.theorems.symbolic import Abandoned, ProofError, assume, implies

__all__ = [
    "REGISTRY",
    "Integer",
    "Kill",
    "Natural",
    "RealNumber",
    "Result",
    "Size",
    "Theorem",
    "Wrong",
    "assume",
    "check",
    "implies",
    "lemma",
    "theorem",
]

CONFIRMED: Final = "confirmed"
"""The one verdict that counts."""

Method = Literal["z3", "crosshair"]
Natural = Annotated[int, 0]
"""An integer from 0 on (the number is the least one)."""
Size = Annotated[int, 1]
"""An integer from 1 on: a count of ranks, of tokens in a block."""

Integer = Annotated[int, None]
"""Any integer."""

RealNumber = Annotated[Fraction, "real"]
"""Any real number."""

MIN_TRIED: Final = -2
"""Where an `Integer` or `RealNumber` starts when small cases are tried."""
MAX_TRIES: Final = 150_000
"""How many small cases are tried against a wrong formula."""


@dataclass(frozen=True)
class Wrong:
    """A wrong formula, to be refuted.

    It stands in for the function `of`, named as module and function below `helix_spec`; without
    `of` it is a wrong claim, about the same unknowns as the theorem that refutes it.
    """

    name: str
    formula: Callable[..., Any]
    of: str | None = None
    source: str = ""
    """Where an engine had it."""
    point: dict[str, int] | None = None
    """Where it is refuted, when that is too far out to be found by trying small integers."""

    def at(self, **point: int) -> Wrong:
        """Return the same wrong formula, refuted at these integers."""
        return replace(self, point=point)


class Kill(msgspec.Struct, frozen=True):
    """A wrong formula and the smallest integers that refute it."""

    wrong: str
    refuted_by: dict[str, int | str] | None
    """None when nothing refuted it: the theorem then does not count."""


class Result(msgspec.Struct, frozen=True, kw_only=True):
    """What became of one theorem."""

    id: str
    proves: list[str]
    statement: str
    method: Method
    verdict: str
    """`confirmed`, or a sentence that says what is missing."""
    seconds: float
    witness: dict[str, int]
    kills: list[Kill]


@dataclass(frozen=True)
class Theorem:
    """A claim with all that makes it count."""

    id: str
    proves: tuple[str, ...]
    """Numbers in SPEC.md."""
    statement: str
    claim: Callable[..., bool]
    witness: dict[str, int]
    """Integers that meet the assumptions."""
    about: tuple[str, ...] = ()
    """Functions that are each refuted here when their result is one too large."""
    kills: tuple[Wrong, ...] = ()
    cases: tuple[Any, ...] = ()
    """What the claim's first parameter runs through; () when all are integers."""
    free: tuple[str, ...] = ()
    """Functions that may be any function: nothing about them is used."""
    native: bool = False
    """Proved with Z3's own products and quotients."""
    contract_of: str | None = None
    """The function whose contract this is; CrossHair then proves it, not Z3 directly."""
    wrong_claims: list[Wrong] = field(default_factory=list)

    def wrong(
        self, *, point: dict[str, int] | None = None
    ) -> Callable[[Callable[..., bool]], Theorem]:
        """Add a wrong claim, named by its docstring; small integers or this point refute it."""

        def add(claim: Callable[..., bool]) -> Theorem:
            self.wrong_claims.append(Wrong(prose(claim).rstrip("."), claim, point=point))
            return self

        return add

    @property
    def method(self) -> Method:
        """What proves it."""
        return "z3" if self.contract_of is None else "crosshair"

    @property
    def least(self) -> dict[str, Least]:
        """The number parameters, with the least value of each."""
        return _least(self.claim, self.cases)

    @property
    def to_refute(self) -> list[Wrong]:
        """All wrong formulas that this theorem must refute."""
        return [*(one_more(name) for name in self.about), *self.kills, *self.wrong_claims]


Least = int | None | Literal["real"]
"""The least value of a parameter; None when there is none, "real" for a real number."""


def prose(function: Callable[..., Any]) -> str:
    """Return the docstring of a function as one line."""
    return " ".join((inspect.getdoc(function) or "").split())


REGISTRY: Final[dict[str, Theorem]] = {}
"""All theorems, in the order in which they may use one another."""


def theorem(
    identifier: str,
    *,
    proves: str,
    witness: dict[str, int],
    about: Sequence[str] = (),
    kills: Sequence[Wrong] = (),
    cases: Sequence[Any] = (),
    free: Sequence[str] = (),
    native: bool = False,
) -> Callable[[Callable[..., bool]], Theorem]:
    """Make a theorem of a claim, whose docstring is its statement.

    The parameters are the fields of `Theorem`; `proves` names numbers of SPEC.md, separated by
    spaces.

    Raises
    ------
    ValueError
        When there is a theorem of this id already.
    """

    def make(claim: Callable[..., bool]) -> Theorem:
        if identifier in REGISTRY:
            raise ValueError(f"there are two theorems {identifier}")
        made = Theorem(
            identifier,
            tuple(proves.split()),
            prose(claim),
            claim,
            witness,
            tuple(about),
            tuple(kills),
            tuple(cases),
            tuple(free),
            native,
        )
        REGISTRY[identifier] = made
        return made

    return make


def lemma(earlier: Theorem, *arguments: Any) -> None:
    """Use an earlier theorem at these arguments: show what it assumes, and take its claim as known.

    Raises
    ------
    ProofError
        When the theorem comes after the one being proved, or its assumptions are not known.
    """
    if not symbolic.proving():
        return
    if list(REGISTRY).index(earlier.id) >= list(REGISTRY).index(_current[-1]):
        raise ProofError(f"{_current[-1]} may not rest on {earlier.id}, which comes after it")

    def claim() -> bool:
        integers = arguments[1 if earlier.cases else 0 :]
        _assume_least(integers, earlier)
        return earlier.claim(*arguments)

    symbolic.use(claim)


def _least(claim: Callable[..., bool], cases: Sequence[Any]) -> dict[str, Least]:
    hints = get_type_hints(claim, include_extras=True)
    names = list(inspect.signature(claim).parameters)[1 if cases else 0 :]
    return {name: get_args(hints[name])[1] for name in names}


def _assume_least(values: Iterable[Any], one: Theorem) -> None:
    for value, least in zip(values, one.least.values(), strict=True):
        if isinstance(least, int):
            assume(value >= least)


_current: Final[list[str]] = []
"""Theorems being proved, by id."""


def one_more(name: str) -> Wrong:
    """Return a wrong formula: the function, its result (of a pair, the last part) one too large."""
    right = _function(name)

    def formula(*arguments: Any) -> Any:
        result = right(*arguments)
        if isinstance(result, tuple):
            return (*result[:-1], result[-1] + 1)
        return None if result is None else result + 1

    return Wrong(f"{name} + 1", formula, name)


def check(one: Theorem) -> Result:
    """Try the witness, the proof and every wrong formula, in this order, and return the result."""
    started = time.monotonic()
    kills: list[Kill] = []
    verdict = _witness_problem(one) or _proof_problem(one)
    if verdict is None:
        kills = [Kill(wrong.name, refute(one, wrong)) for wrong in one.to_refute]
        survivors = [kill.wrong for kill in kills if kill.refuted_by is None]
        if survivors:
            verdict = f"survived by a wrong formula: {', '.join(survivors)}"
        elif not kills:
            verdict = "no wrong formula is refuted by it"
    return Result(
        id=one.id,
        proves=list(one.proves),
        statement=one.statement,
        method=one.method,
        verdict=verdict or CONFIRMED,
        seconds=round(time.monotonic() - started, 2),
        witness=one.witness,
        kills=kills,
    )


def _witness_problem(one: Theorem) -> str | None:
    for case in one.cases or (None,):
        try:
            holds = one.claim(*_arguments(case, one.witness.values(), one.least.values()))
        except Abandoned:
            return f"its assumptions are not met by its witness{_of(case)}"
        if not holds:
            return f"false for its witness{_of(case)}"
    return None


def _proof_problem(one: Theorem) -> str | None:
    if one.contract_of is not None:
        problem = contract_problem(one.contract_of)
        return None if problem is None else f"not confirmed: {problem}"
    for case in one.cases or (None,):

        def run(case: Any = case) -> str | None:
            values = [symbolic.unknown(name, least == "real") for name, least in one.least.items()]
            _assume_least(values, one)
            return symbolic.established(one.claim(*(values if case is None else [case, *values])))

        _current.append(one.id)
        try:
            with _free(one.free):
                _, problem = symbolic.every_path(run, one.native)
        except ProofError as error:
            problem = str(error)
        finally:
            _current.pop()
        if problem is not None:
            return f"not confirmed{_of(case)}: {problem}"
    return None


def refute(one: Theorem, wrong: Wrong) -> dict[str, int | str] | None:
    """Return the smallest integers, by their sum, for which the claim fails with the wrong formula.

    Returns
    -------
    dict, or None
        The integers by parameter, and the `case` if there are cases; None when nothing that was
        tried refutes the formula.
    """
    claim = one.claim if wrong.of is not None else wrong.formula
    least = _least(claim, one.cases)
    tries = 0
    with _in_place(wrong):
        for values in _small(least.values()) if wrong.point is None else [wrong.point.values()]:
            for case in one.cases or (None,):
                tries += 1
                try:
                    holds = bool(claim(*_arguments(case, values, least.values())))
                except Abandoned:
                    continue
                except (ZeroDivisionError, IndexError, TypeError):
                    holds = False
                if not holds:
                    found: dict[str, int | str] = dict(zip(least, values, strict=True))
                    return found if case is None else {"case": str(case), **found}
            if tries > MAX_TRIES:
                break
    return None


def _small(least: Iterable[Least]) -> Iterator[tuple[int, ...]]:
    """All tuples from the least on, by rising sum, then in order."""
    start = [low if isinstance(low, int) else MIN_TRIED for low in least]
    for total in count():
        for above in _summing_to(total, len(start)):
            yield tuple(low + more for low, more in zip(start, above, strict=True))


def _summing_to(total: int, parts: int) -> Iterator[tuple[int, ...]]:
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for others in _summing_to(total - first, parts - 1):
            yield (first, *others)


def _arguments(case: Any, values: Iterable[int], least: Iterable[Least]) -> list[Any]:
    """The case, if any, and the values, where a real number is meant as one."""
    pairs = zip(values, least, strict=True)
    exact = [Fraction(value) if low == "real" else value for value, low in pairs]
    return exact if case is None else [case, *exact]


def _of(case: Any) -> str:
    return "" if case is None else f" (case {case})"


def _function(name: str) -> Callable[..., Any]:
    module, _, function = name.rpartition(".")
    found: Callable[..., Any] = getattr(importlib.import_module(f"helix_spec.{module}"), function)
    return found


@contextmanager
def _in_place(wrong: Wrong) -> Iterator[None]:
    if wrong.of is None:
        yield
        return
    module, _, function = wrong.of.rpartition(".")
    with _put(module, function, wrong.formula):
        yield


@contextmanager
def _free(names: Sequence[str]) -> Iterator[None]:
    if not names:
        yield
        return
    module, _, function = names[0].rpartition(".")
    with _put(module, function, symbolic.free_function(function)), _free(names[1:]):
        yield


@contextmanager
def _put(module: str, function: str, formula: Callable[..., Any]) -> Iterator[None]:
    home = importlib.import_module(f"helix_spec.{module}")
    right = getattr(home, function)
    setattr(home, function, formula)
    try:
        yield
    finally:
        setattr(home, function, right)
