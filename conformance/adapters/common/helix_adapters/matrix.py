"""The page of engines and what they pass: `python -m helix_adapters.matrix [FOLDER STREAM...]`.

With an adapter's folder and the streams of its runs, what they say is kept in the folder's
`results.json`, a row for each engine. The page, `docs/reference/engines.md`, is then made from the
rows of all adapters and the headings of their FINDINGS.md. A test holds the two together.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final

import msgspec

from helix_conformance.report.stream import Row, read_stream
from helix_spec.capabilities import in_words

ADAPTERS: Final = Path(__file__).parents[2]
PAGE: Final = ADAPTERS.parents[1] / "docs/reference/engines.md"
NAMES: Final = {
    "vllm": "vLLM",
    "trtllm": "TensorRT-LLM",
    "sglang": "SGLang",
    "ring": "Ring attention",
    "flashinfer": "FlashInfer",
}
HEADING: Final = re.compile(r"^## (\d+)\. (.*): (.*?)$", re.MULTILINE)


class Result(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a run said of an engine: its rows, one for each layout, taken together."""

    engine: str
    settings: dict[str, str]
    layouts: list[str]
    cp_sizes: list[int]
    profiles: list[str]
    """Those that were checked."""
    capabilities: str
    """Where it works, in words; empty for everywhere."""
    traces: int
    verdict: str
    """`pass`, or the verdicts of its layouts."""


def results_of(streams: Sequence[Path]) -> list[Result]:
    """Return what streams say, an entry for each engine; of several runs of one, the last."""
    rows: dict[str, list[Row]] = {}
    for run in read_stream(streams).runs:
        rows |= {row.engine: [] for row in run.rows}
        for row in run.rows:
            rows[row.engine].append(row)
    return [
        Result(
            engine=engine,
            settings=mine[0].settings,
            layouts=[row.layout for row in mine],
            cp_sizes=sorted({size for row in mine for size in row.cp_sizes}),
            profiles=mine[0].profiles,
            capabilities=in_words(mine[0].capabilities),
            traces=sum(row.traces for row in mine),
            verdict=", ".join(sorted({row.verdict for row in mine})),
        )
        for engine, mine in rows.items()
    ]


def kept(folder: Path) -> list[Result]:
    """Return the results that lie in an adapter's folder."""
    file = folder / "results.json"
    return msgspec.json.decode(file.read_bytes(), type=list[Result]) if file.exists() else []


def page(folders: Iterable[Path]) -> str:
    """Return the page of these adapters."""
    by_name = {folder.name: folder for folder in folders}
    folders = [by_name[name] for name in NAMES if name in by_name]
    lines = [
        "# Engines and what they pass",
        "",
        "Made by `python -m helix_adapters.matrix` from the streams of the adapters' runs. What is",
        "not here has no stream that was kept; each adapter's FINDINGS.md tells all its runs.",
        "",
        "| engine | set up as | layouts | C | checked | where it works | traces | verdict |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for folder in folders:
        for one in kept(folder):
            settings = ", ".join(f"{name} {value}" for name, value in one.settings.items())
            cells = [f"`{one.engine}`", settings, ", ".join(one.layouts)]
            cells += [", ".join(map(str, one.cp_sizes)), ", ".join(one.profiles)]
            cells += [one.capabilities or "everywhere", str(one.traces), one.verdict]
            lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "## Findings", "", "| | engine | finding | is |", "|---|---|---|---|"]
    findings = [
        (int(number), folder, title, kind)
        for folder in folders
        for number, title, kind in HEADING.findall((folder / "FINDINGS.md").read_text("utf-8"))
    ]
    for number, folder, title, kind in sorted(findings, key=lambda finding: finding[0]):
        link = f"../../conformance/adapters/{folder.name}/FINDINGS.md"
        lines.append(f"| {number} | [{NAMES[folder.name]}]({link}) | {title} | {kind} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Keep the results of streams, where some are given, and write the page."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", help="the adapter's")
    parser.add_argument("streams", type=Path, nargs="*")
    arguments = parser.parse_args()
    if arguments.folder is not None:
        encoded = msgspec.json.encode(results_of(arguments.streams))
        text = msgspec.json.format(encoded, indent=1)
        (arguments.folder / "results.json").write_bytes(text + b"\n")
    PAGE.write_text(page(path.parent for path in ADAPTERS.glob("*/FINDINGS.md")), encoding="utf-8")


if __name__ == "__main__":
    main()
