"""Why an event is refused. A refused event has changed nothing, on any rank."""

from __future__ import annotations

from helix_spec.config import Config, config_problem
from helix_spec.events import Reason


class Refused(Exception):
    """An event, or a configuration, that every rank refuses for the same reason.

    Parameters
    ----------
    reason : Reason
        What the trace language calls it.
    sentence : str
        What was wrong, for people.
    """

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def check_config(config: Config) -> None:
    """Raise unless this engine may start with the configuration.

    Parameters
    ----------
    config : Config

    Raises
    ------
    Refused
        With the reason `bad_config` and a sentence.
    """
    problem = config_problem(config)
    if problem is not None:
        raise Refused(Reason.BAD_CONFIG, problem)


class StepError(ValueError):
    """A step that is over, or one whose tokens are not all there; nothing has changed.

    The trace language has no reason for it: events there are whole.
    """
