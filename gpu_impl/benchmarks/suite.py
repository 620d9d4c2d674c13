"""The conformance suite's random traces on one GPU, their steps run by the Triton kernels.

Ranks are threads of this process. Each runs its shard's kernels in turn on the one device: append,
decode, reduction into the send buffer, and after an exchange by copy the merge of what it received.

    PYTHONPATH=spec:reference:gpu_impl:conformance python gpu_impl/benchmarks/suite.py
"""

from __future__ import annotations

import argparse
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from lib.device import again
from lib.report import write_json

import torch

from helix_conformance import session
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines import gpu
from helix_conformance.expect.arrays import Tokens, queries
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import profiles_to_check
from helix_conformance.report.text import failure_text
from helix_gpu.attention.kernels import merge, step
from helix_gpu.cache import DecodeStep
from helix_gpu.graphs import StepGraph, cuda_graph
from helix_spec.config import Config
from helix_spec.engine import OF_GROUPS, Outcome
from helix_spec.layouts import LAYOUT_NAMES

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
IN_TURN = threading.Lock()


CAPTURE = cuda_graph if DEVICE == "cuda" else again


class KernelEngine(gpu.GpuEngine):
    """`HelixCache` whose steps are the kernels'; `GroupCache` has none, nor have sinks."""

    profiles = gpu.GpuEngine.profiles - {*OF_GROUPS}
    capabilities: ClassVar[Any] = {"sinks": [False]}
    backend = "triton"


class GraphEngine(KernelEngine):
    """Every decode replays the CUDA graph of its number of rows; one rank, no exchange."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        self.graphs = dict[int, StepGraph]()
        self.exchange = None  # one rank sends nothing; the driver's stand-in is not to be captured
        return super().start(config, profiles)

    def _decode(self, ids: list[int], query_lens: list[int], pad: int) -> Outcome:
        if pad >= 0:
            self.cache.skip(ids, query_lens)  # refused before there is a graph of so many rows
            # Captured first: the step that begins next lies in the buffers of the graph.
            rows = sum(query_lens) + pad
            if rows not in self.graphs:
                self.graphs[rows] = StepGraph(self.cache, rows, CAPTURE)
        return super()._decode(ids, query_lens, pad)

    def _attend(self, step: DecodeStep, tokens: Tokens) -> torch.Tensor:
        graph = self.graphs.get(len(step.lengths))
        if graph is None:
            return super()._attend(step, tokens)
        q = self._tensor(queries(self.config.model, self.config.seed, tokens, self.q_heads))
        output = graph.replay(q, *self._kv(tokens))
        self.cache.finish(step)
        return output


class HopBEngine(KernelEngine, gpu.HopBEngine):
    """Every step attends in halves, one while the other's partials travel on a second stream."""

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        """Ready, or refused with `bad_config`."""
        if (exchange := self.exchange) is not None:
            # Ranks launch on streams of their own; through the host, they wait for each other's.
            self.exchange = lambda send: exchange(send.cpu()).to(send.device)
        return super().start(config, profiles)


ENGINES = {"kernels": KernelEngine, "graphs": GraphEngine, "hop-b": HopBEngine}


def in_turn(launch: Callable[..., None]) -> Callable[..., None]:
    """Launches by one thread at a time."""

    def locked(*args: Any, **kwargs: Any) -> None:
        with IN_TURN:
            launch(*args, **kwargs)

    return locked


def main() -> None:
    """Play traces of every layout on one shard and on several, until the time is over."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--examples", type=int, default=20)
    parser.add_argument("--seconds", type=float, default=120, help="nothing is begun after these")
    parser.add_argument("--cp", type=int, nargs="*", default=[1, 2, 4])
    parser.add_argument("--engine", choices=ENGINES, default="kernels", help="graphs: with --cp 1")
    parser.add_argument("--seed", default="0")
    parser.add_argument("--out", type=Path, help="also write JSON here")
    arguments = parser.parse_args()
    step.attend_shard = in_turn(step.attend_shard)
    merge.merge_received = in_turn(merge.merge_received)
    gpu._device = lambda: DEVICE
    driver = ThreadDriver(ENGINES[arguments.engine])
    profiles = profiles_to_check(driver.profiles, ())
    print(f"{DEVICE}; profiles {', '.join(sorted(profiles))}", flush=True)
    begun, rows = time.monotonic(), list[dict[str, Any]]()
    for cp_size in arguments.cp:
        for name in LAYOUT_NAMES:
            row: dict[str, Any] = {"engine": arguments.engine, "layout": name, "cp": cp_size}
            rows.append(row)
            if time.monotonic() - begun > arguments.seconds:
                row["verdict"] = "not run"
            else:
                tally = Tally()
                failure = session.random_traces(
                    driver,
                    session.layout_traces(driver, name, profiles, cp_sizes=[cp_size]),
                    profiles,
                    examples=arguments.examples,
                    seed=f"{arguments.seed} {name}",
                    tally=tally,
                )
                row |= {"verdict": failure.verdict if failure else "pass"}
                row |= {"traces": tally.traces, "events": tally.events}
                row["seconds"] = round(tally.seconds, 1)
                if failure is not None:
                    row["failure"] = "\n".join(map(str, failure_text(failure)))
            print("  ".join(f"{key} {value}" for key, value in row.items()), flush=True)
            write_json(arguments.out, rows)
    driver.close()
    raise SystemExit(any(row["verdict"] not in ("pass", "not run") for row in rows))


if __name__ == "__main__":
    main()
