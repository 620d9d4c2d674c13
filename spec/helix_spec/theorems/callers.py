# crosshair: specs_complete=True
"""What holds for any placement that meets a contract, whatever it does inside.

CrossHair replaces each call below of a function named `any_...` by an arbitrary result that meets
the function's contract, and a new one at every call (that is what the line `specs_complete` at
the top of this file asks for). So what is confirmed here holds for every engine whose rule meets
the contract: an engine developer may put in their own. The bodies are those of `placement`, so
that the contracts are not empty.

That results may differ from call to call is the point of OWN-3: with a rule that is asked twice,
two ranks can be active. `one_active_rank` asks once.
"""

from __future__ import annotations

from helix_spec import placement


def any_owner(position: int, c: int) -> int:
    """Return the rank of a position by any rule that gives each position a rank.

    pre: position >= 0 and c > 0
    post: 0 <= _ < c
    """
    return placement.chunk_owner(position, c, 1)


def any_page_and_offset(index: int, t: int) -> tuple[int, int]:
    """Return page and offset by any way to split local indices into pages of t slots.

    pre: index >= 0 and t > 0
    post: _[0] * t + _[1] == index
    post: _[0] >= 0 and 0 <= _[1] < t
    """
    return placement.page_and_offset(index, t)


def any_length(tokens: int) -> int:
    """Return any local length that is at most the number of tokens.

    pre: tokens >= 0
    post: 0 <= _ <= tokens
    """
    return placement.chunk_local_len(tokens, 0, 2, 1)


def one_active_rank(position: int, c: int, one: int, other: int) -> int:
    """Return how many of two ranks are active for a token, when its owner is worked out once.

    pre: position >= 0 and 0 <= one < other < c
    post: 0 <= _ <= 1
    """
    owner = any_owner(position, c)
    return (owner == one) + (owner == other)


def global_rank(position: int, c: int, tp_rank: int) -> int:
    """Return the global rank of the owner of a position in the group of tp_rank (MAP-1).

    pre: position >= 0 and c > 0 and tp_rank >= 0
    post: _ // c == tp_rank
    """
    return tp_rank * c + any_owner(position, c)


def shifted_owner(position: int, c: int, shift: int) -> int:
    """Return the owner after a start shift, which is a rank again.

    pre: position >= 0 and 0 <= shift < c
    post: 0 <= _ < c
    """
    return (any_owner(position, c) + shift) % c


def slots_apart(one: int, other: int, t: int) -> bool:
    """Return whether two different local indices have different places.

    pre: one >= 0 and other >= 0 and one != other and t > 0
    post: _
    """
    return any_page_and_offset(one, t) != any_page_and_offset(other, t)


def pages_enough(tokens: int, t: int) -> int:
    """Return the slots left over when a rank has the pages that `lazy` gives it.

    pre: tokens >= 0 and t > 0
    post: 0 <= _ < t
    """
    length = any_length(tokens)
    return placement.ceil_div(length, t) * t - length
