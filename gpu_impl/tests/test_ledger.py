"""The ledger: worked examples, invariants under random traffic, and refusals."""

import copy
from typing import Any, get_args

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_gpu.bookkeeping.dealing import deal_prompt
from helix_gpu.bookkeeping.ledger import Ledger
from helix_gpu.bookkeeping.refusals import Refused
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
    assert state(book) == before
    return refused.value.reason


@pytest.mark.holds("OWN-3", "LEN-1")
def test_pr9757_example() -> None:
    """L=400, T=100, C=4: steps 100r to 100r + 99 belong to rank r, and all end with 200."""
    book = started("pr9757/1:C=4,T=100", 400)
    assert [decode(book, 0)[0] for _ in range(400)] == [n // 100 for n in range(400)]
    assert book.local_lens([0])[0].tolist() == [200] * 4


@pytest.mark.holds("OWN-3", "LEN-1")
def test_before_9757_example() -> None:
    """Under before_9757 the last rank takes every step."""
    book = started("before_9757/1:C=4,T=100", 400)
    assert [decode(book, 0)[0] for _ in range(400)] == [3] * 400
    assert book.local_lens([0])[0].tolist() == [100, 100, 100, 500]


@pytest.mark.holds("OWN-3", "LEN-1")
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
    assert [decode(book, 0)[0] for _ in range(2)] == owners[:2]
    assert book.local_lens([0])[0].tolist() == after_2
    assert [decode(book, 0)[0] for _ in range(6)] == owners[2:]
    assert book.local_lens([0])[0].tolist() == [6, 6, 5, 4]


@pytest.mark.holds("PAGE-1", "REF-2")
def test_lockstep_capacity_example() -> None:
    """T=32, C=4, 3 pages a rank hold 384 global tokens; 401 need 4 pages on each rank."""
    small = started("pr17866/1:C=4,T=32", 383, pages=[3] * 4)
    decode(small, 0)
    assert reason(small, "plan_step", [0], [1]) == Reason.OUT_OF_PAGES
    assert reason(small, "plan_admit", 1, 401) == Reason.OUT_OF_PAGES
    assert started("pr17866/1:C=4,T=32", 401, pages=[4] * 4).held([0])[0].tolist() == [4] * 4


@pytest.mark.holds("OWN-3", "LEN-1", "BAL-3")
def test_rotated_start_shifts_each_admission() -> None:
    """Under `rotated`, request k of equal length starts k ranks further; released ones count."""
    book = ledger("balanced/1:C=4,T=2")
    for id in range(5):
        book.admit(book.plan_admit(id, 3))
    book.release(4)
    book.admit(book.plan_admit(5, 3))
    lengths = [[2, 1, 0, 0], [0, 2, 1, 0], [0, 0, 2, 1], [1, 0, 0, 2]]
    assert [book.local_lens([id])[0].tolist() for id in (0, 1, 2, 3, 5)] == [*lengths, lengths[1]]
    assert decode(book, 0, 1, 2, 3, 5) == [1, 2, 3, 0, 2]


@pytest.mark.holds("LEN-1")
@pytest.mark.parametrize(
    "text", ["pr17866/1:C=3,T=2", "vllm_dcp/1:C=3,T=4,I=2", "balanced/1:C=3,T=2"]
)
def test_decoding_goes_on_as_the_prompt_was_dealt(text: str) -> None:
    """Under these rules n steps after a prompt of L leave what a prompt of L + n would."""
    for prompt_len in range(1, 14):
        book = started(text, prompt_len)
        for n in range(1, 14):
            decode(book, 0)
            shards = deal_prompt(book.layout, prompt_len + n, 0)
            assert book.local_lens([0])[0].tolist() == [shard.tokens for shard in shards]


@pytest.mark.holds("LEN-1", "POS-1", "OWN-3")
@pytest.mark.parametrize(
    "text", ["pr17866/1:C=3,T=256", "vllm_dcp/1:C=3,T=256,I=1", "balanced/1:C=3,T=256"]
)
def test_counters_hold_up_to_the_longest_request(text: str) -> None:
    """The last tokens before 2^31 - 1 are dealt as a prompt of that length, by counters alone."""
    longest = 2**31 - 1
    book = started(text, longest - 601, pages=[2**31] * 3, max_len=longest)
    for _ in range(300):
        decode(book, 0)
    step = book.plan_step([0], [301])
    book.advance(step)
    assert step.positions.tolist() == list(range(longest - 301, longest))
    shards = deal_prompt(book.layout, longest, 0)
    assert book.local_lens([0])[0].tolist() == [shard.tokens for shard in shards]
    assert reason(book, "plan_step", [0], [1]) == Reason.TOO_LONG


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


@pytest.mark.holds("LEN-1", "LEN-2", "POS-1", "PAGE-1", "PAGE-3")
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
        assert step.positions.tolist() == [total[id] for id in ids]
        for i, id in enumerate(ids):
            total[id] += 1
            grown = book.local_lens([id])[0] - step.past_lens[i]
            assert grown.astype(bool).tolist() == [r == step.owners[i] for r in range(c)]
    for id in total:
        lengths = book.local_lens([id])[0]
        assert lengths.sum() == total[id]
        pages = -(-lengths // t)
        if book.layout.pages == "lockstep":
            assert (pages <= book.held([id])[0]).all()
            pages = np.full(c, -(-total[id] // (t * c)))
        assert book.held([id])[0].tolist() == pages.tolist()
    assert (book.free + sum(book.held([id])[0] for id in total)).tolist() == [PLENTY] * c
    for id in total:
        book.release(id)
    assert book.free.tolist() == [PLENTY] * c


@pytest.mark.holds("PAGE-5", "REF-2")
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
    assert reason(book, "plan_admit", id, prompt_len) == expected


@pytest.mark.holds("PAGE-5", "REF-2")
@pytest.mark.parametrize(
    ("expected", "ids", "query_lens", "pad"),
    [
        (Reason.BAD_COUNT, [0, 0], [0, 2], 0),
        (Reason.BAD_COUNT, [], [2], 0),
        (Reason.BAD_COUNT, [], [], 0),
        (Reason.BAD_COUNT, [0], [], 0),
        (Reason.BAD_COUNT, [0], [0], 0),
        (Reason.BAD_COUNT, [9], [1], -1),
        (Reason.DUPLICATE_REQUEST, [9, 0, 9], [1, 1, 1], 0),
        (Reason.UNKNOWN_REQUEST, [2, 9], [1, 1], 0),
        (Reason.TOO_LONG, [0, 2], [1, 1], 0),
        (Reason.TOO_LONG, [0, 1], [1, 9], 0),
        (Reason.TOO_LONG, [0], [2**53], 0),
        (Reason.OUT_OF_PAGES, [0, 1], [1, 1], 3),
    ],
)
def test_step_refusals(expected: Reason, ids: list[int], query_lens: list[int], pad: int) -> None:
    """The first reason in order is given, for the whole batch, and nothing changes."""
    book = ledger("pr9757/1:C=2,T=2", pages=[6, 20], max_len=12)
    for id, prompt_len in enumerate([4, 4, 12]):
        book.admit(book.plan_admit(id, prompt_len))
    assert book.free.tolist() == [1, 15]
    assert reason(book, "plan_step", ids, query_lens, pad) == expected


@pytest.mark.holds("PAGE-5", "REF-2")
def test_release_refuses_the_unknown() -> None:
    """A request that is not live cannot be released, looked at or decoded."""
    book = started("pr9757/1:C=2,T=2", 3)
    book.release(0)
    assert reason(book, "release", 0) == Reason.UNKNOWN_REQUEST
    for attempt in ("local_lens", "held", "rows"):
        assert reason(book, attempt, [0]) == Reason.UNKNOWN_REQUEST


@pytest.mark.holds("PAGE-5", "REF-2")
def test_need_is_counted_over_the_batch() -> None:
    """Two requests that each fit alone are refused together when one page is left."""
    book = ledger("pr9757/1:C=2,T=2", pages=[3, 3])
    for id in (0, 1):
        book.admit(book.plan_admit(id, 4))
    assert reason(book, "plan_step", [0, 1], [1, 1]) == Reason.OUT_OF_PAGES
    assert decode(book, 1) == [0]


@pytest.mark.holds("PAGE-3")
def test_a_plan_changes_nothing() -> None:
    """Planning a step or an admission, which is what `skip` does, leaves the ledger as it was."""
    book = started("pr17866/1:C=2,T=2", 4)
    before = state(book)
    book.plan_step([0], [1], pad=5)
    book.plan_admit(1, 7)
    assert state(book) == before


def test_a_plan_cannot_be_changed() -> None:
    """What was decided about every refusal is what is applied: no field can be set."""
    book = ledger("pr9757/1:C=2,T=2")
    admission = book.plan_admit(0, 3)
    book.admit(admission)
    book.fork(0, 1)
    step = book.plan_step([0], [3])
    book.advance(step)
    for plan in (admission, step, step.shared[0], book.plan_accept(0, 1)):
        for field in plan._fields:
            with pytest.raises(AttributeError):
                setattr(plan, field, None)


def test_a_refusal_names_the_first_that_it_is_about() -> None:
    """Of several ranks without pages, and of several requests with nothing to sample."""
    book = ledger("pr9757/1:C=3,T=2", pages=[9, 1, 1])
    book.overlap = True
    with pytest.raises(Refused, match="cp_rank 1 would need 2 pages and has 1 free"):
        book.plan_admit(0, 12)
    for id in (5, 7, 8):
        book.admit(book.plan_admit(id, 1))
    decode(book, 5)
    with pytest.raises(Refused, match="Request 7 has no decode that is outstanding"):
        book.sampled([5, 7, 8])
    decode(book, 5)
    with pytest.raises(Refused, match="Request 5 has two decodes to be sampled already"):
        book.plan_step([7, 5, 8], [1, 1, 1])
    with pytest.raises(Refused, match="Request 8 is listed 2 times; once is allowed"):
        book.plan_step([7, 8, 8], [1, 1, 1])


@pytest.mark.holds("LEN-1")
def test_rows_are_recycled() -> None:
    """A row used again starts from its new request alone, and rows stay few."""
    book = ledger("pr9757/1:C=2,T=2")
    for id in range(100):
        book.admit(book.plan_admit(id, 1 + id % 5))
        decode(book, id)
        assert book.ids == [id]
        assert book.local_lens([id])[0].sum() == 2 + id % 5
        assert book.rows([id])[0] == 0
        book.release(id)


@pytest.mark.holds("LEN-1")
def test_growth_keeps_what_was_there() -> None:
    """Requests keep their lengths while the arrays double under them."""
    book = ledger("pr9757/1:C=2,T=2")
    for id in range(50):
        book.admit(book.plan_admit(id, id + 1))
    assert [book.local_lens([id])[0].sum() for id in range(50)] == [id + 1 for id in range(50)]
    assert len({book.rows([id])[0] for id in range(50)}) == 50


# Groups and rewinds


def grouped(book: Ledger, ids: list[int], query_lens: list[int]) -> Any:
    """One step of these groups; the plan that was applied."""
    step = book.plan_step(ids, query_lens)
    book.advance(step)
    return step


def accept(book: Ledger, id: int, kept: int) -> None:
    """Keep the first tokens of a group."""
    book.accept(book.plan_accept(id, kept))


@pytest.mark.holds("OWN-3", "LEN-1", "LEN-2", "POS-1", "PAGE-1", "PAGE-3")
def test_group_over_a_boundary_example() -> None:
    """SPEC 11.6: a group of four over an ownership and a page boundary, two of it kept."""
    book = started("vllm_dcp/1:C=2,T=4,I=2", 5)
    step = grouped(book, [0], [4])
    assert step.positions.tolist() == [5, 6, 7, 8]
    assert step.owners.tolist() == [0, 1, 1, 0]
    assert step.past_lens.tolist() == [[3, 2], [4, 2], [4, 3], [4, 4]]
    assert (book.local_lens([0])[0].tolist(), book.held([0])[0].tolist()) == ([5, 4], [2, 2])
    accept(book, 0, 2)
    assert (book.local_lens([0])[0].tolist(), book.held([0])[0].tolist()) == ([4, 3], [1, 1])
    assert book.free.tolist() == [PLENTY - 1] * 2
    assert [decode(book, 0)[0] for _ in range(2)] == [1, 0]


@pytest.mark.holds("OWN-3", "LEN-2", "POS-1", "PAGE-1")
@given(layouts(), st.lists(st.integers(1, 30), min_size=1, max_size=4), st.data())
def test_a_group_is_its_tokens_one_by_one(
    layout: Layout, prompts: list[int], data: st.DataObject
) -> None:
    """Ragged groups leave what single tokens leave, and say of each token what its step says."""
    whole, single = ledger(str(layout)), ledger(str(layout))
    for book in (whole, single):
        for id, prompt_len in enumerate(prompts):
            book.admit(book.plan_admit(id, prompt_len))
    ids = list(range(len(prompts)))
    for _ in range(3):
        lens = data.draw(st.lists(st.integers(1, 20), min_size=len(ids), max_size=len(ids)))
        step = grouped(whole, ids, lens)
        pages = np.zeros(layout.cp_size, dtype=int)
        for id, query_len in enumerate(lens):
            for nth in range(query_len):
                alone = grouped(single, [id], [1])
                place = step.firsts[id] + nth
                assert step.requests[place] == id
                assert step.positions[place] == alone.positions[0]
                assert step.owners[place] == alone.owners[0]
                assert step.past_lens[place].tolist() == alone.past_lens[0].tolist()
                pages += alone.pages
        assert step.pages.tolist() == pages.tolist()
        single._rows["group"][single.rows(ids)] = lens
        assert state(whole) == state(single)


@pytest.mark.holds("LEN-1", "PAGE-1", "PAGE-3")
@given(layouts(), st.integers(1, 40), st.integers(1, 30), st.data())
def test_a_rewind_leaves_what_the_kept_tokens_leave(
    layout: Layout, prompt_len: int, group: int, data: st.DataObject
) -> None:
    """After `accept` every counter is as if only the kept tokens had been decoded."""
    kept = data.draw(st.integers(1, group))
    rewound, never = ledger(str(layout)), ledger(str(layout))
    for book, query_len in ((rewound, group), (never, kept)):
        book.admit(book.plan_admit(0, prompt_len))
        grouped(book, [0], [query_len])
        accept(book, 0, min(kept, query_len))
    assert state(rewound) == state(never)


@pytest.mark.holds("PAGE-5", "REF-2")
@pytest.mark.parametrize(
    ("expected", "id", "kept"),
    [
        (Reason.BAD_COUNT, 9, 0),
        (Reason.BAD_COUNT, 0, 4),
        (Reason.BAD_COUNT, 2, -1),
        (Reason.UNKNOWN_REQUEST, 9, 1),
        (Reason.PREEMPTED_REQUEST, 2, 1),
        (Reason.NOTHING_OPEN, 1, 1),
    ],
)
def test_accept_refusals(expected: Reason, id: int, kept: int) -> None:
    """`kept` is looked at before the id, the open group last."""
    book = ledger("pr9757/1:C=2,T=2")
    for request in range(3):
        book.admit(book.plan_admit(request, 4))
    grouped(book, [0, 2], [3, 3])
    book.preempt(2)
    assert reason(book, "plan_accept", id, kept) == expected


@pytest.mark.holds("REF-2")
@pytest.mark.parametrize("ender", ["accept", "decode", "fork", "resume"])
def test_what_closes_a_group(ender: str) -> None:
    """An `accept`, a fork and a preemption close the group; the next decode opens its own."""
    book = started("pr9757/1:C=2,T=2", 3)
    grouped(book, [0], [5])
    if ender == "accept":
        accept(book, 0, 5)
    elif ender == "decode":
        decode(book, 0)
        assert reason(book, "plan_accept", 0, 2) == Reason.BAD_COUNT
        accept(book, 0, 1)
    elif ender == "fork":
        book.fork(0, 1)
        assert reason(book, "plan_accept", 1, 1) == Reason.NOTHING_OPEN
    else:
        book.preempt(0)
        book.admit(book.plan_resume(0))
    assert reason(book, "plan_accept", 0, 1) == Reason.NOTHING_OPEN


@pytest.mark.holds("REF-2")
def test_a_huge_group_is_refused_before_it_is_dealt() -> None:
    """A group of a billion tokens is refused at once, for no page could hold it."""
    book = started("pr9757/1:C=2,T=2", 3, max_len=2**31 - 1)
    assert reason(book, "plan_step", [0], [2**30]) == Reason.OUT_OF_PAGES


# Forks and copies


@pytest.mark.holds("PAGE-2", "PAGE-3", "PAGE-5", "REF-2")
def test_copy_on_write_example() -> None:
    """SPEC 11.7: three holders of one page write in one batch; the last writes in place."""
    book = started("pr9757/1:C=2,T=4", 2, pages=[3, 3])
    book.fork(0, 1)
    book.fork(0, 2)
    assert book.free.tolist() == [2, 3]
    book.free[0] = 1
    assert reason(book, "plan_step", [2, 0, 1], [1, 1, 1]) == Reason.OUT_OF_PAGES
    book.free[0] = 2
    step = grouped(book, [2, 0, 1], [1, 1, 1])
    assert [write.copies for write in step.shared] == [True, True, False]
    assert book.free.tolist() == [0, 3]
    assert grouped(book, [0, 1, 2], [1, 1, 1]).shared == []


@pytest.mark.holds("PAGE-2", "PAGE-3")
def test_need_sees_the_copies_of_those_before() -> None:
    """Two holders in one batch need one page; were each counted alone, it would be two."""
    book = started("pr9757/1:C=2,T=4", 2, pages=[2, 1])
    book.fork(0, 1)
    assert book.plan_step([0, 1], [1, 1]).pages.tolist() == [1, 0]
    assert book.plan_step([0], [1]).pages.tolist() == [1, 0]
    decode(book, 0, 1)
    assert book.free.tolist() == [0, 1]


@pytest.mark.holds("PAGE-2", "PAGE-3")
def test_lockstep_copies_on_every_rank() -> None:
    """Under lockstep one token in an open super-block replaces the page of all ranks."""
    book = started("pr17866/1:C=3,T=2", 7)
    book.fork(0, 1)
    step = grouped(book, [1], [1])
    assert [(w.rank, w.copies) for w in step.shared] == [(0, True), (1, True), (2, True)]
    assert step.pages.tolist() == [1] * 3
    assert book.free.tolist() == [PLENTY - 3] * 3


@pytest.mark.holds("PAGE-2")
def test_a_full_page_is_never_copied() -> None:
    """A fork at a page boundary opens pages of its own."""
    book = started("pr9757/1:C=2,T=2", 4)
    book.fork(0, 1)
    step = grouped(book, [0, 1], [4, 4])
    assert (step.shared, step.pages.tolist()) == ([], [2, 2])


@pytest.mark.holds("PAGE-2", "PAGE-3")
def test_a_copied_page_stays_copied() -> None:
    """After a rewind the request still has the page that it copied, and writes it in place."""
    book = started("pr9757/1:C=2,T=4", 2)
    book.fork(0, 1)
    grouped(book, [0], [6])
    accept(book, 0, 1)
    assert book.free.tolist() == [PLENTY - 2, PLENTY]
    assert grouped(book, [0], [1]).pages.tolist() == [0, 0]
    assert [write.copies for write in grouped(book, [1], [1]).shared] == [False]


@pytest.mark.holds("PAGE-3")
@pytest.mark.parametrize("order", [(0, 1, 2), (2, 1, 0), (1, 0, 2), (1, 2, 0)])
def test_shared_pages_go_back_with_their_last_holder(order: tuple[int, ...]) -> None:
    """Requests forked at different lengths: what is free is what no table of any rank needs."""
    book = started("pr13180/1:C=2,T=2", 9, pages=[40, 40])
    book.fork(0, 1)
    grouped(book, [0, 1], [5, 3])
    book.fork(0, 2)
    grouped(book, [0, 2], [7, 1])
    for id in order:
        book.release(id)
    assert book.free.tolist() == [40, 40]
    assert (book._prefixes, book._open_pages.holders) == ({}, {})


def test_a_long_line_of_forks_stays_small() -> None:
    """Forking on and on, the older request released each time, leaves no trail of counters."""
    book = started("pr9757/1:C=2,T=2", 9, pages=[2000, 2000])
    for id in range(1, 300):
        book.fork(id - 1, id)
        decode(book, id)
        if id > 2:
            book.release(id - 2)
    depth, prefix = 0, book._prefixes[int(book.rows([299])[0])]
    while prefix is not None:
        depth, prefix = depth + 1, prefix.below
    assert depth <= 3
    assert len(book._open_pages.holders) <= 4


@pytest.mark.holds("PAGE-5", "REF-2")
@pytest.mark.parametrize(
    ("expected", "parent", "child"),
    [
        (Reason.DUPLICATE_REQUEST, 9, 0),
        (Reason.DUPLICATE_REQUEST, 0, 1),
        (Reason.UNKNOWN_REQUEST, 9, 9),
        (Reason.PREEMPTED_REQUEST, 1, 9),
    ],
)
def test_fork_refusals(expected: Reason, parent: int, child: int) -> None:
    """A known child is refused before the parent is looked at; preempted requests are known."""
    book = started("pr9757/1:C=2,T=2", 3)
    book.admit(book.plan_admit(1, 3))
    book.preempt(1)
    assert reason(book, "fork", parent, child) == expected


# Preempted requests


@pytest.mark.holds("OWN-3", "LEN-1", "PAGE-3")
def test_resume_deals_all_tokens_as_a_prompt() -> None:
    """prompt_len becomes the total, the step index 0, the shift stays, no number is taken."""
    book = ledger("balanced/1:C=4,T=2")
    for id in range(2):
        book.admit(book.plan_admit(id, 3))
    grouped(book, [1], [6])
    before = book.local_lens([1])[0].tolist()
    book.preempt(1)
    assert (book.ids, list(book.preempted)) == ([0], [1])
    assert book.free.tolist() == [PLENTY - 1, PLENTY - 1, PLENTY, PLENTY]
    book.admit(book.plan_resume(1))
    assert book.local_lens([1])[0].tolist() == before
    assert (book.ids, list(book.preempted), book.admitted) == ([0, 1], [], 2)
    restarted = started("pr9757/1:C=4,T=2", 3)
    grouped(restarted, [0], [6])
    restarted.preempt(0)
    restarted.admit(restarted.plan_resume(0))
    assert restarted.local_lens([0])[0].tolist() == [4, 2, 2, 1]
    assert decode(restarted, 0) == [0]


@pytest.mark.holds("PAGE-5", "REF-2")
@pytest.mark.parametrize(
    ("expected", "attempt", "args"),
    [
        (Reason.UNKNOWN_REQUEST, "plan_resume", (9,)),
        (Reason.NOT_PREEMPTED, "plan_resume", (0,)),
        (Reason.OUT_OF_PAGES, "plan_resume", (1,)),
        (Reason.UNKNOWN_REQUEST, "preempt", (9,)),
        (Reason.PREEMPTED_REQUEST, "preempt", (1,)),
        (Reason.DUPLICATE_REQUEST, "plan_admit", (1, 0)),
        (Reason.PREEMPTED_REQUEST, "plan_step", ([1, 9], [1, 1])),
        (Reason.UNKNOWN_REQUEST, "plan_step", ([9, 1], [1, 1])),
        (Reason.UNKNOWN_REQUEST, "release", (9,)),
    ],
)
def test_refusals_around_preemption(expected: Reason, attempt: str, args: tuple[Any, ...]) -> None:
    """Of unknown and preempted ids the first in the list decides; a preempted id is known."""
    book = ledger("pr9757/1:C=2,T=2", pages=[3, 3])
    for id in range(2):
        book.admit(book.plan_admit(id, 4))
    book.preempt(1)
    grouped(book, [0], [5])
    assert book.free.tolist() == [0, 1]
    assert reason(book, attempt, *args) == expected


@pytest.mark.holds("PAGE-3", "REF-2")
def test_a_preempted_request_can_be_released() -> None:
    """Its id is then unknown, and no page goes back twice."""
    book = started("pr9757/1:C=2,T=2", 3)
    book.preempt(0)
    book.release(0)
    assert (list(book.preempted), book.free.tolist()) == ([], [PLENTY] * 2)
    assert reason(book, "plan_resume", 0) == Reason.UNKNOWN_REQUEST


# Overlap


def overlapped() -> Ledger:
    """A ledger whose scheduler runs one step ahead, with requests 0 and 1."""
    book = ledger("pr9757/1:C=2,T=2")
    book.overlap = True
    for id in range(2):
        book.admit(book.plan_admit(id, 3))
    return book


@pytest.mark.holds("REF-2")
def test_a_third_outstanding_decode_is_refused() -> None:
    """Two decodes may be outstanding; a third, also a skipped one, comes before other reasons."""
    book = overlapped()
    decode(book, 0)
    decode(book, 0)
    assert reason(book, "plan_step", [9, 0], [1, 1]) == Reason.BAD_COUNT
    book.sampled([0])
    decode(book, 0)
    book.preempt(0)
    book.admit(book.plan_resume(0))
    assert reason(book, "sampled", [0]) == Reason.NOTHING_OPEN


@pytest.mark.holds("REF-2")
def test_accept_waits_for_all_samples() -> None:
    """`accept` needs every decode sampled; a fork's child has none outstanding."""
    book = overlapped()
    grouped(book, [0], [3])
    assert reason(book, "plan_accept", 0, 1) == Reason.NOTHING_OPEN
    book.fork(0, 2)
    assert reason(book, "sampled", [2]) == Reason.NOTHING_OPEN
    book.sampled([0])
    grouped(book, [1], [3])
    book.sampled([1])
    accept(book, 1, 1)


@pytest.mark.holds("PAGE-5", "REF-2")
@pytest.mark.parametrize(
    ("expected", "ids"),
    [
        (Reason.BAD_COUNT, []),
        (Reason.DUPLICATE_REQUEST, [9, 9]),
        (Reason.UNKNOWN_REQUEST, [0, 9]),
        (Reason.NOTHING_OPEN, [0, 1]),
    ],
)
def test_sampled_refusals(expected: Reason, ids: list[int]) -> None:
    """The first reason in order; nothing is sampled of a list that is refused."""
    book = overlapped()
    decode(book, 0)
    assert reason(book, "sampled", ids) == expected


@pytest.mark.holds("REF-2")
def test_sampled_without_overlap() -> None:
    """Without overlap there is nothing to sample: unsupported, whatever the ids."""
    assert reason(started("pr9757/1:C=2,T=2", 3), "sampled", []) == Reason.UNSUPPORTED


# Memory


def capacity(text: str, pages: int, requests: int) -> int:
    """Global tokens that requests of unequal prompts reach, until each is refused a page."""
    layout = parse_layout(text)
    book = Ledger(layout, [pages] * layout.cp_size, 2**31 - 1)
    live = list(range(requests))
    for id in live:
        book.admit(book.plan_admit(id, 1 + 13 * id))
    while live:
        for id in list(live):
            try:
                grouped(book, [id], [32])
            except Refused:
                live.remove(id)
    return int(book.local_lens(range(requests)).sum())


@pytest.mark.parametrize("name", sorted(set(NAMED_LAYOUTS) - {"before_9757"}))
def test_four_ranks_hold_nearly_four_times_the_tokens(name: str) -> None:
    """With pools of equal size, four ranks hold at least 3.9 times the tokens of one."""
    text = f"{name}/1:C=%d,T=32" + (",I=1" if name == "vllm_dcp" else "")
    assert capacity(text % 4, 1000, 8) >= 3.9 * capacity(text % 1, 1000, 8)


@pytest.mark.holds("PAGE-1", "REF-2")
def test_open_pages_hold_groups_when_nothing_is_free() -> None:
    """Three open super-blocks with one token each take fifteen more tokens each, and no page."""
    book = Ledger(parse_layout("vllm_dcp/1:C=4,T=4,I=1"), [3] * 4, 100)
    for id in range(3):
        book.admit(book.plan_admit(id, 1))
    assert book.free.tolist() == [0] * 4
    assert len(book.plan_step([0, 1, 2], [15] * 3).owners) == 45
    with pytest.raises(Refused, match="1 pages and has 0 free"):
        book.plan_step([0, 1, 2], [15, 15, 16])
