"""Engines of any language: the example in C, the messages and their schemas, and strays."""

import json
import re
import subprocess
import sys
import time
from pathlib import Path

import jsonschema
import msgspec
import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.drive import messages, process
from helix_conformance.drive.asking import MalformedAnswer
from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.process import StdioDriver
from helix_conformance.engines import EngineSpecError
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_trace
from helix_conformance.session import layout_traces, random_traces
from helix_spec.config import Config, decode_layout
from helix_spec.engine import PROFILES
from helix_spec.events import FEATURES, Admit, Decode, Merge, Reason, Release
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace, Watch
from suite_testing.marks import of_profiles

HERE = Path(__file__).parent
PROTOCOL = Path(messages.__file__).parents[1] / "PROTOCOL.md"
BOOKKEEPING = frozenset({"placement", "lengths", "pages"})
TRACE = Trace(
    config=Config(layout="pr9757/1:C=2,T=2", pages=[5, 5], max_len=50),
    events=[Admit(4, 3), Decode([4], [1]), Release(4)],
)


def compiled(folder, *options):
    """Build the C engine as its first lines say, with every warning an error."""
    program = folder / "helix_engine"
    source = HERE.parent / "examples" / "c" / "helix_engine.c"
    warnings = ["-std=c11", "-Wall", "-Wextra", "-Wpedantic", "-Werror"]
    subprocess.run(["cc", "-O2", *warnings, *options, "-o", program, source], check=True)
    return program


@pytest.fixture(scope="session")
def c_engine(tmp_path_factory):
    """The example engine, compiled."""
    return compiled(tmp_path_factory.mktemp("c"))


@pytest.fixture
def opened():
    """Open stdio drivers; they are closed afterwards."""
    drivers = []

    def open_one(command, **options):
        drivers.append(StdioDriver(f"stdio:{command}", **options))
        return drivers[-1]

    yield open_one
    for driver in drivers:
        driver.close()


@pytest.fixture
def astray(c_engine, opened):
    """A driver whose rank 1 goes astray at the first decode."""

    def open_one(how, deadline_s=20.0):
        command = f"{sys.executable} -m suite_testing.stray {c_engine} '{how}'"
        return opened(command, deadline_s=deadline_s)

    return open_one


@pytest.mark.holds(*of_profiles(BOOKKEEPING))
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_c_engine_passes(opened, c_engine, layout):
    """The example in C keeps every bookkeeping invariant on random traces of each layout."""
    driver, tally = opened(c_engine), Tally()
    assert driver.profiles == BOOKKEEPING
    draw = layout_traces(driver, layout, BOOKKEEPING, cp_sizes=(1, 2, 3, 4, 8))
    failure = random_traces(driver, draw, BOOKKEEPING, examples=25, seed=11, tally=tally)
    assert failure is None
    assert 25 <= tally.traces < tally.events


def test_c_engine_on_the_command_line(c_engine, tmp_path):
    """A run of the C engine says what was checked, what was not, and how the engine is set up."""
    words = ["run", "--engine", f"stdio:{c_engine}", "--layout", "pr9757", "--cp", "2"]
    stream = tmp_path / "run.jsonl"
    result = CliRunner().invoke(main, [*words, "--examples", "5", "--json", str(stream)])
    assert result.exit_code == 0, result.output
    lines = [json.loads(line) for line in stream.read_text().splitlines()]
    assert lines[1]["settings"] == {"engine": "helix_engine.c", "version": "1", "language": "C"}
    found = lines[-1]
    assert found["profiles_checked"] == ["placement", "lengths", "pages"]
    assert found["profiles_not_checked"][:7] == ["cache", "attention", *FEATURES]


@pytest.mark.holds("OWN-3")
def test_defect_in_the_c_engine_is_caught(tmp_path, monkeypatch):
    """The C engine that counts its steps from 1 is caught by a trace of one decode."""
    monkeypatch.chdir(tmp_path)
    program = compiled(tmp_path, "-DPLANTED_DEFECT")
    words = ["run", "--engine", f"stdio:{program}", "--layout", "pr9757", "--cp", "2"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1, result.output
    assert "OWN-3" in result.output
    (trace,) = (tmp_path / "helix-failures").iterdir()
    events = [event["event"] for event in json.loads(trace.read_text())["events"]]
    assert events == ["admit", "decode"]


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize(
    ("how", "what"),
    [
        ("wrong seq", "gave a malformed answer: it answered request 1, and was asked "),
        ("wrong type", "gave a malformed answer: Object contains unknown field `past_len`"),
        ("no such type", "gave a malformed answer: Invalid value 'oops'"),
        (
            "no slots",
            "gave a malformed answer: its answer lacks slots, which profile placement asks for",
        ),
        ("extra", "gave a malformed answer: Object contains unknown field `slot`"),
        ("text", "gave a malformed answer: Expected `int`, got `str` - at `$.past_len[0]`"),
        ("huge", "gave a malformed answer: Expected `int` <= 9007199254740992 - at `$.slots[0]`"),
        ("reason", "gave a malformed answer: Invalid enum value 'no room' - at `$.reason`"),
        ("failed", "lost its way; its stderr ends: 'going astray: failed'"),
        ("chatter", "in the line that begins 'loading weights...'"),
        ("deep", "gave a malformed answer: "),
        ("not utf-8", "gave a malformed answer: "),
        ("twice", "gave a malformed answer: it answered request "),
        ("exit", "exited with status 0; its stderr ends: 'going astray: exit'"),
        ("crash", "died with signal SIGSEGV; its stderr ends: 'going astray: crash'"),
        ("odd signal", "died with signal 40; its stderr ends: 'going astray: odd signal'"),
        ("flood stdout", "gave a malformed answer: its line is longer than 1048576 bytes"),
    ],
)
def test_stray_is_named(astray, monkeypatch, how, what):
    """Whatever a rank says or does instead of answering is told, with rank, event and trace."""
    monkeypatch.setattr(process, "MAX_LINE_BYTES", 2**20)
    driver = astray(how)
    failure = check_trace(driver, TRACE, BOOKKEEPING)
    assert failure is not None
    assert failure.engine_failure.startswith("Rank 1 ")
    assert what in failure.engine_failure
    assert failure.engine_failure.endswith("(at event 1).")
    assert TRACE.events[:2] == failure.trace.events
    assert driver.survives_failure


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize("how", ["hang", "half", "flood stderr", "with a child"])
def test_stray_that_does_not_answer(astray, how):
    """A rank that hangs, in whichever way, is named when the deadline is over, and then ended."""
    driver = astray(how, deadline_s=1.0)
    failure = check_trace(driver, TRACE, BOOKKEEPING)
    assert "Rank 1 timed out: no answer within 1 s; its stderr ends: '" in (failure.engine_failure)
    assert "(at event 1)." in failure.engine_failure
    assert not driver.survives_failure
    assert driver.ranks == []


@pytest.mark.holds("LIVE-1")
def test_stray_that_hangs_up(astray):
    """A rank that closes its stdout and lives on is told from one that died."""
    failure = check_trace(astray("closed"), TRACE, BOOKKEEPING)
    assert "Rank 1 closed its stdout without an answer" in failure.engine_failure


def test_ranks_after_a_failure_are_new(astray):
    """After a failure the next trace has fresh processes, and fails at the same place."""
    driver = astray("crash")
    first = check_trace(driver, TRACE, BOOKKEEPING)
    assert first == check_trace(driver, TRACE, BOOKKEEPING)


def test_a_trace_that_is_left_early(opened, c_engine):
    """What was sent ahead of it is answered and not looked at; the processes stay."""
    driver = opened(c_engine)
    events = [Admit(4, 3), *[Decode([4], [1])] * 40, Release(4)]
    for _ in range(3):
        played = driver.play(TRACE.config, BOOKKEEPING, events, Watch())
        assert [None, events[0]] == [event for event, _ in (next(played), next(played))]
        played.close()
        children = list(driver.ranks)
        assert check_trace(driver, TRACE, BOOKKEEPING) is None
        assert children == driver.ranks


@pytest.mark.parametrize("how", ["hang", "crash", "failed"])
def test_a_failure_that_nobody_waits_for(astray, monkeypatch, how):
    """A rank that fails after the trace was left is replaced when it must be, and not blamed."""
    monkeypatch.setattr(process, "DRAIN_S", 0.2)
    driver = astray(how)
    for _ in range(2):
        played = driver.play(TRACE.config, BOOKKEEPING, TRACE.events, Watch())
        assert [event for event, _ in (next(played), next(played))] == [None, TRACE.events[0]]
        played.close()
        rest = msgspec.structs.replace(TRACE, events=[Admit(4, 3), Release(4)])
        assert check_trace(driver, rest, BOOKKEEPING) is None


@pytest.mark.parametrize(
    ("ready", "what"),
    [
        ('{"protocol":"helix-engine/2"}', "speaks 'helix-engine/2', and the suite helix-engine/1"),
        ('{"profiles":["speed"]}', "declares unknown profiles speed"),
        ('{"profiles":["pages"]}', "declares pages without placement, lengths"),
        ('{"profiles":[]}', "declares no profile"),
        ('{"seq":9}', "gave a malformed answer: it answered request 9, and was asked 1"),
    ],
)
def test_handshake_that_does_not_fit(astray, ready, what):
    """A version or a profile that the suite does not know is refused before any trace."""
    with pytest.raises(EngineFailure, match=re.escape(what)):
        astray(f"ready: {ready}")


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        ("stdio:", "names no command"),
        ("stdio:'", "cannot be split into words"),
        ("stdio:/no/such/program", "cannot be started"),
        ("gpu", "needs torch.distributed among its ranks; use --driver pool"),
    ],
)
def test_command_that_is_none(engine, sentence):
    """A command that cannot be run is refused with a sentence."""
    with pytest.raises((EngineSpecError, EngineFailure), match=sentence):
        StdioDriver(engine)


def test_lines_that_no_pipe_holds(opened, c_engine):
    """A request longer than a pipe's buffer is written while the child reads it."""
    batch = list(range(4, 10_004))
    events = [*TRACE.events[:1], Decode(batch, [1] * len(batch)), *TRACE.events[1:]]
    trace = msgspec.structs.replace(TRACE, events=events)
    assert len(messages.line_of(messages.Apply(1, events[1]))) > 2**16
    assert check_trace(opened(c_engine), trace, BOOKKEEPING) is None


def test_ranks_end_when_they_are_let_go(opened, c_engine):
    """At the end the children see the end of their stdin, and none is left."""
    driver = opened(c_engine)
    assert check_trace(driver, TRACE, BOOKKEEPING) is None
    children = list(driver.ranks)
    began = time.monotonic()
    driver.close()
    assert [child.process.returncode for child in children] == [0, 0]
    assert time.monotonic() - began < process.FAREWELL_S


DECODED = messages.Outcome(1, None, [2], [3], [True], [5], [3], [[[[0.5]]]])
VIEW = messages.View(1, {4: 3}, {4: [0]}, 1, [], {4: []}, {4: []})


@pytest.mark.parametrize(
    ("profile", "field"),
    [
        ("placement", "position_ids"),
        ("placement", "active"),
        ("placement", "slots"),
        ("lengths", "past_len"),
        ("attention", "visible"),
        ("attention", "output"),
        ("lengths", "local_len"),
        ("pages", "block_tables"),
        ("pages", "free_pages"),
        ("preempt", "preempted"),
        ("cache", "keys"),
        ("cache", "values"),
    ],
)
def test_nothing_passes_by_omission(profile, field):
    """A field of a checked profile must be there, and may be left out when it is not checked."""
    whole = DECODED if hasattr(DECODED, field) else VIEW
    part = msgspec.structs.replace(whole, **{field: msgspec.UNSET})

    def read(answer, profiles):
        if isinstance(answer, messages.View):
            return messages.spec_view(answer, None, profiles)
        return messages.spec_outcome(answer, Decode([4], [1]), profiles)

    read(whole, PROFILES)
    read(part, set(PROFILES) - {profile, "pages", "cache"})
    with pytest.raises(MalformedAnswer, match=f"lacks {field}, which profile {profile} asks for"):
        read(part, {profile})


def test_merge_without_an_output():
    """A merge that is accepted must have an output, when `merge` is checked."""
    merge = Merge([[0], [None]], [1, 0])
    with pytest.raises(MalformedAnswer, match="lacks output, which profile merge asks for"):
        messages.spec_outcome(messages.Outcome(1), merge, {"merge"})
    refused = messages.Outcome(1, Reason.UNSUPPORTED)
    assert messages.spec_outcome(refused, merge, {"merge"}).reason == Reason.UNSUPPORTED


@pytest.mark.parametrize("field", ["block_tables", "keys", "values"])
def test_requests_left_out_of_a_view(field):
    """What a view tells by request it tells of all the requests that it has."""
    part = msgspec.structs.replace(VIEW, **{field: {}})
    with pytest.raises(
        MalformedAnswer, match=rf"its {field} are of requests \[\], its local_len of"
    ):
        messages.spec_view(part, None, PROFILES)


def test_python_engine_as_a_command():
    """The reference, served over stdio, passes with its caches and outputs."""
    driver = StdioDriver("reference")
    try:
        assert check_trace(driver, TRACE, driver.profiles) is None
    finally:
        driver.close()


def test_published_schemas_are_those_of_the_types():
    """The schemas in the package are what the types say now."""
    published = {path.name: json.loads(path.read_text()) for path in messages.SCHEMAS.iterdir()}
    assert published == messages.message_schemas()


def schema_of(kind):
    """The published schema of a type of message."""
    return json.loads((messages.SCHEMAS / f"{kind}.schema.json").read_text())


def test_conversation_of_the_document(c_engine):
    """PROTOCOL.md's conversation is what the C engine says, and each line fits its schema."""
    text = PROTOCOL.read_text()
    (conversation,) = re.findall(r"^```jsonl\n(.*?)^```", text, re.M | re.S)
    said = [line.split(" ", 1) for line in conversation.splitlines()]
    for _, line in said:
        message = json.loads(line)
        jsonschema.validate(message, schema_of(message["type"]))
    suite = msgspec.json.Decoder(messages.ToEngine, dec_hook=decode_layout)
    lines = [line for side, line in said if side == "->"]
    assert [messages.line_of(suite.decode(line)).decode() for line in lines] == [
        line + "\n" for line in lines
    ]
    asked = "".join(line + "\n" for side, line in said if side == "->")
    done = subprocess.run([c_engine], input=asked, capture_output=True, text=True, check=True)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [json.loads(line) for side, line in said if side == "<-"] == answers


def test_every_message_is_documented():
    """PROTOCOL.md has a heading for each message, and names each of its fields."""
    text = PROTOCOL.read_text()
    for kind in (path.name.partition(".")[0] for path in messages.SCHEMAS.iterdir()):
        section = re.search(rf"^### `{kind}`(.*?)(?=^##)", text, re.M | re.S)
        assert section is not None, kind
        fields = schema_of(kind)["$defs"][kind.capitalize()]["properties"].keys()
        for field in fields - {"type", "seq"}:
            assert f"`{field}`" in section[1], f"{kind}: {field}"
