"""Foreign input is parsed or refused in a sentence; it is never run, whatever it holds."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from suite_testing.inputs import HOSTILE, PARSERS, Parser, complaint

ROOT = Path(__file__).parents[2]
PACKAGES = [
    path
    for pattern in ("*/helix_*", "conformance/*/helix_*", "conformance/adapters/*/helix_*")
    for path in sorted(ROOT.glob(pattern))
]
IDS = [parser.name for parser in PARSERS]


def spoiled(valid: bytes) -> st.SearchStrategy[bytes]:
    """A valid input with some of its bytes cut, doubled, turned over or replaced by worse."""
    place = st.integers(0, len(valid))
    worse = st.sampled_from(HOSTILE) | st.binary(max_size=8)
    cut = place.map(lambda end: valid[:end])
    replaced = st.tuples(place, st.integers(0, 12), worse).map(
        lambda t: valid[: t[0]] + t[2] + valid[t[0] + t[1] :]
    )
    doubled = st.tuples(place, place).map(
        lambda t: valid[: max(t)] + valid[min(t) : max(t)] + valid[max(t) :]
    )
    return cut | replaced | doubled | st.binary(max_size=64) | st.sampled_from(HOSTILE)


@pytest.mark.parametrize("parser", PARSERS, ids=IDS)
def test_the_valid_example_parses(parser: Parser) -> None:
    """What is spoiled elsewhere is good to begin with."""
    assert complaint(parser, parser.valid) is None


@pytest.mark.parametrize("parser", PARSERS, ids=IDS)
def test_spoiled_input_is_parsed_or_refused(parser: Parser) -> None:
    """A parse or an error of the kind that is promised, which names the file where there is one."""

    @settings(max_examples=120, deadline=None, database=None)
    @given(spoiled(parser.valid))
    @example(b"")
    def check(data: bytes) -> None:
        said = complaint(parser, data)
        if said is not None and parser.names_the_file:
            assert "helix-inputs-" in said

    check()


FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "marshal", "shelve", "yaml"}
FORBIDDEN_CALLS = {"eval", "exec", "load_module", "__import__"}
PICKLING_OF_MPI = {
    *("send", "recv", "isend", "irecv", "bsend", "ssend", "sendrecv", "mprobe"),
    *("bcast", "gather", "scatter", "allgather", "alltoall", "reduce", "allreduce"),
}
EVALUATES = {
    "helix_spec/theorems/contracts.py": 2,
    "helix_trtllm/engines.py": 1,
    "helix_conformance/session.py": 1,
}
"""The proofs evaluate the contracts in our own docstrings; an adapter runs the code of the engine
that the user names, as every adapter does. `run --jobs` and its jobs, processes of the suite on one
pipe each, pickle what they tell one another: only an engine that the suite imports, and so has run
already, could write there."""


@pytest.mark.parametrize("package", PACKAGES, ids=lambda path: path.name)
def test_nothing_is_unpickled_or_evaluated(package: Path) -> None:
    """No module of ours imports a pickler, loads one by torch or numpy, or evaluates text.

    multiprocessing is not used for messages, since its `send` and `recv` pickle. So do
    torch.distributed's collectives of objects, and the calls of mpi4py in small letters.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(package.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            found.setdefault(str(path.relative_to(package.parent)), []).extend(_unsafe(node))
    unsafe = {name: calls for name, calls in found.items() if calls}
    assert {n: calls for n, calls in unsafe.items() if len(calls) != EVALUATES.get(n)} == {}


def _unsafe(node: ast.AST) -> list[str]:
    """What in this node could run what was read."""
    if isinstance(node, ast.Import):
        return [a.name for a in node.names if a.name.split(".")[0] in FORBIDDEN_MODULES]
    if isinstance(node, ast.ImportFrom):
        pickler = (node.module or "").split(".")[0] in FORBIDDEN_MODULES
        pipes = node.module == "multiprocessing.connection"
        return [f"from {node.module}"] * (pickler or pipes)
    if not isinstance(node, ast.Call):
        return []
    if isinstance(node.func, ast.Name):
        return [node.func.id] * (node.func.id in FORBIDDEN_CALLS)
    if not isinstance(node.func, ast.Attribute):
        return []
    name, owner = node.func.attr, ast.unparse(node.func.value)
    loads = name == "load" and owner in {"torch", "np", "numpy"}
    objects = "_object" in name and owner in {"dist", "torch.distributed"}
    pickles = name in PICKLING_OF_MPI and ("world" in owner or "comm" in owner.lower())
    allowed = any(word.arg == "allow_pickle" for word in node.keywords)
    return [f"{owner}.{name}"] * (loads or objects or pickles or allowed)


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from pickle import loads",
        "eval(text)",
        "exec(text)",
        "torch.load(path)",
        "np.load(path)",
        "dist.all_gather_object(a, b)",
        "_world().bcast(None, root=0)",
        "COMM_WORLD.allgather(name)",
        "np.frombuffer(x, allow_pickle=True)",
        "from multiprocessing.connection import Client",
    ],
)
def test_what_would_be_found(code: str) -> None:
    """The check sees each of these."""
    assert [unsafe for node in ast.walk(ast.parse(code)) for unsafe in _unsafe(node)]
