"""What the packages' tests of their docstrings share."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Final

_GIVEN: Final = ("self", "cls", "draw")
"""Parameters that no caller gives; Hypothesis gives `draw`."""


def module_files(package: ModuleType) -> dict[str, Path]:
    """Return the file of each module of a package, by the module's full name."""
    folder = Path(next(iter(package.__path__)))
    name = package.__name__
    return {
        ".".join((name, *file.relative_to(folder).with_suffix("").parts)): file
        for file in sorted(folder.rglob("*.py"))
    }


def with_examples(files: dict[str, Path]) -> list[str]:
    """Return the modules that have examples; `doctest.testmod` runs them."""
    return [name for name, file in files.items() if ">>>" in file.read_text()]


def undescribed(file: Path, fewest: int = 1) -> list[str]:
    """Return the parameters that are in no docstring of a module's public functions.

    Parameters
    ----------
    file
        The module.
    fewest
        Functions with fewer parameters beside self are left out: their summary may say all.

    Returns
    -------
    list of str
        Function and parameter, where neither the section of parameters nor the first line names it.
        A docstring that begins with "See `" leaves them to the function that it names.
    """
    missing = []
    for function, node in _public(ast.parse(file.read_text())):
        text = ast.get_docstring(node) or ""
        if text.startswith("See `"):
            continue
        first, _, rest = text.partition("\n")
        described = re.split(r"\n[A-Z]\w+\n-+\n", rest.partition("Parameters\n---")[2])[0]
        names = [one.arg for one in (*node.args.args, *node.args.kwonlyargs)]
        names = [name for name in names if name not in _GIVEN]
        missing += [
            f"{function}: {name}"
            for name in names
            if len(names) >= fewest and not re.search(rf"\b{name}\b", f"{first}\n{described}")
        ]
    return missing


def _public(node: ast.AST, prefix: str = "") -> Iterator[tuple[str, ast.FunctionDef]]:
    """Functions and methods that others may call.

    Kernels are launched by one that is; of an overload the last definition says all.
    """
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef) and not child.name.startswith("_"):
            yield from _public(child, f"{prefix}{child.name}.")
        if not isinstance(child, ast.FunctionDef):
            continue
        decorators = " ".join(map(ast.unparse, child.decorator_list))
        described = "triton.jit" not in decorators and "overload" not in decorators.split()
        if (child.name == "__call__" or not child.name.startswith("_")) and described:
            yield f"{prefix}{child.name}", child
