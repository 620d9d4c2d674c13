"""Models that rotate nothing here, and models with a scale of their own, and with sinks."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest

from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines.gpu import GpuEngine
from helix_conformance.judge.coverage import Tally
from helix_conformance.session import layout_traces, random_traces
from suite_testing.marks import of_profiles


@pytest.mark.holds(*of_profiles(["cache", "attention"]))
@pytest.mark.parametrize(
    "box",
    [
        {"rope": ["none"]},
        {"attention": ["latent"], "latent": [(64, 0)]},
        {"attention": ["latent"], "rope": ["none"], "scale": ["given"]},
        {"scale": ["given"]},
        {"sinks": [True]},
    ],
)
def test_our_cache_attends_as_the_reference_does(box: dict[str, Any]) -> None:
    """Keys cached as they come, a latent without a rotated part, scores by the model's factor."""

    class Engine(GpuEngine):
        capabilities: ClassVar[Any] = {**box, "head_dim": [16, 32]}

    driver = ThreadDriver(Engine)
    draw = layout_traces(driver, "vllm_dcp", driver.profiles, cp_sizes=[1, 2, 3], tp_sizes=(1, 2))
    tally = Tally()
    assert random_traces(driver, draw, driver.profiles, examples=6, seed=3, tally=tally) is None
    assert tally.traces >= 6
