"""One rank's engine asked in this process, and what counts as an answer.

What an engine does instead of answering is put in `words` for people; nothing ever looks at them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from helix_conformance.drive.driver import Answer, Watch
from helix_spec.config import Config
from helix_spec.engine import Engine, Outcome, RankView
from helix_spec.events import Event, ids_of


class AnswerError(Exception):
    """An answer that is none, or none to what was asked."""


class ReportedError(Exception):
    """A failure that an adapter in another process reports; its text says what it did."""


def start(engine: Engine, config: Config, profiles: frozenset[str]) -> Answer:
    """The answer to the start. Raises AnswerError, and whatever the engine raises."""
    return Answer(_outcome(engine.start(config, profiles)))


def apply(engine: Engine, index: int, event: Event, watch: Watch) -> Answer:
    """The answer to an event, and the state that is looked at after it."""
    outcome = _outcome(engine.apply(event))
    if not watch.looks(index):
        return Answer(outcome)
    ids = None if watch.whole(index) else ids_of(event)
    return Answer(outcome, _view(engine.observe(ids), ids))


def finish(engine: Engine) -> Answer:
    """The whole state, at the end."""
    return Answer(Outcome(), _view(engine.observe(), None))


def words(error: BaseException) -> str:
    """What an engine did, for a sentence that begins with its rank."""
    if isinstance(error, AnswerError):
        return f"answered garbage: {error}"
    if isinstance(error, ReportedError):
        return str(error)
    if isinstance(error, SystemExit):
        return f"exited with status {error.code}"
    try:
        text = str(error)
    except Exception:
        text = "(its message cannot be printed)"
    return f"raised {type(error).__name__}: {text}"


def ill_typed(answers: Sequence[Answer]) -> tuple[int, str] | None:
    """The first rank whose answer holds values of other types than it should, and which.

    Looked at only when something is wrong: values that compare equal are as good as right.
    """
    for rank, answer in enumerate(answers):
        try:
            _check(msgspec.structs.replace(answer.outcome, output=None), Outcome)
            if answer.view is not None:
                _check(msgspec.structs.replace(answer.view, keys={}, values={}), RankView)
        except (msgspec.MsgspecError, TypeError, ValueError, OverflowError) as error:
            return rank, str(error)
    return None


def _check(answer: Outcome | RankView, kind: type[Any]) -> None:
    """Raises what msgspec does when the answer cannot be written down and read back as its kind."""
    msgspec.json.decode(msgspec.json.encode(answer), type=kind)


def _outcome(answer: Any) -> Outcome:
    if not isinstance(answer, Outcome):
        raise AnswerError(f"its answer is of type {type(answer).__name__}, not an Outcome")
    return answer


def _view(answer: Any, asked: Sequence[int] | None) -> RankView:
    if not isinstance(answer, RankView):
        raise AnswerError(f"its state is of type {type(answer).__name__}, not a RankView")
    if not isinstance(answer.local_len, dict):
        name = type(answer.local_len).__name__
        raise AnswerError(f"its local_len is of type {name}, not a dict by request")
    check_requests(answer.local_len, asked)
    return answer


def check_requests(told: dict[int, int], asked: Sequence[int] | None) -> None:
    """Raises AnswerError when a view tells of requests that it was not asked for."""
    if asked is not None and list(told) != asked and not told.keys() <= set(asked):
        strangers = [id for id in told if id not in asked]
        raise AnswerError(f"its view tells of requests {strangers}, not of {asked} alone")
