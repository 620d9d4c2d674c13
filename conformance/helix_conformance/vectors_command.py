"""`helix-conformance vectors check`: all vectors against one engine, and what is said of them."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from rich.console import Console

from helix_conformance.drive.driver import Driver
from helix_conformance.expect.making import SHIPPED
from helix_conformance.expect.vectors import Vector, VectorError, load_vectors
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.failure import Failure
from helix_conformance.report.stream import Stream, make_row
from helix_conformance.report.text import failure_text, print_lines, print_table
from helix_conformance.session import check_vector, profiles_of_vector
from helix_spec.invariants import NUMBERS

ALONE: Final = ["Stored vectors were played; a whole run plays random traces of every layout."]


def read(folder: Path | None, layouts: Sequence[str] = ()) -> list[tuple[Path, Vector]]:
    """The vectors of a folder, or the shipped ones, each with its file. Raises VectorError.

    Only those of these layouts, by name; of all without any.
    """
    folder = folder or SHIPPED
    found = [
        (folder / f"{vector.name}.json", vector)
        for vector in load_vectors(folder)
        if not layouts or _layout_name(vector) in layouts
    ]
    if not found:
        raise VectorError(f"{folder} holds no vector of layout {' or '.join(layouts)}.")
    return found


def _layout_name(vector: Vector) -> str:
    return vector.layout.partition("/")[0]


def check(
    stream: Stream,
    driver: Driver,
    engine: str,
    cases: Sequence[tuple[Path, Vector]],
    profiles: frozenset[str],
) -> None:
    """Play the vectors that these profiles can run; a row of the stream for each layout name.

    Prints a table, each failure, and what was not checked and why.
    """
    console, by_layout = Console(), defaultdict[str, list[tuple[Path, Vector]]](list)
    for path, vector in cases:
        by_layout[_layout_name(vector)].append((path, vector))
    left_out, texts = list[str](), list[str]()
    for layout, group in by_layout.items():
        meant = []
        for path, vector in group:
            why = _why_not(driver, vector, profiles)
            if why is None:
                meant.append((path, vector))
            else:
                left_out.append(f"not checked: {vector.name}: {why}")
        if meant:
            texts += _check_layout(stream, driver, engine, layout, meant, profiles)
        if not driver.survives_failure and stream.rows and stream.rows[-1].verdict == "error":
            texts.append("The engine is gone; the layouts after this one were not checked.")
            break
    print_table(console, stream.rows)
    print_lines(console, left_out + texts)


def _why_not(driver: Driver, vector: Vector, profiles: frozenset[str]) -> str | None:
    """Why a vector is not meant for an engine, or does not fit its driver."""
    missing = [profile for profile in vector.profiles if profile not in profiles]
    undeclared = [profile for profile in missing if profile not in driver.profiles]
    if undeclared:
        return f"the engine does not declare {', '.join(undeclared)}"
    if missing:
        return f"{', '.join(missing)} was not asked for"
    world = vector.config.world_size
    if driver.largest_world is not None and world > driver.largest_world:
        return f"it needs {world} ranks, and the {driver.name} has {driver.largest_world}"
    return None


def _check_layout(
    stream: Stream,
    driver: Driver,
    engine: str,
    layout: str,
    cases: Sequence[tuple[Path, Vector]],
    profiles: frozenset[str],
) -> list[str]:
    """Play the vectors of one layout; a text for each that fails."""
    tally, checked = Tally(), frozenset[str]()
    failed, texts = list[tuple[Path, Failure]](), list[str]()
    for path, vector in cases:
        checked |= profiles_of_vector(vector, profiles)
        failure = check_vector(driver, vector, tally, profiles)
        if failure is None:
            continue
        failed.append((path, failure))
        texts += _text(path, vector, failure, whole=len(failed) == 1)
        if failure.verdict == "error" and not driver.survives_failure:
            break
    worst = sorted((failure for _, failure in failed), key=lambda failure: failure.verdict)
    sizes = [vector.config.layout.cp_size for _, vector in cases]
    row = make_row(
        layout, engine, driver.name, sizes, checked, driver.profiles, tally,
        worst[0] if worst else None,
    )  # fmt: skip
    stream.row(row)
    for path, failure in failed:
        stream.failure(row, failure, path)
    return texts


def _text(path: Path, vector: Vector, failure: Failure, *, whole: bool) -> list[str]:
    """One failing vector; all but the first of a layout in one line."""
    if whole:
        return ["", f"{path}: {' '.join(vector.notes)}", *failure_text(failure)]
    numbers = sorted(failure.invariants, key=NUMBERS.index)
    at = "the start" if failure.event is None else f"event {failure.event}"
    return [f"{path}: {', '.join(numbers)} at {at}"]
