"""The README's picture: as a program this module draws it anew."""

from __future__ import annotations

from pathlib import Path

from helix_conformance.report.html import picture
from helix_spec.config import Config
from helix_spec.events import Admit, Decode, Event
from helix_spec.layouts import named_layout
from helix_spec.trace import Trace


def seed_example() -> list[tuple[str, Trace]]:
    """Return pull request 9757's own example: 400 prompt tokens, pages of 100, 4 ranks, 400 steps.

    Returns
    -------
    list of (str, Trace)
        What `picture` takes: the prompt alone, and both layouts 400 steps later.
    """

    def trace(layout: str, steps: int) -> Trace:
        rule = named_layout(layout, cp_size=4, tokens_per_block=100)
        config = Config(layout=rule, pages=[9] * 4, max_len=1000)
        decodes: list[Event] = [Decode([0], [1])] * steps
        return Trace(config=config, events=[Admit(0, 400), *decodes])

    return [
        ("The prompt", trace("pr9757", 0)),
        ("400 steps later, before pull request 9757", trace("before_9757", 400)),
        ("400 steps later, since pull request 9757", trace("pr9757", 400)),
    ]


if __name__ == "__main__":
    target = Path(__file__).parents[1] / "placement.svg"
    target.write_text(picture(seed_example()), encoding="utf-8")
    print(f"wrote {target}")
