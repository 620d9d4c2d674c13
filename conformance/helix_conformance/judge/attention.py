"""Profiles `attention` and `merge`: outputs within their bound (ATT-1 to 4, MAP-1)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from helix_conformance.drive.asking import MalformedAnswer
from helix_conformance.expect.arrays import Array
from helix_conformance.expect.expectation import Expectation, Output
from helix_conformance.judge.cache import array_of
from helix_conformance.judge.failure import Violation
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import Decode, Merge, ids_by_token


@dataclass(frozen=True)
class _WrongOutput:
    """The output of one token that is outside its bound: arrays by layer and query head."""

    token: int
    output: Array
    expected: Output
    error: Array

    @property
    def wrong(self) -> NDArray[np.bool_]:
        """Which layers and heads are wrong; a NaN is not within the bound either."""
        return ~(self.error <= self.expected.bound)

    def has_other_heads(self) -> bool:
        """Whether the heads are all there, in another order: the exchange mixed them up."""
        return all(map(_other_heads, self.output, *self.expected, self.wrong))

    def violations(
        self, what: str, numbers: Sequence[str], heads_per_rank: int, request: int | None = None
    ) -> Iterator[Violation]:
        """Yield these invariants, with the first layer and head that is wrong."""
        layer, head = (int(i) for i in np.argwhere(self.wrong)[0])
        exact, bound = self.expected
        row, right = self.output[layer, head], exact[layer, head]
        error, most = float(self.error[layer, head]), float(bound[layer, head])
        expected = {"output": right.tolist(), "E": most}
        observed = {"output": row.tolist(), "error": error}
        dim = int(np.argmax(np.nan_to_num(np.abs(row - right), nan=np.inf)))
        times = f", {error / most:.3g} times E {most:.3g}" if most and error == error else ""
        where = (
            f"{what.format(layer=layer, head=head)}; off by {error:.3g}{times}; most at dim {dim}, "
            f"{row[dim]:.6g} for {right[dim]:.6g}; {self.wrong.sum()} of {self.wrong.size} "
            "outputs of the token are wrong"
        )
        for number in numbers:
            yield Violation(number, where, expected, observed, head // heads_per_rank, request)


class AttentionJudge:
    """ATT-1 to ATT-4, and MAP-1 of the heads.

    Parameters
    ----------
    config
        A legal configuration, with which the ranks were started.
    outputs
        Of each decode, what it gave when the same trace was played before (ATT-2); it is appended
        to.
    """

    def __init__(self, config: Config, outputs: list[Array]) -> None:
        self.shape = config.model
        self.heads_per_rank = config.model.q_heads // config.world_size
        self.outputs = outputs
        self.decodes = 0
        """Of this trace, so far."""
        self.merges: dict[bytes, Array] = {}
        """What came of each merge, to compare with when it comes again (ATT-2)."""

    def decoded(
        self, expected: Expectation, outcomes: Sequence[Outcome], *, all_else_right: bool
    ) -> Iterator[Violation]:
        """Yield what is wrong with the merged outputs of a decode.

        Parameters
        ----------
        expected
            The expectation of an accepted decode, with its exact outputs.
        outcomes
            By global rank; outputs are (layers, tokens, heads of the rank, D).
        all_else_right
            Whether columns and states were right: then an empty rank may be to blame.

        Yields
        ------
        Violation
            ATT-1 and ATT-4, with MAP-1 or ATT-3 where they explain it; of the first wrong token.
            ATT-2 when the same trace gave other bits before.

        Raises
        ------
        MalformedAnswer
            When an output is no array, or has another shape.
        """
        event, decoded = expected.event, expected.decoded
        assert isinstance(event, Decode) and decoded is not None and expected.outputs is not None
        wanted = (self.shape.layers, len(decoded.owners), self.heads_per_rank, self.shape.value_dim)
        slices = [array_of(rank, "output", o.output) for rank, o in enumerate(outcomes)]
        for rank, array in enumerate(slices):
            if array.shape != wanted:
                raise MalformedAnswer(f"its output has shape {array.shape}, not {wanted}", rank)
        merged = np.concatenate(slices, axis=2)
        yield from self._replayed(merged)
        wrong = _outside(merged, expected.outputs())
        if not wrong:
            return
        # Where all else is right, nothing but the empty rank sets the wrong ones apart.
        empty = all_else_right and all(0 in decoded.visible[one.token] for one in wrong)
        numbers = _broken(wrong, empty)
        token = wrong[0].token
        id = ids_by_token(event)[token]
        what = (
            f"attention output of request {id} at position "
            f"{decoded.position_ids[token]}, layer {{layer}}, query head {{head}}; keys seen on "
            f"each cp_rank: {list(decoded.visible[token])}"
        )
        yield from wrong[0].violations(what, numbers, self.heads_per_rank, id)

    def merged(
        self, event: Merge, outputs: Sequence[Output], outcomes: Sequence[Outcome]
    ) -> Iterator[Violation]:
        """Yield what is wrong with the merge of supplied partials.

        Parameters
        ----------
        event
            The merge, with its partials' levels and the order in which they are given.
        outputs
            For each token, exact output (1, q_heads, D) and error bound (1, q_heads).
        outcomes
            Outcome of each rank, by global rank; its output is (tokens, heads of the rank, D).

        Yields
        ------
        Violation
            ATT-1 to ATT-4 and MAP-1; ATT-2 also when the same merge gives other bits than before.

        Raises
        ------
        MalformedAnswer
            When an output is no array of numbers.
        """
        wanted = (len(event.levels[0]), self.heads_per_rank, self.shape.value_dim)
        slices = [array_of(rank, "output", o.output) for rank, o in enumerate(outcomes)]
        strange = [rank for rank, merged in enumerate(slices) if merged.shape != wanted]
        for rank in strange:
            what = "shape of the merged output: tokens, query heads of the rank's slice, D"
            yield Violation("ATT-1", what, list(wanted), list(slices[rank].shape), rank)
        if strange:
            return
        merged = np.concatenate(slices, axis=1)
        yield from self._again(event, merged)
        wrong = _outside(merged[None], outputs)
        if not wrong:
            return
        empty = all(None in (row[one.token] for row in event.levels) for one in wrong)
        numbers = _broken(wrong, empty)
        if event.order != sorted(event.order):
            numbers.append("ATT-2")
        token = wrong[0].token
        levels = [event.levels[number][token] for number in event.order]
        what = f"merge of token {token}, query head {{head}}; levels on each cp_rank: {levels}"
        yield from wrong[0].violations(what, numbers, self.heads_per_rank)

    def _replayed(self, merged: Array) -> Iterator[Violation]:
        """ATT-2: a decode of the same trace, played again, gives the same bits."""
        number, self.decodes = self.decodes, self.decodes + 1
        if number == len(self.outputs):
            self.outputs.append(merged)
        before = self.outputs[number]
        if before.tobytes() != merged.tobytes():
            layer, token, head = _first_other(before, merged)
            what = (
                f"the same trace played again: layer {layer}, new token {token}, "
                f"query head {head}, bit for bit"
            )
            first, again = before[layer, token, head].tolist(), merged[layer, token, head].tolist()
            yield Violation("ATT-2", what, first, again, head // self.heads_per_rank)

    def _again(self, event: Merge, merged: Array) -> Iterator[Violation]:
        """ATT-2: the same merge gives the same bits."""
        before = self.merges.setdefault(msgspec.json.encode(event), merged)
        if before.tobytes() != merged.tobytes():
            token, head = _first_other(before, merged)
            what = f"the same merge again: token {token}, query head {head}, bit for bit"
            first, again = before[token, head].tolist(), merged[token, head].tolist()
            yield Violation("ATT-2", what, first, again, head // self.heads_per_rank)


def _first_other(before: Array, merged: Array) -> list[int]:
    """Where the first output is of which the bits differ."""
    rows = (
        np.ascontiguousarray(one).view(np.uint8).reshape(*one.shape[:-1], -1)
        for one in (before, merged)
    )
    first, second = rows
    return [int(i) for i in np.argwhere((first != second).any(-1))[0]]


def _outside(merged: Array, outputs: Sequence[Output]) -> list[_WrongOutput]:
    """Tokens of outputs (layers, tokens, q_heads, D) that are not all within their bound."""
    found = []
    for token, expected in zip(range(merged.shape[1]), outputs, strict=True):
        error = np.sqrt(((merged[:, token] - expected.exact) ** 2).sum(-1))
        if not (error <= expected.bound).all():
            found.append(_WrongOutput(token, merged[:, token], expected, error))
    return found


def _broken(wrong: Sequence[_WrongOutput], empty: bool) -> list[str]:
    """Invariants that these outputs break; `empty`: a rank without keys is in all of them."""
    if all(one.has_other_heads() for one in wrong):
        return ["ATT-1", "ATT-4", "MAP-1"]
    return ["ATT-1", "ATT-4", "ATT-3"] if empty else ["ATT-1", "ATT-4"]


def _other_heads(output: Array, exact: Array, bound: Array, wrong: NDArray[np.bool_]) -> bool:
    """Whether the wrong outputs (heads, dim) are right ones of other wrong heads."""
    missing = np.flatnonzero(wrong)
    for row in output[wrong]:
        error = np.sqrt(((row - exact[missing]) ** 2).sum(-1))
        found = np.flatnonzero(error <= bound[missing])
        if not len(found):
            return False
        missing = np.delete(missing, found[0])
    return True
