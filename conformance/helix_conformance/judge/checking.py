"""Vectors against an engine: what is written in the files, and nothing else, is right.

This follows the numbered steps of `shipped/FORMAT.md`, as a runner in another language would. It
uses neither the judge nor the reference model.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from helix_conformance.drive.driver import Answer, Driver, EngineFailure
from helix_conformance.expect.arrays import as_array
from helix_conformance.expect.vectors import (
    SCHEMA_FILE,
    Decoded,
    Output,
    State,
    Step,
    Vector,
    VectorError,
    load_vector,
)
from helix_conformance.judge.failure import GarbageError, Violation, in_order
from helix_conformance.session import EVERYTHING, Failure, Tally, check_types, typed
from helix_spec.engine import LADDER, Outcome, RankView
from helix_spec.events import MERGE, Decode, Merge
from helix_spec.trace import Trace


def load_vectors(folder: Path) -> list[Vector]:
    """All vectors in a folder, by name. Raises VectorError when there is none, or a wrong one."""
    if not folder.is_dir():
        raise VectorError(f"{folder} is not a folder of vectors.")
    paths = sorted(path for path in folder.glob("*.json") if path.name != SCHEMA_FILE)
    if not paths:
        raise VectorError(f"{folder} holds no vector: there is no .json file in it.")
    return [load_vector(path) for path in paths]


def lacking(vector: Vector, profiles: frozenset[str]) -> list[str]:
    """Profiles that a vector asks for and that are not among these: then it is not checked."""
    return [profile for profile in vector.profiles if profile not in profiles]


def profiles_of_vector(vector: Vector, profiles: frozenset[str]) -> frozenset[str]:
    """Those of the profiles by which a vector checks: what it asks for, and as deep as it goes."""
    if vector.profiles == [MERGE]:
        return frozenset(vector.profiles)
    depth = ["placement", "lengths", "pages"]
    if vector.rows:
        depth.append("cache")
    if any(step.decoded and step.decoded.output for step in vector.steps):
        depth = list(LADDER)
    return profiles & {*depth, *vector.profiles}


def check_vector(
    driver: Driver, vector: Vector, tally: Tally, profiles: frozenset[str] | None = None
) -> Failure | None:
    """Play a vector; the first step at which an answer differs ends it.

    `profiles` are those that are to be checked, all that the engine declares when None.
    """
    profiles = profiles_of_vector(vector, driver.profiles if profiles is None else profiles)
    check, trace = _Check(vector, profiles), vector.trace
    played, event = 0, None

    def failure(violations: list[Violation], died: EngineFailure | None = None) -> Failure:
        seen = Trace(note=trace.note, config=trace.config, events=trace.events[:played])
        return Failure(
            trace=seen,
            event=event if died is None else died.event,
            violations=violations,
            engine_failure=None if died is None else str(died),
        )

    tally.traces += 1
    tally.layouts.add(vector.layout)
    began = time.perf_counter()
    try:
        for told, answers in driver.play(trace.config, profiles, trace.events, EVERYTHING):
            with typed(answers):
                if told is None and played == 0:
                    found = check.start(answers)
                elif told is None:
                    break
                else:
                    event, played = played, played + 1
                    tally.events += 1
                    found = check.step(vector.steps[event], answers)
                if found:
                    check_types(answers)
            if found:
                return failure(in_order(found))
            if vector.refused:
                break
    except EngineFailure as died:
        played = len(trace.events) if died.event is None else died.event + 1
        return failure([], died)
    except GarbageError as garbage:
        return failure([], EngineFailure(garbage.rank, event, f"answered garbage: {garbage}"))
    finally:
        tally.seconds += time.perf_counter() - began
    return None


class _Check:
    """Follows one vector: the rules of FORMAT.md, section "Comparing"."""

    def __init__(self, vector: Vector, profiles: frozenset[str]) -> None:
        self.vector = vector
        self.config = vector.config
        self.profiles = profiles
        self.cp = vector.config.layout.cp_size
        self.world = vector.config.world_size
        self.pages: list[dict[int, int]] = [{} for _ in range(self.world)]
        """On each rank, the physical page of each label in use."""
        self.merges: dict[bytes, list[bytes]] = {}
        """What each rank answered to each merge, to compare with when it comes again."""

    def start(self, answers: Sequence[Answer]) -> list[Violation]:
        """Every rank starts, or every rank refuses."""
        return list(_reasons(self.vector.refused, [answer.outcome for answer in answers]))

    def step(self, step: Step, answers: Sequence[Answer]) -> list[Violation]:
        """One event on all ranks."""
        outcomes = [answer.outcome for answer in answers]
        found = list(_reasons(step.refused, outcomes))
        if found:
            return found
        if step.decoded is not None:
            found += self._decoded(step.decoded, outcomes)
        if step.merged is not None:
            found += self._merged(step, step.merged.output, outcomes)
        if step.state is not None:
            in_state = list(self._state(step.state, [answer.view for answer in answers]))
            if in_state and step.refused is not None:
                what = f"an event refused as {step.refused} changed the state"
                in_state.append(Violation("PAGE-5", what))
            if in_state and isinstance(step.event, Decode) and step.event.pad > 0:
                what = f"a step with {step.event.pad} dummy requests"
                in_state.append(Violation("DUM-1", what))
            found += in_state
        return found

    # An accepted decode

    def _decoded(self, decoded: Decoded, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        for rank, outcome in enumerate(outcomes):
            yield from self._columns(rank, decoded, outcome)
        for first in range(0, self.world, self.cp):
            group = outcomes[first : first + self.cp]
            for token, owner in enumerate(decoded.owners):
                yield from self._token(first, decoded, token, owner, group)
        right = [[owner == rank for owner in decoded.owners] for rank in range(self.cp)]
        yield from self._rank_order(right, [outcome.active for outcome in outcomes])
        if "attention" in self.profiles and decoded.output is not None:
            yield from self._outputs(decoded, outcomes)

    def _columns(self, rank: int, decoded: Decoded, outcome: Outcome) -> Iterator[Violation]:
        cp_rank = rank % self.cp
        wanted: dict[str, tuple[str, list[int]]] = {"position_ids": ("POS-1", decoded.position_ids)}
        if "lengths" in self.profiles:
            wanted["past_len"] = ("LEN-2", [row[cp_rank] for row in decoded.past_len])
            if outcome.visible is not None or "attention" in self.profiles:
                wanted["visible"] = ("LEN-3", [row[cp_rank] for row in decoded.visible])
        for name, (number, right) in wanted.items():
            given = getattr(outcome, name)
            if given is None or len(given) != len(right):
                raise GarbageError(rank, f"its {name} has not {len(right)} entries: {given}")
            if given != right:
                yield Violation(number, name, right, given, rank)
        for name in ("active", "slots"):
            if len(getattr(outcome, name)) != len(decoded.owners):
                raise GarbageError(rank, f"its {name} has not {len(decoded.owners)} entries")

    def _token(
        self, first: int, decoded: Decoded, token: int, owner: int, group: Sequence[Outcome]
    ) -> Iterator[Violation]:
        """Who claims one new token, and where it is written, in one group of cp_size ranks."""
        where = f"the token at position {decoded.position_ids[token]}"
        active = [bool(outcome.active[token]) for outcome in group]
        right = [rank == owner for rank in range(self.cp)]
        if sum(active) != 1:
            yield Violation("OWN-2", f"ranks active for {where}", right, active)
        if active != right:
            yield Violation("OWN-3", f"ranks that claim {where}", right, active)
        slots = [outcome.slots[token] for outcome in group]
        if sum(slot >= 0 for slot in slots) != 1:
            yield Violation("OWN-1", f"slots in which {where} is written", "one slot", slots)
        for rank, slot in enumerate(slots):
            if slot >= 0 and not active[rank]:
                what = f"slot of {where}, which this rank does not own"
                yield Violation("PAGE-4", what, -1, slot, first + rank)
        if slots[owner] >= 0:
            (label, offset), t = decoded.slots[token], self.config.layout.tokens_per_block
            page, given = divmod(slots[owner], t)
            if given != offset:
                yield Violation("OWN-1", f"offset of {where}", offset, given, first + owner)
            moved = list(self._page(first + owner, label, page, where))
            yield from moved
            if any(violation.invariant == "PAGE-2" for violation in moved):
                what = f"{where} overwrites tokens in a page that is not its own"
                yield Violation("OWN-1", what, "a free slot", slots[owner], first + owner)

    def _outputs(self, decoded: Decoded, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        arrays = [_numbers(rank, "output", o.output, 4) for rank, o in enumerate(outcomes)]
        for layer, by_token in enumerate(decoded.output or []):
            for token, by_head in enumerate(by_token):
                what = f"output at position {decoded.position_ids[token]}, layer {layer}"
                empty = ["ATT-3"] if 0 in decoded.visible[token] else []
                found = list(self._heads(what, by_head, arrays, (layer, token), empty))
                if found:
                    yield from found
                    return

    def _merged(
        self, step: Step, output: Sequence[Sequence[Output]], outcomes: Sequence[Outcome]
    ) -> Iterator[Violation]:
        event = step.event
        assert isinstance(event, Merge)
        arrays = [_numbers(rank, "output", o.output, 3) for rank, o in enumerate(outcomes)]
        given = [array.tobytes() for array in arrays]
        before = self.merges.setdefault(msgspec.json.encode(event), given)
        for rank, (first, again) in enumerate(zip(before, given, strict=True)):
            if first != again:
                what = "output of the same merge again, bit for bit"
                yield Violation("ATT-2", what, "as before", "otherwise", rank)
        for token, by_head in enumerate(output):
            more = ["ATT-2"] if event.order != sorted(event.order) else []
            more += ["ATT-3"] if any(row[token] is None for row in event.levels) else []
            what = f"output of token {token}, order {event.order}"
            found = list(self._heads(what, by_head, arrays, (token,), more))
            if found:
                yield from found
                return

    def _heads(
        self,
        what: str,
        by_head: Sequence[Output],
        arrays: Sequence[Any],
        where: tuple[int, ...],
        more: Sequence[str],
    ) -> Iterator[Violation]:
        """The first wrong head of one token: each rank has its slice of the heads."""
        mine = len(by_head) // self.world
        for head, right in enumerate(by_head):
            rank, place = divmod(head, mine)
            wanted = (*arrays[rank].shape[:-2], mine, len(right.exact))
            if arrays[rank].shape != wanted or not _reaches(arrays[rank], where):
                shape = arrays[rank].shape
                raise GarbageError(rank, f"its output has shape {shape}, not {wanted}")
            given = arrays[rank][(*where, place)]
            if not _equal(given, right):
                elsewhere = any(_equal(given, other) for other in by_head)
                told = {"exact": right.exact, "E": right.bound}
                for number in ("ATT-1", "ATT-4", *more, *(["MAP-1"] if elsewhere else [])):
                    text = f"{what}, query head {head}"
                    yield Violation(number, text, told, given.tolist(), rank)
                return

    def _rank_order(self, by_cp_rank: Sequence[Any], given: Sequence[Any]) -> Iterator[Violation]:
        """MAP-1 where the ranks' answers are right for ranks with tp_rank fastest."""
        right = [by_cp_rank[rank % self.cp] for rank in range(self.world)]
        swapped = [by_cp_rank[rank // self.config.tp_size] for rank in range(self.world)]
        if list(given) == swapped != right:
            yield Violation("MAP-1", "what the ranks answer, tp_rank fastest", right, list(given))

    # State

    def _state(self, state: State, views: Sequence[RankView | None]) -> Iterator[Violation]:
        for rank, view in enumerate(views):
            if view is None:
                raise GarbageError(rank, "it shows no state")
            strangers = sorted(view.local_len.keys() - state.local_len.keys())
            if strangers or view.preempted != state.preempted:
                what = "preempted requests, and live ones that should not be"
                told = [view.preempted, strangers]
                yield Violation("REF-2", what, [state.preempted, []], told, rank)
                return
        present = [view for view in views if view is not None]
        if "lengths" in self.profiles:
            for id, right in state.local_len.items():
                yield from self._rank_order(right, [view.local_len.get(id) for view in present])
            for first in range(0, self.world, self.cp):
                group = present[first : first + self.cp]
                for id, right in state.local_len.items():
                    given = [view.local_len.get(id) for view in group]
                    if given != right:
                        what = f"tokens of request {id} on each rank"
                        yield Violation("LEN-1", what, right, given, request=id)
        for rank, view in enumerate(present):
            if "pages" in self.profiles:
                yield from self._tables(rank, state, view)
            if "cache" in self.profiles and state.cached is not None:
                for id in state.local_len:
                    yield from self._rows(rank, id, state, view)
        self._forget(state)

    def _forget(self, state: State) -> None:
        """Labels that are in no block table are used no more; their pages may come again."""
        for rank, bound in enumerate(self.pages):
            tables = [by_rank[rank % self.cp] for by_rank in state.block_tables.values()]
            for label in bound.keys() - {label for table in tables for label in table}:
                del bound[label]

    def _tables(self, rank: int, state: State, view: RankView) -> Iterator[Violation]:
        cp_rank = rank % self.cp
        right = {id: by_rank[cp_rank] for id, by_rank in state.block_tables.items()}
        for id, labels in right.items():
            table = view.block_tables.get(id, [])
            if len(table) != len(labels):
                what = f"pages of request {id}"
                yield Violation("PAGE-1", what, len(labels), len(table), rank, id)
            for label, page in zip(labels, table, strict=False):
                yield from self._page(rank, label, page, f"request {id}")
        if view.free_pages != state.free_pages[cp_rank]:
            what = "free pages"
            yield Violation("PAGE-3", what, state.free_pages[cp_rank], view.free_pages, rank)

    def _page(self, rank: int, label: int, page: int, what: str) -> Iterator[Violation]:
        """A label stands for one page as long as it is in use, and no other label does."""
        bound = self.pages[rank]
        pool = self.config.pages[rank % self.cp] if "pages" in self.profiles else None
        if page < 0 or (pool is not None and page >= pool):
            told = f"at least 0 and below {pool}"
            yield Violation("PAGE-1", f"page of {what}, in the rank's pool", told, page, rank)
            return
        if bound.setdefault(label, page) != page:
            what = f"page of {what}, which may not move"
            yield Violation("GROW-1", what, bound[label], page, rank)
        others = [other for other, held in bound.items() if held == page and other != label]
        if others:
            yield Violation("PAGE-2", f"page of {what}", "one of its own", page, rank)

    def _rows(self, rank: int, id: int, state: State, view: RankView) -> Iterator[Violation]:
        cached, clean = (state.cached or {})[id], (state.unwritten_from or {})[id]
        held = [self.vector.rows[row] for row in cached[rank % self.cp]]
        heads = self.config.kv_heads_of(rank // self.cp)
        mine = slice(heads.start, heads.stop)
        keys = _numbers(rank, "keys", view.keys.get(id), 4)
        values = _numbers(rank, "values", view.values.get(id), 4)
        for index, row in enumerate(held):
            where = f"of request {id} at local index {index}, position {row.position}"
            if index >= keys.shape[1] or index >= values.shape[1]:
                yield Violation("OWN-1", f"row {where}", "held", "no such slot", rank, id)
                return
            right = np.array(row.values)[:, mine]
            if not np.array_equal(values[:, index], right):
                given = values[:, index].tolist()
                yield Violation("OWN-1", f"V {where}", right.tolist(), given, rank, id)
                return
            least, most = np.array(row.least_keys)[:, mine], np.array(row.most_keys)[:, mine]
            if not ((least <= keys[:, index]) & (keys[:, index] <= most)).all():
                given = keys[:, index].tolist()
                yield Violation("POS-2", f"K {where}", least.tolist(), given, rank, id)
                return
        never = slice(clean[rank % self.cp], None)
        if self.config.poison and not (
            np.isnan(keys[:, never]).all() and np.isnan(values[:, never]).all()
        ):
            what = f"slots of request {id} from local index {never.start} on"
            yield Violation("PAGE-4", what, "never written", "written", rank, id)


def _equal(given: Any, right: Output) -> bool:
    """Within the bound; a NaN is not."""
    return bool(np.sqrt(((given - np.array(right.exact)) ** 2).sum()) <= right.bound)


def _reasons(reason: str | None, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
    """All ranks accept, or all refuse for the one reason."""
    given = [outcome.reason for outcome in outcomes]
    right = [reason] * len(given)
    if len(set(given)) > 1:
        yield Violation("REF-1", "answers of the ranks", right, given)
    if given != right:
        yield Violation("REF-2", "refusal (null: accepted), rank by rank", right, given)


def _reaches(array: Any, where: tuple[int, ...]) -> bool:
    """Whether an array has an entry there."""
    return all(index < size for index, size in zip(where, array.shape, strict=False))


def _numbers(rank: int, name: str, rows: Any, dimensions: int) -> Any:
    try:
        array = as_array(rows)
    except (TypeError, ValueError, KeyError) as error:
        raise GarbageError(rank, f"its {name} is no array of numbers: {error}") from error
    if array.size == 0:
        return np.zeros((1, 0, 1, 1)[:dimensions])
    if array.ndim != dimensions:
        raise GarbageError(rank, f"its {name} has {array.ndim} dimensions, not {dimensions}")
    return array
