"""The suite as a Hypothesis state machine, for engines whose ranks live in one process.

`engine_machine(MyEngine).TestCase` is a test class: each rule is one kind of event, and all
state is compared after every one of them. Engines of an own test suite subclass it to add rules.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from typing import Any, ClassVar

import msgspec
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule

from helix_conformance.drive.driver import Played, Watch
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.expect.recorder import Recorder
from helix_conformance.generate.strategies import EVENTS, Intent, configs, realise
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.judge import Judge
from helix_conformance.judge.play import profiles_to_check
from helix_conformance.report.text import failure_text
from helix_spec.config import Config
from helix_spec.engine import Engine
from helix_spec.events import FEATURES, Event
from helix_spec.trace import Trace

_WISHES: dict[str, Any] = {
    "size": st.integers(1, 40),
    "picks": st.lists(st.integers(0, 7), min_size=1, max_size=4).map(tuple),
    "query_lens": st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple),
    "pad": st.integers(0, 3),
    "kept": st.integers(1, 7),
}


Rule = Callable[..., None]


def _supports(feature: str) -> Callable[[Rule], Rule]:
    """Only for engines that declare the feature."""
    return precondition(lambda machine: feature in machine.profiles)


class EngineMachine(RuleBasedStateMachine):
    """One engine under test; `engine_machine` fills in which."""

    engine: ClassVar[type[Engine]]
    profiles: ClassVar[frozenset[str]]

    @initialize(data=st.data())
    def start(self, data: st.DataObject) -> None:
        """All ranks start with one configuration."""
        features = [feature for feature in FEATURES if feature in self.profiles]
        config: Config = data.draw(configs(cp_sizes=(1, 2, 3, 4), features=features))
        self.judge = Judge(config, self.profiles)
        self.recorder = Recorder(config, self.engine.profiles)
        self.told: list[Event] = []
        self.waiting: deque[Event] = deque()
        driver = LocalDriver(self.engine)
        self.play: Iterator[Played] = driver.play(
            config, self.profiles, iter(self.waiting.popleft, None), Watch()
        )
        _, answers = next(self.play)
        self._demand(self.judge.started(answers))

    @rule(**_WISHES)
    def admit(self, **wish: Any) -> None:
        """A new request."""
        self._tell("admit", wish)

    @rule(**_WISHES)
    def decode(self, **wish: Any) -> None:
        """A step for some of the live requests."""
        self._tell("decode", wish)

    @rule(**_WISHES)
    def skip(self, **wish: Any) -> None:
        """A step that never runs."""
        self._tell("skip", wish)

    @rule(**_WISHES)
    def release(self, **wish: Any) -> None:
        """A request ends."""
        self._tell("release", wish)

    @_supports("speculative")
    @rule(**_WISHES)
    def accept(self, **wish: Any) -> None:
        """Part of a group is kept."""
        self._tell("accept", wish)

    @_supports("fork")
    @rule(**_WISHES)
    def fork(self, **wish: Any) -> None:
        """A request is copied."""
        self._tell("fork", wish)

    @_supports("preempt")
    @rule(**_WISHES)
    def preempt(self, **wish: Any) -> None:
        """A request gives its pages back and stays known."""
        self._tell("preempt", wish)

    @_supports("preempt")
    @rule(**_WISHES)
    def resume(self, **wish: Any) -> None:
        """A preempted request is placed anew."""
        self._tell("resume", wish)

    @_supports("overlap")
    @rule(**_WISHES)
    def sampled(self, **wish: Any) -> None:
        """The scheduler learns what an outstanding decode sampled."""
        self._tell("sampled", wish)

    @rule(**_WISHES, event=st.sampled_from(EVENTS))
    def wrong(self, **wish: Any) -> None:
        """An event that must be refused, or nearly so."""
        self._tell("wrong", wish)

    def _tell(self, kind: str, wish: dict[str, Any]) -> None:
        if "speculative" not in self.profiles:
            wish["query_lens"] = (1,)
        if "padding" not in self.profiles:
            wish["pad"] = 0
        for event in realise(self.recorder, Intent(kind, **wish)):
            self.told.append(event)
            self.waiting.append(event)
            _, answers = next(self.play)
            self._demand(self.judge.event(self.recorder.next(event), answers))

    def _demand(self, violations: list[Any]) -> None:
        if violations:
            trace = Trace(config=self.judge.config, events=self.told)
            failure = Failure(trace=trace, event=len(self.told) - 1, violations=violations)
            if not self.told:
                failure = msgspec.structs.replace(failure, event=None)
            raise AssertionError("\n".join(failure_text(failure)))


def engine_machine(engine: type[Engine], asked: Collection[str] = ()) -> type[EngineMachine]:
    """The state machine of an engine, on these of the profiles that it declares, or on all."""
    profiles = profiles_to_check(engine.profiles, asked)
    name = f"{engine.__name__}Machine"
    return type(name, (EngineMachine,), {"engine": engine, "profiles": profiles})
