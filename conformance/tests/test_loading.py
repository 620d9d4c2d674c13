"""Engines by name: of entry points, of a factory, of a module; and those that are none."""

import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from helix_conformance import engines as protocol
from helix_conformance.engines import EngineSpecError, engine_names, load_engine
from helix_reference.engine import ReferenceEngine


class _Point(SimpleNamespace):
    def load(self):
        """What the entry point leads to."""
        return self.target


@pytest.fixture
def installed(monkeypatch):
    """Pretend that packages with these engines, pairs of name and class, are all that is installed.

    `of` is the group of their entry points.
    """

    def install(*engines, of="helix_conformance.engines"):
        points = [
            _Point(name=name, value=f"package{number}:{name}", target=target)
            for number, (name, target) in enumerate(engines)
        ]
        monkeypatch.setattr(
            protocol, "entry_points", lambda *, group: points if group == of else []
        )

    return install


def engine(**changes):
    """A class like the reference's engine, but for these attributes; None takes one away."""
    names = ("profiles", "needs_processes", "start", "apply", "observe")
    kept = {name: getattr(ReferenceEngine, name) for name in names} | changes
    return SimpleNamespace(**{name: value for name, value in kept.items() if value is not None})


def test_engine_of_an_installed_package(installed):
    """An entry point's name stands for its engine, and never hides one of this project."""
    theirs = engine()
    installed(("theirs", theirs), ("gpu", engine()))
    assert load_engine("theirs") is theirs
    assert load_engine("reference") is ReferenceEngine
    assert set(engine_names()) >= {"theirs", "reference"}
    with pytest.raises(EngineSpecError, match="'gpu' names several engines"):
        load_engine("gpu")


def test_engines_of_a_checkout_that_is_not_installed(installed, monkeypatch):
    """A checkout names its own engines by its pyproject.toml; without one nothing does."""
    installed()
    assert load_engine("reference") is ReferenceEngine
    monkeypatch.setattr(protocol, "PROJECT", Path("no such file"))
    assert engine_names() == []
    with pytest.raises(EngineSpecError, match="'reference' names no engine"):
        load_engine("reference")
    assert load_engine("helix_reference.engine:ReferenceEngine") is ReferenceEngine


def test_engine_that_a_factory_makes(installed):
    """NAME:ARGUMENT is what a factory makes of the argument, in which there may be colons."""
    made = {"a:b": engine()}
    installed(("theirs", made.__getitem__), of="helix_conformance.engine_factories")
    assert load_engine("theirs:a:b") is made["a:b"]
    assert "theirs:ARGUMENT" in engine_names()
    with pytest.raises(EngineSpecError, match="'theirs:c' cannot be loaded: KeyError: 'c'"):
        load_engine("theirs:c")
    for spec in ("theirs", "theirs:"):
        with pytest.raises(EngineSpecError, match=f"'{spec}' names no engine"):
            load_engine(spec)


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


def test_an_engine_beside_the_current_folder_is_pointed_to(tmp_path, monkeypatch):
    """The folder is not on the path; one that is nowhere gets no such hint."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_engine.py").touch()
    with pytest.raises(EngineSpecError, match=r"my_engine\.py lies in this folder"):
        load_engine("my_engine:Engine")
    with pytest.raises(EngineSpecError, match=r"No module named 'nobody'\.$"):
        load_engine("nobody:Engine")
