"""Mutation testing of `helix_gpu`'s bookkeeping and merge: `make mutation`.

cosmic-ray says which small mistakes there are (another operator, a number off by one, a condition
negated, a loop that never runs); each is tried on its own, in a fork of this process that has
everything but `helix_gpu` loaded already, two at a time. First the suite plays stored-up random
traces, then the unit tests of the module run; a mistake that neither notices has survived. Traces
and tests that noticed others come first. What takes far more of a processor's time than without a
mistake is given up, and has been noticed: it loops for ever.

Prints each module's score and every survivor with its line. The exit status is 1 when fewer than
90 in 100 are killed, or when a survivor is not explained in `conformance/MUTATION.md`. A run that
was broken off goes on where it stopped: fates are kept in `.mutation/`, for the very sources,
tests and suite that they were found with.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import resource
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
from hashlib import sha256
from pathlib import Path
from random import Random
from typing import Any, Final

import click
import hypothesis
import msgspec
import pytest
import torch
from cosmic_ray import plugins
from cosmic_ray.ast import ast_nodes, get_ast
from cosmic_ray.mutating import mutate_code
from rich.console import Console
from rich.progress import track
from rich.table import Table

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines import load_engine
from helix_conformance.generate.choices import Seeded
from helix_conformance.judge.play import check_trace
from helix_conformance.session import layout_traces
from helix_reference.engine import ReferenceEngine
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "gpu_impl" / "helix_gpu"
EXPLAINED: Final = ROOT / "conformance" / "MUTATION.md"
WANTED: Final = 0.9
KEPT: Final = ROOT / ".mutation" / "fates.jsonl"
AT_ONCE: Final = 2
"""Mistakes that are tried at the same time."""
SLOWER, MORE_S = 5.0, 2.0
"""A trace or a test that takes so many times the processor time that it takes without a mistake,
and so many seconds more, loops for ever."""
ASLEEP_S: Final = 300.0
"""A mistake that is not through by then waits for what never comes."""
MORE_BYTES: Final = 2**32
"""Memory that a mistake may make us take; beyond, a MemoryError is raised, and seen."""

MODULES: Final[dict[str, tuple[str, ...]]] = {
    "bookkeeping.allocator": ("test_allocator.py", "test_bookkeeping.py"),
    "bookkeeping.block_tables": ("test_block_tables.py", "test_bookkeeping.py"),
    "bookkeeping.rank_book": ("test_bookkeeping.py",),
    "bookkeeping.dealing": ("test_dealing.py", "test_ledger.py", "test_bookkeeping.py"),
    "bookkeeping.ledger": ("test_ledger.py", "test_bookkeeping.py"),
    "attention.merge": ("test_merge.py",),
    "bookkeeping.sharing": ("test_sharing.py", "test_ledger.py"),
    "transfer": ("test_transfer.py", "test_dealing.py"),
}
"""What is mutated, with the unit tests that hold it."""
WITH_TENSORS: Final = ("bookkeeping.rank_book", "attention.merge")
"""Modules that the bookkeeping alone does not reach in full: the whole engine plays them too."""
OPERATORS: Final = re.compile(
    r"^core/(?!Variable|.*_(Is|IsNot|Pow|RShift|LShift|BitOr|BitAnd|BitXor)$)"
)
"""Without those that need arguments; without `is` for `==`, since small numbers are one object; and
without bits for sums, which no one confuses and any test notices."""


@dataclass(frozen=True)
class Mistake:
    """One small mistake in one module."""

    module: str
    operator: str
    line: int
    was: str
    becomes: str
    source: str
    """The whole module with it."""


def _path(module: str) -> Path:
    return PACKAGE.joinpath(*module.split(".")).with_suffix(".py")


def mistakes(module: str) -> Iterator[Mistake]:
    """Every mistake in a module that can change what it does; annotations are never run."""
    original = _path(module).read_text()
    tree = _without_annotations(original)
    seen = {tree}
    nodes = list(ast_nodes(get_ast(original)))
    for name in sorted(filter(OPERATORS.match, plugins.operator_names())):
        operator = plugins.get_operator(name)()
        for occurrence in range(sum(len(list(operator.mutation_positions(n))) for n in nodes)):
            mutated = mutate_code(original, operator, occurrence)
            with contextlib.suppress(SyntaxError):
                code = _without_annotations(mutated)
                if code not in seen:
                    seen.add(code)
                    yield _mistake(module, name, original, mutated)


def _mistake(module: str, operator: str, original: str, mutated: str) -> Mistake:
    lines = unified_diff(original.splitlines(), mutated.splitlines(), n=0, lineterm="")
    changed = [line for line in lines if not line.startswith(("---", "+++"))]
    place = re.match(r"@@ -(\d+)", changed[0])
    assert place is not None
    was = " ".join(line[1:].strip() for line in changed if line[0] == "-")
    becomes = " ".join(line[1:].strip() for line in changed if line[0] == "+")
    return Mistake(module, operator.partition("/")[2], int(place[1]), was, becomes, mutated)


def _without_annotations(source: str) -> str:
    """The module's syntax tree without what says types only."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.arg):
            node.annotation = None
        elif isinstance(node, ast.FunctionDef):
            node.returns = None
        elif isinstance(node, ast.AnnAssign):
            node.annotation = ast.Constant(None)
    return ast.dump(tree)


def stored_traces(engine: Any, names: Sequence[str], examples: int) -> list[tuple[Any, Trace]]:
    """Random traces of these layouts."""
    driver = LocalDriver(ReferenceEngine)
    deep = engine == "gpu"
    profiles = frozenset(ReferenceEngine.profiles)
    if not deep:
        profiles -= {"cache", "attention"}
    traces = list[tuple[Any, Trace]]()
    for name in names:
        draw = layout_traces(
            driver, name, profiles, cp_sizes=(2, 3, 4) if deep else (1, 2, 3, 4, 8)
        )
        traces += [(engine, draw(Seeded(f"mutation {name} {n}"))) for n in range(examples)]
    return traces


class Fate(msgspec.Struct, frozen=True):
    """What became of one mistake."""

    state: str
    """Digest of all that it was tried with."""
    mistake: str
    """Digest of the module with the mistake."""
    how: str | None
    """What noticed it: `suite`, `tests` or `time`; None when nothing did."""


class Unit(msgspec.Struct, frozen=True):
    """A trace or a test, and the seconds of processor time that it took."""

    name: str
    seconds: float


class Report(msgspec.Struct):
    """What a child says when it is through."""

    red: Unit | None = None
    units: list[Unit] = []


class Trials:
    """One module's mistakes, tried in children of this process."""

    def __init__(self, module: str, traces: Sequence[tuple[str, Trace]]) -> None:
        self.traces = {f"trace {number}": trace for number, trace in enumerate(traces)}
        self.tests = [ROOT / "gpu_impl" / "tests" / name for name in MODULES[module]]
        self.noticed: Counter[str] = Counter()
        """Mistakes that each trace and test was the first to notice."""
        self.seconds: dict[str, float] = {}
        """What each took without a mistake."""
        unchanged = _path(module).read_text()
        for _ in range(2):  # the first time tests compile and import what the next ones find
            ((_, red),) = self.of([Mistake(module, "none", 0, "", "", unchanged)])
            if red is not None:
                raise SystemExit(f"{module}: without any mistake the {red} is red already.")

    def of(self, mistakes: Iterable[Mistake]) -> Iterator[tuple[Mistake, str | None]]:
        """Each mistake, and what notices it: `suite`, `tests` or `time`; None when nothing does."""
        waiting, running = iter(mistakes), list[_Child]()
        while True:
            while len(running) < AT_ONCE and (mistake := next(waiting, None)) is not None:
                running.append(_Child(mistake, self))
            if not running:
                return
            for child in [child for child in running if child.is_over()]:
                running.remove(child)
                yield child.mistake, self._fate(child)
            time.sleep(0.005)

    def rank(self, name: str) -> tuple[int, float]:
        """By this the likeliest to notice come first, and of those alike the shortest."""
        return -self.noticed[name], self.seconds.get(name, 0.0)

    def limit(self, name: str) -> float:
        """Seconds of processor time that a trace or a test may take."""
        known = self.seconds.get(name)
        return ASLEEP_S if known is None else MORE_S + SLOWER * known

    def _fate(self, child: _Child) -> str | None:
        if child.looped:
            return "time"
        if child.report is None:
            return "suite"  # it died
        red = child.report.red
        if red is None:
            self.seconds.update({unit.name: unit.seconds for unit in child.report.units})
            return None
        self.noticed[red.name] += 1
        return "suite" if red.name in self.traces else "tests"


class _Child:
    """A fork of this process that tries one mistake."""

    def __init__(self, mistake: Mistake, trials: Trials) -> None:
        self.mistake = mistake
        self.report: Report | None = None
        self.looped = False
        self.ends = time.monotonic() + ASLEEP_S
        self.reading, writing = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self.reading)
                report = msgspec.json.encode(_tried(mistake, trials))
                while report:
                    report = report[os.write(writing, report) :]
            finally:
                os._exit(0)
        os.close(writing)
        os.set_blocking(self.reading, False)
        self.words = b""

    def is_over(self) -> bool:
        """Whether it has ended; then its report is there, if it made one."""
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.reading, 2**16):
                self.words += more
        if time.monotonic() > self.ends:
            os.kill(self.pid, signal.SIGKILL)
            self.looped = True
        pid, status = os.waitpid(self.pid, 0 if self.looped else os.WNOHANG)
        if pid == 0:
            return False
        with contextlib.suppress(BlockingIOError):
            while more := os.read(self.reading, 2**16):
                self.words += more
        os.close(self.reading)
        self.looped |= os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGPROF
        if self.words:
            self.report = msgspec.json.decode(self.words, type=Report)
        return True


def _tried(mistake: Mistake, trials: Trials) -> Report:
    """In the child: bind the mistake, and look whether anything is red."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    words = Path("/proc/self/statm").read_text().split()
    most = int(words[0]) * resource.getpagesize() + MORE_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (most, most))
    sys.meta_path.insert(0, _Binding(mistake))
    watched = _Watched(trials)
    for name in sorted(trials.traces, key=trials.rank):
        with watched.unit(name):
            red = _is_red(trials.traces[name])
        if red:
            return Report(watched.units[-1], watched.units)
    hypothesis.settings.register_profile(
        "mutation",
        deadline=None,  # a busy machine must not count as a kill
        derandomize=True,
        database=None,
        max_examples=30,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        report_multiple_bugs=False,
    )
    hypothesis.settings.load_profile("mutation")
    options = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--rootdir={ROOT}"]
    status = pytest.main([*options, *map(str, trials.tests)], plugins=[watched])
    if status != pytest.ExitCode.OK and watched.red is None:
        watched.red = Unit("what is outside all tests", 0.0)  # a module that cannot be imported
    return Report(watched.red, watched.units)


class _Watched:
    """Traces and tests, each with a limit to its processor time: beyond it the process ends.

    For pytest it is a plugin, that lets the likeliest tests come first.
    """

    def __init__(self, trials: Trials) -> None:
        self.trials = trials
        self.units = list[Unit]()
        self.red: Unit | None = None

    @contextlib.contextmanager
    def unit(self, name: str) -> Iterator[None]:
        """While it runs, SIGPROF waits."""
        began = time.process_time()
        signal.setitimer(signal.ITIMER_PROF, self.trials.limit(name))
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_PROF, 0)
            self.units.append(Unit(name, round(time.process_time() - began, 3)))

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        """Sort the tests."""
        items.sort(key=lambda item: self.trials.rank(item.nodeid))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        """One test, with its fixtures."""
        with self.unit(item.nodeid):
            return (yield)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        """Remember what is red."""
        if report.failed:
            self.red = Unit(report.nodeid, 0.0)


def state_of(module: str) -> str:
    """Digest of all that decides what becomes of a mistake in this module, but for the mistake."""
    digest = sha256()
    packages = ("spec/helix_spec", "reference/helix_reference", "conformance/helix_conformance")
    files = [file for package in packages for file in sorted((ROOT / package).rglob("*.py"))]
    files += [file for file in sorted(PACKAGE.rglob("*.py")) if file != _path(module)]
    tests = ROOT / "gpu_impl" / "tests"
    files += [tests / name for name in (*MODULES[module], "conftest.py")]
    files += sorted((ROOT / "gpu_impl" / "gpu_testing").glob("*.py"))
    for file in (*files, ROOT / "conftest.py", Path(__file__)):
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


def kept_fates() -> list[Fate]:
    """The fates of earlier runs; a line that was cut off is none."""
    fates = []
    if KEPT.exists():
        for line in KEPT.read_bytes().splitlines():
            with contextlib.suppress(msgspec.MsgspecError):
                fates.append(msgspec.json.decode(line, type=Fate))
    return fates


def fates_of(
    module: str, found: Sequence[Mistake], traces: Sequence[tuple[str, Trace]]
) -> Iterator[tuple[Mistake, str | None]]:
    """Each mistake, and what notices it; what is known already is not tried again."""
    state, digests = state_of(module), {m: sha256(m.source.encode()).hexdigest() for m in found}
    known = {fate.mistake: fate.how for fate in kept_fates() if fate.state == state}
    for mistake in found:
        if digests[mistake] in known:
            yield mistake, known[digests[mistake]]
    rest = [mistake for mistake in found if digests[mistake] not in known]
    if not rest:
        return
    KEPT.parent.mkdir(exist_ok=True)
    with KEPT.open("ab", buffering=0) as kept:
        for mistake, how in Trials(module, traces).of(rest):
            kept.write(msgspec.json.encode(Fate(state, digests[mistake], how)) + b"\n")
            yield mistake, how


def _is_red(played: tuple[str, Trace]) -> bool:
    spec, trace = played
    try:
        engine = load_engine(spec)
        driver = ThreadDriver(engine) if spec == "gpu" else LocalDriver(engine)
        try:
            return check_trace(driver, trace, driver.profiles) is not None
        finally:
            driver.close()
    except Exception:
        return True


class _Binding(importlib.abc.MetaPathFinder):
    """Finds the mutated module under its name."""

    def __init__(self, mistake: Mistake) -> None:
        self.name = f"helix_gpu.{mistake.module}"
        self.path = _path(mistake.module)
        self.source = mistake.source

    def find_spec(self, name: str, path: Any, target: Any = None) -> Any:
        if name != self.name:
            return None
        code = compile(self.source, str(self.path), "exec", dont_inherit=True)

        class Loader(importlib.machinery.SourceFileLoader):
            def get_code(self, fullname: str) -> Any:
                return code

        loader = Loader(name, str(self.path))
        return importlib.util.spec_from_file_location(name, self.path, loader=loader)


def _line(mistake: Mistake, what: str) -> str:
    where = f"{mistake.module}:{mistake.line} {mistake.operator} ({what})"
    return f"{where}\n  - {mistake.was}\n  + {mistake.becomes}"


def explained() -> set[tuple[str, str]]:
    """Module and mutated line of every survivor that the text explains."""
    if not EXPLAINED.exists():
        return set()
    return set(re.findall(r"^- `([\w.]+)`: `(.+)`$", EXPLAINED.read_text(), re.M))


@click.command()
@click.option("--module", "modules", multiple=True, type=click.Choice(list(MODULES)))
@click.option("--sample", type=click.IntRange(1), help="Only so many of each module's, at random.")
@click.option("--json", "json_path", type=click.Path(dir_okay=False, path_type=Path))
def main(modules: Sequence[str], sample: int | None, json_path: Path | None) -> None:
    """Try every mistake in these modules, or in all."""
    torch.set_num_threads(1)
    console = Console()
    modules = modules or list(MODULES)
    ledger_traces = stored_traces("gpu-ledger", LAYOUT_NAMES, 20)
    whole_traces = stored_traces("gpu", ["pr9757", "vllm_dcp", "custom"], 6)
    unnamed = [name for name in sys.modules if name.startswith("helix_gpu")]
    assert not unnamed, f"{unnamed} would not be mutated: they are loaded already."

    table = Table("module", "mistakes", "killed", "by the suite", "by tests", "by time", "score")
    survivors, total, killed = list[Mistake](), 0, 0
    for module in modules:
        traces = ledger_traces + (whole_traces if module in WITH_TENSORS else [])
        if module == "attention.merge":
            traces = whole_traces
        if module == "transfer":
            traces = []
        found = list(mistakes(module))
        if sample is not None:
            found = Random(0).sample(found, min(sample, len(found)))
        by = []
        fates = fates_of(module, found, traces)
        for mistake, how in track(fates, module, total=len(found), console=console):
            by.append(how)
            if how is None:
                survivors.append(mistake)
                console.print(_line(mistake, "survives"), markup=False, highlight=False)
        dead = sum(how is not None for how in by)
        total, killed = total + len(found), killed + dead
        counts = [str(by.count(how)) for how in ("suite", "tests", "time")]
        table.add_row(module, str(len(found)), str(dead), *counts, f"{dead / len(found):.1%}")
    console.print(table)
    known = explained()
    strange = [s for s in survivors if (s.module, s.becomes) not in known]
    for survivor in survivors:
        print(_line(survivor, "NOT EXPLAINED" if survivor in strange else "explained"))
    print(
        f"mutation score {killed}/{total} = {killed / total:.1%}; {len(survivors)} survivors, "
        f"{len(strange)} of them not explained in {EXPLAINED.relative_to(ROOT)}"
    )
    if json_path is not None:
        rows = [{"module": s.module, "line": s.line, "was": s.was, "becomes": s.becomes}
                for s in survivors]  # fmt: skip
        json_path.write_bytes(msgspec.json.format(msgspec.json.encode(
            {"total": total, "killed": killed, "survivors": rows})))  # fmt: skip
    sys.exit(0 if killed >= WANTED * total and not strange else 1)


if __name__ == "__main__":
    main()
