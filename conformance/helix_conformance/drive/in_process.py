"""All ranks in this process: for engines whose ranks need none of their own.

An engine that raises, exits or blocks in Python is named, and the run goes on or ends in order. One
that crashes the process takes the run with it: `stdio` and `pool` keep any engine apart from it.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Final, NoReturn, TypeVar

from helix_conformance.drive.asking import apply, finish, start, traceback_of, words
from helix_conformance.drive.blame import timed_out
from helix_conformance.drive.driver import Driver, EngineFailure, Played
from helix_conformance.engines import (
    engine_declaration,
    engine_settings,
    made,
    takes_exchanges_done,
)
from helix_spec.config import Config
from helix_spec.engine import Engine
from helix_spec.events import Event
from helix_spec.trace import Watch

EXIT: Final = os._exit
Asked = TypeVar("Asked")
Told = TypeVar("Told")


class LocalDriver:
    """Plays each event on one rank after the other.

    Parameters
    ----------
    engine : type of Engine
        The class of the ranks; each trace makes an object for each rank.
    deadline_s : float or None
        Seconds that one call may take; None for no limit. It holds in the main thread alone, and
        where nobody else uses the alarm of this process.
    elsewhere : callable, optional
        Opens a driver of processes for the same engine, by which `renew` starts anew.

    Examples
    --------
    >>> from helix_conformance.engines import load_engine
    >>> from helix_spec.events import Admit, Decode
    >>> from helix_spec.layouts import named_layout
    >>> layout = named_layout("pr9757", cp_size=2, tokens_per_block=4)
    >>> config = Config(layout=layout, pages=[8, 8], max_len=24)
    >>> driver = LocalDriver(load_engine("reference"))
    >>> events = [Admit(1, prompt_len=5), Decode([1], query_lens=[1])]
    >>> for event, answers in driver.play(config, driver.profiles, events, Watch()):
    ...     lengths = [answer.view.local_len for answer in answers if answer.view]
    ...     print(type(event).__name__, lengths)
    NoneType []
    Admit [{1: 4}, {1: 1}]
    Decode [{1: 5}, {1: 1}]
    NoneType [{1: 5}, {1: 1}]
    """

    name = "local"
    largest_world: int | None = None
    streams = True

    def __init__(
        self,
        engine: type[Engine],
        *,
        deadline_s: float | None = None,
        elsewhere: Callable[[], Driver] | None = None,
    ) -> None:
        self.engine = engine
        self.elsewhere = elsewhere
        self.renewed: Driver | None = None
        """Plays the trace after `renew`, and those for which the same ranks are started again."""
        self.profiles = frozenset(engine.profiles)
        self.capabilities, self.freedoms = engine_declaration(engine)
        self.settings = engine_settings(engine)
        self.takes_exchanges_done = takes_exchanges_done(engine)
        self.exchanges_done = 0
        self.deadline_s = deadline_s
        self.survives_failure = True
        self.process = os.getpid()
        self.ranks: list[Engine] = []
        """The objects that have played the last trace."""
        self.renewed_is_new = False
        self.asked_at: float | None = None
        """When the call that an engine is in began."""

    def play(
        self,
        config: Config,
        profiles: frozenset[str],
        events: Iterable[Event],
        watch: Watch,
        *,
        again: bool = False,
    ) -> Iterator[Played]:
        """See `Driver.play`."""
        if self.renewed is not None and (self.renewed_is_new or again):
            self.renewed_is_new = False
            yield from self.renewed.play(config, profiles, events, watch, again=again)
            return
        self.close()
        kept = dict(enumerate(self.ranks if again else ()))
        with self._alarm():
            world = range(config.world_size)
            ranks = self._each(world, None, lambda rank: kept.get(rank) or self._made(rank))
            self.ranks = ranks
            yield None, self._each(ranks, None, lambda engine: start(engine, config, profiles))
            for index, event in enumerate(events):
                yield event, self._each(ranks, index, apply(index, event, watch))
            yield None, self._each(ranks, None, finish)

    def renew(self) -> bool:
        """See `Driver.renew`: that trace is played elsewhere, since the ranks live here."""
        self.close()
        if self.elsewhere is None:
            return False
        try:
            self.renewed = self.elsewhere()
        except EngineFailure:
            return False
        self.renewed.exchanges_done, self.renewed_is_new = self.exchanges_done, True
        return True

    def close(self) -> None:
        """End what plays elsewhere."""
        if self.renewed is not None:
            self.renewed.close()
            self.renewed = None

    def _made(self, rank: int) -> Engine:
        """A new object of the engine."""
        return made(self.engine, rank, self.exchanges_done)

    def _each(
        self, ranks: Sequence[Asked], index: int | None, ask: Callable[[Asked], Told]
    ) -> list[Told]:
        """Ask one rank after the other. Raises EngineFailure."""
        told = []
        os._exit = self._leave
        try:
            for engine in ranks:
                self.asked_at = time.monotonic()
                told.append(ask(engine))
        except _TimeoutError:
            self.ranks = []
            self.survives_failure = False  # to try again and again would take for ever
            what = timed_out(self.deadline_s or 0)
            raise EngineFailure(len(told), index, what) from None
        except (Exception, SystemExit) as error:
            self.ranks = []
            failure = EngineFailure(len(told), index, words(error))
            failure.traceback = traceback_of(error)
            raise failure from error
        finally:
            self.asked_at = None
            os._exit = EXIT
        return told

    def _leave(self, status: int) -> NoReturn:
        """Stands in for os._exit, by which an engine would end the run, and green if it chose to.

        A child that an engine forks ends as ever.
        """
        if os.getpid() != self.process:
            EXIT(status)
        raise SystemExit(status)

    @contextmanager
    def _alarm(self) -> Iterator[None]:
        """Look at the clock now and then, where no one else uses this process's alarm."""
        free = threading.current_thread() is threading.main_thread() and (
            signal.getsignal(signal.SIGALRM) is signal.SIG_DFL
        )
        if self.deadline_s is None or not free:
            yield
            return
        signal.signal(signal.SIGALRM, self._look)
        signal.setitimer(signal.ITIMER_REAL, self.deadline_s / 4, self.deadline_s / 4)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, signal.SIG_DFL)

    def _look(self, *_: Any) -> None:
        since, limit = self.asked_at, self.deadline_s
        if since is not None and limit is not None and time.monotonic() - since > limit:
            raise _TimeoutError


class _TimeoutError(BaseException):
    """Raised inside an engine's call that takes too long; no engine catches it by accident."""
