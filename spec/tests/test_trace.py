"""The JSON form of traces: round trip, schema, and errors that say where (SPEC.md section 5)."""

import json
from pathlib import Path
from typing import Any

import jsonschema  # type: ignore[import-untyped]  # it ships no types
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helix_spec.config import Config, ModelShape
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Preempt,
    Release,
    Resume,
    Sampled,
    Skip,
)
from helix_spec.trace import (
    Trace,
    TraceError,
    dump_trace,
    line_of,
    load_trace,
    published_schema,
    too_much,
    trace_schema,
)

CONFIG = Config(layout="pr9757/1:C=2,T=4", pages=[3, 5], max_len=64)
ONE_OF_EACH: list[Event] = [
    Admit(0, 7),
    Decode([0], [2], pad=3),
    Accept(0, 1),
    Sampled([0]),
    Skip([0], [1]),
    Fork(0, 1),
    Preempt(1),
    Resume(1),
    Release(1),
    Merge([[0, None], [3, -90]], [1, 0]),
]
REQUEST_IDS = st.integers(0, 2**53)
LEVELS = st.none() | st.integers(-(2**17), 2**17)
COUNTS = st.integers(-(2**53), 2**53)
EVENTS: st.SearchStrategy[Event] = st.one_of(
    st.builds(Admit, REQUEST_IDS, COUNTS),
    st.builds(Decode, st.lists(REQUEST_IDS), st.lists(COUNTS), COUNTS),
    st.builds(Accept, REQUEST_IDS, COUNTS),
    st.builds(Sampled, st.lists(REQUEST_IDS)),
    st.builds(Skip, st.lists(REQUEST_IDS), st.lists(COUNTS)),
    st.builds(Fork, REQUEST_IDS, REQUEST_IDS),
    st.builds(Release, REQUEST_IDS),
    st.builds(Preempt, REQUEST_IDS),
    st.builds(Resume, REQUEST_IDS),
    st.builds(
        lambda tokens, order: Merge([list(row) for row in zip(*tokens, strict=True)], order),
        st.lists(st.tuples(LEVELS, LEVELS), min_size=1),
        st.permutations([0, 1]),
    ),
)
TRACES = st.builds(
    Trace,
    note=st.text(st.characters(codec="utf-8")),
    config=st.just(CONFIG),
    events=st.lists(EVENTS, max_size=8),
)


@settings(max_examples=50)
@given(trace=TRACES)
def test_traces_round_trip(trace: Trace, tmp_path_factory: pytest.TempPathFactory) -> None:
    """What is dumped is loaded again, wrong counts and odd notes included."""
    path = tmp_path_factory.getbasetemp() / "round_trip.json"
    path.write_bytes(dump_trace(trace))
    assert load_trace(path) == trace


def test_a_dumped_trace_has_one_event_a_line() -> None:
    """A difference between two traces shows as a difference of lines."""
    lines = dump_trace(Trace(config=CONFIG, events=ONE_OF_EACH)).decode().splitlines()
    assert sum('"event":' in line for line in lines) == len(ONE_OF_EACH)


def test_the_published_schema_is_the_generated_one() -> None:
    """`python -m helix_spec.trace` was run after the last change of a type."""
    assert published_schema() == trace_schema()


def test_the_schema_is_valid_and_describes_dumped_traces() -> None:
    """A stranger's validator takes what we write."""
    schema = published_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    jsonschema.validate(json.loads(dump_trace(Trace(config=CONFIG, events=ONE_OF_EACH))), schema)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"kept": 1', '"kept": "1"'),
        ('"kept": 1', '"held": 1'),
        ('"event": "fork"', '"event": "split"'),
        ('"id": 0', '"id": -1'),
        ("helix-trace/2", "helix-trace/3"),
        ('"poison": true', '"poison": true, "colour": 3'),
    ],
)
def test_the_schema_refuses_what_the_loader_refuses(tmp_path: Path, old: str, new: str) -> None:
    """Both doors are closed to the same texts."""
    text = dump_trace(Trace(config=CONFIG, events=ONE_OF_EACH)).decode().replace(old, new, 1)
    path = tmp_path / "bad.json"
    path.write_text(text)
    with pytest.raises(TraceError):
        load_trace(path)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(json.loads(text), published_schema())


@pytest.mark.parametrize(
    ("old", "new", "field", "complaint"),
    [
        ('"kept": 1', '"kept": "one"', "$.events[2].kept", "Expected `int`"),
        ('"kept": 1', '"kept": 1.5', "$.events[2].kept", "Expected `int`"),
        ('"kept": 1', '"held": 1', "$.events[2]", "unknown field `held`"),
        (', "kept": 1', "", "$.events[2]", "missing required field `kept`"),
        ('"event": "fork"', '"event": "split"', "$.events[5].event", "'split'"),
        ('[2], "pad"', '[2.5], "pad"', "$.events[1].query_lens[0]", "Expected"),
        ('"id": 0', f'"id": {2**53 + 1}', "$.events[0].id", "<= 9007199254740992"),
        ("helix-trace/2", "helix-trace/3", "$.format", "'helix-trace/3'"),
        ('"max_len": 64', '"max_len": 0', "$.config.max_len", ">= 1"),
        ("-90", "-131073", "$.events[9].levels[1][1]", ">= -131072"),
        ("[3, -90]", "[3]", "$.events[9]", "a level for each of its tokens"),
        ("[1, 0]", "[1, 1]", "$.events[9]", "each of its 2 partials once"),
        ("[[0, null], [3, -90]]", "[[0, 1]]", "$.events[9]", "each of its 1 partials once"),
        ('"float32"', '"float8"', "$.config.model.dtype", "'float8'"),
    ],
)
def test_a_bad_value_is_named_by_file_line_and_field(
    tmp_path: Path, old: str, new: str, field: str, complaint: str
) -> None:
    """The message leads to the place in the file, and says what is wrong there."""
    text = dump_trace(Trace(config=CONFIG, events=ONE_OF_EACH)).decode()
    path = tmp_path / "bad.json"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    line = text.count("\n", 0, text.index(old)) + 1
    assert str(caught.value).startswith(f"{path}, line {line}, field {field}: ")
    assert complaint in str(caught.value)


def test_a_merge_of_too_few_partials_is_named(tmp_path: Path) -> None:
    """A trace supplies every cp_rank with a partial."""
    path = tmp_path / "bad.json"
    path.write_bytes(dump_trace(Trace(config=CONFIG, events=[Merge([[0]], [0])])))
    with pytest.raises(
        TraceError, match=r"\$\.events\[0\]\.levels: There are 1 partials; .* 2 cp_r"
    ):
        load_trace(path)


@pytest.mark.parametrize(
    ("layout", "line", "field", "complaint"),
    [
        ("pr9757/1:C=3,T=4", 4, "$.config", "pages lists 2 pool sizes for cp_size 3"),
        ("pr9757/1:C=2,T=04", 5, "$.config.layout", "is not canonical"),
    ],
)
def test_a_configuration_that_no_engine_may_start_with_is_named(
    tmp_path: Path, layout: str, line: int, field: str, complaint: str
) -> None:
    """A trace whose configuration is bad is refused before anything runs."""
    text = dump_trace(Trace(config=CONFIG, events=ONE_OF_EACH)).decode()
    path = tmp_path / "bad.json"
    path.write_text(text.replace(str(CONFIG.layout), layout))
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}, line {line}, field {field}: ")
    assert complaint in str(caught.value)


@pytest.mark.parametrize(
    ("content", "where"),
    [
        (b"", "line 1"),
        (b'{"format": "helix-trace/1",\n "note": "cut of', "line 2"),
        (b'{"format": "helix-trace/1",\n "note": tru }', "line 2"),
        (b'{"note": "\xff\xfe"}', "line 1"),
        (b"[1, 2]", "line 1, field $"),
        (b"[" * 100_000, "line 1"),
    ],
)
def test_what_is_no_json_object_is_named_by_file_and_line(
    tmp_path: Path, content: bytes, where: str
) -> None:
    """A file that no path into the document can name is named by its line."""
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(TraceError) as caught:
        load_trace(path)
    assert str(caught.value).startswith(f"{path}, {where}")


@pytest.mark.parametrize(
    "content",
    [
        b'{"format": "helix-trace/3", "note": "\xff"}',
        b'{"format": "helix-trace/3",\n "events": [',
        b'{"format": "helix-trace/3", "events": ' + b"[" * 100_000,
    ],
)
def test_a_bad_value_before_broken_text_is_still_a_trace_error(
    tmp_path: Path, content: bytes
) -> None:
    """The first fault is reported even where the rest of the file is no JSON or no text."""
    path = tmp_path / "bad.json"
    path.write_bytes(content)
    with pytest.raises(TraceError, match=r"line 1, field \$\.format"):
        load_trace(path)


@pytest.mark.parametrize(
    ("config", "events", "field", "complaint"),
    [
        ({"pages": [2**31 - 1, 1]}, [], "$.config.pages", "2147483648 pages in all pools"),
        ({"tp_size": 4096}, [], "$.config", "8192 ranks"),
        ({"layers": 2**31 - 1}, [], "$.config.model", "numbers in a page; .* 268435456"),
        ({"layout": "pr9757/1:C=2,T=999999999"}, [], "$.config.model", "numbers in a page"),
        ({}, [Admit(0, 2**31 - 1)], "$.events[0]", "536870912 tokens by now, 4 of a prompt"),
        ({"layout": "vllm_dcp/1:C=2,T=4,I=1"}, [Admit(0, 2**24)], "$.events[0]", "16777216 tokens"),
        ({}, [Admit(0, 1), Decode([0], [2**24])], "$.events[1]", "16777217 tokens"),
        ({}, [Admit(0, 1), Skip([0], [2**24])], "$.events[1]", "16777217 tokens"),
        ({}, [Admit(0, 1), Admit(0, 2**26)], "$.events[1]", "16777216 tokens"),
        ({}, [Admit(0, 2**24), Fork(0, 1), Fork(1, 2)], "$.events[2]", "12582912 tokens"),
        ({}, [Admit(id, 1) for id in range(4097)], "$.events[4096]", "4097 requests by now"),
    ],
)
def test_a_file_that_asks_for_too_much_is_refused(
    tmp_path: Path, config: dict[str, Any], events: list[Event], field: str, complaint: str
) -> None:
    """A stranger's file cannot fill the memory; the message names field and limit."""
    model = ModelShape(q_heads=8192, kv_heads=4096, layers=config.pop("layers", 1), head_dim=2)
    wanted = {"layout": CONFIG.layout, "pages": [9, 9], "max_len": 2**31 - 1, "model": model}
    path = tmp_path / "large.json"
    path.write_bytes(dump_trace(Trace(config=Config(**wanted | config), events=events)))
    with pytest.raises(TraceError, match=complaint) as caught:
        load_trace(path)
    assert f"field {field}: " in str(caught.value)


def test_a_long_prompt_counts_by_its_pieces_unless_contents_are_looked_at() -> None:
    """Positions beyond 2^24 may be asked for; their rows may not."""
    config = Config(layout="pr9757/1:C=2,T=256", pages=[2**16] * 2, max_len=2**25)
    events = [Admit(0, 2**24), Decode([0], [2]), Fork(0, 1)]
    assert too_much(config, events) is None
    asked = "Requests may have 16777216 tokens by now; a file may ask for 8388608."
    assert too_much(config, events, contents=True) == ("$.events[0]", asked)


def test_what_is_large_and_refused_for_its_counts_may_be_asked(tmp_path: Path) -> None:
    """Counts that no request can reach are wrong on purpose; requests that end make room."""
    turns = [event for _ in range(9) for event in (Admit(0, 2**22), Release(0))]
    wrong = [Admit(1, 2**53), Decode([7], [2**53]), Decode([7], [-1])]
    config = Config(layout=CONFIG.layout, pages=[2**22, 2**22], max_len=2**22)
    trace = Trace(config=config, events=[*turns, *wrong])
    path = tmp_path / "wrong.json"
    path.write_bytes(dump_trace(trace))
    assert load_trace(path) == trace


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    """A missing file is a TraceError like any other."""
    with pytest.raises(TraceError, match=r"absent\.json: cannot be read"):
        load_trace(tmp_path / "absent.json")


def test_a_missing_member_points_at_the_object_around_it() -> None:
    """A path that leaves the document ends at its last part that exists."""
    text = '{"a":\n {"b": 1}}'
    assert [line_of(text, path) for path in ("$", "$.a", "$.a.b", "$.a.c")] == [1, 2, 2, 2]


@pytest.mark.parametrize("text", ['{"a": 1,\n[1]: 2}', '{"a": 1,\n{}: 2}', '{"a":', "", "{", " "])
def test_the_line_of_a_field_in_what_is_no_json(text: str) -> None:
    """What follows a fault may be anything; the members before it count."""
    assert line_of(text, "$.a") == 1
    assert line_of(text, "$.b.c") in (1, 2)
