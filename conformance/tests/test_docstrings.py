"""Docstrings of the suite: examples run and parameters are described."""

import doctest
import importlib

import pytest

import helix_conformance
from suite_testing.docstrings import module_files, undescribed, with_examples

COMMANDS = "helix_conformance.cli"
"""Here docstrings are help texts; options describe themselves."""
FILES = module_files(helix_conformance)


@pytest.mark.parametrize("name", with_examples(FILES))
def test_examples_give_what_they_say(name):
    """Each module's examples."""
    failed, tried = doctest.testmod(importlib.import_module(name))
    assert tried > 0
    assert failed == 0


@pytest.mark.parametrize("name", [name for name in FILES if name != COMMANDS])
def test_public_functions_name_their_parameters(name):
    """One parameter may be left to the summary."""
    assert undescribed(FILES[name], fewest=2) == []
