"""The ledger: what every rank knows about every request, kept alike without communication.

It holds counters alone (whose turn it is, tokens left in the turn, lengths and pages of all
ranks) and advances them token by token, so a step costs the same at any context length. A plan
decides every refusal and changes nothing; applying it cannot fail.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helix_gpu.dealing import Hand, deal_prompt, first_turn, owner_chunk
from helix_gpu.refusals import Refused
from helix_spec.events import Reason
from helix_spec.layouts import Layout

Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Admission:
    """An admission that will be accepted. `hands[r]`, `pages[r]`: tokens and pages of rank r."""

    id: int
    prompt_len: int
    shift: int
    hands: list[Hand]
    pages: Ints


@dataclass(frozen=True, slots=True)
class Step:
    """One new token for each of n requests, as all ranks see it (int64 unless said)."""

    rows: Ints
    """[n] where the ledger keeps the requests."""
    positions: Ints
    """[n] global positions of the new tokens."""
    owners: Ints
    """[n] ranks that own them."""
    past_lens: Ints
    """[n, cp_size] tokens of the request on each rank before the step."""
    opening: Ints
    """[m] places in the batch of the tokens that open a page."""
    opened: Ints
    """[m] local numbers of the pages they open."""
    pages: Ints
    """[cp_size] pages that the step takes on each rank."""
    pad: int
    """Dummy requests behind the n."""


class Ledger:
    """Counters of all live requests, identical on every rank.

    `pages[r]` is the pool size of rank r; `max_len` the global tokens a request may reach.
    """

    def __init__(self, layout: Layout, pages: Sequence[int], max_len: int) -> None:
        self.layout = layout
        self.max_len = max_len
        self.free: Ints = np.array(pages, dtype=np.int64)
        """[cp_size] pages of each rank that no request holds."""
        self.admitted = 0
        """Admissions accepted so far; under `rotated` it shifts the next one."""
        self._chunk = owner_chunk(layout)
        self._row_of: dict[int, int] = {}
        self._free_rows: list[int] = []
        per_rank = (np.int64, (layout.cp_size,))
        self._rows: NDArray[Any] = np.zeros(
            0,
            dtype=[
                ("prompt_len", np.int64),
                ("total", np.int64),
                ("owner", np.int64),
                ("left", np.int64),
                ("local_len", *per_rank),
                ("held", *per_rank),
            ],
        )

    @property
    def ids(self) -> list[int]:
        """Live requests, in order of admission."""
        return list(self._row_of)

    def rows(self, ids: Sequence[int]) -> Ints:
        """[n] where the ledger keeps live requests. Raises Refused(unknown_request)."""
        try:
            return np.array([self._row_of[id] for id in ids], dtype=np.int64)
        except KeyError as error:
            raise _unknown(error.args[0]) from None

    def local_lens(self, ids: Sequence[int]) -> Ints:
        """[n, cp_size] tokens of live requests on each rank."""
        lengths: Ints = self._rows["local_len"][self.rows(ids)]
        return lengths

    def held(self, ids: Sequence[int]) -> Ints:
        """[n, cp_size] pages of live requests on each rank."""
        held: Ints = self._rows["held"][self.rows(ids)]
        return held

    def plan_admit(self, id: int, prompt_len: int) -> Admission:
        """Deal a new request's prompt. Raises Refused; changes nothing."""
        if id in self._row_of:
            raise Refused(
                Reason.DUPLICATE_REQUEST, f"Request {id} is live; a new one needs another id."
            )
        if prompt_len < 1:
            raise Refused(
                Reason.EMPTY_PROMPT,
                f"The prompt of request {id} has {prompt_len} tokens; it must have at least one.",
            )
        if prompt_len > self.max_len:
            raise Refused(
                Reason.TOO_LONG,
                f"The prompt of request {id} has {prompt_len} tokens; max_len is {self.max_len}.",
            )
        c, t = self.layout.cp_size, self.layout.tokens_per_block
        shift = self.admitted % c if self.layout.start == "rotated" else 0
        hands = deal_prompt(self.layout, prompt_len, shift)
        if self.layout.pages == "lockstep":
            pages = np.full(c, -(-prompt_len // (t * c)))
        else:
            pages = np.array([-(-hand.tokens // t) for hand in hands])
        self._check_pages(pages)
        return Admission(id, prompt_len, shift, hands, pages)

    def admit(self, plan: Admission) -> int:
        """Apply an admission planned against the present state; the request's row."""
        if not self._free_rows:
            self._grow()
        row = self._free_rows.pop()
        owner, left = first_turn(self.layout, plan.prompt_len, plan.shift)
        local_len = [hand.tokens for hand in plan.hands]
        self._rows[row] = (plan.prompt_len, plan.prompt_len, owner, left, local_len, plan.pages)
        self._row_of[plan.id] = row
        self.free -= plan.pages
        self.admitted += 1
        return row

    def plan_step(self, ids: Sequence[int], query_lens: Sequence[int], pad: int = 0) -> Step:
        """Place one new token for each request. Raises Refused; changes nothing.

        `pad` dummy requests fill the batch and have no entries in the step.
        """
        rows = self._batch_rows(ids, query_lens, pad)
        state = self._rows
        positions: Ints = state["total"][rows]
        if positions.max() >= self.max_len:
            raise Refused(
                Reason.TOO_LONG,
                f"Request {ids[int(positions.argmax())]} has {positions.max()} tokens and would "
                f"get one more; max_len is {self.max_len}.",
            )
        owners: Ints = state["owner"][rows]
        past_lens: Ints = state["local_len"][rows]
        c, t = self.layout.cp_size, self.layout.tokens_per_block
        if self.layout.pages == "lockstep":
            held: Ints = state["held"][rows, 0]
            opening = (positions == held * (t * c)).nonzero()[0]
            pages = np.full(c, len(opening))
        else:
            held = state["held"][rows, owners]
            own_past = past_lens[np.arange(len(rows)), owners]
            opening = (own_past == held * t).nonzero()[0]
            pages = np.bincount(owners[opening], minlength=c)
        self._check_pages(pages)
        return Step(rows, positions, owners, past_lens, opening, held[opening], pages, pad)

    def advance(self, step: Step) -> None:
        """Apply a step planned against the present state."""
        state, rows = self._rows, step.rows
        state["total"][rows] = step.positions + 1
        state["local_len"][rows, step.owners] += 1
        left = state["left"][rows] - 1
        ended = left == 0
        state["left"][rows] = np.where(ended, self._chunk, left)
        state["owner"][rows] = (step.owners + ended) % self.layout.cp_size
        if len(step.opening):
            opening = rows[step.opening]
            if self.layout.pages == "lockstep":
                state["held"][opening] += 1
            else:
                state["held"][opening, step.owners[step.opening]] += 1
            self.free -= step.pages

    def release(self, id: int) -> None:
        """End a request; its pages are free again. Raises Refused."""
        row = int(self.rows([id])[0])
        del self._row_of[id]
        self.free += self._rows["held"][row]
        self._free_rows.append(row)

    def _batch_rows(self, ids: Sequence[int], query_lens: Sequence[int], pad: int) -> Ints:
        """Rows of a batch; refusals in the order of SPEC.md section 6."""
        if query_lens and max(query_lens) > 1:
            raise Refused(
                Reason.UNSUPPORTED,
                f"A query length is {max(query_lens)}; this engine decodes one token a request.",
            )
        if not ids or len(ids) != len(query_lens) or min(query_lens) < 1 or pad < 0:
            raise Refused(
                Reason.BAD_COUNT,
                f"A step of {len(ids)} ids, {len(query_lens)} query lengths and {pad} dummies; it "
                "needs an id, a query length of 1 for each, and no negative count.",
            )
        if len(set(ids)) != len(ids):
            raise Refused(
                Reason.DUPLICATE_REQUEST, "The batch lists a request twice; once is right."
            )
        return self.rows(ids)

    def _check_pages(self, pages: Ints) -> None:
        short = (pages > self.free).nonzero()[0]
        if len(short):
            rank = int(short[0])
            raise Refused(
                Reason.OUT_OF_PAGES,
                f"cp_rank {rank} would need {pages[rank]} pages and has {self.free[rank]} free.",
            )

    def _grow(self) -> None:
        old = len(self._rows)
        rows = np.zeros(max(8, 2 * old), dtype=self._rows.dtype)
        rows[:old] = self._rows
        self._rows = rows
        self._free_rows.extend(range(len(rows) - 1, old - 1, -1))


def _unknown(id: int) -> Refused:
    return Refused(Reason.UNKNOWN_REQUEST, f"Request {id} is not live; only live ones are known.")
