"""All theorems, and the list of those that there must be."""

from __future__ import annotations

import inspect
from importlib.resources import files
from types import ModuleType
from typing import Final

from helix_spec import placement
from helix_spec.theorems import (
    balance,
    callers,
    contracts,
    engines,
    euclid,
    lengths,
    merge,
    mutations,
    ownership,
    pages,
    windows,
)
from helix_spec.theorems.base import REGISTRY, Theorem, Wrong
from helix_spec.theorems.crosshair import contract_lines

MODULES: Final = (euclid, ownership, lengths, balance, pages, windows, merge, engines, contracts)
"""Where theorems are, in reading order."""


def manifest() -> list[str]:
    """Return the ids of the theorems that must be confirmed, in the order of the file."""
    text = files("helix_spec.theorems").joinpath("manifest.txt").read_text()
    return [line for line in text.splitlines() if line and not line.startswith("#")]


def theorems() -> dict[str, Theorem]:
    """Return all theorems by id, in the order of their modules."""
    homes = [module.__name__ for module in MODULES]
    by_module = sorted(REGISTRY.values(), key=lambda one: homes.index(one.claim.__module__))
    return {one.id: one for one in by_module}


def contracts_without_theorem() -> list[str]:
    """Return the functions with a contract in their docstring that no theorem is about."""
    stated = {one.contract_of for one in theorems().values()}
    return [
        name
        for module in (placement, callers)
        for name in _functions(module)
        if contract_lines(getattr(module, name.rpartition(".")[2]), "post") and name not in stated
    ]


def closed_forms() -> list[str]:
    """Return the public functions of `placement`, each of which some theorem must be about."""
    return [name for name in _functions(placement) if not name.startswith("placement._")]


def wrong_formulas() -> list[Wrong]:
    """Return the wrong formulas that stand in for right ones; some theorem must refute each."""
    modules = (mutations, merge, engines)
    return [w for module in modules for w in vars(module).values() if isinstance(w, Wrong)]


def _functions(module: ModuleType) -> list[str]:
    below = module.__name__.removeprefix("helix_spec.")
    return [
        f"{below}.{name}"
        for name, function in inspect.getmembers(module, inspect.isfunction)
        if function.__module__ == module.__name__
    ]
