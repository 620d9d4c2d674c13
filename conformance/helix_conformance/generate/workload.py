"""Real request lengths: reading published traces, and batching them into events.

Two public formats are read: Mooncake's JSON lines (`input_length`, `output_length`) and Azure's
CSV (`ContextTokens`, `GeneratedTokens`). `schedule` plays such requests against any engine that
answers events.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import msgspec

from helix_spec.events import Admit, Decode, Event, Reason, Release

Length = Annotated[int, msgspec.Meta(ge=1, le=2**31 - 1)]


class WorkloadError(ValueError):
    """A file that is no workload, or a workload that the engine cannot serve, as a sentence."""


@dataclass(frozen=True, slots=True)
class Request:
    """Lengths of one request.

    Parameters
    ----------
    prompt_len : int
        Tokens of the prompt.
    output_len : int
        Tokens that are decoded.
    """

    prompt_len: int
    output_len: int


def read_workload(path: Path) -> list[Request]:
    """Return the requests of a file, in order of arrival; the suffix says which format it has.

    A CSV file that was cut off inside its very last number looks whole: Azure's ends without a
    newline.

    Parameters
    ----------
    path : Path
        A file that ends in `.jsonl` (Mooncake) or `.csv` (Azure).

    Returns
    -------
    list of Request
        At least one.

    Raises
    ------
    WorkloadError
        When the file is not wholly good; the sentence names file, line and field.

    Examples
    --------
    >>> from tempfile import TemporaryDirectory
    >>> with TemporaryDirectory() as folder:
    ...     path = Path(folder) / "one.jsonl"
    ...     _ = path.write_text('{"input_length": 900, "output_length": 40}')
    ...     read_workload(path)
    [Request(prompt_len=900, output_len=40)]
    """
    readers = {".jsonl": _read_json_lines, ".csv": _read_csv}
    reader = readers.get(path.suffix)
    if reader is None:
        raise WorkloadError(f"{path}: a workload file ends in {' or '.join(readers)}.")
    try:
        lines = path.read_bytes().splitlines()
    except OSError as error:
        raise WorkloadError(f"{path}: cannot be read: {error.strerror}.") from error
    requests = list(reader(path, lines))
    if not requests:
        raise WorkloadError(f"{path}, line 1: there is no request in the file.")
    return requests


class _MooncakeLine(msgspec.Struct):
    input_length: Length
    output_length: Length


def _read_json_lines(path: Path, lines: list[bytes]) -> Iterator[Request]:
    decoder = msgspec.json.Decoder(_MooncakeLine)
    for number, line in enumerate(lines, start=1):
        with _faults_named(f"{path}, line {number}"):
            row = decoder.decode(line)
        yield Request(row.input_length, row.output_length)


def _read_csv(path: Path, lines: list[bytes]) -> Iterator[Request]:
    """The cells are bare numbers and time stamps: nothing is ever quoted."""
    header = lines[0].split(b",") if lines else []
    columns = [_column(path, header, name) for name in ("ContextTokens", "GeneratedTokens")]
    decoder = msgspec.json.Decoder(Length)
    for number, line in enumerate(lines[1:], start=2):
        cells = line.split(b",")
        if len(cells) != len(header):
            raise WorkloadError(
                f"{path}, line {number}: {len(cells)} fields where the header has {len(header)}."
            )
        lengths = []
        for column in columns:
            with _faults_named(f"{path}, line {number}, field {header[column].decode()}"):
                lengths.append(decoder.decode(cells[column]))
        yield Request(*lengths)


def _column(path: Path, header: list[bytes], name: str) -> int:
    if name.encode() not in header:
        raise WorkloadError(f"{path}, line 1, field {name}: the header has no such column.")
    return header.index(name.encode())


@contextmanager
def _faults_named(place: str) -> Iterator[None]:
    """Turns msgspec's complaints into WorkloadErrors that begin with this place."""
    try:
        yield
    except (msgspec.DecodeError, RecursionError) as error:
        message, _, field = str(error).partition(" - at `$.")
        place = f"{place}, field {field.rstrip('`')}" if field else place
        raise WorkloadError(f"{place}: {message}.") from error


def scaled(requests: Sequence[Request], divisor: int) -> list[Request]:
    """Return the same workload with both lengths divided, rounded up.

    Parameters
    ----------
    requests : sequence of Request
        The workload.
    divisor : int
        At least 1.

    Returns
    -------
    list of Request
        As many as there were, in the same order.

    Examples
    --------
    >>> scaled([Request(900, 40)], 64)
    [Request(prompt_len=15, output_len=1)]
    """
    return [
        Request(-(-request.prompt_len // divisor), -(-request.output_len // divisor))
        for request in requests
    ]


def schedule(
    requests: Sequence[Request], *, batch_limit: int, max_steps: int
) -> Generator[Event, Reason | None, None]:
    """Yield the events of a small continuous-batching scheduler.

    Requests arrive in order, and their ids are their arrival numbers. Each round admits waiting
    requests while fewer than `batch_limit` are live, decodes one token for all live ones, and
    releases those that have min(output_len, max_steps) tokens. When the pool is full an admission
    waits, and a decode evicts the youngest request, which starts afresh later. Nobody is admitted
    before some request has finished: the pages an eviction gives back belong to the older ones.

    Parameters
    ----------
    requests : sequence of Request
        The workload, in order of arrival.
    batch_limit : int
        The most live requests, at least 1.
    max_steps : int
        The most tokens that are decoded of one request, at least 1.

    Raises
    ------
    WorkloadError
        When a request does not fit an empty pool, and for any other refusal.
    ValueError
        When a limit is less than 1.

    Yields
    ------
    Event
        Admissions, decodes and releases; what is sent back is the Reason of a refusal, or None.

    Examples
    --------
    >>> for event in schedule([Request(9, 2)], batch_limit=1, max_steps=8):
    ...     print(event)
    Admit(id=0, prompt_len=9)
    Decode(ids=[0], query_lens=[1], pad=0)
    Decode(ids=[0], query_lens=[1], pad=0)
    Release(id=0)
    """
    if batch_limit < 1 or max_steps < 1:
        raise ValueError(f"batch_limit {batch_limit} and max_steps {max_steps} must be at least 1.")
    waiting = deque(range(len(requests)))
    to_decode: dict[int, int] = {}  # of each live request, the oldest first
    pool_is_full = False
    while waiting or to_decode:
        while waiting and len(to_decode) < batch_limit and not pool_is_full:
            id = waiting[0]
            event = Admit(id, requests[id].prompt_len)
            reason = yield event
            pool_is_full = _is_full(event, reason, alone=not to_decode)
            if not pool_is_full:
                to_decode[id] = min(requests[id].output_len, max_steps)
                waiting.popleft()

        step = Decode(list(to_decode), [1] * len(to_decode))
        reason = yield step
        while _is_full(step, reason, alone=len(to_decode) == 1):
            pool_is_full = True
            youngest, _ = to_decode.popitem()
            waiting.appendleft(youngest)
            yield from _release(youngest)
            step = Decode(list(to_decode), [1] * len(to_decode))
            reason = yield step

        for id in step.ids:
            to_decode[id] -= 1
            if to_decode[id] == 0:
                del to_decode[id]
                yield from _release(id)
                pool_is_full = False


def _is_full(event: Admit | Decode, reason: Reason | None, *, alone: bool) -> bool:
    """Whether the event was refused for want of pages that other requests hold."""
    if reason is None:
        return False
    if reason != Reason.OUT_OF_PAGES:
        raise WorkloadError(f"{event} was refused: {reason}.")
    if alone:
        raise WorkloadError(f"{event} was refused with nothing else live: the pool is too small.")
    return True


def _release(id: int) -> Generator[Event, Reason | None, None]:
    reason = yield Release(id)
    if reason is not None:
        raise WorkloadError(f"{Release(id)} was refused: {reason}.")
