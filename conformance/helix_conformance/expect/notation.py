"""A compact notation for the events of a trace, in the words of the trace format."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Final, get_args

import msgspec

from helix_spec.config import Count
from helix_spec.events import Event


def _required(kind: type[Event]) -> list[str]:
    return [field.name for field in msgspec.structs.fields(kind) if field.required]


_FIELDS: Final = {kind.__struct_config__.tag: _required(kind) for kind in get_args(Event)}
"""Names of the fields of each kind of event that have no default."""


def parse_events(text: str) -> list[Event]:
    """Return the events that a text lists, with semicolons between them.

    Parameters
    ----------
    text
        Each event is written as one of

        - `admit ID PROMPT_LEN chunk N`, whose end may be left out, `release ID`, `preempt ID`,
          `resume ID`, `accept ID KEPT`,
          `fork PARENT CHILD`, `sampled ID ID ...`
        - `decode ID:QUERY_LEN ID:QUERY_LEN ... pad N`: an ID alone has a query_len of 1, `ID:` has
          none (a malformed batch), and `pad N` may be left out
        - `skip ID:QUERY_LEN ID:QUERY_LEN ...`, likewise
        - `merge LEVEL,LEVEL LEVEL,LEVEL ... order K K ...`: one word for each partial, one level
          for each token, `null` where a partial is of no keys; without `order`, rank r is
          supplied with partial r

        and may be followed by `*N`: it happens N times in a row. An empty text lists none.

    Returns
    -------
    list of Event
        In the order of the text.

    Raises
    ------
    ValueError
        When a part of the text is no event.

    Examples
    --------
    >>> parse_events("admit 0 13; decode 0:4 1 pad 3")
    [Admit(id=0, prompt_len=13), Decode(ids=[0, 1], query_lens=[4, 1], pad=3)]
    >>> parse_events("release 0 *2")
    [Release(id=0), Release(id=0)]
    >>> parse_events("merge 0,3 null,-1 order 1 0")
    [Merge(levels=[[0, 3], [None, -1]], order=[1, 0])]
    """
    events: list[Event] = []
    for part in filter(None, map(str.strip, text.split(";"))):
        event, star, times = part.partition("*")
        kind, *words = event.split() or [""]
        try:
            # Not strict: numbers and nulls still are text.
            fields = {"event": kind, **_fields(kind, words)}
            once: Event = msgspec.convert(fields, Event, strict=False)
            events += [once] * msgspec.convert(times if star else 1, Count, strict=False)
        except (ValueError, msgspec.ValidationError) as error:
            raise ValueError(f"`{part}` is no event: {error}.") from error
    return events


def _fields(kind: str, words: list[str]) -> dict[str, Any]:
    """Return what the JSON form of an event holds beside its kind, numbers as text."""
    match kind, words:
        case "admit", [id, prompt_len, "chunk", chunk]:
            return {"id": id, "prompt_len": prompt_len, "chunk": chunk}
        case "decode", [*batch, "pad", pad]:
            return {**_batch(batch), "pad": pad}
        case "decode" | "skip", batch:
            return _batch(batch)
        case "sampled", ids:
            return {"ids": ids}
        case "merge", _:
            count = words.index("order") if "order" in words else len(words)
            levels = [partial.split(",") for partial in words[:count]]
            return {"levels": levels, "order": words[count + 1 :] or list(range(count))}
    if kind not in _FIELDS:
        raise ValueError(f"events are of the kinds {', '.join(_FIELDS)}")
    if len(words) != len(_FIELDS[kind]):
        raise ValueError(f"{kind} takes {' and '.join(_FIELDS[kind])}")
    return dict(zip(_FIELDS[kind], words, strict=True))


def _batch(words: Sequence[str]) -> dict[str, list[str]]:
    """Return the ids and query_lens of words such as `0:4`, `1` and, without a query_len, `2:`."""
    pairs = [word.partition(":") for word in words]
    query_lens = [query_len if colon else "1" for _, colon, query_len in pairs]
    return {"ids": [id for id, _, _ in pairs], "query_lens": list(filter(None, query_lens))}
