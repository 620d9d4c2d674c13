"""Where a trace puts its tokens, event by event, as boxes on a plane; wrong answers marked.

A `Diagram` has a stop after each event (thinned out in long traces) and a panel for each request:
a row for each cp_rank, its pages in local order, in each page the tokens. Every box says at
which stops it is there, so that one drawing serves all stops: whoever shows a stop hides the
boxes that are not of it. Positions are what the reference model holds; `Wrong` marks on top of
them are what an engine answered instead. A `Scene` is a failure with its diagram, and what each
rank answered beside what is expected.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from itertools import chain
from typing import Any, Final, NamedTuple

from helix_conformance.drive.driver import Answer
from helix_conformance.expect.expectation import Expectation, Request, outcome_of
from helix_conformance.expect.recorder import ModelState, Recorder
from helix_conformance.report.stream import FailureLine
from helix_conformance.report.text import event_text
from helix_spec.config import config_problem
from helix_spec.engine import PROFILES, Outcome
from helix_spec.events import Decode, Event, Reason, ids_of
from helix_spec.layouts import Layout
from helix_spec.trace import Trace

MAX_STOPS: Final = 500
"""Of a longer trace every so many events are drawn, and all around the one that fails."""
MAX_REQUESTS: Final = 24
"""Of more requests those that the failing event names are drawn, then the first."""
MAX_PAGES: Final = 2000
"""A request with more pages on all ranks is not drawn."""
MAX_CELLS: Final = 16
"""Pages of at most so many tokens are drawn token by token, larger ones as runs."""
COLOURS: Final = 8
"""Ranks beyond these take their colours again; every row says its rank in words."""

_CELL, _MIN_PAGE, _RUN_PAGE, _ROW_HEIGHT, _CAPTION = 30, 60, 136, 26, 14
"""Pixels: a token's width, the narrowest page, a page of runs, a token's height, the line above
a page."""
_LABEL, _GAP, _LINE = 104, 8, 860
"""The column of rank names, between pages, the width after which a rank's pages go on below."""


class Wrong(NamedTuple):
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
    """A rectangle with a word in it, in pixels; `kind` are CSS classes, the first is its type."""

    x: float
    y: float
    width: float
    height: float
    text: str
    title: str
    kind: str


class Box(NamedTuple):
    """A spot that is there from stop `since` up to, not with, stop `until`."""

    spot: Spot
    since: int
    until: int


class Panel(NamedTuple):
    """One request; width and height in pixels."""

    id: int
    width: float
    height: float
    boxes: list[Box]
    summary: str
    """The state at the last stop in words, for those who do not see the picture."""


class Stop(NamedTuple):
    """The state after one event; before all events `event` is None."""

    event: int | None
    text: str
    refused: str | None = None


class Diagram(NamedTuple):
    """A trace from its start to its end."""

    layout: str
    pools: list[int]
    """Pages of each rank."""
    stops: list[Stop]
    panels: list[Panel]
    pools_panel: Panel | None
    """Free pages of each rank; None beside an engine that does not allocate."""
    first_shown: int
    """The stop to begin with: where it fails, else the last."""
    events: int
    requests: int
    """How many the trace has; fewer may be drawn."""


def diagram(
    trace: Trace,
    *,
    wrong: Sequence[Wrong] = (),
    at: int | None = None,
    declared: Collection[str] = PROFILES,
    part: int = 0,
) -> Diagram:
    """Return the diagram of a trace, or of one of its cache groups.

    Parameters
    ----------
    trace : Trace
        One with a configuration with which ranks may start.
    wrong : sequence of Wrong
        What is marked at the stop after event `at`.
    at : int or None
        Index of the event that fails; None when none does.
    declared : collection of str
        Profiles of the engine that it was played on: what needs another is refused.
    part : int
        With cache groups, which of `parts` is drawn.

    Returns
    -------
    Diagram
        At most `MAX_STOPS` stops and `MAX_REQUESTS` panels, the failing event and its requests
        among them but for those of more than `MAX_PAGES` pages.
    """
    chosen = _chosen(len(trace.events), at)
    recorder = Recorder(trace.config, declared, trace.freedoms)
    config, state = trace.config, recorder.state
    if recorder.groups:
        drawn_part = recorder.groups[part]
        state = drawn_part.state
        config = config.alone(drawn_part.group, drawn_part.cp_rank or 0)
    layout = config.layout
    seen = _seen(trace, declared)
    small = [id for id, pages in seen.items() if pages <= MAX_PAGES]
    drawn = _drawn(small, wrong, None if at is None else trace.events[at])
    t = layout.tokens_per_block
    stops, frames = [Stop(None, "before the first event")], [_states(state, None, t, drawn)]
    free = [state.free_pages]
    for index, event in enumerate(trace.events):
        expected = recorder.next(event)
        if index in chosen:
            stops.append(Stop(index, event_text(event), expected.refused))
            decode = index if isinstance(event, Decode) else None
            frames.append(_states(state, decode, t, drawn))
            free.append(state.free_pages)
    shown = len(stops) - 1 if at is None else [stop.event for stop in stops].index(at)
    return Diagram(
        str(layout),
        list(config.pages),
        stops,
        [_panel(id, frames, layout, [w for w in wrong if w.request == id], shown) for id in drawn],
        _pools(free, config.pages) if "pages" in declared else None,
        shown,
        len(trace.events),
        len(seen),
    )


def parts(trace: Trace) -> list[str]:
    """Return what there is to draw of a trace: each cache group, of a replicated one each rank.

    Examples
    --------
    >>> from helix_spec.config import Config
    >>> parts(Trace(config=Config(layout="pr9757/1:C=1,T=2", pages=[9], max_len=9), events=[]))
    ['']
    """
    if not trace.config.groups:
        return [""]
    return [part.name for part in Recorder(trace.config).groups]


def _seen(trace: Trace, declared: Collection[str]) -> dict[int, int]:
    """Return the requests that live at some time, as they come, and the most pages of each."""
    recorder = Recorder(trace.config, declared, trace.freedoms)
    seen = dict[int, int]()
    for event in trace.events:
        recorder.next(event)
        for id in ids_of(event):
            if id in recorder.state.requests:
                pages = sum(map(len, recorder.state.tables(id)))
                seen[id] = max(seen.get(id, 0), pages)
    return seen


def _chosen(events: int, at: int | None) -> set[int]:
    """Return the indices of the events after which there is a stop."""
    if events <= MAX_STOPS:
        return set(range(events))
    every = -(-events // (MAX_STOPS - 20))
    middle = events - 1 if at is None else at
    around = range(max(0, middle - 8), min(events, middle + 8))
    return {*range(0, events, every), events - 1, *around}


def _drawn(ids: list[int], wrong: Sequence[Wrong], event: Event | None) -> list[int]:
    """Return the requests that have a panel, in the order of their ids."""
    named = [w.request for w in wrong] + ([] if event is None else ids_of(event))
    first = [id for id in dict.fromkeys([*named, *ids]) if id in ids]
    return sorted(first[:MAX_REQUESTS])


# What there is after one event


class _Run(NamedTuple):
    """Tokens side by side in one page: positions first, first + stride, ... up to last."""

    offset: int
    tokens: int
    first: int
    last: int
    decoded: bool
    fresh: bool
    """Whether the last event made some of it."""

    @property
    def label(self) -> str:
        """`7`, `400-499`, or `0-252 by 4`."""
        if self.tokens == 1:
            return str(self.first)
        stride = (self.last - self.first) // (self.tokens - 1)
        return f"{self.first}\u2013{self.last}" + (f" by {stride}" if stride > 1 else "")


class _Page(NamedTuple):
    number: int
    shared_with: str
    """Ids of the other requests that hold it."""
    runs: list[_Run]


class _State(NamedTuple):
    """One request: pages and number of tokens of each rank, and its tokens in words."""

    ranks: list[list[_Page]]
    held: list[int]
    words: str


_identity = id
"""By it pages are told apart; `id` is a request's everywhere else."""


def _states(
    state: ModelState, decode: int | None, t: int, drawn: Sequence[int]
) -> dict[int, _State]:
    """Return what there is of each drawn request; tokens made by the event `decode` are fresh."""
    holders, found = defaultdict[int, list[int]](list), dict[int, _State]()
    for id, request in state.requests.items():
        if sum(map(len, request.tables)) <= MAX_PAGES:
            for page in chain.from_iterable(request.tables):
                holders[_identity(page)].append(id)
    for id, request in state.requests.items():
        if id not in drawn:
            continue
        ranks = list[list[_Page]]()
        for positions, table in zip(request.ranks, request.tables, strict=True):
            ranks.append([])
            for place, page in enumerate(table):
                if page.number < 0:
                    ranks[-1].append(_Page(page.number, "", []))
                    continue
                others = [str(other) for other in holders[_identity(page)] if other != id]
                runs = _runs(request, positions[place * t : (place + 1) * t], decode, t)
                ranks[-1].append(_Page(page.number, ", ".join(others), list(runs)))
        words = f"{_tokens(len(request.tokens))}: prompt {request.prompt_len}, "
        words += f"decoded {request.steps}" + ("; preempted" if request.preempted else "")
        found[id] = _State(ranks, [len(positions) for positions in request.ranks], words)
    return found


def _tokens(count: int) -> str:
    return f"{count} token" + ("" if count == 1 else "s")


def _runs(request: Request, positions: Sequence[int], decode: int | None, t: int) -> Iterator[_Run]:
    """Yield the tokens of one page, those side by side together where not drawn singly."""
    at, prompt_len = 0, request.prompt_len
    while at < len(positions):
        end = at + 1
        if t > MAX_CELLS and end < len(positions):
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
        fresh = request.tokens[last][0] == decode
        yield _Run(at, end - at, first, last, first >= prompt_len, fresh)
        at = end


# From states to boxes


_Place = tuple[str, *tuple[int, ...]]
"""What is drawn, and where: no two spots of one stop have the same."""
_Content = Iterator[tuple[_Place, Spot]]
_LAYERS: Final = ("page", "run", "wrong")
"""Drawn in this order, behind all else: later ones cover earlier ones."""


def _boxes(stops: Iterable[Mapping[_Place, Spot]]) -> list[Box]:
    """Return boxes: what is at a place stays until something else, or nothing, is there."""
    found, shown = list[tuple[str, Box]](), dict[_Place, tuple[int, Spot]]()
    for stop, content in enumerate([*stops, {}]):
        for place, (since, spot) in list(shown.items()):
            if content.get(place) != spot:
                found.append((place[0], Box(spot, since, stop)))
                del shown[place]
        for place, spot in content.items():
            shown.setdefault(place, (stop, spot))
    order = {what: layer for layer, what in enumerate(_LAYERS, 1)}
    return [box for _, box in sorted(found, key=lambda one: order.get(one[0], 0))]


class _Grid:
    """Where pages and tokens of one request are on the plane, in pixels."""

    def __init__(self, t: int, pages: Sequence[int]) -> None:
        self.t, self.pages = t, pages
        """Tokens of a page; pages for which each rank needs room."""
        self.slot = _RUN_PAGE / t if t > MAX_CELLS else max(_CELL, _MIN_PAGE / t)
        self.page = self.slot * t
        self.per_line = max(1, int(_LINE // (self.page + _GAP)))

    def row(self, rank: int) -> float:
        """Top of a rank's first line."""
        before = sum(-(-pages // self.per_line) for pages in self.pages[:rank])
        return 26 + before * (_CAPTION + _ROW_HEIGHT + 6) + rank * 8

    def place(self, rank: int, page: int) -> tuple[float, float]:
        """Left and top of a page."""
        line, column = divmod(page, self.per_line)
        top = self.row(rank) + line * (_CAPTION + _ROW_HEIGHT + 6)
        return _LABEL + column * (self.page + _GAP), top


def _panel(
    id: int,
    frames: Sequence[Mapping[int, _State]],
    layout: Layout,
    wrong: Sequence[Wrong],
    shown: int,
) -> Panel:
    states = [frame.get(id) for frame in frames]
    there = [state for state in states if state is not None]
    cp, t = layout.cp_size, layout.tokens_per_block
    room = [max([1, *(len(state.ranks[rank]) for state in there)]) for rank in range(cp)]
    for mark in wrong:
        room[mark.rank] = max(room[mark.rank], 1 + (mark.local_index or 0) // t)
    grid = _Grid(t, room)
    boxes = _boxes(
        dict(_content(id, state, grid))
        | (dict(_marked(wrong, state, grid)) if stop == shown else {})
        for stop, state in enumerate(states)
    )
    width = _LABEL + min(max(room), grid.per_line) * (grid.page + _GAP)
    summary = _summary(id, there[-1]) if there else ""
    return Panel(id, max(width, 420), grid.row(cp) + 4, boxes, summary)


def _pools(stops: Sequence[Sequence[int]], sizes: Sequence[int]) -> Panel:
    """Return the free pages of each rank, in words, six ranks a line."""

    def content(pools: Sequence[int]) -> _Content:
        for rank, (free, size) in enumerate(zip(pools, sizes, strict=False)):
            line, column = divmod(rank, 6)
            words, kind = f"rank {rank}: {free} of {size}", "held" if free else "words empty"
            yield ("free", rank), Spot(_LABEL + 128 * column, 18 * line, 120, 18, words, "", kind)
        yield ("head",), Spot(0, 0, _LABEL, 18, "free pages", "", "head")

    boxes = _boxes(dict(content(pools)) for pools in stops)
    summary = ", ".join(f"rank {rank} {free}" for rank, free in enumerate(stops[-1]))
    width, height = _LABEL + 128 * min(6, len(sizes)), 18 * -(-len(sizes) // 6) + 4
    return Panel(-1, width, height, boxes, f"Free pages: {summary}.")


def _content(id: int, state: _State | None, grid: _Grid) -> _Content:
    """Yield what is there of a request at one stop."""
    words = "not there" if state is None else state.words
    yield ("head",), Spot(0, 0, 420, 18, f"request {id}", words, "head")
    yield ("words",), Spot(_LABEL, 0, 420, 18, words, "", "words" if state else "words absent")
    for rank in range(len(grid.pages)):
        y = grid.row(rank) + _CAPTION
        held = 0 if state is None else state.held[rank]
        colour = f"rank owner{rank % COLOURS}"
        yield ("rank", rank), Spot(0, y, 10, _ROW_HEIGHT, f"rank {rank}", "", colour)
        text, kind = (_tokens(held), "held") if held else ("no tokens", "held none")
        yield ("held", rank), Spot(16, y + 12, 80, 14, text, "", kind)
    for rank, pages in enumerate([] if state is None else state.ranks):
        for place, page in enumerate(pages):
            yield from _page(rank, place, page, grid)


def _page(rank: int, place: int, page: _Page, grid: _Grid) -> _Content:
    x, y = grid.place(rank, place)
    caption, title, kind = f"page {page.number}", f"rank {rank}, page {page.number}", "page"
    if page.number < 0:
        caption, title = "gone", f"rank {rank}: a page that went back behind the window"
    if page.shared_with:
        caption += f" \u2194 {page.shared_with}"
        title += f", shared with request {page.shared_with}"
        kind += " shared"
    yield ("page", rank, place), Spot(x, y, grid.page, _CAPTION + _ROW_HEIGHT, caption, title, kind)
    for run in page.runs:
        kind, origin = ("decoded", "decoded") if run.decoded else ("prompt", "of the prompt")
        index = place * grid.t + run.offset
        what = f"position{'' if run.tokens == 1 else 's'} {run.label}"
        title = f"{what}, {origin}, on rank {rank}, local index {index}, page {page.number}"
        left, width = x + run.offset * grid.slot, run.tokens * grid.slot
        text = run.label if width >= 7 * len(run.label) + 2 else ""
        kind = f"token {kind} owner{rank % COLOURS}" + (" fresh" if run.fresh else "")
        spot = Spot(left, y + _CAPTION, width, _ROW_HEIGHT, text, title, kind)
        yield ("run", rank, place, run.offset), spot


def _marked(wrong: Sequence[Wrong], state: _State | None, grid: _Grid) -> _Content:
    """Yield the marks of one request."""
    for number, mark in enumerate(wrong):
        if mark.local_index is None:
            y = grid.row(mark.rank) + _CAPTION
            yield ("wrong", number), Spot(82, y + 4, 16, 16, "", mark.what, "wrong sign")
            continue
        place, offset = divmod(mark.local_index, grid.t)
        x, y = grid.place(mark.rank, place)
        held = state is not None and mark.local_index < state.held[mark.rank]
        text, kind = ("", "wrong missing") if held else (mark.label, "wrong extra")
        width = max(grid.slot, _CELL)
        x = min(x + offset * grid.slot, x + grid.page - width)
        yield ("wrong", number), Spot(x, y + _CAPTION, width, _ROW_HEIGHT, text, mark.what, kind)


def _summary(id: int, state: _State) -> str:
    ranks = []
    for rank, pages in enumerate(state.ranks):
        tokens = [run.label for page in pages for run in page.runs]
        shown = " ".join(tokens[:8]) + (" and more" if len(tokens) > 8 else "")
        ranks.append(f"rank {rank} holds {shown or 'nothing'}")
    return f"Request {id}, {state.words}. " + "; ".join(ranks) + "."


# A failure: answers beside what is expected


class Compared(NamedTuple):
    """One value of one rank's answer."""

    expected: Any
    observed: Any
    wrong: bool


class Scene(NamedTuple):
    """A failure, ready to be drawn; `diagram` is None where no rank may start."""

    failure: FailureLine
    diagram: Diagram | None = None
    columns: Sequence[str] = ()
    ranks: Sequence[Mapping[str, Compared]] = ()
    """Of each global rank, its answer by column."""
    marks: Sequence[Wrong] = ()


def scene(failure: FailureLine) -> Scene:
    """Return a failure with its diagram, and all answers compared.

    Parameters
    ----------
    failure : FailureLine
        A line of the stream.

    Returns
    -------
    Scene
        Wrong answers are in `ranks`, and as `marks` in the diagram at the failing event.
    """
    trace, event = failure.trace, failure.event
    if config_problem(trace.config) is not None:
        return Scene(failure)
    declared, layout = failure.declared or PROFILES, trace.config.layout
    if trace.config.groups:
        told = " ".join(violation.message for violation in failure.violations)
        named = [f"cache group {name.partition(',')[0]}:" in told for name in parts(trace)]
        part = named.index(True) if any(named) else 0
        return Scene(failure, diagram(trace, at=event, declared=declared, part=part))
    recorder, last = Recorder(trace.config, declared, trace.freedoms), None
    for one in trace.events if event is None else trace.events[: event + 1]:
        last = recorder.next(one)
    expected = [outcome_of(last, rank, layout) for rank in range(layout.cp_size)]
    ranks = [
        _compared(failure, answer, expected[rank % layout.cp_size], recorder.state, rank)
        for rank, answer in enumerate(failure.answers)
    ]
    columns = list(dict.fromkeys(name for row in ranks for name in row))
    marks = [] if event is None or last is None else _merged(_marks(failure, last, ranks))
    drawn = diagram(trace, wrong=marks, at=event, declared=declared)
    return Scene(failure, drawn, columns, ranks, marks)


def _compared(
    failure: FailureLine, answer: Answer, expected: Outcome, state: ModelState, rank: int
) -> dict[str, Compared]:
    """Return one rank's answer by column; only with profile `lengths` it has to know them."""
    layout, lengths = failure.trace.config.layout, "lengths" in failure.declared
    outcome, pairs = answer.outcome, dict[str, tuple[Any, Any]]()
    if failure.event is not None:
        pairs["answer"] = _verdict(expected.reason), _verdict(outcome.reason)
        if expected.reason is None and outcome.reason is None:
            for name in ("past_len", "position_ids", "active"):
                if lengths or name != "past_len":
                    pairs[name] = getattr(expected, name), getattr(outcome, name)
            pairs["slots"] = _offsets(expected.slots, layout), _offsets(outcome.slots, layout)
    if answer.view is not None and lengths:
        reported, cp_rank = answer.view.local_len, rank % layout.cp_size
        held = {id: state.lengths(id)[cp_rank] for id in reported if id in state.live}
        pairs["local_len"] = held, reported
    found = {name: Compared(*pair, pair[0] != pair[1]) for name, pair in pairs.items()}
    if "slots" in found:
        found["slots"] = found["slots"]._replace(observed=outcome.slots)
    return found


def _offsets(slots: Sequence[int], layout: Layout) -> list[int]:
    """Return the offsets in pages; which physical page it is, is the engine's own affair."""
    return [slot % layout.tokens_per_block if slot >= 0 else -1 for slot in slots]


def _verdict(reason: Reason | None) -> str:
    return "accepted" if reason is None else f"refused: {reason}"


def _marks(
    failure: FailureLine, last: Expectation, ranks: Sequence[Mapping[str, Compared]]
) -> Iterator[Wrong]:
    """Yield tokens and ranks on which an answer is wrong, in the requests of the failing event."""
    layout = failure.trace.config.layout
    cp = layout.cp_size
    for rank, row in enumerate(ranks):
        if "slots" in row:
            yield from _token_marks(layout, last, rank, row["active"], row["slots"])
        if "local_len" in row:
            for id, count in row["local_len"].observed.items():
                held = row["local_len"].expected.get(id, 0)
                if count != held:
                    what = f"rank {rank} reports local_len {count} of request {id}; it is {held}"
                    yield Wrong(id, rank % cp, None, "", what)
    named = ids_of(last.event)
    if failure.rank is not None and failure.engine_failure is not None:
        for id in named:
            yield Wrong(id, failure.rank % cp, None, "", failure.engine_failure)
    numbers: dict[tuple[int, int | None, str], list[str]] = {}
    for one in failure.violations:
        if one.rank is not None:
            numbers.setdefault((one.rank, one.request, one.message), []).append(one.invariant)
    for (rank, request, message), broken in numbers.items():
        for id in named if request is None else [request]:
            what = f"{', '.join(dict.fromkeys(broken))} on rank {rank}: {message}"
            yield Wrong(id, rank % cp, None, "", what)


def _token_marks(
    layout: Layout, last: Expectation, rank: int, active: Compared, slots: Compared
) -> Iterator[Wrong]:
    """Yield new tokens that a rank claims or writes and should not, or should and does not."""
    cp_rank = rank % layout.cp_size
    assert isinstance(last.event, Decode) and last.decoded is not None
    ids = [
        id for id, n in zip(last.event.ids, last.event.query_lens, strict=True) for _ in range(n)
    ]
    offsets = slots.expected, _offsets(slots.observed, layout)
    pairs = zip(active.expected, active.observed, *offsets, strict=False)
    extra = Counter[int]()
    for token, (right, claimed, offset, written) in enumerate(pairs):
        id, position = ids[token], last.decoded.position_ids[token]
        problem = _token_problem(right, claimed, offset, written)
        if problem:
            held = last.decoded.visible[token][cp_rank]
            index = held - 1 if right else held + extra[id]
            extra[id] += not right
            what = f"rank {rank} {problem} position {position} of request {id}"
            what += f"; its owner is rank {last.decoded.owners[token]}"
            yield Wrong(id, cp_rank, index, str(position), what)


def _token_problem(right: bool, claimed: bool, offset: int, written: int) -> str:
    """Return what a rank does with a new token that it should not do; empty when all is well."""
    if claimed != right:
        return "claims" if claimed else "does not claim"
    if written == offset:
        return ""
    if offset < 0 or written < 0:
        return "names no slot for" if written < 0 else "names a slot for"
    return f"names a slot with offset {written}, not {offset}, for"


def _merged(marks: Iterable[Wrong]) -> list[Wrong]:
    """Return one mark for each place, with all that is wrong there."""
    places: dict[tuple[int, int, int | None], list[Wrong]] = {}
    for mark in marks:
        places.setdefault((mark.request, mark.rank, mark.local_index), []).append(mark)
    return [
        Wrong(*place, same[0].label, "; ".join(dict.fromkeys(mark.what for mark in same)))
        for place, same in places.items()
    ]
