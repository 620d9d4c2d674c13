"""The ledger: counters of every request, which every rank keeps alike without communication.

It holds counters alone (the owner of the next token, the tokens left until the owner changes,
lengths and pages of all ranks) and advances them token by token, so a step costs the same at any
context length. A plan decides every refusal and changes nothing; applying it cannot fail.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from helix_gpu.bookkeeping.contents import Block, Chain, Contents
from helix_gpu.bookkeeping.dealing import (
    PromptShard,
    deal_prompt,
    first_turn,
    goes_on,
    owner_chunk,
    tokens_before,
)
from helix_gpu.bookkeeping.refusals import Refused
from helix_gpu.bookkeeping.sharing import (
    OpenPages,
    SharedPrefix,
    SharedWindows,
    fork_prefix,
    release_prefix,
)
from helix_spec.events import Reason
from helix_spec.layouts import Layout

Ints = NDArray[np.int64]


class Admission(NamedTuple):
    """The plan of an admission or resumption, which will be accepted.

    Attributes
    ----------
    id : int
    prompt_len : int
        Tokens to place.
    shift : int
        Rank that logical rank 0 is.
    shards : list of PromptShard, [cp_size]
        Prompt shard of each rank.
    pages : ndarray, int64 [cp_size]
        Pages that it takes on each rank: none of those that live requests hold.
    chain : Chain or None
        Its tokens, where the cache is told them.
    found : list of Block
        Its first blocks, which the cache has.
    hit : int
        Tokens in these blocks.
    """

    id: int
    prompt_len: int
    shift: int
    shards: list[PromptShard]
    pages: Ints
    chain: Chain | None = None
    found: Sequence[Block] = ()
    hit: int = 0


class Step(NamedTuple):
    """The plan of a step: new tokens for each of n requests, m in all (int64 unless said).

    Tokens stand request after request, in the order of the batch. A tuple, as all plans are: a
    frozen dataclass of so many fields takes as long to make as two of numpy's operations.
    """

    rows: Ints
    """[n] where the ledger keeps the requests."""
    query_lens: Ints
    """[n] new tokens of each request."""
    requests: Ints
    """[m] places in the batch of the tokens' requests."""
    firsts: Ints
    """[n] places among the tokens of each request's first one."""
    positions: Ints
    """[m] global positions of the new tokens."""
    owners: Ints
    """[m] ranks that own them."""
    past_lens: Ints
    """[m, cp_size] tokens of the request on each rank before this one."""
    indexes: Ints
    """[m] local indexes of the new tokens on their owners."""
    opening: Ints
    """[k] places among the tokens of those that open a page."""
    opened: Ints
    """[k] local numbers of the pages they open."""
    shared: list[SharedWrite]
    """Pages written into that other requests held too, in the order of the batch."""
    pages: Ints
    """[cp_size] pages that the step takes on each rank."""
    pad: int
    """Dummy requests behind the n."""


class SharedWrite(NamedTuple):
    """A write into an open page on a rank that a fork has shared."""

    place: int
    """Place of the request in the batch."""
    rank: int
    copies: bool
    """Whether it takes a copy; False for the last holder, who writes in place."""


class Rewind(NamedTuple):
    """The plan of an acceptance: what a request has after it.

    Attributes
    ----------
    row : int
        Where the ledger keeps the request.
    total : int
        Tokens on all ranks.
    owner : int
        Rank that owns the next token.
    left : int
        Tokens until the next rank owns them.
    """

    row: int
    total: int
    owner: int
    left: int
    local_len: Ints
    """[cp_size]"""
    held: Ints
    """[cp_size] pages before it."""
    kept: Ints
    """[cp_size] pages after it; those beyond go back."""


class Drop(NamedTuple):
    """Pages that have left the window of k requests: the first ones that each still held."""

    rows: Ints
    """[k] where the ledger keeps the requests."""
    firsts: Ints
    """[k, cp_size] local number of the first page that goes."""
    counts: Ints
    """[k, cp_size] pages that go."""


class Ledger:
    """Counters of all known requests in one cache group, identical on every rank.

    Parameters
    ----------
    layout : Layout
    pages : sequence of int, [cp_size]
        Pool size of each rank. An array of free pages is kept, not copied: ledgers that are given
        the same one draw from one pool. It may be longer than cp_size is: that of a replicated
        group (`layout` then has C = 1) has an entry for each rank that holds a copy.
    max_len : int
        Global tokens that a request may reach.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> ledger = Ledger(parse_layout("pr9757/1:C=2,T=2"), pages=[8, 8], max_len=100)
    >>> row = ledger.admit(ledger.plan_admit(7, prompt_len=5))
    >>> step = ledger.plan_step([7], [3])
    >>> step.owners.tolist(), step.positions.tolist()
    ([0, 0, 1], [5, 6, 7])
    >>> ledger.advance(step)
    >>> ledger.local_lens([7]).tolist()
    [[6, 2]]
    """

    def __init__(self, layout: Layout, pages: Sequence[int] | Ints, max_len: int) -> None:
        self.layout = layout
        self.max_len = max_len
        self.overlap = False
        """Whether a decode is outstanding until `sampled` names it; set before the first one."""
        self.window: int | None = None
        """A query sees so many tokens, its own included; set before the first one. None for all."""
        self.contents: Contents | None = None
        """What can be found; set before the first one. None for nothing."""
        self.computes = False
        """Whether at least one token of a prompt is computed here, and so not found."""
        self._away: dict[int, Chain] = {}
        """Tokens of preempted requests."""
        self.free: Ints = np.asarray(pages, dtype=np.int64)
        """[cp_size] pages of each rank that no request holds."""
        self.admitted = 0
        """Admissions accepted so far; under `rotated` it shifts the next one."""
        # Arrays of no dimension: to convert a Python number takes numpy as long as to add eight.
        self._chunk, self._cp_size = np.array(owner_chunk(layout)), np.array(layout.cp_size)
        lockstep, t = layout.pages == "lockstep", layout.tokens_per_block
        self._goes_on = goes_on(layout)
        self._block: Ints = np.array(t * layout.cp_size if lockstep else t)
        """Tokens of a request, or under `lazy` of a rank, for which a page is opened."""
        self._row_of: dict[int, int] = {}
        self.preempted: dict[int, tuple[int, int]] = {}
        """Tokens and shift of each preempted request."""
        self._free_rows: list[int] = []
        self._open_pages = OpenPages()
        self._prefixes: dict[int, SharedPrefix] = {}
        """By row, for requests whose full pages others hold, or held, too."""
        self._shared_windows = SharedWindows()
        """The same where there is a window."""
        per_rank = (np.int64, (layout.cp_size,))
        self._rows: NDArray[Any] = np.zeros(
            0,
            dtype=[
                ("total", np.int64),
                ("prompt_len", np.int64),  # of the last placing
                ("shift", np.int64),
                ("owner", np.int64),
                ("left", np.int64),
                ("group", np.int64),  # tokens of the last decode while they can be rewound, or 0
                ("outstanding", np.int64),  # decodes not yet sampled
                ("local_len", *per_rank),
                ("tag", *per_rank),  # of the open page, see OpenPages
                ("dropped", *per_rank),  # pages that have left the window
                ("due", np.int64),  # none leaves while a query before this position may come
            ],
        )

    @property
    def ids(self) -> list[int]:
        """Return the live requests, in the order in which they were placed."""
        return list(self._row_of)

    def live(self, ids: Sequence[int]) -> list[int]:
        """Return those of the requests that are live, in their order.

        Parameters
        ----------
        ids : sequence of int
        """
        return [id for id in ids if id in self._row_of]

    def rows(self, ids: Sequence[int]) -> Ints:
        """Return the rows in which the ledger keeps live requests.

        Parameters
        ----------
        ids : sequence of int, [n]

        Returns
        -------
        ndarray, int64 [n]

        Raises
        ------
        Refused
            For a request that is not known, or preempted.
        """
        try:
            return np.fromiter(map(self._row_of.__getitem__, ids), np.int64, len(ids))
        except KeyError as error:
            raise self._not_live(error.args[0]) from None

    def local_lens(self, ids: Sequence[int]) -> Ints:
        """Return the tokens of live requests on each rank.

        Parameters
        ----------
        ids : sequence of int, [n]

        Returns
        -------
        ndarray, int64 [n, cp_size]

        Raises
        ------
        Refused
            As `rows`.
        """
        lengths: Ints = self._rows["local_len"][self.rows(ids)]
        return lengths

    def held(self, ids: Sequence[int]) -> Ints:
        """Return the pages of live requests on each rank, shared ones included.

        Parameters
        ----------
        ids : sequence of int, [n]

        Returns
        -------
        ndarray, int64 [n, cp_size]

        Raises
        ------
        Refused
            As `rows`.
        """
        state = self._rows[self.rows(ids)]
        pages: Ints = self._pages_for(state["total"], state["local_len"]) - state["dropped"]
        return pages

    def on_rank(self, rank: int, rows: Ints) -> tuple[Ints, Ints]:
        """Return the tokens of requests on one rank, and the places in their block tables.

        Parameters
        ----------
        rank : int
        rows : ndarray, int64 [n]
            Where the ledger keeps the requests.

        Returns
        -------
        tokens, places : ndarray, int64 [n]
        """
        local_len: Ints = self._rows["local_len"][rows, rank]
        held = self._rows["total"][rows] if self.layout.pages == "lockstep" else local_len
        return local_len, -(-held // self._block)

    def dropped(self, rank: int, row: int) -> int:
        """Return how many pages of a request on one rank have left the window.

        Parameters
        ----------
        rank, row : int
        """
        return int(self._rows["dropped"][row, rank])

    def plan_admit(self, id: int, prompt_len: int) -> Admission:
        """Plan the admission of a new request; nothing changes.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.

        Returns
        -------
        Admission

        Raises
        ------
        Refused
            For an id that is known, an empty prompt, one that is too long, and pools that are
            exhausted.
        """
        (plan,) = self.plan_admissions([id], [prompt_len])
        return plan

    def plan_told(self, id: int, prompt_len: int, chain: Chain, find: int) -> Admission:
        """Plan the admission of a request whose tokens are told; nothing changes.

        Parameters
        ----------
        id : int
        prompt_len : int
            Tokens of the prompt.
        chain : Chain
            What they are.
        find : int
            How many of the first may be found in the cache.

        Returns
        -------
        Admission

        Raises
        ------
        Refused
            As `plan_admit`, for the pages that no live request holds.
        """
        self.check_prompts([id], [prompt_len])
        (plan,) = self.place_prompts([id], [prompt_len])
        plan = self._with_found(plan, chain, find)
        self._check_pages(plan.pages)
        return plan

    def _with_found(self, plan: Admission, chain: Chain, find: int) -> Admission:
        """The plan with what the cache has of its first tokens."""
        if chain.shift is None:
            chain = replace(chain, shift=plan.shift)
        elif chain.shift != plan.shift:
            plan = self._placing(plan.id, plan.prompt_len, chain.shift)
        if self.contents is None:
            return plan
        found = self.contents.find(chain, min(find, plan.prompt_len - self.computes))
        held = sum(bool(block.rows) for block in found)
        return plan._replace(
            pages=plan.pages - held, chain=chain, found=found, hit=len(found) * self.contents.unit
        )

    def plan_admissions(self, ids: Sequence[int], prompt_lens: Sequence[int]) -> list[Admission]:
        """Plan the admission of new requests, one after the other; nothing changes.

        Parameters
        ----------
        ids : sequence of int, [n]
        prompt_lens : sequence of int, [n]
            Tokens of each prompt.

        Returns
        -------
        list of Admission, [n]

        Raises
        ------
        Refused
            As `plan_admit`, for what they take together; for no id, and another number of prompts.
        """
        self.check_prompts(ids, prompt_lens)
        plans = self.place_prompts(ids, prompt_lens)
        self._check_pages(total_pages(plans))
        return plans

    def check_prompts(self, ids: Sequence[int], prompt_lens: Sequence[int]) -> None:
        """Raise unless these prompts may be admitted, if there are pages.

        Parameters
        ----------
        ids, prompt_lens : sequence of int, [n]
            As `plan_admissions` takes them.

        Raises
        ------
        Refused
            As `plan_admissions`, but for what the pools do not hold.
        """
        if not ids or len(ids) != len(prompt_lens):
            raise Refused(
                Reason.BAD_COUNT,
                f"{len(ids)} ids and {len(prompt_lens)} prompts are to be admitted; each id needs "
                "a prompt, and there must be one at least.",
            )
        for id in ids:
            self.check_new(id)
        _check_distinct(ids)
        for id, prompt_len in zip(ids, prompt_lens, strict=True):
            if prompt_len < 1:
                raise Refused(
                    Reason.EMPTY_PROMPT,
                    f"The prompt of request {id} has {prompt_len} tokens; it must have at least "
                    "one.",
                )
            if prompt_len > self.max_len:
                raise Refused(
                    Reason.TOO_LONG,
                    f"The prompt of request {id} has {prompt_len} tokens; max_len is "
                    f"{self.max_len}.",
                )

    def place_prompts(self, ids: Sequence[int], prompt_lens: Sequence[int]) -> list[Admission]:
        """Plan to place the prompts of new requests, whether there are pages or not.

        Parameters
        ----------
        ids, prompt_lens : sequence of int, [n]
            As `check_prompts` has checked them.

        Returns
        -------
        list of Admission, [n]
        """
        c, rotated = self.layout.cp_size, self.layout.start == "rotated"
        shifts = [(self.admitted + nth) % c if rotated else 0 for nth in range(len(ids))]
        return [self._placing(*one) for one in zip(ids, prompt_lens, shifts, strict=True)]

    def plan_resume(self, id: int) -> Admission:
        """Plan to place all tokens of a preempted request as a prompt; nothing changes.

        Parameters
        ----------
        id : int

        Returns
        -------
        Admission

        Raises
        ------
        Refused
            For a request that is not preempted, and pools that are exhausted.
        """
        plan = self.place_again(id)
        self._check_pages(plan.pages)
        return plan

    def plan_told_again(self, id: int, find: int) -> Admission:
        """Plan to place a preempted request whose tokens were told; nothing changes.

        Parameters
        ----------
        id : int
        find : int
            How many of the first may be found in the cache.

        Returns
        -------
        Admission

        Raises
        ------
        Refused
            As `plan_resume`, for the pages that no live request holds.
        """
        plan = self.place_again(id)
        if id in self._away:
            plan = self._with_found(plan, self._away[id], find)
        self._check_pages(plan.pages)
        return plan

    def place_again(self, id: int) -> Admission:
        """Plan to place all tokens of a preempted request, whether there are pages or not.

        Parameters
        ----------
        id : int

        Returns
        -------
        Admission

        Raises
        ------
        Refused
            For a request that is not preempted.
        """
        if id in self._row_of:
            raise Refused(
                Reason.NOT_PREEMPTED, f"Request {id} is live; only a preempted one can resume."
            )
        if id not in self.preempted:
            raise self._not_live(id)
        return self._placing(id, *self.preempted[id])

    def admit(self, plan: Admission) -> int:
        """Apply an admission or resumption planned against the present state, and return its row.

        Parameters
        ----------
        plan : Admission

        Returns
        -------
        int
        """
        row = self._take_row(plan.id)
        owner, left = first_turn(self.layout, plan.prompt_len, plan.shift)
        local_len = [shard.tokens for shard in plan.shards]
        self._rows[row] = (
            plan.prompt_len, plan.prompt_len, plan.shift, owner, left, 0, 0, local_len, 0, 0,
            self.window or 0,
        )  # fmt: skip
        self.free -= plan.pages
        if self.preempted.pop(plan.id, None) is None:
            self.admitted += 1
        self._away.pop(plan.id, None)
        if self.contents is not None and plan.chain is not None:
            holders = [next(iter(block.rows), None) for block in plan.found]
            self._shared_windows.share(row, holders, self.layout.cp_size)
            self.contents.begin(row, plan.chain, plan.found)
        return row

    def plan_step(self, ids: Sequence[int], query_lens: Sequence[int], pad: int = 0) -> Step:
        """Plan `query_lens[i]` new tokens for each request; nothing changes.

        Parameters
        ----------
        ids : sequence of int, [n]
        query_lens : sequence of int, [n]
            New tokens of each request.
        pad : int
            Dummy requests that fill the batch and have no entries in the step.

        Returns
        -------
        Step

        Raises
        ------
        Refused
            For a batch or a count that is not right, a request that is not live or would be too
            long, and pools that are exhausted.
        """
        rows, lens = self.check_step(ids, query_lens, pad)
        step = self.deal(rows, lens, pad)
        self._check_pages(step.pages)
        return step

    def check_step(
        self, ids: Sequence[int], query_lens: Sequence[int], pad: int
    ) -> tuple[Ints, Ints]:
        """Raise unless a step may be, if there are pages, and return its requests and tokens.

        Parameters
        ----------
        ids, query_lens, pad
            As `plan_step` takes them.

        Returns
        -------
        rows, query_lens : ndarray, int64 [n]

        Raises
        ------
        Refused
            As `plan_step`, and for more tokens than this group's free and open pages could hold.
        """
        rows = self._batch_rows(ids, query_lens, pad)
        lens = np.array(query_lens, dtype=np.int64)
        self._check_room(ids, rows, lens, sum(query_lens))
        return rows, lens

    def deal(self, rows: Ints, query_lens: Ints, pad: int) -> Step:
        """Plan a step that `check_step` has found right, whether there are pages or not.

        Parameters
        ----------
        rows : ndarray, int64 [n]
            Where every ledger of the same requests keeps them.
        query_lens : ndarray, int64 [n]
        pad : int
            As `plan_step` takes it.

        Returns
        -------
        Step
        """
        tokens = int(query_lens.sum())
        requests, firsts, positions, owners, past_lens = self._deal(rows, query_lens, tokens)
        indexes = past_lens[np.arange(tokens), owners]
        lockstep = self.layout.pages == "lockstep"
        held = positions if lockstep else indexes
        opening = (held % self._block == 0).nonzero()[0]
        if lockstep:
            pages = np.full(self.layout.cp_size, len(opening))
        else:
            pages = np.bincount(owners[opening], minlength=self.layout.cp_size)
        shared = self._shared_writes(rows, requests, owners) if self._open_pages.holders else []
        for write in shared:
            pages[write.rank] += write.copies
        return Step(
            rows, query_lens, requests, firsts, positions, owners, past_lens, indexes,
            opening, held[opening] // self._block, shared, pages, pad,
        )  # fmt: skip

    def advance(self, step: Step) -> None:
        """Apply a step planned against the present state.

        Parameters
        ----------
        step : Step
        """
        state, rows = self._rows, step.rows
        for write in step.shared:
            row = rows[write.place]
            self._open_pages.leave(int(state["tag"][row, write.rank]))
            state["tag"][row, write.rank] = 0
        # Of several tokens of a request on one rank, the last one's length stays.
        state["local_len"][rows[step.requests], step.owners] = step.indexes + 1
        state["total"][rows] += step.query_lens
        state["group"][rows] = step.query_lens
        if self.overlap:
            state["outstanding"][rows] += 1
        owner, left = self._turn(state["owner"][rows], state["left"][rows], step.query_lens)
        state["owner"][rows] = owner
        state["left"][rows] = left
        self.free -= step.pages

    def plan_accept(self, id: int, kept: int) -> Rewind:
        """Plan to rewind an open group to its first tokens; nothing changes.

        Parameters
        ----------
        id : int
        kept : int
            Tokens of the group that stay.

        Returns
        -------
        Rewind

        Raises
        ------
        Refused
            For a count outside the group, a request that is not live, and one without an open
            group.
        """
        group = int(self._rows["group"][self._row_of[id]]) if id in self._row_of else 0
        if kept < 1 or (group and kept > group):
            raise Refused(
                Reason.BAD_COUNT,
                f"{kept} tokens of request {id} would be kept; its open group has {group}.",
            )
        row = int(self.rows([id])[0])
        state = self._rows[row]
        if not group or state["outstanding"]:
            raise Refused(
                Reason.NOTHING_OPEN,
                f"Request {id} has {state['outstanding']} decodes to be sampled and an open group "
                f"of {group} tokens; an acceptance needs none of those and one of these.",
            )
        return self._rewound(row, group - kept)

    def plan_cancel(self, id: int) -> Rewind:
        """Plan to undo a live request's last step, after which nothing else has changed it.

        Nothing changes. The group that the step closed stays closed, and a page that it copied
        stays the request's own.

        Parameters
        ----------
        id : int

        Returns
        -------
        Rewind
        """
        row = self._row_of[id]
        return self._rewound(row, int(self._rows["group"][row]))

    def _rewound(self, row: int, tokens: int) -> Rewind:
        """Plan to take the last tokens from a request."""
        state = self._rows[row]
        owners, _ = self._turn(state["owner"], state["left"], np.arange(-tokens, 0))
        owner, left = self._turn(state["owner"], state["left"], np.array(-tokens))
        total = state["total"] - tokens
        local_len = state["local_len"] - np.bincount(owners, minlength=self.layout.cp_size)
        held = self._pages_for(state["total"], state["local_len"])
        return Rewind(
            row, int(total), int(owner), int(left), local_len, held,
            self._pages_for(total, local_len),
        )  # fmt: skip

    def accept(self, plan: Rewind) -> None:
        """Apply an acceptance planned against the present state.

        Parameters
        ----------
        plan : Rewind
        """
        state = self._rows
        state["total"][plan.row] = plan.total
        state["owner"][plan.row] = plan.owner
        state["left"][plan.row] = plan.left
        state["group"][plan.row] = 0
        state["local_len"][plan.row] = plan.local_len
        # Pages beyond were taken by this very group: nobody else holds them.
        self.free += plan.held - plan.kept

    def next_queries(self, rows: Ints) -> Ints:
        """Return the smallest positions at which queries of requests may still come.

        Parameters
        ----------
        rows : ndarray, int64 [n]
            Where the ledger keeps the requests.

        Returns
        -------
        ndarray, int64 [n]
        """
        # Whatever is accepted of an open group, its first token stays.
        first: Ints = self._rows["total"][rows] - np.maximum(self._rows["group"][rows] - 1, 0)
        return first

    def findable(self, rows: Ints) -> Ints:
        """Return how many of the first tokens of requests others may find (SPEC.md section 5.8).

        Parameters
        ----------
        rows : ndarray, int64 [n]
            Where the ledger keeps the requests.

        Returns
        -------
        ndarray, int64 [n]
        """
        if self.overlap or not (self._goes_on or self.layout.cp_size == 1):
            prompts: Ints = self._rows["prompt_len"][rows]
            return prompts
        return self.next_queries(rows)

    def shift(self, id: int) -> int:
        """Return the rank that logical rank 0 is for a request, live or preempted.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            As `rows`.
        """
        if id in self.preempted:
            return self.preempted[id][1]
        return int(self._rows["shift"][self.rows([id])[0]])

    def drop(self, rows: Ints, next_queries: Ints) -> Drop | None:
        """Give back the pages that no later query of these requests sees (SPEC.md section 5.7).

        It costs by the pages that leave, whatever the requests hold.

        Parameters
        ----------
        rows : ndarray, int64 [n]
            Where the ledger keeps requests, each once, of which an event has ended.
        next_queries : ndarray, int64 [n]
            As `next_queries` returns them.

        Returns
        -------
        Drop or None
            None where nothing goes, and without a window.
        """
        if self.window is None:
            return None
        state = self._rows
        due = (next_queries >= state["due"][rows]).nonzero()[0]
        if not len(due):
            return None
        before = self.window - 1
        rows, passed = rows[due], next_queries[due] - before
        firsts = state["dropped"][rows]
        if self.layout.pages == "lockstep" or self.layout.cp_size == 1:
            ends = (passed // self._block)[:, None]  # the same on all ranks
            state["due"][rows] = (ends[:, 0] + 1) * self._block + before
        else:
            ranks = np.arange(self.layout.cp_size)
            held = self.tokens_before(rows[:, None], passed[:, None], ranks)
            ends = held // self._block
            # Before so many tokens more no rank can have filled another page.
            missing = ((ends + 1) * self._block - held).min(1)
            state["due"][rows] = passed + missing + before
        state["dropped"][rows] = ends
        counts = ends - firsts
        back = counts.sum(0)
        if self._shared_windows.tags:
            for place, rank in zip(*counts.nonzero(), strict=True):
                row, count = int(rows[place]), int(counts[place, rank])
                back[rank] -= self._shared_windows.drop(row, rank, count)
        self.free += back
        return Drop(rows, firsts, counts)

    def tokens_before(self, rows: Ints, positions: Ints, ranks: Ints | int) -> Ints:
        """Return how many tokens before a position are on a rank; the arrays broadcast.

        Parameters
        ----------
        rows : ndarray, int64
            Where the ledger keeps the requests.
        positions : ndarray, int64
            Global ones, from 0 to the request's total.
        ranks : ndarray, int64, or int

        Returns
        -------
        ndarray, int64
        """
        if self.layout.cp_size == 1:
            return positions
        prompt_lens = positions if self._goes_on else self._rows["prompt_len"][rows]
        if self.layout.start == "rotated":
            ranks = (ranks - self._rows["shift"][rows]) % self._cp_size
        return tokens_before(self.layout, positions, prompt_lens, ranks)

    def cancel(self, plan: Rewind) -> None:
        """Apply a cancellation planned against the present state.

        Parameters
        ----------
        plan : Rewind
        """
        self.accept(plan)
        if self.overlap:
            self._rows["outstanding"][plan.row] -= 1

    def sampled(self, ids: Sequence[int]) -> None:
        """Count the oldest outstanding decode of each request as sampled.

        Parameters
        ----------
        ids : sequence of int

        Raises
        ------
        Refused
            Without overlap, for an empty or repeated list, and for a request without such a decode.
        """
        if not self.overlap:
            raise Refused(
                Reason.UNSUPPORTED, "Without overlap the tokens of a decode are known at once."
            )
        if not ids:
            raise Refused(Reason.BAD_COUNT, "No id is given; at least one must be.")
        _check_distinct(ids)
        rows = self.rows(ids)
        done = (self._rows["outstanding"][rows] == 0).nonzero()[0]
        if len(done):
            raise Refused(
                Reason.NOTHING_OPEN, f"Request {ids[done[0]]} has no decode that is outstanding."
            )
        self._rows["outstanding"][rows] -= 1

    def plan_fork(self, parent: int, child: int) -> int:
        """Return the row of a request that may be forked; nothing changes.

        Parameters
        ----------
        parent, child : int
            As `fork` takes them.

        Returns
        -------
        int

        Raises
        ------
        Refused
            As `fork`.
        """
        self.check_new(child)
        return int(self.rows([parent])[0])

    def total(self, id: int) -> int:
        """Return the tokens of a live request on all ranks.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            As `rows`.
        """
        return int(self._rows["total"][self.rows([id])[0]])

    def fork(self, parent: int, child: int) -> None:
        """Begin a request as a copy of another that shares its pages.

        Parameters
        ----------
        parent : int
            A live request.
        child : int
            Id of the new one.

        Raises
        ------
        Refused
            For a parent that is not live, and a child that is known.
        """
        source = self.plan_fork(parent, child)
        row = self._take_row(child)
        state = self._rows
        state["group"][source] = 0
        total, local_len = state["total"][source], state["local_len"][source]
        full = self._full_pages(total, local_len)
        for rank in (self._pages_for(total, local_len) > full).nonzero()[0]:
            state["tag"][source, rank] = self._open_pages.join(int(state["tag"][source, rank]))
        state[row] = state[source]
        state["outstanding"][row] = 0
        if self.window is not None or self.contents is not None:
            self._shared_windows.fork(source, row, (full - state["dropped"][source]).tolist())
            return
        prefix = fork_prefix(self._prefixes.pop(source, None), tuple(full.tolist()))
        if prefix is not None:
            self._prefixes[source] = self._prefixes[row] = prefix

    def preempt(self, id: int) -> None:
        """Free the pages of a live request, which stays known.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not live.
        """
        row = int(self.rows([id])[0])
        self.preempted[id] = (int(self._rows["total"][row]), int(self._rows["shift"][row]))
        chain = self._vacate(id)
        if chain is not None:
            self._away[id] = chain

    def release(self, id: int) -> None:
        """End a request, live or preempted; pages that no other request holds are free.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is not known.
        """
        self._away.pop(id, None)
        if self.preempted.pop(id, None) is None:
            self.rows([id])
            self._vacate(id)

    def check_new(self, id: int) -> None:
        """Raise unless an id is free.

        Parameters
        ----------
        id : int

        Raises
        ------
        Refused
            For a request that is known.
        """
        if id in self._row_of or id in self.preempted:
            raise Refused(
                Reason.DUPLICATE_REQUEST, f"Request {id} is known; a new one needs another id."
            )

    def _not_live(self, id: int) -> Refused:
        if id in self.preempted:
            return Refused(
                Reason.PREEMPTED_REQUEST, f"Request {id} is preempted; it must resume first."
            )
        return Refused(Reason.UNKNOWN_REQUEST, f"Request {id} is not known.")

    def _placing(self, id: int, prompt_len: int, shift: int) -> Admission:
        shards = deal_prompt(self.layout, prompt_len, shift)
        local_len = np.array([shard.tokens for shard in shards])
        pages = self._pages_for(np.array(prompt_len), local_len)
        return Admission(id, prompt_len, shift, shards, pages)

    def _take_row(self, id: int) -> int:
        if not self._free_rows:
            self._grow()
        row = self._row_of[id] = self._free_rows.pop()
        return row

    def _vacate(self, id: int) -> Chain | None:
        """Give up a live request's row and pages, and return its tokens, if they were told."""
        row = self._row_of.pop(id)
        state = self._rows[row]
        chain = self.contents.end(row, self._shared_windows) if self.contents else None
        back = self._pages_for(state["total"], state["local_len"]) - state["dropped"]
        back -= self._shared_windows.end(row)
        prefix = release_prefix(self._prefixes.pop(row, None))
        if prefix is not None:
            back -= prefix.pages
        for rank in state["tag"].nonzero()[0]:
            back[rank] -= self._open_pages.leave(int(state["tag"][rank]))
        self.free += back
        self._free_rows.append(row)
        return chain

    def _batch_rows(self, ids: Sequence[int], query_lens: Sequence[int], pad: int) -> Ints:
        """Rows of a batch; refusals in the order of SPEC.md section 6."""
        if not ids or len(ids) != len(query_lens) or min(query_lens) < 1 or pad < 0:
            raise Refused(
                Reason.BAD_COUNT,
                f"A step of {len(ids)} ids, {len(query_lens)} query lengths and {pad} dummies; it "
                "needs an id, a query length from 1 for each, and no negative count.",
            )
        if self.overlap:
            known = [id for id in ids if id in self._row_of]
            full = self._rows["outstanding"][[self._row_of[id] for id in known]] >= 2
            if full.any():
                raise Refused(
                    Reason.BAD_COUNT,
                    f"Request {known[full.argmax()]} has two decodes to be sampled already.",
                )
        _check_distinct(ids)
        return self.rows(ids)

    def _check_room(self, ids: Sequence[int], rows: Ints, query_lens: Ints, tokens: int) -> None:
        """Refuse groups that pass max_len, and those that no pages could hold, before dealing."""
        totals = self._rows["total"][rows] + query_lens
        if totals.max() > self.max_len:
            raise Refused(
                Reason.TOO_LONG,
                f"Request {ids[int(totals.argmax())]} would reach {totals.max()} tokens; max_len "
                f"is {self.max_len}.",
            )
        if tokens > len(rows):
            c, t = self.layout.cp_size, self.layout.tokens_per_block
            if tokens > (int(self.free.sum()) + len(rows) * c) * t:
                raise Refused(
                    Reason.OUT_OF_PAGES,
                    f"{tokens} new tokens are more than free and open pages could hold.",
                )

    def _deal(
        self, rows: Ints, query_lens: Ints, tokens: int
    ) -> tuple[Ints, Ints, Ints, Ints, Ints]:
        """Deal a batch's new tokens: the fields of Step from `requests` to `past_lens`."""
        state = self._rows
        places = np.arange(len(rows))
        total, owner, local_len = (
            state["total"][rows],
            state["owner"][rows],
            state["local_len"][rows],
        )
        if tokens == len(rows):
            return places, places, total, owner, local_len
        requests = places.repeat(query_lens)
        firsts = query_lens.cumsum() - query_lens
        nth = np.arange(tokens) - firsts[requests]
        owners, _ = self._turn(owner[requests], state["left"][rows][requests], nth)
        given = owners[:, None] == np.arange(self.layout.cp_size)
        before = given.cumsum(0) - given
        past_lens = local_len[requests] + before - before[firsts][requests]
        return requests, firsts, total[requests] + nth, owners, past_lens

    def _turn(self, owner: Ints, left: Ints, tokens: Ints) -> tuple[Ints, Ints]:
        """Whose turn it is so many tokens later (earlier if negative), and what is left of it."""
        if self.layout.cp_size == 1:
            return np.zeros_like(tokens), left  # always its turn, and how long does not matter
        turns, used = np.divmod(self._chunk - left + tokens, self._chunk)
        return (owner + turns) % self._cp_size, self._chunk - used

    def _shared_writes(self, rows: Ints, requests: Ints, owners: Ints) -> list[SharedWrite]:
        """The shared open pages that a batch writes into, in its order.

        Under `lockstep` all ranks replace their page of an open super-block together.
        """
        tags = self._rows["tag"][rows]
        writes = np.full(tags.shape, self.layout.pages == "lockstep")
        writes[requests, owners] = True
        places, ranks = (writes & (tags != 0)).nonzero()
        copies = self._open_pages.must_copy(tags[places, ranks].tolist())
        return [
            SharedWrite(*write)
            for write in zip(places.tolist(), ranks.tolist(), copies, strict=True)
        ]

    def _pages_for(self, total: Ints, local_len: Ints) -> Ints:
        """[..., cp_size] pages under the policy, of totals [...] and lengths [..., cp_size]."""
        if self.layout.pages == "lockstep":
            return np.repeat(-(-total[..., None] // self._block), self.layout.cp_size, -1)
        return -(-local_len // self._block)

    def _full_pages(self, total: Ints, local_len: Ints) -> Ints:
        """The same without open pages: those that a next token could go to."""
        if self.layout.pages == "lockstep":
            return np.repeat(total[..., None] // self._block, self.layout.cp_size, -1)
        return local_len // self._block

    def _check_pages(self, pages: Ints) -> None:
        check_pages(pages, self.free)

    def _grow(self) -> None:
        old = len(self._rows)
        rows = np.zeros(max(8, 2 * old), dtype=self._rows.dtype)
        rows[:old] = self._rows
        self._rows = rows
        self._free_rows.extend(range(len(rows) - 1, old - 1, -1))


def total_pages(plans: Sequence[Admission]) -> Ints:
    """Return the pages that admissions take together.

    Parameters
    ----------
    plans : sequence of Admission, 1 or more

    Returns
    -------
    ndarray, int64 [cp_size]
    """
    pages: Ints = np.sum([plan.pages for plan in plans], 0)
    return pages


def check_pages(pages: Ints, free: Ints, pool: str = "") -> None:
    """Raise unless a pool has so many pages on every rank.

    Parameters
    ----------
    pages : ndarray, int64 [cp_size]
        What would be taken.
    free : ndarray, int64 [cp_size]
        What there is.
    pool : str
        The pool's name where there may be several.

    Raises
    ------
    Refused
        With `out_of_pages`.
    """
    short = (pages > free).nonzero()[0]
    if len(short):
        rank = int(short[0])
        raise Refused(
            Reason.OUT_OF_PAGES,
            f"cp_rank {rank} would need {np.broadcast_to(pages, free.shape)[rank]} pages"
            f"{pool and f' of the pool {pool}'} and has {free[rank]} free.",
        )


def _check_distinct(ids: Sequence[int]) -> None:
    if len(set(ids)) != len(ids):
        id, times = Counter(ids).most_common(1)[0]
        raise Refused(
            Reason.DUPLICATE_REQUEST, f"Request {id} is listed {times} times; once is allowed."
        )
