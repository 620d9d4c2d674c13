"""Everything that reads what somebody else wrote, with a valid example and ways to spoil it."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from helix_conformance.drive import messages, serve
from helix_conformance.drive.asking import MalformedAnswer, words
from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.process import Due, Lines, ProcessDriver, Rank
from helix_conformance.expect.vectors import SHIPPED, VectorError, load_vector
from helix_conformance.generate.workload import WorkloadError, read_workload
from helix_conformance.judge.failure import Violation
from helix_conformance.judge.play import check_trace
from helix_conformance.judge.xfail import Known, LedgerError
from helix_conformance.report.certificate import badge
from helix_conformance.report.html import run_page
from helix_conformance.report.junit import junit
from helix_conformance.report.stream import (
    FailureLine,
    Record,
    Row,
    Settings,
    StreamError,
    Summary,
    encode_line,
    read_stream,
)
from helix_spec.config import Config, ModelShape
from helix_spec.engine import PROFILES, Outcome, RankView
from helix_spec.events import Accept, Admit, Decode, Event, Fork, Release, Skip
from helix_spec.layouts import LayoutError, parse_layout
from helix_spec.trace import Trace, TraceError, dump_trace, load_trace

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
_PARTS: Final = messages.LayoutParts(**_CONFIG.layout.parts())
_START: Final = messages.Start(3, 1, 2, _CONFIG, _PARTS, ["placement", "lengths"])


class Obliging:
    """An engine that takes everything: what is tried is what hands it the requests."""

    profiles = frozenset({"placement"})
    needs_processes = False

    def __init__(self, rank: int) -> None: ...

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready."""
        return Outcome()

    def apply(self, event: Event) -> Outcome:
        """Accepted."""
        return Outcome()

    def observe(self, ids: list[int] | None = None) -> RankView:
        """Empty."""
        return RankView(dict.fromkeys(ids or (), 0))


_SERVER: Final = serve.Server(f"{__name__}:Obliging")


class JudgedError(Exception):
    """What the suite says of answers that it could read, and that are not right."""


_ONE_RANK: Final = Trace(
    config=Config(
        layout="pr9757/1:C=1,T=2",
        pages=[4],
        max_len=90,
        model=ModelShape(q_heads=2, kv_heads=1, head_dim=2),
    ),
    events=[Admit(0, 1), Decode([0], [2], 1), Accept(0, 1), Fork(0, 1), Decode([1], [1])],
)


class _Scripted(Rank):
    """A rank that gives each answer when it is asked, from a list of lines."""

    def __init__(self, answers: Iterable[bytes], driver: ProcessDriver) -> None:
        super().__init__(0, Lines(*os.pipe()), driver.loop)
        self.script = iter(answers)

    def ask(self, lines: bytes, due: Iterable[Due]) -> None:
        """Take as many lines as there are answers due."""
        super().ask(b"", due)
        try:
            for line in [next(self.script, b"") for _ in self.due]:
                self.take(line)
        except MalformedAnswer as error:
            self.failed = self.failure(words(error))

    def kill(self) -> None:
        """End it."""
        self.lines.close()


class _Served(_Scripted):
    """A rank that the reference answers for."""

    def __init__(self, driver: ProcessDriver) -> None:
        super().__init__((), driver)
        self.server, self.told = serve.Server("reference"), list[bytes]()

    def ask(self, lines: bytes, due: Iterable[Due]) -> None:
        """Have it answered."""
        new = [serve.reply(self.server, line) for line in lines.splitlines()]
        self.told += new
        self.script = iter(new)
        super().ask(lines, due)


class _One(ProcessDriver):
    """A driver of one rank that is no process, and that does not start again."""

    def start_ranks(self, world: int) -> list[Rank]:
        """It is there, or it has been ended."""
        if not self.ranks:
            raise EngineFailure(0, None, "has been ended")
        return []


def _failing(driver: ProcessDriver, rank: Rank) -> str | None:
    """What is wrong with a rank's answers to a trace."""
    driver.ranks, driver.profiles = [rank], frozenset(PROFILES)
    failure = check_trace(driver, _ONE_RANK, frozenset(PROFILES) - {"overlap"})
    driver.kill()
    return failure and (failure.engine_failure or str(failure.violations))


def _judged(answers: bytes) -> None:
    """Lines of answers, judged. Raises JudgedError."""
    driver = _One("nobody", 0.1)
    wrong = _failing(driver, _Scripted(answers.split(b"\n"), driver))
    if wrong is not None:
        raise JudgedError(wrong)


def _right_answers() -> bytes:
    driver = _One("reference", 0.1)
    rank = _Served(driver)
    assert _failing(driver, rank) is None
    return b"".join(rank.told)


_VECTOR: Final = min(SHIPPED.rglob("*.json"), key=lambda path: path.stat().st_size)
_KNOWN: Final = b"""[[difference]]
kind = "answers_wrongly"
invariant = "OWN-3"
layout = "vllm_dcp"
does = "Interleave is ignored."
link = "https://example.org/1"
"""


def _stream(trace: Trace) -> bytes:
    """A run that failed on this trace."""
    row = {"layout": "pr9757", "engine": "mine", "driver": "local", "declared": ["placement"]}
    settings = Settings(
        command="run", engine="mine", suite_version="1", started="now", python="3", machine="m"
    )
    failure = FailureLine(
        **row,
        event=0,
        violations=[Violation("OWN-1", "rank 0 owns it", 1, 0, 0)],
        trace=trace,
        trace_file="t.json",
    )
    counts = {"traces": 1, "events": 1, "verdict": "fail"}
    lines = [
        settings,
        Row(**row, cp_sizes=[2], profiles=["placement"], seconds=1.0, **counts),
        failure,
        Summary(
            engine="mine",
            layouts=["pr9757"],
            profiles_checked=["placement"],
            profiles_not_checked=[],
            events_per_s=None,
            **counts,
        ),
    ]
    return b"".join(map(encode_line, lines))


def _shown(record: Record) -> None:
    """Make every view of a stream."""
    assert run_page(record)
    assert junit(record)
    assert badge(record)


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
        "stream",
        _from_file("run.jsonl", lambda path: _shown(read_stream([path]))),
        (StreamError,),
        _stream(_TRACE),
        True,
    ),
    Parser(
        "layout",
        lambda data: parse_layout(data.decode(errors="replace")),
        (LayoutError,),
        b"custom/1:prompt=interleave(2),owner=position,pages=lazy,start=rotated,C=4,T=32",
    ),
    Parser(
        "line-to-supervisor",
        messages.control_of,
        (messages.RequestError,),
        messages.line_of(messages.Where(4)),
    ),
    Parser(
        "line-from-supervisor",
        messages.relayed_of,
        (MalformedAnswer,),
        messages.line_of(messages.Ended("died with signal SIGKILL", "died")),
    ),
    Parser("answers-judged", _judged, (JudgedError,), _right_answers()),
    Parser(
        "line-to-engine",
        lambda line: serve.reply(_SERVER, line),
        (messages.RequestError,),
        messages.line_of(_START),
    ),
    Parser(
        "event-to-engine",
        lambda line: serve.reply(_SERVER, line),
        (messages.RequestError,),
        messages.line_of(messages.Apply(4, Decode([0, 3], [1, 2], 1))),
    ),
    Parser(
        "line-from-engine",
        messages.answer_of,
        (MalformedAnswer,),
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
        ("stream", _stream(_TRACE).replace(b"C=2,T=2", b"C=999999999,T=2")),
        ("stream", _stream(_TRACE).replace(b'"prompt_len":5', b'"prompt_len":16777216')),
        ("stream", _stream(_TRACE)[:-2] * 10**4),
        ("known", b"difference = " + b"[" * 10**5),
        ("known", b"a." * 10**4 + b"a = 1"),
        ("vector", b'{"steps":' * 10**5),
        ("layout", b"pr9757/" + b"1" * 10**5 + b":C=2,T=2"),
        ("line-from-engine", b'{"type":"view","seq":1,"local_len":' + b'{"0":' * 10**5),
        ("line-from-supervisor", b'{"type":"stuck","seq":' * 10**5),
        ("line-to-supervisor", messages.line_of(messages.Where(4)) + b"\xc1" * 10**7),
        ("line-to-engine", messages.line_of(_START)[:-3] + b"[" * 10**6),
        ("line-to-engine", b'{"type":"observe","seq":1,"ids":[' + b"7," * 10**6 + b"7]}"),
        ("event-to-engine", b'{"type":"apply","seq":' + b"9" * 10**6 + b"}"),
        ("answers-judged", messages.line_of(messages.Outcome(1)) * 10**5),
    ]


def complaint(parser: Parser, data: bytes) -> str | None:
    """The error's text, None when it parsed. What is not one of its errors is raised."""
    try:
        parser.read(data)
    except parser.errors as error:
        return str(error)
    return None
