"""What all ranks of one sharded cache hold, and what the next tokens of a request would need.

A request's tokens lie in lists: `tokens[p]` is the identity of the token at global position p,
`ranks[r]` the positions whose KV is on cp_rank r, in local order, and `tables[r]` the pages that
hold them. Module `tokens` has the first two.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from helix_reference.dealing import decode_owner
from helix_reference.tokens import Identity, Positions, Tokens
from helix_spec.capabilities import STRICT
from helix_spec.config import Config

Content = tuple[int, int, Identity]
"""What a block of T * C tokens holds: the salt, and position and identity of its last token.

A token's identity is copied by what copies all the tokens before it (`fork`, `resume`, a prefix),
and by nothing else. So the last token names them all.
"""


@dataclass(eq=False, slots=True)
class Page:
    """A physical page of one rank's pool, while requests hold it.

    Two pages are equal only when they are one object.

    Parameters
    ----------
    number
        The page's number in its pool, from 0.
    holders
        Requests whose block table has the page; forks and hits share pages (SPEC.md section 5.4).
    contents
        Blocks of whose tokens it holds some, once other requests may find them there; for each the
        index of the event since which they may. (A fork may share a page of one block and go on
        with another.)
    found
        Whether it was taken for the tokens that it held, though it was free.
    """

    number: int
    holders: int = 1
    contents: dict[Content, int] = field(default_factory=dict)
    found: bool = False


GONE: Final = Page(-1)
"""Stands in a block table for a page that went back behind the window; it is in no pool."""


class Pool:
    """The pages of one rank. Returned pages are taken before those never taken, last in, first out.

    Returned pages whose tokens may be found are free, too, and taken last of all: the one that was
    returned longest ago first.

    Parameters
    ----------
    size
        Pages of the pool, numbered from 0.

    Examples
    --------
    >>> pool = Pool(4)
    >>> first, second = pool.take(), pool.take()
    >>> pool.give_back(first)
    >>> pool.free, pool.take().number == first.number
    (3, True)
    """

    def __init__(self, size: int) -> None:
        self.returned: list[int] = []
        self.untouched = size
        """Pages below this number were never taken."""
        self.cached: list[Page] = []
        """Free pages whose tokens may still be found, in the order in which they are given up."""

    @property
    def free(self) -> int:
        """Number of free pages."""
        return len(self.returned) + self.untouched + len(self.cached)

    def take(self) -> Page:
        """Return a free page, now held once; there must be one."""
        if self.returned:
            return Page(self.returned.pop())
        if not self.untouched:
            return Page(self.cached.pop(0).number)
        self.untouched -= 1
        return Page(self.untouched)

    def take_again(self, content: Content, now: int) -> Page:
        """Return a free page that holds some tokens still, now held once.

        Where this pool has given it up, it is another: an engine may give up others.

        Parameters
        ----------
        content
            A block of tokens.
        now
            Index of the present event.
        """
        kept = next((page for page in self.cached if content in page.contents), None)
        if kept is None:
            return Page(self.take().number, contents={content: now}, found=True)
        self.cached.remove(kept)
        return Page(kept.number, contents={**kept.contents, content: now}, found=True)

    def give_back(self, page: Page) -> None:
        """Remove one holder of the page; it is free when that was the last one."""
        if page is GONE:
            return
        page.holders -= 1
        if page.holders == 0 and page.contents:
            self.cached.append(page)
        elif page.holders == 0:
            self.returned.append(page.number)


@dataclass(slots=True)
class Request:
    """One request. `tokens` is by global position; the lists after it are by cp_rank.

    Parameters
    ----------
    prompt_len
        Tokens that were placed as a prompt: at admission, or when the request was last resumed.
    shift
        From 0 to C - 1: logical rank x is cp_rank (x + shift) mod C (SPEC.md section 3.5).
    tokens
        Identity of the token at each global position.
    ranks
        Positions whose KV is on each cp_rank, in local order.
    tables
        Pages that hold them on each cp_rank: the block table, in local order, with
        `GONE` for pages that went back behind the window (SPEC.md section 5.7).
    preempted
        Whether it is preempted; it then has tokens and no pages.
    """

    prompt_len: int
    shift: int
    tokens: Tokens
    ranks: list[Positions]
    tables: list[list[Page]]
    written: list[int]
    """Slots of its present pages that were ever written; those from there on never were."""
    preempted: bool = False
    open_group: int = 0
    """Tokens of the last decode, while some of them may still be rewound."""
    outstanding: int = 0
    """With overlap: decodes whose tokens the scheduler has not learned."""
    salt: int = 0
    """Requests of another salt find none of its tokens."""
    found: int = 0
    """How many of its blocks of T * C tokens others may find by now."""

    @property
    def steps(self) -> int:
        """Number of tokens decoded since its prompt was placed."""
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
    pages: list[Page]
    """The page on its owner into which each new token was written; it may be gone since."""


class State:
    """What all ranks of one sharded KV cache hold; `Model` changes it.

    Parameters
    ----------
    config
        A legal configuration (`helix_spec.config.config_problem` returns None), without groups.
    pools
        The pool of each cp_rank, where other caches take pages from it too.
    """

    def __init__(self, config: Config, pools: list[Pool] | None = None) -> None:
        self.config = config
        self.layout = config.layout
        self.pools = pools or [Pool(pages) for pages in config.pages]
        self.requests: dict[int, Request] = {}
        self.admissions = 0
        self.former: dict[int, Request] = {}
        """By id, the request that was released last; its tokens may still be named."""
        self.freedoms = STRICT
        """What differs from the strictest engine."""
        self.ever_found: set[Content] = set()
        """What could ever be found in a page."""

    def known(self, id: int) -> Request | None:
        """Return a request, or the one of this id that was released last.

        Parameters
        ----------
        id
            Any id.
        """
        return self.requests.get(id) or self.former.get(id)

    def owners(self, request: Request, query_len: int) -> list[int]:
        """Return the cp_rank of each of a request's next tokens.

        Parameters
        ----------
        request
            A request that is not preempted.
        query_len
            How many tokens.

        Returns
        -------
        list of int
            query_len cp_ranks.
        """
        steps, prompt_len, shift = request.steps, request.prompt_len, request.shift
        return [
            decode_owner(self.layout, prompt_len, step, shift)
            for step in range(steps, steps + query_len)
        ]

    def pages_of(self, ranks: Sequence[Sequence[int]]) -> list[int]:
        """Return how many pages each rank holds for these positions (PAGE-1, SPEC.md section 3.4).

        Parameters
        ----------
        ranks
            Positions of one request on each cp_rank; only their number counts.

        Returns
        -------
        list of int
            A number of pages for each cp_rank.

        Examples
        --------
        >>> lazy = State(Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=100))
        >>> lockstep = State(Config(layout="pr17866/1:C=2,T=2", pages=[9, 9], max_len=100))
        >>> ranks = [[0, 1, 4], [2, 3]]
        >>> lazy.pages_of(ranks), lockstep.pages_of(ranks)
        ([2, 1], [2, 2])
        """
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        if self.layout.pages == "lockstep":
            return [_blocks(sum(map(len, ranks)), t * c)] * c
        return [_blocks(len(positions), t) for positions in ranks]

    def writers(self, owner: int, held: int, total: int) -> list[tuple[int, int]]:
        """Return the ranks that need a page of the request's own for a token (SPEC.md section 5.5).

        Under `lazy` that is the token's owner. Under `lockstep` it is every rank.

        Parameters
        ----------
        owner
            The cp_rank that owns the token.
        held
            Tokens of the request on its owner, before this one.
        total
            Tokens of the request on all ranks, before this one.

        Returns
        -------
        list of tuple (int, int)
            Each cp_rank, and the place of the page in the request's table there.
        """
        t, c = self.layout.tokens_per_block, self.layout.cp_size
        if self.layout.pages == "lockstep":
            return [(rank, total // (t * c)) for rank in range(c)]
        return [(owner, held // t)]


def _blocks(tokens: int, block: int) -> int:
    """Blocks that so many tokens fill or begin."""
    return (tokens + block - 1) // block
