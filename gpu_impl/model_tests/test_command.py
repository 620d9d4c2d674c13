"""`python -m helix_gpu.generate` under torchrun: what it prints, and what it refuses."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `models` is not installed")

from gpu_testing.small_models import prompt_of, small_model
from helix_gpu.models import own_attention

PROMPTS = [prompt_of(tokens)[0].tolist() for tokens in (13, 2, 30)]


def torchrun(ranks: int, *options: str) -> subprocess.CompletedProcess[str]:
    """The command on so many ranks."""
    start = [
        Path(sys.executable).with_name("torchrun"),
        "--standalone",
        f"--nproc-per-node={ranks}",
    ]
    return subprocess.run(
        [*start, "-m", "helix_gpu.generate", *options], capture_output=True, text=True, check=False
    )


@pytest.mark.timeout(400)
@pytest.mark.parametrize(
    ("family", "ranks", "options"),
    [
        ("llama", 3, ["--batch=2", "--pages=12", "--page=4", "--layout=balanced"]),
        ("deepseek_v3", 2, ["--tp=2", "--prompt-by=admitted", "--page=4"]),
        ("gemma3", 2, ["--layout=vllm_dcp", "--chunk=7", "--page=4"]),
    ],
)
def test_tokens_and_what_they_took(
    family: str, ranks: int, options: list[str], tmp_path: Path
) -> None:
    """The library's tokens; the model beside it agrees; every rank holds something."""
    model = small_model(family)
    model.save_pretrained(tmp_path)
    model.set_attn_implementation(own_attention(model))
    wanted = []
    for place, prompt in enumerate(PROMPTS):
        found = model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt)), do_sample=False,
            max_new_tokens=20, min_new_tokens=20,
        )  # fmt: skip
        wanted.append(f"[{place}] {' '.join(map(str, found[0, len(prompt) :].tolist()))}")
    given = [f"--prompt-ids={','.join(map(str, prompt))}" for prompt in PROMPTS]
    done = torchrun(ranks, f"--model={tmp_path}", *given, "--new-tokens=20", "--compare", *options)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == wanted
    assert done.stderr.count("20 steps: the most probable token is the same at each") == 3
    assert f"{ranks} ranks" in done.stderr
    assert "60 tokens in" in done.stderr
    assert "Time to the first token" in done.stderr
    held = re.search(r"by rank: (.*)\.", done.stderr)
    assert held is not None
    assert [int(x.replace(",", "")) > 0 for x in held[1].split(", ")] == [True] * ranks


def test_what_is_refused(tmp_path: Path) -> None:
    """Ranks that do not fit, text without a tokenizer, and no prompt; a sentence each."""
    small_model("llama").save_pretrained(tmp_path)
    for options, said in (
        (["--tp=2", "--prompt-ids=1"], "--tp 2 and --cp all do not make the 1 ranks"),
        (["--prompt=Hello"], "has no tokenizer; give --prompt-ids."),
        ([], "There is no prompt"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "helix_gpu.generate", f"--model={tmp_path}", *options],
            capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 2
        assert said in " ".join(done.stderr.split())
