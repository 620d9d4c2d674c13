"""Where a trace puts its tokens, event by event, as boxes on a plane.

A `Film` has a stop after each event (thinned out in long traces) and a panel for each request:
a row for each cp_rank, its pages in local order, in each page the tokens. Every box says at
which stops it is there, so that one drawing serves the whole film: whoever shows a stop hides
the boxes that are not of it. Positions are what the reference model holds; `Wrong` marks on top
of them are what an engine answered instead.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from helix_conformance.expect.expectation import Expectation, Request
from helix_conformance.expect.recorder import ModelState, Recorder
from helix_conformance.report.show import event_text
from helix_spec.engine import PROFILES
from helix_spec.events import Decode, Event, ids_of
from helix_spec.layouts import Layout
from helix_spec.trace import Trace

MAX_STOPS: Final = 500
"""Of a longer trace every so many events are drawn, and all around the one that fails."""
MAX_REQUESTS: Final = 24
"""Of more requests those that the failing event names are drawn, then the first."""
WIDEST_CELLS: Final = 16
"""Pages of at most so many tokens are drawn token by token, larger ones as runs."""
COLOURS: Final = 8
"""Ranks beyond these take their colours again; every row says its rank in words."""

_CELL, _LEAST_PAGE, _RUN_PAGE, _ROW_HEIGHT, _CAPTION = 30, 60, 136, 26, 14
"""Pixels: a token's width, the narrowest page, a page of runs, a token's height, the line above
a page."""
_LABEL, _GAP, _LINE = 104, 8, 860
"""The column of rank names, between pages, the width after which a rank's pages go on below."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """One answer that is not the reference's, at the failing event."""

    request: int
    rank: int
    """cp_rank."""
    local_index: int | None
    """Where on the rank the token is, or would be; None for the rank as a whole."""
    label: str
    """A few characters in the box: the position, or what stands in its place."""
    what: str
    """The sentence: who claimed what, and what would be right."""


class Spot(NamedTuple):
    """A rectangle with a word in it; `kind` are CSS classes, the first says what it is."""

    x: float
    y: float
    width: float
    height: float
    text: str
    title: str
    kind: str


@dataclass(frozen=True, slots=True)
class Box:
    """A spot that is there from stop `since` up to, not with, stop `until`."""

    spot: Spot
    since: int
    until: int


@dataclass(frozen=True, slots=True)
class Panel:
    """One request."""

    id: int
    width: float
    height: float
    boxes: list[Box]
    summary: str
    """The state at the last stop in words, for those who do not see the picture."""


@dataclass(frozen=True, slots=True)
class Stop:
    """The state after one event; before all events `event` is None."""

    event: int | None
    text: str
    refused: str | None = None


@dataclass(frozen=True, slots=True)
class Film:
    """A trace from its start to its end."""

    layout: str
    pools: list[int]
    stops: list[Stop]
    panels: list[Panel]
    pools_panel: Panel | None
    """Free pages of each rank; None beside an engine that does not allocate."""
    first_shown: int
    """The stop to begin with: where it fails, else the last."""
    events: int
    requests: int
    """How many the trace has; fewer may be drawn."""


def film(
    trace: Trace,
    *,
    wrong: Sequence[Wrong] = (),
    at: int | None = None,
    declared: Collection[str] = PROFILES,
) -> Film:
    """The film of a trace; `wrong` is marked at the stop after event `at`.

    `declared` are the profiles of the engine that it was played on: what needs another is refused.
    """
    chosen = _chosen(len(trace.events), at)
    recorder, layout = Recorder(trace.config, declared), trace.config.layout
    state = recorder.state
    stops, frames = [Stop(None, "before the first event")], [_frame(state, {}, layout)]
    seen: dict[int, None] = {}
    for index, event in enumerate(trace.events):
        expected = recorder.next(event)
        seen |= dict.fromkeys(state.requests)
        if index in chosen:
            stops.append(Stop(index, event_text(event), expected.refused))
            frames.append(_frame(state, first_new(expected), layout))
    drawn = _drawn(list(seen), wrong, None if at is None else trace.events[at])
    shown = len(stops) - 1
    if at is not None:
        shown = next(number for number, stop in enumerate(stops) if stop.event == at)
    t = layout.tokens_per_block
    panels = [
        _panel(id, frames, layout.cp_size, t, [w for w in wrong if w.request == id], shown)
        for id in drawn
    ]
    return Film(
        str(trace.config.layout),
        list(trace.config.pages),
        stops,
        panels,
        _pools(frames, trace.config.pages) if "pages" in declared else None,
        shown,
        len(trace.events),
        len(seen),
    )


def _chosen(events: int, at: int | None) -> set[int]:
    """Indices of the events after which there is a stop."""
    if events <= MAX_STOPS:
        return set(range(events))
    every = -(-events // (MAX_STOPS - 20))
    middle = events - 1 if at is None else at
    around = range(max(0, middle - 8), min(events, middle + 8))
    return {*range(0, events, every), events - 1, *around}


def _drawn(ids: list[int], wrong: Sequence[Wrong], event: Event | None) -> list[int]:
    """The requests that have a panel, in the order of their ids."""
    named = [w.request for w in wrong] + ([] if event is None else ids_of(event))
    first = [id for id in dict.fromkeys([*named, *ids]) if id in ids]
    return sorted(first[:MAX_REQUESTS])


# What there is after one event


@dataclass(frozen=True, slots=True)
class _Run:
    """Tokens side by side in one page: positions first, first + stride, ... up to last."""

    offset: int
    count: int
    first: int
    last: int
    decoded: bool
    fresh: bool
    """Whether the last event made some of it."""

    @property
    def label(self) -> str:
        """`7`, `400-499`, or `0-252 by 4`."""
        if self.count == 1:
            return str(self.first)
        stride = (self.last - self.first) // (self.count - 1)
        return f"{self.first}\u2013{self.last}" + (f" by {stride}" if stride > 1 else "")


@dataclass(frozen=True, slots=True)
class _Page:
    number: int
    shared_with: tuple[int, ...]
    runs: tuple[_Run, ...]


@dataclass(frozen=True, slots=True)
class _State:
    """One request: pages of each rank, and its tokens in words."""

    ranks: tuple[tuple[_Page, ...], ...]
    held: tuple[int, ...]
    words: str


@dataclass(frozen=True, slots=True)
class _Frame:
    requests: Mapping[int, _State]
    free: Sequence[int]
    """Free pages of each rank's pool."""


_identity = id
"""By it pages are told apart; `id` is a request's everywhere else."""


def first_new(expected: Expectation) -> dict[int, int]:
    """Return the position of each request's first new token, after an accepted decode."""
    found, token = dict[int, int](), 0
    if isinstance(expected.event, Decode) and expected.decoded is not None:
        for id, query_len in zip(expected.event.ids, expected.event.query_lens, strict=True):
            found[id] = expected.decoded.position_ids[token]
            token += query_len
    return found


def _frame(state: ModelState, new: Mapping[int, int], layout: Layout) -> _Frame:
    holders: dict[int, list[int]] = {}
    for id, request in state.requests.items():
        for table in request.tables:
            for page in table:
                holders.setdefault(_identity(page), []).append(id)
    states = {
        id: _state(id, request, holders, new.get(id), layout.tokens_per_block)
        for id, request in state.requests.items()
    }
    return _Frame(states, state.free_pages)


def _state(
    id: int, request: Request, holders: Mapping[int, list[int]], new: int | None, t: int
) -> _State:
    ranks = []
    for positions, table in zip(request.ranks, request.tables, strict=True):
        pages = []
        for place, page in enumerate(table):
            others = tuple(other for other in holders[_identity(page)] if other != id)
            runs = _runs(positions[place * t : (place + 1) * t], request.prompt_len, new, t)
            pages.append(_Page(page.number, others, tuple(runs)))
        ranks.append(tuple(pages))
    total = len(request.tokens)
    words = f"{total} token" if total == 1 else f"{total} tokens"
    words += f": prompt {request.prompt_len}, decoded {request.steps}"
    if request.preempted:
        words += "; preempted"
    return _State(tuple(ranks), tuple(len(p) for p in request.ranks), words)


def _runs(positions: Sequence[int], prompt_len: int, new: int | None, t: int) -> Iterator[_Run]:
    """The tokens of one page, those side by side together where they are not drawn singly."""
    at = 0
    while at < len(positions):
        end = at + 1
        if t > WIDEST_CELLS and end < len(positions):
            stride = positions[end] - positions[at]
            while (
                end < len(positions)
                and positions[end] - positions[end - 1] == stride
                and (positions[end] < prompt_len) == (positions[at] < prompt_len)
            ):
                end += 1
            if stride > 1 and end - at < 3:
                end = at + 1
        first, last = positions[at], positions[end - 1]
        fresh = new is not None and last >= new
        yield _Run(at, end - at, first, last, first >= prompt_len, fresh)
        at = end


# From states to boxes


_Place = tuple[str, *tuple[int, ...]]
"""What is drawn, and where: no two spots of one stop have the same."""
_LAYERS: Final = ("page", "run", "wrong")
"""Later ones cover earlier ones."""


@dataclass(slots=True)
class _Track:
    """Boxes over time: what is at a place stays until something else, or nothing, is there."""

    stops: int
    boxes: list[tuple[_Place, Box]] = field(default_factory=list)
    open: dict[_Place, tuple[int, Spot]] = field(default_factory=dict)

    def frame(self, stop: int, content: dict[_Place, Spot]) -> None:
        """What there is at a stop."""
        for place in [p for p, (_, was) in self.open.items() if content.get(p) != was]:
            self._close(place, stop)
        for place, spot in content.items():
            if place not in self.open:
                self.open[place] = (stop, spot)

    def end(self) -> list[Box]:
        """All boxes, after the last stop, in the order in which they are drawn."""
        for place in list(self.open):
            self._close(place, self.stops)
        order = {what: layer for layer, what in enumerate(_LAYERS, 1)}
        return [box for _, box in sorted(self.boxes, key=lambda b: order.get(b[0][0], 0))]

    def _close(self, place: _Place, until: int) -> None:
        since, spot = self.open.pop(place)
        self.boxes.append((place, Box(spot, since, until)))


@dataclass(frozen=True, slots=True)
class _Grid:
    """Where pages and tokens of one request are on the plane."""

    t: int
    most: list[int]
    """Pages for which each rank needs room."""

    @property
    def slot(self) -> float:
        if self.t > WIDEST_CELLS:
            return _RUN_PAGE / self.t
        return max(_CELL, _LEAST_PAGE / self.t)

    @property
    def page(self) -> float:
        return self.slot * self.t

    @property
    def per_line(self) -> int:
        return max(1, int(_LINE // (self.page + _GAP)))

    def row(self, rank: int) -> float:
        """Top of a rank's first line."""
        before = sum(-(-pages // self.per_line) for pages in self.most[:rank])
        return 26 + before * (_CAPTION + _ROW_HEIGHT + 6) + rank * 8

    def place(self, rank: int, page: int) -> tuple[float, float]:
        """Left and top of a page."""
        line, column = divmod(page, self.per_line)
        return (
            _LABEL + column * (self.page + _GAP),
            self.row(rank) + line * (_CAPTION + _ROW_HEIGHT + 6),
        )


def _panel(
    id: int, frames: Sequence[_Frame], cp: int, t: int, wrong: Sequence[Wrong], shown: int
) -> Panel:
    states = [frame.requests.get(id) for frame in frames]
    most = [1] * cp
    for state in states:
        if state is not None:
            most = [max(room, len(pages)) for room, pages in zip(most, state.ranks, strict=True)]
    for mark in wrong:
        most[mark.rank] = max(most[mark.rank], 1 + (mark.local_index or 0) // t)
    grid = _Grid(t, most)
    track = _Track(len(frames))
    for stop, state in enumerate(states):
        content = dict(_content(id, state, grid, cp))
        if stop == shown:
            content |= dict(_marks(wrong, state, grid))
        track.frame(stop, content)
    width = _LABEL + min(max(most), grid.per_line) * (grid.page + _GAP)
    height = grid.row(cp) + 4
    last = next((state for state in reversed(states) if state is not None), None)
    summary = "" if last is None else _words(id, last)
    return Panel(id, max(width, 420), height, track.end(), summary)


def _pools(frames: Sequence[_Frame], sizes: Sequence[int]) -> Panel:
    """The free pages of each rank, in words, six ranks a line."""
    track = _Track(len(frames))
    for stop, frame in enumerate(frames):
        content: dict[_Place, Spot] = {}
        for rank, (free, size) in enumerate(zip(frame.free, sizes, strict=False)):
            line, column = divmod(rank, 6)
            words, kind = f"rank {rank}: {free} of {size}", "held" if free else "words empty"
            content["free", rank] = Spot(_LABEL + 128 * column, 18 * line, 120, 18, words, "", kind)
        content["head",] = Spot(0, 0, _LABEL, 18, "free pages", "", "head")
        track.frame(stop, content)
    summary = ", ".join(f"rank {rank} {free}" for rank, free in enumerate(frames[-1].free))
    width, height = _LABEL + 128 * min(6, len(sizes)), 18 * -(-len(sizes) // 6) + 4
    return Panel(-1, width, height, track.end(), f"Free pages: {summary}.")


_Content = Iterator[tuple[_Place, Spot]]


def _content(id: int, state: _State | None, grid: _Grid, cp: int) -> _Content:
    words = "not there" if state is None else state.words
    yield ("head",), Spot(0, 0, 420, 18, f"request {id}", words, "head")
    yield ("words",), Spot(_LABEL, 0, 420, 18, words, "", "words" if state else "words absent")
    for rank in range(cp):
        y = grid.row(rank) + _CAPTION
        held = 0 if state is None else state.held[rank]
        text = f"{held} token{'' if held == 1 else 's'}"
        colour = f"rank owner{rank % COLOURS}"
        yield ("rank", rank), Spot(0, y, 10, _ROW_HEIGHT, f"rank {rank}", "", colour)
        kind = "held" if held else "held none"
        yield ("held", rank), Spot(16, y + 12, 80, 14, text if held else "no tokens", "", kind)
    if state is None:
        return
    for rank, pages in enumerate(state.ranks):
        for place, page in enumerate(pages):
            yield from _page(rank, place, page, grid)


def _page(rank: int, place: int, page: _Page, grid: _Grid) -> _Content:
    x, y = grid.place(rank, place)
    shared = ""
    if page.shared_with:
        shared = " \u2194 " + ", ".join(map(str, page.shared_with))
    title = f"rank {rank}, page {page.number}" + (
        f", shared with request {', '.join(map(str, page.shared_with))}" if shared else ""
    )
    kind = "page shared" if shared else "page"
    caption = f"page {page.number}{shared}"
    yield ("page", rank, place), Spot(x, y, grid.page, _CAPTION + _ROW_HEIGHT, caption, title, kind)
    for run in page.runs:
        kind = "decoded" if run.decoded else "prompt"
        origin = "decoded" if run.decoded else "of the prompt"
        index = place * grid.t + run.offset
        what = f"position {run.first}" if run.count == 1 else f"positions {run.label}"
        title = f"{what}, {origin}, on rank {rank}, local index {index}, page {page.number}"
        width = run.count * grid.slot
        text = run.label if width >= 7 * len(run.label) + 2 else ""
        classes = f"token {kind} owner{rank % COLOURS}" + (" fresh" if run.fresh else "")
        spot = Spot(
            x + run.offset * grid.slot, y + _CAPTION, width, _ROW_HEIGHT, text, title, classes
        )
        yield ("run", rank, place, run.offset), spot


def _marks(wrong: Sequence[Wrong], state: _State | None, grid: _Grid) -> _Content:
    for number, mark in enumerate(wrong):
        if mark.local_index is None:
            y = grid.row(mark.rank) + _CAPTION
            yield ("wrong", number), Spot(82, y + 4, 16, 16, "", mark.what, "wrong sign")
            continue
        place, offset = divmod(mark.local_index, grid.t)
        x, y = grid.place(mark.rank, place)
        held = state is not None and mark.local_index < state.held[mark.rank]
        kind = "wrong missing" if held else "wrong extra"
        width = max(grid.slot, _CELL)
        x = min(x + offset * grid.slot, x + grid.page - width)
        text = "" if held else mark.label
        yield ("wrong", number), Spot(x, y + _CAPTION, width, _ROW_HEIGHT, text, mark.what, kind)


def _words(id: int, state: _State) -> str:
    ranks = []
    for rank, pages in enumerate(state.ranks):
        tokens = [run.label for page in pages for run in page.runs]
        shown = " ".join(tokens[:8]) + (" and more" if len(tokens) > 8 else "")
        ranks.append(f"rank {rank} holds {shown or 'nothing'}")
    return f"Request {id}, {state.words}. " + "; ".join(ranks) + "."
