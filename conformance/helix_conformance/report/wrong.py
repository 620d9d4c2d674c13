"""What the ranks answered to the event that fails, beside what the reference says."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from helix_conformance.drive.driver import Answer
from helix_conformance.expect.expectation import Expectation, outcome_of
from helix_conformance.expect.recorder import ModelState, Recorder
from helix_conformance.report.diagram import Film, Wrong, film
from helix_conformance.report.stream import FailureLine
from helix_spec.config import Config, config_problem
from helix_spec.engine import PROFILES, Outcome
from helix_spec.events import Decode, Reason, ids_of


@dataclass(frozen=True, slots=True)
class Cell:
    """One value of one rank's answer."""

    expected: Any
    observed: Any
    wrong: bool


@dataclass(frozen=True, slots=True)
class Scene:
    """A failure, ready to be drawn; `film` is None where no rank may start."""

    failure: FailureLine
    film: Film | None
    columns: list[str]
    ranks: list[dict[str, Cell]]
    """Of each global rank, its answer by column."""
    marks: list[Wrong]


def scene(failure: FailureLine) -> Scene:
    """The failure with its film, and all answers compared."""
    trace, event = failure.trace, failure.event
    if config_problem(trace.config) is not None:
        return Scene(failure, None, [], [], [])
    declared, layout = failure.declared or PROFILES, trace.config.layout
    recorder, last = Recorder(trace.config, declared), None
    for one in trace.events if event is None else trace.events[: event + 1]:
        last = recorder.next(one)
    expected = [outcome_of(last, rank, layout) for rank in range(layout.cp_size)]
    ranks = [
        _row(
            answer,
            expected[rank % layout.cp_size],
            recorder.state,
            rank % layout.cp_size,
            layout.tokens_per_block,
            judged=event is not None,
            lengths="lengths" in failure.declared,
        )
        for rank, answer in enumerate(failure.answers)
    ]
    columns = list(dict.fromkeys(name for row in ranks for name in row))
    marks = []
    if event is not None and last is not None:
        marks = _merged(_marks(failure, last, recorder.state, expected))
    drawn = film(trace, wrong=marks, at=event, declared=declared)
    return Scene(failure, drawn, columns, ranks, marks)


def _row(
    answer: Answer,
    expected: Outcome,
    state: ModelState,
    cp_rank: int,
    t: int,
    *,
    judged: bool,
    lengths: bool,
) -> dict[str, Cell]:
    """One rank's answer by column; with `lengths` an engine has to know them."""
    outcome, row = answer.outcome, dict[str, Cell]()
    if judged:
        row["answer"] = _cell(_said(expected.reason), _said(outcome.reason))
        if expected.reason is None and outcome.reason is None:
            for name in ("past_len", "position_ids", "active"):
                if lengths or name != "past_len":
                    row[name] = _cell(getattr(expected, name), getattr(outcome, name))
            offsets, told = ([_offset(s, t) for s in one.slots] for one in (expected, outcome))
            row["slots"] = Cell(offsets, outcome.slots, offsets != told)
    if answer.view is not None and lengths:
        held = {id: state.lengths(id)[cp_rank] for id in answer.view.local_len if id in state.live}
        row["local_len"] = _cell(held, answer.view.local_len)
    return row


def _offset(slot: int, t: int) -> int:
    """Physical pages are the engine's own affair: what can be compared is the offset in one."""
    return slot % t if slot >= 0 else -1


def _said(reason: Reason | None) -> str:
    return "accepted" if reason is None else f"refused: {reason}"


def _cell(expected: Any, observed: Any) -> Cell:
    return Cell(expected, observed, expected != observed)


def _marks(
    failure: FailureLine, last: Expectation, state: ModelState, expected: Sequence[Outcome]
) -> Iterator[Wrong]:
    """Tokens and ranks on which an answer is wrong, in the requests of the failing event."""
    cp = len(expected)
    for rank, answer in enumerate(failure.answers):
        wanted, told, cp_rank = expected[rank % cp], answer.outcome, rank % cp
        if wanted.reason is None and told.reason is None:
            yield from _token_marks(failure.trace.config, last, rank, wanted, told)
        if answer.view is not None and "lengths" in failure.declared:
            for id, count in answer.view.local_len.items():
                held = state.lengths(id)[cp_rank] if id in state.requests else 0
                if count != held:
                    what = f"rank {rank} reports local_len {count} of request {id}; it is {held}"
                    yield Wrong(id, cp_rank, None, "", what)
    assert failure.event is not None
    named = ids_of(failure.trace.events[failure.event])
    if failure.rank is not None and failure.engine_failure is not None:
        for id in named:
            yield Wrong(id, failure.rank % cp, None, "", failure.engine_failure)
    numbers: dict[tuple[int, int | None, str], list[str]] = {}
    for one in failure.violations:
        if one.rank is not None:
            numbers.setdefault((one.rank, one.request, one.message), []).append(one.invariant)
    for (rank, request, message), broken in numbers.items():
        for id in named if request is None else [request]:
            what = f"{', '.join(dict.fromkeys(broken))} on rank {rank}: {message}"
            yield Wrong(id, rank % cp, None, "", what)


def _token_marks(
    config: Config, last: Expectation, rank: int, wanted: Outcome, told: Outcome
) -> Iterator[Wrong]:
    """New tokens that a rank claims or writes and should not, or should and does not."""
    cp_rank, t = rank % config.layout.cp_size, config.layout.tokens_per_block
    assert isinstance(last.event, Decode) and last.decoded is not None
    ids = [
        id for id, n in zip(last.event.ids, last.event.query_lens, strict=True) for _ in range(n)
    ]
    told_of = zip(wanted.active, told.active, wanted.slots, told.slots, strict=False)
    extra = Counter[int]()
    for token, (right, claimed, slot, written) in enumerate(told_of):
        id, position = ids[token], last.decoded.position_ids[token]
        problem = _token_problem(right, claimed, _offset(slot, t), _offset(written, t))
        if problem:
            held = last.decoded.visible[token][cp_rank]
            index = held - 1 if right else held + extra[id]
            extra[id] += not right
            what = f"rank {rank} {problem} position {position} of request {id}"
            what += f"; its owner is rank {last.decoded.owners[token]}"
            yield Wrong(id, cp_rank, index, str(position), what)


def _token_problem(right: bool, claimed: bool, offset: int, written: int) -> str:
    """What a rank does with a new token that it should not do; empty when all is well."""
    if claimed != right:
        return "claims" if claimed else "does not claim"
    if written == offset:
        return ""
    if offset < 0 or written < 0:
        return "names no slot for" if written < 0 else "names a slot for"
    return f"names a slot with offset {written}, not {offset}, for"


def _merged(marks: Iterator[Wrong]) -> list[Wrong]:
    """One mark for each place, with all that is wrong there."""
    places: dict[tuple[int, int, int | None], list[Wrong]] = {}
    for mark in marks:
        places.setdefault((mark.request, mark.rank, mark.local_index), []).append(mark)
    return [
        Wrong(*place, same[0].label, "; ".join(dict.fromkeys(mark.what for mark in same)))
        for place, same in places.items()
    ]
