"""Every answer of every rank against the reference, invariant by invariant.

The judge applies each event to the reference model, compares all ranks' answers and states with
what the model holds, and names every invariant that fails, in the order of SPEC.md. It never
looks at an engine's error texts.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import pairwise
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from helix_conformance.drive.driver import Answer
from helix_conformance.expect.arrays import Array, as_array, exact_merge, supplied_partials
from helix_conformance.judge.failure import GarbageError, Violation, in_order
from helix_conformance.judge.oracle import Attended, Foresight, Oracle
from helix_conformance.judge.pairing import Pairing
from helix_reference.model import Model, Request, Step
from helix_spec import invariants
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Admit, Decode, Event, Merge, Reason, Release, ids_of


class Judge:
    """Holds the reference beside the engines of one trace.

    `profiles` are those to be checked. `declared` are all that the engine declares, these when
    None: what it supports does not depend on what is checked.
    """

    def __init__(
        self, config: Config, profiles: frozenset[str], declared: frozenset[str] | None = None
    ) -> None:
        declared = profiles if declared is None else declared
        self.config = config
        self.profiles = profiles
        self.model = Model(config, declared, allocates="pages" in declared)
        self.layout = self.model.layout
        self.cp = self.layout.cp_size
        self.world = config.world_size
        pools = config.pages if "pages" in profiles else [None] * self.cp
        self.pairings = [Pairing(pools[rank % self.cp]) for rank in range(self.world)]
        self.oracle = Oracle(config, self.model)
        self.foresight: Foresight | None = None
        self.sound: dict[tuple[int, int], tuple[Any, ...]] = {}
        """Per rank and request, cached rows that were found right, to look at what changed only."""
        self.reason: Reason | None = None
        """Why the last event is refused, None when it is not."""
        self.admitted: deque[tuple[int, Request]] = deque(maxlen=4 * self.cp)
        """The latest admissions, in order (BAL-3)."""
        self.merges: dict[bytes, Array] = {}
        """What came of each merge, to compare with when it comes again (ATT-2)."""

    def foresee(self, event: Event) -> None:
        """Begin to work out an event's attention, while the ranks are at work.

        All events of a trace come here in order before the first is judged, or none do.
        """
        if "attention" in self.profiles:
            if self.foresight is None:
                model = Model(self.config, self.model.features, allocates=self.model.allocates)
                self.foresight = Foresight(self.config, model)
            self.foresight.add(event)

    def close(self) -> None:
        """Leave what was foreseen."""
        if self.foresight is not None:
            self.foresight.close()

    def started(self, answers: Sequence[Answer]) -> list[Violation]:
        """A legal configuration is accepted by every rank."""
        return wrong_reasons(None, [answer.outcome for answer in answers])

    def event(self, event: Event, answers: Sequence[Answer]) -> list[Violation]:
        """What is wrong with the ranks' answers to the next event of the trace."""
        reason = self.reason = self.model.apply(event)
        foreseen = None if self.foresight is None else self.foresight.next()
        if foreseen is not None:
            self.oracle.kept |= foreseen.exact
        outcomes = [answer.outcome for answer in answers]
        found = wrong_reasons(reason, outcomes)
        if found:
            return found  # the engines went another way: their states say no more
        self._keep_account(event, reason)
        in_views = self._views([answer.view for answer in answers], event)
        if self.model.last_steps:
            found += self._decoded(outcomes)
            if "attention" in self.profiles:
                steps = self.model.last_steps
                exact = self.oracle.attention(steps) if foreseen is None else foreseen.attention
                found += self._outputs(outcomes, exact, all_else_right=not found + in_views)
        if isinstance(event, Merge) and reason is None:
            found += self._merged(event, outcomes)
        if in_views and reason is not None:
            found.append(Violation("PAGE-5", f"an event refused as {reason} changed the state"))
        if in_views and isinstance(event, Decode) and event.pad > 0:
            found += _blamed_on_padding(event, in_views)
        return in_order(found + in_views)

    def finished(self, answers: Sequence[Answer]) -> list[Violation]:
        """What is wrong with the state of all ranks at the end."""
        return in_order(self._views([answer.view for answer in answers], None))

    def _keep_account(self, event: Event, reason: Reason | None) -> None:
        """Follow admissions, and forget what was kept of requests that changed or went."""
        if reason is not None:
            return
        if isinstance(event, Admit):
            self.admitted.append((event.id, self.model.requests[event.id]))
        if isinstance(event, Release):
            self.oracle.forget(event.id)
            for rank in range(self.world):
                self.sound.pop((rank, event.id), None)
            for pairing in self.pairings:
                pairing.forget(event.id)

    # The outcome of an accepted decode

    def _decoded(self, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        expected = self.model.decoded([pairing.number for pairing in self.pairings])
        if all(map(_same_columns, outcomes, expected)):
            return
        for rank, (outcome, wanted) in enumerate(zip(outcomes, expected, strict=True)):
            _check_columns(rank, outcome, wanted, self.profiles)
            yield from self._columns(rank, outcome, wanted)
        if any(o.active != wanted.active for o, wanted in zip(outcomes, expected, strict=True)):
            yield from self._owners(outcomes, expected[: self.cp])
            yield from self._balance(outcomes[: self.cp])
        if any(o.slots != wanted.slots for o, wanted in zip(outcomes, expected, strict=True)):
            yield from self._slots(outcomes)  # also when a page is seen for the first time

    def _columns(self, rank: int, outcome: Outcome, wanted: Outcome) -> Iterator[Violation]:
        """LEN-2, POS-1, LEN-3 and PAGE-4 of one rank."""
        if "lengths" in self.profiles and outcome.past_len != wanted.past_len:
            what = "tokens held before the step, for each request of the batch"
            yield Violation("LEN-2", what, wanted.past_len, outcome.past_len, rank)
        if outcome.position_ids != wanted.position_ids:
            what = "global positions of the new tokens"
            yield Violation("POS-1", what, wanted.position_ids, outcome.position_ids, rank)
        reported = outcome.visible is not None and "lengths" in self.profiles
        if (reported or "attention" in self.profiles) and outcome.visible != wanted.visible:
            what = "keys on this rank that each new token's query sees"
            yield Violation("LEN-3", what, wanted.visible, outcome.visible, rank)
        if outcome.active == wanted.active and outcome.slots == wanted.slots:
            return
        for active, slot in zip(outcome.active, outcome.slots, strict=True):
            if slot >= 0 and not active:
                what = "slot of a token that this rank does not own"
                yield Violation("PAGE-4", what, -1, slot, rank)

    def _owners(
        self, outcomes: Sequence[Outcome], expected: Sequence[Outcome]
    ) -> Iterator[Violation]:
        """OWN-2, OWN-3 and MAP-1 of each new token, in each group of cp_size ranks."""
        right = list(zip(*(outcome.active for outcome in expected), strict=True))
        for first in range(0, self.world, self.cp):
            group = [outcome.active for outcome in outcomes[first : first + self.cp]]
            for token, active in enumerate(zip(*group, strict=True)):
                where = f"the token at position {expected[0].position_ids[token]}"
                if not invariants.own_2(active):
                    what = f"ranks active for {where}"
                    yield Violation("OWN-2", what, list(right[token]), list(active))
                if active != right[token]:
                    what = f"ranks that claim {where}, and the layout's owner"
                    yield Violation("OWN-3", what, list(right[token]), list(active))
        yield from self._rank_order([o.active for o in expected], [o.active for o in outcomes])

    def _balance(self, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """BAL-2 of each request of the batch, by what the ranks claim; right until now."""
        token = 0
        for step in self.model.last_steps:
            request = self.model.requests[step.id]
            claims = _decoded_before(request, step)
            for _ in step.owners:
                for rank, outcome in enumerate(outcomes):
                    claims[rank] += outcome.active[token]
                token += 1
            roles = [claims[(rank + request.shift) % self.cp] for rank in range(self.cp)]
            if not invariants.bal_2(self.layout, roles):
                what = f"decoded tokens of request {step.id} on each rank"
                yield Violation("BAL-2", what, "a spread of one chunk at most", claims)

    def _slots(self, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """Each new token is written once, at its local index, in a page of its request."""
        token = 0
        for step in self.model.last_steps:
            held = list(step.past_len)
            for place, owner in enumerate(step.owners):
                index, held[owner] = held[owner], held[owner] + 1
                for first in range(0, self.world, self.cp):
                    slots = [o.slots[token] for o in outcomes[first : first + self.cp]]
                    if [rank for rank, slot in enumerate(slots) if slot >= 0] != [owner]:
                        where = f"the token at position {step.first + place} of request {step.id}"
                        yield from self._written_elsewhere(where, first, owner, slots, step.id)
                    if slots[owner] >= 0:
                        yield from self._slot(first + owner, step.id, index, slots[owner])
                token += 1

    def _written_elsewhere(
        self, where: str, first: int, owner: int, slots: list[int], id: int
    ) -> Iterator[Violation]:
        """A token that is not written on its owner alone, in the cp_size ranks from `first` on."""
        if sum(slot >= 0 for slot in slots) != 1:
            what = f"slots in which the ranks wrote {where}"
            yield Violation("OWN-1", what, "one slot", slots, None, id)
        for rank, slot in enumerate(slots, first):
            if slot >= 0 and rank != first + owner and self._holds_a_token(rank, slot):
                what = f"slot in which {where} was written"
                yield Violation("OWN-1", what, "free", slot, rank, id)

    def _slot(self, rank: int, id: int, index: int, slot: int) -> Iterator[Violation]:
        """The slot of a token on the rank that owns it."""
        t = self.layout.tokens_per_block
        page, offset = divmod(slot, t)
        if offset != index % t:
            what = f"offset in its page of local index {index} of request {id}"
            yield Violation("OWN-1", what, index % t, offset, rank, id)
        twin = self.model.requests[id].tables[rank % self.cp][index // t]
        yield from self.pairings[rank].pair(rank, id, page, twin, written=True)

    def _holds_a_token(self, rank: int, slot: int) -> bool:
        """Whether a token of a live request should be in this slot."""
        t = self.layout.tokens_per_block
        twin = self.pairings[rank].twins.get(slot // t)
        for request in self._live().values():
            table = request.tables[rank % self.cp]
            if twin in table:
                return table.index(twin) * t + slot % t < len(request.ranks[rank % self.cp])
        return False

    # Attention

    def _outputs(
        self, outcomes: Sequence[Outcome], attention: Iterable[Attended], *, all_else_right: bool
    ) -> Iterator[Violation]:
        """ATT-1, ATT-3, ATT-4 and MAP-1 of the merged outputs."""
        tokens = len(outcomes[0].position_ids)
        slices = [
            self._slice(rank, outcome.output, tokens) for rank, outcome in enumerate(outcomes)
        ]
        merged, wrong = np.concatenate(slices, axis=2), list[_WrongOutput]()
        for token, (step, place, exact, bound) in enumerate(attention):
            error = np.sqrt(((merged[:, token] - exact) ** 2).sum(-1))
            right = error <= bound  # a NaN is not within the bound either
            if not right.all():
                output = merged[:, token]
                wrong.append(_WrongOutput(step, place, output, exact, bound, error, ~right))
        if wrong:
            numbers = ["ATT-1", "ATT-4"]
            if all(one.has_other_heads() for one in wrong):
                numbers.append("MAP-1")
            elif all_else_right and all(0 in one.seen for one in wrong):
                numbers.append("ATT-3")  # nothing but the empty rank sets the wrong ones apart
            yield from self._wrong_output(wrong[0], numbers)

    def _merged(self, event: Merge, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """ATT-1 to ATT-4 and MAP-1 of supplied partials, merged."""
        shape = self.config.model
        wanted = (len(event.levels[0]), shape.q_heads // self.world, shape.value_dim)
        slices = [_array(rank, "output", outcome.output) for rank, outcome in enumerate(outcomes)]
        strange = [rank for rank, merged in enumerate(slices) if merged.shape != wanted]
        for rank in strange:
            what = "shape of the merged output: tokens, query heads of the rank's slice, D"
            yield Violation("ATT-1", what, list(wanted), list(slices[rank].shape), rank)
        if strange:
            return
        merged = np.concatenate(slices, axis=1)
        before = self.merges.setdefault(msgspec.json.encode(event), merged)
        if before.tobytes() != merged.tobytes():
            token, head, _ = (int(i) for i in np.argwhere((before != merged) | np.isnan(merged))[0])
            what = f"the same merge again: token {token}, query head {head}, bit for bit"
            first, again = before[token, head].tolist(), merged[token, head].tolist()
            yield Violation("ATT-2", what, first, again, head // wanted[1])
        partials = supplied_partials(self.config, event, range(shape.q_heads))
        exact, bound = exact_merge(shape, *partials)
        error = np.sqrt(((merged - exact) ** 2).sum(-1))
        wrong = ~(error <= bound)  # a NaN is not within the bound either
        if wrong.any():
            tokens = np.flatnonzero(wrong.any(axis=1))
            numbers = ["ATT-1", "ATT-4"]
            if all(_other_heads(merged[t], exact[t], bound[t], wrong[t]) for t in tokens):
                numbers.append("MAP-1")
            elif all(None in (row[token] for row in event.levels) for token in tokens):
                numbers.append("ATT-3")
            if event.order != sorted(event.order):
                numbers.append("ATT-2")
            yield from self._wrong_merge(event, merged, exact, bound, error, wrong, numbers)

    def _wrong_merge(
        self,
        event: Merge,
        merged: Array,
        exact: Array,
        bound: Array,
        error: Array,
        wrong: NDArray[np.bool_],
        numbers: list[str],
    ) -> Iterator[Violation]:
        token, head = (int(i) for i in np.argwhere(wrong)[0])
        levels = [event.levels[number][token] for number in event.order]
        what = f"merge of token {token}, query head {head}; levels on each cp_rank: {levels}"
        expected = {"output": exact[token, head].tolist(), "E": float(bound[token, head])}
        observed = {"output": merged[token, head].tolist(), "error": float(error[token, head])}
        for number in numbers:
            rank = head // (merged.shape[1] // self.world)
            yield Violation(number, what, expected, observed, rank)

    def _slice(self, rank: int, output: Any, tokens: int) -> Array:
        shape = self.config.model
        wanted = (shape.layers, tokens, shape.q_heads // self.world, shape.value_dim)
        array = _array(rank, "output", output)
        if array.shape != wanted:
            raise GarbageError(rank, f"its output has shape {array.shape}, not {wanted}")
        return array

    def _wrong_output(self, wrong: _WrongOutput, numbers: list[str]) -> Iterator[Violation]:
        step, (layer, head) = wrong.step, (int(i) for i in np.argwhere(wrong.where)[0])
        what = (
            f"attention output of request {step.id} at position {step.first + wrong.place}, layer "
            f"{layer}, query head {head}; keys seen on each cp_rank: {wrong.seen}"
        )
        expected = {
            "output": wrong.exact[layer, head].tolist(), "E": float(wrong.bound[layer, head])
        }  # fmt: skip
        observed = {
            "output": wrong.output[layer, head].tolist(), "error": float(wrong.error[layer, head])
        }  # fmt: skip
        rank = head // (self.config.model.q_heads // self.world)
        for number in numbers:
            yield Violation(number, what, expected, observed, rank, step.id)

    # States

    def _views(self, views: Sequence[RankView | None], event: Event | None) -> list[Violation]:
        found: list[Violation] = []
        present = [view for view in views if view is not None]
        if len(present) < len(views):
            return found
        requests = self.model.requests
        preempted = [id for id, request in requests.items() if request.preempted]
        preempted.sort()
        named = requests if event is None else ids_of(event)
        ids = [id for id in named if id in requests and not requests[id].preempted]
        if len(present[0].local_len) > len(ids):
            ids = [id for id, request in requests.items() if not request.preempted]
        whole = len(ids) == len(requests) - len(preempted)
        if "lengths" not in self.profiles or not self._alike(present, ids, preempted):
            live = requests.keys() - preempted
            for rank, view in enumerate(present):
                found += _known(rank, view, live, preempted)
            if found:
                return found
            seen = {id for view in present for id in view.local_len}
            asked = live.intersection(named)
            whole = not seen <= asked or asked == live
            ids = list(live if whole else asked)
            if "lengths" in self.profiles:
                found += self._lengths(present, ids)
        if whole and self.layout.start == "rotated" and "lengths" in self.profiles:
            found += self._rotation(present[: self.cp])
        tables = list(zip(*[requests[id].tables for id in ids], strict=True)) or [()] * self.cp
        for rank, view in enumerate(present):
            if "pages" in self.profiles:
                if not self.pairings[rank].knows(ids, view.block_tables, tables[rank % self.cp]):
                    found += self._tables(rank, view)
                free = len(self.model.pools[rank % self.cp].free)
                if whole or view.free_pages != free:
                    found += self._free(rank, view, free)
            if "cache" in self.profiles:
                found += self._cache(rank, view, event)
        return found

    def _alike(self, views: Sequence[RankView], ids: list[int], preempted: list[int]) -> bool:
        """Whether all views tell of these requests, in this order, what is right, and no more."""
        requests = self.model.requests
        held = list(zip(*[map(len, requests[id].ranks) for id in ids], strict=True))
        for rank, view in enumerate(views):
            if view.preempted != preempted or [*view.local_len] != ids:
                return False
            if ids and (*view.local_len.values(),) != held[rank % self.cp]:
                return False
        return True

    def _live(self) -> dict[int, Request]:
        return {id: r for id, r in self.model.requests.items() if not r.preempted}

    def _lengths(self, views: Sequence[RankView], ids: Sequence[int]) -> Iterator[Violation]:
        """LEN-1, BAL-1 and MAP-1 of these requests, in each group of cp_size ranks."""
        requests = self.model.requests
        if all(
            view.local_len == {id: len(requests[id].ranks[rank % self.cp]) for id in ids}
            for rank, view in enumerate(views)
        ):
            return
        for id in sorted(ids):
            request = self.model.requests[id]
            expected = [len(positions) for positions in request.ranks]
            if self.config.tp_size > 1:
                yield from self._rank_order(expected, [view.local_len.get(id) for view in views])
            for first in range(0, self.world, self.cp):
                observed = [view.local_len.get(id) for view in views[first : first + self.cp]]
                if observed == expected:
                    continue
                what = f"tokens of request {id} on each rank, {len(request.tokens)} in all"
                yield Violation("LEN-1", what, expected, observed, request=id)
                counts = [count or 0 for count in observed]
                if not invariants.bal_1(self.layout, counts):
                    bound = invariants.spread_bound(self.layout)
                    what = f"spread of request {id} over the ranks"
                    yield Violation("BAL-1", what, f"at most {bound}", observed, request=id)

    def _rank_order(self, expected: Sequence[Any], observed: Sequence[Any]) -> Iterator[Violation]:
        """MAP-1 where what the ranks say, by cp_rank, is right for ranks with tp_rank fastest."""
        tp = self.config.tp_size
        right = [expected[rank % self.cp] for rank in range(self.world)]
        swapped = [expected[rank // tp] for rank in range(self.world)]
        if "attention" in self.profiles and observed == swapped != right:
            yield Violation("MAP-1", "what the ranks hold, tp_rank fastest", right, observed)

    def _rotation(self, views: Sequence[RankView]) -> Iterator[Violation]:
        """BAL-3 of every C requests that were admitted in a row and stand alike."""
        admitted = list(self.admitted)
        for first in range(len(admitted) - self.cp + 1):
            row = admitted[first : first + self.cp]
            alike = all(
                (a.prompt_len, a.steps) == (b.prompt_len, b.steps)
                for (_, a), (_, b) in pairwise(row)
            )
            live = all(self.model.requests.get(id) is r and not r.preempted for id, r in row)
            if not (alike and live):
                continue
            ids = [id for id, _ in row]
            lens = [[view.local_len.get(id, 0) for view in views] for id in ids]
            if not invariants.bal_3(lens):
                totals = [sum(column) for column in zip(*lens, strict=True)]
                yield Violation("BAL-3", f"totals of requests {ids}", "all equal", totals)

    def _tables(self, rank: int, view: RankView) -> Iterator[Violation]:
        """PAGE-1, PAGE-2 and GROW-1 on one rank."""
        cp_rank, pairing = rank % self.cp, self.pairings[rank]
        twins_of = {id: self.model.requests[id].tables[cp_rank] for id in view.local_len}
        for id in pairing.changed(view.block_tables, twins_of):
            table, twins = view.block_tables.get(id, []), twins_of[id]
            if len(table) != len(twins):
                what = f"pages of request {id}"
                yield Violation("PAGE-1", what, len(twins), len(table), rank, id)
            yield from pairing.table(rank, id, table, twins)

    def _free(self, rank: int, view: RankView, free: int) -> Iterator[Violation]:
        """PAGE-3 on one rank; where the free pages are right, the view is of all live requests."""
        pool = self.config.pages[rank % self.cp]
        if view.free_pages != free:
            yield Violation("PAGE-3", "free pages", free, view.free_pages, rank)
        elif not invariants.page_3(free, view.block_tables, pool):
            used = len({page for table in view.block_tables.values() for page in table})
            yield Violation("PAGE-3", "distinct pages in block tables", pool - free, used, rank)

    def _cache(self, rank: int, view: RankView, event: Event | None) -> Iterator[Violation]:
        """OWN-1 by contents, POS-2, PAGE-2 and PAGE-4 on one rank."""
        batch = event.ids if isinstance(event, Decode) else []
        for id in view.local_len:
            request, cp_rank = self.model.requests[id], rank % self.cp
            positions = request.ranks[cp_rank]
            keys = self._rows(rank, "keys", view.keys.get(id))
            values = self._rows(rank, "values", view.values.get(id))
            seen = (
                [(position, request.tokens[position]) for position in positions],
                request.high_water[cp_rank],
                sha256(keys.tobytes() + values.tobytes()).digest(),
            )
            if self.sound.get((rank, id)) == seen:
                continue
            keys, values = _at_least(keys, len(positions)), _at_least(values, len(positions))
            wrong = list(self._contents(rank, id, keys, values, batch))
            yield from wrong
            if not wrong:
                self.sound[rank, id] = seen

    def _contents(
        self, rank: int, id: int, keys: Array, values: Array, batch: Sequence[int]
    ) -> Iterator[Violation]:
        """What one rank's rows of one request hold, against what was written there."""
        request, cp_rank = self.model.requests[id], rank % self.cp
        table, positions = request.tables[cp_rank], request.ranks[cp_rank]
        held, heads = len(positions), self._kv_heads(rank)
        least_k, most_k, exact_v = self.oracle.cached(id, positions, heads)
        lost = (values[:, :held] != exact_v).any(axis=(0, 2, 3))
        if lost.any():
            index = int(lost.argmax())
            what = f"V of request {id} at local index {index}, position {positions[index]}"
            row, want = values[0, index, 0].tolist(), exact_v[0, index, 0].tolist()
            yield Violation("OWN-1", what, want, row, rank, id)
            page = table[index // self.layout.tokens_per_block]
            if batch and id not in batch and page.holders > 1:
                yield Violation("PAGE-2", what + ", in a shared page", want, row, rank, id)
        rounded = (least_k <= keys[:, :held]) & (keys[:, :held] <= most_k)
        turned = ~rounded.all(axis=(0, 2, 3)) & ~lost
        if turned.any():
            index = int(turned.argmax())
            what = f"K of request {id} at local index {index}, position {positions[index]}"
            row, want = keys[0, index, 0].tolist(), least_k[0, index, 0].tolist()
            yield Violation("POS-2", what, want, row, rank, id)
        never = slice(request.high_water[cp_rank], None)
        if self.config.poison and not (
            np.isnan(keys[:, never]).all() and np.isnan(values[:, never]).all()
        ):
            what = f"slots of request {id} from local index {never.start} on"
            yield Violation("PAGE-4", what, "never written", "written", rank, id)

    def _rows(self, rank: int, name: str, rows: Any) -> Array:
        """Cached rows (layers, slots, heads, dim), however many slots there are."""
        if rows is None:
            raise GarbageError(rank, f"its view lacks the {name} of a live request")
        shape = self.config.model
        heads = len(self.config.kv_heads_of(rank // self.cp))
        dim = shape.key_dim if name == "keys" else shape.value_dim
        array = _array(rank, name, rows)
        if array.size == 0:
            return np.zeros((shape.layers, 0, heads, dim))
        rest = (shape.layers, heads, dim)
        if array.ndim != 4 or (array.shape[0], *array.shape[2:]) != rest:
            raise GarbageError(
                rank, f"its {name} have shape {array.shape}; layers, heads and dim are {rest}"
            )
        return array

    def _kv_heads(self, rank: int) -> slice:
        heads = self.config.kv_heads_of(rank // self.cp)
        return slice(heads.start, heads.stop)


def wrong_reasons(reason: Reason | None, outcomes: Sequence[Outcome]) -> list[Violation]:
    """REF-1 and REF-2 of what the ranks answered, None standing for accepted."""
    found, given = [], [outcome.reason for outcome in outcomes]
    if all(answer == reason for answer in given):
        return []
    if len(set(given)) > 1:
        found.append(Violation("REF-1", "answers of the ranks", [reason] * len(given), given))
    what = "refusal (null: accepted), rank by rank"
    found.append(Violation("REF-2", what, [reason] * len(given), given))
    return found


def _known(rank: int, view: RankView, live: set[int], preempted: list[int]) -> Iterator[Violation]:
    """REF-2: the rank knows the requests that were accepted, live and preempted."""
    strangers = sorted(view.local_len.keys() - live)
    if strangers or view.preempted != preempted:
        what = "preempted requests, and live ones that should not be"
        yield Violation("REF-2", what, [preempted, []], [view.preempted, strangers], rank)


def _same_columns(outcome: Outcome, wanted: Outcome) -> bool:
    """Whether all that a decode's columns say is right, the outputs left out."""
    return (
        outcome.slots == wanted.slots
        and outcome.past_len == wanted.past_len
        and outcome.position_ids == wanted.position_ids
        and outcome.active == wanted.active
        and outcome.visible == wanted.visible
    )


def _check_columns(rank: int, outcome: Outcome, wanted: Outcome, profiles: frozenset[str]) -> None:
    """Raises GarbageError when a decode's columns have other lengths than its batch."""
    tokens = len(wanted.active)
    if "lengths" in profiles:
        _check_column(rank, "past_len", outcome.past_len, len(wanted.past_len))
    _check_column(rank, "position_ids", outcome.position_ids, tokens)
    _check_column(rank, "active", outcome.active, tokens)
    _check_column(rank, "slots", outcome.slots, tokens)


def _check_column(rank: int, name: str, column: Sequence[Any], right: int) -> None:
    if len(column) != right:
        raise GarbageError(rank, f"its {name} has {len(column)} entries, not {right}")


def _decoded_before(request: Request, step: Step) -> list[int]:
    """Decoded tokens on each cp_rank before the step; each rank's positions rise."""
    return [
        bisect_left(positions, step.first) - bisect_left(positions, request.prompt_len)
        for positions in request.ranks
    ]


def _blamed_on_padding(event: Decode, found: Sequence[Violation]) -> Iterator[Violation]:
    """DUM-1: in a padded step, something changed outside the batch or in the free pages."""
    for violation in found:
        if violation.request is None or violation.request not in event.ids:
            what = f"a step with {event.pad} dummy requests changed {violation.message}"
            yield Violation("DUM-1", what, violation.expected, violation.observed, violation.rank)
            return


@dataclass(frozen=True)
class _WrongOutput:
    """The attention of one token that is outside its bound: arrays by layer and query head."""

    step: Step
    place: int
    output: Array
    exact: Array
    bound: Array
    error: Array
    where: NDArray[np.bool_]

    @property
    def seen(self) -> list[int]:
        """Keys that the token sees on each cp_rank."""
        owners = self.step.owners[: self.place + 1]
        return [past + owners.count(rank) for rank, past in enumerate(self.step.past_len)]

    def has_other_heads(self) -> bool:
        """Whether the heads are all there, in another order: the exchange mixed them up."""
        return all(map(_other_heads, self.output, self.exact, self.bound, self.where))


def _other_heads(output: Array, exact: Array, bound: Array, wrong: NDArray[np.bool_]) -> bool:
    """Whether the wrong outputs (heads, dim) are right ones of other wrong heads."""
    missing = np.flatnonzero(wrong)
    for row in output[wrong]:
        error = np.sqrt(((row - exact[missing]) ** 2).sum(-1))
        found = np.flatnonzero(error <= bound[missing])
        if not len(found):
            return False
        missing = np.delete(missing, found[0])
    return True


def _at_least(rows: Array, slots: int) -> Array:
    """Cached rows, blank ones behind them where they are fewer than the tokens they should hold."""
    blank = np.full((rows.shape[0], max(0, slots - rows.shape[1]), *rows.shape[2:]), np.nan)
    return np.concatenate([rows, blank], axis=1)


def _array(rank: int, name: str, rows: Any) -> Array:
    try:
        return as_array(rows)
    except (TypeError, ValueError, KeyError, OverflowError) as error:
        raise GarbageError(rank, f"its {name} is no array of numbers: {error}") from error
