"""All ranks in this process: for engines whose ranks need none of their own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from helix_conformance.drivers.base import EngineFailure, Played
from helix_conformance.protocol import Answer, Engine, Watch
from helix_spec.configs import Config
from helix_spec.events import Event, Outcome


class LocalDriver:
    """Plays each event on one rank after the other."""

    name = "local"
    largest_world: int | None = None
    survives_failure = True
    streams = True

    def __init__(self, engine: type[Engine]) -> None:
        self.engine = engine
        self.profiles = engine.profiles

    def play(
        self, config: Config, profiles: frozenset[str], events: Iterable[Event], watch: Watch
    ) -> Iterator[Played]:
        """See `Driver.play`."""
        ranks = [self.engine(rank) for rank in range(config.world_size)]
        yield None, [_started(rank, engine, config, profiles) for rank, engine in enumerate(ranks)]
        for index, event in enumerate(events):
            yield (
                event,
                [_answer(rank, engine, index, event, watch) for rank, engine in enumerate(ranks)],
            )
        yield None, [_state(rank, engine) for rank, engine in enumerate(ranks)]

    def close(self) -> None:
        """Nothing to end."""


def _started(rank: int, engine: Engine, config: Config, profiles: frozenset[str]) -> Answer:
    try:
        return Answer(engine.start(config, profiles))
    except Exception as error:
        raise _failure(rank, None, error) from error


def _answer(rank: int, engine: Engine, index: int, event: Event, watch: Watch) -> Answer:
    try:
        return Answer(engine.apply(event), watch.look(engine, index, event))
    except Exception as error:
        raise _failure(rank, index, error) from error


def _state(rank: int, engine: Engine) -> Answer:
    try:
        return Answer(Outcome(), engine.observe())
    except Exception as error:
        raise _failure(rank, None, error) from error


def _failure(rank: int, index: int | None, error: Exception) -> EngineFailure:
    return EngineFailure(rank, index, f"raised {type(error).__name__}: {error}")
