"""Engines by name: built in, of installed packages, of a module; and those that are none."""

import sys
from types import SimpleNamespace

import pytest

from helix_conformance import engines as protocol
from helix_conformance.engines import EngineSpecError, engine_names, load_engine
from helix_reference.engine import ReferenceEngine


class _Point(SimpleNamespace):
    def load(self):
        """What the entry point leads to."""
        return self.target


class _Points(list):
    names = property(lambda self: {point.name for point in self})


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages with these engines are installed: pairs of name and class."""

    def install(*engines):
        points = [_Point(name=n, value=f"package{i}:{n}", target=e) for i, (n, e) in engines]

        def entry_points(*, group, name=None):
            assert "helix_conformance.engines" == group
            return _Points(point for point in points if name in (None, point.name))

        monkeypatch.setattr(protocol, "entry_points", entry_points)

    return lambda *engines: install(*enumerate(engines))


def engine(**changes):
    """A class like the reference's engine, but for these attributes; None takes one away."""
    names = ("profiles", "needs_processes", "start", "apply", "observe")
    kept = {name: getattr(ReferenceEngine, name) for name in names} | changes
    return SimpleNamespace(**{name: value for name, value in kept.items() if value is not None})


def test_engine_of_an_installed_package(installed):
    """An entry point's name stands for its engine, and never hides one that is built in."""
    theirs = engine()
    installed(("theirs", theirs), ("reference", engine()))
    assert theirs is load_engine("theirs")
    assert ReferenceEngine is load_engine("reference")
    assert "theirs" == engine_names()[-1]


def test_engine_of_a_package_on_the_path(tmp_path, monkeypatch):
    """The metadata that an installer writes are what is read."""
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[helix_conformance.engines]\ntheirs = theirs_adapter:Engine\n"
    )
    (tmp_path / "theirs_adapter.py").write_text(
        "from helix_reference.engine import ReferenceEngine as Engine\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    assert "theirs" in engine_names()
    assert ReferenceEngine is load_engine("theirs")


def test_one_name_of_two_packages(installed):
    """A name that two packages give to different engines is refused, and both are named."""
    installed(("theirs", engine()), ("theirs", engine()))
    with pytest.raises(EngineSpecError, match="package0:theirs and package1:theirs; give one"):
        load_engine("theirs")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"observe": None}, "has no 'observe'"),
        ({"needs_processes": None}, "has no 'needs_processes'"),
        ({"needs_processes": True}, "needs processes and has no 'join'"),
        ({"profiles": ()}, "declares no profile"),
        ({"profiles": 7}, "declares 7, which is no set"),
        ({"profiles": {"placement", "speed"}}, "declares unknown profiles speed"),
        ({"profiles": {"placement", "pages"}}, "declares pages without lengths"),
    ],
)
def test_what_does_not_look_like_an_engine(installed, changes, sentence):
    """A class that lacks a call, or declares what cannot be, is refused with a sentence."""
    installed(("theirs", engine(**changes)))
    with pytest.raises(EngineSpecError, match=sentence):
        load_engine("theirs")


@pytest.mark.parametrize(
    ("words", "what"),
    [
        ("raise ValueError('no GPU')", "ValueError: no GPU"),
        ("raise SystemExit(0)", "SystemExit: 0"),
        ("import x1", "ModuleNotFoundError: No module"),
        ("Engines = 1", "AttributeError: module"),
    ],
)
def test_module_that_fails_when_it_is_imported(tmp_path, monkeypatch, words, what):
    """Whatever a module does instead of being imported is reported in a sentence."""
    monkeypatch.delitem(sys.modules, "failing_engine", raising=False)
    (tmp_path / "failing_engine.py").write_text(words)
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(EngineSpecError, match=f"cannot be loaded: {what}"):
        load_engine("failing_engine:Engine")
