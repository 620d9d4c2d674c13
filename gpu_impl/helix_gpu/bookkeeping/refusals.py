"""Why an event is refused. A refused event has changed nothing, on any rank."""

from __future__ import annotations

from helix_spec.config import Config, config_problem
from helix_spec.events import Reason


class Refused(Exception):
    """An event, or a configuration, that every rank refuses for the same `reason`."""

    def __init__(self, reason: Reason, sentence: str) -> None:
        super().__init__(sentence)
        self.reason = reason


def check_config(config: Config) -> None:
    """Raise Refused(bad_config) when this engine may not start with the configuration."""
    problem = config_problem(config)
    if problem is not None:
        raise Refused(Reason.BAD_CONFIG, problem)
