"""Every answer of every rank against what was expected, invariant by invariant.

The judge names every invariant that fails, in the order of SPEC.md. It never looks at an engine's
error texts. Where everything is equal it looks no closer: whole columns and tables are compared
first.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from helix_conformance.drive.driver import Answer
from helix_conformance.expect.arrays import Array
from helix_conformance.expect.expectation import Expectation, State
from helix_conformance.judge.attention import AttentionJudge
from helix_conformance.judge.cache import CacheJudge
from helix_conformance.judge.failure import Violation, in_order
from helix_conformance.judge.groups import GroupsJudge
from helix_conformance.judge.hits import wrong_hits
from helix_conformance.judge.lengths import LengthsJudge
from helix_conformance.judge.pages import PageMap, PagesJudge
from helix_conformance.judge.placement import Columns, PlacementJudge
from helix_spec.capabilities import STRICT, Freedoms
from helix_spec.config import Config
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Admit, Decode, Event, Merge, Reason, Release, ids_of


class Judge:
    """Judges the answers to one trace.

    Parameters
    ----------
    config
        A legal configuration, with which the ranks were started.
    profiles
        Those that are checked.
    freedoms
        In what the engine differs rightly.
    outputs
        What each decode gave when the same trace was played before; it is appended to.
    maps
        Of a cache group, the pages of each rank as far as they are known.

    Examples
    --------
    The reference answers; then rank 1 answers as rank 0 does, which owns the new token:

    >>> from helix_spec.trace import Watch
    >>> from helix_conformance.drive.in_process import LocalDriver
    >>> from helix_conformance.engines import load_engine
    >>> from helix_conformance.expect.recorder import Recorder
    >>> config = Config(layout="pr9757/1:C=2,T=2", pages=[4, 4], max_len=9)
    >>> driver, profiles = LocalDriver(load_engine("reference")), frozenset({"placement"})
    >>> recorder, judge = Recorder(config), Judge(config, profiles)
    >>> events = [Admit(7, 4), Decode([7], [1])]
    >>> for event, answers in driver.play(config, profiles, events, Watch()):
    ...     if event is not None:
    ...         expected = recorder.next(event)
    ...         print(judge.event(expected, answers))
    ...         wrong = judge.event(expected, [answers[0], answers[0]])
    []
    []
    >>> [violation.invariant for violation in wrong]
    ['OWN-1', 'OWN-2', 'OWN-3']
    """

    def __init__(
        self,
        config: Config,
        profiles: frozenset[str],
        freedoms: Freedoms = STRICT,
        outputs: list[Array] | None = None,
        maps: list[PageMap] | None = None,
    ) -> None:
        self.config = config
        self.profiles = profiles
        self.placement = PlacementJudge(config, profiles)
        self.lengths = LengthsJudge(config, profiles)
        self.pages = PagesJudge(config, profiles, maps)
        self.cache = CacheJudge(config, freedoms.tail)
        self.attention = AttentionJudge(config, [] if outputs is None else outputs)
        self.groups: GroupsJudge | None = None
        if config.groups:
            self.groups = GroupsJudge(
                config,
                profiles,
                lambda alone, maps: Judge(alone, profiles, freedoms, maps=maps),
            )
        self.state: State | None = None
        """The latest state that was expected."""

    def started(self, answers: Sequence[Answer]) -> list[Violation]:
        """Return what is wrong with the answers to a start with a legal configuration.

        Parameters
        ----------
        answers
            Answer of each rank, by global rank.

        Returns
        -------
        list of Violation
            REF-1 and REF-2; empty when all ranks accepted.
        """
        return wrong_reasons(None, [answer.outcome for answer in answers])

    def event(self, expected: Expectation, answers: Sequence[Answer]) -> list[Violation]:
        """Return what is wrong with the answers to the next event of the trace.

        Parameters
        ----------
        expected
            The event's expectation; its state must still be readable.
        answers
            Answer of each rank, by global rank. States are judged when every rank has told one.

        Returns
        -------
        list of Violation
            Every invariant that failed, in the order of SPEC.md. After a wrong refusal nothing else
            is judged.

        Raises
        ------
        MalformedAnswer
            When a column or an array of an answer has another size than the event demands.
        """
        event, outcomes = expected.event, [answer.outcome for answer in answers]
        found = wrong_reasons(expected.refused, outcomes)
        if expected.hit is not None:
            found = found or wrong_hits(expected.hit, [outcome.hit for outcome in outcomes])
        if found:
            return found  # the engines went another way: their states say no more
        if expected.refused is None and any(answer.view is None for answer in answers):
            self.pages.pass_over()
        if expected.refused is None:
            self._follow(event, expected.state)
        in_state = list[Violation]()
        self.state = expected.state
        if self.groups is not None:
            found = self.groups.event(expected, answers)
        elif expected.state is not None:
            in_state = self._views(expected.state, [answer.view for answer in answers], event)
        if expected.decoded is not None:
            if self.groups is None:
                found += self._decoded(expected, outcomes)
            if "attention" in self.profiles and expected.outputs is not None:
                right = not found and not in_state
                found += self.attention.decoded(expected, outcomes, all_else_right=right)
        if isinstance(event, Merge) and expected.outputs is not None:
            found += self.attention.merged(event, expected.outputs(), outcomes)
        if in_state and expected.refused is not None:
            what = f"an event refused as {expected.refused} changed the state"
            found.append(Violation("PAGE-5", what))
        if in_state and isinstance(event, Decode) and event.pad > 0:
            found += _blamed_on_padding(event, in_state)
        return in_order(found + in_state) if found or in_state else []

    def finished(self, answers: Sequence[Answer]) -> list[Violation]:
        """Return what is wrong with the states of all ranks at the end.

        Parameters
        ----------
        answers
            Answer of each rank, by global rank.

        Returns
        -------
        list of Violation
            Every invariant that failed; empty where no state was ever expected or told.

        Raises
        ------
        MalformedAnswer
            When an array of a state has another shape than it must have.
        """
        if self.groups is not None:
            return in_order(self.groups.finished(answers))
        if self.state is None:
            return []
        return in_order(self._views(self.state, [answer.view for answer in answers], None))

    def _follow(self, event: Event, state: State | None) -> None:
        """Take in an accepted event: admissions in order, and who is forgotten."""
        if isinstance(event, Admit) and state is not None and state.requests is not None:
            if event.prefix is None:
                self.lengths.admitted.append((event.id, state.requests[event.id]))
            else:  # it has another's shift
                self.lengths.admitted.clear()
        if isinstance(event, Release):
            self.cache.forget(event.id)
            self.pages.forget(event.id)

    def _decoded(self, expected: Expectation, outcomes: Sequence[Outcome]) -> Iterator[Violation]:
        """What is wrong with the columns of an accepted decode."""
        columns = Columns(expected, self.config, self.pages.slots(expected))
        if all(map(columns.are_those_of, range(len(outcomes)), outcomes)):
            return
        columns.check_sizes(outcomes, self.profiles)
        yield from self.placement.columns(columns, outcomes)
        yield from self.lengths.columns(columns, outcomes)
        if columns.active_differs(outcomes):
            yield from self.placement.owners(columns, outcomes)
            yield from self.placement.balance(expected, outcomes)
        if columns.slots_differ(outcomes):  # also when a page is seen for the first time
            yield from self.pages.written(expected, self.state, outcomes)

    def _views(
        self, state: State, views: Sequence[RankView | None], event: Event | None
    ) -> list[Violation]:
        """What is wrong with the ranks' states; of an event, those of the requests it names."""
        present = [view for view in views if view is not None]
        if len(present) < len(views):
            return []
        live, preempted = state.live, state.preempted
        ids = list(live) if event is None else [id for id in ids_of(event) if id in live]
        if len(present[0].local_len) > len(ids):
            ids = list(live)
        whole = len(ids) == len(live)
        found = list[Violation]()
        if "lengths" not in self.profiles or not self.lengths.equal(state, present, ids, preempted):
            for rank, view in enumerate(present):
                found += _known(rank, view, set(live), preempted)
            if found:
                return found
            seen = {id for view in present for id in view.local_len}
            named = set(live) if event is None else set(live).intersection(ids_of(event))
            whole = not seen <= named or named == set(live)
            ids = sorted(live if whole else named)
            if "lengths" in self.profiles:
                found += self.lengths.held(state, present, ids)
        if whole and "lengths" in self.profiles:
            found += self.lengths.rotation(state, present)
        if "pages" in self.profiles:
            found += self.pages.held(state, present, ids, whole=whole)
        if "cache" in self.profiles:
            batch = event.ids if isinstance(event, Decode) else []
            for rank, view in enumerate(present):
                found += self.cache.rows(state, rank, view, batch)
        return found


def wrong_reasons(reason: Reason | str | None, outcomes: Sequence[Outcome]) -> list[Violation]:
    """Return REF-1 and REF-2 of what the ranks answered.

    Parameters
    ----------
    reason
        The refusal that is expected; None for an event that is accepted.
    outcomes
        Outcome of each rank, by global rank.

    Returns
    -------
    list of Violation
        REF-2 when a rank answers another reason, after REF-1 when the ranks disagree.

    Examples
    --------
    >>> refused = Outcome(reason=Reason.TOO_LONG)
    >>> [violation.invariant for violation in wrong_reasons(Reason.TOO_LONG, [refused, Outcome()])]
    ['REF-1', 'REF-2']
    """
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


def _blamed_on_padding(event: Decode, found: Sequence[Violation]) -> Iterator[Violation]:
    """DUM-1: in a padded step, something changed outside the batch or in the free pages."""
    for violation in found:
        if violation.request is None or violation.request not in event.ids:
            what = f"a step with {event.pad} dummy requests changed {violation.message}"
            yield Violation("DUM-1", what, violation.expected, violation.observed, violation.rank)
            return
