"""`helix-conformance talk`: the conversation with an engine, as it is spoken."""

from __future__ import annotations

from collections.abc import Callable, Iterable

from helix_conformance.drive.driver import Driver
from helix_conformance.drive.process import Child, Due, StdioDriver
from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.configs import draw_config
from helix_conformance.generate.traces import draw_merge_trace
from helix_conformance.session import drawn_sizes
from helix_spec.events import MERGE, Admit, Decode, Release
from helix_spec.trace import Trace

Say = Callable[[str], None]
"""Takes one line of a conversation."""


class Overheard(Child):
    """A rank, every line of which is said aloud."""

    say: Say

    def ask(self, lines: bytes, due: Iterable[Due]) -> None:
        """See `Rank.ask`."""
        for line in lines.splitlines():
            self.say(f"-> {self.rank} {line.decode()}")
        super().ask(lines, due)

    def take(self, line: bytes) -> None:
        """See `Rank.take`: what is no answer is heard, too."""
        self.say(f"<- {self.rank} {line.decode(errors='backslashreplace')}")
        super().take(line)


class TalkDriver(StdioDriver):
    """Ranks that are overheard, and asked one event at a time.

    Parameters
    ----------
    engine : str
        See `StdioDriver`; a Python engine is served.
    say : callable
        Takes each line: an arrow, the rank, the message.
    deadline_s : float
        Seconds that the ranks may take for one event.
    """

    def __init__(self, engine: str, say: Say, *, deadline_s: float = 30.0) -> None:
        self.child = type("Overheard", (Overheard,), {"say": staticmethod(say)})
        super().__init__(engine, deadline_s=deadline_s)
        self.window = 1


def short_trace(driver: Driver, layouts: Iterable[str]) -> Trace:
    """Return a short trace inside the capabilities of an engine: a prompt, two steps, the end.

    Parameters
    ----------
    driver : Driver
        The engine.
    layouts : iterable of str
        Names of layouts to choose from; none for those that the engine declares.

    Raises
    ------
    NothingInsideError
        When the capabilities hold none of them.
    """
    choices, box, sizes = Seeded("talk"), driver.capabilities[0], drawn_sizes(driver, ())
    config = draw_config(
        choices,
        names=[*layouts] or box.layouts or ["pr9757"],
        cp_sizes=[size for size in sizes if size > 1][:1] or sizes,
        features=[],
        contents=not {"cache", MERGE}.isdisjoint(driver.profiles),
        box=box,
    )
    if "placement" not in driver.profiles:
        return draw_merge_trace(choices, config)
    step = Decode([7], [1])
    return Trace(config=config, events=[Admit(7, 1), step, step, Release(7)])
