"""What an engine is, what it may declare, and how one is named on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any, ClassVar, Final, Protocol

import msgspec

from helix_spec.configs import Config
from helix_spec.events import FEATURES, Event, Outcome, RankView, ids_of

LADDER: Final = ("placement", "lengths", "pages", "cache", "attention")
"""Profiles of rising depth: an engine that declares one declares those before it."""
PROFILES: Final = (*LADDER, *FEATURES)
"""Every profile, in the order in which reports list them."""


class Engine(Protocol):
    """One rank of an engine under test.

    `rank` is global: tp_rank * cp_size + cp_rank (MAP-1). The suite makes one object per rank,
    starts it once per trace, and never lets two threads touch it.
    """

    profiles: ClassVar[frozenset[str]]
    """The profiles it declares; others are reported as not checked."""
    needs_processes: ClassVar[bool]
    """Whether each rank needs a process of its own, with torch.distributed initialised."""

    def __init__(self, rank: int) -> None: ...

    @classmethod
    def join(cls, world_size: int) -> None:
        """Called once in every process, when torch.distributed is up and before any trace.

        Traces may use fewer ranks than there are processes, so groups are made here, by all.
        Only for engines that need processes.
        """

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Begin anew: ready, or refused with `bad_config`. `profiles` are those to be checked."""

    def apply(self, event: Event) -> Outcome:
        """Let one event happen on this rank, or refuse it and change nothing."""

    def observe(self, ids: Sequence[int] | None = None) -> RankView:
        """This rank's state, of these requests or of all live ones; changes nothing.

        It must not go through the code by which `apply` places tokens.
        """


class EngineSpecError(ValueError):
    """A text that names no engine; the message says what would."""


BUILT_IN: Final = {
    "reference": "helix_reference.engine:ReferenceEngine",
    "gpu": "helix_conformance.engines.gpu:GpuEngine",
    "gpu-all-gather": "helix_conformance.engines.gpu:AllGatherEngine",
    "gpu-reduce-scatter": "helix_conformance.engines.gpu:ReduceScatterEngine",
    "gpu-ledger": "helix_conformance.engines.gpu:LedgerEngine",
}


def load_engine(spec: str) -> type[Engine]:
    """The engine class that a name of `BUILT_IN` or `module:Class` stands for.

    Raises EngineSpecError when there is none, or when it does not look like an engine.
    """
    module_name, _, class_name = BUILT_IN.get(spec, spec).partition(":")
    if not class_name:
        raise EngineSpecError(
            f"{spec!r} names no engine; give {', '.join(BUILT_IN)} or module:Class."
        )
    try:
        found: Any = getattr(importlib.import_module(module_name), class_name)
    except (ImportError, AttributeError) as error:
        raise EngineSpecError(f"Engine {spec!r} cannot be loaded: {error}.") from error
    for name in ("profiles", "start", "apply", "observe"):
        if not hasattr(found, name):
            raise EngineSpecError(f"Engine {spec!r} has no {name!r}; see the Engine protocol.")
    unknown = sorted(set(found.profiles) - set(PROFILES))
    if unknown:
        raise EngineSpecError(
            f"Engine {spec!r} declares unknown profiles {', '.join(unknown)}; "
            f"the profiles are {', '.join(PROFILES)}."
        )
    engine: type[Engine] = found
    return engine


class Answer(msgspec.Struct, frozen=True):
    """One rank's answer to one event, and its state afterwards when it was looked at."""

    outcome: Outcome
    view: RankView | None = None


class Watch(msgspec.Struct, frozen=True):
    """How often state is looked at: everything every `every` events and at the end.

    In between, with `touched`, the requests that the event names.
    """

    every: int = 1
    touched: bool = True

    def look(self, engine: Engine, index: int, event: Event) -> RankView | None:
        """What is observed after the event with this index."""
        if (index + 1) % self.every == 0:
            return engine.observe()
        return engine.observe(ids_of(event)) if self.touched else None
