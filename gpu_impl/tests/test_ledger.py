"""The ledger: worked examples, invariants under random traffic, and refusals."""

import copy
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_gpu.dealing import deal_prompt
from helix_gpu.ledger import Ledger
from helix_gpu.refusals import Refused
from helix_spec.events import Reason
from helix_spec.layouts import (
    NAMED_LAYOUTS,
    DecodeOwner,
    Layout,
    PromptSplit,
    Start,
    named_layout,
    parse_layout,
)

PLENTY = 10_000


def ledger(text: str, pages: list[int] | None = None, max_len: int = 10_000) -> Ledger:
    """A ledger for a layout identifier, of plenty of pages unless said."""
    layout = parse_layout(text)
    return Ledger(layout, pages or [PLENTY] * layout.cp_size, max_len)


def decode(book: Ledger, *ids: int) -> list[int]:
    """One step for these requests; the owners."""
    step = book.plan_step(ids, [1] * len(ids))
    book.advance(step)
    owners: list[int] = step.owners.tolist()
    return owners


def started(text: str, prompt_len: int, **kwargs: Any) -> Ledger:
    """A ledger with request 0 of this prompt."""
    book = ledger(text, **kwargs)
    book.admit(book.plan_admit(0, prompt_len))
    return book


def state(book: Ledger) -> Any:
    """Everything that the ledger holds, comparable."""
    return copy.deepcopy(
        {name: x.tobytes() if isinstance(x, np.ndarray) else x for name, x in vars(book).items()}
    )


def reason(book: Ledger, attempt: str, *args: Any) -> Reason:
    """Why the ledger refuses; nothing may have changed."""
    before = state(book)
    with pytest.raises(Refused) as refused:
        getattr(book, attempt)(*args)
    assert before == state(book)
    return refused.value.reason


def test_pr9757_example() -> None:
    """L=400, T=100, C=4: steps 100r to 100r + 99 belong to rank r, and all end with 200."""
    book = started("pr9757/1:C=4,T=100", 400)
    assert [n // 100 for n in range(400)] == [decode(book, 0)[0] for _ in range(400)]
    assert [200] * 4 == book.local_lens([0])[0].tolist()


def test_before_9757_example() -> None:
    """Under before_9757 the last rank takes every step."""
    book = started("before_9757/1:C=4,T=100", 400)
    assert [3] * 400 == [decode(book, 0)[0] for _ in range(400)]
    assert [100, 100, 100, 500] == book.local_lens([0])[0].tolist()


@pytest.mark.parametrize(
    ("name", "owners", "after_2"),
    [
        ("pr13180", [0, 0, 1, 1, 2, 2, 3, 3], [6, 4, 3, 2]),
        ("pr17866", [2, 3, 3, 0, 0, 1, 1, 2], [4, 4, 4, 3]),
    ],
)
def test_round_robin_example(name: str, owners: list[int], after_2: list[int]) -> None:
    """L=13, T=2, C=4: owners of steps 0 to 7, lengths after 2 and after 8 steps."""
    book = started(f"{name}/1:C=4,T=2", 13)
    assert owners[:2] == [decode(book, 0)[0] for _ in range(2)]
    assert after_2 == book.local_lens([0])[0].tolist()
    assert owners[2:] == [decode(book, 0)[0] for _ in range(6)]
    assert [6, 6, 5, 4] == book.local_lens([0])[0].tolist()


def test_lockstep_capacity_example() -> None:
    """T=32, C=4, 3 pages a rank hold 384 global tokens; 401 need 4 pages on each rank."""
    small = started("pr17866/1:C=4,T=32", 383, pages=[3] * 4)
    decode(small, 0)
    assert Reason.OUT_OF_PAGES == reason(small, "plan_step", [0], [1])
    assert Reason.OUT_OF_PAGES == reason(small, "plan_admit", 1, 401)
    assert [4] * 4 == started("pr17866/1:C=4,T=32", 401, pages=[4] * 4).held([0])[0].tolist()


def test_rotated_start_shifts_each_admission() -> None:
    """Under `rotated`, request k of equal length starts k ranks further; released ones count."""
    book = ledger("balanced/1:C=4,T=2")
    for id in range(5):
        book.admit(book.plan_admit(id, 3))
    book.release(4)
    book.admit(book.plan_admit(5, 3))
    lengths = [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2]]
    assert [*lengths, lengths[1]] == [book.local_lens([id])[0].tolist() for id in (0, 1, 2, 3, 5)]
    assert [1, 2, 3, 0, 2] == decode(book, 0, 1, 2, 3, 5)


@pytest.mark.parametrize(
    "text", ["pr17866/1:C=3,T=2", "vllm_dcp/1:C=3,T=4,I=2", "balanced/1:C=3,T=2"]
)
def test_decoding_goes_on_as_the_prompt_was_dealt(text: str) -> None:
    """Under these rules n steps after a prompt of L leave what a prompt of L + n would."""
    for prompt_len in range(1, 14):
        book = started(text, prompt_len)
        for n in range(1, 14):
            decode(book, 0)
            hands = deal_prompt(book.layout, prompt_len + n, 0)
            assert [hand.tokens for hand in hands] == book.local_lens([0])[0].tolist()


@st.composite
def layouts(draw: st.DrawFn) -> Layout:
    """Named layouts and lazy custom ones, of small sizes."""
    c, t = draw(st.integers(1, 5)), draw(st.sampled_from([1, 2, 4]))
    if draw(st.booleans()):
        name = draw(st.sampled_from(list(NAMED_LAYOUTS)))
        return named_layout(name, cp_size=c, tokens_per_block=t)
    prompt = draw(st.sampled_from(get_args(PromptSplit)))
    owner = draw(st.sampled_from(get_args(DecodeOwner)))
    return Layout(
        prompt,
        owner,
        "lazy",
        draw(st.sampled_from(get_args(Start))),
        c,
        t,
        prompt_interleave=1 if prompt == "interleave" else None,
        owner_interleave=1 if owner == "interleave" else None,
    )


@given(
    layouts(), st.lists(st.tuples(st.integers(1, 30), st.integers(0, 20)), min_size=1, max_size=5)
)
def test_counters_agree_with_each_other(layout: Layout, traffic: list[tuple[int, int]]) -> None:
    """Lengths sum to the total, positions go on from L, pages follow the policy, none is lost."""
    book = ledger(str(layout))
    c, t = book.layout.cp_size, book.layout.tokens_per_block
    total = dict(enumerate(prompt_len for prompt_len, _ in traffic))
    for id, prompt_len in total.items():
        book.admit(book.plan_admit(id, prompt_len))
    for n in range(max(steps for _, steps in traffic)):
        ids = [id for id, (_, steps) in enumerate(traffic) if n < steps]
        step = book.plan_step(ids, [1] * len(ids))
        book.advance(step)
        assert [total[id] for id in ids] == step.positions.tolist()
        for i, id in enumerate(ids):
            total[id] += 1
            grown = book.local_lens([id])[0] - step.past_lens[i]
            assert [r == step.owners[i] for r in range(c)] == grown.astype(bool).tolist()
    for id in total:
        lengths = book.local_lens([id])[0]
        assert total[id] == lengths.sum()
        pages = -(-lengths // t)
        if book.layout.pages == "lockstep":
            assert (pages <= book.held([id])[0]).all()
            pages = np.full(c, -(-total[id] // (t * c)))
        assert pages.tolist() == book.held([id])[0].tolist()
    assert [PLENTY] * c == (book.free + sum(book.held([id])[0] for id in total)).tolist()
    for id in total:
        book.release(id)
    assert [PLENTY] * c == book.free.tolist()


@pytest.mark.parametrize(
    ("expected", "id", "prompt_len"),
    [
        (Reason.DUPLICATE_REQUEST, 0, 0),
        (Reason.EMPTY_PROMPT, 1, 0),
        (Reason.EMPTY_PROMPT, 1, -(2**53)),
        (Reason.TOO_LONG, 1, 2**53),
        (Reason.OUT_OF_PAGES, 1, 10_000),
    ],
)
def test_admit_refusals(expected: Reason, id: int, prompt_len: int) -> None:
    """The first reason in order is given, nothing changes, and rotation does not count it."""
    book = started("balanced/1:C=4,T=2", 3, pages=[9, 9, 9, 8])
    assert expected == reason(book, "plan_admit", id, prompt_len)


@pytest.mark.parametrize(
    ("expected", "ids", "query_lens", "pad"),
    [
        (Reason.UNSUPPORTED, [0, 0], [0, 2], 0),
        (Reason.UNSUPPORTED, [], [2], 0),
        (Reason.BAD_COUNT, [], [], 0),
        (Reason.BAD_COUNT, [0], [], 0),
        (Reason.BAD_COUNT, [0], [0], 0),
        (Reason.BAD_COUNT, [9], [1], -1),
        (Reason.DUPLICATE_REQUEST, [9, 0, 9], [1, 1, 1], 0),
        (Reason.UNKNOWN_REQUEST, [2, 9], [1, 1], 0),
        (Reason.TOO_LONG, [0, 2], [1, 1], 0),
        (Reason.OUT_OF_PAGES, [0, 1], [1, 1], 3),
    ],
)
def test_step_refusals(expected: Reason, ids: list[int], query_lens: list[int], pad: int) -> None:
    """The first reason in order is given, for the whole batch, and nothing changes."""
    book = ledger("pr9757/1:C=2,T=2", pages=[6, 20], max_len=12)
    for id, prompt_len in enumerate([4, 4, 12]):
        book.admit(book.plan_admit(id, prompt_len))
    assert [1, 15] == book.free.tolist()
    assert expected == reason(book, "plan_step", ids, query_lens, pad)


def test_release_refuses_the_unknown() -> None:
    """A request that is not live cannot be released, looked at or decoded."""
    book = started("pr9757/1:C=2,T=2", 3)
    book.release(0)
    assert Reason.UNKNOWN_REQUEST == reason(book, "release", 0)
    for attempt in ("local_lens", "held", "rows"):
        assert Reason.UNKNOWN_REQUEST == reason(book, attempt, [0])


def test_need_is_counted_over_the_batch() -> None:
    """Two requests that each fit alone are refused together when one page is left."""
    book = ledger("pr9757/1:C=2,T=2", pages=[3, 3])
    for id in (0, 1):
        book.admit(book.plan_admit(id, 4))
    assert Reason.OUT_OF_PAGES == reason(book, "plan_step", [0, 1], [1, 1])
    assert [0] == decode(book, 1)


def test_a_plan_changes_nothing() -> None:
    """Planning a step or an admission, which is what `skip` does, leaves the ledger as it was."""
    book = started("pr17866/1:C=2,T=2", 4)
    before = state(book)
    book.plan_step([0], [1], pad=5)
    book.plan_admit(1, 7)
    assert before == state(book)


def test_rows_are_recycled() -> None:
    """A row used again starts from its new request alone, and rows stay few."""
    book = ledger("pr9757/1:C=2,T=2")
    for id in range(100):
        book.admit(book.plan_admit(id, 1 + id % 5))
        decode(book, id)
        assert [id] == book.ids
        assert 2 + id % 5 == book.local_lens([id])[0].sum()
        assert 0 == book.rows([id])[0]
        book.release(id)


def test_growth_keeps_what_was_there() -> None:
    """Requests keep their lengths while the arrays double under them."""
    book = ledger("pr9757/1:C=2,T=2")
    for id in range(50):
        book.admit(book.plan_admit(id, id + 1))
    assert [id + 1 for id in range(50)] == [book.local_lens([id])[0].sum() for id in range(50)]
    assert 50 == len({book.rows([id])[0] for id in range(50)})
