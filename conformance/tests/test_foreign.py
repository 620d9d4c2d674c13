"""Foreign text at every way out: nothing that it says does more than be read."""

import doctest
import html
import io
import json
import re
import subprocess
import sys
import unicodedata
from xml.etree import ElementTree

import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from rich.console import Console

from helix_conformance import foreign, prove
from helix_conformance.api import check
from helix_conformance.cli import main
from helix_conformance.drive.asking import words
from helix_conformance.drive.driver import EngineFailure
from helix_conformance.foreign import MAX_SHOWN, bounded, shell_command, shown, shown_json
from helix_conformance.judge.coverage import SITUATIONS
from helix_conformance.judge.failure import Violation
from helix_conformance.report import stream
from helix_conformance.report.certificate import badge
from helix_conformance.report.command import BadInput
from helix_conformance.report.html import run_page
from helix_conformance.report.junit import junit
from helix_conformance.report.stream import (
    CoverageLine,
    FailureLine,
    Kill,
    KnownDifference,
    MutantKill,
    MutationRun,
    ProofReport,
    Proofs,
    Record,
    Row,
    Settings,
    Summary,
    TheoremResult,
    encode_line,
)
from helix_conformance.report.text import (
    failure_text,
    print_coverage,
    print_lines,
    print_table,
    progress_bar,
    replay_text,
    verdict_text,
)
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config, decode_layout
from helix_spec.events import Admit, Decode
from helix_spec.trace import Trace

TRACE = Trace(
    config=Config(layout="pr9757/1:C=2,T=1", pages=[9, 9], max_len=50),
    events=[Admit(0, 1), Decode([0], [1])],
)
ALL = [chr(code) for code in range(sys.maxunicode + 1)]
KINDS = "".join({(unicodedata.category(c), unicodedata.bidirectional(c)): c for c in ALL}.values())
"""A character of each kind that Unicode tells apart."""
MARKUP = "[/x] [bold red] :smile: {{ 7 * 7 }} {task} </code><b>&amp;]]> %s `id` $(id) 'x\" \\"
ATTACKS = [
    MARKUP,
    KINDS,
    "\x1b[31m\x1b]8;;https://x.example\x07link\x1b]8;;\x07\x9b2J",
    "before\r\nPASS: all is well\x85PASS\u2028PASS\u2029PASS",
    "\u202egnp.exe\u202c \u2067\u2068\u2069\u200f\u061c \u05d0\u05d1 1 \u0627 2",
    "\ud800 \udc80 \ufffe \uffff \x00 \x7f",
]


def safe(text):
    """Whether a text holds lines of printable characters, with isolates in pairs and no more."""
    outside = re.sub("\u2068[^\u2068\u2069]*\u2069", "", text)
    inside = "".join(re.findall("\u2068([^\u2068\u2069]*)\u2069", text))
    calm = all(unicodedata.bidirectional(c) not in ("R", "AL", "AN") for c in outside)
    return calm and all(c.isprintable() or c == "\n" for c in outside + inside)


def stream_of(text):
    """A run, proofs and mutants in which every text that is free is this one."""
    said = {"engine": text, "layout": text, "driver": text}
    line = FailureLine(
        **said,
        event=1,
        violations=[Violation("LEN-2", text, [text], {text: text}, 1)],
        engine_failure=None,
        trace=Trace(note=text, config=TRACE.config, events=TRACE.events),
        trace_file=text,
        declared=[text],
    )
    died = {"event": None, "violations": [], "engine_failure": text}
    known = KnownDifference(kind=text, does=text, link=text, status=text, layout=text)
    counts = dict.fromkeys(SITUATIONS, 0)
    row = Row(
        **said,
        cp_sizes=[2],
        profiles=["lengths", text],
        declared=[text],
        settings={text: text},
        identifiers=[text],
        traces=1,
        events=1,
        seconds=1.0,
        verdict="fail",
        known=[text],
    )
    theorem = TheoremResult(
        id=text, proves=[text], statement=text, verdict=text, kills=[Kill(text, {text: text})]
    )
    return [
        Settings(
            command=text,
            engine=text,
            suite_version=text,
            started=text,
            python=text,
            machine=text,
            options={text: text},
            restrictions=[text],
        ),
        row,
        line,
        FailureLine(**{name: getattr(line, name) for name in line.__struct_fields__} | died),
        CoverageLine(
            engine=text,
            driver=text,
            counts=counts,
            missed=["empty rank"],
            impossible={"copy on write": text},
            sizes={text: {text: 1}},
        ),
        Summary(
            engine=text,
            verdict="fail",
            layouts=[text],
            profiles_checked=[text],
            profiles_not_checked=[text],
            traces=1,
            events=1,
            events_per_s=None,
            known_differences=[known],
            missed=[text],
        ),
        Proofs(suite_version=text, report=ProofReport([theorem], "fail", [text], 1.0)),
        MutationRun(
            suite_version=text,
            tier=text,
            seed=0,
            score=text,
            mutants=[MutantKill(text, text, False, [text], 1, 1, 1.0)],
            controls={text: [text]},
        ),
    ]


def terminal(lines):
    """What the commands print of these lines."""
    console = Console(file=io.StringIO(), width=10_000)  # wide: no cell is broken in two
    _, row, failure, died, coverage, summary, proofs, _ = lines
    print_table(console, [row])
    print_coverage(console, [coverage], failed=False)
    for one in (failure, died):
        print_lines(console, failure_text(one))
        print_lines(console, replay_text(one.trace_file, one.engine, one.driver))
    print_lines(console, [verdict_text(summary)])
    prove._print(proofs.report, console)
    bar = progress_bar(console)
    bar.add_task(failure.layout, total=1)
    console.print(bar.get_renderable())
    return console.file.getvalue()


def views(text):
    """Each way out, and what comes out there for this text."""
    lines = stream_of(text)
    record = Record(lines)
    tree = ElementTree.fromstring(junit(record))
    in_junit = [part for node in tree.iter() for part in (node.text or "", *node.attrib.values())]
    yield "terminal", terminal(lines)
    yield "page", run_page(record)
    yield "junit", "\n".join(in_junit)
    yield "badge", shown_json(json.dumps(badge(record)).encode()).decode()
    yield "stream", b"".join(map(encode_line, lines)).decode().replace("\n", " ")
    yield "refusal", BadInput(text).format_message()


def test_every_character_of_unicode():
    """No character that is shown controls anything; of no kind is more done a second time."""
    chunks = ["a".join(ALL[at : at + 4096]) for at in range(0, len(ALL), 4096)]
    once = [shown(text) for text in chunks]
    assert [text for text in once if not safe(text)] == []
    assert shown(shown(KINDS)) == shown(KINDS)


def unsafe_ways_out(text):
    """The ways out at which this text does something."""
    found = []
    for name, said in views(text):
        # JSON is data: what runs from right to left stays as it is there.
        calm = re.sub("[^\x00-\x7f]", "", said) if name == "stream" else said
        plain = re.sub("[\u2068\u2069]", "", said)
        if not safe(calm) or any(not c.isprintable() and c != "\n" for c in plain):
            found.append(name)
    return found


@pytest.mark.parametrize("text", ATTACKS, ids=range(len(ATTACKS)))
def test_attacks_at_every_way_out(text):
    """Control characters, overrides, markup and half characters are shown, and do nothing."""
    assert unsafe_ways_out(text) == []


@settings(max_examples=25, phases=[Phase.generate])
@given(st.text(st.characters(codec=None), max_size=40))
def test_any_text_at_every_way_out(text):
    """The same of texts that nobody thought of."""
    assert unsafe_ways_out(text) == []


def test_the_check_finds_what_is_let_through(monkeypatch):
    """Where `shown` shows a text as it is, every way out that uses it is found unsafe."""
    for module in ("prove", "report.text", "report.command", "report.html"):
        monkeypatch.setattr(f"helix_conformance.{module}.shown", lambda text: text)
    assert set(unsafe_ways_out("\u202e")) == {"terminal", "page", "refusal"}


def test_markup_of_the_terminal_is_text():
    """Nothing in a text is taken for a tag, a picture or a field."""
    assert MARKUP in terminal(stream_of(MARKUP))


def test_a_stream_gives_back_what_was_written():
    """JSON loses nothing but halves of characters, which no UTF-8 has."""
    text = "".join(c for c in KINDS if unicodedata.category(c) != "Cs")
    reader = msgspec.json.Decoder(stream.Line, dec_hook=decode_layout)
    lines = stream_of(text)
    assert [reader.decode(encode_line(line)) for line in lines] == lines


def test_a_command_is_quoted_for_a_shell():
    """A shell reads the words that were meant, and none of them does anything on the way."""
    words = [*ATTACKS[:4], ATTACKS[4], "\udcff\udc80", "", "-x", "a b"]
    words = [word.replace("\x00", "").encode(errors="replace").decode() for word in words]
    command = shell_command(words)
    assert command.isascii() and command.isprintable()
    done = subprocess.run(["bash", "-c", f"printf '%s\\0' {command}"], capture_output=True)
    assert done.stdout.decode().split("\0")[:-1] == words


def test_the_page_and_the_terminal_show_the_same_command():
    """The command that plays a failing trace again is quoted on both."""
    failing = stream_of("my trace's $(id).json")
    command = shell_command(["helix-conformance", "replay", "my trace's $(id).json"])
    assert command in terminal(failing)
    assert html.escape(command) in run_page(Record(failing)).replace("&#34;", "&quot;").replace(
        "&#39;", "&#x27;"
    )


def test_an_engine_with_markup_in_its_name_passes(tmp_path, monkeypatch):
    """A name is no tag that is not closed, and none that vanishes."""
    monkeypatch.chdir(tmp_path)
    serving = f"exec {sys.executable} -m helix_conformance.drive.serve reference"
    engine = f"stdio:sh -c '{serving}' '[/x] [bold red]'"
    words = ["run", "--engine", engine, "--layout", "pr9757", "--cp", "1", "--examples", "1"]
    result = CliRunner().invoke(main, [*words, "--coverage"])
    assert result.exit_code == 0, result.output
    assert "[/x]" in result.output and "red]" in result.output


class Loud(ReferenceEngine):
    """An engine that raises with 50 million characters."""

    def apply(self, event):
        raise RuntimeError("\x1b[2J" + "x" * 50_000_000)


def test_a_long_message_is_cut_where_it_comes_from():
    """What is kept of it is bounded, in memory and at every way out, and says so."""
    report = check(Loud, layouts=["pr9757"], cp=[1], examples=1)
    [failure] = report.failures
    assert len(failure.engine_failure) < 2 * MAX_SHOWN
    assert "more characters" in failure.text
    assert safe(failure.text)
    assert len(report.to_json()) < 10 * MAX_SHOWN


def test_bounds():
    """A text that was cut is not cut again."""
    assert bounded("x" * 100, 100) == "x" * 100
    assert bounded(bounded("x" * 10**6)) == bounded("x" * 10**6)
    assert len(words(RuntimeError("x" * 10**6))) < MAX_SHOWN + 100
    assert len(EngineFailure(0, None, "x" * 10**6).what) < MAX_SHOWN + 50


def test_examples_in_docstrings_run():
    """What the documentation shows is what happens."""
    assert doctest.testmod(foreign) == (0, 7)
