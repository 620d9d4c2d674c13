"""What can be said of the adapters' files without the engines."""

import re
from pathlib import Path

import pytest

from helix_adapters.findings import findings_of
from helix_adapters.matrix import ADAPTERS as FOLDER
from helix_adapters.matrix import NAMES, PAGE, page
from helix_spec.trace import load_trace

ADAPTERS = [path.parent for path in Path(__file__).parents[2].glob("*/findings.toml")]


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_every_finding_has_its_trace_and_its_text(folder):
    """The traces that are played are those that are stored, and FINDINGS.md names each."""
    findings, text = findings_of(folder), (folder / "FINDINGS.md").read_text()
    stored = {path.stem: load_trace(path) for path in (folder / "findings").glob("*.json")}
    assert {finding.trace for finding in findings} == set(stored)
    for finding in findings:
        told = text.partition(f"\n## {finding.number}. ")[2].partition("\n## ")[0]
        assert f"`{finding.trace}`" in told, finding
        assert f"`{finding.engine}`" in told or finding.engine.partition(":")[2] in told, finding


def test_no_two_findings_have_one_number():
    """A number names one finding, whichever engine it was found in."""
    texts = [path.read_text() for path in Path(__file__).parents[2].glob("*/FINDINGS.md")]
    numbers = [int(n) for text in texts for n in re.findall(r"^## (\d+)\. ", text, re.MULTILINE)]
    assert sorted(numbers) == list(range(1, len(numbers) + 1))


@pytest.mark.parametrize("folder", ADAPTERS, ids=lambda folder: folder.name)
def test_every_bug_has_a_report(folder):
    """A finding that is a bug has a report for the maintainers, and no other has."""
    text = (folder / "FINDINGS.md").read_text()
    bugs = re.findall(r"^## (\d+)\. .*: a bug$", text, re.MULTILINE)
    reports = {path.stem: path.read_text() for path in (folder / "reports").glob("*.md")}
    assert set(reports) == set(bugs)
    for number, report in reports.items():
        assert f"[Report](reports/{number}.md)" in text
        for part in ("**Versions.**", "**To reproduce**", "**Cause.**", "**Suggestion.**"):
            assert part in report, (number, part)
        for code in re.findall(r"```python\n(.*?)```", report, re.DOTALL):
            compile(code, number, "exec")


def test_the_page_of_engines_is_up_to_date():
    """It has every adapter's results and every finding, by number."""
    folders = [path.parent for path in FOLDER.glob("*/FINDINGS.md")]
    assert {folder.name for folder in folders} == set(NAMES)
    assert PAGE.read_text(encoding="utf-8") == page(folders), "run python -m helix_adapters.matrix"


@pytest.mark.parametrize(
    "path", sorted(FOLDER.glob("*/requirements.txt")), ids=lambda p: p.parent.name
)
def test_every_requirement_names_one_version(path):
    """An environment of an adapter is the same on every day."""
    lines = [line for line in path.read_text().splitlines() if not line.startswith("#")]
    assert [line for line in lines if not re.fullmatch(r"[\w.-]+==[\w.]+", line)] == []
