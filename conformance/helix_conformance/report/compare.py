"""Two runs compared: what was passing and is not, the other way round, and speed."""

from __future__ import annotations

from collections.abc import Iterator

from helix_conformance.report.stream import Record, State

Key = tuple[str, ...]
"""Layout, driver and profile; where a record is of several engines, the engine before them."""


def states(record: Record, *, by_engine: bool) -> dict[Key, State]:
    """Return what a record says of each profile that it checked.

    Parameters
    ----------
    record : Record
        What `read_stream` returns.
    by_engine : bool
        Whether engines are told apart.
    """
    return {
        (*([run.settings.engine] if by_engine else []), row.layout, row.driver, profile): state
        for run in record.runs
        for row in run.rows
        for profile, (state, _) in run.profile_states(row).items()
        if state != "not declared"
    }


def compared(old: Record, new: Record) -> tuple[list[str], bool]:
    """Return what differs between two records, in sentences, and whether anything got worse.

    Engines are told apart where one of the records has several: else two versions of an engine
    could not be compared, whatever they are called.

    Parameters
    ----------
    old, new : Record
        What `read_stream` returns.

    Returns
    -------
    list of str
        What no longer passes first, then what passes now, what else changed, and speeds.
    bool
        Whether something that passed does not pass any more.
    """
    several = any(len({run.settings.engine for run in one.runs}) > 1 for one in (old, new))
    before, after = (states(one, by_engine=several) for one in (old, new))
    found: dict[str, list[str]] = {"Passed, and does not": [], "Passes now": [], "Changed": []}
    for key in dict.fromkeys([*before, *after]):
        was, now = before.get(key, "absent"), after.get(key, "absent")
        if was != now:
            kind = {"pass": "Passed, and does not"}.get(was, "Changed")
            kind = "Passes now" if now == "pass" else kind
            found[kind].append(f"{' '.join(key)}: was {was}, is {now}")
    lines = [f"{kind}: {line}." for kind, those in found.items() for line in those]
    lines = lines or ["Every layout and profile has the verdict that it had."]
    return [*lines, *_speeds(old, new)], bool(found["Passed, and does not"])


def _speeds(old: Record, new: Record) -> Iterator[str]:
    """Yield the events a second of each layout and driver that both have played."""
    before, after = (
        {
            f"{row.layout} {row.driver}": row.events / row.seconds
            for run in one.runs
            for row in run.rows
            if row.seconds
        }
        for one in (old, new)
    )
    for key, was in before.items():
        if key in after:
            now = after[key]
            yield f"{key}: {now:,.0f} events/s, was {was:,.0f} ({now / was:.2f} times)."
