"""Profile `cache`: what the slots of each rank hold (OWN-1 by contents, POS-2, PAGE-2, PAGE-4)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from hashlib import sha256
from typing import Any

import numpy as np
from numpy.typing import NDArray

from helix_conformance.drive.asking import MalformedAnswer
from helix_conformance.expect.arrays import Array, as_array
from helix_conformance.expect.expectation import State
from helix_conformance.judge.failure import Violation
from helix_spec.config import CacheDType, Config
from helix_spec.engine import RankView
from helix_spec.values import UNIT_ROUNDOFF


class CacheJudge:
    """OWN-1, POS-2, PAGE-2 and PAGE-4, by cached rows.

    Parameters
    ----------
    config
        A legal configuration, with which the ranks were started.
    tail
        What slots hold to which no token was written (SPEC.md, 10.5).
    """

    def __init__(self, config: Config, tail: str = "as_taken") -> None:
        self.config, self.tail = config, tail
        self.t = config.layout.tokens_per_block
        self.cp = config.layout.cp_size
        self.right: dict[tuple[int, int], tuple[Any, ...]] = {}
        """Per rank and request, rows that were found right, to look at what changed only."""

    def forget(self, id: int) -> None:
        """Forget a request that was released.

        Parameters
        ----------
        id
            The request.
        """
        for rank in range(self.config.world_size):
            self.right.pop((rank, id), None)

    def rows(
        self, state: State, rank: int, view: RankView, batch: Sequence[int]
    ) -> Iterator[Violation]:
        """Yield what is wrong with one rank's cached rows.

        Parameters
        ----------
        state
            The state that is expected.
        rank
            Global rank whose rows they are.
        view
            The rank's state; keys and values are (layers, slots, heads of the rank, dim) a request.
        batch
            Requests that decoded in this event; empty for another event.

        Yields
        ------
        Violation
            For each request and invariant, the first row that is wrong.

        Raises
        ------
        MalformedAnswer
            When a request's rows are missing, no array, or of another shape.
        """
        for id in view.local_len:
            contents = state.contents(id, rank % self.cp)
            if contents is None:
                continue
            keys = self._array(rank, "keys", view.keys.get(id))
            values = self._array(rank, "values", view.values.get(id))
            seen = (*contents, sha256(keys.tobytes() + values.tobytes()).digest())
            if self.right.get((rank, id)) == seen:
                continue
            wrong = list(self._contents(state, rank, id, keys, values, batch))
            yield from wrong
            if not wrong:
                self.right[rank, id] = seen

    def _contents(
        self, state: State, rank: int, id: int, keys: Array, values: Array, batch: Sequence[int]
    ) -> Iterator[Violation]:
        """What one rank's rows of one request hold, against what was written there."""
        cp_rank = rank % self.cp
        _, written = state.contents(id, cp_rank) or ((), 0)
        heads = self.config.kv_heads_of(rank // self.cp)
        table = [page for page in state.tables(id)[cp_rank] if page.number >= 0]
        gone = (len(state.tables(id)[cp_rank]) - len(table)) * self.t
        positions, lower, upper, right = state.rows(id, cp_rank, heads)
        held, shown = len(positions), min(keys.shape[1], values.shape[1])
        keys, values = _at_least(keys, held), _at_least(values, held)
        lost = (values[:, :held] != right).any(axis=(0, 2, 3))
        if lost.any():
            index = int(lost.argmax())
            row, want = values[:, index], right[:, index]
            where = f"V of request {id} at local index {gone + index}, position {positions[index]}"
            what, vectors = _first_wrong(where, row, want, row != want, heads.start)
            yield Violation("OWN-1", what, *vectors, rank=rank, request=id)
            page = table[index // self.t]
            if batch and id not in batch and page.holders > 1:
                yield Violation(
                    "PAGE-2", f"in a shared page, {what}", *vectors, rank=rank, request=id
                )
        rounded = (lower <= keys[:, :held]) & (keys[:, :held] <= upper)
        rotated = ~rounded.all(axis=(0, 2, 3)) & ~lost
        if rotated.any():
            index = int(rotated.argmax())
            row = keys[:, index]
            other = [
                position
                for place, position in enumerate(positions)
                if place != index and _between(lower[:, place], row, upper[:, place]).all()
            ]
            number, why = "POS-2", "it is rotated otherwise"
            if np.isnan(row).any():
                number, why = "OWN-1", "nothing was written there"
            elif other:
                number, why = "OWN-1", f"it is that of position {other[0]}"
            elif _is_rounded(row, lower[:, index], upper[:, index], self.config.model.cached_dtype):
                why = "it is rounded otherwise"
            at = f"local index {gone + index}, position {positions[index]}"
            where = f"K of request {id} at {at}: {why}"
            wrong = ~_between(lower[:, index], row, upper[:, index])
            what, vectors = _first_wrong(where, row, lower[:, index], wrong, heads.start)
            yield Violation(number, what, *vectors, rank=rank, request=id)
        if self.tail == "any":
            return
        never, blank = slice(written, None), np.isnan if self.tail == "as_taken" else _is_zero
        if self.tail == "as_taken" and not self.config.poison:
            return
        if not (blank(keys[:, never]).all() and blank(values[:, never]).all()):
            what = f"slots of request {id} from local index {gone + written} on"
            yield Violation("PAGE-4", what, "never written", "written", rank, id)
        slots = len(table) * self.t
        if held <= shown < slots:
            what = f"slots of request {id} that its keys and values show"
            yield Violation("PAGE-4", what, slots, shown, rank, id)

    def _array(self, rank: int, name: str, rows: Any) -> Array:
        """Cached rows (layers, slots, heads, dim), however many slots there are."""
        if rows is None:
            raise MalformedAnswer(f"its view lacks the {name} of a live request", rank)
        shape = self.config.model
        heads = len(self.config.kv_heads_of(rank // self.cp))
        dim = shape.key_dim if name == "keys" else shape.value_dim
        array = array_of(rank, name, rows)
        if array.size == 0:
            return np.zeros((shape.layers, 0, heads, dim))
        rest = (shape.layers, heads, dim)
        if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != rest:
            what = f"its {name} have shape {array.shape}; layers, heads and dim are {rest}"
            raise MalformedAnswer(what, rank)
        return array


def array_of(rank: int, name: str, rows: Any) -> Array:
    """Return an array that a rank answered, as float64.

    Parameters
    ----------
    rank
        Global rank that answered.
    name
        What the array is called in the message, such as `keys`.
    rows
        The answer: an array of an engine's own, or nested lists of numbers.

    Returns
    -------
    Array
        The same numbers in float64, in the same shape.

    Raises
    ------
    MalformedAnswer
        When it is no array of numbers.
    """
    try:
        return as_array(rows)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise MalformedAnswer(f"its {name} is no array of numbers: {error}", rank) from error


def _is_zero(rows: Array) -> NDArray[np.bool_]:
    zero: NDArray[np.bool_] = rows == 0
    return zero


def _between(lower: Array, rows: Array, upper: Array) -> NDArray[np.bool_]:
    """Which entries lie between two roundings; a NaN does not."""
    between: NDArray[np.bool_] = (lower <= rows) & (rows <= upper)
    return between


def _is_rounded(row: Array, lower: Array, upper: Array, dtype: CacheDType) -> bool:
    """Whether all entries are a little off at most: two units in the last place, or two doubts."""
    unit = 2 * UNIT_ROUNDOFF[dtype] * np.maximum(np.abs(lower), 2**-6)
    slack = 2 * (upper - lower + unit)
    return bool(_between(lower - slack, row, upper + slack).all())


def _first_wrong(
    where: str, row: Array, right: Array, wrong: NDArray[np.bool_], first_head: int
) -> tuple[str, tuple[list[float], list[float]]]:
    """What to say of a row (layers, heads, dim): its first wrong entry, and that head's vectors."""
    layer, head, dim = (int(i) for i in np.argwhere(wrong)[0])
    entry = f"{row[layer, head, dim]:.6g} for {right[layer, head, dim]:.6g}"
    what = f"{where}; first at layer {layer}, KV head {first_head + head}, dim {dim}: {entry}"
    return what, (right[layer, head].tolist(), row[layer, head].tolist())


def _at_least(rows: Array, slots: int) -> Array:
    """Cached rows, blank ones behind them where they are fewer than the tokens they should hold."""
    blank = np.full((rows.shape[0], max(0, slots - rows.shape[1]), *rows.shape[2:]), np.nan)
    return np.concatenate([rows, blank], axis=1)
