"""Makes vectors: what the recorder expects of each case, written down."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import numpy as np

from helix_conformance.expect.arrays import (
    cached_keys,
    cached_values,
    supplied_partials,
    token_columns,
)
from helix_conformance.expect.cases import CASES, Case
from helix_conformance.expect.expectation import Expectation
from helix_conformance.expect.recorder import Recorder
from helix_conformance.expect.vectors import (
    FORMAT,
    FORMAT_PAGE,
    SCHEMA_FILE,
    SHIPPED,
    Decoded,
    GroupStep,
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
from helix_conformance.version import __version__
from helix_spec.config import MAIN_POOL, config_problem
from helix_spec.engine import PROFILES, features_of_config
from helix_spec.events import MERGE, Event, Merge, Reason, features_of

T = TypeVar("T")
_Labels = Sequence[dict[Any, int]]
DIGITS = 9
"""Significant digits of numbers that are not exact: far below any bound, above any libm's error."""


def make_vector(case: Case) -> Vector:
    """Return the vector of a case: what the recorder expects, step by step.

    Parameters
    ----------
    case
        The case. Where its configuration is illegal, the vector says that no engine may start.

    Returns
    -------
    Vector
        Numbers that are not exact have 9 significant digits; bounds are rounded up.

    Examples
    --------
    >>> case = next(case for case in CASES if case.name == "spec-11-2-step")
    >>> make_vector(case).steps[0].state.local_len
    {0: [4, 4, 3, 2]}
    """
    legal = config_problem(case.config) is None
    writer = _Writer(case) if legal else None
    steps = [] if writer is None else [writer.step(event) for event in case.events]
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
        rows=[] if writer is None else writer.rows(),
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
    needed |= features_of_config(case.config)
    return [profile for profile in PROFILES if profile in needed]


class _Writer:
    """Writes down what the recorder expects of a case."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.config = case.config
        self.recorder = Recorder(case.config)
        self.labels: dict[str, list[dict[Any, int]]] = {
            pool: [{} for _ in case.config.pages] for pool in (MAIN_POOL, *case.config.pools)
        }
        """Of each pool and cp_rank, the label of each page."""
        self.tokens: dict[tuple[int, int, int], int] = {}
        """Which row a token has: event, place in it, position."""

    def step(self, event: Event) -> Step:
        """Let the event happen."""
        expected = self.recorder.next(event)
        if isinstance(event, Merge):
            return Step(event=event, refused=expected.refused, merged=self._merged(event, expected))
        if expected.parts:
            groups: dict[str, list[GroupStep]] = {}
            for part in expected.parts:
                labels = self.labels[part.group.pool]
                own = labels if part.cp_rank is None else [labels[part.cp_rank]]
                shown = GroupStep(**self._shown(part.expected, own))
                groups.setdefault(part.group.name, []).append(shown)
            return Step(event=event, refused=expected.refused, groups=groups)
        shown_alone = self._shown(expected, self.labels[MAIN_POOL])
        hit = expected.hit and expected.hit.taken
        return Step(event=event, refused=expected.refused, hit=hit, **shown_alone)

    def _shown(self, expected: Expectation, labels: _Labels) -> dict[str, Any]:
        """The columns and the state of a step, where the case shows them."""
        state, shows = expected.state, self.case.shows_state(expected.index + 1)
        return {
            "decoded": None if expected.decoded is None else self._decoded(expected, labels),
            "state": self._state(state, labels) if shows else None,
        }

    def _merged(self, event: Merge, expected: Expectation) -> Merged:
        outputs, lses = supplied_partials(self.config, event, range(self.config.model.q_heads))
        partials = [
            [
                [
                    Supplied(None, None) if lse == -math.inf else Supplied(output.tolist(), lse)
                    for output, lse in zip(by_head, by_lse.tolist(), strict=True)
                ]
                for by_head, by_lse in zip(by_token, lses_of, strict=True)
            ]
            for by_token, lses_of in zip(outputs, lses, strict=True)
        ]
        return Merged(partials=partials, output=[by_layer[0] for by_layer in _outputs(expected)])

    def _decoded(self, expected: Expectation, labels: _Labels) -> Decoded:
        assert expected.decoded is not None
        past_len, position_ids, owners, slots, visible = expected.decoded
        by_token = _outputs(expected) if self.case.depth == "attention" else None
        return Decoded(
            past_len=[list(row) for row in past_len],
            position_ids=position_ids,
            owners=list(owners),
            slots=[
                (_label(labels[owner], page), offset)
                for owner, (page, offset) in zip(owners, slots, strict=True)
            ],
            visible=[list(row) for row in visible],
            output=by_token and [list(of_layer) for of_layer in zip(*by_token, strict=True)],
        )

    def _state(self, state: Any, labels: _Labels) -> State:
        ranks = range(len(labels))
        live, deep = sorted(state.live), self.case.depth != "pages" and self.case.rows

        def by_rank(of: Callable[[int, int], T]) -> dict[int, list[T]]:
            return {id: [of(id, rank) for rank in ranks] for id in live}

        return State(
            local_len={id: list(state.lengths(id)) for id in live},
            block_tables=by_rank(
                lambda id, rank: [_label(labels[rank], page) for page in state.tables(id)[rank]]
            ),
            free_pages=state.free_pages,
            preempted=state.preempted,
            cached=by_rank(self._cached) if deep else None,
            unwritten_from=by_rank(lambda *of: state.contents(*of)[1]) if deep else None,
        )

    def _cached(self, id: int, rank: int) -> list[int]:
        held, _ = self.recorder.state.contents(id, rank)
        return [
            self.tokens.setdefault((*identity, position), len(self.tokens))
            for position, identity in held
        ]

    def rows(self) -> list[Row]:
        """K and V of every token that a state named."""
        shape, seed = self.config.model, self.config.seed
        heads, found = range(shape.kv_heads), []
        for event, place, position in self.tokens:
            column = token_columns([(event, place, position)])
            keys = cached_keys(shape, seed, column, heads)
            values = cached_values(shape, seed, column, heads)
            found.append(
                Row(
                    event=event,
                    place=place,
                    position=position,
                    least_keys=_cut_each(keys.lower[:, 0], math.floor, DIGITS).tolist(),
                    most_keys=_cut_each(keys.upper[:, 0], math.ceil, DIGITS).tolist(),
                    values=values[:, 0].tolist(),
                )
            )
        return found


def _label(labels: dict[Any, int], page: Any) -> int:
    """The label of a page of one rank's pool; -1 of one that went back behind a window."""
    return -1 if page.number < 0 else labels.setdefault(page, len(labels))


def _outputs(expected: Expectation) -> list[list[list[Output]]]:
    """The outputs of a decode or merge, by token, layer and query head."""
    assert expected.outputs is not None
    return [
        [
            [_output(*of_head) for of_head in zip(o.tolist(), e.tolist(), strict=True)]
            for o, e in zip(exact, bound, strict=True)
        ]
        for exact, bound in expected.outputs()
    ]


def _output(exact: Sequence[float], bound: float) -> Output:
    """An output with its digits cut, and its bound with what that changes, to few digits."""
    lost = math.hypot(*exact) * 10.0 ** (1 - DIGITS)
    return Output([float(f"{x:.{DIGITS}g}") for x in exact], _cut(bound + lost, math.ceil, 3))


def _cut(x: float, rounding: Callable[[float], int], digits: int) -> float:
    """A number to so many digits, rounded one way; what has fewer digits stays what it is."""
    if x == 0 or float(f"{x:.{digits}g}") == x:
        return x
    step = math.floor(math.log10(abs(x))) - digits + 1
    return float(f"{rounding(x / 10.0**step)}e{step}")


_cut_each = np.vectorize(_cut)


def make_all() -> dict[str, bytes]:
    """Return the content of every file of the set, by its name."""
    schema = msgspec.json.format(msgspec.json.encode(vector_schema()), indent=1) + b"\n"
    files = {f"{case.name}.json": dump_vector(make_vector(case)) for case in CASES}
    page = (SHIPPED / FORMAT_PAGE).read_bytes()
    return {FORMAT_PAGE: page, SCHEMA_FILE: schema, **files}


def export(folder: Path) -> list[Path]:
    """Write the set into a folder, and return the paths of its files.

    Parameters
    ----------
    folder
        An empty folder, one that this version wrote, or one that is not there yet.

    Raises
    ------
    VectorError
        When the folder holds a file that is not of the set; nothing is written.
    OSError
        When the folder cannot be written.
    """
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
