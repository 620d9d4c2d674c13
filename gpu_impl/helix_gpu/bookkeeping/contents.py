"""Which pages hold which tokens: what a new request may find in the cache.

Tokens are looked for in blocks of T * C, which fill one page on every rank: so a block is found on
all ranks or on none, and ranks that see the same events agree without a word. A block's key is a
chained hash (BLAKE2b, RFC 7693) of its tokens and all before them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from typing import Any

import numpy as np

from helix_gpu.bookkeeping.sharing import SharedWindows
from helix_spec.layouts import Layout

KEY_BYTES = 16


@dataclass(eq=False, slots=True)
class Block:
    """T * C tokens that can be found, in one page of each rank."""

    page: int
    """Its page on this rank."""
    chain: Chain
    """Tokens of a request that has it, from which its key is computed when it is first needed."""
    place: int
    """Which block of the chain it is."""
    rows: dict[int, None] = field(default_factory=dict)
    """Rows of the requests that hold it."""


@dataclass(eq=False, slots=True)
class Chain:
    """The tokens of one request, as a cache is told them.

    Parameters
    ----------
    tokens : sequence of int
        Ids of the first tokens; it is sliced and never changed.
    salt : int
        Requests of other salts share nothing.
    shift : int or None
        Nor do those of other shifts; None for that by which the request is placed.
    more : list of int
        Ids of the tokens after them.
    keys : list of bytes
        Keys of the first blocks, as far as they were needed.
    blocks : list of Block
        The first blocks, as far as they can be found.
    """

    tokens: Sequence[int] | Any
    salt: int = 0
    shift: int | None = None
    more: list[int] = field(default_factory=list)
    keys: list[bytes] = field(default_factory=list)
    blocks: list[Block] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.tokens) + len(self.more)

    def between(self, first: int, end: int) -> list[int]:
        """Return the ids of the tokens at positions [first, end).

        Parameters
        ----------
        first, end : int
        """
        held = len(self.tokens)
        return [*self.tokens[first:end], *self.more[max(0, first - held) : max(0, end - held)]]

    def key(self, place: int, unit: int) -> bytes:
        """Return the key of a block.

        Parameters
        ----------
        place : int
            Which one, from 0.
        unit : int
            Tokens of a block.
        """
        while len(self.keys) <= place:
            first = len(self.keys) * unit
            before = self.keys[-1] if self.keys else b"%d,%d" % (self.salt, self.shift or 0)
            ids = np.array(self.between(first, first + unit), dtype=np.int64)
            self.keys.append(blake2b(before + ids.tobytes(), digest_size=KEY_BYTES).digest())
        return self.keys[place]

    def rewind(self, tokens: int, unit: int) -> None:
        """Forget all tokens but the first.

        Parameters
        ----------
        tokens : int
        unit : int
            Tokens of a block.
        """
        del self.more[max(0, tokens - len(self.tokens)) :]
        del self.keys[tokens // unit :]

    def copy(self) -> Chain:
        """Return the same tokens, which change apart from these."""
        return Chain(self.tokens, self.salt, self.shift, [*self.more], [*self.keys], [*self.blocks])


class Contents:
    """The blocks that can be found in one rank's pool, and those whose pages are free.

    Parameters
    ----------
    layout : Layout
        One by which something can be found: `finds` says so.

    Examples
    --------
    >>> from helix_spec.layouts import parse_layout
    >>> contents = Contents(parse_layout("pr17866/1:C=2,T=2"))
    >>> contents.begin(0, Chain([5, 6, 7, 8, 9]), found=[])
    >>> contents.reach(0, 5, page=[3, 1].__getitem__)
    >>> [block.page for block in contents.find(Chain([5, 6, 7, 8, 1, 2]), 6)]
    [3]
    """

    def __init__(self, layout: Layout) -> None:
        self.unit = layout.cp_size * layout.tokens_per_block
        self.ranks = layout.cp_size
        self.by_key: dict[bytes, list[Block]] = {}
        """Blocks in the order in which they could be found first."""
        self.waiting: list[Block] = []
        """Those that are not in `by_key` yet: nobody has looked for anything since."""
        self.cached: dict[int, Block] = {}
        """By page, blocks that nobody holds, in the order in which they are given up."""
        self.chains: dict[int, Chain] = {}
        """By row, the tokens of live requests."""

    def find(self, chain: Chain, tokens: int) -> list[Block]:
        """Return the first blocks of a chain that the cache has, one for each.

        Of several it is one that a request holds, where there is one: the first.

        Parameters
        ----------
        chain : Chain
        tokens : int
            No more than so many are looked for.
        """
        for block in self.waiting:
            key = block.chain.key(block.place, self.unit)
            self.by_key.setdefault(key, []).append(block)
        self.waiting.clear()
        found = list[Block]()
        for place in range(tokens // self.unit):
            blocks = self.by_key.get(chain.key(place, self.unit))
            if not blocks:
                break
            found.append(next((block for block in blocks if block.rows), blocks[0]))
        return found

    def begin(self, row: int, chain: Chain, found: Sequence[Block]) -> None:
        """Begin a request that holds the blocks that it has found.

        Parameters
        ----------
        row : int
        chain : Chain
        found : sequence of Block
        """
        chain.blocks = list(found)
        self.chains[row] = chain
        for block in found:
            block.rows[row] = None

    def revive(self, found: Sequence[Block]) -> list[int]:
        """Take blocks out of those that nobody holds, and return their pages here.

        Parameters
        ----------
        found : sequence of Block
            Some of them may be held.
        """
        pages = [block.page for block in found if not block.rows]
        for page in pages:
            del self.cached[page]
        return pages

    def reach(self, row: int, tokens: int, page: Callable[[int], int]) -> None:
        """Note that a request's first tokens can be found from now on.

        Parameters
        ----------
        row : int
        tokens : int
        page : function of int
            Returns its page on this rank, by local number.
        """
        chain = self.chains.get(row)
        if chain is None:
            return
        for place in range(len(chain.blocks), min(tokens, len(chain)) // self.unit):
            block = Block(page(place), chain, place, {row: None})
            chain.blocks.append(block)
            self.waiting.append(block)

    def extend(self, row: int, position: int, ids: Sequence[int]) -> None:
        """Take in a request's next tokens.

        Parameters
        ----------
        row : int
        position : int
            Of the first of them.
        ids : sequence of int
        """
        chain = self.chains.get(row)
        if chain is not None and len(chain) == position:
            chain.more.extend(ids)

    def rewind(self, row: int, tokens: int) -> None:
        """Let a request have its first tokens alone.

        Parameters
        ----------
        row : int
        tokens : int
        """
        chain = self.chains.get(row)
        if chain is None:
            return
        for block in chain.blocks[tokens // self.unit :]:
            del block.rows[row]
            if not block.rows:
                self._forget(block)
        del chain.blocks[tokens // self.unit :]
        chain.rewind(tokens, self.unit)

    def fork(self, source: int, row: int) -> None:
        """Begin a request as a copy of another.

        Parameters
        ----------
        source, row : int
        """
        if source in self.chains:
            self.begin(row, chain := self.chains[source].copy(), chain.blocks)

    def end(self, row: int, shared: SharedWindows) -> Chain | None:
        """End a request, and return its tokens; blocks that it held alone may be found further.

        Parameters
        ----------
        row : int
        shared : SharedWindows
            What requests share, the ending one included.
        """
        chain = self.chains.pop(row, None)
        if chain is None:
            return None
        for place in reversed(range(len(chain.blocks))):  # the last ones are given up first
            block = chain.blocks[place]
            del block.rows[row]
            if block.rows:
                continue
            if shared.holds_alone(row, place):
                self.cached[block.page] = block
            else:  # some of its pages belong to a fork, which has other tokens beside them
                self._forget(block)
        chain.blocks = []
        return chain

    def give_up(self, pages: int) -> list[int]:
        """Forget blocks that nobody holds, those first that were held longest ago.

        Parameters
        ----------
        pages : int
            How many.

        Returns
        -------
        list of int
            Their pages on this rank.
        """
        given = [page for page, _ in zip(self.cached, range(pages), strict=False)]
        for page in given:
            self._forget(self.cached.pop(page))
        return given

    def _forget(self, block: Block) -> None:
        if block in self.waiting:
            self.waiting.remove(block)
            return
        key = block.chain.key(block.place, self.unit)
        self.by_key[key].remove(block)
        if not self.by_key[key]:
            del self.by_key[key]


def finds(layout: Layout) -> bool:
    """Return whether prompts are dealt by position, so that equal first tokens lie alike.

    Parameters
    ----------
    layout : Layout
    """
    return layout.prompt != "contiguous" or layout.cp_size == 1
