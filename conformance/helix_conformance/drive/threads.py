"""All ranks in this process, a thread for each: for engines whose all-to-all can be stood in for.

Such an engine has an attribute `exchange` (see `helix_gpu.comm.exchange.Exchange`), which is set
before `start`. Nothing blocks for ever: a rank that waits for one that has left the event fails.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from threading import Condition
from typing import TYPE_CHECKING, Any

from helix_conformance.drive.asking import apply, finish, start, words
from helix_conformance.drive.blame import skipped
from helix_conformance.drive.driver import Answer, EngineFailure, Played
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

if TYPE_CHECKING:
    from torch import Tensor


class _LeftAloneError(Exception):
    """A rank waits in an exchange for peers whose event is over."""

    def __init__(self, waiting: int, peers: set[int]) -> None:
        super().__init__(f"rank {waiting} waits for {peers}")
        self.peers = peers


class _Table:
    """The exchange of one cp group during one event: who laid down what, round by round."""

    def __init__(self, ranks: Sequence[int]) -> None:
        self.ranks = ranks
        self.changed = Condition()
        self.begin()

    def begin(self) -> None:
        """A new event."""
        self.rounds: list[dict[int, Tensor]] = []
        self.left: set[int] = set()

    def leave(self, rank: int) -> None:
        """The rank's event is over: it will lay down no more."""
        with self.changed:
            self.left.add(rank)
            self.changed.notify_all()

    def exchange(self, rank: int, send: Tensor) -> Tensor:
        """Lay down what this rank sends, wait for its peers, pick up its own."""
        import torch  # here, since torch is optional

        with self.changed:
            mine = next((r for r in self.rounds if rank not in r), None)
            if mine is None:
                self.rounds.append(mine := {})
            mine[rank] = send.clone()  # the sender may go on and use its buffer again
            self.changed.notify_all()
            while len(mine) < len(self.ranks):
                missing = self.left - mine.keys()
                if missing:
                    raise _LeftAloneError(rank, missing)
                self.changed.wait()
        place = self.ranks.index(rank)
        return torch.stack([mine[peer][place] for peer in self.ranks])


class ThreadDriver:
    """Plays each event on all ranks at once, at most 16.

    Parameters
    ----------
    engine : type of Engine
        The class of the ranks; each trace makes an object for each rank.
    """

    name = "threads"
    largest_world: int | None = 16
    survives_failure = True
    streams = True

    def __init__(self, engine: type[Engine]) -> None:
        import torch  # here, since torch is optional

        torch.set_num_threads(1)  # several ranks share few cores
        self.engine = engine
        self.profiles = frozenset(engine.profiles)
        self.capabilities, self.freedoms = engine_declaration(engine)
        self.settings = engine_settings(engine)
        self.takes_exchanges_done = takes_exchanges_done(engine)
        self.exchanges_done = 0
        self.threads = ThreadPoolExecutor(16)
        self.ranks: list[Any] = []
        """The objects that have played the last trace."""

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
        cp, world = config.layout.cp_size, config.world_size
        groups = [range(first, first + cp) for first in range(0, world, cp)]
        tables = [table for group in groups for table in [_Table(group)] * cp]
        ranks = self.ranks[:world] if again else list[Any]()
        self.ranks = ranks
        for rank in range(len(ranks), world):
            try:
                ranks.append(made(self.engine, rank, self.exchanges_done))
            except (Exception, SystemExit) as error:
                raise EngineFailure(rank, None, words(error)) from error
        for rank, engine in enumerate(ranks):
            engine.exchange = lambda send, rank=rank: tables[rank].exchange(rank, send)

        def all_ranks(index: int | None, answer: Callable[[Engine], Answer]) -> list[Answer]:
            def one(rank: int) -> Answer | BaseException:
                try:
                    return answer(ranks[rank])
                except (Exception, SystemExit) as error:
                    return error
                finally:
                    tables[rank].leave(rank)

            for table in tables:
                table.begin()
            return _sound(index, list(self.threads.map(one, range(world))))

        yield None, all_ranks(None, lambda engine: start(engine, config, profiles))
        for index, event in enumerate(events):
            yield event, all_ranks(index, apply(index, event, watch))
        yield None, all_ranks(None, finish)

    def renew(self) -> bool:
        """See `Driver.renew`: the ranks live in this process."""
        return False

    def close(self) -> None:
        """End the threads."""
        self.threads.shutdown()


def _sound(index: int | None, answers: Sequence[Answer | BaseException]) -> list[Answer]:
    """The answers, when every rank gave one. Raises EngineFailure, naming the rank to blame."""
    waiting = set[int]()
    for rank, answer in enumerate(answers):
        if isinstance(answer, _LeftAloneError):
            waiting.add(rank)
        elif isinstance(answer, BaseException):
            raise EngineFailure(rank, index, words(answer)) from answer
    for answer in answers:
        if isinstance(answer, _LeftAloneError):
            raise EngineFailure(min(answer.peers), index, skipped(sorted(waiting)))
    return [answer for answer in answers if isinstance(answer, Answer)]
