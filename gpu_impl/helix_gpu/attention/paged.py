"""Attention of new tokens over this rank's pages, on the CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from math import prod
from typing import Final, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn.functional import pad

from helix_gpu.attention.merge import merge

TOKENS_AT_ONCE: Final = 512
"""Slots of each token gathered at a time. It bounds the scratch memory, and does not depend
on the batch, so that dummy requests leave the order of summation alone."""
BYTES_AT_ONCE: Final = 2**23
"""Keys and values gathered at a time, for as many tokens as they suffice for: they should still be
in the caches when they are used, and memory of this size is not fetched anew for each call."""

VECTOR: Final = 16
"""Torch's operation takes so many scores at a time; of the odd ones at the end it is less exact,
so there must be none (2.13, AVX-512: 6 units of roundoff in the output)."""


MIN_RUN: Final = 5
"""From so many tokens of one request on, gathering its pages once is worth a call of its own."""
ROWS_OF_A_RUN: Final = 256
"""Tokens of a run that attend together: they all meet the keys that the last one sees."""
KEYS_OF_A_CALL: Final = 512
"""Up to so many keys, which torch's operation takes at a time, one call with a mask is faster than
two."""
SLOTS_OF_A_RUN: Final = 8192
"""Slots gathered at a time for a run; it bounds the scratch memory."""


def attend_pages(
    q: Tensor,
    pages: Tensor,
    tables: Tensor,
    lengths: Tensor,
    *,
    starts: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    value_dim: int | None = None,
    layer: int | None = None,
    positions: Tensor | None = None,
    runs: Sequence[slice] = (),
) -> tuple[Tensor, Tensor]:
    """Return the partial attention of each new token over the slots of its request on this rank.

    Everything is float32 whatever the type. All tensors are on the CPU.

    Parameters
    ----------
    q : Tensor, any float type [n, q_heads, key_dim]
    pages : Tensor, any float type [pages, parts, tokens_per_block, kv_heads, key_dim]
        K is the first part. The values are the first `value_dim` elements of the last part, which
        with a latent cache is the same.
    tables : Tensor, int64 [n, width]
        Page numbers; any existing page where there is none to see.
    lengths : Tensor, int64 [n]
        Slots that each token sees: those before this one, in local order.
    starts : Tensor, int64 [n], optional
        The first slot that each token sees; 0 unless given. Pages that lie before it are not read.
        A token whose start is not below its length sees none.
    scale : float, optional
        Of the scores; 1 / sqrt(key_dim) unless given.
    softcap : float, optional
        c of a score s that counts as c tanh(s / c), after the scale.
    value_dim : int, optional
        Elements of a value; key_dim unless given.
    layer, positions
        Not looked at: all layers attend alike, to all positions.
    runs : sequence of slice
        Rows that are consecutive tokens of one request, as `runs_of` finds them; neither length
        nor start falls from one to the next. Their pages are gathered once, those of other rows for
        each row.

    Returns
    -------
    output : Tensor, float32 [n, q_heads, value_dim]
    lse : Tensor, float32 [n, q_heads]
        Natural log-sum-exp; a token without keys gives (0, -inf).

    Examples
    --------
    >>> pages = torch.arange(16.0).view(2, 2, 4, 1, 1)  # two pages of K and V, four tokens each
    >>> q, tables = torch.zeros(1, 1, 1), torch.tensor([[1, 0]])
    >>> output, lse = attend_pages(q, pages, tables, torch.tensor([5]))
    >>> output.item()  # the mean of the values 12 to 15 of page 1 and the first one of page 0, 4
    11.600000381469727
    """
    kv_heads, key_dim = pages.shape[3:]
    scale, value_dim = scale or key_dim**-0.5, value_dim or key_dim
    q = q.float()
    # A group of query heads shares a KV head: it becomes the rows of one matrix product.
    query = q.reshape(len(q), kv_heads, -1, key_dim)
    output = query.new_empty((*q.shape[:2], value_dim))
    lse = query.new_empty(q.shape[:2])
    starts = torch.zeros_like(lengths) if starts is None else starts
    how = _How(scale, softcap)
    alone = torch.ones(len(q), dtype=torch.bool)
    for run in runs:
        alone[run] = False
        bounds = starts[run], lengths[run]
        _attend_run(q[run], pages, tables[run][0], *bounds, how, output[run], lse[run])
    if alone.any():
        rows = alone.nonzero()[:, 0] if runs else slice(None)
        windows = _windows(tables[rows], starts[rows], lengths[rows], pages.shape[2])
        found, found_lse = _by_rows(query[rows], pages, *windows, how, value_dim)
        output[rows], lse[rows] = found.flatten(1, 2), found_lse.flatten(1)
    return output, lse


def runs_of(rows: NDArray[np.int64]) -> list[slice]:
    """Return where MIN_RUN or more tokens of one request stand one after the other.

    Parameters
    ----------
    rows : ndarray, int64 [n]
        Of each token, what tells its request from others.

    Returns
    -------
    list of slice

    Examples
    --------
    >>> runs_of(np.array([3, 3, 1, 1, 1, 1, 1, 1]))
    [slice(2, 8, None)]
    """
    borders = np.concatenate(([0], (rows[1:] != rows[:-1]).nonzero()[0] + 1, [len(rows)]))
    long = (np.diff(borders) >= MIN_RUN).nonzero()[0]
    return [slice(int(borders[i]), int(borders[i + 1])) for i in long]


class _How(NamedTuple):
    """What torch's operation is told, and what it does not know."""

    scale: float
    softcap: float | None

    def attend(
        self, query: Tensor, keys: Tensor, values: Tensor, hidden: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Attend with queries [n, heads, rows, dim] over keys and values [n, kv_heads, slots, dim].

        `hidden` [n, 1, rows or 1, slots] is added to the scores.
        """
        if self.softcap is None:
            found: tuple[Tensor, Tensor] = (
                torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                    query, keys, values, attn_mask=hidden, scale=self.scale
                )
            )
            return found
        n, _, rows, dim = query.shape
        query = query.reshape(n, keys.shape[1], -1, rows, dim)
        scores = query @ keys[:, :, None].mT
        scores = self.softcap * (scores * (self.scale / self.softcap)).tanh()
        scores = scores if hidden is None else scores + hidden[:, :, None]
        lse = scores.logsumexp(-1)
        output = (scores - lse[..., None]).exp() @ values[:, :, None]
        return output.flatten(1, 2), lse.flatten(1, 2)


def _windows(
    tables: Tensor, starts: Tensor, stops: Tensor, t: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Tables without the pages that lie before each row's window, and the bounds in what is left.

    A row that sees nothing stops at 0; others start in their first page.
    """
    skipped = (starts // t).where(starts < stops, 0)
    starts, stops = starts - skipped * t, (stops - skipped * t).where(starts < stops, 0)
    width = -(-int(stops.max()) // t)
    columns = skipped[:, None] + torch.arange(width)
    return tables.gather(1, columns.clamp(max=tables.shape[1] - 1)), starts, stops


def _by_rows(
    query: Tensor, pages: Tensor, tables: Tensor, starts: Tensor, stops: Tensor, how: _How,
    value_dim: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attend with queries [n, kv_heads, group, key_dim], each over pages gathered for it.

    Tables and bounds are those of `_windows`.
    """
    t = pages.shape[2]
    output = query.new_zeros((*query.shape[:3], value_dim))
    lse = query.new_full(query.shape[:3], -torch.inf)
    pages_at_once = max(1, TOKENS_AT_ONCE // t)
    most = min(pages_at_once, tables.shape[1])
    of_a_row = most * prod(pages.shape[1:]) * torch.float32.itemsize
    rows_at_once = max(1, BYTES_AT_ONCE // max(1, of_a_row))
    gather = _Gather(pages, min(rows_at_once, len(query)), most)
    for first in range(0, tables.shape[1], pages_at_once):
        # Torch's operation ends the process when it is given no keys: such rows are left out.
        seeing = (stops > first * t).nonzero()[:, 0]
        for begin in range(0, len(seeing), rows_at_once):
            rows = seeing[begin : begin + rows_at_once]
            stop = (stops[rows] - first * t).clamp(max=pages_at_once * t)
            width = -(-int(stop.max()) // t)
            table = tables[rows, first : first + width]
            keys, values, hidden = gather(table, starts[rows] - first * t, stop)
            piece, piece_lse = how.attend(query[rows], keys, values, hidden)
            piece = piece[..., :value_dim]
            if first:
                piece, piece_lse = merge(
                    torch.stack((output[rows], piece)), torch.stack((lse[rows], piece_lse))
                )
            output[rows], lse[rows] = piece, piece_lse
    return output, lse


def _attend_run(
    query: Tensor, pages: Tensor, table: Tensor, starts: Tensor, stops: Tensor, how: _How,
    output: Tensor, lse: Tensor,
) -> None:  # fmt: skip
    """Attend with consecutive tokens of a request, whose bounds never fall: `output` and `lse`.

    Queries are [n, heads, dim], of which each KV head's stand together.
    """
    plan = _plan(starts.numpy().tobytes(), stops.numpy().tobytes(), pages.shape[2])
    output[plan.blank], lse[plan.blank] = 0, -torch.inf
    for numbers, slots, calls in plan.gathers:
        keys, values = _gathered(pages, table[numbers], slots)
        for call in calls:
            rows, seen = (0, call.first, call.rows), (2, call.begin, call.slots)
            piece, piece_lse = how.attend(
                query.narrow(*rows).transpose(0, 1)[None],
                keys.narrow(*seen),
                values.narrow(*seen),
                call.hidden,
            )
            into = output.narrow(*rows), lse.narrow(*rows)
            _add(piece[0].transpose(0, 1), piece_lse[0].T, *into, begun=call.begun)


class _Call(NamedTuple):
    """Rows of a run that attend together to some of the slots gathered."""

    first: int
    rows: int
    begin: int
    slots: int
    hidden: Tensor | None
    """[1, 1, rows, slots], -inf where a row does not see a slot; None where all see all."""
    begun: bool
    """Whether something was found for these rows before."""


class _Plan(NamedTuple):
    blank: Tensor
    """Rows that hold what no keys give when the first call is made: those that see none, too."""
    gathers: list[tuple[slice, slice, list[_Call]]]
    """Columns of the table, the slots that are taken of theirs, and who attends to these."""


@lru_cache(maxsize=16)
def _plan(starts: bytes, stops: bytes, t: int) -> _Plan:
    """How a run attends; all layers of a step do it alike, and masks take a while to make."""
    lows, highs = (np.frombuffer(bounds, dtype=np.int64) for bounds in (starts, stops))
    seeing = (lows < highs).nonzero()[0]
    blank = np.ones(len(lows), dtype=bool)  # so far: rows for which nothing was found
    mixed, gathers = np.zeros_like(blank), []
    size = max(1, SLOTS_OF_A_RUN // t) * t
    begin, end = (int(lows[seeing[0]]) // t * t, int(highs[-1])) if len(seeing) else (0, 0)
    for gathered in range(begin, end, size):
        low, high = ((bounds - gathered).clip(0, size) for bounds in (lows, highs))
        calls = []
        for rows in _stretches(low < high):
            begun = not blank[rows].all()
            for left, right in _borders(low[rows], high[rows]):
                slot = np.arange(left, right)
                hidden = (slot < low[rows, None]) | (slot >= high[rows, None])
                mask = None
                if hidden.any():
                    mask = torch.from_numpy(np.where(hidden, np.float32(-np.inf), np.float32(0)))
                    mask = mask[None, None]
                mixed[rows] |= blank[rows] & begun
                calls.append(_Call(rows.start, len(hidden), left, right - left, mask, begun))
                blank[rows], begun = False, True
        first, stop = int(low[low < high].min(initial=size)), int(high.max())
        columns = slice(gathered // t, -(-(gathered + stop) // t))
        gathers.append((columns, slice(first, stop), calls))
    return _Plan(torch.from_numpy((blank | mixed).nonzero()[0]), gathers)


def _stretches(seeing: NDArray[np.bool_]) -> Iterator[slice]:
    """Neighbouring rows that see something, cut into pieces."""
    rows = seeing.nonzero()[0]
    for stretch in np.split(rows, (np.diff(rows) > 1).nonzero()[0] + 1):
        for at in range(0, len(stretch), ROWS_OF_A_RUN):
            piece = stretch[at : at + ROWS_OF_A_RUN]
            yield slice(int(piece[0]), int(piece[-1]) + 1)


def _borders(low: NDArray[np.int64], high: NDArray[np.int64]) -> list[tuple[int, int]]:
    """The slots of some rows, cut where some rows do not see what is beside; bounds never fall.

    Every row sees a slot of each part: of one that sees none torch's operation makes NaN.
    """
    begin, end = int(low[0]) // VECTOR * VECTOR, -(-int(high[-1]) // VECTOR) * VECTOR
    left = begin if low[-1] == begin else (int(low[-1]) // VECTOR + 1) * VECTOR
    right = end if high[0] == end else (int(high[0]) - 1) // VECTOR * VECTOR
    if end - begin <= KEYS_OF_A_CALL or left >= right:
        return [(begin, end)]
    parts = [(right, end), (left, right), (begin, left)]
    return [(first, last) for first, last in parts if first < last]


def _gathered(pages: Tensor, numbers: Tensor, slots: slice) -> tuple[Tensor, Tensor]:
    """K and V of some slots of these pages: float32 [1, kv_heads, slots, dim].

    What lies before and behind them, up to a multiple of VECTOR, is 0.
    """
    parts = []
    for part in (0, -1):
        rows = pages[numbers, part].flatten(0, 1)[: slots.stop].float()
        rows[: slots.start] = 0
        rows = pad(rows, (0, 0, 0, 0, 0, -len(rows) % VECTOR)) if len(rows) % VECTOR else rows
        parts.append(rows.transpose(0, 1)[None])
    return parts[0], parts[1]


def _add(piece: Tensor, piece_lse: Tensor, output: Tensor, lse: Tensor, *, begun: bool) -> None:
    """Merge a partial into what was found before, where both have keys: `merge` in one pass."""
    piece = piece[..., : output.shape[-1]]
    if not begun:
        output.copy_(piece)
        lse.copy_(piece_lse)
        return
    output.lerp_(piece, (piece_lse - lse).sigmoid()[..., None])
    torch.logaddexp(lse, piece_lse, out=lse)


class _Gather:
    """Gathers K and V of up to `rows` tokens, `width` pages each, into memory that it keeps.

    Fresh memory for every piece would cost as much as reading the pages does.
    """

    def __init__(self, pages: Tensor, rows: int, width: int) -> None:
        t, kv_heads, dim = pages.shape[2:]
        self.parts = pages.unbind(1)
        slots = -(-width * t // VECTOR) * VECTOR
        self.found = [part.new_empty(rows * width, t, kv_heads, dim) for part in self.parts]
        # Where nothing is converted or filled up, what was found is used as it lies.
        as_it_lies = pages.dtype == torch.float32 and t % VECTOR == 0
        size = rows * slots * kv_heads * dim
        self.wide = [None if as_it_lies else torch.empty(size) for _ in self.parts]

    def __call__(
        self, table: Tensor, start: Tensor, stop: Tensor
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """K and V of these pages' slots: float32 [n, kv_heads, slots, dim].

        Row i has `start[i]` to `stop[i]`. What lies beside them is 0, for it may be NaN, and gets
        -inf from the mask [n, 1, 1, slots]; there is none where every row is full.
        """
        n, (t, kv_heads, dim) = len(table), self.found[0].shape[1:]
        numbers, there = table.flatten(), table.shape[1] * t
        slots = -(-there // VECTOR) * VECTOR
        places = torch.arange(slots)
        hidden = (places < start[:, None]) | (places >= stop[:, None])
        full = not hidden.any()
        gathered = []
        for part, found, wide in zip(self.parts, self.found, self.wide, strict=True):
            rows = torch.index_select(part, 0, numbers, out=found[: len(numbers)])
            rows = rows.view(n, there, kv_heads, dim)
            if wide is not None:
                room = wide[: n * slots * kv_heads * dim].view(n, slots, kv_heads, dim)
                room[:, :there] = rows
                rows = room
            if not full:
                rows.masked_fill_(hidden[..., None, None], 0)
            gathered.append(rows.transpose(1, 2))
        mask = None
        if not full:
            mask = torch.zeros(n, slots).masked_fill_(hidden, -torch.inf)[:, None, None]
        return gathered[0], gathered[-1], mask
