"""The command line: exit statuses, the JSON summary, failing traces, refused input."""

import json
import subprocess
import sys

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_spec.config import Config, ModelShape
from helix_spec.engine import OF_GROUPS
from helix_spec.events import FEATURES, Admit, Decode
from helix_spec.trace import Trace, dump_trace, load_trace


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def call(*words):
    """Run the command in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


def summary(path):
    """The last line of a JSON stream."""
    return json.loads(path.read_text().splitlines()[-1])


@pytest.fixture
def stored(tmp_path):
    """Write a trace of two ranks that ends in a decode with this padding; returns its path."""

    def write(pad=0):
        config = Config(layout="pr9757/1:C=2,T=2", pages=[5, 5], max_len=50)
        trace = Trace(config=config, events=[Admit(0, 3), Decode([0], [1], pad)])
        path = tmp_path / f"trace-{pad}.json"
        path.write_bytes(dump_trace(trace))
        return path

    return write


def test_passing_run_says_what_was_checked_and_what_was_not(tmp_path):
    """A passing run ends with status 0 and a summary of layouts, profiles and counts."""
    result = call(
        *("run", "--engine", "gpu-ledger", "--layout", "pr9757", "--layout", "balanced"),
        *("--cp", 3, "--cp", 4, "--examples", 5, "--json", tmp_path / "run.jsonl"),
    )
    assert result.exit_code == 0, result.output
    found = summary(tmp_path / "run.jsonl")
    assert (found["kind"], found["verdict"]) == ("summary", "pass")
    assert found["layouts"] == ["pr9757", "balanced"]
    assert found["profiles_checked"] == [
        *("placement", "lengths", "pages"),
        *(*FEATURES, *OF_GROUPS, "prefix"),
    ]
    assert found["profiles_not_checked"][:2] == ["cache", "attention"]
    assert found["traces"] == 13  # with the long one of each layout, and the far one
    assert found["events"] > 0 < found["events_per_s"]


@pytest.mark.holds("LEN-2")
def test_failing_run_leaves_the_smallest_trace(tmp_path):
    """A difference on rank 1 alone ends with status 1 and two events, which fail again in a replay.

    It takes two ranks, of cp or of tp.
    """
    result = call("run", "--engine", "suite_testing.broken:Liar", "--layout", "pr9757")
    assert result.exit_code == 1, result.output
    assert "LEN-2 violated at event 1" in result.output
    [path] = (tmp_path / "helix-failures").glob("pr9757-local-*.json")
    trace = load_trace(path)
    assert trace.events == [Admit(0, 1), Decode([0], [1])]
    assert trace.config.world_size == 2
    assert str(trace.config.layout) in ("pr9757/1:C=1,T=1", "pr9757/1:C=2,T=1")
    again = call("replay", path, "--engine", "suite_testing.broken:Liar")
    assert again.exit_code == 1
    assert call("replay", path, "--engine", "reference").exit_code == 0


@pytest.mark.parametrize("name", ["Raiser", "Malformed"])
def test_engine_that_raises_or_gives_a_malformed_answer(name):
    """Raising, or a malformed answer, ends with status 3, rank and event named."""
    result = call("run", "--engine", f"suite_testing.broken:{name}", "--layout", "pr9757")
    assert result.exit_code == 3, result.output
    assert "Rank 1" in result.output
    assert "at event 1" in result.output


@pytest.mark.holds("LIVE-1")
@pytest.mark.parametrize(
    ("pad", "what"),
    [
        (1, "died with signal SIGKILL; its stderr ends: 'last words of rank 1'"),
        (2, "raised RuntimeError: the adapter lost its way"),
        (3, "skipped a collective that rank 0 is blocked in"),
    ],
)
def test_worker_in_trouble_is_named(stored, tmp_path, pad, what):
    """A worker that dies, raises or skips the exchange is named, and the run ends.

    The driver tests have one that hangs.
    """
    result = call(
        *("replay", stored(pad), "--engine", "suite_testing.broken:Trouble", "--driver", "pool"),
        *("--ranks", 2, "--deadline", 3, "--json", tmp_path / "run.jsonl"),
    )
    assert result.exit_code == 3, result.output
    assert f"Rank 1 {what} (at event 1)." in result.output
    assert summary(tmp_path / "run.jsonl")["verdict"] == "error"


def test_torchrun_launched_by_the_command(tmp_path):
    """Under torchrun a wrong output of rank 1 ends with status 1 and a trace of one decode."""
    words = [
        *("run", "--engine", "suite_testing.broken:DistributedLiar", "--layout", "pr9757"),
        *("--profile", "attention"),
        *("--driver", "torchrun", "--ranks", "2", "--cp", "2", "--examples", "5"),
        *("--json", str(tmp_path / "run.jsonl")),
    ]
    done = subprocess.run(
        [sys.executable, "-m", "helix_conformance", *words], capture_output=True, text=True
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert summary(tmp_path / "run.jsonl")["verdict"] == "fail"
    [path] = (tmp_path / "helix-failures").glob("pr9757-torchrun-*.json")
    trace = load_trace(path)
    assert trace.events == [Admit(0, 1), Decode([0], [1])]


def _commands(command, name):
    """A command and all below it, each with the words that call it."""
    yield name, command
    for word, below in getattr(command, "commands", {}).items():
        yield from _commands(below, [*name, word])


@pytest.mark.parametrize("name", [" ".join(name) for name, _ in _commands(main, [])])
def test_help_is_text_for_people(name):
    """The help of every command has no escapes in it."""
    result = call(*name.split(), "--help")
    assert result.exit_code == 0, result.output
    assert "\\" not in result.output and "\b" not in result.output
    assert result.output.startswith("Usage: ")


def test_help_shows_each_example_on_a_line_of_its_own():
    """Examples can be copied; what each does stands below it."""
    lines = [line.strip() for line in call("--help").output.splitlines()]
    examples = lines[lines.index("Examples:") + 1 :]
    examples = examples[: examples.index("")]
    assert len(examples) == 10
    for example, what in zip(examples[::2], examples[1::2], strict=True):
        assert example.startswith("helix-conformance ")
        assert not what.startswith("helix-conformance ")
    assert examples[0] == "helix-conformance run"


def test_show_prints_the_seeds_example(tmp_path):
    """`show` prints each rank's pages: 400 prompt and 400 decoded tokens on 4 ranks."""
    config = Config(layout="pr9757/1:C=4,T=100", pages=[9] * 4, max_len=1000)
    events = [Admit(0, 400), *[Decode([0], [1])] * 400]
    (tmp_path / "t.json").write_bytes(dump_trace(Trace(config=config, events=events)))
    result = call("show", tmp_path / "t.json")
    assert result.exit_code == 0
    assert "rank 1, 200 tokens: 100-199 (page 8) | 500-599 (page 7)" in result.output


def test_show_tells_what_is_set_apart_and_why_nobody_may_start(tmp_path):
    """Settings other than the defaults are told, and the rule that a bad configuration breaks."""
    model = ModelShape(q_heads=17)
    config = Config(layout="pr9757/1:C=2,T=1", pages=[9] * 2, max_len=9, overlap=True, model=model)
    (tmp_path / "t.json").write_bytes(dump_trace(Trace(config=config, events=[])))
    result = call("show", tmp_path / "t.json")
    assert result.exit_code == 0
    told, refused = result.output.splitlines()
    assert told == "pr9757/1:C=2,T=1, pools of [9, 9] pages, overlap=True, q_heads=17"
    assert refused.startswith("must be refused: 17 query heads do not divide into 2 KV heads")


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "--engine", "nobody"], "'nobody' names no engine"),
        (["run", "--engine", "nobody:Engine"], "cannot be loaded"),
        (["run", "--engine", "reference", "--profile", "speed"], "is not one of"),
        (["run", "--layout", "pr1"], "is not one of"),
        (["run", "--driver", "pool", "--cp", "8"], "8 ranks are needed, and the pool has 4"),
        (["replay", "missing.json"], "missing.json: cannot be read"),
    ],
)
def test_bad_usage(words, sentence, gpu_pool, monkeypatch):
    """Bad usage ends with status 2 and a sentence."""
    from helix_conformance.drive import opening

    monkeypatch.setattr(opening, "PoolDriver", lambda *_, **__: _Kept(gpu_pool))
    result = call(*words)
    assert result.exit_code == 2, result.output
    assert sentence in result.output.replace("\n", " ")


def test_commands_of_installed_packages(tmp_path, monkeypatch):
    """A package adds a command by an entry point, hides none, and breaks none but its own."""
    about = tmp_path / "theirs-1.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: theirs\nVersion: 1.0\n")
    (about / "entry_points.txt").write_text(
        "[helix_conformance.commands]\ngreet = theirs_commands:greet\n"
        "run = theirs_commands:greet\nbroken = theirs_commands:missing\n"
    )
    (tmp_path / "theirs_commands.py").write_text(
        "import click\n@click.command()\ndef greet():\n    print('hello')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    greeted, own, broken = call("greet"), call("run", "--help"), call("broken")
    assert (greeted.exit_code, greeted.output) == (0, "hello\n")
    assert "Play random traces" in own.output
    assert broken.exit_code == 2
    assert "'broken' (theirs_commands:missing) cannot be loaded" in broken.output
    assert call("no-such-command").exit_code == 2


class _Kept:
    """The session's pool, not closed by the command."""

    def __init__(self, driver):
        self._driver = driver

    def __getattr__(self, name):
        return getattr(self._driver, name)

    def close(self):
        """Leave it running for the other tests."""


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (
            ["--layout", "vllm_dcp", "--interleave", 3],
            "interleaves 3 tokens, which does not divide",
        ),
        (["--cp", 3, "--q-heads", 8], "8 query heads do not divide by tp_size * cp_size = 1 * 3"),
        (["--tp", 4, "--kv-heads", 2], "tp_size 4 is above the 2 KV heads"),
        (["--pages", 0], "The pool of cp_rank 0 has 0 pages"),
        (["--interleave", 2], "takes no interleave"),
    ],
)
def test_configuration_that_no_engine_may_start_with(tmp_path, options, sentence):
    """An illegal configuration is refused with a sentence and status 2."""
    (tmp_path / "w.jsonl").write_text('{"input_length": 5, "output_length": 2}\n')
    result = call("run", "--workload", "w.jsonl", "--driver", "local", *options)
    assert result.exit_code == 2, result.output
    assert sentence in result.output.replace("\n", " ")


def test_broken_files_are_named_with_line_and_field(tmp_path, stored):
    """A malformed trace or workload is refused with file, line and field, and status 2."""
    path = stored()
    path.write_text(path.read_text().replace('"prompt_len": 3', '"prompt_len": "x"'))
    line = 1 + path.read_text().partition('"prompt_len"')[0].count("\n")
    result = call("replay", path)
    assert result.exit_code == 2
    assert f"trace-0.json, line {line}, field $.events[0].prompt_len" in result.output
    (tmp_path / "w.jsonl").write_text('{"input_length": 5, "output_length": 0}\n')
    result = call("run", "--workload", "w.jsonl")
    assert result.exit_code == 2
    assert "w.jsonl, line 1, field" in result.output


def test_workload_on_the_ledger(tmp_path):
    """A workload of a few requests is played to its end: admissions, decodes, releases."""
    lines = [f'{{"input_length": {9 * n}, "output_length": {n}}}' for n in range(1, 7)]
    (tmp_path / "w.jsonl").write_text("\n".join(lines) + "\n")
    result = call(
        *("run", "--workload", "w.jsonl", "--driver", "local", "--cp", 2, "--batch", 3),
        *("--tokens-per-block", 4, "--pages", 20, "--json", tmp_path / "run.jsonl"),
    )
    assert result.exit_code == 0, result.output
    found = summary(tmp_path / "run.jsonl")
    assert found["layouts"] == ["pr9757/1:C=2,T=4"]
    assert found["events"] > 12
