"""Which tokens each layer has been given, and which steps may still be attended to.

A query sees every token before it. So no layer may attend to a token while it lacks an earlier one
of the request, whose slot holds whatever lay there; and no step may be attended to once its slots
belong to something else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from helix_gpu.bookkeeping.refusals import StepError

Ints = NDArray[np.int64]


class StepTokens(NamedTuple):
    """The new tokens of a step, for n requests, and the generation of each request's state."""

    of: Written
    ids: Sequence[int]
    rows: Ints
    """[n] rows of the requests."""
    firsts: Ints
    """[n] global position of each request's first new token."""
    ends: Ints
    """[n] position behind its last one."""
    generations: Ints
    """[n] the step is good while its requests have these."""


class Written:
    """The tokens that each layer of each request was given, by the ledger's rows.

    Parameters
    ----------
    layers : int

    Examples
    --------
    >>> written = Written(layers=1)
    >>> written.place(0, tokens=4, given=True)
    >>> step = written.begin([7], np.array([0]), np.array([4]), np.array([5]))
    >>> written.check_whole([7], np.array([0]))
    Traceback (most recent call last):
    helix_gpu.bookkeeping.refusals.StepError: Request 7 has new tokens from position 4 on that \
layer 0 was not given; attend to its steps first, or cancel them.
    >>> written.give(step, 0)
    >>> written.check_whole([7], np.array([0]))
    """

    def __init__(self, layers: int) -> None:
        self._given: Ints = np.zeros((layers, 0), dtype=np.int64)
        """[layers, rows] tokens that the layer has been given, from position 0 on."""
        self._missing: Ints = np.zeros(0, dtype=np.int64)
        """[rows] tokens that the layers lack, all layers together."""
        self._generations: Ints = np.zeros(0, dtype=np.int64)
        """[rows] which of all the states that requests have been in."""
        self._states = 0

    def place(self, row: int, tokens: int, *, given: bool) -> None:
        """Begin a request with a prompt, given to all layers or to none.

        Parameters
        ----------
        row : int
        tokens : int
            Tokens of the prompt.
        given : bool
        """
        layers, rows = self._given.shape
        if row >= rows:
            more = ((0, 0), (0, max(8, rows, row + 1 - rows)))
            self._given = np.pad(self._given, more)
            self._missing, self._generations = (
                np.pad(x, more[1]) for x in (self._missing, self._generations)
            )
        self._given[:, row] = tokens if given else 0
        self._missing[row] = 0 if given else layers * tokens
        self._renew(row)

    def end(self, row: int) -> None:
        """End a request: no step of it is good any more.

        Parameters
        ----------
        row : int
        """
        self._renew(row)

    def begin(self, ids: Sequence[int], rows: Ints, firsts: Ints, ends: Ints) -> StepTokens:
        """Begin a step of new tokens; steps of the same requests before it are no longer good.

        Parameters
        ----------
        ids : sequence of int, [n]
        rows : ndarray, int64 [n]
        firsts, ends : ndarray, int64 [n]
            Global positions of each request's first new token, and behind its last one.

        Returns
        -------
        StepTokens
        """
        self._missing[rows] += len(self._given) * (ends - firsts)
        self._renew(rows)
        return StepTokens(self, ids, rows, firsts, ends, self._generations[rows])

    def generations(self, rows: Ints) -> Ints:
        """Return the generations that requests have now.

        Parameters
        ----------
        rows : ndarray, int64 [n]

        Returns
        -------
        ndarray, int64 [n]
        """
        return self._generations[rows]

    def check_step(self, step: StepTokens) -> None:
        """Raise unless the step is good: none of its requests has gone on, or ended, since.

        Parameters
        ----------
        step : StepTokens

        Raises
        ------
        StepError
        """
        if step.of is not self:
            raise StepError("The step was begun by another cache.")
        stale = (self._generations[step.rows] != step.generations).nonzero()[0]
        if len(stale):
            raise StepError(
                f"The step is over: request {step.ids[stale[0]]} has ended, or gone on to another "
                "step, since it began."
            )

    def check_layer(self, step: StepTokens, layer: int) -> None:
        """Raise unless a layer may attend to the step: it is good, and earlier tokens are there.

        Parameters
        ----------
        step : StepTokens
        layer : int

        Raises
        ------
        StepError
        """
        self.check_step(step)
        given = self._given[layer, step.rows]
        short = (given < step.firsts).nonzero()[0]
        if len(short):
            place = short[0]
            raise StepError(
                f"Layer {layer} was given {given[place]} tokens of request {step.ids[place]}, and "
                f"those of this step begin at position {step.firsts[place]}; attend to the chunks "
                "of a prompt in their order."
            )

    def give(self, step: StepTokens, layer: int) -> None:
        """Note that a layer has been given the step's tokens.

        Parameters
        ----------
        step : StepTokens
        layer : int
        """
        given = self._given[layer, step.rows]
        after = np.maximum(given, step.ends)
        self._missing[step.rows] -= after - given
        self._given[layer, step.rows] = after

    def give_all(self, step: StepTokens) -> None:
        """Note that all layers have been given the step's tokens.

        Parameters
        ----------
        step : StepTokens
        """
        given = self._given[:, step.rows]
        after = np.maximum(given, step.ends)
        self._missing[step.rows] -= (after - given).sum(axis=0)
        self._given[:, step.rows] = after

    def lacking(self, step: StepTokens) -> list[int]:
        """Return the layers that lack tokens of a step; none once it is over.

        Parameters
        ----------
        step : StepTokens
        """
        if (self._generations[step.rows] != step.generations).any():
            return []
        least = (self._given[:, step.rows] - step.ends).min(axis=1)
        return np.flatnonzero(least < 0).tolist()

    def whole(self, rows: Ints) -> Ints:
        """Return those requests of which every layer has been given all tokens.

        Parameters
        ----------
        rows : ndarray, int64 [n]

        Returns
        -------
        ndarray, int64
        """
        whole: Ints = rows[self._missing[rows] == 0]
        return whole

    def check_whole(self, ids: Sequence[int], rows: Ints) -> None:
        """Raise unless every layer has been given all tokens of these requests.

        Parameters
        ----------
        ids : sequence of int, [n]
        rows : ndarray, int64 [n]

        Raises
        ------
        StepError
        """
        missing = self._missing[rows].nonzero()[0]
        if len(missing):
            place = missing[0]
            given = self._given[:, rows[place]]
            layer = int(given.argmin())
            raise StepError(
                f"Request {ids[place]} has new tokens from position {given[layer]} on that layer "
                f"{layer} was not given; attend to its steps first, or cancel them."
            )

    def rewind(self, row: int, tokens: int) -> None:
        """Let a request have its first tokens alone, which all layers were given.

        Parameters
        ----------
        row : int
        tokens : int
        """
        self._given[:, row] = tokens
        self._missing[row] = 0
        self._renew(row)

    def fork(self, source: int, row: int, tokens: int) -> None:
        """Begin a request as a copy of another, which has all its tokens in all layers.

        Parameters
        ----------
        source, row : int
        tokens : int
        """
        self.place(row, tokens, given=True)
        self._renew(source)

    def _renew(self, rows: int | Ints) -> None:
        self._states += 1
        self._generations[rows] = self._states
