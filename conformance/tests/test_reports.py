"""Views of a stream: each tells the same, and none shows a part as the whole."""

from __future__ import annotations

import contextlib
import doctest
import json
import tempfile
import tomllib
from html.parser import HTMLParser
from pathlib import Path

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import msgspec
import pytest
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from junitparser import JUnitXml

import helix_conformance
from helix_conformance import prove
from helix_conformance.cli import main
from helix_conformance.judge.coverage import SITUATIONS
from helix_conformance.judge.failure import Violation
from helix_conformance.report import stream
from helix_conformance.report import text as text_view
from helix_conformance.report.certificate import CertificateRefused, badge, certificate
from helix_conformance.report.html import run_page
from helix_conformance.report.junit import junit
from helix_conformance.report.stream import (
    CONFIRMED,
    CoverageLine,
    FailureLine,
    Kill,
    KnownDifference,
    Line,
    MutantKill,
    MutationRun,
    ProofReport,
    Proofs,
    Record,
    Row,
    Run,
    Settings,
    StreamError,
    Summary,
    TheoremResult,
    encode_line,
    read_stream,
    restrictions,
    stream_schema,
)
from helix_mutants import run as mutants
from helix_spec import trace as traces
from helix_spec.config import Config
from helix_spec.engine import PROFILES
from helix_spec.events import Admit, Decode, Merge
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace

PUBLISHED = json.loads(Path(stream.__file__).with_name(stream.SCHEMA_FILE).read_text())
SETTINGS = Settings(
    command="run",
    engine="mine:Engine",
    suite_version="0.2.0",
    started="2026-01-01T00:00:00+00:00",
    python="3.11",
    machine="x86_64",
)
ROWS = [
    Row(
        layout=name,
        engine="mine:Engine",
        driver="local",
        cp_sizes=[1, 2],
        profiles=["placement", "lengths"],
        declared=["placement", "lengths"],
        identifiers=[f"{name}/1:C=2,T=2"],
        settings={"kernel": "v<2>"},
        traces=400,
        events=4000,
        seconds=1.0,
        verdict="pass",
    )
    for name in LAYOUT_NAMES
]
COVERED = CoverageLine(
    engine="mine:Engine",
    driver="local",
    counts=dict.fromkeys(SITUATIONS, 1) | {"copy on write": 0, "empty rank": 0},
    missed=["empty rank"],
    impossible={"copy on write": "profile fork"},
)
SUMMARY = Summary(
    engine="mine:Engine",
    verdict="pass",
    layouts=list(LAYOUT_NAMES),
    profiles_checked=["placement", "lengths"],
    profiles_not_checked=["pages"],
    traces=2800,
    events=28000,
    events_per_s=4000.0,
    coverage=dict.fromkeys(SITUATIONS, 1),
    known_differences=[
        KnownDifference(
            kind="answers_wrongly",
            does="counts otherwise",
            link="https://x.example/1",
            status="still fails",
            invariant="PAGE-1",
        )
    ],
    missed=["empty rank"],
)
WHOLE: list[Line] = [SETTINGS, *ROWS, COVERED, SUMMARY]
TRACE = Trace(
    config=Config(layout="pr9757/1:C=2,T=1", pages=[9, 9], max_len=50),
    events=[Admit(0, 1), Decode([0], [1])],
)
LEMMA = TheoremResult(
    id="lemma", proves=["OWN-1"], verdict=CONFIRMED, kills=[Kill("wrong", {"n": 1})]
)
PROOFS = Proofs(
    suite_version="0.2.0",
    report=ProofReport(
        [
            TheoremResult(
                id="lemma", proves=["OWN-1"], verdict=CONFIRMED, kills=[Kill("w", {"n": 1})]
            )
        ],
        "pass",
        [],
        1.0,
    ),
)
MUTATION_RUN = MutationRun(
    suite_version="0.2.0",
    tier="all",
    seed=0,
    score="1/1",
    mutants=[MutantKill("twice", "PR 1", True, ["OWN-1"], 2, 3, 0.1)],
    controls={"reference": []},
)


def changed(line, **values):
    """A line with other values."""
    return msgspec.structs.replace(line, **values)


def failing(verdict="fail", **failure):
    """A whole run of which the first layout fails."""
    row = changed(ROWS[0], verdict=verdict)
    line = FailureLine(
        **{
            "layout": row.layout,
            "engine": row.engine,
            "driver": row.driver,
            "event": 1,
            "violations": [Violation("LEN-2", "past_len", [0], [1], 1)],
            "trace": TRACE,
            "trace_file": "t.json",
            "declared": row.declared,
            **failure,
        }
    )
    return [SETTINGS, row, line, *ROWS[1:], COVERED, changed(SUMMARY, verdict=verdict)]


def written(path: Path, lines) -> Path:
    """The lines in a file."""
    path.write_bytes(b"".join(encode_line(line) for line in lines))
    return path


def cases(record: Record) -> dict[str, str]:
    """Of each case of the JUnit file what became of it."""
    return {
        f"{suite.name}: {case.name}": type(case.result[0]).__name__ if case.result else "pass"
        for suite in JUnitXml.fromstring(junit(record))
        for case in suite
    }


def test_whole_passing_run_passes_in_every_view():
    """A whole run passes, its certificate says what was checked and what was not."""
    record = Record([*WHOLE, PROOFS, MUTATION_RUN])
    assert (record.verdict, record.problems, record.shortcomings) == ("pass", [], [])
    found = certificate(record)
    assert [layout.layout for layout in found.layouts] == list(LAYOUT_NAMES)
    assert found.layouts[1].identifiers == ["pr9757/1:C=2,T=2"]
    assert found.profiles_checked == ["placement", "lengths"]
    assert found.profiles_not_checked == ["pages"]
    assert (found.suite_version, found.engine) == ("0.2.0", "mine:Engine")
    assert (found.proofs.theorems, found.zoo.score) == (["lemma"], "1/1")
    assert found.known_differences[0].invariant == "PAGE-1"
    assert found.situations_missed == ["empty rank"]
    assert found.settings == {"kernel": "v<2>"}
    assert set(cases(record).values()) == {"pass"}
    assert badge(record)["message"] == "pass, 7 layouts, expected failures"
    page = run_page(record)
    assert "kernel: v&lt;2&gt;" in page
    assert "in a whole run" in page and "not a whole one" not in page
    assert "1 of 1 theorems confirmed" in page and "1/1" in page


def test_what_was_not_run_is_said_to_be_so():
    """Without proofs and mutants the certificate holds null, and the page says that they lack."""
    record = Record(WHOLE)
    assert (certificate(record).proofs, certificate(record).zoo) == (None, None)
    assert run_page(record).count("for this report") == 2


PARTS: dict[str, tuple[list[Line], str, str]] = {
    "no summary": (WHOLE[:-1], "error", "has no summary line"),
    "no rows": ([SETTINGS, SUMMARY], "partial", "No layout was played."),
    "rows that are missing": (
        [SETTINGS, *ROWS[2:], SUMMARY],
        "partial",
        "Layouts that were not played: before_9757, pr9757.",
    ),
    "nothing": ([], "partial", "no run of an engine"),
    "restricted": (
        [changed(SETTINGS, restrictions=["Only 1 of 7 layouts were played: pr9757."]), *WHOLE[1:]],
        "partial",
        "Only 1 of 7 layouts",
    ),
    "a declared profile was left out": (
        [SETTINGS, changed(ROWS[0], declared=["placement", "lengths", "pages"]), *WHOLE[2:]],
        "partial",
        "declared profiles were not checked: pages",
    ),
    "failing": (failing(), "fail", "is failing on before_9757 (local): fail"),
    "an engine that died": (
        failing("error", violations=[], engine_failure="Rank 1 died."),
        "error",
        "before_9757 (local): error",
    ),
    "an untrue ledger": ([*WHOLE[:-1], changed(SUMMARY, verdict="fail")], "fail", "no longer true"),
    "some theorems alone": (
        [*WHOLE, changed(PROOFS, report=msgspec.structs.replace(PROOFS.report, verdict="partial"))],
        "partial",
        "some theorems alone",
    ),
    "a mutant that survived": (
        [
            *WHOLE,
            changed(
                MUTATION_RUN, score="0/1", mutants=[changed(MUTATION_RUN.mutants[0], killed=False)]
            ),
        ],
        "fail",
        "The mutation score is 0/1",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PARTS)
def test_a_part_is_never_shown_as_the_whole(name):
    """Whatever is missing or wrong is said in every view, and there is no certificate."""
    lines, verdict, sentence = PARTS[name]
    record = Record(lines)
    assert record.verdict == verdict
    with pytest.raises(CertificateRefused, match="There is no certificate") as refused:
        certificate(record)
    assert sentence in str(refused.value)
    page = run_page(record)
    assert sentence in page.replace("&#39;", "'")
    assert "in a whole run" not in page
    assert set(cases(record).values()) != {"pass"}
    shown = badge(record)
    assert shown["color"] != "brightgreen" and not shown["message"].startswith("pass")
    assert shown["isError"] == (verdict in ("fail", "error"))


def test_runs_of_two_engines_have_no_certificate_together():
    """A certificate is of one engine."""
    other = [changed(line, engine="other") for line in (SETTINGS, SUMMARY)]
    with pytest.raises(CertificateRefused, match="several engines: mine:Engine, other"):
        certificate(Record([*WHOLE, other[0], *ROWS, other[1]]))


def test_a_whole_run_may_have_parts_beside_it():
    """A replay behind a whole run takes nothing from it; a failing one does."""
    replay = changed(SETTINGS, command="replay", restrictions=["One stored trace."])
    beside = [*WHOLE, replay, ROWS[0], SUMMARY]
    assert Record(beside).verdict == "pass"
    assert len(certificate(Record(beside)).layouts) == 7
    assert Record([*beside[:-1], changed(SUMMARY, verdict="fail")]).verdict == "fail"


def test_a_failure_settles_the_profiles_it_is_about():
    """Of a failing layout the profiles of its invariants fail, the others are unsettled."""
    record = Record(failing())
    run = record.runs[0]
    states = {p: state for p, (state, _) in run.profile_states(run.rows[0]).items()}
    assert tuple(states[profile] for profile in ("placement", "lengths", "pages")) == (
        "unsettled",
        "fail",
        "not declared",
    )
    assert set(states) == set(PROFILES)
    found = cases(record)
    prefix = "helix-conformance run mine:Engine: before_9757"
    assert (found[f"{prefix} placement"], found[f"{prefix} lengths"]) == ("Skipped", "Failure")


def test_a_decode_says_nothing_of_merges_alone():
    """An output that is wrong after a decode blames attention; supplied partials blame merge."""
    row = changed(ROWS[0], verdict="fail", profiles=["attention", "merge"])
    merge = Trace(config=TRACE.config, events=[Admit(0, 1), Merge([[0], [None]], [0, 1])])
    for trace, profile in ((TRACE, "attention"), (merge, "merge")):
        failure = changed(failing()[2], violations=[Violation("ATT-1", "output")], trace=trace)
        states = Run(SETTINGS, [row], [failure]).profile_states(row)
        assert [p for p, (state, _) in states.items() if state == "fail"] == [profile]


def test_long_values_are_cut_behind_what_matters():
    """Of an output that is wrong its bound and error are shown, whatever its length."""
    output = {"output": [1 / 3] * 500, "E": 2 / 3}
    page = run_page(Record(failing(violations=[Violation("ATT-4", "output", output, output, 1)])))
    assert "{&#34;E&#34;: 0.666667, &#34;output&#34;: [0.333333," in page
    assert page.count("0.333333") < 100


class _Loads(HTMLParser):
    """Collects what a page would load, and its scripts."""

    def __init__(self):
        super().__init__()
        self.loaded, self.tags = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.loaded += [value for name, value in attrs if name in ("src", "href", "srcset", "data")]


def test_a_page_is_self_contained_and_escapes_what_it_shows():
    """No resource is named, and text of an engine stays text."""
    evil = '</script><script src="https://x.example/a.js">'
    lines = [changed(SETTINGS, engine=evil), *failing()[1:]]
    lines[2] = changed(lines[2], violations=[Violation("OWN-1", evil, evil, evil)], trace_file=evil)
    page = run_page(Record(lines))
    seen = _Loads()
    seen.feed(page)
    assert seen.loaded == []
    assert seen.tags.count("script") == 1
    assert "url(" not in page and "@import" not in page
    assert "default-src &#39;none&#39;" in page or "default-src 'none'" in page


def test_junit_takes_text_that_xml_cannot_hold():
    """Control characters of a dying engine do not spoil the file."""
    lines = failing("error", violations=[], engine_failure="Rank 1 printed \x00\x1b[31m.")
    assert "Error" in cases(Record(lines)).values()


def test_examples_in_docstrings_run():
    """What the documentation shows is what happens."""
    assert doctest.testmod(text_view) == (0, 8)


# The stream itself


def test_the_published_schema_is_the_generated_one():
    """`python -m helix_conformance.report.stream` was run after the last change of a type."""
    assert stream_schema() == PUBLISHED


def test_every_line_is_as_the_schema_says(tmp_path, monkeypatch):
    """A stranger's validator takes what a failing run, proofs and the zoo write."""
    monkeypatch.chdir(tmp_path)
    words = "run --engine suite_testing.broken:Liar --layout pr9757 --json run.jsonl"
    assert CliRunner().invoke(main, words.split()).exit_code == 1
    with Path("run.jsonl").open("ab") as file:
        file.write(b"".join(encode_line(line) for line in (PROOFS, MUTATION_RUN)))
    schema = PUBLISHED
    jsonschema.Draft202012Validator.check_schema(schema)
    lines = [json.loads(line) for line in Path("run.jsonl").read_text().splitlines()]
    for line in lines:
        jsonschema.validate(line, schema)
    jsonschema.validate(lines[2]["trace"], traces.published_schema())
    kinds = ["settings", "row", "failure", "coverage", "summary", "proofs", "zoo"]
    assert [line["kind"] for line in lines] == kinds


def test_the_report_command_writes_every_view(tmp_path, monkeypatch):
    """Files are written, the table is printed, and the certificate of a failing run is refused."""
    monkeypatch.chdir(tmp_path)
    passing, wrong = written(tmp_path / "a.jsonl", WHOLE), written(tmp_path / "b.jsonl", failing())
    proofs = written(tmp_path / "p.jsonl", [PROOFS, MUTATION_RUN])
    words = ["--html", "r.html", "--junit", "r.xml", "--badge", "b.json", "--certificate", "c.json"]
    result = CliRunner().invoke(main, ["report", str(passing), str(proofs), *words])
    assert result.exit_code == 0, result.output
    assert "vllm_dcp" in result.output and "mutants (all): 1/1 killed by name" in result.output
    assert json.loads(Path("c.json").read_text())["verdict"] == "pass"
    assert json.loads(Path("b.json").read_text())["schemaVersion"] == 1
    assert Path("r.html").read_text().startswith("<!doctype html>")
    Path("c.json").unlink()
    unwritable = CliRunner().invoke(main, ["report", str(passing), "--html", "nowhere/r.html"])
    assert unwritable.exit_code == 2 and "nowhere/r.html: cannot be written" in unwritable.output
    result = CliRunner().invoke(main, ["report", str(wrong), *words])
    assert result.exit_code == 1
    assert "LEN-2 violated at event 1" in result.output
    assert "There is no certificate of this stream." in result.output
    assert not Path("c.json").exists() and json.loads(Path("b.json").read_text())["color"] == "red"


def test_a_broken_last_line_is_a_run_that_was_cut_off(tmp_path):
    """A run that was killed while it wrote keeps what it had written before."""
    path = written(tmp_path / "a.jsonl", WHOLE)
    path.write_bytes(path.read_bytes()[:-20])
    record = read_stream([path])
    assert (len(record.runs[0].rows), record.runs[0].summary) == (7, None)
    assert record.verdict == "error"


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("{}", "line 1"),
        ('{"kind": "row"}', "line 1"),
        ("nonsense\n", "line 1"),
        ("[" * 100_000, "line 1"),
        (
            encode_line(changed(failing()[2], event=2)).decode(),
            "event is 2, and its trace has 2",
        ),
        (
            encode_line(changed(failing()[2], violations=[Violation("OWN-9", "made up")])).decode(),
            "'OWN-9' is no number of an invariant",
        ),
        (
            encode_line(failing()[2]).decode().replace("pr9757/1", "pr1/1"),
            "There is no layout named 'pr1'",
        ),
        (
            encode_line(failing()[2]).decode().replace("C=2,T=1", "C=999999999,T=1"),
            "in its trace, field $.config: ",
        ),
        (
            encode_line(failing()[2]).decode().replace('"prompt_len":1', '"prompt_len":1e9'),
            "line 1",
        ),
        (encode_line(ROWS[0]).decode(), "a Row stands outside a run"),
        ("\xff\n", "line 1"),
    ],
)
def test_what_is_no_stream_is_refused(tmp_path, text, sentence):
    """A file that is none is refused with its name and line, and status 2."""
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(StreamError, match=r"x\.jsonl"):
        read_stream([path])
    result = CliRunner().invoke(main, ["report", str(path)])
    assert result.exit_code == 2
    assert sentence in result.output.replace("\n", " ")


def test_a_stream_that_is_too_large(tmp_path, monkeypatch):
    """No more of it is read than there may be."""
    monkeypatch.setattr(stream, "MAX_FILE_BYTES", 1000)
    with pytest.raises(StreamError, match=r"x\.jsonl: is too large; a stream has at most 1000"):
        read_stream([written(tmp_path / "x.jsonl", WHOLE)])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 0.999), st.sampled_from(['"', "1", "-", "{", "null,", ""]))))
def test_a_spoiled_stream_is_refused_or_shown(spoils):
    """A stream with bytes changed is refused in a sentence, or every view of it can be made."""
    text = b"".join(encode_line(line) for line in [*failing(), PROOFS, MUTATION_RUN]).decode()
    for where, what in spoils:
        at = int(where * len(text))
        text = text[:at] + what + text[at + 1 :]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "run.jsonl"
        path.write_text(text)
        with contextlib.suppress(StreamError, CertificateRefused):
            record = read_stream([path])
            assert run_page(record) and junit(record) and badge(record)
            certificate(record)


def test_options_that_make_a_run_a_part():
    """Each option that leaves something out is a sentence; none for a run without options."""
    nothing = {"layouts": (), "cp_sizes": (), "asked": (), "examples": None, "workload": None}
    assert restrictions(nothing, 40) == []
    for option, value in (
        ("layouts", ("pr9757",)),
        ("cp_sizes", (4,)),
        ("asked", ("lengths",)),
        ("examples", 39),
        ("workload", "w.jsonl"),
    ):
        assert len(restrictions(nothing | {option: value}, 40)) == 1, option
    assert restrictions(nothing | {"examples": 40, "layouts": LAYOUT_NAMES}, 40) == []


def test_proofs_and_a_mutation_run_go_behind_a_run(tmp_path, monkeypatch):
    """`--stream` of both commands appends one line that the reader takes."""
    path = written(tmp_path / "a.jsonl", WHOLE)
    monkeypatch.setattr(mutants, "mutation_run", lambda *_: MUTATION_RUN)
    monkeypatch.setattr(prove, "_catalog", lambda _: prove.Catalog(["lemma"], ["lemma"], []))
    monkeypatch.setattr(prove, "_confirm", lambda *_: LEMMA)
    for command in ("prove", "zoo"):
        result = CliRunner().invoke(main, [command, "--stream", str(path)])
        assert result.exit_code == 0, result.output
    record = read_stream([path])
    assert record.verdict == "pass"
    assert (record.proofs.report.verdict, record.zoo.score) == ("pass", "1/1")


def test_the_version_is_that_of_the_project():
    """What reports name is what is built."""
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())
    assert helix_conformance.__version__ == project["project"]["version"]


def test_an_engine_of_one_layout_says_so_in_its_ledger(tmp_path, monkeypatch):
    """Layouts that must not be run are no restriction: the certificate lists them, not checked."""
    monkeypatch.chdir(tmp_path)
    entry = (
        '[[difference]]\nkind = "must_not_run"\nlayout = "{}"\ndoes = "has it not"\nlink = "{}"\n'
    )
    others = [name for name in LAYOUT_NAMES if name != "vllm_dcp"]
    Path("known.toml").write_text("".join(entry.format(n, "https://x.example/1") for n in others))
    monkeypatch.setattr("helix_conformance.session.default_examples", lambda _: 3)
    words = "run --engine gpu-ledger --known known.toml --json run.jsonl"
    result = CliRunner().invoke(main, words.split())
    assert result.exit_code == 0, result.output
    found = certificate(read_stream([Path("run.jsonl")]))
    assert [layout.layout for layout in found.layouts] == ["vllm_dcp"]
    assert found.layouts_not_checked == others
    assert len(found.known_differences) == 6
