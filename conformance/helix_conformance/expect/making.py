"""What the reference answers to a case, as a vector."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec

from helix_conformance import __version__
from helix_conformance.expect.arrays import cached_keys, cached_values, tokens_of
from helix_conformance.expect.cases import CASES, Case
from helix_conformance.expect.vectors import (
    FORMAT,
    FORMAT_PAGE,
    SCHEMA_FILE,
    Decoded,
    Merged,
    Output,
    Row,
    State,
    Step,
    Supplied,
    Vector,
    VectorError,
    dump_vector,
    vector_schema,
)
from helix_reference.attention import (
    Partial,
    Token,
    error_bound,
    key,
    merge_bound,
    query,
    supplied,
    value,
)
from helix_reference.model import Model, Page, Request
from helix_spec.config import config_problem
from helix_spec.events import MERGE, Event, Merge, Reason, features_of

SHIPPED = Path(__file__).parent / "shipped"
"""The set as it is shipped with this package."""
DIGITS = 9
"""Significant digits of numbers that are not exact: far below any bound, above any libm's doubt."""


def make_vector(case: Case) -> Vector:
    """The vector of a case: what the reference model answers, step by step."""
    legal = config_problem(case.config) is None
    recorder = _Recorder(case) if legal else None
    steps = [] if recorder is None else [recorder.step(event) for event in case.events]
    return Vector(
        format=FORMAT,
        suite=__version__,
        name=case.name,
        layout=str(case.config.layout),
        profiles=_needed(case, steps),
        invariants=list(case.invariants),
        notes=list(case.notes),
        config=case.config,
        refused=None if legal else "bad_config",
        rows=[] if recorder is None else recorder.rows(),
        steps=steps,
    )


def _needed(case: Case, steps: Sequence[Step]) -> list[str]:
    """Profiles without which an engine would rightly answer otherwise."""
    if steps and all(isinstance(step.event, Merge) for step in steps):
        return [MERGE]
    needed = {"placement"}
    for step in steps:
        if step.refused != Reason.UNSUPPORTED:
            needed |= features_of(step.event)
        if step.refused == Reason.OUT_OF_PAGES:
            needed |= {"lengths", "pages"}
    if case.config.overlap:
        needed.add("overlap")
    order = (
        "placement",
        "lengths",
        "pages",
        "speculative",
        "fork",
        "preempt",
        "padding",
        "overlap",
    )
    return [profile for profile in order if profile in needed]


class _Recorder:
    """Plays a case on the reference and writes down what every rank would say."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = case.config
        self.model = Model(case.config)
        self.cp = self.model.layout.cp_size
        self.labels: list[dict[Page, int]] = [{} for _ in range(self.cp)]
        self.tokens: dict[Token, int] = {}
        """Which row a token has."""

    def step(self, event: Event) -> Step:
        """Let the event happen."""
        reason = self.model.apply(event)
        decoded = self._decoded() if self.model.last_steps else None
        if isinstance(event, Merge):
            return Step(event=event, refused=reason, merged=self._merged(event))
        state = self._state() if self.case.shows_state(self.model.events_seen) else None
        return Step(event=event, refused=reason, decoded=decoded, state=state)

    def _merged(self, event: Merge) -> Merged:
        shape, seed = self.config.model, self.config.seed
        partials = [
            [
                [supplied(shape, seed, number, token, head, level) for head in range(shape.q_heads)]
                for token, level in enumerate(row)
            ]
            for number, row in enumerate(event.levels)
        ]
        exact = [
            [merge_bound(shape, of_head) for of_head in zip(*of_token, strict=True)]
            for of_token in zip(*partials, strict=True)
        ]
        return Merged(
            partials=[[[_supplied(p) for p in by_head] for by_head in x] for x in partials],
            output=[[_output(*of_head) for of_head in of_token] for of_token in exact],
        )

    def _decoded(self) -> Decoded:
        steps, ranks = self.model.last_steps, range(self.cp)
        outcomes = [self.model.outcome(rank, None) for rank in ranks]
        owners = [owner for step in steps for owner in step.owners]
        return Decoded(
            past_len=[[o.past_len[i] for o in outcomes] for i in range(len(steps))],
            position_ids=outcomes[0].position_ids,
            owners=owners,
            slots=self._slots(),
            visible=[[(o.visible or [])[t] for o in outcomes] for t in range(len(owners))],
            output=self._output() if self.case.depth == "attention" else None,
        )

    def _slots(self) -> list[tuple[int, int]]:
        slots = []
        for step in self.model.last_steps:
            held = list(step.past_len)
            for owner in step.owners:
                table = self.model.requests[step.id].tables[owner]
                page, offset = divmod(held[owner], self.model.layout.tokens_per_block)
                slots.append((self._label(owner, table[page]), offset))
                held[owner] += 1
        return slots

    def _label(self, rank: int, page: Page) -> int:
        labels = self.labels[rank]
        return labels.setdefault(page, len(labels))

    def _state(self) -> State:
        live = {id: r for id, r in sorted(self.model.requests.items()) if not r.preempted}
        deep = self.case.depth != "pages" and self.case.rows
        return State(
            local_len={id: [len(held) for held in r.ranks] for id, r in live.items()},
            block_tables={
                id: [[self._label(rank, page) for page in t] for rank, t in enumerate(r.tables)]
                for id, r in live.items()
            },
            free_pages=[len(pool.free) for pool in self.model.pools],
            preempted=sorted(id for id, r in self.model.requests.items() if r.preempted),
            cached={id: self._cached(r) for id, r in live.items()} if deep else None,
            unwritten_from={id: list(r.high_water) for id, r in live.items()} if deep else None,
        )

    def _cached(self, request: Request) -> list[list[int]]:
        return [
            [
                self.tokens.setdefault(Token(*request.tokens[position], position), len(self.tokens))
                for position in held
            ]
            for held in request.ranks
        ]

    def rows(self) -> list[Row]:
        """K and V of every token that a state named."""
        shape, seed = self.config.model, self.config.seed
        heads, found = range(shape.kv_heads), []
        for token in self.tokens:
            column = tokens_of([(token.event, token.place)], token.position)
            keys = cached_keys(shape, seed, column, heads)
            values = cached_values(shape, seed, column, heads)
            found.append(
                Row(
                    event=token.event,
                    place=token.place,
                    position=token.position,
                    least_keys=_each(_down, keys.least[:, 0].tolist()),
                    most_keys=_each(_up, keys.most[:, 0].tolist()),
                    values=values[:, 0].tolist(),
                )
            )
        return found

    def _output(self) -> list[list[list[Output]]]:
        shape = self.config.model
        return [
            [
                [self._attend(layer, step.id, step.first + place, h) for h in range(shape.q_heads)]
                for step in self.model.last_steps
                for place in range(len(step.owners))
            ]
            for layer in range(shape.layers)
        ]

    def _attend(self, layer: int, id: int, position: int, head: int) -> Output:
        shape, seed, request = self.config.model, self.config.seed, self.model.requests[id]
        seen = [Token(*request.tokens[p], p) for p in range(position + 1)]
        holder = {p: rank for rank, held in enumerate(request.ranks) for p in held}
        kv_head = head // (shape.q_heads // shape.kv_heads)
        output, bound = error_bound(
            shape,
            query(shape, seed, seen[-1], layer, head),
            [key(shape, seed, token, layer, kv_head) for token in seen],
            [value(shape, seed, token, layer, kv_head) for token in seen],
            [holder[p] for p in range(position + 1)],
        )
        return _output(output, bound)


def _output(exact: Sequence[float], bound: float) -> Output:
    return Output([_digits(x) for x in exact], _bound(bound, math.hypot(*exact)))


def _supplied(partial: Partial) -> Supplied:
    if partial.lse == -math.inf:
        return Supplied(None, None)
    return Supplied(partial.output, partial.lse)


def _digits(x: float) -> float:
    return float(f"{x:.{DIGITS}g}")


def _bound(bound: float, size: float) -> float:
    """A bound around numbers of this size whose digits are cut: rounded up, to few digits."""
    return _cut(bound + size * 10.0 ** (1 - DIGITS), math.ceil, 3)


def _down(x: float) -> float:
    return _cut(x, math.floor, DIGITS)


def _up(x: float) -> float:
    return _cut(x, math.ceil, DIGITS)


def _cut(x: float, rounding: Callable[[float], int], digits: int) -> float:
    """A number to so many digits, rounded one way; what has fewer digits stays what it is."""
    if x == 0 or float(f"{x:.{digits}g}") == x:
        return x
    step = math.floor(math.log10(abs(x))) - digits + 1
    return float(f"{rounding(x / 10.0**step)}e{step}")


def _each(change: Callable[[float], float], entries: Any) -> Any:
    """Nested lists with each number changed."""
    if isinstance(entries, list):
        return [_each(change, entry) for entry in entries]
    return change(entries)


def make_all() -> dict[str, bytes]:
    """Every file of the set, by name."""
    schema = msgspec.json.format(msgspec.json.encode(vector_schema()), indent=1) + b"\n"
    files = {f"{case.name}.json": dump_vector(make_vector(case)) for case in CASES}
    page = (SHIPPED / FORMAT_PAGE).read_bytes()
    return {FORMAT_PAGE: page, SCHEMA_FILE: schema, **files}


def export(folder: Path) -> list[Path]:
    """Write the set; returns where. Raises VectorError when the folder holds something else."""
    folder.mkdir(parents=True, exist_ok=True)
    files = make_all()
    strange = sorted(path.name for path in folder.iterdir() if path.name not in files)
    if strange:
        raise VectorError(
            f"{folder} holds {strange[0]}, which is not of this set; name an empty folder, or one "
            "that this version wrote."
        )
    paths = []
    for name, data in files.items():
        paths.append(folder / name)
        paths[-1].write_bytes(data)
    return paths
