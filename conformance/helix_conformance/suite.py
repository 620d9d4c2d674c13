"""What the pytest plugin asks: did an invariant hold on a layout, as a profile sees it?

The answer is pytest's own: an invariant that was violated fails its test, one that was not checked
skips it, and one that was violated as the engine's ledger says fails as expected.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Final

import msgspec
import pytest

from helix_conformance import session
from helix_conformance.drive.driver import Driver, EngineFailure
from helix_conformance.drive.opening import default_driver, open_driver
from helix_conformance.engines import EngineSpecError
from helix_conformance.foreign import shown_lines
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.failure import Failure
from helix_conformance.judge.play import profiles_to_check
from helix_conformance.judge.xfail import PARTING, Difference, Known, LedgerError, void_sentence
from helix_conformance.report.stream import save_trace
from helix_conformance.report.text import failure_text, replay_text
from helix_spec.engine import PROFILES, features_of_config
from helix_spec.events import FEATURES, features_of
from helix_spec.invariants import NUMBERS, profiles_of
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace

TRACES: Final = "traces"
"""Name of the test that no smallest failing trace has an event of a feature."""
EVERY: Final = "every"
"""Stands in SPEC.md for any profile that is declared."""
_SHOWN_BY_NO_TRACE: Final = {("attention", "ATT-2")}
"""What no answer to a trace can break: it takes a repetition."""


@dataclass
class _Verdicts:
    """What became of one layout."""

    checked: frozenset[str]
    known: Known
    """The ledger, with what of it this layout has shown."""
    tally: Tally
    failures: dict[str, Failure] = field(default_factory=dict)
    """By invariant, the failure with the smallest trace."""

    @property
    def ended_early(self) -> str | None:
        """Why what did not fail was not judged to the end; None when it was."""
        if "LIVE-1" in self.failures:
            return f"the engine failed (LIVE-1): {self.failures['LIVE-1'].engine_failure}"
        parting = [number for number in NUMBERS if number in PARTING & self.failures.keys()]
        if not parting:
            return None
        return (
            f"{self.tally.cut} of {self.tally.traces} traces ended where engine and reference part "
            f"({', '.join(parting)})"
        )


class Suite:
    """The verdicts on one engine; each layout is played when its first verdict is asked for.

    Parameters
    ----------
    options
        The plugin's, which pytest has read: `helix_engine`, `helix_layouts` and the others.

    Raises
    ------
    SessionError
        When an option stands for nothing, or the ledger is unreadable or leaves nothing to run.
    """

    def __init__(self, options: Namespace) -> None:
        self.options = options
        self.engine: str = options.helix_engine
        self.layouts: Sequence[str] = options.helix_layouts or LAYOUT_NAMES
        self.asked: Sequence[str] = options.helix_profiles or ()
        names = ("--helix-layout", "--helix-profile", "--helix-driver")
        session.refuse_unknown(self.layouts, self.asked, options.helix_driver, names)
        session.refuse_below_one(
            {
                "--helix-examples": [options.helix_examples],
                "--helix-cp": options.helix_cps or (),
                "--helix-ranks": [options.helix_ranks],
            }
        )
        try:
            self.known = Known.read(options.helix_known) if options.helix_known else Known()
        except LedgerError as error:
            raise session.SessionError(f"--helix-xfail: {error}") from error
        if not any(map(self.known.runs, self.layouts)):
            raise session.SessionError(
                "--helix-xfail: the ledger says that none of the layouts may be run."
            )
        try:
            default_driver(self.engine)
        except EngineSpecError as error:
            raise session.SessionError(f"--helix-engine: {error}") from error
        self._verdicts: dict[str, _Verdicts] = {}
        self._not_started: EngineFailure | None = None

    @cached_property
    def driver(self) -> Driver:
        """Return the driver, whose ranks start when it is first needed.

        Raises
        ------
        EngineFailure
            When a rank does not start; it is not tried again.
        """
        if self._not_started is not None:
            raise self._not_started
        try:
            return open_driver(
                self.engine,
                self.options.helix_driver,
                ranks=self.options.helix_ranks,
                deadline_s=self.options.helix_deadline,
            )
        except EngineFailure as failure:
            self._not_started = failure
            raise

    def close(self) -> None:
        """End the ranks, if they were started; who asks for more verdicts starts them again."""
        if "driver" in vars(self):
            self.driver.close()
            del self.driver

    @property
    def tests(self) -> list[tuple[str, list[str]]]:
        """Return each profile with its tests: its invariants, and for a feature its traces."""
        found = []
        for profile in (*PROFILES, EVERY):
            names = [number for number in NUMBERS if profile in profiles_of(number)]
            found.append((profile, [*names, TRACES] if profile in FEATURES else names))
        return found

    @property
    def examples(self) -> int:
        """Return the number of random traces for each layout."""
        given: int | None = self.options.helix_examples
        return given or session.default_examples(self.driver.name)

    @property
    def cp_sizes(self) -> list[int]:
        """Return the cp_sizes to draw from."""
        return session.drawn_sizes(self.driver, self.options.helix_cps or ())

    def header(self) -> Iterator[str]:
        """Yield the engine and every setting that was read, a line each."""
        try:
            declared = self.driver.profiles
        except EngineFailure as died:
            yield f"helix: engine {self.engine} did not start. {died}"
            return
        checked = profiles_to_check(declared, self.asked)
        yield f"helix: engine {self.engine}, driver {self.driver.name}"
        for name, value in self.driver.settings.items():
            yield f"helix: engine's {name} {value}"
        yield f"helix: layouts {' '.join(self.layouts)}"
        yield f"helix: profiles checked {' '.join(p for p in PROFILES if p in checked)}"
        yield f"helix: profiles not checked {' '.join(p for p in PROFILES if p not in checked)}"
        yield (
            f"helix: cp_size {' '.join(map(str, dict.fromkeys(self.cp_sizes)))}, "
            f"{self.examples} random traces for each layout, seed {self.options.helix_seed}, "
            f"deadline {self.options.helix_deadline:g} s"
        )
        if self.options.helix_known:
            count = len(self.known.differences)
            yield f"helix: expected failures {self.options.helix_known}, entries {count}"

    # Verdicts

    def demand(self, layout: str, profile: str, name: str) -> None:
        """Return when a test passes; else fail, skip or xfail it.

        Parameters
        ----------
        layout
            The layout's name.
        profile
            A profile, or EVERY.
        name
            An invariant's number, or TRACES: no smallest failing trace has an event of it.

        Raises
        ------
        pytest.fail.Exception
            When the invariant was violated, or the engine did not start.
        pytest.skip.Exception
            When it was not checked, or not judged to the end.
        pytest.xfail.Exception
            When it was violated as the ledger says.
        """
        try:
            self._demand_checked(layout, profile, name)
        except pytest.skip.Exception:
            self._demand_unseen(layout, name)
            raise
        except EngineFailure as died:
            pytest.fail(f"The engine did not start. {died}")
        verdicts = self._verdicts_of(layout)
        failure = verdicts.failures.get(name)
        if name == TRACES:
            failure = next((f for f in verdicts.failures.values() if _has(f.trace, profile)), None)
        if failure is not None:
            pytest.fail(self._report(layout, name, failure))
        if verdicts.ended_early is not None and name != "LIVE-1":
            pytest.skip(f"not judged to the end: {verdicts.ended_early}")
        if layout in verdicts.known.void:
            pytest.skip("every trace ended at an expected failure")
        for difference in verdicts.known.of_layout(layout):
            reasoned = difference.reason is not None and name in ("REF-1", "REF-2")
            if difference.kind == "answers_wrongly" and (difference.invariant == name or reasoned):
                pytest.xfail(_known(difference))

    def demand_entry(self, index: int) -> None:
        """Return when an entry of the ledger is true; else fail or skip its test.

        Parameters
        ----------
        index
            Place of the entry in the ledger, from 0.

        Raises
        ------
        pytest.fail.Exception
            When the difference no longer shows, or leaves nothing of a layout to judge.
        pytest.skip.Exception
            When it must not be run, or nothing that was played could show it.
        """
        difference = self.known.differences[index]
        ledgers = [
            self._verdicts_of(layout).known for layout in self.layouts if self.known.runs(layout)
        ]
        for layout in (layout for ledger in ledgers for layout in ledger.void):
            if difference.covers(layout):
                pytest.fail(void_sentence(layout))
        if difference.kind == "must_not_run":
            pytest.skip(_known(difference))
        if any(difference in ledger.met for ledger in ledgers):
            return
        if not any(difference in ledger.tried for ledger in ledgers):
            pytest.skip("no layout and profile that was judged to the end could show it")
        pytest.fail(
            f"The expected failure of {difference.subject} no longer fails: no trace of this "
            f"session broke it; take its entry ({difference.link}) out of the ledger."
        )

    def _demand_checked(self, layout: str, profile: str, name: str) -> None:
        if (profile, name) in _SHOWN_BY_NO_TRACE:
            pytest.skip("not checked: no answer to a trace can show it")
        for difference in self.known.differences:
            if difference.covers(layout) and difference.subject == f"layout {layout}":
                pytest.skip(_known(difference))
        if profile == EVERY:
            return
        declared = self.driver.profiles
        if profile not in declared:
            pytest.skip(f"not checked: the engine does not declare profile {profile}")
        if profile not in profiles_to_check(declared, self.asked):
            pytest.skip(f"not checked: profile {profile} was not asked for")
        if profile not in self.known.left_out(layout):
            return
        for difference in self.known.suspended(layout):
            if difference.profile == profile and difference in self._verdicts_of(layout).known.met:
                pytest.xfail(_known(difference))
                return  # only with --runxfail
        pytest.skip(f"not checked: the list of expected failures leaves out {profile}")

    def _demand_unseen(self, layout: str, name: str) -> None:
        """Fail of what was broken though no profile that checks it is declared.

        LEN-3 is such: it is judged wherever an engine reports `visible`.
        """
        if name not in NUMBERS or not self.known.runs(layout):
            return
        verdicts = self._verdicts_of(layout)
        if name in verdicts.failures and not verdicts.checked.intersection(profiles_of(name)):
            pytest.fail(self._report(layout, name, verdicts.failures[name]))

    def _verdicts_of(self, layout: str) -> _Verdicts:
        if layout not in self._verdicts:
            self._verdicts[layout] = self._played(layout)
        return self._verdicts[layout]

    def _played(self, layout: str) -> _Verdicts:
        """Play a layout on and on, without the invariants that it has broken, until it is green."""
        failures: dict[str, Failure] = {}
        while True:
            known, tally = Known(self.known.differences), Tally()
            known.found = set(failures)
            try:
                checked, failure = session.layout_run(
                    self.driver,
                    layout,
                    self.asked,
                    cp_sizes=self.cp_sizes,
                    examples=self.examples,
                    seed=self.options.helix_seed,
                    tally=tally,
                    known=known,
                )
            except EngineFailure as died:
                pytest.fail(f"The engine did not start. {died}")
            if failure is None:
                return _Verdicts(checked, known, tally, failures)
            failures |= {n: failure for n in failure.invariants if n not in failures}
            if failure.verdict == "error":
                if not self.driver.survives_failure:
                    self.close()
                return _Verdicts(checked, known, tally, failures)

    def _report(self, layout: str, name: str, failure: Failure) -> str:
        """The failure as a text, this invariant's part of it, and where its trace was left."""
        others = sorted(failure.invariants - {name}, key=NUMBERS.index)
        if name in NUMBERS and failure.engine_failure is None:
            mine = [v for v in failure.violations if v.invariant == name]
            failure = msgspec.structs.replace(failure, violations=mine)
        lines = list(failure_text(failure))
        if name in NUMBERS and others:
            lines.append(f"The same trace also breaks {', '.join(others)}.")
        path = save_trace(self.options.helix_traces, f"{layout}-{name}", failure.trace)
        return shown_lines([*lines, *replay_text(path, self.engine, self.driver.name)])


def _has(trace: Trace, feature: str) -> bool:
    """Whether a trace has something of this feature."""
    if feature in features_of_config(trace.config):
        return True
    return any(feature in features_of(event) for event in trace.events)


def _known(difference: Difference) -> str:
    return f"known: {difference.does} ({difference.link})"
