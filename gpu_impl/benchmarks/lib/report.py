"""Tables, files, and sections that may fail."""

from __future__ import annotations

import json
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from lib import DRY

BEGUN = time.monotonic()
LIMIT = 520.0
"""Seconds after which nothing new is begun: the machine gives a command 600."""


class Report:
    """The results so far: a JSON document and text tables, rewritten after every section.

    `machine` says what the figures are taken on, `name` is that of both files. A report that is
    `silent`, as all but one of several ranks keep it, prints and writes nothing.
    """

    def __init__(
        self, folder: Path, machine: dict[str, Any], name: str = "h200", silent: bool = False
    ) -> None:
        self.folder, self.name, self.silent = folder, name, silent
        self.document: dict[str, Any] = {"dry_run": DRY, "machine": machine}
        self.text: list[str] = [f"{k}: {v}" for k, v in machine.items()]
        folder.mkdir(parents=True, exist_ok=True)

    def table(self, title: str, rows: Sequence[dict[str, Any]]) -> None:
        """Add rows of equal keys as an aligned table, and print it."""
        self.say("", f"## {title}", *aligned(rows))

    def say(self, *lines: str) -> None:
        """Add lines of text, and print them."""
        self.text += lines
        if not self.silent:
            print("\n".join(lines), flush=True)

    def save(self) -> None:
        """Write both files."""
        if self.silent:
            return
        document = json.dumps(self.document, indent=1, default=str)
        (self.folder / f"{self.name}.json").write_text(document + "\n")
        (self.folder / f"{self.name}.txt").write_text("\n".join(self.text) + "\n")

    def section(self, name: str, body: Callable[[dict[str, Any]], None]) -> None:
        """Run a section; whatever it found is kept, also when it fails."""
        begun = time.monotonic()
        found = self.document.setdefault(name, {})
        self.say("", f"# {name} (at {begun - BEGUN:.0f} s)")
        if begun - BEGUN > LIMIT:
            found["not_run"] = "out of time"
        else:
            try:
                body(found)
            except Exception:
                found["failure"] = traceback.format_exc()
        for problem in ("not_run", "failure"):
            if problem in found:
                self.say(f"{name}: {problem}: {found[problem]}")
        found["seconds"] = round(time.monotonic() - begun, 1)
        self.save()

    def end(self) -> bool:
        """Say which sections failed, did not run or found something wrong; whether any did."""
        bad = [
            name
            for name, found in self.document.items()
            if isinstance(found, dict)
            and any(found.get(k) for k in ("failure", "not_run", "wrong"))
        ]
        self.say("", f"{time.monotonic() - BEGUN:.0f} s; not as they should be: {bad or 'none'}")
        self.save()
        return bool(bad)


def write_json(path: Path | None, figures: object) -> None:
    """Write figures to a file, if one is given."""
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def aligned(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Rows of equal keys as the lines of a table."""
    if not rows:
        return []
    cells = [list(rows[0])] + [[shown(row.get(key)) for key in rows[0]] for row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(c.rjust(w) for c, w in zip(r, widths, strict=True)) for r in cells]


def shown(value: Any) -> str:
    """A table cell."""
    return f"{value:.4g}" if isinstance(value, float) else "-" if value is None else str(value)


def show(title: str, rows: list[dict[str, Any]]) -> None:
    """Print rows of equal keys as a table."""
    print("", f"## {title}", *aligned(rows), sep="\n", flush=True)
