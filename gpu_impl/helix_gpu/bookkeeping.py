"""One rank's bookkeeping without tensors: the ledger seen from this rank, and its pages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from helix_gpu.allocator import PageAllocator
from helix_gpu.block_tables import BlockTables
from helix_gpu.ledger import Admission, Ints, Ledger, Step
from helix_gpu.refusals import check_config
from helix_spec.configs import Config


@dataclass(frozen=True, slots=True)
class RankStep:
    """One new token for each of n requests, seen from one rank (int64 unless said).

    Dummy requests have no entries; `pad` counts them.
    """

    past_len: Ints
    """[n] tokens of the request on this rank before the step."""
    position_ids: Ints
    """[n] global position of the new token."""
    active: NDArray[np.bool_]
    """[n] whether this rank owns the new token."""
    slots: Ints
    """[n] slot written (physical page * tokens_per_block + offset), -1 where not owned."""
    visible: Ints
    """[n] keys on this rank that the new token's query sees, itself included."""
    rows: Ints
    """[n] rows of the requests in the block tables."""
    taken: list[int]
    """Physical pages that the step took."""
    pad: int
    """Dummy requests behind the n."""


class RankBook:
    """The bookkeeping of cp_rank `cp_rank`: lengths, pages, slots and positions.

    Ranks that apply the same events give the same answers and the same refusals without
    talking. Raises Refused(bad_config) for a configuration it may not start with, ValueError
    for a cp_rank outside it.
    """

    def __init__(self, config: Config, cp_rank: int) -> None:
        check_config(config)
        self.layout = config.rules
        if not 0 <= cp_rank < self.layout.cp_size:
            raise ValueError(
                f"cp_rank is {cp_rank}; with cp_size {self.layout.cp_size} it must lie between "
                f"0 and {self.layout.cp_size - 1}."
            )
        self.cp_rank = cp_rank
        self.ledger = Ledger(self.layout, config.pages, config.max_len)
        self.tables = BlockTables()
        self._allocator = PageAllocator(config.pages[cp_rank])

    @property
    def request_ids(self) -> list[int]:
        """Live requests, in order of admission."""
        return self.ledger.ids

    @property
    def free_pages(self) -> int:
        """Pages of this rank's pool that no request holds."""
        return self._allocator.free

    def local_len(self, id: int) -> int:
        """Tokens of a live request on this rank. Raises Refused(unknown_request)."""
        return self.local_lens([id])[0]

    def local_lens(self, ids: Sequence[int]) -> list[int]:
        """Tokens of live requests on this rank. Raises Refused(unknown_request)."""
        lengths: list[int] = self.ledger.local_lens(ids)[:, self.cp_rank].tolist()
        return lengths

    def block_table(self, id: int) -> list[int]:
        """Physical pages of a live request on this rank, in local order. Raises Refused."""
        return self.block_tables([id])[0]

    def block_tables(self, ids: Sequence[int]) -> list[list[int]]:
        """Physical pages of live requests on this rank, in local order. Raises Refused."""
        held: list[int] = self.ledger.held(ids)[:, self.cp_rank].tolist()
        tables = self.tables.read(self.ledger.rows(ids), max(held, default=0)).tolist()
        return [table[:pages] for table, pages in zip(tables, held, strict=True)]

    def plan_admit(self, id: int, prompt_len: int) -> Admission:
        """Deal a new request's prompt. Raises Refused; changes nothing."""
        return self.ledger.plan_admit(id, prompt_len)

    def place(self, plan: Admission) -> list[int]:
        """Apply an admission planned against the present state; the physical pages it took."""
        taken = self._allocator.take(int(plan.pages[self.cp_rank]))
        row = self.ledger.admit(plan)
        self.tables.write(np.full(len(taken), row), np.arange(len(taken)), taken)
        return taken

    def admit(self, id: int, prompt_len: int) -> list[int]:
        """Admit a request; the physical pages it took here. Raises Refused."""
        return self.place(self.plan_admit(id, prompt_len))

    def plan_step(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> Step:
        """Place one new token per request; `query_lens` defaults to ones. Raises Refused.

        Changes nothing: it is all that a skipped step does.
        """
        return self.ledger.plan_step(ids, [1] * len(ids) if query_lens is None else query_lens, pad)

    def advance(self, step: Step) -> RankStep:
        """Apply a step planned against the present state."""
        taken = self._allocator.take(int(step.pages[self.cp_rank]))
        self.ledger.advance(step)
        t = self.layout.tokens_per_block
        rows, past_len = step.rows, step.past_lens[:, self.cp_rank]
        active = step.owners == self.cp_rank
        if taken:
            takes = np.full(len(step.opening), True)
            if self.layout.pages == "lazy":
                takes = active[step.opening]
            self.tables.write(rows[step.opening[takes]], step.opened[takes], taken)
        slots = np.full(len(rows), -1)
        own, index = rows[active], past_len[active]
        slots[active] = self.tables.page(own, index // t) * t + index % t
        return RankStep(
            past_len, step.positions, active, slots, past_len + active, rows, taken, step.pad
        )

    def decode_step(
        self, ids: Sequence[int], query_lens: Sequence[int] | None = None, pad: int = 0
    ) -> RankStep:
        """One new token for each request. Raises Refused."""
        return self.advance(self.plan_step(ids, query_lens, pad))

    def skip(self, ids: Sequence[int], query_lens: Sequence[int] | None = None) -> None:
        """Prepare a step that never runs: raises Refused as the decode would, changes nothing."""
        self.plan_step(ids, query_lens)

    def release(self, id: int) -> None:
        """End a request; its pages are free again. Raises Refused."""
        pages = self.block_table(id)
        self.ledger.release(id)
        self._allocator.give_back(pages)
