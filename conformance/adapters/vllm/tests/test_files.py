"""What can be said of the adapter's files without vLLM."""

import re
from pathlib import Path

from helix_spec.trace import load_trace
from helix_vllm.findings import FINDINGS

HERE = Path(__file__).parents[1]


def test_every_finding_has_its_trace_and_its_text():
    """The traces that are played are those that are stored, and FINDINGS.md names each."""
    stored = {path.stem: load_trace(path) for path in (HERE / "findings").glob("*.json")}
    told = set(re.findall(r"`(vllm-[a-z0-9-]+)`", (HERE / "FINDINGS.md").read_text()))
    assert {finding.trace for finding in FINDINGS} == set(stored)
    assert set(stored) <= told
