"""Docstrings of the reference: examples run, parameters are described, modules are named."""

import doctest
import importlib

import pytest

import helix_reference
from suite_testing.docstrings import module_files, undescribed, with_examples

FILES = module_files(helix_reference)


@pytest.mark.parametrize("name", with_examples(FILES))
def test_examples_give_what_they_say(name):
    """Each module's examples."""
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", FILES)
def test_public_functions_name_their_parameters(name):
    """One parameter may be left to the summary."""
    assert undescribed(FILES[name], fewest=2) == []


def test_the_readme_and_the_package_name_all_modules():
    """In the README's table and in the package's docstring."""
    package = FILES["helix_reference.__init__"].parent
    readme, text = (package.parent / "README.md").read_text(), helix_reference.__doc__
    names = [file.stem for file in FILES.values() if file.stem != "__init__"]
    assert [name for name in names if f"| `{name}` |" not in readme] == []
    assert [name for name in names if f"- `{name}`:" not in text] == []
