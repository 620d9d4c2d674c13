"""The closed forms against worked examples, naive dealing and brute force (SPEC.md section 3)."""

from collections.abc import Iterator
from functools import lru_cache
from itertools import cycle, islice, product
from typing import get_args

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_spec.layouts import (
    DecodeOwner,
    Layout,
    PagePolicy,
    PromptSplit,
    layout_problem,
    named_layout,
    parse_layout,
)
from helix_spec.placement import (
    capacity,
    decode_local_len,
    decode_owner,
    local_index,
    local_len,
    owner,
    page_and_offset,
    pages_needed,
    position,
    prompt_local_len,
    slot,
    visible_len,
)

SMALL_SIZES = list(product(range(1, 6), range(1, 5)))
"""All (cp_size, tokens_per_block) that are tried out."""


def held(layout: Layout, prompt_len: int, steps: int, rank: int) -> list[int]:
    """Positions on a rank, by the closed form."""
    count = local_len(layout, prompt_len, steps, rank)
    found = [position(layout, prompt_len, rank, index) for index in range(count)]
    return [p for p in found if p is not None]


# Worked examples.


@pytest.mark.holds("OWN-1", "OWN-3", "LEN-1")
def test_the_example_of_pr_9757() -> None:
    """L=400, T=100, C=4: after 400 steps each rank holds its quarter of prompt and decode."""
    layout = parse_layout("pr9757/1:C=4,T=100")
    for rank in range(4):
        prompt = list(range(100 * rank, 100 * rank + 100))
        decoded = list(range(400 + 100 * rank, 500 + 100 * rank))
        assert held(layout, 400, 0, rank) == prompt
        assert held(layout, 400, 400, rank) == prompt + decoded


@pytest.mark.holds("OWN-1", "OWN-3", "LEN-1")
def test_the_baseline_before_pr_9757() -> None:
    """Under before_9757 rank 3 holds all of [300, 800)."""
    layout = parse_layout("before_9757/1:C=4,T=100")
    assert held(layout, 400, 400, 3) == list(range(300, 800))
    assert [local_len(layout, 400, 400, rank) for rank in range(3)] == [100, 100, 100]


@pytest.mark.holds("OWN-1", "OWN-3", "LEN-1", "LEN-3", "PAGE-1")
@pytest.mark.parametrize(
    ("name", "prompt", "owners", "after_2", "after_8"),
    [
        (
            "pr9757",
            [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11], [12]],
            [0, 0, 1, 1, 2, 2, 3, 3],
            [6, 4, 4, 1],
            [6, 6, 6, 3],
        ),
        (
            "pr13180",
            [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12], [6, 7]],
            [0, 0, 1, 1, 2, 2, 3, 3],
            [6, 4, 3, 2],
            [6, 6, 5, 4],
        ),
        (
            "pr17866",
            [[0, 1, 8, 9], [2, 3, 10, 11], [4, 5, 12], [6, 7]],
            [2, 3, 3, 0, 0, 1, 1, 2],
            [4, 4, 4, 3],
            [6, 6, 5, 4],
        ),
    ],
)
def test_the_example_of_a_short_last_block(
    name: str, prompt: list[list[int]], owners: list[int], after_2: list[int], after_8: list[int]
) -> None:
    """L=13, T=2, C=4: prompts, owners of steps 0 to 7, lengths after 2 and 8 steps.

    The query of step 1 sees the lengths after 2 steps, and a lazy rank has pages for them.
    """
    layout = named_layout(name, cp_size=4, tokens_per_block=2)
    assert [held(layout, 13, 0, rank) for rank in range(4)] == prompt
    assert [decode_owner(layout, 13, step) for step in range(8)] == owners
    assert [local_len(layout, 13, 2, rank) for rank in range(4)] == after_2
    assert [local_len(layout, 13, 8, rank) for rank in range(4)] == after_8
    assert [visible_len(layout, 13, 14, rank) for rank in range(4)] == after_2
    if layout.pages == "lazy":
        pages = [pages_needed(layout, 13, 2, rank) for rank in range(4)]
        assert pages == [(length + 1) // 2 for length in after_2]


@pytest.mark.holds("PAGE-1", "REF-2")
def test_the_example_of_capacity() -> None:
    """T=32, C=4: 3 pages a rank hold 384 global tokens, not 400; 401 tokens need 4 pages."""
    layout = parse_layout("pr17866/1:C=4,T=32")
    assert capacity(layout, [100 // 32] * 4, 1) == 384
    for rank in range(4):
        assert pages_needed(layout, 384, 0, rank) == 3
        assert pages_needed(layout, 384, 1, rank) == 4
        assert pages_needed(layout, 1, 400, rank) == 4


@pytest.mark.holds("OWN-1", "LEN-3")
def test_the_example_of_slots() -> None:
    """Example 11.3 of SPEC.md: local indices, slots and visible keys on two ranks."""
    layout = parse_layout("pr17866/1:C=4,T=2")
    assert held(layout, 13, 2, 3) == [6, 7, 14]
    assert [slot([5, 1], local_index(layout, 13, p), 2) for p in (6, 7, 14)] == [10, 11, 2]
    assert [visible_len(layout, 13, 14, rank) for rank in (0, 3)] == [4, 3]


@pytest.mark.holds("OWN-3", "LEN-1", "BAL-3")
def test_the_example_of_a_rotated_start() -> None:
    """Example 11.5 of SPEC.md: four requests in a row give every rank the same total."""
    layout = parse_layout("balanced/1:C=4,T=2")
    lengths = [[local_len(layout, 3, 1, rank, shift) for rank in range(4)] for shift in range(4)]
    assert lengths == [[2, 2, 0, 0], [0, 2, 2, 0], [0, 0, 2, 2], [2, 0, 0, 2]]
    assert [decode_owner(layout, 3, 0, shift) for shift in range(4)] == [1, 2, 3, 0]


@pytest.mark.holds("OWN-1", "LEN-3", "PAGE-1")
def test_the_example_of_a_speculative_group() -> None:
    """Example 11.6 of SPEC.md: a group of four over a boundary, seen from both ranks."""
    layout = parse_layout("vllm_dcp/1:C=2,T=4,I=2")
    assert [held(layout, 5, 4, rank) for rank in range(2)] == [[0, 1, 4, 5, 8], [2, 3, 6, 7]]
    assert [held(layout, 5, 2, rank) for rank in range(2)] == [[0, 1, 4, 5], [2, 3, 6]]
    visible = [[visible_len(layout, 5, p, rank) for p in range(5, 9)] for rank in range(2)]
    assert visible == [[4, 4, 4, 5], [2, 3, 4, 4]]
    assert [pages_needed(layout, 5, steps, 0) for steps in (0, 4, 2)] == [1, 2, 1]


# All small layouts against naive dealing.


def small_layouts(c: int, t: int) -> Iterator[Layout]:
    """Every legal pair of rules under every page policy, for these sizes."""
    divisors: list[int | None] = [i for i in range(1, t + 1) if t % i == 0]
    plain: list[int | None] = [None]
    blank = Layout("contiguous", "step", "lazy", "rank_zero", c, t)
    for prompt in get_args(PromptSplit):
        for owner_rule in get_args(DecodeOwner):
            for pages in get_args(PagePolicy):
                for prompt_i, owner_i in product(
                    divisors if prompt == "interleave" else plain,
                    divisors if owner_rule == "interleave" else plain,
                ):
                    layout = blank.replace(
                        prompt=prompt,
                        owner=owner_rule,
                        pages=pages,
                        prompt_interleave=prompt_i,
                        owner_interleave=owner_i,
                    )
                    if layout_problem(layout) is None:
                        yield layout


def round_robin(c: int, chunk: int) -> Iterator[int]:
    """Return the ranks of tokens 0, 1, 2, and so on without end, in chunks."""
    return cycle([rank for rank in range(c) for _ in range(chunk)])


def naive_prompt(layout: Layout, prompt_len: int) -> list[list[int]]:
    """Return the prompt's positions on each logical rank, dealt token by token."""
    c, t = layout.cp_size, layout.tokens_per_block
    shards: list[list[int]] = [[] for _ in range(c)]
    if layout.prompt == "contiguous":
        blocks = [list(range(prompt_len))[at : at + t] for at in range(0, prompt_len, t)]
        shares = list(islice(cycle(range(c)), len(blocks)))
        for rank in range(c):
            for _ in range(shares.count(rank)):
                shards[rank] += blocks.pop(0)
    else:
        dealt = zip(range(prompt_len), round_robin(c, layout.prompt_interleave or t), strict=False)
        for p, rank in dealt:
            shards[rank].append(p)
    return shards


def naive_owners(layout: Layout, prompt_len: int, steps: int) -> list[int]:
    """Return the logical owners of the first steps, by going round the ranks."""
    c, t = layout.cp_size, layout.tokens_per_block
    if layout.owner == "last_rank":
        return [c - 1] * steps
    if layout.owner == "step":
        return list(islice(round_robin(c, t), steps))
    chunk = layout.owner_interleave or t
    return list(islice(round_robin(c, chunk), prompt_len, prompt_len + steps))


@pytest.mark.holds("OWN-1", "OWN-3", "LEN-1", "LEN-3")
@pytest.mark.parametrize(("c", "t"), SMALL_SIZES)
def test_the_closed_forms_agree_with_naive_dealing(c: int, t: int) -> None:
    """Lengths, owners, local indices and positions are those of lists dealt token by token."""
    for layout in small_layouts(c, t):
        if layout.pages == "lockstep":
            continue  # the page policy moves no token
        for prompt_len in range(t * c + t + 2):
            shift = prompt_len % c
            ranks = [(logical + shift) % c for logical in range(c)]
            shards = naive_prompt(layout, prompt_len)
            for rank, shard in zip(ranks, shards, strict=True):
                assert prompt_local_len(layout, prompt_len, rank, shift) == len(shard)
            owners = naive_owners(layout, prompt_len, t * c + t + 1)
            for step, logical in enumerate(owners):
                assert decode_owner(layout, prompt_len, step, shift) == ranks[logical]
                shards[logical].append(prompt_len + step)
                for rank, shard in zip(ranks, shards, strict=True):
                    assert local_len(layout, prompt_len, step + 1, rank, shift) == len(shard)
                    seen = visible_len(layout, prompt_len, prompt_len + step, rank, shift)
                    assert seen == len(shard)
            for rank, shard in zip(ranks, shards, strict=True):
                for index, p in enumerate(shard):
                    assert position(layout, prompt_len, rank, index, shift) == p
                    assert owner(layout, prompt_len, p, shift) == rank
                    assert local_index(layout, prompt_len, p, shift) == index


@pytest.mark.holds("PAGE-1")
@pytest.mark.parametrize(("c", "t"), SMALL_SIZES)
def test_pages_are_counted_by_opening_them(c: int, t: int) -> None:
    """Lazy pages are those with a token; lockstep pages are open super-blocks, and suffice."""
    for layout in small_layouts(c, t):
        for prompt_len in range(t * c + 2):
            shards = naive_prompt(layout, prompt_len)
            owners = naive_owners(layout, prompt_len, t * c + 1)
            for steps in range(len(owners) + 1):
                if steps > 0:
                    shards[owners[steps - 1]].append(prompt_len + steps - 1)
                touched = [len({index // t for index in range(len(shard))}) for shard in shards]
                found = [pages_needed(layout, prompt_len, steps, rank) for rank in range(c)]
                if layout.pages == "lazy":
                    assert found == touched
                else:
                    super_blocks = {p // (t * c) for p in range(prompt_len + steps)}
                    assert found == [len(super_blocks)] * c
                    assert all(need <= have for need, have in zip(touched, found, strict=True))


@pytest.mark.holds("PAGE-1")
def test_lockstep_would_fail_for_round_robin_with_step() -> None:
    """C=2, T=1, L=1, one step: rank 0 holds two tokens and would have one page."""
    lazy = Layout("round_robin", "step", "lazy", "rank_zero", 2, 1)
    assert local_len(lazy, 1, 1, 0) == 2
    assert pages_needed(lazy.replace(pages="lockstep"), 1, 1, 0) == 1
    assert layout_problem(lazy.replace(pages="lockstep")) is not None


@pytest.mark.holds("PAGE-1", "REF-2")
@pytest.mark.parametrize(("c", "t"), [(1, 2), (2, 1), (2, 3), (3, 2), (4, 2)])
def test_capacity_is_where_a_pool_first_runs_out(c: int, t: int) -> None:
    """A request grown token by token in unequal pools stops at its capacity."""
    for layout in small_layouts(c, t):
        for prompt_len, shift in product(range(1, 2 * t * c), range(c)):
            pages = [1 + (rank + prompt_len) % 3 for rank in range(c)]
            found = capacity(layout, pages, prompt_len, shift)
            for total in range(prompt_len, 5 * t * c):
                fits = all(
                    pages_needed(layout, prompt_len, total - prompt_len, rank, shift) <= pages[rank]
                    for rank in range(c)
                )
                assert (total <= found) == fits


# Inverses, for sizes of every kind.


@st.composite
def legal_layouts(draw: st.DrawFn) -> Layout:
    """Legal layouts of any kind and size that a machine may have."""
    c, chunk, chunks = (draw(st.integers(1, most)) for most in (64, 64, 16))
    name = draw(st.sampled_from(["before_9757", "pr9757", "pr13180", "pr17866", "balanced"]))
    layout = named_layout(name, cp_size=c, tokens_per_block=chunk * chunks)
    if draw(st.booleans()):
        layout = layout.replace(pages="lazy", prompt="interleave", prompt_interleave=chunk)
    if draw(st.booleans()):
        layout = layout.replace(pages="lazy", owner="interleave", owner_interleave=chunk)
    return layout


TOKENS = st.integers(0, 2**31 - 1)


@pytest.mark.holds("OWN-1")
@given(legal_layouts(), TOKENS, TOKENS, st.integers(0, 63))
def test_owner_and_local_index_are_the_inverse_of_position(
    layout: Layout, prompt_len: int, p: int, shift: int
) -> None:
    """A token is where its position says, at every size."""
    rank = owner(layout, prompt_len, p, shift)
    index = local_index(layout, prompt_len, p, shift)
    assert position(layout, prompt_len, rank, index, shift) == p


@pytest.mark.holds("OWN-1")
@given(legal_layouts(), st.integers(0, 4000), st.integers(0, 63), st.integers(0, 4000))
def test_position_is_the_inverse_of_owner_and_local_index(
    layout: Layout, prompt_len: int, rank: int, index: int
) -> None:
    """Every local index that a rank reaches holds one position, and none other does."""
    rank %= layout.cp_size
    p = position(layout, prompt_len, rank, index)
    if p is None:
        assert (layout.owner, rank == layout.cp_size - 1) == ("last_rank", False)
        assert index >= prompt_local_len(layout, prompt_len, rank)
    else:
        assert (owner(layout, prompt_len, p), local_index(layout, prompt_len, p)) == (rank, index)


@pytest.mark.holds("OWN-1")
@given(st.permutations(range(12)), st.integers(1, 64), st.data())
def test_slots_of_a_block_table_are_distinct_and_invertible(
    table: list[int], t: int, data: st.DataObject
) -> None:
    """A slot names its physical page and offset, so two local indices never share one."""
    index = data.draw(st.integers(0, 12 * t - 1))
    physical, offset = divmod(slot(table, index, t), t)
    assert table.index(physical) * t + offset == index
    assert page_and_offset(index, t) == (table.index(physical), offset)


def test_a_slot_beyond_the_block_table_is_an_error() -> None:
    """A table that was not grown is not read past its end."""
    assert slot([0, 1], 3, 2) == 3
    with pytest.raises(IndexError):
        slot([0, 1], 4, 2)


@pytest.mark.holds("LEN-1")
@given(legal_layouts(), TOKENS, TOKENS)
def test_lengths_sum_to_the_total(layout: Layout, prompt_len: int, steps: int) -> None:
    """LEN-1: over the ranks local_len sums to the request's tokens, at every size."""
    ranks = range(layout.cp_size)
    assert sum(local_len(layout, prompt_len, steps, r) for r in ranks) == prompt_len + steps


@pytest.mark.holds("OWN-1", "LEN-1")
@given(legal_layouts(), TOKENS, TOKENS, st.integers(0, 63), st.integers(0, 63))
def test_a_shift_only_turns_the_ranks(
    layout: Layout, prompt_len: int, steps: int, rank: int, shift: int
) -> None:
    """Rank r + s of a shifted request is rank r of one that is not."""
    rank, c = rank % layout.cp_size, layout.cp_size
    turned = (rank + shift) % c
    assert local_len(layout, prompt_len, steps, rank) == local_len(
        layout, prompt_len, steps, turned, shift
    )
    assert (owner(layout, prompt_len, steps) + shift) % c == owner(layout, prompt_len, steps, shift)


# Balance and equality of rules, by brute force over a period in L and in n.


@lru_cache(maxsize=8)
def lengths(layout: Layout) -> list[tuple[int, ...]]:
    """local_len of all ranks for every L and n below two periods."""
    c, span = layout.cp_size, range(2 * layout.cp_size * layout.tokens_per_block)
    return [
        tuple(local_len(layout, prompt_len, steps, rank) for rank in range(c))
        for prompt_len, steps in product(span, span)
    ]


@pytest.mark.holds("BAL-1")
@pytest.mark.parametrize(("c", "t"), list(product((2, 3, 4), (1, 2, 3))))
def test_the_spread_reaches_its_bound_and_never_passes_it(c: int, t: int) -> None:
    """BAL-1: the worst spread over all prompt and decoded lengths is the bound itself."""
    contiguous = named_layout("pr9757", cp_size=c, tokens_per_block=t)
    dealt = named_layout("pr17866", cp_size=c, tokens_per_block=t)
    bounds = {
        dealt: t,
        named_layout("pr13180", cp_size=c, tokens_per_block=t): 2 * t,
        contiguous: 3 * t - 1,
        contiguous.replace(owner="position"): 3 * t - 2,
    }
    for i in range(1, t + 1):
        if t % i == 0:
            bounds[named_layout("vllm_dcp", cp_size=c, tokens_per_block=t, interleave=i)] = i
    for layout, bound in bounds.items():
        assert max(max(held) - min(held) for held in lengths(layout)) == bound


@pytest.mark.holds("BAL-2")
@pytest.mark.parametrize(("c", "t"), [(2, 1), (2, 3), (3, 2), (4, 2)])
def test_decoded_tokens_alone_spread_by_at_most_a_chunk(c: int, t: int) -> None:
    """BAL-2: at most T (I under interleave); under last_rank their number."""
    for layout in small_layouts(c, t):
        for prompt_len, steps in product(range(t * c), range(2 * t * c)):
            decoded = [decode_local_len(layout, prompt_len, steps, rank) for rank in range(c)]
            spread = max(decoded) - min(decoded)
            if layout.owner == "last_rank":
                assert spread == steps
            else:
                assert spread <= (layout.owner_interleave or t)


@pytest.mark.holds("BAL-3")
@given(legal_layouts(), TOKENS, TOKENS, st.integers(1, 3))
def test_a_round_of_rotated_requests_is_level(
    layout: Layout, prompt_len: int, steps: int, rounds: int
) -> None:
    """BAL-3: k*C equal requests in a row give every rank the same total."""
    c = layout.cp_size
    totals = {
        sum(local_len(layout, prompt_len, steps, rank, number % c) for number in range(rounds * c))
        for rank in (0, c // 2, c - 1)
    }
    assert totals == {rounds * (prompt_len + steps)}


@pytest.mark.holds("EQ-1")
@pytest.mark.parametrize(("c", "t"), list(product((2, 3, 4), (1, 2, 3))))
def test_step_and_position_rules_agree_only_after_full_super_blocks(c: int, t: int) -> None:
    """EQ-1: they own every step alike exactly when L mod (T*C) = 0."""
    step_rule = named_layout("pr13180", cp_size=c, tokens_per_block=t)
    position_rule = named_layout("balanced", cp_size=c, tokens_per_block=t)
    for prompt_len in range(3 * t * c):
        alike = all(
            decode_owner(step_rule, prompt_len, step)
            == decode_owner(position_rule, prompt_len, step)
            for step in range(t * c)
        )
        assert alike == (prompt_len % (t * c) == 0)
