"""What the tokens of requests are, for engines that find prefixes by token ids (SPEC.md, 5.8)."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np

from helix_conformance.expect.arrays import token_ids
from helix_spec import events as ev
from helix_spec.events import Event


class Run(NamedTuple):
    """Consecutive tokens that one event created."""

    event: int
    place: int
    """Number of the first of them in the event."""
    tokens: int


@dataclass(frozen=True)
class TokenIds:
    """The ids of a request's tokens by position; they are computed when they are read.

    Parameters
    ----------
    seed : int
        That of the configuration.
    runs : tuple of Run
        The tokens, in the order of their positions.

    Examples
    --------
    >>> ids = TokenIds(7, (Run(2, 0, 3), Run(3, 2, 1)))
    >>> len(ids), ids[3:4], ids.first(1) + (Run(9, 1, 2),)
    (4, [1935749832], (Run(event=2, place=0, tokens=1), Run(event=9, place=1, tokens=2)))
    """

    seed: int
    runs: tuple[Run, ...]

    def __len__(self) -> int:
        return sum(run.tokens for run in self.runs)

    def first(self, tokens: int) -> tuple[Run, ...]:
        """Return the runs of the first tokens.

        Parameters
        ----------
        tokens : int
            How many.
        """
        kept = list[Run]()
        for run in self.runs:
            if tokens > 0:
                kept.append(run._replace(tokens=min(run.tokens, tokens)))
            tokens -= run.tokens
        return tuple(kept)

    def __getitem__(self, part: slice) -> list[int]:
        first, end, _ = part.indices(len(self))
        columns, before = list[tuple[np.ndarray, np.ndarray]](), 0
        for run in self.runs:
            here = range(max(first - before, 0), min(end - before, run.tokens))
            if here:
                places = run.place + np.arange(here.start, here.stop, dtype=np.int64)
                columns.append((np.full_like(places, run.event), places))
            before += run.tokens
        if not columns:
            return []
        events, places = (np.concatenate(column) for column in zip(*columns, strict=True))
        ids: list[int] = token_ids(self.seed, events, places).tolist()
        return ids


@dataclass
class Told:
    """What the tokens of each request are, as events tell it.

    Parameters
    ----------
    seed : int
        That of the configuration.
    overlap : bool
        Whether decoded tokens are known too late to be named.
    """

    seed: int
    overlap: bool = False
    events: int = 0
    """Events until now, refused ones too."""
    tokens: dict[int, TokenIds] = field(default_factory=dict)
    """By id, of the request that has it or had it last."""
    placed: dict[int, int] = field(default_factory=dict)
    """Tokens that were placed as its prompt."""
    groups: dict[int, int] = field(default_factory=dict)
    """Tokens of its open group."""
    shifts: dict[int, int] = field(default_factory=dict)
    """Its shift, as whoever places it has noted."""

    def misnames(self, event: Event) -> bool:
        """Return whether the count of a prefix is wrong (SPEC.md section 6).

        Parameters
        ----------
        event : Event
            The next event.
        """
        match event:
            case ev.Admit(_, prompt_len, _, prefix) if prefix is not None:
                known = self.known(prefix.of) if prefix.of in self.tokens else prompt_len
                return not 1 <= prefix.len <= min(prompt_len, known)
            case ev.Resume(id, count):
                return not 0 <= count <= len(self.tokens.get(id, range(count)))
        return False

    def known(self, id: int) -> int:
        """Return how many tokens of a request a prefix may name.

        Parameters
        ----------
        id : int
            A request that is or was known.
        """
        if self.overlap:
            return self.placed[id]
        return len(self.tokens[id]) - max(0, self.groups.get(id, 0) - 1)

    def prompt(self, event: ev.Admit) -> TokenIds:
        """Return the tokens of a prompt that is to be admitted now.

        Parameters
        ----------
        event : Admit
            The next event, whose prefix is known.
        """
        prefix, begun = event.prefix, tuple[Run, ...]()
        if prefix is not None:
            begun = self.tokens[prefix.of].first(prefix.len)
        held = sum(run.tokens for run in begun)
        return TokenIds(self.seed, (*begun, Run(self.events, held, event.prompt_len - held)))

    def decoded(self, event: ev.Decode) -> TokenIds:
        """Return the ids of the tokens that a decode creates now.

        Parameters
        ----------
        event : Decode
            The next event.
        """
        return TokenIds(self.seed, (Run(self.events, 0, max(0, sum(event.query_lens))),))

    def happened(self, event: Event) -> None:
        """Take in that the next event was accepted.

        Parameters
        ----------
        event : Event
            The next event.
        """
        match event:
            case ev.Admit(id, prompt_len):
                self.tokens[id], self.placed[id] = self.prompt(event), prompt_len
                self.groups.pop(id, None)
            case ev.Decode(ids, query_lens):
                place = 0
                for id, query_len in zip(ids, query_lens, strict=True):
                    run, before = Run(self.events, place, query_len), self.tokens[id]
                    self.tokens[id] = replace(before, runs=(*before.runs, run))
                    self.groups[id] = query_len
                    place += query_len
            case ev.Accept(id, kept):
                before = self.tokens[id]
                stays = len(before) - self.groups.pop(id) + kept
                self.tokens[id] = replace(before, runs=before.first(stays))
            case ev.Fork(parent, child):
                self.groups.pop(parent, None)
                self.groups.pop(child, None)
                self.tokens[child] = self.tokens[parent]
                self.placed[child] = self.placed[parent]
                self.shifts[child] = self.shifts.get(parent, 0)
            case ev.Preempt(id) | ev.Release(id):
                self.groups.pop(id, None)
            case ev.Resume(id):
                self.placed[id] = len(self.tokens[id])
            case _:
                pass
