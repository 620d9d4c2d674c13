"""How an engine is named on the command line, and how its class is found."""

from __future__ import annotations

import importlib
from importlib.metadata import entry_points
from typing import Any, Final

from helix_spec.engine import Engine, declaration_problem


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
