"""A workload that was cut off mid-line: said, with file and line, before anything runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

LINES = {
    "jsonl": b'{"input_length": 700, "output_length": 12}\n' * 3,
    "csv": b"TIMESTAMP,ContextTokens,GeneratedTokens\n" + b"2023-11-16,4808,10\n" * 3,
}


@pytest.mark.parametrize("suffix", LINES)
def test_a_workload_cut_off_mid_line(suffix: str, tmp_path: Path) -> None:
    """Wherever in its last line the file ends, the command says so and has status 2."""
    path = tmp_path / f"workload.{suffix}"
    data = LINES[suffix]
    lines, last = data.count(b"\n"), data[:-1].rindex(b"\n") + 1
    for end in (last + 1, last + 9, len(data) - 4):
        path.write_bytes(data[:end])
        command = [sys.executable, "-m", "helix_conformance", "run", "--workload", str(path)]
        done = subprocess.run(
            [*command, "--driver", "local"], capture_output=True, text=True, cwd=tmp_path
        )
        assert done.returncode == 2, done.stdout + done.stderr
        said = " ".join(done.stderr.split())  # lines are wrapped
        assert f"{path.name}, line {lines}" in said
        assert "Traceback" not in done.stderr
