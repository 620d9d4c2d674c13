"""What a run tells: the line that decides, failures once, what was checked, traces that stay."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from helix_conformance.api import check
from helix_conformance.cli import main
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import StdioDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.foreign import shown
from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.sizes import SIZES
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.play import check_trace
from helix_conformance.report.text import failure_text
from helix_conformance.session import drawn_sizes, layout_traces
from helix_mutants.parts import Stored
from helix_reference.engine import ReferenceEngine
from helix_spec.capabilities import values_of
from helix_spec.config import Config, ModelShape, config_problem
from helix_spec.engine import RankView
from helix_spec.events import Admit, Decode
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace


def run(folder, *words: str):
    """The command's result, in a folder of its own."""
    return CliRunner().invoke(main, ["run", *words, "--traces", str(folder / "failing")])


class OneHeadOff(ReferenceEngine):
    """The output of layer 1, head 2 of the second token is wrong at dim 3."""

    def apply(self, event):
        outcome = super().apply(event)
        if outcome.output is None or len(outcome.output[0]) < 2:
            return outcome
        output = np.array(outcome.output)
        output[1, 1, 2, 3] += 10
        return msgspec.structs.replace(outcome, output=output)


def failing(engine: type, events: list) -> Failure:
    """The failure of one trace."""
    config = Config(
        layout="pr9757/1:C=1,T=4", pages=[9], max_len=30, model=ModelShape(layers=2, q_heads=4)
    )
    driver = LocalDriver(engine)
    failure = check_trace(driver, Trace(config=config, events=events), driver.profiles)
    assert failure is not None
    return failure


def test_a_wrong_output_is_told_by_its_first_entry_and_its_error() -> None:
    """Layer, head, token and dim, the error, E and their ratio, before any vector."""
    failure = failing(OneHeadOff, [Admit(7, 5), Decode([7], [2])])
    [message] = {violation.message for violation in failure.violations}
    assert "of request 7 at position 6, layer 1, query head 2" in message
    assert "off by 10, " in message and " times E " in message
    assert "most at dim 3, " in message
    assert message.endswith("1 of 8 outputs of the token are wrong")


def keys_changed(change):
    """An engine whose cached keys of request 7 are changed when they are looked at."""

    class Changed(Stored):
        def observe(self, ids=None) -> RankView:
            view = super().observe(ids)
            if 7 not in view.keys:
                return view
            keys = np.array(view.keys[7], dtype=np.float64)
            change(keys)
            return msgspec.structs.replace(view, keys={**view.keys, 7: keys})

    return Changed


def lose(keys):
    """Nothing was written at local index 2."""
    keys[:, 2] = np.nan


def repeat(keys):
    """Local index 2 holds the row of position 1."""
    keys[:, 2] = keys[:, 1]


def round_off(keys):
    """An entry is a few units in the last place off."""
    keys[1, 2, 1, 3] += 3e-6


def turn(keys):
    """The row is rotated once more."""
    half = keys.shape[-1] // 2
    a, b = keys[:, 2, :, :half].copy(), keys[:, 2, :, half:].copy()
    keys[:, 2, :, :half], keys[:, 2, :, half:] = -b, a


@pytest.mark.holds("OWN-1", "POS-2")
@pytest.mark.parametrize(
    ("change", "invariant", "why"),
    [
        (lose, "OWN-1", "nothing was written there"),
        (repeat, "OWN-1", "it is that of position 1"),
        (round_off, "POS-2", "it is rounded otherwise; first at layer 1, KV head 1, dim 3: "),
        (turn, "POS-2", "it is rotated otherwise"),
    ],
)
def test_a_wrong_key_is_told_apart(change, invariant, why) -> None:
    """Never written, another token's, rounded otherwise, rotated otherwise."""
    failure = failing(keys_changed(change), [Admit(7, 5)])
    told = [v.message for v in failure.violations if v.invariant == invariant]
    assert [message.startswith("K of request 7 at local index 2") for message in told] == [True]
    assert why in told[0]


class LosesAPage(ReferenceEngine):
    """Tells of one page fewer than the request holds; its count of free pages fits that."""

    profiles = ReferenceEngine.profiles - {"cache", "attention"}

    def observe(self, ids=None) -> RankView:
        view = super().observe(ids)
        tables = {id: table[:-1] for id, table in view.block_tables.items()}
        free = view.free_pages + len(tables)
        return msgspec.structs.replace(view, block_tables=tables, free_pages=free)


@pytest.mark.holds("PAGE-1", "PAGE-3")
def test_page_3_is_named_only_where_its_sentence_is_false() -> None:
    """Tables that are a page short and a free count that fits them break PAGE-1 alone."""
    assert failing(LosesAPage, [Admit(7, 5)]).invariants == {"PAGE-1"}


def test_no_line_says_that_nothing_was_expected_and_nothing_observed() -> None:
    """A violation without values is its message alone."""
    failure = failing(OneHeadOff, [Admit(7, 5), Decode([7], [2])])
    bare = [msgspec.structs.replace(v, expected=None, observed=None) for v in failure.violations]
    text = "\n".join(failure_text(msgspec.structs.replace(failure, violations=bare)))
    assert "null" not in text


@pytest.mark.slow
def test_equal_failures_of_several_layouts_are_told_once(tmp_path) -> None:
    """With the layouts; a run that stops at the first knows of one."""
    words = ["--engine", "suite_testing.broken:Liar", "--examples", "20", "--cp", "2"]
    whole = run(tmp_path, *words)
    assert whole.output.count("LEN-2 violated at event 1") == 1
    assert "The same fails on " in whole.output
    first = run(tmp_path, *words, "--stop-at-first")
    assert (first.exit_code, "The same fails on " in first.output) == (1, False)


def test_the_last_line_says_pass_or_fail_of_what(tmp_path) -> None:
    """What was checked and what was not."""
    words = ["--layout", "pr9757", "--examples", "5", "--profile", "lengths"]
    passed = run(tmp_path, "--engine", "reference", *words).output.splitlines()[-1]
    failed = run(tmp_path, "--engine", "suite_testing.broken:Liar", *words).output.splitlines()[-1]
    assert passed.startswith("PASS: 7 traces and ") and (
        " vectors of pr9757; checked placement, lengths; not checked " in passed
    )
    assert failed.startswith("FAIL: ")


def test_coverage_is_a_table_on_request_and_a_line_else(tmp_path) -> None:
    """The line names what was missed."""
    words = ["--engine", "gpu-ledger", "--layout", "pr9757", "--examples", "3"]
    assert "situation " not in run(tmp_path, *words).output
    assert "situation " in run(tmp_path, *words, "--coverage").output


def test_failing_traces_stay_and_are_played_first(tmp_path) -> None:
    """Under a name of their own; the next run fails at once, with a single trace."""
    words = ["--engine", "suite_testing.broken:Liar", "--layout", "pr9757", "--cp", "2"]
    assert run(tmp_path, *words, "--examples", "20").exit_code == 1
    [kept] = (tmp_path / "failing").iterdir()
    again = run(tmp_path, *words, "--examples", "20", "--seed", "5")
    assert (again.exit_code, [kept]) == (1, list((tmp_path / "failing").iterdir()))
    right = run(tmp_path, "--engine", "gpu-ledger", *words[2:], "--examples", "2")
    assert right.output.splitlines()[-1].startswith("PASS: 5 traces and ")


def test_a_run_that_checks_nothing_fails(tmp_path) -> None:
    """With status 2, since it was asked for nothing that could be played."""
    known = tmp_path / "xfail.toml"
    known.write_text(
        '[[difference]]\nlayout = "pr9757"\nkind = "must_not_run"\ndoes = "x"\n'
        'link = "https://example.org/1"\n'
    )
    result = run(tmp_path, "--engine", "reference", "--layout", "pr9757", "--xfail", str(known))
    assert (result.exit_code, result.output.splitlines()[-1].startswith("FAIL: ")) == (2, True)


@pytest.mark.slow
def test_an_engine_that_fits_one_layout_is_told_so(tmp_path) -> None:
    """By the option that runs it alone."""
    result = run(tmp_path, "--engine", "suite_testing.narrow:OnlyRotated", "--examples", "40")
    assert "Only balanced passes." in result.output
    assert "--layout balanced" in result.output


class OnlyInAVector(ReferenceEngine):
    """Wrong at a prompt length that random traces hardly have, and a vector has."""

    profiles = ReferenceEngine.profiles - {"cache", "attention"}

    def observe(self, ids=None) -> RankView:
        view = super().observe(ids)
        wrong = {id for id, request in self.model.requests.items() if request.prompt_len == 400}
        lens = {id: n + (id in wrong) for id, n in view.local_len.items()}
        return msgspec.structs.replace(view, local_len=lens)


@pytest.mark.holds("LEN-1")
def test_vectors_are_part_of_a_run() -> None:
    """A run without a random trace of that length fails by the vector, and names it."""
    report = check(OnlyInAVector, layouts=["pr9757"], examples=1)
    [failure] = report.failures
    assert {violation.invariant for violation in failure.violations} == {"LEN-1"}
    assert failure.minimal.note.startswith("Vector spec-11-1")


def test_real_shapes_and_rare_sizes_are_drawn() -> None:
    """Of models as they ship, of ranks that are no power of two, and of pages of 64 and more."""
    driver = LocalDriver(LedgerEngine)
    draw = layout_traces(
        driver, "vllm_dcp", driver.profiles, cp_sizes=drawn_sizes(driver, ()), tp_sizes=(1, 2),
        real=True,
    )  # fmt: skip
    configs = [draw(Seeded(f"real {number}")).config for number in range(250)]
    legal = [values_of(config) for config in configs if config_problem(config) is None]
    drawn = {(name, size) for values in legal for name in values for size in values[name]}
    real = {("cp_size", 16), ("cp_size", 7), ("tokens_per_block", 64), ("head_dim", 128),
            ("layers", 5), ("latent", (512, 64)), ("q_heads", 64), ("kv_heads", 8)}  # fmt: skip
    assert real - drawn == set()


def test_a_page_that_alone_is_wrong_is_met() -> None:
    """The first pages of a pool, and places in a request, hold tokens in a default run's traces."""
    met = set[tuple[str, int]]()

    class Telling(LedgerEngine):
        def observe(self, ids=None):
            view = super().observe(ids)
            for table in view.block_tables.values():
                met.update(("place", place) for place in range(len(table)))
                met.update(("page", page) for page in table)
            return view

    driver = LocalDriver(Telling)
    for name in LAYOUT_NAMES:
        draw = layout_traces(driver, name, driver.profiles, cp_sizes=[1, 2, 3, 4, 8])
        for number in range(40):
            assert check_trace(driver, draw(Seeded(f"{name} {number}")), driver.profiles) is None
    assert {("page", page) for page in range(48)} - met == set()
    assert {("place", place) for place in range(64)} - met == set()


def test_coverage_counts_sizes() -> None:
    """Each size worth drawing, with 0 where a run had none of it."""
    report = check("gpu-ledger", layouts=["vllm_dcp"], cp=[2], examples=10)
    lines = [json.loads(line) for line in report.to_json().splitlines()]
    [sizes] = [line["sizes"] for line in lines if line["kind"] == "coverage"]
    assert set(sizes) == set(SIZES)
    assert (sizes["cp_size"]["2"] > 5, sizes["cp_size"]["3"], sizes["tp_size"]["4"]) == (True, 0, 0)


class Raises(LedgerEngine):
    """Raises in its own code, with a message of two lines."""

    def apply(self, event):
        raise RuntimeError("no page\nleft")


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize("served", [False, True])
def test_what_is_raised_is_one_line_and_its_traceback_is_in_the_file(served, monkeypatch):
    """In this process, and over pipes."""
    monkeypatch.setenv("PYTHONPATH", str(Path(__file__).parents[2]))
    name = f"{__name__}:Raises"
    driver = StdioDriver(name) if served else LocalDriver(Raises)
    try:
        config = Config(layout="pr9757/1:C=1,T=4", pages=[3], max_len=8)
        failure = check_trace(driver, Trace(config=config, events=[Admit(0, 5)]), driver.profiles)
    finally:
        driver.close()
    assert failure is not None
    [line] = [line for line in failure_text(failure) if "raised RuntimeError" in line]
    assert r"no page\nleft" in shown(line)
    assert 'raise RuntimeError("no page\\nleft")' in failure.trace.note
