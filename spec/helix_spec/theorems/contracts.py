"""Theorems that CrossHair confirms: the closed forms' contracts, and callers of any placement.

Each contract (`crosshair` says what one is) becomes a theorem, with a witness and wrong formulas
like any other.

Lengths of lists, layouts and whatever else is no integer are outside of what CrossHair decides
here; the functions on layouts are proved by running them on symbolic integers (`symbolic`).
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Sequence

from helix_spec.theorems import callers
from helix_spec.theorems import mutations as m
from helix_spec.theorems.base import REGISTRY, Natural, Theorem, Wrong, assume
from helix_spec.theorems.crosshair import contract_lines


def contract(
    name: str,
    *,
    proves: str,
    statement: str,
    witness: dict[str, int],
    about: Sequence[str] = (),
    kills: Sequence[Wrong] = (),
) -> Theorem:
    """Register and return the theorem that the contract of a function holds.

    Parameters
    ----------
    name
        Module and function, below `helix_spec`.
    proves
        Numbers of SPEC.md, separated by spaces.
    statement, witness, about, kills
        As in `Theorem`.
    """
    module_name, _, function_name = name.rpartition(".")
    module = importlib.import_module(f"helix_spec.{module_name}")
    function = getattr(module, function_name)
    parameters = list(inspect.signature(function).parameters)

    def claim(*arguments: int) -> bool:
        known = dict(zip(parameters, arguments, strict=True))
        for condition in contract_lines(function, "pre"):
            assume(eval(condition, vars(module), known))
        known["_"] = getattr(module, function_name)(*arguments)
        return all(
            eval(condition, vars(module), known) for condition in contract_lines(function, "post")
        )

    claim.__signature__ = inspect.Signature(  # type: ignore[attr-defined]  # read by inspect
        [inspect.Parameter(p, inspect.Parameter.POSITIONAL_OR_KEYWORD) for p in parameters]
    )
    claim.__annotations__ = dict.fromkeys(parameters, Natural)
    made = Theorem(
        f"contract-{function_name.replace('_', '-')}",
        tuple(proves.split()),
        statement,
        claim,
        witness,
        about=tuple(about),
        kills=tuple(kills),
        contract_of=name,
    )
    REGISTRY[made.id] = made
    return made


contract(
    "placement.chunk_owner",
    proves="OWN-2",
    statement="chunk_owner gives a rank from 0 to C-1, the one that the chunk's number has mod C.",
    witness={"position": 5, "c": 2, "i": 3},
    about=["placement.chunk_owner"],
    kills=[m.owner_without_wrapping, m.owner_by_token, m.owner_one_rank_on],
)
contract(
    "placement.chunk_local_len",
    proves="LEN-1",
    statement="chunk_local_len is at most all tokens, and one more token makes it one larger on "
    "its owner and on no other rank.",
    witness={"length": 5, "rank": 1, "c": 2, "i": 3},
    about=["placement.chunk_local_len"],
    kills=[
        m.no_clamp_from_above,
        m.no_clamp_from_below,
        m.at_most_where_below_is_meant,
        m.equal_shares_rounded_up,
        m.lengths_interleave_one,
        m.length_in_32_bits.at(length=2**31, rank=0, c=1, i=1),
    ],
)
contract(
    "placement.chunk_position",
    proves="GROW-1",
    statement="The position of a local index is on its rank, and its local index is that one.",
    witness={"local_index": 4, "rank": 1, "c": 2, "i": 3},
    about=["placement.chunk_position", "placement.joined"],
    kills=[m.position_is_the_local_index, m.position_by_rounds_only],
)
contract(
    "placement.contiguous_blocks_before",
    proves="OWN-1 LEN-1",
    statement="A contiguous split puts no block before rank 0 and all of them before rank C.",
    witness={"blocks": 7, "rank": 2, "c": 4},
    about=["placement.contiguous_blocks_before"],
    kills=[m.no_rank_takes_one_more],
)
contract(
    "placement.contiguous_start",
    proves="OWN-1 LEN-1",
    statement="First positions lie within the prompt and at block boundaries or its end; that "
    "past the last rank is the end.",
    witness={"length": 13, "rank": 1, "c": 4, "t": 2},
    about=["placement.contiguous_start"],
    kills=[m.padding_stripped_from_the_last_rank],
)
contract(
    "placement.contiguous_owner",
    proves="OWN-1",
    statement="The owner of a prompt position is a rank whose part of the split holds it.",
    witness={"position": 5, "length": 13, "c": 4, "t": 2},
    about=["placement.contiguous_owner"],
    kills=[m.contiguous_owner_by_equal_shares, m.larger_shares_last],
)
contract(
    "placement.joined",
    proves="",
    statement="Joining a high part and a digit is undone by dividing by the base.",
    witness={"high": 2, "low": 1, "base": 3},
    about=["placement.joined"],
)
contract(
    "placement.ceil_div",
    proves="PAGE-1",
    statement="ceil_div is the least number of parts of b that hold a.",
    witness={"a": 7, "b": 3},
    about=["placement.ceil_div"],
    kills=[m.negated_division_truncated, m.rounded_up_always],
)
contract(
    "placement.page_and_offset",
    proves="GROW-1 PAGE-1",
    statement="Page and offset are the two digits of a local index in base T.",
    witness={"index": 7, "tokens_per_block": 3},
    about=["placement.page_and_offset"],
    kills=[m.pages_of_all_ranks, m.offset_without_wrapping],
)


def _asked_again(position: int, c: int, one: int, other: int) -> int:
    """Each rank asks for itself, one of them a token later."""
    return (callers.any_owner(position, c) == one) + (callers.any_owner(position + 1, c) == other)


def _tensor_parallel_fastest(position: int, c: int, tp_rank: int) -> int:
    return callers.any_owner(position, c) * 2 + tp_rank


def _not_wrapped(position: int, c: int, shift: int) -> int:
    return callers.any_owner(position, c) + shift


contract(
    "theorems.callers.any_owner",
    proves="OWN-2",
    statement="There is a rule whose result is a rank: the contract that callers rely on is met.",
    witness={"position": 5, "c": 3},
    about=["theorems.callers.any_owner"],
)
contract(
    "theorems.callers.any_page_and_offset",
    proves="GROW-1",
    statement="There is a split of local indices that can be joined again.",
    witness={"index": 5, "t": 3},
    about=["theorems.callers.any_page_and_offset"],
)
contract(
    "theorems.callers.any_length",
    proves="LEN-1",
    statement="There is a local length that is at most the number of tokens.",
    witness={"tokens": 5},
    about=["theorems.callers.any_length"],
)
contract(
    "theorems.callers.one_active_rank",
    proves="OWN-2 OWN-3",
    statement="With any rule whose result is a rank, asked once for a token, no two ranks are "
    "active.",
    witness={"position": 5, "c": 3, "one": 0, "other": 2},
    kills=[
        Wrong(
            "each rank asks by its own counter",
            _asked_again,
            "theorems.callers.one_active_rank",
            "TensorRT-LLM #17866 review",
        )
    ],
)
contract(
    "theorems.callers.global_rank",
    proves="MAP-1",
    statement="With any such rule, tp_rank * C + owner is a global rank in the owner's tensor "
    "parallel group.",
    witness={"position": 5, "c": 3, "tp_rank": 2},
    about=["theorems.callers.any_owner"],
    kills=[
        Wrong(
            "tensor parallel rank varies fastest",
            _tensor_parallel_fastest,
            "theorems.callers.global_rank",
            "TensorRT-LLM #10350",
        )
    ],
)
contract(
    "theorems.callers.shifted_owner",
    proves="OWN-2",
    statement="With any such rule, a start shift gives a rank again.",
    witness={"position": 5, "c": 3, "shift": 2},
    about=["theorems.callers.shifted_owner"],
    kills=[Wrong("shift without mod C", _not_wrapped, "theorems.callers.shifted_owner")],
)
contract(
    "theorems.callers.slots_apart",
    proves="GROW-1",
    statement="With any split of local indices into page and offset that can be joined again, "
    "two indices have two places.",
    witness={"one": 3, "other": 5, "t": 2},
    kills=[
        Wrong(
            "offset alone",
            lambda index, t: (0, index % t),
            "theorems.callers.any_page_and_offset",
        )
    ],
)
contract(
    "theorems.callers.pages_enough",
    proves="PAGE-1",
    statement="With any local lengths, ceil(length / T) pages hold them with less than one page "
    "to spare.",
    witness={"tokens": 5, "t": 2},
    about=["theorems.callers.pages_enough"],
    kills=[m.negated_division_truncated, m.rounded_up_always],
)
