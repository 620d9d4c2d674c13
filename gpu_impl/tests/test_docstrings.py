"""Docstrings: examples run, public things are described, and the maps name all modules."""

from __future__ import annotations

import ast
import doctest
import importlib

import pytest

import helix_gpu
from suite_testing.docstrings import module_files, undescribed, with_examples

FILES = module_files(helix_gpu)
PACKAGE = FILES["helix_gpu.__init__"].parent


@pytest.mark.parametrize("name", with_examples(FILES))
def test_examples_give_what_they_say(name: str) -> None:
    """Each module's examples, on the CPU."""
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", FILES)
def test_public_functions_name_their_parameters(name: str) -> None:
    """Each parameter is in the docstring's section of parameters, or in its first line."""
    assert undescribed(FILES[name]) == []


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("__init__")])
def test_a_package_names_its_modules(name: str) -> None:
    """In its docstring, as the package does for all modules."""
    text = ast.get_docstring(ast.parse(FILES[name].read_text())) or ""
    folder = FILES[name].parent
    found = folder.rglob("*.py") if folder == PACKAGE else folder.glob("*")
    modules = [
        file.stem if file.stem != "__init__" else file.parent.name
        for file in found
        if (file.suffix == ".py" and file != FILES[name]) or (file / "__init__.py").exists()
    ]
    assert [module for module in modules if f"`{module}`" not in text] == []


def test_the_readme_names_all_modules() -> None:
    """In its table."""
    table = (PACKAGE.parent / "README.md").read_text().partition("## Using it")[0]
    missing = [
        name
        for name in (name.removesuffix(".__init__").rpartition(".")[2] for name in FILES)
        if f"`{name}" not in table and f".{name}`" not in table
    ]
    assert missing == []
