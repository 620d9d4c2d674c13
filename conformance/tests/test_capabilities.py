"""Where an engine says that it works: drawn, shrunk, judged and told inside of it alone."""

from __future__ import annotations

import json

import pytest
from click.testing import CliRunner

from helix_conformance.api import check
from helix_conformance.cli import main
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import StdioDriver
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines import EngineSpecError, engine_declaration
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.traces import why_outside
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.xfail import Difference, Known
from helix_conformance.session import SessionError, layout_run, layout_traces
from helix_spec.capabilities import EVERYWHERE, boxes_of
from helix_spec.config import Config
from helix_spec.engine import PROFILES
from helix_spec.trace import Trace
from suite_testing.narrow import (
    LastHeadLost,
    OneGqa,
    OneLatent,
    RefusesMore,
    Rotated,
    Small,
    WrongOffset,
)

SIZES = [1, 2, 3, 4, 8]


def played(engine: type, examples: int = 6) -> Failure | None:
    """The failure of a few random traces, as a run plays them."""
    driver = ThreadDriver(engine)
    _, failure = layout_run(
        driver, "vllm_dcp", (), cp_sizes=SIZES, tp_sizes=(1, 2), examples=examples, seed=0,
        tally=Tally(), known=Known(),
    )  # fmt: skip
    return failure


@pytest.mark.parametrize("engine", [OneGqa, OneLatent])
def test_an_engine_that_supports_next_to_nothing_passes(engine: type) -> None:
    """It is asked for nothing that it does not declare, and needs no expected failure."""
    assert played(engine) is None


@pytest.mark.parametrize("engine", [OneGqa, OneLatent])
def test_what_is_drawn_is_inside(engine: type) -> None:
    """Configurations, and events that are to be accepted."""
    driver, boxes = ThreadDriver(engine), engine_declaration(engine)[0]
    draw = layout_traces(driver, "vllm_dcp", PROFILES, cp_sizes=SIZES, tp_sizes=(1, 2))
    traces = [draw(Seeded(f"inside {number}")) for number in range(60)]
    assert [why for trace in traces if (why := why_outside(boxes, trace))] == []
    assert sum(len(trace.events) for trace in traces) > 200


@pytest.mark.parametrize(
    ("engine", "named", "most"),
    [(LastHeadLost, {"ATT-1"}, 2), (WrongOffset, {"OWN-1"}, 3)],
    ids=["LastHeadLost", "WrongOffset"],
)
def test_a_defect_at_the_only_shape_is_named_there(
    engine: type, named: set[str], most: int
) -> None:
    """Its smallest trace lies inside the capabilities, too."""
    failure = played(engine, 40)
    assert failure is not None
    assert named <= failure.invariants
    assert len(failure.trace.events) <= most
    assert why_outside(engine_declaration(engine)[0], failure.trace) is None


def test_an_engine_must_start_inside_its_capabilities() -> None:
    """A configuration that it declares and refuses is a failure."""
    failure = played(RefusesMore, 20)
    assert failure is not None
    assert failure.invariants == {"REF-2"}


def test_a_list_of_boxes_is_no_product() -> None:
    """What is drawn lies in one of them, and both are drawn."""
    driver = LocalDriver(Small)
    draw = layout_traces(driver, "pr9757", {"placement", "lengths", "pages"}, cp_sizes=SIZES)
    sizes = {
        (config.layout.cp_size, config.layout.tokens_per_block == 3)
        for config in (draw(Seeded(str(n))).config for n in range(200))
    }
    assert sizes == {(2, True), (4, True), (4, False)}


@pytest.mark.parametrize(
    ("layouts", "cp", "named"),
    [(["vllm_dcp"], [3], "cp_size"), ([], [8], "cp_size")],
)
def test_a_declaration_that_holds_nothing_asked_for_is_refused(layouts, cp, named) -> None:
    """Before anything runs, with the dimension that empties it."""
    with pytest.raises(SessionError, match=f"{named} leaves nothing to play"):
        check(Small, layouts=layouts, cp=cp, examples=1)


def test_layouts_that_are_not_declared_are_not_played() -> None:
    """A run without --layout plays what is declared; one that names another is refused."""
    report = check(Rotated, examples=3)
    summary = json.loads(report.to_json().splitlines()[-1])
    assert (report.verdict, summary["layouts"]) == ("pass", ["balanced", "custom"])
    with pytest.raises(SessionError, match="layouts leaves nothing to play"):
        check(Rotated, layouts=["pr9757"])


def test_a_trace_outside_is_told_by_what_it_lies_outside_of() -> None:
    """By configuration, or by the first event that is to be accepted."""
    config = Config(layout="pr9757/1:C=2,T=3", pages=[9, 9], max_len=20)
    assert why_outside(EVERYWHERE, Trace(config=config, events=[])) is None
    outside = why_outside(boxes_of({"cp_size": {"max": 1}}), Trace(config=config, events=[]))
    assert outside == "its configuration lies outside the capabilities in cp_size"


def test_vectors_outside_are_left_out_and_named() -> None:
    """`vectors check` plays what lies inside, and says why it left out the rest."""
    words = ["vectors", "check", "--engine", "suite_testing.narrow:Small", "--layout", "pr9757"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 0, result.output
    assert "its configuration lies outside the capabilities in" in result.output
    assert result.output.splitlines()[-1].startswith("PASS: ")


def test_capabilities_travel_and_are_told(tmp_path) -> None:
    """Through the stdio protocol, into the table's last line and the certificate."""
    driver = StdioDriver("suite_testing.narrow:Small", deadline_s=30.0)
    try:
        assert driver.capabilities == boxes_of(list(Small.capabilities))
    finally:
        driver.close()
    stream = tmp_path / "run.jsonl"
    words = [
        "run",
        "--engine",
        "suite_testing.narrow:Small",
        "--examples",
        "2",
        "--json",
        str(stream),
    ]
    result = CliRunner().invoke(main, words)
    last = result.output.splitlines()[-1]
    assert "only where the engine works: cp_size 2 or 4, tokens_per_block 3; or layouts pr*" in last
    summary = json.loads(stream.read_text().splitlines()[-1])
    assert summary["capabilities"][0] == {"cp_size": [2, 4], "tokens_per_block": [3]}


@pytest.mark.parametrize(
    ("declared", "sentence"),
    [
        ([], "declares an empty list of capabilities"),
        ({"head_dims": [8]}, "unknown field `head_dims`"),
        ({"cp_size": {"min": 4, "max": 2}}, "A range from 4 to 2 holds no number"),
        ({"cp_size": []}, "Expected `array` of length >= 1"),
    ],
)
def test_a_declaration_that_is_none_is_refused(declared, sentence) -> None:
    """With the engine's name and what is wrong."""

    class Wrong(LedgerEngine):
        capabilities = declared

    with pytest.raises(EngineSpecError, match=sentence):
        engine_declaration(Wrong)


@pytest.mark.parametrize("invariant", ["REF-1", "REF-2"])
def test_no_entry_covers_every_wrong_refusal(invariant: str) -> None:
    """An entry names the reason."""
    with pytest.raises(ValueError, match="name the `reason`"):
        Difference(kind="answers_wrongly", does="x", link="https://a.b/1", invariant=invariant)


@pytest.mark.parametrize(
    ("declared", "named"),
    [
        ({"head_dim": [7], "attention": ["gqa"]}, "head_dim leaves nothing to play: head_dim is 7"),
        ({"kv_heads": [3], "q_heads": [4]}, "q_heads leaves nothing to play"),
        ({"overlap": [True]}, "overlap leaves nothing to play"),
    ],
)
def test_a_declaration_that_holds_nothing_legal_is_refused(declared, named) -> None:
    """It would pass otherwise, since nothing but illegal configurations were played."""

    class Wrong(LedgerEngine):
        profiles = LedgerEngine.profiles - {"overlap"}
        capabilities = declared

    with pytest.raises(SessionError, match=named):
        check(Wrong, layouts=["pr9757"], examples=1)


@pytest.mark.parametrize(
    "declared",
    [None, {"q_heads_per_kv_head": [3]}, {"head_dim": {"max": 8}}, {"layers": {"min": 9}}],
)
def test_what_no_real_shape_fits_is_played_all_the_same(declared) -> None:
    """Three ranks, or heads that no model has: the shapes that are left are drawn."""

    class Few(LedgerEngine):
        capabilities = declared

    boxes = engine_declaration(Few)[0]
    driver = LocalDriver(Few)
    draw = layout_traces(driver, "pr9757", driver.profiles, cp_sizes=[3], real=True)
    traces = [draw(Seeded(f"few {number}")) for number in range(60)]
    assert [why for trace in traces if (why := why_outside(boxes, trace))] == []
    assert check(Few, layouts=["pr9757"], cp=[3], examples=30).verdict == "pass"
