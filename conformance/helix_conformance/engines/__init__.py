"""How an engine is named on the command line, and how its class is found.

An engine is named by one of

- `NAME`: an entry point of the group `helix_conformance.engines`, whose object is an engine class;
- `NAME:ARGUMENT`: an entry point of the group `helix_conformance.engine_factories`, whose object
  makes an engine class of the argument, a text such as a path;
- `module:Class`, where no factory has the name before the colon;
- `stdio:COMMAND`, which the stdio driver runs.

The module `gpu` holds the engines that are made of `helix_gpu`.
"""

from __future__ import annotations

import importlib
import tomllib
from importlib.metadata import EntryPoint, entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from helix_conformance.foreign import bounded, nearest
from helix_spec.capabilities import Box, Freedoms, boxes_of, freedoms_of
from helix_spec.engine import Engine, declaration_problem


class EngineSpecError(ValueError):
    """A text that names no engine; the message says what would."""


ENGINES: Final = "helix_conformance.engines"
"""Group of entry points by which a package names its engine for `--engine NAME`."""
FACTORIES: Final = "helix_conformance.engine_factories"
"""Group of entry points by which a package makes engines for `--engine NAME:ARGUMENT`."""
COMMAND: Final = "stdio:"
"""What an engine that is a command begins with; PROTOCOL.md says what it has to speak."""
PROJECT: Final = Path(__file__).parents[3] / "pyproject.toml"
"""Where a checkout declares its entry points; an installed package has no such file."""


def load_engine(spec: str) -> type[Engine]:
    """Return the engine class that `NAME`, `NAME:ARGUMENT` or `module:Class` stands for.

    Parameters
    ----------
    spec : str
        An engine's name, as for `--engine`.

    Returns
    -------
    type[Engine]
        The class; what it declares has been looked at, and nothing of it has run.

    Raises
    ------
    EngineSpecError
        When there is none, when it cannot be loaded, or when it does not look like an engine.

    Examples
    --------
    >>> load_engine("reference").__name__
    'ReferenceEngine'
    >>> load_engine("helix_reference.engine:ReferenceEngine").__name__
    'ReferenceEngine'
    """
    if spec.startswith(COMMAND):
        raise EngineSpecError(f"{spec!r} is a command; it runs under the stdio driver.")
    try:
        found = _found(spec)
    except EngineSpecError:
        raise
    except (Exception, SystemExit) as error:  # whatever its module does when it is imported
        what = f"{type(error).__name__}: {error}".removesuffix(".")
        if isinstance(error, ModuleNotFoundError) and Path(f"{error.name}.py").exists():
            what += f"; {error.name}.py lies in this folder, which PYTHONPATH=. would add"
        raise EngineSpecError(f"Engine {spec!r} cannot be loaded: {what}.") from error
    for name in ("profiles", "needs_processes", "start", "apply", "observe"):
        if not hasattr(found, name):
            raise EngineSpecError(f"Engine {spec!r} has no {name!r}; see the Engine protocol.")
    if found.needs_processes and not hasattr(found, "join"):
        raise EngineSpecError(f"Engine {spec!r} needs processes and has no 'join'.")
    if found.needs_processes:
        require_torch(f"Engine {spec!r}")
    problem = declaration_problem(found.profiles)
    if problem is not None:
        raise EngineSpecError(f"Engine {spec!r} {problem}")
    engine: type[Engine] = found
    engine_declaration(engine)
    return engine


def require_torch(what: str) -> None:
    """Check that torch is installed.

    Parameters
    ----------
    what : str
        What needs it, as a sentence begins.

    Raises
    ------
    EngineSpecError
        When it is not; the sentence names the extra that brings it.
    """
    if find_spec("torch") is None:
        raise EngineSpecError(f"{what} needs torch: pip install 'helix-conformance[gpu]'.")


def needs_group(spec: str) -> str:
    """Return why an engine cannot run where its ranks share no process group.

    Parameters
    ----------
    spec : str
        Name of the engine.

    Examples
    --------
    >>> needs_group("gpu")
    'Engine gpu needs torch.distributed among its ranks; use --driver pool.'
    """
    return f"Engine {spec} needs torch.distributed among its ranks; use --driver pool."


def engine_names() -> list[str]:
    """Return the names that stand for an engine, in the order of the alphabet.

    Examples
    --------
    >>> "reference" in engine_names()
    True
    """
    factories = (f"{point.name}:ARGUMENT" for point in _points(FACTORIES))
    return sorted({*(point.name for point in _points(ENGINES)), *factories})


def engine_settings(engine: type[Engine]) -> dict[str, str]:
    """Return what an engine reports of how it is set up, in its optional attribute `settings`.

    Parameters
    ----------
    engine : type of Engine
        The class of the engine.

    Returns
    -------
    dict of str to str
        For reports; empty when there is no such attribute.

    Examples
    --------
    >>> engine_settings(load_engine("reference"))
    {}
    """
    told = getattr(engine, "settings", {}).items()
    return {bounded(str(name)): bounded(str(value)) for name, value in told}


def engine_declaration(engine: type[Engine]) -> tuple[tuple[Box, ...], Freedoms]:
    """Return where an engine works and in what it differs rightly, as its attributes say.

    Parameters
    ----------
    engine : type of Engine
        The class of the engine; `capabilities` and `freedoms` are optional.

    Returns
    -------
    capabilities : tuple of Box
        Of no limits when there is no such attribute.
    freedoms : Freedoms
        None taken when there is no such attribute.

    Raises
    ------
    EngineSpecError
        When an attribute is no declaration.

    Examples
    --------
    >>> boxes, freedoms = engine_declaration(load_engine("gpu"))
    >>> boxes[0].cp_size is None, freedoms.rewind_pages
    (True, 'returned')
    """
    try:
        boxes = boxes_of(getattr(engine, "capabilities", None))
        return boxes, freedoms_of(getattr(engine, "freedoms", None))
    except ValueError as error:
        raise EngineSpecError(f"Engine {engine.__qualname__} {error}") from error


def _found(spec: str) -> Any:
    name, _, argument = spec.partition(":")
    if argument:
        factory = _point(FACTORIES, name)
        if factory is not None:
            return factory.load()(argument)
        return getattr(importlib.import_module(name), argument)
    point = _point(ENGINES, spec)
    if point is not None:
        return point.load()
    names = engine_names()
    raise EngineSpecError(
        f"{spec!r} names no engine; give {', '.join(names)}, module:Class or stdio:COMMAND."
        f"{nearest(spec, names)}"
    )


def _point(group: str, name: str) -> EntryPoint | None:
    """Return the one entry point of this name, if there is one."""
    found = {point.value: point for point in _points(group) if point.name == name}
    if len(found) > 1:
        raise EngineSpecError(
            f"{name!r} names several engines, {' and '.join(sorted(found))}; give one of them."
        )
    return next(iter(found.values()), None)


def _points(group: str) -> list[EntryPoint]:
    """Return the entry points of a group: of this checkout, if it is one, and of what is installed.

    A checkout on PYTHONPATH has no metadata of its own; what it declares stands for them.
    """
    project = tomllib.loads(PROJECT.read_text())["project"] if PROJECT.exists() else {}
    declared = project.get("entry-points", {}).get(group, {})
    ours = [EntryPoint(name, value, group) for name, value in declared.items()]
    return [*ours, *entry_points(group=group)]


def takes_exchanges_done(engine: type[Engine]) -> bool:
    """Return whether an engine's counter of exchanges can start elsewhere than at 0.

    Parameters
    ----------
    engine : type of Engine
        The class of the ranks; it does when it has an attribute `exchanges_done`.
    """
    return hasattr(engine, "exchanges_done")


def made(engine: type[Engine], rank: int, exchanges_done: int = 0) -> Engine:
    """Return an object for a rank, which counts so many exchanges as done.

    Parameters
    ----------
    engine : type of Engine
        The class of the ranks.
    rank : int
        The global rank.
    exchanges_done : int
        Where its counter starts; with 0 it is left alone.
    """
    new = engine(rank)
    if exchanges_done:
        new.exchanges_done = exchanges_done  # type: ignore[attr-defined]
    return new
