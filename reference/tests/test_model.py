"""The reference model: worked examples of SPEC.md, and what must hold of it on any trace."""

import copy
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_conformance.generate import strategies
from helix_reference.dealing import deal_prompt, decode_owner
from helix_reference.model import Model
from helix_spec import placement
from helix_spec.config import Config
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Fork,
    Preempt,
    Reason,
    Release,
    Resume,
    Sampled,
    Skip,
)
from helix_spec.layouts import Layout


def model_of(layout: str, *events, pages=None, max_len=2000, **settings) -> Model:
    """A model to which these events have happened."""
    cp_size = int(layout.partition("C=")[2].partition(",")[0])
    config = Config(layout=layout, pages=pages or [50] * cp_size, max_len=max_len, **settings)
    model = Model(config)
    for event in events:
        assert model.apply(event) is None, event
    return model


def lengths(model: Model, id: int = 0) -> list[int]:
    """Tokens of a request on each rank."""
    return [len(positions) for positions in model.requests[id].ranks]


def tables(model: Model, id: int = 0) -> list[list[int]]:
    """Block tables of a request on each rank."""
    return [[page.number for page in table] for table in model.requests[id].tables]


def free(model: Model) -> list[int]:
    """Free pages of each rank."""
    return [pool.free for pool in model.pools]


@pytest.mark.holds("OWN-1", "OWN-3")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "pr9757",
            [
                [*range(100 * r, 100 * r + 100), *range(400 + 100 * r, 500 + 100 * r)]
                for r in range(4)
            ],
        ),
        (
            "before_9757",
            [*([*range(100 * r, 100 * r + 100)] for r in range(3)), [*range(300, 800)]],
        ),
    ],
)
def test_example_of_pr_9757(name, expected):
    """SPEC 11.1: 400 prompt tokens and 400 steps on four ranks, before and after."""
    model = model_of(f"{name}/1:C=4,T=100", Admit(0, 400), *[Decode([0], [1])] * 400)
    assert model.requests[0].ranks == expected


@pytest.mark.holds("OWN-1", "LEN-1")
def test_short_prompt_with_a_short_last_block():
    """SPEC 11.2: prompts of 13 tokens in blocks of 2, and the lengths after 2 and 8 steps."""
    model = model_of("pr9757/1:C=4,T=2", Admit(0, 13))
    assert model.requests[0].ranks == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]]
    for name, after_2 in (("pr13180", [6, 4, 3, 2]), ("pr17866", [4, 4, 4, 3])):
        model = model_of(f"{name}/1:C=4,T=2", Admit(0, 13))
        assert model.requests[0].ranks == [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12], [6, 7]]
        model = model_of(f"{name}/1:C=4,T=2", Admit(0, 13), *[Decode([0], [1])] * 2)
        assert lengths(model) == after_2
        for _ in range(6):
            model.apply(Decode([0], [1]))
        assert lengths(model) == [6, 6, 5, 4]


@pytest.mark.holds("REF-2")
def test_capacity_is_counted_in_global_tokens():
    """SPEC 11.4: three pages of 32 on each of four ranks hold 384 tokens, and not one more."""
    model = model_of("pr17866/1:C=4,T=32", Admit(0, 383), Decode([0], [1]), pages=[3] * 4)
    assert model.apply(Decode([0], [1])) == Reason.OUT_OF_PAGES
    assert model.apply(Skip([0], [1])) == Reason.OUT_OF_PAGES
    assert len(model.requests[0].tokens) == 384


@pytest.mark.holds("LEN-1", "BAL-3")
def test_rotated_start_evens_the_ranks():
    """SPEC 11.5: four equal requests in a row give every rank the same total."""
    model = model_of("balanced/1:C=4,T=2", *(Admit(id, 3) for id in range(4)))
    model.apply(Decode([0, 1, 2, 3], [1] * 4))
    assert [lengths(model, id) for id in range(4)] == [
        [2, 2, 0, 0],
        [0, 2, 2, 0],
        [0, 0, 2, 2],
        [2, 0, 0, 2],
    ]


@pytest.mark.holds("OWN-1", "OWN-2", "OWN-3", "LEN-2", "LEN-3", "POS-1", "PAGE-1")
def test_group_over_a_boundary_and_its_rewind():
    """SPEC 11.6: a group of four straddles owner and page; two kept, pages go back, ids anew."""
    model = model_of("vllm_dcp/1:C=2,T=4,I=2", Admit(7, 5), Decode([7], [4]))
    assert model.requests[7].ranks == [[0, 1, 4, 5, 8], [2, 3, 6, 7]]
    assert [len(table) for table in tables(model, 7)] == [2, 2]
    (rank_0, rank_1) = (model.outcome(rank, None) for rank in (0, 1))
    assert (rank_0.past_len, rank_1.past_len) == ([3], [2])
    assert (rank_0.position_ids, rank_1.position_ids) == ([5, 6, 7, 8], [5, 6, 7, 8])
    assert (rank_0.active, rank_0.visible) == ([True, False, False, True], [4, 4, 4, 5])
    assert (rank_1.active, rank_1.visible) == ([False, True, True, False], [2, 3, 4, 4])
    assert model.apply(Accept(7, 2)) is None
    assert model.requests[7].ranks == [[0, 1, 4, 5], [2, 3, 6]]
    assert [len(table) for table in tables(model, 7)] == [1, 1]
    model.apply(Decode([7], [1]))
    assert model.requests[7].tokens[7] == (3, 0)


@pytest.mark.holds("PAGE-2", "PAGE-5", "REF-2")
def test_copy_on_write_in_the_order_of_the_batch():
    """SPEC 11.7: of three holders the first two copy, the last writes in place."""
    forked = (Admit(0, 2), Fork(0, 1), Fork(0, 2))
    model = model_of("pr9757/1:C=2,T=4", *forked)
    ((shared,), ()) = tables(model)
    model.apply(Decode([2, 0, 1], [1, 1, 1]))
    assert tables(model, 1) == [[shared], []]
    assert len({*tables(model, 0)[0], *tables(model, 1)[0], *tables(model, 2)[0]}) == 3
    model = model_of("pr9757/1:C=2,T=4", *forked, pages=[2, 2])
    assert model.apply(Decode([2, 0, 1], [1, 1, 1])) == Reason.OUT_OF_PAGES
    assert tables(model, 2) == [[shared - 48], []]
    assert free(model) == [1, 2]


@pytest.mark.holds("PAGE-2")
def test_copy_on_write_on_every_rank_under_lockstep():
    """Under lockstep a page of the open super-block is copied on all ranks, also by idle ones."""
    model = model_of("pr17866/1:C=2,T=2", Admit(0, 1), Fork(0, 1), pages=[5, 5])
    model.apply(Decode([1], [1]))
    assert free(model) == [3, 3]


def test_identities_are_where_tokens_came_from():
    """SPEC 11.8: identity is the event's index, refused ones counted, and the place in it."""
    model = model_of("pr9757/1:C=2,T=4", Admit(4, 16))
    assert model.apply(Admit(4, 9)) == Reason.DUPLICATE_REQUEST
    model.apply(Admit(5, 3))
    model.apply(Decode([5, 4], [2, 1]))
    assert model.requests[5].tokens == [(2, 0), (2, 1), (2, 2), (3, 0), (3, 1)]
    assert model.requests[4].tokens[16] == (3, 2)
    model.apply(Fork(5, 6))
    model.apply(Preempt(5))
    model.apply(Resume(5))
    assert model.requests[6].tokens == model.requests[5].tokens


@pytest.mark.holds("REF-2")
def test_order_of_the_reasons():
    """SPEC 11.10: of several reasons the first of the list is given."""
    model = model_of("pr9757/1:C=1,T=2", Admit(1, 2), Admit(2, 2), Decode([1], [1]), Preempt(2))
    for event, expected in (
        (Decode([3, 2], [1, 1]), Reason.UNKNOWN_REQUEST),
        (Decode([2, 3], [1, 1]), Reason.PREEMPTED_REQUEST),
        (Decode([3, 3], [1, 1]), Reason.DUPLICATE_REQUEST),
        (Decode([3, 3], [1, 0]), Reason.BAD_COUNT),
        (Accept(3, 0), Reason.BAD_COUNT),
        (Accept(3, 1), Reason.UNKNOWN_REQUEST),
        (Accept(1, 2), Reason.BAD_COUNT),
        (Accept(1, 1), None),
        (Accept(1, 1), Reason.NOTHING_OPEN),
        (Admit(2, 0), Reason.DUPLICATE_REQUEST),
        (Admit(9, 0), Reason.EMPTY_PROMPT),
        (Admit(9, 2001), Reason.TOO_LONG),
        (Admit(9, 2**53), Reason.TOO_LONG),
        (Admit(9, 2000), Reason.OUT_OF_PAGES),
        (Resume(1), Reason.NOT_PREEMPTED),
        (Sampled([]), Reason.UNSUPPORTED),
    ):
        assert model.apply(event) == expected, event


@pytest.mark.holds("REF-2")
def test_what_no_pool_could_hold_is_refused_before_it_is_dealt():
    """A prompt, a group and a skipped group of two billion tokens cost nothing."""
    model = model_of("pr9757/1:C=2,T=2", Admit(0, 2), pages=[9, 9], max_len=2**31 - 1)
    for event in (Admit(1, 2**31 - 2), Decode([0], [2**31 - 4]), Skip([0], [2**31 - 4])):
        assert model.apply(event) == Reason.OUT_OF_PAGES


@pytest.mark.holds("REF-2")
def test_overlap_allows_one_outstanding_decode():
    """The third decode that nobody sampled is refused, and accept waits for its own sample."""
    model = model_of("pr9757/1:C=2,T=2", Admit(0, 2), Decode([0], [2]), overlap=True)
    assert model.apply(Accept(0, 1)) == Reason.NOTHING_OPEN
    assert model.apply(Decode([0], [2])) is None
    assert model.apply(Decode([0], [1])) == Reason.BAD_COUNT
    assert model.apply(Sampled([0])) is None
    assert model.apply(Accept(0, 1)) == Reason.NOTHING_OPEN
    assert model.apply(Sampled([0])) is None
    assert model.apply(Accept(0, 1)) is None
    assert model.apply(Sampled([0])) == Reason.NOTHING_OPEN


def state(model: Model) -> object:
    """Everything a model holds but the number of events it has seen."""
    return {
        "requests": {
            id: (
                r.prompt_len, r.shift, r.tokens, r.ranks, r.preempted, r.open_group,
                r.outstanding, [[(p.number, p.holders) for p in table] for table in r.tables],
            )
            for id, r in model.requests.items()
        },
        "free": [(sorted(pool.returned), pool.untouched) for pool in model.pools],
        "admissions": model.admissions,
    }  # fmt: skip


@pytest.mark.holds("LEN-1", "PAGE-1", "PAGE-3", "PAGE-5")
@settings(max_examples=150, deadline=None)
@given(strategies.traces(configs=strategies.configs(cp_sizes=(1, 2, 3, 4))))
def test_any_trace(trace):
    """On any trace: refusals and skips change nothing, lengths and pages fit the closed forms."""
    model = Model(trace.config)
    for event in trace.events:
        before = copy.deepcopy(state(model))
        reason = model.apply(event)
        if reason is not None or isinstance(event, Skip):
            assert state(model) == before
        for request in model.requests.values():
            if request.preempted:
                continue
            of_request = (model.layout, request.prompt_len, request.steps)
            for rank, positions in enumerate(request.ranks):
                assert len(positions) == placement.local_len(*of_request, rank, request.shift)
                wanted = placement.pages_needed(*of_request, rank, request.shift)
                assert len(request.tables[rank]) == wanted
        for rank, (pool, size) in enumerate(zip(model.pools, model.config.pages, strict=True)):
            used = {p.number for r in model.requests.values() for p in (r.tables or [[]] * 9)[rank]}
            free = [*pool.returned, *range(pool.untouched)]
            assert sorted([*used, *free]) == list(range(size))


@pytest.mark.holds("OWN-1", "OWN-3")
@given(layout=strategies.layouts(), prompt_len=st.integers(1, 90), shift=st.integers(0, 3))
def test_dealing_agrees_with_the_closed_forms(layout: Layout, prompt_len, shift):
    """Every position is dealt to the rank, and to the place there, that the closed forms name."""
    hands = deal_prompt(layout, prompt_len, shift)
    for rank, positions in enumerate(hands):
        for index, position in enumerate(positions):
            assert rank == placement.owner(layout, prompt_len, position, shift)
            assert index == placement.local_index(layout, prompt_len, position, shift)
    for step in range(30):
        expected = placement.decode_owner(layout, prompt_len, step, shift)
        assert decode_owner(layout, prompt_len, step, shift) == expected


def test_spec_and_reference_need_no_torch():
    """Specification and reference import and run where torch and numpy are not."""
    code = (
        "import sys; sys.modules['torch'] = sys.modules['numpy'] = None\n"
        "from helix_spec import invariants, trace, values\n"
        "from helix_reference.engine import ReferenceEngine\n"
        "from helix_spec.config import Config\n"
        "from helix_spec.events import Admit, Decode\n"
        "engine = ReferenceEngine(0)\n"
        "config = Config(layout='pr9757/1:C=2,T=2', pages=[3, 3], max_len=9)\n"
        "engine.start(config, engine.profiles)\n"
        "engine.apply(Admit(0, 3))\n"
        "print(len(engine.apply(Decode([0], [1])).output))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.stderr, done.stdout) == ("", "1\n")


@pytest.mark.holds("PAGE-3")
def test_release_gives_every_page_back():
    """Forked, preempted and plain requests released in any order leave the pools full."""
    model = model_of("pr13180/1:C=3,T=2", Admit(0, 9), Fork(0, 1), Decode([1], [3]), Preempt(0))
    for event in (Release(0), Release(1)):
        assert model.apply(event) is None
    assert free(model) == [50] * 3
