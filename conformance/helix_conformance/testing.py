"""What an engine's own tests draw or subclass: strategies, and a state machine.

`engine_machine(MyEngine).TestCase` is a test class for engines whose ranks live in one process.
Each rule is one kind of action, and all state is judged after every event. IMPLEMENTING.md shows
its use; a subclass may add rules of its own, which call `tell`.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Iterator, Sequence
from typing import Any, ClassVar

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule

from helix_conformance.drive.driver import Played
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.expect.recorder import Recorder
from helix_conformance.foreign import shown_lines
from helix_conformance.generate.actions import Action, Scope
from helix_conformance.generate.strategies import actions as actions
from helix_conformance.generate.strategies import configs as configs
from helix_conformance.generate.strategies import illegal_configs as illegal_configs
from helix_conformance.generate.strategies import layouts as layouts
from helix_conformance.generate.strategies import merge_traces as merge_traces
from helix_conformance.generate.strategies import model_shapes as model_shapes
from helix_conformance.generate.strategies import traces as traces
from helix_conformance.judge.failure import Failure, Violation
from helix_conformance.judge.judge import Judge
from helix_conformance.judge.play import profiles_to_check
from helix_conformance.report.text import failure_text
from helix_spec.engine import Engine
from helix_spec.events import FEATURES, Event
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace, Watch


class EngineMachine(RuleBasedStateMachine):
    """One engine under test, as a state machine; `engine_machine` fills in which, and the rules.

    Attributes
    ----------
    engine
        A class whose ranks live in one process.
    profiles
        Profiles to check.
    names
        Names of the layouts that it is started with.
    """

    engine: ClassVar[type[Engine]]
    profiles: ClassVar[frozenset[str]]
    names: ClassVar[Sequence[str]]

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """Start all ranks with one configuration.

        Parameters
        ----------
        data
            What the configuration is drawn from.

        Raises
        ------
        AssertionError
            When a rank refuses to start; the message is the failure's text.
        """
        features = self.profiles.intersection(FEATURES)
        config = data.draw(configs(names=self.names, cp_sizes=(1, 2, 3, 4), features=features))
        driver = LocalDriver(self.engine)
        self.freedoms = driver.freedoms
        self.judge = Judge(config, self.profiles, self.freedoms)
        self.recorder = Recorder(config, self.engine.profiles, self.freedoms)
        self.told = list[Event]()
        self.waiting = deque[Event]()
        events: Iterator[Event] = iter(self.waiting.popleft, None)
        play = driver.play(config, self.profiles, events, Watch())
        self.play: Iterator[Played] = iter(play)
        self._demand(None, self.judge.started(next(self.play)[1]))

    def act(self, action: Action) -> None:
        """Tell the events that an action means now, until one is refused.

        Parameters
        ----------
        action
            The action; one that `goes_on` is not ended by a refusal.

        Raises
        ------
        AssertionError
            When an answer is wrong; the message is the failure's text.
        """
        for event in action.events(self.recorder, self.told):
            if not self.tell(event) and not action.goes_on:
                break

    def tell(self, event: Event) -> bool:
        """Play one event and judge all ranks; return whether it was accepted.

        Parameters
        ----------
        event
            The next event of the trace.

        Raises
        ------
        AssertionError
            When an answer is wrong; the message is the failure's text.
        EngineFailure, MalformedAnswer
            When a rank does not answer, or gives columns or arrays of another size.
        """
        self.told.append(event)
        self.waiting.append(event)
        expected = self.recorder.next(event)
        _, answers = next(self.play)
        self._demand(expected.index, self.judge.event(expected, answers))
        return expected.refused is None

    def _demand(self, event: int | None, violations: list[Violation]) -> None:
        if violations:
            trace = Trace(config=self.judge.config, events=self.told, freedoms=self.freedoms)
            failure = Failure(trace=trace, event=event, violations=violations)
            raise AssertionError(shown_lines(failure_text(failure)))


def engine_machine(
    engine: type[Engine], asked: Collection[str] = (), *, names: Sequence[str] = LAYOUT_NAMES
) -> type[EngineMachine]:
    """Return the state machine of an engine.

    Parameters
    ----------
    engine
        A class whose ranks live in one process.
    asked
        Those of its profiles that are checked; all that it declares when empty.
    names
        Names of the layouts that it is started with.

    Returns
    -------
    type of EngineMachine
        A class of Hypothesis; its `TestCase` is a class of tests.

    Examples
    --------
    >>> from helix_conformance.engines import load_engine
    >>> machine = engine_machine(load_engine("reference"), ["lengths"])
    >>> sorted(machine.profiles)
    ['lengths', 'placement']
    >>> TestMyEngine = machine.TestCase
    """
    profiles = profiles_to_check(engine.profiles, asked)
    features = profiles.intersection(FEATURES)
    parts: dict[str, Any] = {"engine": engine, "profiles": profiles, "names": names}
    for kind in Scope(features).kinds:
        acts = rule(action=actions(features=features, kinds=[kind]))
        parts[kind.__name__.lower()] = acts(EngineMachine.act)
    return type(f"{engine.__name__}Machine", (EngineMachine,), parts)
