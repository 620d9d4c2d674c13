"""What an engine author installs: the suite, without vendors' adapters, mutants and the planner."""

import ast
import re
import tomllib
from pathlib import Path

from helix_conformance.version import __version__

ROOT = Path(__file__).parents[2]
OF_THE_WHEEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"][
    "targets"
]["wheel"]["packages"]
APART = {
    "helix_adapters",
    "helix_mutants",
    "helix_planner",
    "helix_ring",
    "helix_flashinfer",
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


def test_all_packages_have_one_version():
    """The wheel, the packages beside it, what they ask for and the changelog name the same."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    others = {folder.parent / "pyproject.toml" for folder in own_packages().values()}
    others = [tomllib.loads(path.read_text())["project"] for path in others]
    assert {project["version"], __version__} == {one["version"] for one in others}
    major, minor, _ = __version__.split(".")
    asked = [need for one in others for need in one["dependencies"] if "helix-conf" in need]
    assert len(asked) == len(others)
    assert {need.partition(">=")[2] for need in asked} == {
        f"{major}.{minor},<{major}.{int(minor) + 1}"
    }
    assert f"\n## {__version__} (" in (ROOT / "CHANGELOG.md").read_text()


def test_every_change_has_a_file_of_a_known_kind():
    """What lies in `changes/` is a text that a release takes in."""
    files = [path for path in (ROOT / "changes").iterdir() if path.name != "README.md"]
    named = re.compile(r"\+[\w-]+\.(added|changed|fixed)\.md")
    assert [path.name for path in files if not named.fullmatch(path.name)] == []
    assert [path.name for path in files if not path.read_text().strip()] == []


def test_the_readme_of_an_index_has_no_dead_link():
    """Links to files of the repository are names; pictures, which would not load, are left out."""
    hooks = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["metadata"]
    text = (ROOT / "README.md").read_text()
    assert text.count("](") > 15
    for one in hooks["hooks"]["fancy-pypi-readme"]["substitutions"]:
        text = re.sub(one["pattern"], one["replacement"], text)
    assert re.findall(r"\]\((?!https?:).*?\)", text) == []
    assert "the tutorial (`conformance/IMPLEMENTING.md`)" in text


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
