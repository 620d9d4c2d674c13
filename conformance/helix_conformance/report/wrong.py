"""What the ranks answered to the event that fails, beside what the reference says."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from helix_conformance.drive.driver import Answer
from helix_conformance.report.diagram import Film, Wrong, film
from helix_conformance.report.stream import FailureLine
from helix_reference.model import Model
from helix_spec.config import config_problem
from helix_spec.engine import Outcome
from helix_spec.events import FEATURES, Reason, ids_of


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
    features = set(failure.declared) & set(FEATURES) if failure.declared else set(FEATURES)
    allocates = "pages" in failure.declared or not failure.declared
    model, reason = Model(trace.config, features, allocates=allocates), None
    for one in trace.events if event is None else trace.events[: event + 1]:
        reason = model.apply(one)
    expected = [model.outcome(rank, reason) for rank in range(model.layout.cp_size)]
    ranks = [
        _row(
            answer,
            expected[rank % model.layout.cp_size],
            model,
            rank,
            judged=event is not None,
            lengths="lengths" in failure.declared,
        )
        for rank, answer in enumerate(failure.answers)
    ]
    columns = list(dict.fromkeys(name for row in ranks for name in row))
    marks = _merged(_marks(failure, model, expected)) if event is not None else []
    drawn = film(trace, wrong=marks, at=event, features=features, allocates=allocates)
    return Scene(failure, drawn, columns, ranks, marks)


def _row(
    answer: Answer, expected: Outcome, model: Model, rank: int, *, judged: bool, lengths: bool
) -> dict[str, Cell]:
    """One rank's answer by column; with `lengths` an engine has to know them."""
    outcome, row, t = answer.outcome, dict[str, Cell](), model.layout.tokens_per_block
    if judged:
        row["answer"] = _cell(_said(expected.reason), _said(outcome.reason))
        if expected.reason is None and outcome.reason is None:
            for name in ("past_len", "position_ids", "active"):
                if lengths or name != "past_len":
                    row[name] = _cell(getattr(expected, name), getattr(outcome, name))
            offsets, told = ([_offset(s, t) for s in one.slots] for one in (expected, outcome))
            row["slots"] = Cell(offsets, outcome.slots, offsets != told)
    if answer.view is not None and lengths:
        view = model.view(rank % model.layout.cp_size, list(answer.view.local_len))
        row["local_len"] = _cell(view.local_len, answer.view.local_len)
    return row


def _offset(slot: int, t: int) -> int:
    """Physical pages are the engine's own affair: what can be compared is the offset in one."""
    return slot % t if slot >= 0 else -1


def _said(reason: Reason | None) -> str:
    return "accepted" if reason is None else f"refused: {reason}"


def _cell(expected: Any, observed: Any) -> Cell:
    return Cell(expected, observed, expected != observed)


def _marks(failure: FailureLine, model: Model, expected: Sequence[Outcome]) -> Iterator[Wrong]:
    """Tokens and ranks on which an answer is wrong, in the requests of the failing event."""
    cp = model.layout.cp_size
    for rank, answer in enumerate(failure.answers):
        wanted, told, cp_rank = expected[rank % cp], answer.outcome, rank % cp
        if wanted.reason is None and told.reason is None:
            yield from _token_marks(model, rank, wanted, told)
        if answer.view is not None and "lengths" in failure.declared:
            for id, count in answer.view.local_len.items():
                held = len(model.requests[id].ranks[cp_rank]) if id in model.requests else 0
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


def _token_marks(model: Model, rank: int, wanted: Outcome, told: Outcome) -> Iterator[Wrong]:
    """New tokens that a rank claims or writes and should not, or should and does not."""
    cp_rank, t = rank % model.layout.cp_size, model.layout.tokens_per_block
    tokens = iter(zip(wanted.active, told.active, wanted.slots, told.slots, strict=False))
    for step in model.last_steps:
        positions = model.requests[step.id].ranks[cp_rank]
        extra = len(positions)
        for place, (right, claimed, slot, written) in enumerate(islice(tokens, len(step.owners))):
            position, index = step.first + place, extra
            if right:
                index = positions.index(position)
            problem = _token_problem(right, claimed, _offset(slot, t), _offset(written, t))
            if problem:
                extra += not right
                what = f"rank {rank} {problem} position {position} of request {step.id}"
                what += f"; its owner is rank {step.owners[place]}"
                yield Wrong(step.id, cp_rank, index, str(position), what)


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
