"""The suite on the interpreted Triton kernels; `test_kernels_in_the_suite` runs this file."""

from __future__ import annotations

import threading

import pytest
from triton.runtime.interpreter import InterpretedFunction

from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines.gpu import GpuEngine
from helix_conformance.judge.play import check_trace
from helix_spec.config import Config, LatentShape, ModelShape
from helix_spec.events import Accept, Admit, Decode, Fork, Preempt, Resume
from helix_spec.trace import Trace

# Numpy, which computes what the kernels say, warns at log2(0) and NaN * 0.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")

LATENT = LatentShape(latent_dim=32, rope_dim=16)
EVENTS = [
    Admit(0, 3),
    Decode([0], [3], 2),
    Accept(0, 1),
    Fork(0, 1),
    Decode([1, 0], [1, 1]),
    Preempt(0),
    Resume(0),
    Decode([0, 1], [2, 1]),
]


class KernelEngine(GpuEngine):
    """`HelixCache` by the kernels."""

    backend = "triton"


@pytest.fixture(autouse=True)
def _in_turn(monkeypatch):
    """The interpreter keeps its place in the grid in one variable for all threads."""
    run, lock = InterpretedFunction.run, threading.Lock()

    def locked(*args, **kwargs):
        with lock:
            return run(*args, **kwargs)

    monkeypatch.setattr(InterpretedFunction, "run", lambda *a, **kw: locked(*a, **kw))


@pytest.mark.parametrize(
    ("layout", "tp_size", "admission", "model"),
    [
        ("pr9757/1:C=2,T=2", 1, "transfer", ModelShape(q_heads=4, kv_heads=2)),
        (
            "vllm_dcp/1:C=2,T=2,I=1", 1, "prefill",
            ModelShape(
                q_heads=2, kv_heads=1, dtype="float16",
                cache_dtype="float8_e4m3fn", product_dtype="float16", partial_dtype="float16",
            ),
        ),
        ("balanced/1:C=2,T=4", 2, "prefill", ModelShape(q_heads=4, kv_heads=1, latent=LATENT)),
        (
            "pr17866/1:C=1,T=16", 1, "transfer",
            ModelShape(
                q_heads=2, kv_heads=1, latent=LATENT, dtype="float16", product_dtype="float16"
            ),
        ),
    ],
)  # fmt: skip
def test_every_answer_is_right(layout, tp_size, admission, model) -> None:
    """Caches and outputs are what the specification says, for each kind of cache and product.

    Not in bfloat16, to which the interpreter cuts where a device rounds.
    """
    cp_size = int(layout.partition("C=")[2][0])
    config = Config(
        layout=layout,
        pages=[9] * cp_size,
        max_len=40,
        model=model,
        tp_size=tp_size,
        admission=admission,
    )
    driver = ThreadDriver(KernelEngine)
    try:
        failure = check_trace(driver, Trace(config=config, events=EVENTS), driver.profiles)
        assert None is failure, [str(violation) for violation in failure.violations]
    finally:
        driver.close()
