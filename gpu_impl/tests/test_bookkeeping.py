"""One rank's bookkeeping: slots, block tables, pages, and agreement among ranks."""

import numpy as np
import pytest

from helix_gpu.bookkeeping.rank_book import RankBook, RankStep
from helix_gpu.bookkeeping.refusals import Refused
from helix_spec.config import Config, ModelShape
from helix_spec.events import Reason
from helix_spec.layouts import NAMED_LAYOUTS

C, T = 3, 2
MODEL = ModelShape(q_heads=6)


def books(name: str, pages: int = 50) -> list[RankBook]:
    """All ranks' books for a named layout."""
    layout = f"{name}/1:C={C},T={T}" + (",I=1" if name == "vllm_dcp" else "")
    config = Config(layout=layout, pages=[pages] * C, max_len=1000, model=MODEL)
    return [RankBook(config, rank) for rank in range(C)]


@pytest.mark.holds("OWN-1", "OWN-2", "LEN-2", "LEN-3", "POS-1", "PAGE-4")
@pytest.mark.parametrize("name", NAMED_LAYOUTS)
def test_ranks_agree_on_every_step(name: str) -> None:
    """One rank is active per token; past, visible, slot and position are as the words say."""
    ranks = books(name)
    for id, prompt_len in enumerate([1, 4, 13]):
        for book in ranks:
            book.admit(id, prompt_len)
    for n in range(20):
        before = [[book.local_len(id) for id in range(3)] for book in ranks]
        steps = [book.decode_step([0, 1, 2], pad=1) for book in ranks]
        assert np.sum([step.active for step in steps], axis=0).tolist() == [1] * 3
        for book, step, lengths in zip(ranks, steps, before, strict=True):
            assert step.past_len.tolist() == lengths
            assert step.position_ids.tolist() == [1 + n, 4 + n, 13 + n]
            assert step.visible.tolist() == (step.past_len + step.active).tolist()
            assert step.visible.tolist() == [book.local_len(id) for id in range(3)]
            for id, (active, index) in enumerate(zip(step.active, step.past_len, strict=True)):
                table = book.block_table(id)
                slot = table[index // T] * T + index % T if active else -1
                assert step.slots[id] == slot


@pytest.mark.holds("GROW-1", "PAGE-2", "PAGE-3")
@pytest.mark.parametrize("name", NAMED_LAYOUTS)
def test_pages_are_conserved(name: str) -> None:
    """Block tables never share a page, tables only grow, and a release gives all pages back."""
    ranks = books(name)
    for book in ranks:
        for id, prompt_len in enumerate([1, 4, 13]):
            book.admit(id, prompt_len)
        tables = [book.block_table(id) for id in range(3)]
        for _ in range(20):
            book.decode_step([2, 0])
            now = [book.block_table(id) for id in range(3)]
            assert [new[: len(old)] for old, new in zip(tables, now, strict=True)] == tables
            used = [page for table in now for page in table]
            assert len(used) == len(set(used))
            assert 50 == book.free_pages + len(used) == book.ledger.free[book.cp_rank] + len(used)
            tables = now
        for id in (1, 0, 2):
            book.release(id)
        assert book.free_pages == 50
        assert book.request_ids == []


@pytest.mark.holds("PAGE-1", "PAGE-4")
def test_an_inactive_rank_takes_nothing_under_lazy() -> None:
    """Steps that another rank owns take no page and no slot."""
    book = books("before_9757")[0]
    book.admit(7, 5)
    table = book.block_table(7)
    for _ in range(30):
        step = book.decode_step([7])
        assert (step.taken, step.slots.tolist()) == ([], [-1])
    assert book.block_table(7) == table


@pytest.mark.holds("PAGE-1")
def test_lockstep_takes_pages_together() -> None:
    """Under lockstep every rank takes its page when the super-block of T*C tokens opens."""
    ranks = books("pr17866")
    for book in ranks:
        book.admit(0, C * T)
    assert [len(book.decode_step([0]).taken) for book in ranks] == [1] * C
    assert [len(book.decode_step([0]).taken) for book in ranks] == [0] * C


@pytest.mark.holds("PAGE-5", "REF-2")
def test_skip_is_refused_as_the_decode_and_changes_nothing() -> None:
    """After a skip, or a refused one, the next step is the one that would have been."""
    skipped, plain = books("balanced")[0], books("balanced")[0]
    for book in (skipped, plain):
        book.admit(3, 6)
    skipped.skip([3])
    with pytest.raises(Refused) as refused:
        skipped.skip([3, 4], [1, 1])
    assert refused.value.reason == Reason.UNKNOWN_REQUEST
    assert skipped.free_pages == plain.free_pages
    one, other = plain.decode_step([3]), skipped.decode_step([3])
    assert other.slots.tolist() == one.slots.tolist()
    assert other.position_ids.tolist() == one.position_ids.tolist()


@pytest.mark.holds("PAGE-1")
def test_recycled_rows_forget_their_pages() -> None:
    """A request in a recycled row sees its own pages alone."""
    book = books("pr9757")[0]
    book.admit(0, 40)
    book.release(0)
    book.admit(1, 2)
    assert len(book.block_table(1)) == 1


@pytest.mark.holds("REF-2")
@pytest.mark.parametrize(
    "change",
    [
        {"pages": [5, 5]},
        {"layout": "custom/1:prompt=contiguous,owner=step,pages=lockstep,start=rank_zero,C=3,T=2"},
    ],
)
def test_bad_configurations_are_refused(change: dict[str, object]) -> None:
    """What the specification does not allow is refused at start with a sentence."""
    config: dict[str, object] = {
        "layout": "pr9757/1:C=3,T=2",
        "pages": [5] * 3,
        "max_len": 9,
        "model": MODEL,
    }
    with pytest.raises(Refused, match=r"\.$") as refused:
        RankBook(Config(**(config | change)), 0)  # type: ignore[arg-type]
    assert refused.value.reason == Reason.BAD_CONFIG


def test_cp_rank_outside_the_layout() -> None:
    """A cp_rank that the layout does not have is an error."""
    config = Config(layout="pr9757/1:C=3,T=2", pages=[5] * 3, max_len=9, model=MODEL)
    with pytest.raises(ValueError, match="between 0 and 2"):
        RankBook(config, 3)


@pytest.mark.holds("GROW-1", "PAGE-1", "PAGE-2")
def test_long_tables_grow() -> None:
    """Block tables follow a request from its first page to hundreds."""
    book = books("before_9757", pages=300)[C - 1]
    book.admit(0, 1)
    for _ in range(501):
        book.decode_step([0])
    assert len(set(book.block_table(0))) == 251
    assert np.array_equal(book.block_table(0), sorted(book.block_table(0)))


# Groups, forks and preempted requests


@pytest.mark.holds("OWN-1", "OWN-2", "LEN-3", "POS-1", "PAGE-4")
@pytest.mark.parametrize("name", NAMED_LAYOUTS)
def test_ranks_agree_on_groups(name: str) -> None:
    """In a ragged batch one rank is active per token, and `visible` counts up to that token."""
    ranks = books(name)
    for book in ranks:
        book.admit(0, 4)
        book.admit(1, 13)
    steps = [book.decode_step([1, 0], [5, 2], pad=1) for book in ranks]
    assert np.sum([step.active for step in steps], axis=0).tolist() == [1] * 7
    for book, step in zip(ranks, steps, strict=True):
        assert step.position_ids.tolist() == [13, 14, 15, 16, 17, 4, 5]
        tables = [book.block_table(1)] * 5 + [book.block_table(0)] * 2
        held = step.past_len.repeat([5, 2])
        for group in (slice(0, 5), slice(5, 7)):
            seen = held[group] + step.active[group].cumsum()
            assert step.visible[group].tolist() == seen.tolist()
        for table, active, seen, slot in zip(
            tables, step.active, step.visible, step.slots, strict=True
        ):
            index = seen - 1
            assert slot == (table[index // T] * T + index % T if active else -1)


@pytest.mark.holds("PAGE-3")
@pytest.mark.parametrize("name", NAMED_LAYOUTS)
def test_the_ledger_knows_what_the_allocator_holds(name: str) -> None:
    """Forks, copies, rewinds, preemption and release: free pages agree and all come back."""
    for book in books(name):
        rank = book.cp_rank

        def agrees(book: RankBook = book, rank: int = rank) -> None:
            _, tables = book.holdings(book.request_ids)
            used = {page for table in tables for page in table}
            assert book.free_pages + len(used) == 50
            assert book.free_pages == book.ledger.free[rank]

        book.admit(0, 7)
        book.fork(0, 1)
        agrees()
        book.decode_step([1, 0], [5, 1])
        book.accept(1, 1)
        agrees()
        book.fork(1, 2)
        book.fork(0, 3)
        book.preempt(1)
        agrees()
        book.decode_step([2, 3, 0], [1, 7, 1])
        book.resume(1)
        book.release(0)
        agrees()
        book.preempt(2)
        for id in (2, 3, 1):
            book.release(id)
            agrees()
        assert book.free_pages == 50


def book_of(layout: str, rank: int = 0) -> RankBook:
    """One rank's book with nine pages on every rank."""
    ranks = int(layout.partition("C=")[2].partition(",")[0])
    shape = ModelShape(q_heads=2, kv_heads=1)
    return RankBook(Config(layout=layout, pages=[9] * ranks, max_len=1000, model=shape), rank)


@pytest.mark.holds("PAGE-2")
def test_a_copy_has_the_tokens_of_the_open_page_alone() -> None:
    """Copy on write takes along what the page held before the step, counted within the page."""
    lazy = book_of("pr9757/1:C=1,T=4", 0)
    lazy.admit(0, 11)
    lazy.fork(0, 1)
    source = lazy.block_table(1)[-1]
    step = lazy.decode_step([1])
    assert [(copy.source, copy.target, copy.tokens) for copy in step.copied] == [
        (source, lazy.block_table(1)[-1], 3)
    ]
    tokens = []
    for rank in range(2):
        lockstep = book_of("pr17866/1:C=2,T=4", rank)
        lockstep.admit(0, 21)
        lockstep.fork(0, 1)
        tokens.append([copy.tokens for copy in lockstep.decode_step([1]).copied])
    assert sorted(tokens, reverse=True) == [[4], [1]]


@pytest.mark.holds("OWN-1", "PAGE-4")
def test_a_prompt_in_chunks_is_every_token_once() -> None:
    """Each chunk goes on where the one before ended; slots are -1 where another rank owns them."""
    owned = []
    for rank in range(2):
        book = book_of("pr13180/1:C=2,T=2", rank)
        plan = book.plan_admit(0, 7)
        book.place(plan)
        chunks = [chunk.step for chunk in book.prompt_chunks([plan], 3)]
        assert [chunk.position_ids.tolist() for chunk in chunks] == [[0, 1, 2], [3, 4, 5], [6]]
        for chunk in chunks:
            assert set(chunk.slots[~chunk.active].tolist()) <= {-1}
            assert (chunk.slots[chunk.active] >= 0).all()
            assert chunk.pad == 0
        owned += [p for chunk in chunks for p in chunk.position_ids[chunk.active].tolist()]
    assert sorted(owned) == list(range(7))


def test_a_step_has_no_dummies_unless_asked() -> None:
    """`pad` is 0 where it is not given."""
    book = book_of("pr9757/1:C=1,T=4", 0)
    book.admit(0, 3)
    assert book.plan_step([0]).pad == 0
    assert book.decode_step([0]).pad == 0


@pytest.mark.parametrize("cp_rank", [-1, 2, 3])
def test_cp_rank_next_to_the_layout(cp_rank: int) -> None:
    """The first ranks below and above are outside."""
    with pytest.raises(ValueError, match=f"cp_rank is {cp_rank}"):
        book_of("pr9757/1:C=2,T=4", cp_rank)


def test_steps_say_what_was_there_before() -> None:
    """A chunk of a prompt has its request's length before it; a step of dummies has no entries."""
    book = RankBook(Config(layout="pr9757/1:C=2,T=4", pages=[9, 9], max_len=99), 0)
    plan = book.plan_admit(0, 13)
    book.place(plan)
    assert [chunk.step.past_len.tolist() for chunk in book.prompt_chunks([plan], 5)] == [
        [0],
        [5],
        [8],
    ]
    none = RankStep.of_dummies(3)
    assert [len(none.past_len), len(none.position_ids), len(none.slots)] == [0] * 3
    assert book.ledger.plan_step([0], [1]).pad == 0
