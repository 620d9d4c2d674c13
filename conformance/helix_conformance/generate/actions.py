"""Actions: what a scheduler means to do next, whatever the state is.

An action is drawn without a look at the state. It holds numbers that mean something in any state,
so that a list of actions stays meaningful when some are left out, and shrinks well. `events`
returns the events that an action means in the state of a recorder, none where it fits nobody.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count, islice, permutations
from typing import ClassVar, Final, Self

import msgspec

from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.choices import Choices
from helix_spec import events as ev
from helix_spec.events import MERGE, PREFIX, Event

PICKS: Final = 7
"""The largest pick of one of the requests; each is taken modulo their number."""
SHORT: Final = range(1, 41)
"""Lengths of prompts."""
LONG: Final = 100
"""Prompts of more tokens are admitted one at a time."""
LONG_ENOUGH: Final = 1000
"""The most slots of pools that a prompt is made to fill."""
FAR_IDS: Final = (2**32, 2**40, 2**53 - 2**10)
"""Large ids begin here: kept in 32 or 40 bits they are the small ones, or those a float32 holds."""
BEYOND: Final = 2**32 + 1
"""A number that is 1 in 32 bits."""


@dataclass(frozen=True)
class Scope:
    """What actions may ask of an engine.

    Parameters
    ----------
    features : frozenset of str
        Features that the engine declares.
    undeclared : frozenset of str
        Features that it does not declare, and that a wrong event may need.
    prompt_lens : sequence of sequences of int
        Ranges of prompt lengths in tokens, each range as likely as any other.
    long_groups : sequence of int
        Lengths of long groups, in tokens.
    """

    features: frozenset[str]
    undeclared: frozenset[str] = frozenset()
    prompt_lens: Sequence[Sequence[int]] = (SHORT,)
    long_groups: Sequence[int] = (8, 17)

    @cached_property
    def kinds(self) -> list[type[Action]]:
        """Kinds of actions that the features allow, each as often as its weight says."""
        return [
            kind
            for kind in ACTIONS
            if kind.needs in (None, *self.features)
            for _ in range(kind.weight)
        ]

    @cached_property
    def askable(self) -> frozenset[str]:
        """Features that a wrong event may need."""
        return frozenset({"overlap", *self.features, *self.undeclared})


class Action(msgspec.Struct, frozen=True):
    """One action; `events` says what it means."""

    needs: ClassVar[str | None] = None
    """The feature without which an engine is not asked for it."""
    weight: ClassVar[int] = 1
    """How likely it is, beside the others."""
    goes_on: ClassVar[bool] = False
    """Whether it goes on after a refusal, since that is what it is about."""

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """Return an action of this kind.

        Parameters
        ----------
        choices : Choices
            What makes the choices.
        scope : Scope
            What the action may ask of the engine.

        Returns
        -------
        Action
            An object of this class.
        """
        raise NotImplementedError

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """Return the events that the action means now.

        Parameters
        ----------
        recorder : Recorder
            Its state is that after the events so far. It must have seen each event that is
            returned before the next one is taken.
        told : sequence of Event
            Events of the trace so far.

        Returns
        -------
        iterable of Event
            Empty where the action fits no request.
        """
        raise NotImplementedError


class _OfOne(Action, frozen=True):
    """An action on one request."""

    pick: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        return cls(choices.integer(0, PICKS))


class Admit(Action, frozen=True):
    """New requests of one length: many short ones, or a long one."""

    weight = 2
    prompt_len: int
    copies: int = 1
    first_id: int = 0
    """Ids below this one are not taken."""

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        copies = choices.pick((1, 1, 1, 1, 1, 1, 1, 2, 9, 17))
        prompt_len = choices.pick(choices.pick(scope.prompt_lens))
        return cls(prompt_len, copies, _first_id(choices))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        copies = self.copies if self.prompt_len <= LONG else 1
        fresh = _fresh(recorder, copies, self.first_id)
        return [ev.Admit(id, self.prompt_len) for id in fresh]


class Decode(Action, frozen=True):
    """Steps of a batch; with overlap the scheduler samples as late as it may."""

    weight = 3
    picks: tuple[int, ...] = ()
    query_lens: tuple[int, ...] = (1,)
    times: int = 1
    pad: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        picks, query_lens = _batch(choices), _query_lens(choices, scope)
        times = choices.pick((1, 1, 1, 2, 3, 4, 5, 6, 7, 8, 9))
        pad = choices.pick((0, 0, 0, 1, 2, 3, 33)) if "padding" in scope.features else 0
        return cls(picks, query_lens, times, pad)

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        ids = _picked(_live(recorder), self.picks)
        if not ids:
            return []
        decode = ev.Decode(ids, _lens(ids, self.query_lens), self.pad)
        return _repeated(recorder, decode, self.times)


class Leap(Decode, frozen=True):
    """A step with one long group, after which turns repeat."""

    needs = "speculative"
    weight = 1

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        picks = _lists(choices, range(PICKS + 1), 1, 2)
        one = () if choices.one_in(2) else (1,)
        return cls(picks, (choices.pick(scope.long_groups), *one))


class Release(Action, frozen=True):
    """A request ends, or all do."""

    picks: tuple[int, ...] = ()

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(() if choices.one_in(5) else (choices.integer(0, PICKS),))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        return [ev.Release(id) for id in _picked(list(recorder.state.requests), self.picks)]


class Skip(Action, frozen=True):
    """A step that never runs."""

    picks: tuple[int, ...] = ()
    query_lens: tuple[int, ...] = (1,)

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(_batch(choices), _query_lens(choices, scope))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        ids = _picked(_live(recorder), self.picks)
        return [ev.Skip(ids, _lens(ids, self.query_lens))] if ids else []


class Accept(_OfOne, frozen=True):
    """Part of a group is kept, once the scheduler has learned what was sampled."""

    needs = "speculative"
    kept: int = 1

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(choices.integer(0, PICKS), choices.integer(1, 7))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        requests = recorder.state.requests
        for id in _picked([id for id in _live(recorder) if requests[id].open_group], (self.pick,)):
            yield from [ev.Sampled([id])] * requests[id].outstanding
            yield ev.Accept(id, 1 + (self.kept - 1) % requests[id].open_group)


class Fork(_OfOne, frozen=True):
    """A request is copied; pick -1 is the latest request, which may be a fork itself."""

    needs = "fork"
    copies: int = 1
    first_id: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        pick = choices.pick((0, 1, 2, 3, 4, -1))
        return cls(pick, choices.pick((1, 1, 2, 3)), _first_id(choices))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        children = _fresh(recorder, self.copies, self.first_id)
        return [
            ev.Fork(parent, child)
            for parent in _picked(_live(recorder), (self.pick,))
            for child in children
        ]


class Preempt(_OfOne, frozen=True):
    """A request gives its pages back and stays known."""

    needs = "preempt"

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        return [ev.Preempt(id) for id in _picked(_live(recorder), (self.pick,))]


class Resume(_OfOne, frozen=True):
    """A preempted request is placed anew; where there is none, one is preempted first."""

    needs = "preempt"

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        waiting = [id for id, request in recorder.state.requests.items() if request.preempted]
        if waiting:
            return [ev.Resume(id) for id in _picked(waiting, (self.pick,))]
        ids = _picked(_live(recorder), (self.pick,))
        return [event for id in ids for event in (ev.Preempt(id), ev.Resume(id))]


class Sampled(Action, frozen=True):
    """The scheduler learns what outstanding decodes sampled."""

    needs = "overlap"
    picks: tuple[int, ...] = ()

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(_batch(choices))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        ids = _picked(_outstanding(recorder), self.picks)
        return [ev.Sampled(ids)] if ids else []


class Repeat(Action, frozen=True):
    """The event before once more, as a scheduler that has missed the answer sends it."""

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls()

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        return told[-1:]


class Fill(Action, frozen=True):
    """A prompt that takes all the room but so many tokens, or one token more than there is."""

    spare: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(choices.pick((0, 1, 2, 3, -1)))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        [fresh] = _fresh(recorder, 1)
        return [_filling(recorder, fresh, self.spare)]


class Starve(_OfOne, frozen=True):
    """A request is preempted, another takes nearly all its room, and it must wait to resume."""

    needs = "preempt"
    goes_on = True
    spare: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(choices.integer(0, PICKS), choices.integer(0, 3))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        for id in _picked(_live(recorder), (self.pick,)):
            yield ev.Preempt(id)
            first, second = _fresh(recorder, 2)
            yield _filling(recorder, first, self.spare)
            yield ev.Resume(id)
            yield ev.Admit(second, 1)
            yield ev.Release(first)
            yield ev.Resume(id)


class Cut(_OfOne, frozen=True):
    """A long group of which little is kept; what the request does next finds it rewound."""

    needs = "speculative"
    query_len: int = 2
    kept: int = 1
    then: str = "decode"

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        group = choices.pick(scope.long_groups)
        kept = 1 + choices.pick((0, 1, group // 2)) % group
        after = ["decode", *(kind for kind in ("fork", "preempt") if kind in scope.features)]
        return cls(choices.integer(0, PICKS), group, kept, choices.pick(after))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        for id in _picked(_live(recorder), (self.pick,)):
            yield from _repeated(recorder, ev.Decode([id], [self.query_len]), 1)
            yield from [ev.Sampled([id])] * recorder.state.requests[id].outstanding
            yield ev.Accept(id, self.kept)
            [child] = _fresh(recorder, 1)
            if self.then == "fork":
                yield ev.Fork(id, child)
                yield from _repeated(recorder, ev.Decode([child, id], [1, 1]), 1)
            elif self.then == "preempt":
                yield ev.Preempt(id)
                yield ev.Resume(id)
            yield from _repeated(recorder, ev.Decode([id], [1]), 2)


class Late(_OfOne, frozen=True):
    """A request loses a right, and is asked for what needs it at once; then for what does not."""

    weight = 2
    goes_on = True
    kind: str = "release"
    first: int = 0
    """Which of the events that are late comes first, modulo what there is."""

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        kinds = [kind for kind in LOSING if EVENTS[kind] in (None, *scope.features)]
        return cls(choices.integer(0, PICKS), choices.pick(kinds), choices.integer(0, PICKS))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        for id in _picked(_live(recorder), (self.pick,)):
            request, live = recorder.state.requests[id], _live(recorder)
            [fresh] = _fresh(recorder, 1)
            losing: dict[str, Event] = {
                "release": ev.Release(id),
                "preempt": ev.Preempt(id),
                "accept": ev.Accept(id, 1),
                "sampled": ev.Sampled([id]),
                "fork": ev.Fork(id, fresh),
            }
            yield from [losing["sampled"]] * request.outstanding
            yield losing[self.kind]
            late: dict[str, Event] = {
                "decode": ev.Decode(live, [1] * len(live)),
                "skip": ev.Skip([id], [1]),
                "resume": ev.Resume(id),
                **losing,
            }
            asked = [e for kind, e in late.items() if EVENTS[kind] in (None, *recorder.declared)]
            place = self.first % len(asked)
            yield from asked[place:] + asked[:place]


class Stray(Action, frozen=True):
    """An event for several requests, one of which it does not fit; then for the others alone."""

    goes_on = True
    kind: str
    picks: tuple[int, ...] = (0,)
    place: int = 0
    """Where in the batch the stray is, modulo what there is."""

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        kinds = ("decode", "skip", *(("sampled",) if "overlap" in scope.features else ()))
        picks = _lists(choices, range(PICKS + 1), 1, 4)
        return cls(choices.pick(kinds), picks, choices.integer(0, 4))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        fitting = _outstanding(recorder) if self.kind == "sampled" else _live(recorder)
        ids = _picked(fitting, self.picks)
        if not ids:
            return []
        known = [id for id in recorder.state.requests if id not in fitting]
        stray, place = [*known, *_fresh(recorder, 1)][0], self.place % (len(ids) + 1)
        batches = [*ids[:place], stray, *ids[place:]], ids
        if self.kind == "sampled":
            return [ev.Sampled(batch) for batch in batches]
        event = ev.Skip if self.kind == "skip" else ev.Decode
        return [event(batch, [1] * len(batch)) for batch in batches]


class Lineage(_OfOne, frozen=True):
    """A fork grows and is forked too; they end in some order, and one takes all their room."""

    needs = "fork"
    goes_on = True
    order: int = 0
    """Of their six orders, the one in which they end."""
    spare: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        pick, order = choices.integer(0, PICKS), choices.integer(0, 5)
        return cls(pick, order, choices.pick((0, 1, -1)))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        block = recorder.config.layout.tokens_per_block
        for id in _picked(_live(recorder), (self.pick,)):
            child, grandchild = _fresh(recorder, 2)
            yield ev.Fork(id, child)
            yield from _repeated(recorder, ev.Decode([child], [1]), min(8, block))
            yield ev.Fork(child, grandchild)
            for one in list(permutations((id, child, grandchild)))[self.order]:
                yield ev.Release(one)
            yield _filling(recorder, child, self.spare)


class Reuse(_OfOne, frozen=True):
    """A prompt that begins as another request does, known or released, up to about a block's end.

    It goes on for some tokens. It may have another salt, and then a copy that has the same one.
    """

    needs = PREFIX
    weight = 4
    blocks: int = 1
    """Blocks of T * C tokens of the source that are named, modulo what there is; -1 for all."""
    beside: int = 0
    """Tokens more than these blocks."""
    more: int = 1
    """Tokens of the prompt's own."""
    salt: int | None = None
    """None for that of the source."""
    copies: int = 1

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(
            choices.integer(0, PICKS),
            choices.pick((1, 2, 3, -1, -1)),
            choices.pick((-1, 0, 0, 1)),
            choices.pick((0, 1, 1, 2, 5, 17)),
            choices.pick((None, None, None, 0, 1)),
            choices.pick((1, 1, 1, 2, 3)),
        )

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        sources = recorder.sources
        for of in _picked(list(sources), (self.pick,)):
            salt = self.salt
            if salt is None:
                salt = recorder.salt_of(of)
            for id in _fresh(recorder, self.copies):
                prefix = ev.Prefix(of, _about(recorder, sources[of], self.blocks, self.beside))
                yield ev.Admit(id, prefix.len + self.more, 0, prefix, salt)


class Salted(Action, frozen=True):
    """A request of a salt, which begins as no other does."""

    needs = PREFIX
    prompt_len: int
    salt: int = 1

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(choices.pick(choices.pick(scope.prompt_lens)), choices.pick((1, 2, 2**32 - 1)))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        return [ev.Admit(id, self.prompt_len, salt=self.salt) for id in _fresh(recorder, 1)]


class Heirs(_OfOne, frozen=True):
    """A request ends or is preempted, others ask for its tokens, before and after pages are taken.

    The first may find them in free pages; the last comes when they were given to others.
    """

    needs = PREFIX
    weight = 2
    goes_on = True
    ends: str = "release"
    blocks: int = -1
    beside: int = 0
    spare: int = -1
    """Tokens of room that a request leaves which takes the pages; below 0 there is none."""

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        ends = ["release", *(["preempt"] if "preempt" in scope.features else [])]
        return cls(
            choices.integer(0, PICKS),
            choices.pick(ends),
            choices.pick((1, 2, -1, -1)),
            choices.pick((-1, 0, 0, 1)),
            choices.pick((-1, 0, 2, 9)),
        )

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        for id in _picked(_live(recorder), (self.pick,)):
            salt = recorder.salt_of(id)
            yield ev.Release(id) if self.ends == "release" else ev.Preempt(id)
            prefix = ev.Prefix(id, _about(recorder, recorder.sources[id], self.blocks, self.beside))
            first, second, third = _fresh(recorder, 3)
            yield ev.Admit(first, prefix.len + 1, 0, prefix, salt)
            yield ev.Release(first)
            if self.spare >= 0:
                yield _filling(recorder, second, self.spare)
                yield ev.Release(second)
            yield ev.Admit(third, prefix.len + 1, 0, prefix, salt)
            if self.ends == "preempt":
                yield ev.Resume(id, prefix.len)


class Descent(_OfOne, frozen=True):
    """Prompts that begin each as the one before; they end in some order, one takes the room."""

    needs = PREFIX
    weight = 2
    goes_on = True
    order: int = 0
    more: int = 1
    spare: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        more, spare = choices.pick((1, 2, 5, 17)), choices.pick((0, 1, -1))
        return cls(choices.integer(0, PICKS), choices.integer(0, 5), more, spare)

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        for id in _picked(_live(recorder), (self.pick,)):
            first, second = _fresh(recorder, 2)
            for of, fresh in ((id, first), (first, second)):
                prefix = ev.Prefix(of, recorder.sources.get(of, 1))
                salt = recorder.salt_of(of)
                yield ev.Admit(fresh, prefix.len + self.more, 0, prefix, salt)
                if fresh not in recorder.state.requests:
                    return
                yield from _repeated(recorder, ev.Decode([fresh], [1]), 2)
            for one in list(permutations((id, first, second)))[self.order]:
                yield ev.Release(one)
            yield _filling(recorder, first, self.spare)


class Back(_OfOne, frozen=True):
    """A preempted request looks for its tokens; where none is, a live one is preempted first."""

    needs = PREFIX
    goes_on = True
    blocks: int = -1
    beside: int = 0

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        return cls(choices.integer(0, PICKS), choices.pick((1, -1, -1)), choices.pick((-1, 0, 1)))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        if "preempt" not in recorder.declared:
            return
        gone = recorder.state.preempted
        for id in _picked(gone or _live(recorder), (self.pick,)):
            if not gone:
                yield ev.Preempt(id)
            total = recorder.sources[id]
            yield ev.Resume(id, _about(recorder, total, self.blocks, self.beside))


class Misnamed(_OfOne, frozen=True):
    """A prefix that names too much, nothing, or nobody."""

    needs = PREFIX
    kind: str = "unknown"
    by: int = 1

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        kinds = ("unknown", "none", "below", "beyond source", "beyond prompt", "taken", "resume")
        return cls(choices.integer(0, PICKS), choices.pick(kinds), choices.pick((1, 2, BEYOND)))

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        sources = recorder.sources
        strangers = (
            id for id in count() if id not in sources and id not in recorder.state.requests
        )
        fresh, stranger = islice(strangers, 2)
        for of in _picked(list(sources), (self.pick,)):
            n = sources[of]
            wrong: dict[str, Event] = {
                "unknown": ev.Admit(fresh, n + 1, 0, ev.Prefix(stranger, n)),
                "none": ev.Admit(fresh, n + 1, 0, ev.Prefix(of, 0)),
                "below": ev.Admit(fresh, n + 1, 0, ev.Prefix(of, -self.by)),
                "beyond source": ev.Admit(fresh, n + 9, 0, ev.Prefix(of, n + self.by)),
                "beyond prompt": ev.Admit(fresh, n - 1, 0, ev.Prefix(of, n)),
                "taken": ev.Admit(of, n + 1, 0, ev.Prefix(of, n)),
                "resume": ev.Resume(of, n + self.by),
            }
            yield wrong[self.kind]


class Wrong(Action, frozen=True):
    """An event whose ids and counts were not looked at: most of them must be refused."""

    weight = 2
    kind: str
    picks: tuple[int, ...] = ()
    """Of those that it may name, preempted ones first; the last one (pick -1) is not known."""
    query_lens: tuple[int, ...] = ()
    number: int = 0
    """The prompt length of an admission, the tokens kept of a group, the pad of a decode."""

    @classmethod
    def drawn(cls, choices: Choices, scope: Scope) -> Self:
        """See `Action.drawn`."""
        askable = [kind for kind, needs in EVENTS.items() if needs in (None, *scope.askable)]
        kind = choices.pick(["decode", "decode", *askable])
        picks = _lists(choices, (0, 1, 2, -1), 0, 3)
        query_lens, number = tuple[int, ...](), 0
        if kind in ("decode", "skip"):
            some = (2, 9) if "speculative" in scope.askable else ()
            lens = _lists(choices, (1, 1, 1, 0, -1, BEYOND, *some), 1, 2)
            uneven = choices.pick((0, 0, 0, 1, -1))
            query_lens = tuple(_lens(picks, lens)[: len(picks) + min(uneven, 0)])
            query_lens += (1,) * (uneven > 0)
        if kind == "decode":
            number = choices.pick((0, 0, 1, -1) if "padding" in scope.askable else (0, 0, 0, -1))
        elif kind == "admit":
            number = choices.pick((1, 10**6, 0, -1, BEYOND))
        elif kind == "accept":
            number = choices.pick((1, 9, 0, -1, BEYOND))
        return cls(kind, picks, query_lens, number)

    def events(self, recorder: Recorder, told: Sequence[Event]) -> Iterable[Event]:
        """See `Action.events`."""
        requests, c = recorder.state.requests, recorder.config.layout.cp_size
        known = sorted(requests, key=lambda id: not requests[id].preempted)
        anyone = [*known, *_fresh(recorder, 1)]
        ids = [anyone[pick % len(anyone)] for pick in self.picks]
        first, last = (ids[0], ids[-1]) if ids else (anyone[-1], anyone[-1])
        lens = list(self.query_lens)
        events: dict[str, Event] = {
            "admit": ev.Admit(first, self.number),
            "decode": ev.Decode(ids, lens, self.number),
            "release": ev.Release(first),
            "skip": ev.Skip(ids, lens),
            "accept": ev.Accept(first, self.number),
            "fork": ev.Fork(first, last),
            "preempt": ev.Preempt(first),
            "resume": ev.Resume(first),
            "sampled": ev.Sampled(ids),
            MERGE: ev.Merge([[0]] * c, list(range(c))),
        }
        return [events[self.kind]]


ACTIONS: Final[tuple[type[Action], ...]] = (
    *(Admit, Decode, Release, Skip, Accept, Fork, Preempt, Resume, Sampled),
    *(Repeat, Fill, Cut, Late, Stray, Leap, Starve, Lineage, Wrong),
    *(Reuse, Salted, Heirs, Descent, Back, Misnamed),
)
"""All kinds of actions, simple ones first."""
EVENTS: Final[dict[str, str | None]] = {
    **{kind.__name__.lower(): kind.needs for kind in ACTIONS[:9]},
    MERGE: MERGE,
}
"""Kinds of events, with the feature that each needs."""


LOSING: Final = ("release", "preempt", "accept", "sampled")
"""Events after which a request no longer has the right to others."""


def draw_action(choices: Choices, scope: Scope) -> Action:
    """Return an action of some kind that the scope allows.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    scope : Scope
        What the action may ask of the engine.

    Returns
    -------
    Action
        Kinds are as likely as their weights say.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> isinstance(draw_action(Seeded("0"), Scope(frozenset())), Action)
    True
    """
    return choices.pick(scope.kinds).drawn(choices, scope)


def _lists(choices: Choices, options: Sequence[int], low: int, high: int) -> tuple[int, ...]:
    return tuple(choices.lists(lambda more: more.pick(options), low, high))


def _first_id(choices: Choices) -> int:
    return choices.pick((*(0,) * 9, *FAR_IDS))


def _batch(choices: Choices) -> tuple[int, ...]:
    """Return picks of a batch; all requests when empty."""
    return () if choices.one_in(2) else _lists(choices, range(PICKS + 1), 1, 4)


def _query_lens(choices: Choices, scope: Scope) -> tuple[int, ...]:
    if "speculative" not in scope.features or choices.integer(0, 1) == 0:
        return (1,)
    return _lists(choices, range(1, 8), 1, 3)


def _lens(ids: Sequence[int], lens: Sequence[int]) -> list[int]:
    """Return a length for each request, these in turn."""
    return [lens[place % len(lens)] for place in range(len(ids))]


def _picked(ids: Sequence[int], picks: Sequence[int]) -> list[int]:
    """Return some of the requests, none twice; all of them when there are no picks."""
    return list(dict.fromkeys(ids[pick % len(ids)] for pick in picks if ids)) or list(ids)


def _live(recorder: Recorder) -> list[int]:
    return list(recorder.state.live)


def _outstanding(recorder: Recorder) -> list[int]:
    """Return the live requests of which a decode is not sampled yet."""
    return [id for id in recorder.state.live if recorder.state.requests[id].outstanding]


def _fresh(recorder: Recorder, number: int, first: int = 0) -> list[int]:
    """Return so many ids that no request has, from the first on."""
    return list(islice((id for id in count(first) if id not in recorder.state.requests), number))


def _repeated(recorder: Recorder, decode: ev.Decode, times: int) -> Iterator[Event]:
    """Yield a decode again and again; with overlap the scheduler samples as late as it may."""
    behind = {id: recorder.state.requests[id].outstanding for id in decode.ids}
    for _ in range(times):
        late = [id for id in decode.ids if behind[id] == 2]
        if late:
            yield ev.Sampled(late)
        yield decode
        for id in decode.ids:
            behind[id] += recorder.config.overlap - (id in late)


def _about(recorder: Recorder, total: int, blocks: int, beside: int) -> int:
    """Return a length from 1 to total: so many blocks of T * C tokens, or all, and some beside."""
    unit = recorder.config.layout.cp_size * recorder.config.layout.tokens_per_block
    whole = total // unit
    wanted = total if blocks < 0 or not whole else unit * (1 + (blocks - 1) % whole)
    return max(1, min(total, wanted + beside))


def _filling(recorder: Recorder, id: int, spare: int) -> Event:
    """Return an admission that takes all the room now but for so many tokens."""
    slots = sum(recorder.state.free_pages) * recorder.config.layout.tokens_per_block
    lengths = range(1, 1 + min(slots, recorder.config.max_len)) if slots <= LONG_ENOUGH else ()
    longest = bisect_left(
        lengths, True, key=lambda n: recorder.refusal(ev.Admit(id, n)) is not None
    )
    return ev.Admit(id, max(1, longest - spare))
