"""One rank's engine asked in this process, and what counts as an answer.

`words` describes for people what an engine does instead of answering; no code looks at the text.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from helix_conformance.drive.driver import Answer
from helix_conformance.foreign import bounded
from helix_spec.config import Config
from helix_spec.engine import Engine, Outcome, RankView
from helix_spec.events import Event, ids_of
from helix_spec.trace import Watch


class MalformedAnswer(Exception):
    """An answer that cannot be read as one, or answers something else than was asked.

    Where the answers of all ranks are read at once, it says which `rank` gave it.
    """

    def __init__(self, message: str, rank: int = 0) -> None:
        super().__init__(message)
        self.rank = rank


class ReportedError(Exception):
    """A failure that an adapter in another process reports; its text says what it did."""


def start(engine: Engine, config: Config, profiles: frozenset[str]) -> Answer:
    """Return the answer to the start.

    Parameters
    ----------
    engine : Engine
        One rank of the engine.
    config : Config
        What the rank is started with.
    profiles : frozenset of str
        The profiles that are checked.

    Returns
    -------
    Answer
        The outcome, without a view.

    Raises
    ------
    MalformedAnswer
        When the engine returns no Outcome; whatever the engine itself raises is not caught.
    """
    return Answer(checked_outcome(engine.start(config, profiles)))


def apply(index: int, event: Event, watch: Watch) -> Callable[[Engine], Answer]:
    """Return what gives a rank's answer to an event, with the state that `watch` looks at then.

    Parameters
    ----------
    index : int
        Index of the event in the trace, from 0.
    event : Event
        The event.
    watch : Watch
        How often the state is looked at, and how much of it.

    Returns
    -------
    callable
        Takes one rank of the engine, started, and returns its Answer; the answer's view is None
        where `watch` does not look.

    Raises
    ------
    MalformedAnswer
        When the engine returns no Outcome or no RankView.
    """
    looks, ids = watch.looks(index), None if watch.whole(index) else ids_of(event)

    def answer(engine: Engine) -> Answer:
        outcome = checked_outcome(engine.apply(event))
        if looks and watch.twice:
            engine.observe(ids)
        return Answer(outcome, checked_view(engine.observe(ids), ids) if looks else None)

    return answer


def finish(engine: Engine) -> Answer:
    """Return the whole state, at the end.

    Parameters
    ----------
    engine : Engine
        One rank of the engine, started.

    Returns
    -------
    Answer
        An empty outcome, and the view of all live requests.

    Raises
    ------
    MalformedAnswer
        When the engine returns no RankView.
    """
    return Answer(Outcome(), checked_view(engine.observe(), None))


def words(error: BaseException) -> str:
    """Return what an engine did, for a sentence that begins with its rank.

    Parameters
    ----------
    error : BaseException
        What the call of the engine raised, or what `asking` says of its answer.

    Returns
    -------
    str
        Verb and object, without a full stop.

    Examples
    --------
    >>> words(ValueError("no GPU"))
    'raised ValueError: no GPU'
    >>> words(SystemExit(3))
    'exited with status 3'
    """
    if isinstance(error, MalformedAnswer):
        return f"gave a malformed answer: {error}"
    if isinstance(error, ReportedError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"exited with status {bounded(str(error.code))}"
    try:
        text = bounded(str(error))
    except Exception:
        text = "(its message cannot be printed)"
    return f"raised {type(error).__name__}: {text}"


def traceback_of(error: BaseException) -> str:
    """Return the traceback of what an engine raised, its end where it is long.

    Parameters
    ----------
    error : BaseException
        What the call of the engine raised.
    """
    if isinstance(error, MalformedAnswer | ReportedError):
        return ""
    try:
        return bounded("".join(traceback.format_exception(error)))
    except Exception:  # whatever its text does
        return ""


def check_types(answers: Sequence[Answer]) -> None:
    """Check that the answers of all ranks hold values of the types that they must be of.

    It is called only when something is wrong: values that compare equal are as good as right.

    Parameters
    ----------
    answers : sequence of Answer
        The answers of all ranks, by rank. Arrays are not looked at.

    Raises
    ------
    MalformedAnswer
        When one does not; it names the rank.
    """
    for rank, answer in enumerate(answers):
        try:
            _check(msgspec.structs.replace(answer.outcome, output=None), Outcome)
            if answer.view is not None:
                groups = {
                    name: msgspec.structs.replace(one, keys={}, values={})
                    for name, one in answer.view.groups.items()
                }
                view = msgspec.structs.replace(answer.view, keys={}, values={}, groups=groups)
                _check(view, RankView)
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
            raise MalformedAnswer(str(error), rank) from error


def _check(answer: Outcome | RankView, kind: type[Any]) -> None:
    """Raises what msgspec does when the answer cannot be written down and read back as its kind."""
    msgspec.json.decode(msgspec.json.encode(answer), type=kind)


def checked_outcome(answer: Any) -> Outcome:
    """Return an engine's answer to `start` or `apply`.

    Parameters
    ----------
    answer : any object
        What the engine returned.

    Returns
    -------
    Outcome
        The same object.

    Raises
    ------
    MalformedAnswer
        When it is no Outcome.
    """
    if not isinstance(answer, Outcome):
        raise MalformedAnswer(f"its answer is of type {type(answer).__name__}, not an Outcome")
    return answer


def checked_view(answer: Any, asked: Sequence[int] | None) -> RankView:
    """Return an engine's answer to `observe`.

    Parameters
    ----------
    answer : any object
        What the engine returned.
    asked : sequence of int, or None
        Ids of the requests that were asked for; None for all live ones.

    Returns
    -------
    RankView
        The same object.

    Raises
    ------
    MalformedAnswer
        When it is no RankView, or holds requests that were not asked for (SPEC.md, 10.2).
    """
    if not isinstance(answer, RankView):
        raise MalformedAnswer(f"its state is of type {type(answer).__name__}, not a RankView")
    if not isinstance(answer.local_len, dict):
        name = type(answer.local_len).__name__
        raise MalformedAnswer(f"its local_len is of type {name}, not a dict by request")
    check_requests(answer.local_len, asked)
    for group in answer.groups.values():
        check_requests(group.local_len, asked)
    return answer


def check_requests(told: dict[int, int], asked: Sequence[int] | None) -> None:
    """Check that a view holds no request that was not asked for (SPEC.md, 10.2).

    Parameters
    ----------
    told : dict of int to int
        `local_len` of the view: tokens on the rank, by request.
    asked : sequence of int, or None
        Ids of the requests that were asked for; None for all live ones.

    Raises
    ------
    MalformedAnswer
        When it holds one.
    """
    if asked is not None and list(told) != asked and not told.keys() <= set(asked):
        strangers = [id for id in told if id not in asked]
        raise MalformedAnswer(f"its view tells of requests {strangers}, not of {asked} alone")
