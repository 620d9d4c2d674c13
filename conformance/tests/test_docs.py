"""The documents tell the truth: their commands exist and their examples run."""

import ast
import contextlib
import io
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main

ROOT = Path(__file__).parents[2]
DOCUMENTS = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md")),
    *sorted(ROOT.glob("*/README.md")),
    ROOT / "conformance/IMPLEMENTING.md",
    *sorted(ROOT.glob("docs/**/*.md")),
    *sorted(ROOT.glob("conformance/adapters/*/FINDINGS.md")),
]


def blocks(path, language):
    """The fenced code blocks of this language in a document."""
    return re.findall(rf"^```{language}\n(.*?)^```", path.read_text(), re.M | re.S)


def test_make_targets_exist():
    """Every `make TARGET` in a document is a target of the Makefile."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    named = {
        name
        for path in DOCUMENTS
        for name in re.findall(r"(?:`|^)make ([a-z-]+)", path.read_text(), re.M)
    }
    assert named | {"lint"} >= {"conform", "test", "lint", "workloads"}
    assert named - targets == set()


def test_links_lead_somewhere():
    """Every relative link in a document leads to a file of the repository."""
    missing = [
        (path.name, link)
        for path in DOCUMENTS
        for link in re.findall(r"\]\(([^)#:]+)\)", path.read_text())
        if not (path.parent / link).exists()
    ]
    assert missing == []


def test_what_is_said_to_hold_is_a_test():
    """Each line of the table of SECURITY.md names tests that there are."""
    text = (ROOT / "SECURITY.md").read_text()
    rows = re.findall(r"^\| [^|]+ \| (`.*) \|$", text, re.M)
    assert len(rows) > 15
    for row in rows:
        path = None
        for named in re.findall("`([^`]+)`", row):
            file, _, name = named.rpartition("::")
            if file:
                path = ROOT / file if "/" in file else path.with_name(file)
            assert f"def {name}(" in path.read_text(), named


def test_options_in_documents_exist():
    """Every option of `helix-conformance` that a document shows is one of the command's."""
    runner = CliRunner()
    for path in DOCUMENTS:
        for command, rest in re.findall(
            r"helix-conformance (run|replay|show)\b(.*)", path.read_text()
        ):
            help_text = runner.invoke(main, [command, "--help"]).output
            for option in re.findall(r"--[a-z-]+", rest.split("`")[0]):
                assert option in help_text, f"{path.name}: {command} {option}"


def test_engine_of_the_conformance_readme(tmp_path, monkeypatch):
    """The README's engine is found wrong, by the number of the rule that it breaks."""
    (code,) = blocks(ROOT / "conformance/README.md", "python")
    (tmp_path / "last_rank.py").write_text(code)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.chdir(tmp_path)
    words = ["run", "--engine", "last_rank:LastRank", "--layout", "pr9757"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 1, result.output
    assert "OWN-3" in result.output


def test_example_of_the_reference_readme():
    """The README's example prints what its comment says."""
    (code,) = blocks(ROOT / "reference/README.md", "python")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(code, {})
    assert printed.getvalue() == code.rpartition("# ")[2]


@pytest.mark.timeout(120)
def test_torchrun_example_of_the_gpu_readme(tmp_path):
    """The README's program runs as its text says, on 4 ranks under torchrun."""
    (code,) = blocks(ROOT / "gpu_impl/README.md", "python")
    (tmp_path / "example.py").write_text(code)
    torchrun = shutil.which("torchrun", path=str(Path(sys.executable).parent))
    assert torchrun is not None
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=4", "example.py"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    held = re.findall(r"\((\d), (\d)\) holds (\d+) of 21 tokens; \(2, 1, 2, 16\)", done.stdout)
    expected = [("0", "0", "12"), ("0", "1", "9"), ("1", "0", "12"), ("1", "1", "9")]
    assert sorted(held) == expected, done.stdout


def test_the_way_of_an_event_is_that_of_the_imports():
    """No folder in CONTRIBUTING's list imports one that stands below it, and all are listed."""
    text = (ROOT / "CONTRIBUTING.md").read_text()
    section = text[text.index("## The way of an event") : text.index("## Packages of their own")]
    names = re.findall(r"^\d+\. `(\w+)`", section, re.M)
    package = ROOT / "conformance/helix_conformance"
    folders = {path.parent.name for path in package.glob("*/__init__.py")} - {"engines"}
    assert folders <= set(names)
    upward = []
    for place, name in enumerate(names):
        files = [package / f"{name}.py"] if (package / f"{name}.py").exists() else []
        for path in [*files, *(package / name).rglob("*.py")]:
            for node in ast.walk(ast.parse(path.read_text())):
                module = getattr(node, "module", None) if isinstance(node, ast.ImportFrom) else None
                target = (module or "").removeprefix("helix_conformance.").split(".")[0]
                if target in names[place + 1 :]:
                    upward.append((name, target))
    assert upward == []


def test_the_three_commands_of_the_readme(tmp_path):
    """What `init` writes passes by the script that the README names; `pip` is tried by hand."""
    text = (ROOT / "README.md").read_text()
    section = text[text.index("## Your engine, in three commands") :]
    (install, init, script) = re.search(r"^```sh\n(.*?)^```", section, re.M | re.S)[1].splitlines()
    assert install == "pip install /path/to/helix-conformance"
    assert (
        CliRunner().invoke(main, [*init.split()[1:-1], str(tmp_path / "my_adapter")]).exit_code == 0
    )
    assert script == "sh my_adapter/conformance.sh"
    assert (tmp_path / "my_adapter/conformance.sh").exists()


def test_the_readme_shows_what_a_run_of_the_finding_says():
    """The lines under the picture are those of the stored trace of finding 1."""
    from helix_conformance.report.text import trace_text
    from helix_spec.trace import load_trace

    text = (ROOT / "README.md").read_text()
    path = ROOT / "conformance/adapters/vllm/findings/vllm-old-interleave-flag.json"
    shown = re.search(r"^```text\n(.*?)^```", text, re.M | re.S)[1]
    layout, *events = (
        line for line in trace_text(load_trace(path)) if line.startswith(("vllm", "event"))
    )
    assert [layout.partition(",")[0][:8], *events][1:] == re.findall(r"^  (event .*)$", shown, re.M)
    assert layout.startswith(re.search(r"^  (vllm_dcp\S+)$", shown, re.M)[1])
