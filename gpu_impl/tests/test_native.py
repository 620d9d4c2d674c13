"""The operation in C++ where it cannot be built: nothing is raised."""

import shutil
from pathlib import Path

import pytest

from helix_gpu.attention import native


@pytest.fixture
def anew():
    """What was found out before counts no more, and what is found out here does not stay."""
    for function in (native.available, native._library):
        function.cache_clear()
    yield
    for function in (native.available, native._library):
        function.cache_clear()


@pytest.fixture
def ninja(monkeypatch):
    """There is a ninja, as far as anybody asks."""
    found = shutil.which
    monkeypatch.setattr(native.shutil, "which", lambda name: found(name) or f"/there/{name}")


@pytest.mark.usefixtures("anew", "ninja")
def test_a_compiler_that_fails(tmp_path, monkeypatch):
    """A compiler that ends with an error is as good as none."""
    compiler = tmp_path / "failing"
    compiler.write_text("#!/bin/sh\nexit 1\n")
    compiler.chmod(0o755)
    monkeypatch.setenv("CXX", str(compiler))
    assert not native.available()


@pytest.mark.usefixtures("anew", "ninja")
def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    """So is a home in which nothing can be written."""
    (tmp_path / "file").touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(Path(tmp_path, "file", "below")))
    monkeypatch.setattr(native, "_processor", lambda: "of-this-test")
    assert not native.available()
