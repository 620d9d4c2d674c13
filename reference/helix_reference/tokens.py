"""Lists of a request's tokens, in which a prompt of millions takes little room.

A prompt is kept as the pieces in which it was dealt, and each piece as a `range`; decoded tokens
are listed one by one. Both classes read like the plain lists that they stand for.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate, chain, repeat
from typing import TypeVar, overload

Identity = tuple[int, int]
"""What a token is: the index in the trace of the event that created it, its place in that event."""
Item = TypeVar("Item")


class _Listed(Sequence[Item]):
    """What reads like a list: equal to any sequence of the same entries."""

    __slots__ = ()

    def _entry(self, index: int) -> Item:
        """Return the entry at an index from 0 to the length, exclusive."""
        raise NotImplementedError

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> list[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | list[Item]:
        if isinstance(index, slice):
            return [self._entry(place) for place in range(*index.indices(len(self)))]
        return self._entry(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence):
            return NotImplemented
        return len(self) == len(other) and all(a == b for a, b in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]  # they change

    def __repr__(self) -> str:
        return repr(list(self))


class Positions(_Listed[int]):
    """The global positions of a request's tokens on one rank, in local order.

    Parameters
    ----------
    pieces
        Pieces of the prompt, rising.
    decoded
        Positions of tokens that were decoded since, rising.

    Examples
    --------
    >>> positions = Positions([range(0, 2), range(4, 6)])
    >>> positions.append(7)
    >>> positions, len(positions), positions[2], positions[1:4]
    ([0, 1, 4, 5, 7], 5, 4, [1, 4, 5])
    """

    __slots__ = ("decoded", "ends", "pieces")

    def __init__(self, pieces: Iterable[range] = (), decoded: Iterable[int] = ()) -> None:
        self.pieces = list(pieces)
        self.ends = list(accumulate(map(len, self.pieces)))
        """Number of positions up to the end of each piece."""
        self.decoded = list(decoded)

    def __len__(self) -> int:
        return (self.ends[-1] if self.ends else 0) + len(self.decoded)

    def __iter__(self) -> Iterator[int]:
        return chain(chain.from_iterable(self.pieces), self.decoded)

    def _entry(self, index: int) -> int:
        piece = bisect_right(self.ends, index)
        if piece == len(self.pieces):
            return self.decoded[index - len(self)]
        return self.pieces[piece][index - self.ends[piece]]

    def append(self, position: int) -> None:
        """Add the position of one more decoded token."""
        self.decoded.append(position)

    def rewind(self, total: int) -> None:
        """Drop the decoded positions from `total` on."""
        while self.decoded and self.decoded[-1] >= total:
            self.decoded.pop()

    def copy(self) -> Positions:
        """Return the same positions, which change apart from these."""
        return Positions(self.pieces, self.decoded)


class Tokens(_Listed[Identity]):
    """The identity of a request's token at each global position.

    Parameters
    ----------
    event
        Index of the event that admitted the request.
    prompt_len
        Tokens of its prompt.
    decoded
        Identities of the tokens that were decoded since.
    prefix
        Identities of the prompt's first tokens, where they are those of another request; the event
        created the others.

    Examples
    --------
    >>> tokens = Tokens(event=3, prompt_len=2)
    >>> tokens.append((5, 0))
    >>> tokens, len(tokens), tokens[1], tokens[-1]
    ([(3, 0), (3, 1), (5, 0)], 3, (3, 1), (5, 0))
    >>> Tokens(event=7, prompt_len=4, prefix=tokens[:3])
    [(3, 0), (3, 1), (5, 0), (7, 3)]
    """

    __slots__ = ("decoded", "event", "prefix", "prompt_len")

    def __init__(
        self,
        event: int,
        prompt_len: int,
        decoded: Iterable[Identity] = (),
        prefix: Sequence[Identity] = (),
    ) -> None:
        self.event, self.prompt_len = event, prompt_len
        self.decoded, self.prefix = list(decoded), prefix

    def __len__(self) -> int:
        return self.prompt_len + len(self.decoded)

    def __iter__(self) -> Iterator[Identity]:
        own = zip(repeat(self.event), range(len(self.prefix), self.prompt_len), strict=False)
        return chain(self.prefix, own, self.decoded)

    def _entry(self, index: int) -> Identity:
        if index < len(self.prefix):
            return self.prefix[index]
        decoded = index - self.prompt_len
        return (self.event, index) if decoded < 0 else self.decoded[decoded]

    def append(self, token: Identity) -> None:
        """Add the identity of one more decoded token."""
        self.decoded.append(token)

    def rewind(self, total: int) -> None:
        """Drop the decoded tokens from position `total` on."""
        del self.decoded[total - self.prompt_len :]

    def copy(self) -> Tokens:
        """Return the same tokens, which change apart from these."""
        return Tokens(self.event, self.prompt_len, self.decoded, self.prefix)
