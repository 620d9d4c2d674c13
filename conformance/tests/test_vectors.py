"""Test vectors: generated from the reference, shipped as generated, and strong enough alone."""

import json
from functools import cache

import jsonschema
import msgspec
import numpy as np
import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines import load_engine
from helix_conformance.engines.gpu import GpuEngine, LedgerEngine
from helix_conformance.expect.cases import MERGES
from helix_conformance.expect.making import SHIPPED, make_all
from helix_conformance.expect.vectors import (
    FORMAT_PAGE,
    SCHEMA_FILE,
    VectorError,
    load_vector,
    load_vectors,
    vector_schema,
)
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_vector
from helix_mutants import run as _run  # registers the mutants
from helix_mutants.parts import MUTANTS
from helix_reference.engine import ReferenceEngine
from helix_spec import invariants, placement
from helix_spec.config import decode_layout, encode_layout
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Fork,
    Merge,
    Preempt,
    Reason,
    Release,
    Resume,
)
from helix_spec.invariants import NUMBERS

BLIND = {"EQ-1"}
"""A theorem, of no engine."""
NO_MUTANT = {"BAL-1", "BAL-3", "PAGE-5", "ATT-2"}
"""Invariants that are expected of no mutant: engines of this file break them."""
assert _run


@cache
def shipped():
    """All shipped vectors."""
    return load_vectors(SHIPPED)


def aimed_at(vectors):
    """The marker of tests that play these vectors: what they are there for."""
    return pytest.mark.holds(*{number: None for vector in vectors for number in vector.invariants})


def failing(driver, vectors):
    """The names of the vectors that an engine fails, each with the invariants that are named."""
    found = {}
    for vector in vectors:
        if driver.profiles.issuperset(vector.profiles):
            failure = check_vector(driver, vector, Tally())
            if failure is not None:
                found[vector.name] = failure.invariants
    return found


def test_what_is_shipped_is_what_is_generated():
    """Byte by byte; after a change `python -m helix_conformance.expect` writes it anew."""
    generated = make_all()
    assert sorted(generated) == sorted(path.name for path in SHIPPED.iterdir())
    stale = [name for name, data in generated.items() if data != (SHIPPED / name).read_bytes()]
    assert stale == []
    assert sum(map(len, generated.values())) < 800_000


def test_every_vector_is_valid_by_the_published_schema():
    """The schema of the types accepts them, and rejects an unknown field.

    Left out are the two of 400 steps, which have nothing that others do not have.
    """
    schema = json.loads((SHIPPED / SCHEMA_FILE).read_text())
    assert vector_schema() == schema
    validator = jsonschema.Draft202012Validator(schema)
    for path in SHIPPED.glob("*.json"):
        if path.name != SCHEMA_FILE and "11-1-" not in path.name:
            assert list(validator.iter_errors(json.loads(path.read_text()))) == [], path
    assert not validator.is_valid(json.loads(path.read_text()) | {"extra": 1})


def test_the_format_page_names_every_field():
    """Whoever reads it needs no other."""
    page, names = (SHIPPED / FORMAT_PAGE).read_text(), set()
    for definition in vector_schema()["$defs"].values():
        if definition.get("title") in ("Vector", "Step", "Decoded", "Merged", "State", "Row"):
            names |= definition["properties"].keys()
    assert len(names) >= 28
    assert {name for name in names if f"`{name}`" not in page} == set()


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(
            engine,
            marks=aimed_at(v for v in shipped() if engine.profiles.issuperset(v.profiles)),
        )
        for engine in (ReferenceEngine, LedgerEngine)
    ],
)
def test_right_engines_pass(engine):
    """The reference, and counters that share no code with it, fail none of those meant for them."""
    driver = LocalDriver(engine)
    assert failing(driver, shipped()) == {}
    merges = [vector.name for vector in shipped() if vector.profiles == ["merge"]]
    left_out = [
        vector.name for vector in shipped() if not driver.profiles.issuperset(vector.profiles)
    ]
    assert ([] if "merge" in driver.profiles else merges) == left_out


DEEP = [vector for vector in shipped() if vector.rows or vector.name.startswith("attention-")]


@aimed_at(DEEP)
def test_the_whole_implementation_passes():
    """Real caches and attention, all ranks as threads, on the vectors that look at them."""
    driver = ThreadDriver(GpuEngine)
    assert len(DEEP) >= 20
    assert failing(driver, DEEP) == {}
    driver.close()


def _caches(vector):
    """Each cache of a vector: its layout and window, and by step its columns and state."""
    if not vector.config.groups:
        yield vector.config.layout, None, [(step.decoded, step.state) for step in vector.steps]
    for group in vector.config.groups:
        for part in range(len(vector.steps[0].groups[group.name])):
            shown = [step.groups[group.name][part] for step in vector.steps]
            layout = vector.config.layout_of(group)
            yield layout, group.window, [(one.decoded, one.state) for one in shown]


@pytest.mark.holds("OWN-3", "LEN-1", "BAL-1", "PAGE-1", "REP-1", "WIN-2")
def test_expectations_agree_with_the_closed_forms():
    """Owners, lengths and pages of every vector are those of `helix_spec.placement`."""
    checked = 0
    for vector in shipped():
        for layout, window, shown in _caches(vector) if not vector.refused else ():
            events = [(step.event, step.refused) for step in vector.steps]
            checked += _agrees(vector.name, layout, window, zip(events, shown, strict=True))
    assert checked > 1000


def _agrees(name, layout, window, steps):
    """Compare one cache with the closed forms, step by step; how many states were compared."""
    admitted, live, groups, checked = 0, {}, {}, 0
    for (event, refused), (decoded, state) in steps:
        if refused is not None:
            continue
        match event:
            case Admit(id, prompt_len):
                shift = admitted % layout.cp_size if layout.start == "rotated" else 0
                admitted, live[id] = admitted + 1, (prompt_len, 0, shift)
            case Fork(parent, child):
                live[child] = live[parent]
                groups.pop(parent, None)
            case Resume(id):
                prompt_len, steps_done, shift = live[id]
                live[id] = (prompt_len + steps_done, 0, shift)
            case Preempt(id):
                groups.pop(id, None)
            case Release(id):
                del live[id]
                groups.pop(id, None)
            case Decode(ids, query_lens):
                owners = []
                for id, query_len in zip(ids, query_lens, strict=True):
                    prompt_len, steps_done, shift = live[id]
                    owners += [
                        placement.decode_owner(layout, prompt_len, steps_done + place, shift)
                        for place in range(query_len)
                    ]
                    live[id] = (prompt_len, steps_done + query_len, shift)
                    groups[id] = query_len
                assert owners == decoded.owners, name
            case Accept(id, kept):
                prompt_len, steps_done, shift = live[id]
                live[id] = (prompt_len, steps_done - groups.pop(id) + kept, shift)
        for id, lens in state.local_len.items() if state is not None else ():
            prompt_len, steps_done, shift = live[id]
            total, ranks = prompt_len + steps_done, range(layout.cp_size)
            held = [placement.local_len(layout, *live[id][:2], rank, shift) for rank in ranks]
            assert (lens, sum(lens)) == (held, total), name
            assert invariants.bal_1(layout, lens), name
            query = placement.next_query(total, groups.get(id, 0))
            for rank, table in enumerate(state.block_tables[id]):
                pages = placement.pages_needed(layout, prompt_len, steps_done, rank, shift)
                gone = 0
                if window is not None:
                    args = (layout, prompt_len, query, window, rank, shift)
                    gone = placement.pages_dropped(*args)
                assert (len(table), table.count(-1)) == (pages, gone), name
            checked += 1
    return checked


def _examples(name):
    return next(vector for vector in shipped() if vector.name == name)


@pytest.mark.holds("OWN-3", "LEN-1", "BAL-3", "REF-2")
def test_worked_examples_are_in_the_set():
    """The numbers of SPEC.md, section 11 (and of the design), written out once more by hand."""
    owners = {
        name: [step.decoded.owners[0] for step in _examples(name).steps if step.decoded]
        for name in ("spec-11-2-step", "spec-11-2-position", "spec-11-1-pr9757")
    }
    assert owners["spec-11-2-step"] == [0, 0, 1, 1, 2, 2, 3, 3]
    assert owners["spec-11-2-position"] == [2, 3, 3, 0, 0, 1, 1, 2]
    assert [n // 100 for n in range(400)] == owners["spec-11-1-pr9757"]
    lens = {
        name: [step.state.local_len[0] for step in _examples(name).steps if step.state]
        for name in ("spec-11-2-step", "spec-11-2-position", "spec-11-1-before_9757")
    }
    assert (lens["spec-11-2-step"][2], lens["spec-11-2-step"][8]) == ([6, 4, 3, 2], [6, 6, 5, 4])
    assert lens["spec-11-2-position"][2] == [4, 4, 4, 3]
    assert lens["spec-11-1-before_9757"][-1] == [100, 100, 100, 500]
    capacity = [step.refused for step in _examples("spec-11-4-capacity").steps]
    assert capacity == [Reason.OUT_OF_PAGES, None, Reason.OUT_OF_PAGES, None, None]
    rotated = _examples("spec-11-5-rotated-start").steps[4].state.local_len
    assert rotated == {0: [2, 2, 0, 0], 1: [0, 2, 2, 0], 2: [0, 0, 2, 2], 3: [2, 0, 0, 2]}


SEEN_BY_VECTORS = [
    mutant
    for mutant in MUTANTS
    if not (mutant.corner or mutant.far or "on_runs" in mutant.engine)
    and not ("on_groups" in mutant.engine and mutant.tier == "contents")
]
"""Vectors have no positions beyond 2^24, and show no rows and outputs of cache groups."""


@pytest.mark.parametrize(
    "tier",
    [
        pytest.param(
            tier,
            marks=pytest.mark.holds(
                *{n: None for m in SEEN_BY_VECTORS if m.tier == tier for n in m.expected}
            ),
        )
        for tier in ("bookkeeping", "contents", "threads")
    ],
)
def test_vectors_alone_catch_the_mutants(tier):
    """Each wrong engine fails a vector that is there for an invariant of its row, which is named.

    The one mutant of the pool tier leaves out a collective, which takes processes to see; those of
    corners take random traces by the hundred, and those of runs another way of playing.
    """
    survivors, caught = [], set()
    for mutant in SEEN_BY_VECTORS:
        if mutant.tier != tier:
            continue
        engine = load_engine(mutant.engine)
        driver = ThreadDriver(engine) if tier == "threads" else LocalDriver(engine)
        for vector in shipped():
            aimed = set(vector.invariants) & set(mutant.expected)
            if aimed and driver.profiles.issuperset(vector.profiles):
                failure = check_vector(driver, vector, Tally())
                if failure is not None and failure.invariants & set(mutant.expected):
                    caught.add(mutant.name)
                    break
        else:
            survivors.append(mutant.name)
        driver.close()
    assert survivors == []
    assert len(caught) >= 5


class _LeansOnRankZero(LedgerEngine):
    """Counts everything of a second request and later ones on rank 0, and claims it there."""

    def observe(self, ids=None):
        view, totals = super().observe(ids), {id: sum(t) for id, t in self._totals().items()}
        lens = {
            id: held if id == 0 else totals[id] * (self.rank == 0)
            for id, held in view.local_len.items()
        }
        return msgspec.structs.replace(view, local_len=lens)

    def _totals(self):
        ids = self.book.ledger.ids
        return dict(zip(ids, self.book.ledger.held(ids).tolist(), strict=True))


class _RefusedEventsLeak(LedgerEngine):
    """Every refused event takes a page along."""

    leaked = 0

    def apply(self, event):
        outcome = super().apply(event)
        self.leaked += outcome.reason is not None
        return outcome

    def observe(self, ids=None):
        view = super().observe(ids)
        return msgspec.structs.replace(view, free_pages=view.free_pages - self.leaked)


class _Fickle(ReferenceEngine):
    """What comes of a merge differs in its last bits from one time to the next."""

    merges = 0

    def apply(self, event):
        outcome = super().apply(event)
        if not isinstance(event, Merge):
            return outcome
        self.merges += 1
        output = np.array(outcome.output) * (1 + self.merges * 2.0**-50)
        return msgspec.structs.replace(outcome, output=output)


@pytest.mark.holds("BAL-1", "BAL-3", "PAGE-5", "ATT-2")
def test_every_invariant_has_a_vector_that_a_wrong_engine_fails():
    """Those expected of mutants by the mutants (above), the others by engines of this file."""
    of_mutants = {number for mutant in SEEN_BY_VECTORS for number in mutant.expected}
    assert set(NUMBERS) - of_mutants == NO_MUTANT | BLIND
    for number in set(NUMBERS) - BLIND:
        assert any(number in vector.invariants for vector in shipped()), number
    for engine, numbers in (
        (_LeansOnRankZero, {"BAL-1", "BAL-3"}),
        (_RefusedEventsLeak, {"PAGE-5"}),
        (_Fickle, {"ATT-2"}),
    ):
        for number in numbers:
            aimed = [vector for vector in shipped() if number in vector.invariants]
            assert failing(LocalDriver(engine), aimed), number


def _bend(value, by):
    """Another value of the same form: the first number in it is another."""
    match value:
        case [first, *rest]:
            return [_bend(first, by), *rest]
        case dict():
            key = next(iter(value))
            return value | {key: _bend(value[key], by)}
    return value + by


@pytest.mark.parametrize(
    ("name", "part", "field", "expected"),
    [
        pytest.param(name, part, field, set(numbers), marks=pytest.mark.holds(*numbers))
        for name, part, field, *numbers in [
            ("walk-pr9757-c3-t-2", "decoded", "position_ids", "POS-1"),
            ("walk-pr9757-c3-t-2", "decoded", "past_len", "LEN-2"),
            ("walk-pr9757-c3-t-2", "decoded", "visible", "LEN-3"),
            ("walk-pr9757-c3-t-2", "decoded", "owners", "OWN-3"),
            ("walk-pr9757-c3-t-2", "decoded", "slots", "PAGE-2"),
            ("walk-pr9757-c3-t-2", "state", "local_len", "LEN-1"),
            ("walk-pr9757-c3-t-2", "state", "free_pages", "PAGE-3"),
            ("spec-11-9-heads", "decoded", "output", "ATT-1", "ATT-4"),
            ("merge-unequal", "merged", "output", "ATT-1", "ATT-4"),
            ("cache-of-turns", "state", "cached", "OWN-1"),
            ("cache-of-turns", "state", "unwritten_from", "PAGE-4"),
        ]
    ],
)
def test_a_wrong_expectation_is_told_by_its_field(name, part, field, expected):
    """A right engine fails a vector in which one number is wrong, and the rule of it is named."""
    vector = msgspec.to_builtins(_examples(name), str_keys=True, enc_hook=encode_layout)
    step = next(step for step in vector["steps"] if part in step)
    step[part][field] = _bend(step[part][field], -1 if field == "unwritten_from" else 1)
    bent = msgspec.convert(
        vector, type(_examples(name)), str_keys=True, strict=False, dec_hook=decode_layout
    )
    failure = check_vector(LocalDriver(ReferenceEngine), bent, Tally())
    assert failure is not None
    assert expected <= failure.invariants


def call(*words):
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


@pytest.fixture
def folder(tmp_path):
    """A folder with one vector."""
    name = "spec-11-7-copy-on-write.json"
    (tmp_path / name).write_bytes((SHIPPED / name).read_bytes())
    return tmp_path


def test_export_and_check(tmp_path):
    """What is exported is the shipped set; an engine is checked on it, and verdicts have a row."""
    out = tmp_path / "vectors"
    assert call("vectors", "export", out).exit_code == 0
    assert {path.name for path in SHIPPED.iterdir()} == {path.name for path in out.iterdir()}
    result = call("vectors", "check", out, "--engine", "gpu-ledger", "--json", tmp_path / "r")
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "r").read_text().splitlines()[-1])
    assert ("pass", len(shipped()) - len(MERGES)) == (summary["verdict"], summary["traces"])
    (out / "mine.txt").write_text("")
    refused = call("vectors", "export", out)
    assert refused.exit_code == 2
    assert "holds mine.txt, which is not of this set" in refused.output.replace("\n", " ")


@pytest.mark.holds("LEN-2")
def test_a_wrong_engine_fails_the_check(folder):
    """Status 1, the file and its notes, the violated rule, expected and observed."""
    result = call("vectors", "check", folder, "--engine", "suite_testing.broken:Liar")
    assert result.exit_code == 1, result.output
    assert "spec-11-7-copy-on-write.json: SPEC.md, example 11.7" in result.output
    assert "LEN-2 violated at event 3" in result.output
    result = call("vectors", "check", folder, "--engine", "suite_testing.broken:Raiser")
    assert result.exit_code == 3, result.output
    assert "Rank 1 raised RuntimeError" in result.output


class _OnePageForAll(LedgerEngine):
    """Declares placement alone, and writes all requests into the same pages."""

    profiles = frozenset({"placement"})

    def apply(self, event):
        outcome = super().apply(event)
        t = self.book.layout.tokens_per_block
        slots = [slot if slot < 0 else slot % t for slot in outcome.slots]
        return msgspec.structs.replace(outcome, slots=slots)


class _NumpyColumns(LedgerEngine):
    """Answers with arrays where lists belong."""

    def apply(self, event):
        outcome = super().apply(event)
        return msgspec.structs.replace(outcome, position_ids=np.array(outcome.position_ids))


@pytest.mark.holds("OWN-1", "PAGE-2")
def test_slots_show_two_tokens_in_one_place_without_block_tables():
    """Without the profile pages the slots alone tell pages apart."""
    found = failing(LocalDriver(_OnePageForAll), [_examples("walk-pr9757-c3-t-2")])
    assert found == {"walk-pr9757-c3-t-2": {"OWN-1", "PAGE-2"}}


@pytest.mark.holds("LIVE-1")
def test_values_of_wrong_types_are_garbage():
    """They end the vector as an error of the engine, not as one of the suite."""
    found = failing(LocalDriver(_NumpyColumns), [_examples("walk-pr9757-c3-t-2")])
    assert found == {"walk-pr9757-c3-t-2": {"LIVE-1"}}


def test_the_vectors_of_one_layout(tmp_path):
    """An engine that knows one layout is checked on its vectors."""
    words = ("--engine", "gpu-ledger", "--layout", "balanced", "--json", tmp_path / "r")
    assert call("vectors", "check", *words).exit_code == 0
    assert json.loads((tmp_path / "r").read_text().splitlines()[-1])["layouts"] == ["balanced"]


def test_what_an_engine_does_not_declare_is_not_checked(monkeypatch, folder, tmp_path):
    """The vector is named; a check of nothing is an error."""
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "shallow.py").write_text(
        "from helix_conformance.engines.gpu import LedgerEngine\n"
        "class Shallow(LedgerEngine):\n    profiles = frozenset({'placement'})\n"
    )
    result = call("vectors", "check", folder, "--engine", "shallow:Shallow")
    assert result.exit_code == 2, result.output
    assert "not checked: spec-11-7-copy-on-write: the engine does not declare fork" in result.output


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ('"helix-vector/2"', '"helix-vector/3"', "line 2, field $.format: Invalid enum value"),
        ('"layout": "pr9757', '"layout": "pr9758', "field $.layout: it is 'pr9758"),
        ('"prompt_len":2', '"prompt_len":"2"', "field $.steps[0].event.prompt_len: Expected `int`"),
        ('"owners":[0,0,0]', '"owners":[0,0]', "steps[3].decoded.owners: it does not have 3"),
        ('"owners":[0,0,0]', '"owners":[0,0,5]', "steps[3].decoded.owners: a rank is not below 2"),
        ('"free_pages":[2,3]', '"free_pages":[2]', "state.free_pages: it does not have 2"),
        ('"past_len":[[2,0],', '"past_len":[[2],', "a count is not given for each of 2"),
        ('"name": "spec', '"name": "sqec', "field $.name: it is 'sqec"),
        ('"notes"', '"remarks"', "field $: Object contains unknown field `remarks`"),
        ('"steps"', '"steps', "is not JSON"),
    ],
)  # fmt: skip
def test_a_malformed_vector_is_named_by_file_line_and_field(folder, old, new, sentence):
    """Status 2 and a sentence, before any rank starts."""
    path = folder / "spec-11-7-copy-on-write.json"
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(VectorError) as error:
        load_vector(path)
    assert str(path) in str(error.value)
    assert sentence in str(error.value)
    assert call("vectors", "check", folder, "--engine", "reference").exit_code == 2


@pytest.mark.parametrize(
    ("name", "cut", "sentence"),
    [
        ("attention-after-a-fork", lambda step: step["decoded"]["output"].pop(), "for each layer"),
        ("attention-after-a-fork", lambda step: step["decoded"]["output"][0].pop(), "each token"),
        ("attention-after-a-fork", lambda step: step["decoded"]["output"][0][0].pop(), "each head"),
        ("merge-empty", lambda step: step["merged"]["output"].pop(), "for each token"),
        ("merge-empty", lambda step: step["merged"]["output"][0].pop(), "for each head"),
    ],
)
def test_an_output_that_is_missing_is_no_output_that_is_right(tmp_path, name, cut, sentence):
    """A vector must expect all outputs of its tokens: what is not expected would not be judged."""
    path = tmp_path / f"{name}.json"
    vector = json.loads((SHIPPED / path.name).read_text())
    cut(next(step for step in vector["steps"] if "decoded" in step or "merged" in step))
    path.write_text(json.dumps(vector))
    with pytest.raises(VectorError, match=sentence):
        load_vector(path)


def test_the_end_is_judged_by_the_state_after_the_last_step():
    """A vector whose last step shows no state says nothing of the end."""
    for vector in [vector for vector in shipped() if vector.steps and len(vector.steps) < 40]:
        last = msgspec.structs.replace(vector.steps[-1], state=None)
        silent = msgspec.structs.replace(vector, steps=[*vector.steps[:-1], last])
        assert check_vector(LocalDriver(ReferenceEngine), silent, Tally()) is None, vector.name


def test_a_folder_without_vectors_is_refused(tmp_path):
    """Status 2: nothing to check is not a pass."""
    result = call("vectors", "check", tmp_path, "--engine", "reference")
    assert result.exit_code == 2
    assert "holds no vector" in result.output
    assert "is not a folder" in call("vectors", "check", tmp_path / "none").output
