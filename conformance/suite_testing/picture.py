"""The pictures of the documents: as a program this module draws them anew."""

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


def finding() -> list[tuple[str, Trace]]:
    """Return what vLLM 0.33.0 is asked for by its older option, and what it does: finding 1.

    Returns
    -------
    list of (str, Trace)
        What `picture` takes: turns of two tokens, and of one.
    """

    def trace(interleave: int) -> Trace:
        rule = named_layout("vllm_dcp", cp_size=2, tokens_per_block=4, interleave=interleave)
        config = Config(layout=rule, pages=[4] * 2, max_len=20)
        return Trace(config=config, events=[Admit(0, 1), *[Decode([0], [1])] * 7])

    return [
        ("What --dcp-kv-cache-interleave-size 2 asks for", trace(2)),
        ("What vLLM 0.33.0 does", trace(1)),
    ]


PICTURES = {"placement.svg": seed_example, "finding.svg": finding}
"""What draws each file of `conformance/`."""


if __name__ == "__main__":
    for name, example in PICTURES.items():
        target = Path(__file__).parents[1] / name
        target.write_text(picture(example()), encoding="utf-8")
        print(f"wrote {target}")
