"""The notebook of the examples: every cell runs, and its pictures are drawn."""

import sys
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from helix_conformance import check
from helix_conformance.report.text import trace_text

EXAMPLES = Path(__file__).parents[1] / "examples"
NOTEBOOK = nbformat.read(EXAMPLES / "notebook.ipynb", as_version=4)
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")


def test_the_notebook_runs():
    """It holds what it asserts, shows two placements and the plot, and prints the trace."""
    resources = {"metadata": {"path": str(EXAMPLES)}}
    cells = (
        NotebookClient(nbformat.from_dict(NOTEBOOK), timeout=120, resources=resources)
        .execute()
        .cells
    )
    outputs = [output for cell in cells for output in cell.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert (shown.count("image/svg+xml"), shown.count("image/png")) == (2, 1)
    printed = "".join(output.get("text", "") for output in outputs)
    assert "event 1: decode" in printed
    assert "stderr" not in [output.get("name") for output in outputs]


def test_the_notebook_can_fail(monkeypatch):
    """With the right engine in place of the mistaken one, its cell fails."""
    monkeypatch.syspath_prepend(str(EXAMPLES / "python"))
    (cell,) = [cell.source for cell in NOTEBOOK.cells if "import Mistaken" in cell.source]
    names = {"check": check, "trace_text": trace_text}
    with pytest.raises(AssertionError):
        exec(cell.replace("check(Mistaken,", "check(Placement,"), names)
    sys.modules.pop("my_engine")


def test_the_notebook_is_kept_without_outputs():
    """What a run of it leaves behind is not committed."""
    code = [cell for cell in NOTEBOOK.cells if cell.cell_type == "code"]
    assert [cell.outputs for cell in code] == [[] for _ in code]
