"""Models over gloo ranks, as processes: the library's tokens, and logits within the bound of each.

`model_ranks` is what a rank does.
"""

from __future__ import annotations

import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers", reason="the extra `models` is not installed")

from gpu_testing.parity import Expected, differences, expected
from gpu_testing.small_models import FAMILIES, padded, prompt_of, small_model
from helix_spec.layouts import NAMED_LAYOUTS, named_layout

STEPS, PAGE = 64, 4
LENGTHS = (3, 45, 18)
"""Less than a block for each of four ranks, several turns of all of them, and in between; all but
the first are beyond the window."""
BATCH = padded([prompt_of(tokens) for tokens in LENGTHS])
WORLDS = [(1, 1), (1, 2), (1, 3), (1, 4), (2, 2)]
DENSE = ("llama", "qwen3", "gemma3")
"""In 16 bits a router between experts decides otherwise now and then, and no bound holds."""


def cases_of(world: int) -> dict[str, dict[str, Any]]:
    """What is run on a world: every family, over every layout; 16 bits; prompts that are admitted.

    Layouts go round, so that a family meets another one on each world.
    """
    layouts = list(NAMED_LAYOUTS)
    tp_size, cp_size = WORLDS[world]
    runs = [(family, "float32", "sharded") for family in FAMILIES]
    runs.append((DENSE[world % len(DENSE)], "bfloat16", "sharded"))
    runs += [(family, "float32", "admitted") for family in ("gpt_oss", "deepseek_v3")]
    return {
        f"{family} {layouts[(place + world) % len(layouts)]} {dtype} {prompts}": {
            "family": family,
            "dtype": dtype,
            "prompts": prompts,
            "tp_size": tp_size,
            "layout": str(
                named_layout(
                    layouts[(place + world) % len(layouts)],
                    cp_size=cp_size,
                    tokens_per_block=PAGE,
                )
            ),
        }
        for place, (family, dtype, prompts) in enumerate(runs)
    }


@cache
def expected_of(family: str, dtype: str) -> Expected:
    """What the library's own runs give."""
    return expected(small_model(family, getattr(torch, dtype)), BATCH, STEPS)


@pytest.fixture(scope="module", params=range(len(WORLDS)), ids=map(str, WORLDS))
def found(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    folder, world = tmp_path_factory.mktemp("models"), request.param
    ranks, cases = WORLDS[world][0] * WORLDS[world][1], cases_of(world)
    for case in cases.values():
        case |= {"batch": BATCH, "tokens": expected_of(case["family"], case["dtype"]).tokens}
    torch.save({"ranks": ranks, "cases": cases}, folder / "cases.pt")
    program = Path(__file__).with_name("model_ranks.py")
    processes = [
        subprocess.Popen(
            [sys.executable, program, str(rank), folder], stderr=subprocess.PIPE, text=True
        )
        for rank in range(ranks)
    ]
    try:
        errors = [process.communicate(timeout=600)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0] * ranks, "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(ranks)]


@pytest.mark.timeout(900)
def test_every_rank_gives_the_same_and_the_right_tokens(
    found: list[dict[str, Any]], request: pytest.FixtureRequest, compared: list[Any]
) -> None:
    """All cases of one world; ranks agree in every bit."""
    world = request.node.callspec.params["found"]
    said = []
    for name, case in cases_of(world).items():
        mine, *others = (rank[name] for rank in found)
        if isinstance(mine, str) or any(isinstance(other, str) for other in others):
            said.append(f"{name}: {[rank[name] for rank in found]}")
            continue
        said += [f"{name}: ranks differ" for other in others if not torch.equal(mine, other)]
        wanted = expected_of(case["family"], case["dtype"])
        lines = differences(mine, wanted)
        ties = [line for line in lines if line.startswith("Tie")]
        said += [f"{name}: {line}" for line in lines if line not in ties]
        share = float((mine - wanted.exact).abs().max()) / wanted.bound
        compared.append((f"{WORLDS[world]} {name}", mine[..., 0].numel(), share, ties))
    assert said == []
