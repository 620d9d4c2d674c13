"""Workloads: reading request lengths, and the scheduler that turns them into events."""

from collections.abc import Callable
from math import ceil
from pathlib import Path
from random import Random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_conformance.generate.workload import (
    Request,
    WorkloadError,
    read_workload,
    scaled,
    schedule,
)
from helix_spec.events import Admit, Decode, Event, Reason, Release

MOONCAKE = (
    b'{"timestamp": 0, "input_length": 12, "output_length": 3, "hash_ids": [0, 1]}\n'
    b'{"timestamp": 9, "input_length": 1, "output_length": 2147483647, "hash_ids": []}\n'
)
AZURE = (
    b"TIMESTAMP,ContextTokens,GeneratedTokens\r\n"
    b"2023-11-16 18:17:03.9799600,12,3\r\n"
    b"2023-11-16 18:17:04.0319600,1,2147483647"
)


@pytest.mark.parametrize(("name", "content"), [("a.jsonl", MOONCAKE), ("a.csv", AZURE)])
def test_both_formats_give_the_requests_in_order(tmp_path: Path, name: str, content: bytes) -> None:
    """Lengths are read from their fields, whatever else stands beside them."""
    path = tmp_path / name
    path.write_bytes(content)
    assert [Request(12, 3), Request(1, 2**31 - 1)] == read_workload(path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b"", "line 1: there is no request"),
        ("a.csv", b"", "line 1, field ContextTokens: the header has no such column"),
        ("a.csv", AZURE.splitlines()[0], "line 1: there is no request"),
        ("a.jsonl", MOONCAKE[:-20], "line 2: Input data was truncated"),
        ("a.csv", AZURE[:-12], "line 3: 2 fields where the header has 3"),
        ("a.csv", AZURE[:-10], "line 3, field GeneratedTokens: Input data was truncated"),
        ("a.jsonl", MOONCAKE.replace(b"12", b"-12"), "line 1, field input_length: Expected"),
        ("a.csv", AZURE.replace(b",12", b",-12"), "line 2, field ContextTokens: Expected"),
        ("a.jsonl", MOONCAKE.replace(b" 3,", b" 0,"), "line 1, field output_length: Expected"),
        ("a.csv", AZURE.replace(b",3", b",0"), "line 2, field GeneratedTokens: Expected"),
        ("a.jsonl", MOONCAKE.replace(b"3647", b"3648"), "line 2, field output_length: Expected"),
        ("a.csv", AZURE.replace(b"3647", b"3648"), "line 3, field GeneratedTokens: Expected"),
        ("a.csv", AZURE + b"0" * 5000, "line 3, field GeneratedTokens: "),
        ("a.jsonl", MOONCAKE.replace(b"12", b"12.0"), "line 1, field input_length: Expected"),
        ("a.csv", AZURE.replace(b",12", b",12.0"), "line 2, field ContextTokens: Expected"),
        ("a.jsonl", MOONCAKE.replace(b"12", b'"12"'), "line 1, field input_length: Expected"),
        ("a.csv", AZURE.replace(b",12", b',"12"'), "line 2, field ContextTokens: Expected"),
        ("a.csv", AZURE.replace(b",12", b",1_2"), "line 2, field ContextTokens: "),
        ("a.csv", AZURE.replace(b",12", b",\xff"), "line 2, field ContextTokens: "),
        (
            "a.jsonl",
            MOONCAKE.replace(b"input_length", b"input_len", 1),
            "line 1: Object missing required field `input_length`",
        ),
        (
            "a.csv",
            AZURE.replace(b"GeneratedTokens", b"Generated"),
            "line 1, field GeneratedTokens: the header has no such column",
        ),
        ("a.csv", AZURE.replace(b"\r\n2023", b"\r\n\r\n2023"), "line 2: 1 fields where"),
        ("a.jsonl", MOONCAKE.replace(b"\n", b"\n\n"), "line 2: "),
        ("a.jsonl", b"[12, 3]\n", "line 1: Expected `object`"),
    ],
)
def test_a_bad_file_is_refused_with_file_line_and_field(
    tmp_path: Path, name: str, content: bytes, message: str
) -> None:
    """Nothing is guessed and nothing left out: one bad line refuses the file."""
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(WorkloadError) as caught:
        read_workload(path)
    assert str(caught.value).startswith(f"{path}, {message}")


def test_an_unknown_suffix_is_refused_without_reading(tmp_path: Path) -> None:
    """The format is never guessed from the contents."""
    with pytest.raises(WorkloadError, match=r"a\.json: a workload file ends in \.jsonl or \.csv"):
        read_workload(tmp_path / "a.json")


def test_an_absent_file_is_named(tmp_path: Path) -> None:
    """A file that cannot be read is a WorkloadError like any other."""
    with pytest.raises(WorkloadError, match=r"a\.csv: cannot be read"):
        read_workload(tmp_path / "a.csv")


LENGTHS = st.integers(1, 2**31 - 1)


@given(LENGTHS, LENGTHS, LENGTHS)
def test_scaled_lengths_are_rounded_up(prompt_len: int, output_len: int, divisor: int) -> None:
    """Scaling keeps at least one token of each kind."""
    expected = Request(max(1, ceil(prompt_len / divisor)), max(1, ceil(output_len / divisor)))
    assert scaled([Request(prompt_len, output_len)], divisor) == [expected]


class CountingPool:
    """An engine that only counts tokens; it may also refuse at random while others are live."""

    def __init__(self, tokens: int, *, refusals: Callable[[], bool] = lambda: False) -> None:
        self.tokens = tokens
        self.refusals = refusals
        self.live: dict[int, int] = {}
        self.decoded: dict[int, int] = {}
        self.log: list[Event] = []
        self.finished: list[int] = []

    def apply(self, event: Event) -> Reason | None:
        """The answer to an event; accepted ones are logged."""
        match event:
            case Admit(id, prompt_len):
                assert id not in self.live
                if self._full(prompt_len, others=len(self.live)):
                    return Reason.OUT_OF_PAGES
                self.live[id], self.decoded[id] = prompt_len, 0
            case Decode(ids, query_lens):
                assert (list(self.live), [1] * len(ids)) == (ids, query_lens)
                if self._full(len(ids), others=len(ids) - 1):
                    return Reason.OUT_OF_PAGES
                for id in ids:
                    self.live[id] += 1
                    self.decoded[id] += 1
            case Release(id):
                del self.live[id]
            case _:
                pytest.fail(f"{event} is none of the scheduler's events")
        self.log.append(event)
        return None

    def _full(self, more: int, *, others: int) -> bool:
        needs_more = sum(self.live.values()) + more > self.tokens
        return needs_more or (others > 0 and self.refusals())


def play(pool: CountingPool, requests: list[Request], batch_limit: int, max_steps: int) -> None:
    """Run the schedule against the pool to its end."""
    events = schedule(requests, batch_limit=batch_limit, max_steps=max_steps)
    reason = None
    while True:
        try:
            event = events.send(reason)
        except StopIteration:
            return
        reason = pool.apply(event)
        if isinstance(event, Release):
            full_length = min(requests[event.id].output_len, max_steps)
            if pool.decoded[event.id] == full_length:
                pool.finished.append(event.id)


REQUESTS = st.lists(st.builds(Request, st.integers(1, 9), st.integers(1, 6)), max_size=12)


@given(REQUESTS, st.integers(1, 4), st.integers(1, 5), st.integers(15, 30), st.integers(0, 2**16))
def test_every_request_is_served_whole_exactly_once(
    requests: list[Request], batch_limit: int, max_steps: int, tokens: int, seed: int
) -> None:
    """Under any back-pressure all finish at full length, first admitted in order of arrival."""
    random = Random(seed)
    pool = CountingPool(tokens, refusals=lambda: random.random() < 0.3)
    play(pool, requests, batch_limit, max_steps)
    assert pool.live == {}
    assert list(range(len(requests))) == sorted(pool.finished)
    admitted = [event.id for event in pool.log if isinstance(event, Admit)]
    assert list(range(len(requests))) == list(dict.fromkeys(admitted))


@given(REQUESTS, st.integers(1, 4), st.integers(15, 30))
def test_batches_never_pass_the_limit(
    requests: list[Request], batch_limit: int, tokens: int
) -> None:
    """No decode has more requests than the limit; without pressure they are filled to it."""
    pool = CountingPool(tokens)
    play(pool, requests, batch_limit, max_steps=5)
    batches = [event.ids for event in pool.log if isinstance(event, Decode)]
    assert all(len(ids) <= batch_limit for ids in batches)
    roomy = CountingPool(10**6)
    play(roomy, requests, batch_limit, max_steps=5)
    first = next((event.ids for event in roomy.log if isinstance(event, Decode)), [])
    assert list(range(min(batch_limit, len(requests)))) == first


def test_the_youngest_is_evicted_and_waits_until_another_finishes() -> None:
    """A full pool costs the youngest its place, not the oldest; nobody else slips in."""
    pool = CountingPool(7)
    play(pool, [Request(2, 3), Request(2, 2), Request(1, 1)], batch_limit=2, max_steps=9)
    assert pool.log == [
        Admit(0, 2), Admit(1, 2), Decode([0, 1], [1, 1]), Release(1), Decode([0], [1]),
        Decode([0], [1]), Release(0),
        Admit(1, 2), Admit(2, 1), Decode([1, 2], [1, 1]), Release(2), Decode([1], [1]), Release(1),
    ]  # fmt: skip


def test_a_refused_admission_waits_until_another_finishes() -> None:
    """Later requests do not overtake it, though they would fit."""
    pool = CountingPool(6)
    play(pool, [Request(2, 2), Request(5, 1), Request(2, 1)], batch_limit=3, max_steps=9)
    assert pool.log == [
        Admit(0, 2), Decode([0], [1]), Decode([0], [1]), Release(0),
        Admit(1, 5), Decode([1], [1]), Release(1),
        Admit(2, 2), Decode([2], [1]), Release(2),
    ]  # fmt: skip


@pytest.mark.parametrize("request_", [Request(9, 1), Request(8, 2)])
def test_a_request_that_fits_no_empty_pool_ends_the_run(request_: Request) -> None:
    """Neither its prompt nor its decoded tokens can be waited for."""
    with pytest.raises(WorkloadError, match="with nothing else live: the pool is too small"):
        play(CountingPool(8), [Request(1, 1), request_], batch_limit=2, max_steps=9)


@pytest.mark.parametrize("after", [0, 1, 2])
def test_any_other_refusal_ends_the_run_with_a_sentence(after: int) -> None:
    """The event and its reason are named, be it the admit, the decode or the release."""
    events = schedule([Request(3, 1)], batch_limit=1, max_steps=1)
    event = next(events)
    for _ in range(after):
        event = events.send(None)
    with pytest.raises(WorkloadError, match="was refused: too_long") as caught:
        events.send(Reason.TOO_LONG)
    assert str(caught.value).startswith(f"{event} ")


@pytest.mark.parametrize(("batch_limit", "max_steps"), [(0, 1), (1, 0)])
def test_limits_below_one_are_errors(batch_limit: int, max_steps: int) -> None:
    """Impossible arguments raise."""
    with pytest.raises(ValueError, match="must be at least 1"):
        next(schedule([Request(1, 1)], batch_limit=batch_limit, max_steps=max_steps))
