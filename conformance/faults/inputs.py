"""Everything that reads what somebody else wrote, with a valid example and ways to spoil it."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import msgspec

from helix_conformance.drivers import messages, wire
from helix_conformance.drivers.asking import AnswerError
from helix_conformance.known import Known, LedgerError
from helix_conformance.protocol import Answer
from helix_conformance.vectors.format import VectorError, load_vector
from helix_conformance.workloads import WorkloadError, read_workload
from helix_spec.configs import Config
from helix_spec.events import Accept, Admit, Decode, Fork, Outcome, RankView, Release, Skip
from helix_spec.layouts import LayoutError, parse_layout
from helix_spec.traces import Trace, TraceError, dump_trace, load_trace

SHIPPED: Final = Path(messages.__file__).parents[1] / "vectors" / "shipped"
_FOLDER: Final = tempfile.TemporaryDirectory(prefix="helix-inputs-")


@dataclass(frozen=True)
class Parser:
    """One reader of foreign bytes."""

    name: str
    read: Callable[[bytes], Any]
    """Parses, or raises one of `errors`."""
    errors: tuple[type[Exception], ...]
    valid: bytes
    names_the_file: bool = False
    """Whether its errors begin with the file."""


def _from_file(name: str, load: Callable[[Path], Any]) -> Callable[[bytes], Any]:
    path = Path(_FOLDER.name, name)

    def read(data: bytes) -> Any:
        path.write_bytes(data)
        return load(path)

    return read


_CONFIG: Final = Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=90)
_TRACE: Final = Trace(
    config=_CONFIG,
    events=[
        Admit(0, 5),
        Decode([0], [3], 1),
        Accept(0, 2),
        Fork(0, 1),
        Skip([1], [1]),
        Release(0),
    ],
)
_DONE: Final = wire.Done(
    [
        Answer(Outcome(None, [1], [5], [True], [4], [2])),
        Answer(Outcome(), RankView({0: 3}, {0: [1, 2]}, [], 7)),
    ]
)
_VECTOR: Final = min(SHIPPED.rglob("*.json"), key=lambda path: path.stat().st_size)
_KNOWN: Final = b"""[[difference]]
kind = "answers_wrongly"
invariant = "OWN-3"
layout = "vllm_dcp"
does = "Interleave is ignored."
link = "https://example.org/1"
"""

PARSERS: Final = [
    Parser(
        "trace", _from_file("trace.json", load_trace), (TraceError,), dump_trace(_TRACE), True
    ),
    Parser(
        "vector", _from_file(_VECTOR.name, load_vector), (VectorError,), _VECTOR.read_bytes(), True
    ),
    Parser(
        "workload-jsonl",
        _from_file("workload.jsonl", read_workload),
        (WorkloadError,),
        b'{"timestamp": 1, "input_length": 700, "output_length": 12, "hash_ids": [1, 2]}\n' * 2,
        True,
    ),
    Parser(
        "workload-csv",
        _from_file("workload.csv", read_workload),
        (WorkloadError,),
        b"TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15,4808,10\n2023-11-16,1,2",
        True,
    ),
    Parser("known", _from_file("known.toml", Known.read), (LedgerError,), _KNOWN, True),
    Parser(
        "layout",
        lambda data: parse_layout(data.decode(errors="replace")),
        (LayoutError,),
        b"custom/1:prompt=interleave(2),owner=position,pages=lazy,start=rotated,C=4,T=32",
    ),
    Parser(
        "frame-from-engine",
        wire.unpack_from_engine,
        (msgspec.MsgspecError, ValueError, RecursionError),  # what `EngineProcess.receive` takes
        wire.pack(_DONE),
    ),
    Parser(
        "line-from-engine",
        messages.answer_of,
        (AnswerError,),
        json.dumps(
            {"type": "outcome", "seq": 1, "past_len": [1], "position_ids": [5], "active": [True],
             "slots": [4], "visible": [2]}
        ).encode(),
    ),
]  # fmt: skip

HOSTILE: Final[list[bytes]] = [
    b"", b"\x00", b"\xff\xfe", b" \n", b"null", b"[]", b"{}", b'"', b"-", b"NaN", b"Infinity",
    str(2**63).encode(), str(-(2**63) - 1).encode(), str(2**64).encode(), b"1" * 5000,
    b"1e400", b"-1e400", b"0.1", b"1E0", b"true", b"-1", b"0", b'"\\ud800"', b"\xc3\x28",
    b"[" * 3000, b'{"a":' * 2000, b"[" * 500 + b"]" * 500, b"\\", b",", b":", b"=",
]  # fmt: skip
"""What is put in place of a part of a valid input."""


def bounded_but_large() -> list[tuple[str, bytes]]:
    """Parser and input: large ones that must be read, or refused, without a fuss."""
    head = dump_trace(Trace(config=_CONFIG, events=[])).rstrip().removesuffix(b"]\n}")
    line = b'{"event":"decode","ids":[0],"query_lens":[1]}'
    million = head.replace(b"\n", b" ") + b",".join([line] * 1_000_000) + b"]}"
    events = dump_trace(_TRACE)
    twice = events.replace(b'"note": ""', b'"note": "", "note": "again"')
    return [
        ("trace", million),
        ("trace", million[:-1]),
        ("trace", million.replace(b'"ids":[0]', b'"ids":[-1]', 1)),
        ("trace", million[:-2] + b',{"event":"decode","ids":[0],"query_lens":["x"]}]}'),
        ("trace", twice),
        ("trace", events.replace(b'"note": ""', b'"note": "' + b"x" * 10**7 + b'"')),
        ("trace", b"[" * 10**7),
        ("trace", events.replace(b"[9, 9]", b"[" * 10**6)),
        ("trace", events.replace(b'"max_len": 90', b'"max_len": 1' + b"0" * 10**6)),
        ("trace", events.replace(b"C=2", b"C=" + b"9" * 10**5)),
        ("workload-jsonl", b'{"input_length": 1, "output_length": 1}\n' * 10**5),
        ("workload-jsonl", b'{"hash_ids":' + b"[" * 10**6),
        ("workload-csv", b"ContextTokens,GeneratedTokens\n" + b"1," * 10**6),
        ("known", b"difference = " + b"[" * 10**5),
        ("known", b"a." * 10**4 + b"a = 1"),
        ("vector", b'{"steps":' * 10**5),
        ("layout", b"pr9757/" + b"1" * 10**5 + b":C=2,T=2"),
        ("line-from-engine", b'{"type":"view","seq":1,"local_len":' + b'{"0":' * 10**5),
        ("frame-from-engine", b"\xdd\x7f\xff\xff\xff" * 10**5),
    ]


def complaint(parser: Parser, data: bytes) -> str | None:
    """The error's text, None when it parsed. What is not one of its errors is raised."""
    try:
        parser.read(data)
    except parser.errors as error:
        return str(error)
    return None
