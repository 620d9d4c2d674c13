"""The layouts that theorems run through, by the two rules that arithmetic depends on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final, get_args

from helix_spec.layouts import DecodeOwner, Layout, PagePolicy, PromptSplit


@dataclass(frozen=True)
class Pair:
    """A prompt split and a decode owner rule."""

    prompt: PromptSplit
    owner: DecodeOwner

    def __str__(self) -> str:
        return f"{self.prompt} + {self.owner}"

    def layout(
        self,
        c: int,
        t: int,
        prompt_interleave: int | None = None,
        owner_interleave: int | None = None,
        pages: PagePolicy = "lazy",
    ) -> Layout:
        """Return the layout of these sizes; an interleave is dropped where the rule has none."""
        return Layout(
            self.prompt,
            self.owner,
            pages,
            "rotated",
            c,
            t,
            prompt_interleave if self.prompt == "interleave" else None,
            owner_interleave if self.owner == "interleave" else None,
        )

    def chunk(self, t: int, interleave: int) -> int:
        """Return the tokens in a chunk of the owner rule."""
        return interleave if self.owner == "interleave" else t

    def prompt_chunk(self, t: int, interleave: int) -> int:
        """Return the tokens in a chunk of a round-robin prompt split."""
        return interleave if self.prompt == "interleave" else t

    def counted(self, prompt: int) -> int:
        """Return how many tokens the owner rule counts before the first step."""
        return 0 if self.owner == "step" else prompt


DEALING: Final = ("placement.chunk_local_len", "placement.chunk_owner", "placement.chunk_position")
SPLITTING: Final = ("placement.contiguous_start", "placement.contiguous_owner")
PROMPT: Final = ("placement.prompt_local_len",)
"""Functions that a proof may leave free: it then rests on theorems about them, by `lemma`."""

PROMPTS: Final[tuple[PromptSplit, ...]] = get_args(PromptSplit)
OWNERS: Final[tuple[DecodeOwner, ...]] = get_args(DecodeOwner)
EVERY_PAIR: Final = tuple(Pair(prompt, owner) for prompt in PROMPTS for owner in OWNERS)
EVERY_OWNER: Final = tuple(Pair("round_robin", owner) for owner in OWNERS)
"""One pair of each owner rule, for claims in which the prompt's placement has no part."""
EVERY_PROMPT: Final = tuple(Pair(prompt, "step") for prompt in PROMPTS)
"""One pair of each prompt split, for claims in which decoded tokens have no part."""
