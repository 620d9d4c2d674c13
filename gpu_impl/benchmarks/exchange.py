"""How partials travel: the exchanges of `helix_gpu` and two others, over batch sizes, in turn.

`PYTHONPATH=spec:gpu_impl torchrun --nproc-per-node=4 gpu_impl/benchmarks/exchange.py`, on gloo or,
with `--backend nccl`, on GPUs. For a batch of new tokens with 32 query heads of dimension 128, each
rank packs its partials, exchanges them, and merges those of its own heads; every time includes all
three. `two all-to-alls` sends outputs and log-sum-exps apart. `tree_attn_decode` is the outside
peer (`pip install ring-attention-pytorch`): it does attention too, so beside it stand ours with
attention by torch and in C++, over 256 keys a rank. A step takes as long as its slowest rank.
"""

from __future__ import annotations

import argparse
import importlib.util
import statistics
from collections.abc import Callable
from pathlib import Path

from lib.ranks import microseconds, world
from lib.report import write_json

import torch
import torch.distributed as dist
from torch import Tensor

from helix_gpu.attention import native
from helix_gpu.attention.merge import merge
from helix_gpu.attention.paged import attend_pages
from helix_gpu.attention.partials import pack, unpack
from helix_gpu.comm import exchange as exchanges
from helix_gpu.comm.exchange import MakeExchange
from helix_spec.config import ModelShape

HEADS, DIM, KEYS, PAGE = 32, 128, 256, 64
BATCHES = (1, 8, 64, 256)
OURS = "all_to_all"
"""What the others are compared with."""
ROUNDS, WARM_UP = 40, 3
Run = Callable[[], Tensor]
Attend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]


def merged_by(make: MakeExchange, output: Tensor, lse: Tensor) -> Run:
    """Pack, one of our exchanges, merge."""
    ranks, n = dist.get_world_size(), len(output)
    exchange = make(world(), ModelShape(q_heads=HEADS, kv_heads=HEADS, head_dim=DIM))

    def run() -> Tensor:
        received = exchange(pack(output, lse, ranks, torch.float32))
        return merge(*unpack(received, n, HEADS // ranks, DIM, torch.float32))[0]

    return run


def two_all_to_alls(output: Tensor, lse: Tensor) -> Run:
    """Outputs and log-sum-exps in a collective each."""
    ranks, n = dist.get_world_size(), len(output)

    def run() -> Tensor:
        received = []
        for part in (output, lse[..., None]):
            send = part.view(n, ranks, HEADS // ranks, -1).transpose(0, 1).contiguous()
            receive = torch.empty_like(send)
            dist.all_to_all_single(receive, send)
            received.append(receive)
        return merge(received[0], received[1][..., 0])[0]

    return run


def ours_with_attention(attend: Attend, q: Tensor, k: Tensor, v: Tensor) -> Run:
    """Local attention over pages, packed all-to-all, merge."""
    n, ranks, width = len(q), dist.get_world_size(), KEYS // PAGE
    pages = torch.stack((k, v), 1).view(n, 2, HEADS, width, PAGE, DIM)
    pages = pages.permute(0, 3, 1, 4, 2, 5).flatten(0, 1).contiguous()
    tables, lengths = torch.arange(n * width).view(n, width), torch.full((n,), KEYS)
    exchange = exchanges.all_to_all(
        world(), ModelShape(q_heads=HEADS, kv_heads=HEADS, head_dim=DIM)
    )

    def run() -> Tensor:
        output, lse = attend(q, pages, tables, lengths)
        received = exchange(pack(output, lse, ranks, torch.float32))
        return merge(*unpack(received, n, HEADS // ranks, DIM, torch.float32))[0]

    return run


def tree_attention(q: Tensor, k: Tensor, v: Tensor) -> Run | None:
    """The outside peer on the same keys; every rank gets all heads."""
    if importlib.util.find_spec("ring_attention_pytorch") is None:
        return None
    from ring_attention_pytorch import tree_attn_decode

    return lambda: tree_attn_decode(q[:, :, None], k, v, shard_kv_seq=False, use_triton=False)


def runs_for(batch: int, device: torch.device) -> dict[str, dict[str, Run]]:
    """What is compared for a batch, by group; all merge to the same."""
    torch.manual_seed(dist.get_rank())
    output = torch.randn(batch, HEADS, DIM, device=device)
    lse = torch.randn(batch, HEADS, device=device)
    makes = (exchanges.all_to_all, exchanges.all_gather, exchanges.reduce_scatter)
    merges = {make.__name__: merged_by(make, output, lse) for make in makes}
    merges["two all-to-alls"] = two_all_to_alls(output, lse)
    expected = merges[OURS]()
    for name, run in merges.items():
        if not torch.allclose(expected, run().view_as(expected), rtol=1e-5, atol=1e-6):
            raise SystemExit(f"{name} merges to something else.")
    groups = {"exchange and merge": merges}
    if device.type == "cpu" and batch <= 64:
        k, v = torch.randn(2, batch, HEADS, KEYS, DIM).unbind()
        torch.manual_seed(0)
        q = torch.randn(batch, HEADS, DIM)
        peer = tree_attention(q, k, v)
        if peer is not None:
            per_rank = HEADS // dist.get_world_size()
            theirs = peer()[:, dist.get_rank() * per_rank :, 0][:, :per_rank]
            ours = {OURS: ours_with_attention(attend_pages, q, k, v)}
            if native.available():
                ours["all_to_all, C++"] = ours_with_attention(native.attend_pages, q, k, v)
            for name, run in ours.items():
                if not torch.allclose(theirs, run(), rtol=1e-4, atol=1e-5):
                    raise SystemExit(f"{name} and tree_attn_decode attend to different things.")
            groups[f"with {KEYS} keys a rank"] = {**ours, "tree_attn_decode": peer}
    return groups


def main() -> None:
    """Measure on all ranks, print on the first."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--backend", choices=["gloo", "nccl"], default="gloo")
    parser.add_argument("--json", type=Path, help="write the figures to this file")
    options = parser.parse_args()
    dist.init_process_group(options.backend)
    device = torch.device("cpu")
    if options.backend == "nccl":
        device = torch.device("cuda", dist.get_rank())
        torch.cuda.set_device(device)
    figures = []
    for batch in BATCHES:
        for group, runs in runs_for(batch, device).items():
            measured = microseconds(runs, device, ROUNDS, WARM_UP)
            base = statistics.median(measured[OURS])
            for name, times in measured.items():
                low, middle, high = statistics.quantiles(times, n=20)[::9]
                figures.append(
                    {"batch": batch, "group": group, "name": name, "median_us": middle,
                     "q05_us": low, "q95_us": high, "over_all_to_all": middle / base}
                )  # fmt: skip
    if dist.get_rank() == 0:
        ranks = dist.get_world_size()
        print(
            f"{ranks} ranks, {options.backend}, {HEADS} heads of {DIM}, microseconds, slowest rank"
        )
        print(f"{'batch':>5}  {'':<22}{'':<18}{'median':>9}{'5 %':>9}{'95 %':>9}{'ratio':>7}")
        for row in figures:
            print(
                f"{row['batch']:>5}  {row['group']:<22}{row['name']:<18}{row['median_us']:>9.0f}"
                f"{row['q05_us']:>9.0f}{row['q95_us']:>9.0f}{row['over_all_to_all']:>7.2f}"
            )
        write_json(options.json, figures)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
