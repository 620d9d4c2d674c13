"""What one gloo rank does for `test_parity`: every case under teacher forcing.

`python model_ranks.py RANK FOLDER`. Nothing is judged here: `FOLDER/RANK.pt` holds the logits of
each case, or the words of its error.
"""

from __future__ import annotations

import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from gpu_testing.parity import forced
from gpu_testing.small_models import small_model
from helix_gpu.bookkeeping.sizing import pages_for
from helix_gpu.cache import HelixCache
from helix_gpu.comm.mesh import helix_mesh
from helix_gpu.models import ModelCache, helix_config


def logits(case: dict[str, Any]) -> Tensor:
    """The logits of one case."""
    model = small_model(case["family"], getattr(torch, case["dtype"]))
    tokens, lens = case["tokens"], case["batch"]["attention_mask"].sum(1).tolist()
    layout, tp_size = case["layout"], case["tp_size"]
    pages = pages_for(layout, lens, tokens.shape[1])
    max_len = max(lens) + tokens.shape[1]
    config = helix_config(model, layout, pages=pages, max_len=max_len, tp_size=tp_size)
    with HelixCache.on(config, helix_mesh(config), rope=None, poison=True) as helix:
        cache = ModelCache(model, helix, prompts=case["prompts"])
        return forced(model, case["batch"], tokens, cache.argument)[1]


def main() -> None:
    """Do all cases."""
    rank, folder = int(sys.argv[1]), Path(sys.argv[2])
    cases = torch.load(folder / "cases.pt")
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=cases["ranks"],
        timeout=timedelta(seconds=60),
    )  # fmt: skip
    found = {}
    for name, case in cases["cases"].items():
        try:
            found[name] = logits(case)
        except Exception as error:
            found[name] = f"{type(error).__name__}: {error}"
    torch.save(found, folder / f"{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
