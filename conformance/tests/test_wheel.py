"""What an engine author installs: the suite, without vendors' adapters, mutants and the planner."""

import ast
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[2]
OF_THE_WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
    "targets"
]["wheel"]["packages"]
APART = {
    "helix_adapters",
    "helix_mutants",
    "helix_planner",
    "helix_ring",
    "helix_sglang",
    "helix_trtllm",
    "helix_vllm",
}


def own_packages():
    """The packages of this repository that have a pyproject.toml of their own, by name."""
    found = {}
    for path in (ROOT / "conformance").rglob("pyproject.toml"):
        wheel = tomllib.loads(path.read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
        found |= {name: path.parent / name for name in wheel["packages"]}
    return found


def imported(path):
    """The top packages that a file imports, at any depth."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.partition(".")[0]


def test_what_is_in_the_wheel():
    """The wheel has the four packages of an engine author, and no file of the others."""
    names = {Path(folder).name for folder in OF_THE_WHEEL}
    assert names == {"helix_spec", "helix_reference", "helix_gpu", "helix_conformance"}
    packages = own_packages()
    assert set(packages) == APART
    shipped = [path for folder in OF_THE_WHEEL for path in (ROOT / folder).rglob("*")]
    assert [
        path
        for path in shipped
        if APART & set(path.parts) or any(path.is_relative_to(own) for own in packages.values())
    ] == []


def test_what_the_wheel_imports():
    """No file of the wheel imports a package that is not in it, by a statement or by name."""
    files = [path for folder in OF_THE_WHEEL for path in (ROOT / folder).rglob("*.py")]
    assert len(files) > 100
    for path in files:
        assert APART & set(imported(path)) == set(), path
        assert [name for name in APART if name in path.read_text()] == [], path


def test_make_installs_every_package():
    """`make` installs each package that is not in the wheel beside the project."""
    (line,) = [
        line for line in (ROOT / "Makefile").read_text().splitlines() if "PACKAGES :=" in line
    ]
    words = line.partition("conformance/,")[2].rstrip(")").split()
    folders = {package.parent for package in own_packages().values()}
    assert {ROOT / "conformance" / word for word in words} == folders
