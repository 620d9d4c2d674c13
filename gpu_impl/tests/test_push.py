"""The one-sided exchange: every interleaving of its protocol, right and wrong."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest

from helix_gpu.comm.push import Action, Await, Put, Signal, Take, phases
from helix_gpu.comm.windows import SLOTS

Phases = Callable[[int, int], list[list[list[Action]]]]
Counters = tuple[int, ...]


class Violated(Exception):
    """A rank has read what it should not, or nobody can go on."""


class Late(NamedTuple):
    """A take of the message of the epoch before: no part of the protocol."""

    peer: int
    slot: int


class World(NamedTuple):
    """All ranks in the middle of a few exchanges. Messages are named by their epoch, from 1."""

    at: tuple[tuple[int, int, Counters], ...]
    """By rank: epoch, phase, and step of each of the phase's threads."""
    messages: Counters
    """By window, slot, sender and half: what stands there; 0 is nothing."""
    arrived: Counters
    """By window and sender."""


class Explorer:
    """Walks through every interleaving of the ranks' actions, once for each world it meets.

    A message is written and read in two halves, so that it can be torn. With `concurrent` the
    threads of a phase interleave too, as the programs of a kernel do; otherwise they run in order.
    """

    def __init__(
        self,
        protocol: Phases,
        ranks: int,
        epochs: int,
        *,
        concurrent: bool = False,
        enough: Callable[[int, int], bool] = lambda arrived, awaited: arrived >= awaited,
    ) -> None:
        self.ranks, self.epochs = ranks, epochs
        self.concurrent, self.enough = concurrent, enough
        self.programs = [
            [[_halved(thread) for thread in phase] for phase in protocol(ranks, epoch)]
            for epoch in range(epochs)
        ]

    def explore(self) -> int:
        """How many different worlds there are. Raises Violated at the first that is wrong."""
        nothing = (0,) * (self.ranks * SLOTS * self.ranks * 2)
        start = World((self._begin(0, 0),) * self.ranks, nothing, (0,) * self.ranks**2)
        seen, waiting = {start}, [start]
        while waiting:
            world = waiting.pop()
            followers = set(self._followers(world))
            if not followers and any(epoch < self.epochs for epoch, _, _ in world.at):
                raise Violated(f"nobody can go on: {world}")
            waiting.extend(followers - seen)
            seen |= followers
        return len(seen)

    def _begin(self, epoch: int, phase: int) -> tuple[int, int, Counters]:
        if epoch == self.epochs:
            return epoch, 0, ()
        if phase == len(self.programs[epoch]):
            return self._begin(epoch + 1, 0)
        return epoch, phase, (0,) * len(self.programs[epoch][phase])

    def _followers(self, world: World) -> Iterator[World]:
        for rank, (epoch, phase, steps) in enumerate(world.at):
            if epoch == self.epochs:
                continue
            threads = self.programs[epoch][phase]
            running = [i for i, thread in enumerate(threads) if steps[i] < len(thread)]
            for i in running if self.concurrent else running[:1]:
                follower = self._after(world, rank, epoch, *threads[i][steps[i]])
                if follower is None:
                    continue
                now = _replaced(steps, i, steps[i] + 1)
                ended = running == [i] and now[i] == len(threads[i])
                place = self._begin(epoch, phase + 1) if ended else (epoch, phase, now)
                yield follower._replace(at=(*world.at[:rank], place, *world.at[rank + 1 :]))

    def _after(
        self, world: World, rank: int, epoch: int, action: Action | Late, half: int
    ) -> World | None:
        """What one action of a rank makes of the world; None while it has to wait."""

        def place(window: int, slot: int, sender: int) -> int:
            return ((window * SLOTS + slot) * self.ranks + sender) * 2 + half

        match action:
            case Put(peer, slot):
                messages = _replaced(world.messages, place(peer, slot, rank), epoch + 1)
                return world._replace(messages=messages)
            case Signal(peer):
                count = peer * self.ranks + rank
                arrived = _replaced(world.arrived, count, world.arrived[count] + 1)
                return world._replace(arrived=arrived)
            case Await(peer, arrivals):
                here = world.arrived[rank * self.ranks + peer]
                return world if self.enough(here, arrivals) else None
            case Take(peer, slot) | Late(peer, slot):
                found = world.messages[place(rank, slot, peer)]
                if found != epoch + 1 - isinstance(action, Late):
                    raise Violated(f"rank {rank} reads message {found} of rank {peer}: {world}")
                return world


def _halved(thread: list[Action]) -> list[tuple[Action, int]]:
    """Each action, those on messages half by half."""
    return [
        (action, half)
        for action in thread
        for half in ((0, 1) if isinstance(action, Put | Take | Late) else (0,))
    ]


def _replaced(counters: Counters, place: int, value: int) -> Counters:
    return (*counters[:place], value, *counters[place + 1 :])


@pytest.mark.parametrize(
    ("ranks", "epochs", "concurrent"), [(2, 5, False), (2, 4, True), (3, 3, False)]
)
def test_no_message_is_lost_torn_or_overwritten(ranks: int, epochs: int, concurrent: bool) -> None:
    """In every interleaving each rank reads each peer's message of its epoch, and all end."""
    assert Explorer(phases, ranks, epochs, concurrent=concurrent).explore() > 1000


# Wrong protocols: the test above would see each of them


def one_slot(ranks: int, epoch: int) -> list[list[list[Action]]]:
    """Every message goes to the same slot."""
    return [
        [
            [a._replace(slot=0) if isinstance(a, Put | Take) else a for a in thread]
            for thread in phase
        ]
        for phase in phases(ranks, epoch)
    ]


def no_wait(ranks: int, epoch: int) -> list[list[list[Action]]]:
    """Nobody waits for a message."""
    return [
        [[a for a in thread if not isinstance(a, Await)] for thread in phase]
        for phase in phases(ranks, epoch)
    ]


def signal_first(ranks: int, epoch: int) -> list[list[list[Action]]]:
    """The arrival is counted before the message is there: a signal that releases nothing."""
    puts, takes = phases(ranks, epoch)
    return [[thread[::-1] for thread in puts], takes]


def waits_for_the_epoch_before(ranks: int, epoch: int) -> list[list[list[Action]]]:
    """Arrivals counted from 0."""
    return [
        [
            [a._replace(arrivals=epoch) if isinstance(a, Await) else a for a in thread]
            for thread in phase
        ]
        for phase in phases(ranks, epoch)
    ]


def waits_for_the_next_rank_alone(ranks: int, epoch: int) -> list[list[list[Action]]]:
    """One message that has arrived is taken for all of them."""
    puts, takes = phases(ranks, epoch)
    return [puts, [[Await(0, epoch + 1), thread[1]] for thread in takes]]


def takes_after_the_next_put(ranks: int, epoch: int) -> list[list[list[Action]]]:
    """Messages are read one exchange later, as by a merge that overlaps with the next exchange."""
    puts, takes = phases(ranks, epoch)
    waits: list[list[Action]] = [thread[:1] for thread in takes]
    late: list[list[Action]] = [[Late(peer, (epoch - 1) % SLOTS)] for peer in range(ranks)]  # type: ignore[list-item]
    return [puts, waits, late] if epoch else [puts, waits]


@pytest.mark.parametrize(
    "wrong",
    [
        one_slot,
        no_wait,
        signal_first,
        waits_for_the_epoch_before,
        waits_for_the_next_rank_alone,
        takes_after_the_next_put,
    ],
)
@pytest.mark.parametrize("ranks", [2, 3])
def test_a_wrong_protocol_is_caught(wrong: Phases, ranks: int) -> None:
    """Some interleaving of it reads a message that is late, torn or overwritten."""
    with pytest.raises(Violated, match="reads message"):
        Explorer(wrong, ranks, 3).explore()


def test_waiting_for_an_exact_count_is_caught() -> None:
    """A peer may be one exchange ahead: who waits for its exact count waits for ever."""
    explorer = Explorer(phases, 2, 3, enough=lambda arrived, awaited: arrived == awaited)
    with pytest.raises(Violated, match="nobody can go on"):
        explorer.explore()
