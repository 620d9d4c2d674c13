"""Cache groups: replicated ones, windows, and pools that groups share (REP-1, WIN-1, WIN-2).

What a window needs of a layout is two facts: how many tokens before a position a rank has
(`tokens-before-step`), and that these counts rise (`tokens-before-grows`). Everything about `lazy`
pages follows from them for every pair of rules, so `tokens_before` and `owner` are free there. A
replicated group is placed by a layout of one rank, so what holds for every C holds for it.
"""

from __future__ import annotations

from helix_spec import placement
from helix_spec.config import CacheGroup, Config
from helix_spec.layouts import Layout, PagePolicy
from helix_spec.theorems import mutations as m
from helix_spec.theorems.base import Natural, Size, assume, implies, lemma, theorem
from helix_spec.theorems.lengths import (
    chunk_count_base,
    chunk_count_step,
    contiguous_count,
)
from helix_spec.theorems.ownership import (
    contiguous_ends,
    contiguous_split_tiles,
    owner_in_range,
    owner_of_a_contiguous_split,
)
from helix_spec.theorems.pages import super_blocks_chained, super_blocks_hold_chunks
from helix_spec.theorems.shapes import DEALING, EVERY_PAIR, SPLITTING, Pair

COUNTS = ("placement.tokens_before", "placement.owner")
"""Free functions of a proof that rests on the two facts alone."""
_LOCKSTEP = (Pair("round_robin", "position"), Pair("interleave", "interleave"))
"""The pairs for which `lockstep` is legal, and that deal prompt and decoded tokens in one turn."""

# REP-1.


@theorem(
    "one-rank-has-all",
    proves="REP-1",
    witness={"length": 5, "i": 2},
    about=["placement.chunk_local_len", "placement.chunk_owner"],
)
def one_rank_has_all(length: Natural, i: Size) -> bool:
    """Dealt to one rank, all tokens are on it, whatever the chunks."""
    share = placement.chunk_local_len(length, 0, 1, i)
    return (share == length) & (placement.chunk_owner(length, 1, i) == 0)


@theorem(
    "replicated-is-unsharded",
    proves="REP-1",
    witness={"prompt": 5, "position": 7, "window": 3, "shift": 1, "c": 2, "t": 2, "i": 1, "j": 2},
    about=["placement.local_index", "placement.visible_range"],
    kills=[m.full_pages_only, m.rounded_up_always, m.window_without_the_query],
    cases=EVERY_PAIR,
    free=[*DEALING, *SPLITTING],
)
def replicated_is_unsharded(
    pair: Pair,
    prompt: Size,
    position: Natural,
    window: Size,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """Under the layout of a replicated group, whatever the configured one: every token is owned
    by the one rank that there is, at a local index that is its position; page k spans the T tokens
    from k*T on, under lazy and lockstep; a query sees the positions of its window.
    """
    layout = _layout_of_replicated(pair, c, t, i, j, "lazy")
    total = position + 1
    assume(prompt <= total)
    if pair.prompt == "contiguous":
        lemma(contiguous_split_tiles, prompt, 0, 1, t)
        if position < prompt:
            lemma(owner_of_a_contiguous_split, position, prompt, 1, t)
    origin = pair.counted(prompt) - prompt
    for count in (prompt, position, total, max(0, total - window)):
        lemma(one_rank_has_all, count, pair.prompt_chunk(t, i))
        if count >= prompt:
            lemma(one_rank_has_all, origin + count, pair.chunk(t, j))
    lemma(one_rank_has_all, pair.counted(prompt), pair.chunk(t, j))
    first, end = placement.visible_range(layout, prompt, position, window, 0, shift)
    pages = placement.pages_needed(layout, prompt, total - prompt, 0, shift)
    locked = _layout_of_replicated(pair, c, t, i, j, "lockstep")
    return (
        (placement.owner(layout, prompt, position, shift) == 0)
        & (placement.local_index(layout, prompt, position, shift) == position)
        & ((pages - 1) * t <= position)
        & (position < pages * t)
        & (placement.pages_needed(locked, prompt, total - prompt, 0, shift) == pages)
        & (first == max(0, total - window))
        & (end == total)
    )


@replicated_is_unsharded.wrong()
def replicated_pages_span_all_ranks(
    pair: Pair,
    prompt: Size,
    position: Natural,
    window: Size,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """A page of a replicated group spans T*C tokens."""
    layout = pair.layout(c, t, i, j, "lockstep")
    assume(prompt <= position)
    pages = placement.pages_needed(layout, prompt, position + 1 - prompt, 0, shift)
    return position < pages * t


def _layout_of_replicated(pair: Pair, c: int, t: int, i: int, j: int, pages: PagePolicy) -> Layout:
    """The layout of a replicated group, as engines derive it from the configuration."""
    config = Config(layout=pair.layout(c, t, i, j, pages), pages=[], max_len=1)
    return config.layout_of(CacheGroup(name="near", layers=[0], placement="replicated"))


# Tokens before a position.


@theorem(
    "tokens-before-step",
    proves="WIN-1 LEN-1",
    witness={"prompt": 5, "position": 7, "rank": 1, "shift": 1, "c": 2, "t": 2, "i": 1, "j": 2},
    about=["placement.tokens_before"],
    kills=[m.shift_forgotten],
    cases=EVERY_PAIR,
    free=[*DEALING, *SPLITTING],
)
def tokens_before_step(
    pair: Pair,
    prompt: Size,
    position: Natural,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """In every layout no token is before position 0, and one more position makes the count of its
    owner, and of no other rank, one larger, across the end of the prompt too; so it counts a rank's
    tokens before the position, and is the local index of the token that is there.
    """
    assume(rank < c, shift < c)
    layout, logical = pair.layout(c, t, i, j), (rank - shift) % c
    if position >= prompt and pair.owner != "last_rank":
        counted, chunk = pair.counted(prompt) + position - prompt, pair.chunk(t, j)
        lemma(owner_in_range, counted, c, chunk)
        lemma(chunk_count_step, counted, logical, c, chunk)
    if pair.prompt == "contiguous":
        lemma(contiguous_split_tiles, prompt, logical, c, t)
        lemma(contiguous_ends, prompt, logical, c, t)
        lemma(contiguous_ends, prompt, logical + 1, c, t)
        if position < prompt:
            lemma(contiguous_count, position, prompt, logical, c, t)
            lemma(owner_of_a_contiguous_split, position, prompt, c, t)
    else:
        chunk = pair.prompt_chunk(t, i)
        lemma(chunk_count_base, logical, c, chunk)
        lemma(owner_in_range, position, c, chunk)
        lemma(chunk_count_step, position, logical, c, chunk)
    before = placement.tokens_before(layout, prompt, position, rank, shift)
    owner = placement.owner(layout, prompt, position, shift)
    after = placement.tokens_before(layout, prompt, position + 1, rank, shift)
    none = placement.tokens_before(layout, prompt, 0, rank, shift) == 0
    return none & (after == before + (owner == rank)) & (owner >= 0) & (owner < c)


@theorem(
    "chunk-count-of-what-follows",
    proves="WIN-1",
    witness={"length": 5, "more": 2, "rank": 0, "c": 2, "i": 3},
    kills=[m.no_clamp_from_above, m.last_chunk_taken_as_full],
)
def chunk_count_of_what_follows(
    length: Natural, more: Natural, rank: Natural, c: Size, i: Size
) -> bool:
    """Dealing chunks in turn, a rank gets none to all of the next n tokens."""
    assume(rank < c)
    before = placement.chunk_local_len(length, rank, c, i)
    after = placement.chunk_local_len(length + more, rank, c, i)
    return (before >= 0) & (before <= after) & (after <= before + more)


@theorem(
    "tokens-before-grows",
    proves="WIN-1 WIN-2",
    witness={
        "prompt": 5,
        "position": 3,
        "more": 4,
        "rank": 1,
        "shift": 1,
        "c": 2,
        "t": 2,
        "i": 1,
        "j": 2,
    },
    kills=[m.no_clamp_from_below],
    cases=EVERY_PAIR,
    free=[*DEALING, *SPLITTING],
)
def tokens_before_grows(
    pair: Pair,
    prompt: Size,
    position: Natural,
    more: Natural,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """In every layout, n positions more make the count of a rank larger by 0 to n tokens."""
    assume(rank < c, shift < c)
    layout, logical, later = pair.layout(c, t, i, j), (rank - shift) % c, position + more
    if pair.owner != "last_rank" and later >= prompt:
        start = position if position >= prompt else prompt
        origin, chunk = pair.counted(prompt), pair.chunk(t, j)
        lemma(chunk_count_of_what_follows, origin, start - prompt, logical, c, chunk)
        lemma(
            chunk_count_of_what_follows, origin + start - prompt, later - start, logical, c, chunk
        )
    if pair.prompt == "contiguous":
        lemma(contiguous_split_tiles, prompt, logical, c, t)
        lemma(contiguous_ends, prompt, logical, c, t)
        lemma(contiguous_ends, prompt, logical + 1, c, t)
    elif position < prompt:
        end = later if later < prompt else prompt
        chunk = pair.prompt_chunk(t, i)
        lemma(chunk_count_of_what_follows, position, end - position, logical, c, chunk)
    else:
        lemma(chunk_count_of_what_follows, prompt, 0, logical, c, pair.prompt_chunk(t, i))
    before = placement.tokens_before(layout, prompt, position, rank, shift)
    after = placement.tokens_before(layout, prompt, later, rank, shift)
    return (before >= 0) & (before <= after) & (after <= before + more)


@theorem(
    "index-below-a-count",
    proves="WIN-1 WIN-2 GROW-1",
    witness={
        "prompt": 5,
        "token": 4,
        "position": 7,
        "shift": 1,
        "c": 2,
        "t": 2,
        "i": 1,
        "j": 2,
    },
    kills=[m.index_by_global_block],
    cases=EVERY_PAIR,
    free=COUNTS,
)
def index_below_a_count(
    pair: Pair,
    prompt: Size,
    token: Natural,
    position: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """The local index of a token is below its rank's count before a position exactly when the token
    is: a rank stores its tokens by rising position, in every layout.
    """
    assume(shift < c)
    layout, sizes = pair.layout(c, t, i, j), (c, t, i, j)
    rank = placement.owner(layout, prompt, token, shift)
    assume(rank >= 0, rank < c)  # by tokens-before-step
    lemma(tokens_before_step, pair, prompt, token, rank, shift, *sizes)
    lemma(tokens_before_grows, pair, prompt, token, 0, rank, shift, *sizes)
    if position <= token:
        lemma(tokens_before_grows, pair, prompt, position, token - position, rank, shift, *sizes)
    else:
        more = position - token - 1
        lemma(tokens_before_grows, pair, prompt, token + 1, more, rank, shift, *sizes)
    index = placement.local_index(layout, prompt, token, shift)
    before = placement.tokens_before(layout, prompt, position, rank, shift)
    return (index >= 0) & ((index < before) == (token < position))


# WIN-1.


@theorem(
    "window-is-a-range",
    proves="WIN-1 LEN-3",
    witness={
        "prompt": 5,
        "token": 4,
        "query": 7,
        "window": 3,
        "shift": 1,
        "c": 2,
        "t": 2,
        "i": 1,
        "j": 2,
    },
    about=["placement.visible_range"],
    kills=[m.window_without_the_query, m.window_of_local_tokens, m.window_in_equal_shares],
    cases=EVERY_PAIR,
    free=COUNTS,
)
def window_is_a_range(
    pair: Pair,
    prompt: Size,
    token: Natural,
    query: Natural,
    window: Size,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """What a query sees on a rank is a range of local indexes: a token that the rank owns has its
    index there exactly when its position is above p - w and at most p. So the visible keys are
    the rank's tokens before p + 1 less those before max(0, p - w + 1), in every layout.
    """
    assume(shift < c)
    layout, sizes = pair.layout(c, t, i, j), (c, t, i, j)
    rank = placement.owner(layout, prompt, token, shift)
    assume(rank >= 0, rank < c)  # by tokens-before-step
    first = max(0, query - window + 1)
    lemma(index_below_a_count, pair, prompt, token, first, shift, *sizes)
    lemma(index_below_a_count, pair, prompt, token, query + 1, shift, *sizes)
    index = placement.local_index(layout, prompt, token, shift)
    start, stop = placement.visible_range(layout, prompt, query, window, rank, shift)
    inside = (start <= index) & (index < stop)
    return inside == ((token + window > query) & (token <= query))


# WIN-2.


@theorem(
    "next-query-is-the-least",
    proves="WIN-2",
    witness={"total": 8, "open_len": 3, "kept": 1, "more": 2},
    about=["placement.next_query"],
    kills=[m.open_group_forgotten, m.whole_group_taken_back],
)
def next_query_is_the_least(total: Size, open_len: Natural, kept: Size, more: Size) -> bool:
    """With a group of g tokens open the next query comes at the total or, when `kept` of them are
    accepted, at total - g + kept; m is the least of these and is one of them. It never falls: not
    by an accept, not by a decode, whose group begins at the total.
    """
    assume(open_len < total)
    least = placement.next_query(total, open_len)
    after = total - open_len + kept
    possible = implies(kept <= open_len, (least <= after) & implies(kept == 1, least == after))
    accepted = implies(kept <= open_len, least <= placement.next_query(after, 0))
    return (
        (least <= total)
        & implies(open_len == 0, least == total)
        & possible
        & accepted
        & (least <= placement.next_query(total + more, more))
    )


_WINDOW = {"total": 8, "open_len": 3, "window": 2, "shift": 1, "c": 2, "t": 2, "i": 1, "j": 2}


@theorem(
    "window-pages-safe",
    proves="WIN-2 GROW-1",
    witness={"prompt": 5, "kept": 1, "more": 0, "token": 5, **_WINDOW},
    about=["placement.pages_dropped"],
    kills=[
        m.open_group_forgotten.at(
            prompt=1, kept=1, more=0, token=2, total=3, open_len=2, window=1,
            shift=0, c=1, t=1, i=1, j=1,
        ),
        m.dropped_with_the_first_token,
        m.dropped_by_global_blocks,
    ],
    cases=EVERY_PAIR,
    free=COUNTS,
)  # fmt: skip
def window_pages_safe(
    pair: Pair,
    prompt: Size,
    kept: Natural,
    more: Natural,
    token: Natural,
    total: Size,
    open_len: Natural,
    window: Size,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """Under lazy, whatever is accepted of the open group and however far decoding goes on, no later
    query sees a token of a page that has gone back. Every query sees itself, so such a page is
    never written again either. (With total - w in place of m - w one sees such a token: with
    T = w = 1 and g = 2, when one is accepted.)
    """
    assume(shift < c, kept <= open_len, implies(kept == 0, open_len == 0))
    assume(prompt + open_len <= total)
    query = total - open_len + kept + more
    assume(token <= query, token + window > query)
    layout, sizes = pair.layout(c, t, i, j), (c, t, i, j)
    rank = placement.owner(layout, prompt, token, shift)
    assume(rank >= 0, rank < c)  # by tokens-before-step
    least = placement.next_query(total, open_len)
    lemma(index_below_a_count, pair, prompt, token, max(0, least - window + 1), shift, *sizes)
    page = placement.local_index(layout, prompt, token, shift) // t
    return page >= placement.pages_dropped(layout, prompt, least, window, rank, shift)


@theorem(
    "window-pages-needed",
    proves="WIN-2",
    witness={"prompt": 5, "page": 1, "token": 3, **_WINDOW, "shift": 0, "c": 1},
    about=["placement.pages_dropped"],
    kills=[m.dropped_one_query_late, m.whole_group_taken_back],
    cases=EVERY_PAIR,
    free=COUNTS,
)
def window_pages_needed(
    pair: Pair,
    prompt: Size,
    page: Natural,
    token: Natural,
    total: Size,
    open_len: Natural,
    window: Size,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """Under lazy a page is gone exactly when the position of its last slot is at most m - w; then
    all of its slots were written. While it stays, the token of that slot is seen: at the larger of
    m and its own position, which is a next query, or after one, for some outcome of the open group.
    (Some ranks never write their last slot, under last_rank; that page stays.)
    """
    assume(shift < c, prompt + open_len <= total)
    layout, sizes = pair.layout(c, t, i, j), (c, t, i, j)
    rank = placement.owner(layout, prompt, token, shift)
    assume(rank >= 0, rank < c)  # by tokens-before-step
    assume(placement.local_index(layout, prompt, token, shift) == page * t + t - 1)
    least = placement.next_query(total, open_len)
    lemma(index_below_a_count, pair, prompt, token, max(0, least - window + 1), shift, *sizes)
    gone = page < placement.pages_dropped(layout, prompt, least, window, rank, shift)
    query = max(least, token)
    kept = query - (total - open_len)
    comes = (query >= total) | ((kept >= 1) & (kept <= open_len))
    seen = (token <= query) & (token + window > query) & comes
    return (gone == (token + window <= least)) & implies(gone, token < total) & (gone | seen)


@theorem(
    "quotients-rise",
    proves="WIN-2",
    witness={"a": 7, "more": 3, "b": 3},
)
def quotients_rise(a: Natural, more: Natural, b: Size) -> bool:
    """More tokens fill at least as many pages, and full pages hold no more than all tokens."""
    fewer, pages = a // b, (a + more) // b
    return (fewer <= pages) & (fewer * b <= a) & (fewer >= 0)


@quotients_rise.wrong()
def more_tokens_fill_more_pages(a: Natural, more: Natural, b: Size) -> bool:
    """More tokens fill more pages."""
    assume(more > 0)
    return a // b < (a + more) // b


@theorem(
    "window-pages-come-first",
    proves="WIN-2",
    witness={"prompt": 5, "more": 3, "rank": 1, **_WINDOW},
    kills=[m.dropped_with_the_first_token],
    cases=EVERY_PAIR,
    free=["placement.tokens_before"],
)
def window_pages_come_first(
    pair: Pair,
    prompt: Size,
    more: Natural,
    rank: Natural,
    total: Size,
    open_len: Natural,
    window: Size,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """Pages that have gone back are the first of the table, as many as pages_dropped says: all of
    them are full, and later events, for which m is no smaller, only add to them.
    """
    assume(rank < c, shift < c, prompt + open_len <= total)
    layout, sizes = pair.layout(c, t, i, j), (c, t, i, j)
    least = placement.next_query(total, open_len)
    unseen, later = max(0, least - window + 1), max(0, least + more - window + 1)
    lemma(tokens_before_grows, pair, prompt, unseen, later - unseen, rank, shift, *sizes)
    lemma(tokens_before_grows, pair, prompt, unseen, total - unseen, rank, shift, *sizes)
    before = placement.tokens_before(layout, prompt, unseen, rank, shift)
    beyond = placement.tokens_before(layout, prompt, later, rank, shift) - before
    held = placement.tokens_before(layout, prompt, total, rank, shift)
    lemma(quotients_rise, before, beyond, t)
    gone = placement.pages_dropped(layout, prompt, least, window, rank, shift)
    then = placement.pages_dropped(layout, prompt, least + more, window, rank, shift)
    return (gone >= 0) & (gone * t <= held) & (gone <= then)


@theorem(
    "super-block-of-a-token",
    proves="PAGE-1 WIN-2",
    witness={"position": 7, "c": 2, "k": 2, "i": 1},
    kills=[m.equal_shares_rounded_up],
)
def super_block_of_a_token(position: Natural, c: Size, k: Size, i: Size) -> bool:
    """Dealing chunks of I in turn, where I divides T: page j of every rank holds tokens of
    super-block j alone, that is, of positions j*T*C to (j+1)*T*C - 1.
    """
    rank = placement.chunk_owner(position, c, i)
    index = placement.chunk_local_len(position, rank, c, i)
    return index // i // k == position // i // c // k


@theorem(
    "window-super-blocks",
    proves="WIN-2",
    witness={"kept": 1, "more": 0, "token": 5, "rank": 1, "total": 8, "open_len": 3, "window": 2,
             "shift": 1, "c": 2, "t": 2},
    about=["placement.pages_dropped"],
    kills=[m.open_group_forgotten, m.dropped_by_global_blocks, m.dropped_one_query_late],
)  # fmt: skip
def window_super_blocks(
    kept: Natural,
    more: Natural,
    token: Natural,
    rank: Natural,
    total: Size,
    open_len: Natural,
    window: Size,
    shift: Natural,
    c: Size,
    t: Size,
) -> bool:
    """Under lockstep the same with super-blocks (super-block-of-a-token), on all ranks at once: one
    goes back when its last position is at most m - w, which is written then; no later query sees a
    token of it; and while it stays its last position is seen by some query that may come.
    """
    assume(rank < c, shift < c, open_len < total)
    layout = Pair("round_robin", "position").layout(c, t, pages="lockstep")
    least, block = placement.next_query(total, open_len), token // (t * c)
    dropped = placement.pages_dropped(layout, 1, least, window, rank, shift)
    gone, stays = block < dropped, block >= dropped
    last = (block + 1) * t * c - 1
    query = total - open_len + kept + more
    later = (kept <= open_len) & implies(kept == 0, open_len == 0)
    sees = later & (token <= query) & (token + window > query)
    return (
        (gone == (last + window <= least))
        & implies(gone, last < total)
        & implies(sees, stays)
        & (gone | (last + window > max(least, last)))
    )


# The most pages of a window.


_MOST = {"prompt": 5, "total": 8, "open_len": 3, "more": 2, "window": 2, "rank": 1, "shift": 1}


@theorem(
    "ceil-div-rises",
    proves="PAGE-1",
    witness={"a": 7, "more": 3, "b": 3},
)
def ceil_div_rises(a: Natural, more: Natural, b: Size) -> bool:
    """More tokens never need fewer pages."""
    return placement.ceil_div(a, b) <= placement.ceil_div(a + more, b)


@ceil_div_rises.wrong()
def one_token_more_needs_a_page(a: Natural, more: Natural, b: Size) -> bool:
    """One token more needs one page more."""
    return placement.ceil_div(a, b) < placement.ceil_div(a + more + 1, b)


@theorem(
    "ceil-div-at-most",
    proves="PAGE-1",
    witness={"a": 7, "b": 3, "most": 3},
    kills=[m.rounded_up_always, m.negated_division_truncated],
)
def ceil_div_at_most(a: Natural, b: Size, most: Natural) -> bool:
    """At most n parts of b hold a exactly when a is at most n * b."""
    return (placement.ceil_div(a, b) <= most) == (a <= most * b)


@theorem(
    "at-least-full-pages",
    proves="PAGE-1",
    witness={"a": 7, "b": 3, "least": 2},
)
def at_least_full_pages(a: Natural, b: Size, least: Natural) -> bool:
    """At least n pages are full exactly when n * b tokens are there."""
    return (a // b >= least) == (a >= least * b)


@at_least_full_pages.wrong()
def full_with_one_token_fewer(a: Natural, b: Size, least: Natural) -> bool:
    """A page is full with one token fewer."""
    return ((a + 1) // b >= least) == (a >= least * b)


@theorem(
    "pages-of-a-range",
    proves="WIN-2 PAGE-1",
    witness={"start": 5, "more": 3, "most": 4, "t": 2},
)
def pages_of_a_range(start: Natural, more: Natural, most: Natural, t: Size) -> bool:
    """Up to n numbers in a row lie in at most ceil((T - 1 + n) / T) pages."""
    assume(more <= most)
    place = start % t
    lemma(ceil_div_rises, place + more, t - 1 + most - place - more, t)
    pages = placement.ceil_div(start + more, t) - start // t
    return pages <= placement.ceil_div(t - 1 + most, t)


@pages_of_a_range.wrong()
def ranges_start_on_page_edges(start: Natural, more: Natural, most: Natural, t: Size) -> bool:
    """Ranges start on page edges."""
    assume(more <= most)
    pages = placement.ceil_div(start + more, t) - start // t
    return pages <= placement.ceil_div(most, t)


@theorem(
    "super-blocks-fill-pages",
    proves="WIN-2 PAGE-1",
    witness={"full": 2, "more": 5, "rank": 1, "c": 2, "k": 3, "i": 2},
    kills=[m.no_clamp_from_below],
)
def super_blocks_fill_pages(
    full: Natural, more: Natural, rank: Natural, c: Size, k: Size, i: Size
) -> bool:
    """Dealing chunks of I in turn, where I divides T, a rank has filled a page for each full
    super-block.
    """
    assume(rank < c)
    return placement.chunk_local_len(full * k * i * c + more, rank, c, i) >= full * k * i


@theorem(
    "most-window-pages",
    proves="WIN-2 PAGE-1",
    witness={**_MOST, "c": 2, "t": 4, "i": 1, "j": 2},
    kills=[m.window_on_page_edges, m.window_of_single_tokens],
    cases=[pair for pair in EVERY_PAIR if pair != Pair("round_robin", "position")],
    free=["placement.tokens_before"],
)
def most_window_pages(
    pair: Pair,
    prompt: Size,
    total: Size,
    open_len: Size,
    more: Natural,
    window: Size,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
    i: Size,
    j: Size,
) -> bool:
    """Under lazy, where prompt and decoded tokens are not dealt in one turn, a rank holds at most
    ceil((T - 1 + w + g - 2) / T) pages for a window after an event, with a group of g open (1 for
    none); and with d more in place of g where the next decode, of d tokens, is placed.
    """
    assume(rank < c, shift < c, prompt + open_len <= total)
    if pair.prompt != "contiguous" and pair.owner in ("position", "interleave"):
        assume(pair.prompt_chunk(t, i) != pair.chunk(t, j))
    layout, sizes = pair.layout(c, t, i, j), (c, t, i, j)
    least = placement.next_query(total, open_len)
    unseen, then = max(0, least - window + 1), total + more
    lemma(tokens_before_grows, pair, prompt, unseen, then - unseen, rank, shift, *sizes)
    gone = placement.tokens_before(layout, prompt, unseen, rank, shift)
    held = placement.tokens_before(layout, prompt, then, rank, shift)
    lemma(pages_of_a_range, gone, held - gone, window + open_len + more - 2, t)
    dropped = placement.pages_dropped(layout, prompt, least, window, rank, shift)
    held = placement.ceil_div(held, t) - dropped
    return held <= placement.most_window_pages(layout, window, open_len + more)


@theorem(
    "counts-in-one-turn",
    proves="WIN-2 LEN-1",
    witness={"prompt": 5, "position": 7, "rank": 1, "shift": 1, "c": 2, "k": 2, "i": 1},
    about=["placement.tokens_before"],
    kills=[m.step_where_position_is_meant],
    cases=_LOCKSTEP,
    free=DEALING,
)
def counts_in_one_turn(
    pair: Pair,
    prompt: Size,
    position: Natural,
    rank: Natural,
    shift: Natural,
    c: Size,
    k: Size,
    i: Size,
) -> bool:
    """Where prompt and decoded tokens are dealt in one turn, the tokens before a position are those
    of dealing that many.
    """
    assume(rank < c, shift < c)
    layout = pair.layout(c, k * i if pair.owner == "interleave" else i, i, i)
    before = placement.tokens_before(layout, prompt, position, rank, shift)
    return before == placement.chunk_local_len(position, (rank - shift) % c, c, i)


@theorem(
    "most-window-pages-in-one-turn",
    proves="WIN-2 PAGE-1",
    witness={"first": 5, "more": 2, "open_len": 3, "window": 2, "rank": 0, "c": 2, "k": 2, "i": 2},
    kills=[m.window_of_single_tokens],
    cases=_LOCKSTEP,
    free=["placement.chunk_local_len"],
)
def most_window_pages_in_one_turn(
    pair: Pair,
    first: Natural,
    more: Natural,
    open_len: Size,
    window: Size,
    rank: Natural,
    c: Size,
    k: Size,
    i: Size,
) -> bool:
    """There (counts-in-one-turn) a rank under lazy holds no more than lockstep would for the
    w + g - 2 positions from the first one that can still be seen on: it fills a page for each
    full super-block, and needs no more than one for each that is begun.
    """
    assume(rank < c, more <= window + open_len - 2)
    t, parts = (k * i, k) if pair.owner == "interleave" else (i, 1)
    gone = placement.chunk_local_len(first, rank, c, i)
    held = placement.chunk_local_len(first + more, rank, c, i)
    lemma(chunk_count_of_what_follows, first, more, rank, c, i)
    full, rest = divmod(first, t * c)
    lemma(super_blocks_fill_pages, full, rest, rank, c, parts, i)
    lemma(super_blocks_hold_chunks, first + more, rank, c, parts, i)
    lemma(super_blocks_chained, first + more, c, t)
    lemma(pages_of_a_range, first, more, window + open_len - 2, t * c)
    lemma(ceil_div_at_most, held, t, placement.ceil_div(first + more, t * c))
    lemma(at_least_full_pages, gone, t, full)
    pages = placement.ceil_div(held, t) - gone // t
    return pages <= placement.most_window_pages(pair.layout(c, t, i, i), window, open_len)


@theorem(
    "most-window-pages-under-lockstep",
    proves="WIN-2 PAGE-1",
    witness={**_MOST, "c": 2, "t": 2},
    kills=[m.window_on_page_edges, m.window_of_single_tokens],
)
def most_window_pages_under_lockstep(
    prompt: Size,
    total: Size,
    open_len: Size,
    more: Natural,
    window: Size,
    rank: Natural,
    shift: Natural,
    c: Size,
    t: Size,
) -> bool:
    """The same under lockstep: ceil((T*C - 1 + w + g - 2) / (T*C)) pages on every rank."""
    assume(rank < c, shift < c, prompt + open_len <= total)
    layout = Pair("round_robin", "position").layout(c, t, pages="lockstep")
    least = placement.next_query(total, open_len)
    unseen, then = max(0, least - window + 1), total + more
    lemma(pages_of_a_range, unseen, then - unseen, window + open_len + more - 2, t * c)
    dropped = placement.pages_dropped(layout, prompt, least, window, rank, shift)
    held = placement.pages_needed(layout, prompt, then - prompt, rank, shift) - dropped
    return held <= placement.most_window_pages(layout, window, open_len + more)


@theorem(
    "most-window-pages-attained",
    proves="WIN-2 PAGE-1",
    witness={"open_len": 3, "window": 2, "c": 2, "t": 2},
    about=["placement.most_window_pages"],
    kills=[m.window_of_single_tokens],
)
def most_window_pages_attained(open_len: Size, window: Size, c: Size, t: Size) -> bool:
    """It is attained under lockstep, and so by a replicated group: when the first position that can
    still be seen is the last of a super-block.
    """
    total = 2 * t * c - 1 + window + open_len - 2
    assume(open_len <= total)
    layout = Pair("round_robin", "position").layout(c, t, pages="lockstep")
    least = placement.next_query(total, open_len)
    dropped = placement.pages_dropped(layout, total, least, window, 0)
    held = placement.pages_needed(layout, total, 0, 0) - dropped
    return held == placement.most_window_pages(layout, window, open_len)


# Pools.


@theorem(
    "shared-capacity-in-short-pages",
    proves="PAGE-1",
    witness={"pages": 12, "taken": 9, "k": 4},
)
def shared_capacity_in_short_pages(pages: Natural, taken: Natural, k: Size) -> bool:
    """With a long page for every k short ones, n short pages fit in a pool exactly up to k for each
    k + 1 pages, and one less than what is left of it.
    """
    need = taken + placement.ceil_div(taken, k)
    return (need <= pages) == (taken <= _short_pages(pages, k))


@shared_capacity_in_short_pages.wrong()
def short_pages_of_whole_rounds(pages: Natural, taken: Natural, k: Size) -> bool:
    """Short pages fit in whole rounds alone."""
    need = taken + placement.ceil_div(taken, k)
    return (need <= pages) == (taken <= pages // (k + 1) * k)


def _short_pages(pages: int, k: int) -> int:
    """Short pages that fit beside their long ones, in closed form."""
    rounds, rest = divmod(pages, k + 1)
    return rounds * k + max(0, rest - 1)


@theorem(
    "shared-capacity",
    proves="PAGE-1",
    witness={"pages": 12, "total": 144, "k": 4, "short": 16},
    about=["placement.shared_capacity"],
    kills=[m.one_page_a_round, m.whole_rounds_only],
)
def shared_capacity(pages: Natural, total: Natural, k: Size, short: Size) -> bool:
    """Of two groups in one pool, whose pages span s and k*s tokens: a request of n tokens, which
    needs ceil(n/s) + ceil(n/(k*s)) pages, fits exactly when n is at most the capacity.
    """
    taken = placement.ceil_div(total, short)
    lemma(super_blocks_chained, total, k, short)
    lemma(shared_capacity_in_short_pages, pages, taken, k)
    lemma(ceil_div_at_most, total, short, _short_pages(pages, k))
    need = taken + placement.ceil_div(total, short * k)
    return (need <= pages) == (total <= placement.shared_capacity(pages, short * k, short))
