"""Every exit status means what the command's help says, and no failure is lost on the way."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from helix_conformance import engines, prove
from helix_conformance.cli import main
from helix_conformance.drive import launched, leash
from helix_conformance.drive.processes import leashed
from helix_conformance.report.stream import Stream
from helix_conformance.session import Session
from helix_conformance.version import __version__
from helix_spec.trace import load_trace

PASSING = ["run", "--engine", "gpu-ledger", "--layout", "pr9757", "--cp", "1", "--examples", "2"]
FAILING = ["run", "--engine", "suite_testing.broken:Liar", "--layout", "pr9757"]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*words):
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def leaves(command, words=()):
    """Each command that does something, by the words that call it."""
    if isinstance(command, click.Group):
        context = click.Context(command)
        for name in command.list_commands(context):
            yield from leaves(command.get_command(context, name), (*words, name))
    else:
        yield words


@pytest.mark.parametrize("words", list(leaves(main)), ids=" ".join)
def test_every_command_lists_its_statuses(words):
    """The help of a command ends with a table that begins with 0 and has 2."""
    text = call(*words, "--help").output
    table = text[text.index("Exit status:") :]
    statuses = [int(number) for number in re.findall(r"^    (\d+) +\S", table, re.M)]
    assert statuses[0] == 0
    assert 2 in statuses
    assert statuses == sorted(statuses)


def test_the_version():
    """`--version` says it."""
    assert call("--version").output == f"helix-conformance, version {__version__}\n"


@pytest.fixture
def missing(monkeypatch):
    """Make a module of an extra one that is not installed, and let nothing be played."""

    def without(name):
        def found(module):
            return None if module == name else object()

        for where in (engines, prove, launched):
            monkeypatch.setattr(where, "find_spec", found)

    monkeypatch.setattr(Session, "random", lambda *_: pytest.fail("something was played"))
    monkeypatch.setattr(prove, "_catalog", lambda *_: pytest.fail("something was proved"))
    return without


@pytest.mark.parametrize(
    ("module", "words", "sentence"),
    [
        ("torch", ["run"], "Engine 'gpu' needs torch: pip install 'helix-conformance[gpu]'."),
        (
            "torch",
            ["run", "--engine", "reference", "--driver", "torchrun"],
            "Driver torchrun needs torch: pip install 'helix-conformance[gpu]'.",
        ),
        (
            "mpi4py",
            ["run", "--engine", "reference", "--driver", "mpi"],
            "Driver mpi needs mpi4py: pip install 'helix-conformance[mpi]'.",
        ),
        ("z3", ["prove"], "Proofs need z3 and CrossHair: pip install 'helix-conformance[prove]'."),
        ("crosshair", ["prove"], "Proofs need z3 and CrossHair: "),
    ],
)
def test_what_is_missing_is_named_before_any_work(missing, module, words, sentence):
    """A missing extra is one sentence that names it, and status 2."""
    missing(module)
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert sentence in result.output
    assert len(result.output.splitlines()) == 1


def test_a_missing_mpiexec(monkeypatch):
    """So is a program that is missing."""
    monkeypatch.setattr(launched, "find_spec", lambda _: object())
    monkeypatch.setattr(launched.shutil, "which", lambda *_, **__: None)
    result = call("run", "--engine", "reference", "--driver", "mpi")
    assert result.exit_code == 2
    assert "Driver mpi needs an mpiexec on the PATH" in result.output


def test_a_launcher_that_cannot_be_started(monkeypatch, capfd):
    """A program that is none, and a system that gives no network of its own, are told so too."""
    no_program = leashed(["/no/such/launcher"])
    monkeypatch.setattr(launched.Torchrun, "command", lambda *_: (no_program, {}))
    words = ["run", "--engine", "reference", "--driver", "torchrun"]
    assert call(*words).exit_code == 2
    assert capfd.readouterr().err == (
        "/no/such/launcher cannot be started: No such file or directory.\n"
    )

    def refused():
        raise OSError(1, os.strerror(1))

    monkeypatch.setattr(leash, "leave_the_network", refused)
    monkeypatch.setattr(leash, "control", lambda *_: None)
    monkeypatch.setattr(leash.signal, "signal", lambda *_: None)
    with pytest.raises(SystemExit, match="127"):
        leash.main("apart", str(os.getppid()), "mpiexec")
    assert "gives it no network of its own (Operation not permitted): start it yourself" in (
        capfd.readouterr().err
    )


@pytest.mark.parametrize("folder", ["a-file/below", "/proc/nowhere"])
def test_a_failing_trace_that_cannot_be_written(folder):
    """It is printed, with the reason; the status is that of a difference; nothing is half there."""
    Path("a-file").touch()
    result = call(*FAILING, "--traces", folder)
    assert result.exit_code == 1, result.output
    assert f"This trace could not be written ({folder}: " in result.output
    assert "LEN-2 violated" in result.output
    printed = re.search(r"^\{$.*?^\}$", result.output, re.M | re.S)
    Path("again.json").write_text(printed[0])
    assert call("replay", "again.json", *FAILING[1:3]).exit_code == 1
    assert result.output.splitlines()[-1].startswith("FAIL")


def test_a_full_disk_leaves_no_part_of_a_trace(monkeypatch):
    """A part of a trace would stop the next run, which plays what failed before."""

    def half(path, data):
        path.touch()
        raise OSError(28, os.strerror(28))

    monkeypatch.setattr(Path, "write_bytes", half)
    result = call(*FAILING)
    assert result.exit_code == 1, result.output
    assert "No space left on device" in result.output
    assert list(Path("helix-failures").iterdir()) == []


@pytest.mark.parametrize(("words", "status"), [(PASSING, 2), (FAILING, 1)])
def test_a_stream_that_cannot_be_written_on(words, status):
    """The verdict is printed, and that the file is not whole."""
    result = call(*words, "--json", "/dev/full")
    assert result.exit_code == status, result.output
    assert "/dev/full is not whole: No space left on device." in result.output
    assert re.search("^(PASS|FAIL): ", result.output, re.M)


@pytest.mark.parametrize("option", ["--json"])
@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nowhere/run.jsonl", "cannot be written: there is no folder"),
        ("-", "'-' is no file"),
        (".", "is a directory"),
    ],
)
def test_a_file_that_cannot_be_begun(monkeypatch, option, name, sentence):
    """It is refused before anything is played, and no file is named `-`."""
    monkeypatch.setattr(Session, "random", lambda *_: pytest.fail("something was played"))
    result = call(*PASSING, option, name)
    assert result.exit_code == 2
    assert sentence in result.output.replace("\n", " ")
    assert not Path("-").exists()


def test_two_runs_on_one_file():
    """The second is refused while the first writes; afterwards the file is free, and emptied."""
    first = Stream(Path("run.jsonl"))
    result = call(*PASSING, "--json", "run.jsonl")
    assert result.exit_code == 2
    assert "run.jsonl: another run writes this file; give each its own." in result.output
    assert Path("run.jsonl").read_bytes() == b""
    first.close()
    for _ in range(2):
        assert call(*PASSING, "--json", "run.jsonl").exit_code == 0
        kinds = [json.loads(line)["kind"] for line in Path("run.jsonl").read_text().splitlines()]
        assert kinds == ["settings", "row", "coverage", "summary"]


def test_statuses_of_a_report():
    """A report has the status of what it shows, and of nothing there is none."""
    assert call(*FAILING, "--json", "wrong.jsonl").exit_code == 1
    assert call(*PASSING, "--json", "right.jsonl").exit_code == 0
    Path("cut.jsonl").write_bytes(Path("right.jsonl").read_bytes()[:-9])
    found = {name: call("report", f"{name}.jsonl").exit_code for name in ("right", "wrong", "cut")}
    assert found == {"right": 0, "wrong": 1, "cut": 3}
    for nothing in (os.devnull, "empty.jsonl"):
        Path("empty.jsonl").touch()
        result = call("report", nothing)
        assert result.exit_code == 2
        assert f"{nothing}: there is no run, no proof and no mutation run in it." in result.output


@pytest.mark.parametrize(("error", "status"), [(KeyboardInterrupt, 130), (ZeroDivisionError, 70)])
def test_no_end_but_a_difference_has_its_status(monkeypatch, error, status):
    """Neither Ctrl-C nor a defect of the suite looks like a difference."""

    def ended(*_):
        raise error

    monkeypatch.setattr(Session, "begin", ended)
    assert call(*PASSING).exit_code == status


def test_a_stored_failing_trace_is_whole():
    """What is written where it can be is a trace."""
    assert call(*FAILING).exit_code == 1
    [path] = Path("helix-failures").iterdir()
    assert load_trace(path).events


def test_the_base_needs_no_extra():
    """Without torch, z3 and mpi4py, an engine of one's own is run, shown and reported."""
    block = "import sys; sys.modules.update(dict.fromkeys(('torch', 'z3', 'crosshair', 'mpi4py')));"
    code = f"{block} from helix_conformance.cli import main; main(sys.argv[1:])"
    words = ["run", "--engine", "reference", "--layout", "pr9757", "--cp", "2", "--examples", "1"]
    words += ["--json", "r.jsonl"]
    for call_of in (words, ["report", "r.jsonl", "--html", "r.html", "--junit", "r.xml"]):
        done = subprocess.run([sys.executable, "-c", code, *call_of], capture_output=True)
        assert done.returncode == 0, done.stderr
