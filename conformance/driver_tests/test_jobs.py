"""`run --jobs N`: layouts played in parallel give the stream that they give one after another."""

import json

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main

OF_THE_CLOCK = {"seconds", "events_per_s", "started", "options"}
DIES = """
import os, signal
from helix_reference.engine import ReferenceEngine

class Dies(ReferenceEngine):
    def apply(self, event):
        os.kill(os.getpid(), signal.SIGKILL)
"""
LEDGER = """
[[difference]]
invariant = "LEN-2"
kind = "answers_wrongly"
does = "counts the new token"
link = "https://example.org/1"
"""


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "known.toml").write_text(LEDGER)


def played(folder, jobs, *words):
    """The status of a run of two layouts, and its stream without what depends on the clock."""
    stream, traces = folder / f"{jobs}.jsonl", folder / f"traces-{jobs}"
    layouts = ["--layout", "pr9757", "--layout", "vllm_dcp", "--cp", "2"]
    options = ["--jobs", str(jobs), "--json", str(stream), "--traces", str(traces)]
    result = CliRunner().invoke(main, ["run", *layouts, "--examples", "4", *options, *words])
    lines = [json.loads(line) for line in stream.read_text().splitlines()]
    for line in lines:
        for name in OF_THE_CLOCK & line.keys():
            del line[name]
        if "trace_file" in line:
            line["trace_file"] = line["trace_file"].rpartition("/")[2]
    return result.exit_code, lines


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["--engine", "gpu-ledger"], 0),
        (["--engine", "suite_testing.broken:Liar"], 1),
        (["--engine", "suite_testing.broken:Liar", "--xfail", "known.toml"], 0),
        (["--engine", "suite_testing.broken:Liar", "--stop-at-first"], 1),
    ],
    ids=["passing", "failing", "expected failures", "stopped at the first"],
)
def test_jobs_change_nothing(tmp_path, words, status):
    """Rows, failures, coverage and summary are the same, in the same order."""
    one_after_another = played(tmp_path, 1, *words)
    assert one_after_another[0] == status
    assert played(tmp_path, 2, *words) == one_after_another


def test_a_job_that_dies_is_told(tmp_path):
    """An engine that crashes its job's process ends the run with a sentence, without a verdict."""
    (tmp_path / "dying.py").write_text(DIES)
    words = ["run", "--engine", "dying:Dies", "--layout", "pr9757", "--jobs", "2"]
    result = CliRunner().invoke(main, words)
    assert result.exit_code == 2, result.output
    assert (
        "The job that plays pr9757 on engine dying:Dies has ended without a result" in result.output
    )


def test_launched_ranks_take_no_jobs():
    """Ranks under torchrun or mpiexec are one group, which cannot be divided among jobs."""
    result = CliRunner().invoke(main, ["run", "--driver", "mpi", "--jobs", "2"])
    assert result.exit_code == 2
    assert "--jobs is for ranks that this process starts" in result.output
