"""The theorems count only what they prove: the prover is sound, the catalog is whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import pytest

z3 = pytest.importorskip("z3")

from helix_spec import placement  # noqa: E402  # after the check that z3 is there
from helix_spec.layouts import named_layout  # noqa: E402
from helix_spec.theorems import base, catalog, crosshair, symbolic  # noqa: E402
from helix_spec.theorems.base import (  # noqa: E402
    REGISTRY,
    Integer,
    Natural,
    Size,
    Theorem,
    Wrong,
    assume,
    check,
    lemma,
)

THEOREMS = catalog.theorems()
TRIED = 400
"""Small cases on which each claim is tried out."""


# The catalog is whole.


def test_the_manifest_lists_exactly_the_theorems() -> None:
    """In the same order, which is the order of use."""
    assert catalog.manifest() == list(THEOREMS)


def test_every_contract_has_a_theorem() -> None:
    """A contract in a docstring that nobody confirms would promise too much."""
    assert catalog.contracts_without_theorem() == []


def test_every_closed_form_off_by_one_is_refuted_by_some_theorem() -> None:
    """So changing any of them by one fails a theorem that names it."""
    about = {name for one in THEOREMS.values() for name in one.about}
    assert set(catalog.closed_forms()) - about == set()


def test_every_wrong_formula_is_refuted_by_some_theorem() -> None:
    """None is written down and then forgotten."""
    used = {wrong.name for one in THEOREMS.values() for wrong in one.kills}
    assert [wrong.name for wrong in catalog.wrong_formulas() if wrong.name not in used] == []


def test_wrong_formulas_have_names_of_their_own() -> None:
    """The table shows each once."""
    claims = [wrong.name for one in THEOREMS.values() for wrong in one.wrong_claims]
    names = claims + [wrong.name for wrong in catalog.wrong_formulas()]
    assert len(set(names)) == len(names)


def test_every_theorem_has_a_statement_and_something_to_refute() -> None:
    """Prose comes first, and no proof is empty."""
    for one in THEOREMS.values():
        assert one.statement.endswith((".", ".)")), one.id
        assert one.to_refute, one.id


# The claims are true where they can be tried out, which needs no prover.


@pytest.mark.parametrize(
    "one",
    [
        pytest.param(one, id=id, marks=pytest.mark.holds(*one.proves))
        for id, one in THEOREMS.items()
    ],
)
def test_every_claim_holds_on_small_numbers(one: Theorem) -> None:
    """The same text as in the proof, on plain numbers."""
    tried = 0
    for values in islice(base._small(one.least.values()), 4 * TRIED):
        for case in one.cases or (None,):
            try:
                holds = one.claim(*base._arguments(case, values, one.least.values()))
            except base.Abandoned:
                continue
            assert holds, (case, values)
            tried += 1
        if tried > TRIED:
            break


# The prover is sound: what is wrong stays unproved.


def _wrong_with_their_theorems() -> Iterator[Any]:
    """All wrong formulas that a proof runs itself (not those that it leaves to other theorems)."""
    for one in THEOREMS.values():
        for wrong in one.to_refute if one.method == "z3" and not one.free else ():
            yield pytest.param(one, wrong, id=f"{one.id}: {wrong.name}")


@pytest.mark.parametrize(("one", "wrong"), list(_wrong_with_their_theorems()))
def test_no_wrong_formula_is_proved(
    one: Theorem, wrong: Wrong, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The proof itself fails where the formula is wrong; the search for numbers has no part."""
    monkeypatch.setattr(symbolic, "CLAIM_ROUNDS", 8)  # right ones take one or two
    with base._in_place(wrong):
        meant = one if wrong.of is not None else replace(one, claim=wrong.formula)
        assert base._proof_problem(meant) is not None


def problem(claim: Callable[..., bool], **others: Any) -> str | None:
    """What stands against a claim; None when it is proved."""
    return base._proof_problem(Theorem("tried", (), "It is tried.", claim, {}, **others))


@pytest.mark.parametrize("divisor", [1, 2, 3, 7])
@pytest.mark.parametrize("dividend", [-8, -7, -1, 0, 1, 6, 7, 20])
def test_division_is_python_s(dividend: int, divisor: int) -> None:
    """`//` and `%` on unknowns round down, below 0 too, also where the divisor is unknown."""

    def run() -> str | None:
        x, y = symbolic.unknown("x"), symbolic.unknown("y")
        assume(x == dividend, y == divisor)
        q, r = divmod(x, y)
        same = (q == dividend // divisor) & (r == dividend % divisor)
        return symbolic.established(same & (x // divisor == q) & (x % divisor == r))

    assert symbolic.every_path(run)[1] is None


def test_division_by_what_may_be_zero_is_no_proof() -> None:
    """What Python would raise on is not proved."""

    def claim(x: Natural, y: Natural) -> bool:
        return x // y >= 0

    assert "not known to be positive" in str(problem(claim))


def test_a_false_claim_comes_with_values() -> None:
    """Z3's values are real ones: products are what they should be."""

    def claim(x: Natural, y: Size) -> bool:
        return x % y < y - 1

    assert "false for [" in str(problem(claim))


def test_branches_are_all_walked() -> None:
    """A claim that fails on one branch alone is not proved."""

    def claim(x: Integer) -> bool:
        return not (x > 5 and x < 7)

    assert "false for [x = 6]" in str(problem(claim))


def test_a_lemma_needs_what_it_assumes() -> None:
    """A theorem used outside of its assumptions ends the proof."""

    def claim(rank: Natural, c: Size, i: Size) -> bool:
        lemma(REGISTRY["chunk-count-base"], rank, c, i)  # which assumes rank < c
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "tried", Theorem("tried", (), "", claim, {}))
        assert "what it assumes is not known" in str(problem(claim))


def test_a_lemma_comes_before_what_rests_on_it() -> None:
    """No theorem rests on itself, by whatever detour."""

    def claim(c: Size, i: Size) -> bool:
        lemma(REGISTRY["tried"], c, i)
        return True

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(REGISTRY, "tried", Theorem("tried", (), "", claim, {}))
        assert "may not rest on tried" in str(problem(claim))


def test_free_functions_know_nothing_but_their_arguments() -> None:
    """What holds of a function's body is not known of the free function of that name."""

    def alike(length: Natural, c: Size) -> bool:
        one = placement.chunk_local_len(length, 0, c, 1)
        return one == placement.chunk_local_len(length + 1 - 1, 0, c, 1)

    def not_negative(length: Natural, c: Size) -> bool:
        return placement.chunk_local_len(length, 0, c, 1) >= 0

    free = {"free": ("placement.chunk_local_len",)}
    assert problem(alike, **free) is None
    assert problem(not_negative) is None
    assert problem(not_negative, **free) is not None


# What keeps a theorem from being confirmed.


def _theorem(claim: Callable[..., bool], **others: Any) -> Theorem:
    return Theorem("tried", ("LEN-1",), "It is tried.", claim, {"x": 1}, **others)


def _grows(x: Natural) -> bool:
    assume(x > 0)
    return x + 1 > 1


def _wrong(x: Natural) -> bool:
    return x > 3


def test_a_theorem_with_all_that_it_needs_is_confirmed() -> None:
    """Witness, proof, and a wrong claim with the smallest number that refutes it."""
    result = check(_theorem(_grows, wrong_claims=[Wrong("above 3", _wrong)]))
    assert result.verdict == base.CONFIRMED
    assert result.kills[0].refuted_by == {"x": 0}


def test_a_witness_outside_the_assumptions_is_reported() -> None:
    """Assumptions that nothing meets prove anything."""
    one = replace(_theorem(_grows, wrong_claims=[Wrong("above 3", _wrong)]), witness={"x": 0})
    assert check(one).verdict == "its assumptions are not met by its witness"


def test_a_theorem_that_refutes_nothing_is_reported() -> None:
    """It would hold of anything."""
    assert check(_theorem(_grows)).verdict == "no wrong formula is refuted by it"


def test_a_wrong_formula_that_is_right_is_reported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small numbers are tried to the end, then it is a survivor."""
    monkeypatch.setattr(base, "MAX_TRIES", 50)
    one = _theorem(_grows, wrong_claims=[Wrong("the same again", _grows)])
    assert check(one).verdict == "survived by a wrong formula: the same again"


@pytest.mark.parametrize("name", catalog.closed_forms())
def test_each_closed_form_off_by_one_fails_a_theorem(name: str) -> None:
    """With the function one too large, a theorem about it is not confirmed, whatever the cause."""
    one = next(one for one in THEOREMS.values() if name in one.about and one.method == "z3")
    with base._in_place(base.one_more(name)):
        assert check(replace(one, about=(), kills=(), wrong_claims=[])).verdict != base.CONFIRMED
        assert base._witness_problem(one) or base._proof_problem(one)


# CrossHair's reports, read strictly.


@pytest.mark.parametrize(
    ("reports", "said"),
    [
        (["info: Confirmed over all paths."], None),
        ([], "reached 0 of 1"),
        (["info: Not confirmed."], "Not confirmed."),
        (["info: Unable to meet precondition."], "Unable to meet precondition."),
        (["error: false when calling f(0) (which returns 1)"], "false when calling f(0)"),
        (["info: Confirmed over all paths."] * 2, "reached 2 of 1"),
    ],
)
def test_only_confirmed_postconditions_count(reports: list[str], said: str | None) -> None:
    """One line for each, and none that says less."""
    lines = "".join(f"a.py:{at}: {report}" + chr(10) for at, report in enumerate(reports, 1))
    found = crosshair.read_report(lines, "", 1)
    assert found is None if said is None else said in str(found)


def test_a_function_without_contract_is_reported() -> None:
    """CrossHair itself would say nothing and exit with 0."""
    assert (
        crosshair.contract_problem("placement.local_len") == "placement.local_len has no contract"
    )


# What the text says in numbers.


@pytest.mark.holds("PAGE-1")
def test_capacity_of_100_slots() -> None:
    """100 slots a rank at T=32, C=4 are 3 pages: 384 tokens; 401 need 4 pages, 128 slots."""
    layout = named_layout("pr17866", cp_size=4, tokens_per_block=32)
    assert placement.capacity(layout, [100 // 32] * 4, 1) == 384
    assert placement.pages_needed(layout, 1, 400, 0) == 4
