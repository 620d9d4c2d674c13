"""What an engine is, what it may declare, and how one is named on the command line."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from importlib.metadata import entry_points
from typing import Annotated, Any, ClassVar, Final, Protocol

import msgspec

from helix_spec.configs import Config
from helix_spec.events import FEATURES, MERGE, Event, Outcome, RankView

LADDER: Final = ("placement", "lengths", "pages", "cache", "attention")
"""Profiles of rising depth: an engine that declares one declares those before it."""
PROFILES: Final = (*LADDER, *FEATURES, MERGE)
"""Every profile, in the order in which reports list them."""


class Engine(Protocol):
    """One rank of an engine under test.

    `rank` is global: tp_rank * cp_size + cp_rank (MAP-1). The suite makes one object per rank,
    starts it once per trace, and never lets two threads touch it.
    """

    profiles: ClassVar[frozenset[str]]
    """The profiles it declares; others are reported as not checked."""
    needs_processes: ClassVar[bool]
    """Whether each rank needs a process of its own, with torch.distributed initialised.

    A third attribute may be there: `settings`, a dictionary of texts that reports show.
    """

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
    "gpu-push": "helix_conformance.engines.gpu:PushEngine",
    "gpu-hop-b": "helix_conformance.engines.gpu:HopBEngine",
    "gpu-ledger": "helix_conformance.engines.gpu:LedgerEngine",
    "vllm-v1": "helix_conformance.engines.vllm:VllmV1",
    "vllm-v2": "helix_conformance.engines.vllm:VllmV2",
    "vllm-ag-rs": "helix_conformance.engines.vllm:VllmAgRs",
    "vllm-a2a": "helix_conformance.engines.vllm:VllmA2a",
}


ENTRY_POINTS: Final = "helix_conformance.engines"
"""Group of entry points by which an installed package names its engine for `--engine NAME`."""
CHECKOUT: Final = "trtllm:"
"""What an engine that is a checkout of TensorRT-LLM begins with; its place follows."""
COMMAND: Final = "stdio:"
"""What an engine that is a command begins with; PROTOCOL.md says what it has to speak."""


def load_engine(spec: str) -> type[Engine]:
    """The engine class that a name, `module:Class` or `trtllm:PATH` stands for.

    A name is one of `BUILT_IN`, or an entry point of the group `helix_conformance.engines`.
    Raises EngineSpecError when there is none, or when it does not look like an engine.
    """
    if spec.startswith(COMMAND):
        raise EngineSpecError(f"{spec!r} is a command; it runs under the stdio driver.")
    try:
        found = _found(spec)
    except EngineSpecError:
        raise
    except (Exception, SystemExit) as error:  # whatever its module does when it is imported
        what = f"{type(error).__name__}: {error}".removesuffix(".")
        raise EngineSpecError(f"Engine {spec!r} cannot be loaded: {what}.") from error
    for name in ("profiles", "needs_processes", "start", "apply", "observe"):
        if not hasattr(found, name):
            raise EngineSpecError(f"Engine {spec!r} has no {name!r}; see the Engine protocol.")
    if found.needs_processes and not hasattr(found, "join"):
        raise EngineSpecError(f"Engine {spec!r} needs processes and has no 'join'.")
    problem = declaration_problem(found.profiles)
    if problem is not None:
        raise EngineSpecError(f"Engine {spec!r} {problem}")
    engine: type[Engine] = found
    return engine


def _found(spec: str) -> Any:
    """What a name, `module:Class` or `trtllm:PATH` leads to."""
    if spec.startswith(CHECKOUT):
        from helix_conformance.engines.trtllm import engine_of

        return engine_of(spec.removeprefix(CHECKOUT))
    module_name, _, class_name = BUILT_IN.get(spec, spec).partition(":")
    if class_name:
        return getattr(importlib.import_module(module_name), class_name)
    installed = {point.value: point for point in entry_points(group=ENTRY_POINTS, name=spec)}
    if len(installed) > 1:
        raise EngineSpecError(
            f"{spec!r} names several engines, {' and '.join(sorted(installed))}; give one of them."
        )
    for point in installed.values():
        return point.load()
    raise EngineSpecError(
        f"{spec!r} names no engine; give {', '.join(engine_names())}, module:Class or "
        "stdio:COMMAND."
    )


def engine_names() -> list[str]:
    """The names that stand for an engine: built in, and of installed packages."""
    return [*BUILT_IN, *sorted(entry_points(group=ENTRY_POINTS).names - BUILT_IN.keys())]


def engine_settings(engine: type[Engine]) -> dict[str, str]:
    """What an engine says about how it is set up, in its optional attribute `settings`."""
    return {str(name): str(value) for name, value in getattr(engine, "settings", {}).items()}


def declaration_problem(profiles: Any) -> str | None:
    """What is wrong with the profiles that an engine declares; None when nothing is."""
    try:
        declared = set(profiles)
    except TypeError:
        return f"declares {profiles!r}, which is no set of profiles."
    if not declared:
        return f"declares no profile; the profiles are {', '.join(PROFILES)}."
    unknown = sorted(map(str, declared - set(PROFILES)))
    if unknown:
        return (
            f"declares unknown profiles {', '.join(unknown)}; the profiles are "
            f"{', '.join(PROFILES)}."
        )
    steps = [profile for profile in LADDER if profile in declared]
    missing = [p for p in LADDER[: LADDER.index(steps[-1])] if p not in steps] if steps else []
    if missing:
        return f"declares {steps[-1]} without {', '.join(missing)}, which it includes."
    return None


class Answer(msgspec.Struct, frozen=True):
    """One rank's answer to one event, and its state afterwards when it was looked at."""

    outcome: Outcome
    view: RankView | None = None


class Watch(msgspec.Struct, frozen=True):
    """How often state is looked at: everything every `every` events and at the end.

    In between, with `touched`, the requests that the event names.
    """

    every: Annotated[int, msgspec.Meta(ge=1)] = 1
    touched: bool = True

    def whole(self, index: int) -> bool:
        """Whether everything is looked at after the event with this index."""
        return (index + 1) % self.every == 0

    def looks(self, index: int) -> bool:
        """Whether anything is looked at after the event with this index."""
        return self.touched or self.whole(index)
