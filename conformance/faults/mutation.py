"""Mutation testing of `helix_gpu`'s bookkeeping and merge: `make mutation`.

cosmic-ray says which small mistakes there are (another operator, a number off by one, a condition
negated, a loop that never runs); each is tried on its own, in a fork of this process that has
everything but `helix_gpu` loaded already. First the suite plays stored-up random traces, then the
unit tests of the module run; a mistake that neither notices has survived.

Prints each module's score and every survivor with its line. The exit status is 1 when fewer than
90 in 100 are killed, or when a survivor is not explained in `conformance/MUTATION.md`.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from difflib import unified_diff
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

from helix_conformance.drivers.local import LocalDriver
from helix_conformance.drivers.threads import ThreadDriver
from helix_conformance.protocol import load_engine
from helix_conformance.runs import Tally, check_trace, layout_traces, random_traces
from helix_conformance.strategies import LAYOUT_NAMES
from helix_reference.engine import ReferenceEngine
from helix_spec.traces import Trace

ROOT: Final = Path(__file__).parents[2]
PACKAGE: Final = ROOT / "gpu_impl" / "helix_gpu"
EXPLAINED: Final = ROOT / "conformance" / "MUTATION.md"
WANTED: Final = 0.9
LIMIT_S: Final = 120.0
"""A mutant that runs longer loops for ever: killed. An unmutated run takes a tenth of it."""

MODULES: Final[dict[str, tuple[str, ...]]] = {
    "allocator": ("test_allocator.py", "test_bookkeeping.py"),
    "block_tables": ("test_block_tables.py", "test_bookkeeping.py"),
    "bookkeeping": ("test_bookkeeping.py",),
    "dealing": ("test_dealing.py", "test_ledger.py", "test_bookkeeping.py"),
    "ledger": ("test_ledger.py", "test_bookkeeping.py"),
    "merge": ("test_merge.py",),
    "sharing": ("test_sharing.py", "test_ledger.py"),
    "transfer": ("test_transfer.py", "test_dealing.py"),
}
"""What is mutated, with the unit tests that hold it."""
WITH_TENSORS: Final = ("bookkeeping", "merge")
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


def mistakes(module: str) -> Iterator[Mistake]:
    """Every mistake in a module that can change what it does; annotations are never run."""
    original = (PACKAGE / f"{module}.py").read_text()
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
    """Random traces of these layouts, drawn once by playing them on the reference."""
    kept: list[Trace] = []

    class Keeper(LocalDriver):
        def play(self, config: Any, profiles: Any, events: Any, watch: Any) -> Iterator[Any]:
            kept.append(Trace(config=config, events=list(events)))
            return super().play(config, profiles, events, watch)

    driver = Keeper(ReferenceEngine)
    deep = engine == "gpu"
    profiles = frozenset(ReferenceEngine.profiles)
    if not deep:
        profiles -= {"cache", "attention"}
    for name in names:
        strategy = layout_traces(
            driver, name, profiles, cp_sizes=(2, 3, 4) if deep else (1, 2, 3, 4, 8)
        )
        shallow = frozenset({"placement"})  # to draw is all that is asked
        failure = random_traces(
            driver, strategy, shallow, examples=examples, seed=f"mutation {name}", tally=Tally()
        )
        assert failure is None, failure
    return [(engine, trace) for trace in kept]


def killed_by(mistake: Mistake, traces: Sequence[tuple[str, Trace]]) -> str | None:
    """What notices the mistake: `suite`, `tests` or `time`; None when nothing does."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            os.write(writing, _noticed(mistake, traces).encode())
        finally:
            os._exit(0)
    os.close(writing)
    ends = time.monotonic() + LIMIT_S
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if time.monotonic() > ends:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            os.close(reading)
            return "time"
        time.sleep(0.005)
    with os.fdopen(reading, "rb") as pipe:
        word = pipe.read().decode()
    return {"": "suite", "nothing": None}.get(word, word)  # silence: the child itself died


def _noticed(mistake: Mistake, traces: Sequence[tuple[str, Trace]]) -> str:
    """In the child: bind the mistake, and look whether anything is red."""
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    os.dup2(quiet, 2)
    sys.meta_path.insert(0, _Binding(mistake))
    if any(map(_is_red, traces)):
        return "suite"
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
    tests = [ROOT / "gpu_impl" / "tests" / name for name in MODULES[mistake.module]]
    words = ["-x", "-q", "-p", "no:cacheprovider", "-W", "ignore", f"--rootdir={ROOT}"]
    status = pytest.main([*words, *map(str, tests)])
    return "nothing" if status == pytest.ExitCode.OK else "tests"


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
        self.path = PACKAGE / f"{mistake.module}.py"
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
    where = f"{mistake.module}.py:{mistake.line} {mistake.operator} ({what})"
    return f"{where}\n  - {mistake.was}\n  + {mistake.becomes}"


def explained() -> set[tuple[str, str]]:
    """Module and mutated line of every survivor that the text explains."""
    if not EXPLAINED.exists():
        return set()
    return set(re.findall(r"^- `(\w+)`: `(.+)`$", EXPLAINED.read_text(), re.M))


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
        if module == "merge":
            traces = whole_traces
        if module == "transfer":
            traces = []
        unchanged = (PACKAGE / f"{module}.py").read_text()
        control = Mistake(module, "none", 0, "", "", unchanged)
        red = killed_by(control, traces)
        if red is not None:
            raise SystemExit(f"{module}: without any mistake the {red} is red already.")
        found = list(mistakes(module))
        if sample is not None:
            found = Random(0).sample(found, min(sample, len(found)))
        by = []
        for mistake in track(found, module, console=console):
            by.append(killed_by(mistake, traces))
            if by[-1] is None:
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
