"""Docstrings: examples run, public things are described, and the maps name all modules."""

from __future__ import annotations

import ast
import doctest
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import helix_gpu

PACKAGE = Path(next(iter(helix_gpu.__path__)))
FILES = {
    ".".join(file.relative_to(PACKAGE.parent).with_suffix("").parts): file
    for file in sorted(PACKAGE.rglob("*.py"))
}
EXAMPLES = [name for name, file in FILES.items() if ">>>" in file.read_text()]


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_give_what_they_say(name: str) -> None:
    """Each module's examples, on the CPU."""
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


def public(node: ast.AST, prefix: str) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods that others may call; kernels are launched by one that is."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from public(child, f"{prefix}.{child.name}")
        if not isinstance(child, ast.FunctionDef):
            continue
        kernel = any("triton.jit" in ast.unparse(one) for one in child.decorator_list)
        if (child.name == "__call__" or not child.name.startswith("_")) and not kernel:
            yield f"{prefix}.{child.name}", child


@pytest.mark.parametrize("name", FILES)
def test_public_functions_name_their_parameters(name: str) -> None:
    """Each parameter is in the docstring's section of parameters, or in its first line."""
    missing = []
    for function, node in public(ast.parse(FILES[name].read_text()), name):
        text = ast.get_docstring(node) or ""
        first, _, rest = text.partition("\n")
        described = re.split(r"\n[A-Z]\w+\n-+\n", rest.partition("Parameters\n---")[2])[0]
        names = [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]
        missing += [
            f"{function}: {one}"
            for one in names
            if one not in ("self", "cls")
            and not re.search(rf"\b{one}\b", described)
            and not re.search(rf"\b{one}\b", first)
        ]
    assert missing == []


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
