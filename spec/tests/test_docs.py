"""The documentation of the package is true: examples run, module maps name every module."""

import doctest
import importlib
import pkgutil
import re
from pathlib import Path
from types import ModuleType

import pytest

import helix_spec
from helix_spec import theorems

MODULES = [found.name for found in pkgutil.walk_packages(helix_spec.__path__, "helix_spec.")]
README = Path(__file__).parents[1] / "README.md"


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    """Each example of a docstring gives what it shows."""
    if ".theorems" in name:
        pytest.importorskip("z3")
    assert doctest.testmod(importlib.import_module(name)).failed == 0


@pytest.mark.parametrize("package", [helix_spec, theorems])
def test_module_maps_name_every_module(package: ModuleType) -> None:
    """The package's own docstring and the README list all of its modules."""
    modules = [found.name for found in pkgutil.iter_modules(package.__path__)]
    assert [name for name in modules if f"`{name}`" not in str(package.__doc__)] == []
    listed = set(re.findall(r"`(?:helix_spec/)?(\w+)(?:\.py|/)`", README.read_text()))
    assert set(modules) - listed == set()
