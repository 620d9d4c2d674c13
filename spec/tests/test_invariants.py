"""The invariants as predicates: each holds where it should, and can fail."""

import pytest

from helix_spec import invariants as inv
from helix_spec.layouts import named_layout

PR9757 = named_layout("pr9757", cp_size=4, tokens_per_block=2)
BALANCED = named_layout("balanced", cp_size=4, tokens_per_block=2)
LAST = named_layout("before_9757", cp_size=4, tokens_per_block=2)


def test_every_invariant_has_its_sentence():
    """SPEC.md defines every number in one paragraph; an unknown number has none."""
    for number in inv.NUMBERS:
        assert inv.sentence(number).startswith(f"{number} (")
    with pytest.raises(KeyError, match="OWN-9"):
        inv.sentence("OWN-9")


@pytest.mark.parametrize(
    ("predicate", "right", "wrong"),
    [
        pytest.param(predicate, right, wrong, marks=pytest.mark.holds(number))
        for number, predicate, right, wrong in [
            ("OWN-2", inv.own_2, ([False, True],), [([True, True],), ([False, False],)]),
            ("BAL-1", inv.bal_1, (BALANCED, [4, 4, 3, 2]), [(BALANCED, [5, 4, 3, 2])]),
            ("BAL-1", inv.bal_1, (PR9757, [9, 4, 4, 4]), [(PR9757, [10, 4, 4, 4])]),
            ("BAL-2", inv.bal_2, (PR9757, [2, 2, 1, 0]), [(PR9757, [3, 0, 0, 0])]),
            ("BAL-2", inv.bal_2, (LAST, [0, 0, 0, 9]), [(LAST, [1, 0, 0, 9])]),
            ("BAL-3", inv.bal_3, ([[2, 0], [0, 2]],), [([[2, 0], [1, 1]],)]),
            ("PAGE-3", inv.page_3, (3, {0: [1], 1: [1, 2]}, 5), [(3, {0: [1]}, 5)]),
            ("PAGE-3", inv.page_3, (3, {0: [1], 1: [1, 2]}, 5), [(4, {0: [1], 1: [2]}, 5)]),
        ]
    ],
)
def test_predicate_holds_and_fails(predicate, right, wrong):
    """Each predicate accepts what is right and rejects each way of being wrong."""
    assert predicate(*right)
    for arguments in wrong:
        assert not predicate(*arguments), arguments


@pytest.mark.holds("BAL-1")
def test_spread_bounds_are_those_of_the_text():
    """BAL-1's bounds by layout; with one rank there is no spread."""
    bounds = {"pr17866": 2, "pr13180": 4, "pr9757": 5, "balanced": 2, "before_9757": None}
    assert {
        name: inv.spread_bound(named_layout(name, cp_size=4, tokens_per_block=2)) for name in bounds
    } == bounds
    vllm = named_layout("vllm_dcp", cp_size=4, tokens_per_block=8, interleave=2)
    assert inv.spread_bound(vllm) == 2
    assert inv.spread_bound(named_layout("pr9757", cp_size=1, tokens_per_block=2)) == 0


def test_every_invariant_names_the_profiles_that_check_it() -> None:
    """In SPEC.md's own words, in the order of the profiles."""
    assert inv.profiles_of("OWN-1") == ("placement", "cache")
    assert inv.profiles_of("LIVE-1") == ("every",)
    assert all(inv.profiles_of(number) for number in inv.NUMBERS)
