"""What a driver does, and how an engine's failure is reported."""

from __future__ import annotations

import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Final, Literal, Protocol, get_args

import msgspec

from helix_conformance.foreign import bounded
from helix_spec.capabilities import Box, Freedoms
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Event
from helix_spec.trace import Watch

Kind = Literal["gone", "died", "timed out", "raised", "stopped"]
KINDS: Final[tuple[Kind, ...]] = get_args(Kind)
"""How a rank fails: its supervisor is gone, its process died, it timed out, it raised or gave a
malformed answer, it was told to stop. What comes first is to blame for what comes later."""


class EngineFailure(Exception):
    """An engine died, timed out or gave a malformed answer (LIVE-1).

    Parameters
    ----------
    rank : int
        The global rank to blame.
    event : int or None
        Index of the event in the trace; None at the start or at the end.
    what : str
        Verb and object, for a sentence that begins with the rank; what is too long is cut.
    how : Kind
        How it failed, one of `KINDS`.

    Examples
    --------
    >>> print(EngineFailure(1, 4, "raised ValueError: no GPU"))
    Rank 1 raised ValueError: no GPU (at event 4).
    """

    def __init__(self, rank: int, event: int | None, what: str, how: Kind = "raised") -> None:
        self.what = bounded(what)
        super().__init__(self.what)
        self.rank = rank
        self.event = event
        self.how = how
        self.traceback = ""
        """Of what it raised, where that is known."""

    def __str__(self) -> str:
        where = "outside any event" if self.event is None else f"at event {self.event}"
        return f"Rank {self.rank} {self.what} ({where})."


def signal_name(number: int) -> str:
    """Return the name of a signal, as in `SIGSEGV`; its number when it has no name.

    Examples
    --------
    >>> signal_name(9), signal_name(1000)
    ('SIGKILL', '1000')
    """
    try:
        return signal.Signals(number).name
    except ValueError:
        return str(number)


class Answer(msgspec.Struct, frozen=True):
    """One rank's answer to one event, and its state afterwards when it was looked at.

    Parameters
    ----------
    outcome : Outcome
        What `start` or `apply` returned; empty at the end of a trace.
    view : RankView or None
        What `observe` returned; None when it was not called.
    """

    outcome: Outcome
    view: RankView | None = None


Played = tuple[Event | None, Sequence[Answer]]
"""An event and the answers of all ranks to it; None stands for the start and the end."""


class Driver(Protocol):
    """Holds the ranks of an engine and plays traces on them."""

    @property
    def name(self) -> str:
        """What `--driver` calls it."""

    @property
    def profiles(self) -> frozenset[str]:
        """What the engine declares."""

    @property
    def capabilities(self) -> tuple[Box, ...]:
        """Where the engine works."""

    @property
    def freedoms(self) -> Freedoms:
        """In what the engine differs rightly."""

    @property
    def takes_exchanges_done(self) -> bool:
        """Whether the engine's counter of exchanges can start elsewhere than at 0."""

    exchanges_done: int
    """Where it starts, on every rank."""

    @property
    def settings(self) -> Mapping[str, str]:
        """What the engine says about how it is set up, for reports."""

    @property
    def largest_world(self) -> int | None:
        """Most ranks it can hold; None when any number."""

    @property
    def survives_failure(self) -> bool:
        """Whether a trace can be played again after an EngineFailure, so that it can shrink."""

    @property
    def streams(self) -> bool:
        """Whether `play` draws each event after it has yielded the answers to the one before."""

    def play(
        self,
        config: Config,
        profiles: frozenset[str],
        events: Iterable[Event],
        watch: Watch,
        *,
        again: bool = False,
    ) -> Iterator[Played]:
        """Start all ranks afresh and play events on them.

        The consumer may stop early; the next call copes with what is still under way.

        Parameters
        ----------
        config : Config
            What the ranks are started with.
        profiles : frozenset of str
            The profiles that are checked; fields of others may be left out of answers.
        events : iterable of Event
            The events, in order. A driver that `streams` draws each after it has yielded the
            answers to the one before; others draw some ahead.
        watch : Watch
            How often the state is looked at.
        again : bool
            Whether the objects that have played the trace before are started again, in place of
            new ones. Ranks that had none get new ones.

        Yields
        ------
        event, answers
            The answers of all ranks, by rank: to the start (event None), to each event, and at last
            their whole state (event None). After a refused start a driver may yield nothing more.

        Raises
        ------
        EngineFailure
            When a rank dies, times out, raises or gives a malformed answer.
        """

    def renew(self) -> bool:
        """End the ranks, so that the next trace is played in new processes.

        Returns
        -------
        bool
            False where there are none to start anew; then nothing has happened.
        """

    def close(self) -> None:
        """End the ranks."""
