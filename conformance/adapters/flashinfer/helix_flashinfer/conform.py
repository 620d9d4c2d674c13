"""FlashInfer under the suite, in one run with a deadline: `python -m helix_flashinfer.conform`.

First every kernel is compiled, each family by a process of its own, all at once; then come the
single calls of `facts`, the random traces of each engine, and the stored findings. A step that
fails, or takes too long, is named, and the next one runs. Under `--out` lie `summary.txt`, with
what every step printed, `stream.jsonl`, the runs' streams, and `logs.tar.gz`, of failing traces and
logs; all are renewed after every step.

Exit status: 0 when every step passed, 1 when one did not, 2 without a GPU or without FlashInfer.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Collection
from pathlib import Path
from typing import Final, NamedTuple

import torch

LIMIT_S: Final = 390.0
"""Of everything."""
ADAPTER: Final = Path(__file__).parents[1]
STREAM: Final = "stream.jsonl"
COMPILED: Final = {
    "cascade": "helix_flashinfer.facts:merge_pair(0, 0)",
    "decode-64": "helix_flashinfer.facts:decode([4], 2, tensor_cores=False)",
    "decode-128": "helix_flashinfer.compiled:decode(1)",
    "decode-128-tensor-cores": "helix_flashinfer.compiled:decode(4)",
    "mla-fa2": "helix_flashinfer.facts:mla([4], 'fa2')",
    "mla-fa3": "helix_flashinfer.facts:mla([4], 'fa3')",
}
"""By family, the call that compiles it."""


class Step(NamedTuple):
    """A command, what must be compiled before, and its limit."""

    name: str
    command: list[str]
    needs: list[str]
    seconds: float


def engine_step(
    out: Path, name: str, engine: str, options: str, needs: list[str], limit: float
) -> Step:
    """Random traces of an engine."""
    command = ["helix_conformance", "run", "--engine", f"helix_flashinfer.{engine}"]
    command += [
        "--layout",
        "vllm_dcp",
        *options.split(),
        "--json",
        str(out / "logs" / f"{name}.part"),
    ]
    return Step(name, [*command, "--traces", str(out / "logs" / name)], needs, limit)


def steps_of(out: Path, examples: int) -> list[Step]:
    """All steps in their order."""
    few = max(examples // 25, 1)
    alone = f"--cp 1 --cp 2 --cp 3 --cp 4 --cp 8 --examples {examples}"
    pool = f"--ranks 2 --cp 1 --cp 2 --examples {few} --deadline 60"
    cores = ["decode-64", "decode-128", "decode-128-tensor-cores"]
    facts = ["helix_flashinfer.facts"]
    return [
        Step("facts-merge", [*facts, "merge"], ["cascade"], 60),
        engine_step(out, "merge-states", "merging:MergeStates", alone, ["cascade"], 90),
        engine_step(out, "merge-state", "merging:MergeState", alone, ["cascade"], 90),
        Step("findings", ["helix_adapters.findings", str(ADAPTER)], ["cascade"], 60),
        Step("facts-decode", [*facts, "decode"], ["decode-64"], 60),
        Step("facts-mla", [*facts, "mla"], ["mla-fa2", "mla-fa3"], 60),
        engine_step(out, "decode", "attending:Decode", pool, cores, 75),
        engine_step(out, "mla-fa2", "attending:MlaFa2", pool, ["mla-fa2"], 75),
        engine_step(out, "mla-fa3", "attending:MlaFa3", pool, ["mla-fa3"], 75),
    ]


class Conform:
    """The run: what was compiled, what each step came to, and how much time is left.

    Parameters
    ----------
    out : Path
        An empty folder.
    limit : float
        Seconds.
    """

    def __init__(self, out: Path, limit: float) -> None:
        self.out, self.logs, self.ends = out, out / "logs", time.monotonic() + limit
        self.logs.mkdir(exist_ok=True)
        self.compiling: dict[str, subprocess.Popen[bytes]] = {}
        self.lines: list[str] = []

    def start(self, name: str, command: list[str], log: str) -> subprocess.Popen[bytes]:
        """Start a module in a session of its own, which can be ended with all its children."""
        environment = {"HELIX_START_LIMIT_S": "120", "MAX_JOBS": "4"} | os.environ
        with (self.logs / f"{log}.log").open("ab") as file:
            file.write(f"$ {' '.join(command)}\n".encode())
            file.flush()
            return subprocess.Popen(
                [sys.executable, *command],
                stdout=file,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env=environment,
            )

    def ended(self, process: subprocess.Popen[bytes], limit: float) -> str:
        """Wait for a process: `ok`, or what became of it."""
        try:
            status = process.wait(timeout=max(1.0, min(limit, self.ends - time.monotonic())))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            return "it took too long"
        return "ok" if status == 0 else f"status {status}"

    def compile(self, needed: Collection[str]) -> None:
        """Start to compile these families."""
        for name in needed:
            call = COMPILED[name]
            module, _, expression = call.partition(":")
            code = f"from {module} import *; print({expression})"
            self.compiling[name] = self.start(name, ["-c", code], f"compile-{name}")

    def play(self, step: Step, limit: float) -> bool:
        """Run one step; tell how it ended."""
        began = time.monotonic()
        outcomes = {name: self.ended(self.compiling[name], 150) for name in step.needs}
        missing = [f"{name}: {told}" for name, told in outcomes.items() if told != "ok"]
        waited, outcome = time.monotonic() - began, "ok"
        if missing:
            outcome = f"not run, since its kernels do not compile or run ({'; '.join(missing)})"
        elif time.monotonic() > self.ends:
            outcome = "not run, for want of time"
        else:
            process = self.start(step.name, ["-m", *step.command], step.name)
            outcome = self.ended(process, limit)
        took = time.monotonic() - began - waited
        self.say(f"== {step.name}: {outcome} ({took:.0f} s, after {waited:.0f} s of waiting)")
        log = self.logs / f"{step.name}.log"
        if log.exists():
            self.say(log.read_text(errors="replace")[-6000:])
        part = self.logs / f"{step.name}.part"
        if part.exists():
            with (self.out / STREAM).open("ab") as stream:
                stream.write(part.read_bytes())
            part.unlink()
        return outcome == "ok"

    def pack(self) -> None:
        """Put the logs into one file: some machines hand back few."""
        with tarfile.open(self.out / "logs.tar.gz", "w:gz") as tar:
            tar.add(self.logs, "logs")

    def say(self, line: str) -> None:
        """Print a line and add it to the summary."""
        print(line, flush=True)
        self.lines.append(line)
        (self.out / "summary.txt").write_text("\n".join(self.lines) + "\n")


def why_not() -> str | None:
    """Return why this cannot run here; None when it can."""
    if not torch.cuda.is_available():
        return "FlashInfer's kernels need an NVIDIA GPU, and torch finds none here"
    if importlib.util.find_spec("flashinfer") is None:
        return "the package flashinfer-python is not installed"
    return None


def main() -> int:
    """Run everything; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("build/flashinfer"))
    parser.add_argument("--examples", type=int, default=300)
    parser.add_argument("--limit", type=float, default=LIMIT_S, help="seconds")
    parser.add_argument("--patience", type=float, default=1, help="times the limit of each step")
    parser.add_argument("--only", nargs="*", help="steps by name")
    parser.add_argument("--anywhere", action="store_true", help="without a GPU, too: a stand-in")
    arguments = parser.parse_args()
    reason = None if arguments.anywhere else why_not()
    if reason is not None:
        print(f"not run: {reason}.")
        return 2
    arguments.out.mkdir(parents=True, exist_ok=True)
    conform, passed = Conform(arguments.out.resolve(), arguments.limit), True
    steps = steps_of(conform.out, arguments.examples)
    chosen = [step for step in steps if not arguments.only or step.name in arguments.only]
    conform.compile({name for step in chosen for name in step.needs})
    for step in chosen:
        passed = conform.play(step, step.seconds * arguments.patience) and passed
        conform.pack()
    shutil.rmtree(conform.logs)
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
