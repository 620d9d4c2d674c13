"""pytest plugin: one test per layout, profile and invariant of SPEC.md, for an engine of yours.

`pytest --helix-engine=my_engine.adapter:Engine`, or in a conftest.py

    def pytest_configure(config):
        config.option.helix_engine = "my_engine.adapter:Engine"
        config.option.helix_layouts = ["pr9757"]

adds tests such as `helix-conformance::pr9757::placement::OWN-2`. The random traces of a layout are
played once, before its first test. Where they break an invariant they are played on without it,
so each broken invariant has a smallest trace of its own and the others are judged all the same.
What was not checked is skipped, with the reason; it never passes.

Without an engine the plugin does nothing: every import that costs time waits for one.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from helix_conformance.suite import Suite


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add the options, which `helix-conformance run` has under the same names.

    Parameters
    ----------
    parser
        The parser of pytest's command line.
    """
    group = parser.getgroup("helix", "conformance of an engine's sharded decode KV cache")
    add = group.addoption
    add("--helix-engine", metavar="ENGINE", help="module:Class of an engine: adds its tests.")
    for name, what, kind in (
        ("layout", "check this layout (default: all)", str),
        ("cp", "draw from this cp_size", int),
        ("profile", "check this profile and those it builds on (default: all declared)", str),
    ):
        add(
            *(f"--helix-{name}",), dest=f"helix_{name}s", action="append", type=kind,
            metavar=name.upper(), help=f"Helix: {what}; repeat for several.",
        )  # fmt: skip
    add("--helix-examples", type=int, metavar="N", help="Helix: random traces for each layout.")
    add("--helix-seed", type=int, default=0, metavar="N", help="Helix: seed of the traces.")
    add("--helix-driver", metavar="DRIVER", help="Helix: where the ranks live.")
    add("--helix-ranks", type=int, default=4, metavar="N", help="Helix: processes of a pool.")
    add("--helix-deadline", type=float, default=30.0, metavar="S", help="Helix: silence allowed.")
    add(
        "--helix-xfail",
        "--helix-known",
        dest="helix_known",
        type=Path,
        metavar="FILE",
        help="Helix: list of expected failures.",
    )
    add(
        "--helix-traces", type=Path, default=Path("helix-failures"), metavar="FOLDER",
        help="Helix: folder for failing traces.",
    )  # fmt: skip


@pytest.hookimpl(trylast=True)  # a conftest.py may name the engine in its own hook
def pytest_configure(config: pytest.Config) -> None:
    """Check what was asked and add the engine's tests, where an engine was named.

    Parameters
    ----------
    config
        The configuration of pytest, with its options read.

    Raises
    ------
    pytest.UsageError
        When an option stands for nothing, or the ledger cannot be read or leaves nothing to run.
    """
    if config.option.helix_engine is not None:
        from helix_conformance.session import SessionError
        from helix_conformance.suite import Suite

        try:
            suite = Suite(config.option)
        except SessionError as error:
            raise pytest.UsageError(str(error)) from error
        config.pluginmanager.register(_Tests(suite))


class _Tests:
    """The hooks of a session that has an engine."""

    def __init__(self, suite: Suite) -> None:
        self.suite = suite

    def pytest_report_header(self) -> list[str]:
        """The engine and every setting."""
        return list(self.suite.header())

    @pytest.hookimpl(wrapper=True)
    def pytest_make_collect_report(
        self, collector: pytest.Collector
    ) -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
        """Put the tests of the engine behind those of the repository."""
        report = yield
        if isinstance(collector, pytest.Session) and report.result is not None:
            name = "helix-conformance"
            group: Any = _Group.from_parent(collector, name=name, nodeid=name, suite=self.suite)
            report.result.append(group)
        return report

    def pytest_unconfigure(self) -> None:
        """End the ranks."""
        self.suite.close()


class _Group(pytest.Collector):
    """All tests of an engine: by layout, profile and invariant, and the entries of its ledger."""

    def __init__(self, *, suite: Suite, **more: Any) -> None:
        super().__init__(**more)
        self.suite = suite

    def collect(self) -> Iterator[pytest.Item]:
        """Each test under its names, such as `pr9757::placement::OWN-2`."""
        for layout in self.suite.layouts:
            for profile, names in self.suite.tests:
                for name in names:
                    where = (layout, profile, name)
                    demand = partial(self.suite.demand, *where)
                    test = _Test.from_parent(self, name="::".join(where), demand=demand)
                    keys = ("helix_layout", "helix_profile", "helix_invariant")
                    test.user_properties += zip(keys, where, strict=True)
                    yield test
        for index, entry in enumerate(self.suite.known.differences):
            name = f"expected failure {index + 1}: {entry.subject}"
            demand = partial(self.suite.demand_entry, index)
            yield _Test.from_parent(self, name=name, demand=demand)


class _Test(pytest.Item):
    """Whether an invariant held on a layout, or an entry of the ledger is still true."""

    def __init__(self, *, demand: Callable[[], None], **more: Any) -> None:
        super().__init__(**more)
        self.demand = demand

    def runtest(self) -> None:
        """Red where it was violated, skipped where it was not checked."""
        self.demand()

    def reportinfo(self) -> tuple[Path, None, str]:
        """What a report calls it."""
        return self.path, None, self.nodeid

    def repr_failure(self, excinfo: pytest.ExceptionInfo[BaseException], style: Any = None) -> Any:
        """The failure's own text; an error of the suite as ever."""
        if isinstance(excinfo.value, pytest.fail.Exception):
            return str(excinfo.value)
        return super().repr_failure(excinfo, style)
