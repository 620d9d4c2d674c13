"""What all ranks of one sharded cache hold, and what the next tokens of a request would need.

A request's tokens lie in lists: `tokens[p]` is the identity of the token at global position p,
`ranks[r]` the positions whose KV is on cp_rank r, in local order, and `tables[r]` the pages that
hold them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from helix_reference.dealing import decode_owner
from helix_spec.config import Config

Identity = tuple[int, int]
"""What a token is: the index in the trace of the event that created it, its place in that event."""


@dataclass(eq=False, slots=True)
class Page:
    """A physical page of one rank's pool, while requests hold it."""

    number: int
    holders: int = 1


class Pool:
    """The pages of one rank. Pages that came back are given out before others."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.returned: list[int] = []
        self.untouched = size
        """Pages below this number were never taken."""

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self.returned) + self.untouched

    def take(self) -> Page:
        """Take a free page, held once."""
        if self.returned:
            return Page(self.returned.pop())
        self.untouched -= 1
        return Page(self.untouched)

    def give_back(self, page: Page) -> None:
        """Let one holder go; the page is free when the last one has gone."""
        page.holders -= 1
        if page.holders == 0:
            self.returned.append(page.number)


@dataclass(slots=True)
class Request:
    """One request; `tokens` is by global position, the other lists are by cp_rank."""

    prompt_len: int
    shift: int
    tokens: list[Identity]
    ranks: list[list[int]]
    tables: list[list[Page]]
    written: list[int]
    """Slots of its present pages that were ever written; those from there on never were."""
    preempted: bool = False
    open_group: int = 0
    """Tokens of the last decode, while some of them may still be rewound."""
    outstanding: int = 0
    """With overlap: decodes whose tokens the scheduler has not learned."""

    @property
    def steps(self) -> int:
        """Tokens decoded so far."""
        return len(self.tokens) - self.prompt_len


class Step(NamedTuple):
    """What one accepted decode did for one request of its batch."""

    id: int
    first: int
    """Global position of the first new token."""
    owners: list[int]
    """cp_rank of each new token."""
    past_len: list[int]
    """Tokens on each cp_rank before the step."""


class State:
    """All ranks of one sharded KV cache. The configuration must be legal."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.layout = config.layout
        self.pools = [Pool(pages) for pages in config.pages]
        self.requests: dict[int, Request] = {}
        self.admissions = 0

    def owners(self, request: Request, query_len: int) -> list[int]:
        """Return the cp_rank of each of the next tokens."""
        steps, prompt_len, shift = request.steps, request.prompt_len, request.shift
        return [
            decode_owner(self.layout, prompt_len, step, shift)
            for step in range(steps, steps + query_len)
        ]

    def pages_of(self, ranks: list[list[int]]) -> list[int]:
        """Return the pages that each rank holds for these positions (PAGE-1)."""
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        if self.layout.pages == "lockstep":
            return [_blocks(sum(map(len, ranks)), t * c)] * c
        return [_blocks(len(positions), t) for positions in ranks]

    def writers(self, owner: int, held: int, total: int) -> list[tuple[int, bool]]:
        """Return the ranks that need a page of the request's own for a token of this owner.

        The request has `total` tokens before it, `held` of them on the owner. Each rank comes
        with whether the token opens a page there.
        """
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        if self.layout.pages == "lockstep":
            return [(rank, total % (t * c) == 0) for rank in range(c)]
        return [(owner, held % t == 0)]


def _blocks(tokens: int, block: int) -> int:
    """Blocks that so many tokens fill or begin."""
    return (tokens + block - 1) // block
