"""The transformer block of helix_gpu on four gloo ranks, held to the bounds of its own tests."""

import pytest
import torch

from gpu_testing import block
from helix_conformance.drive.process import PoolDriver
from helix_conformance.expect.arrays import as_array
from helix_spec.events import Release
from helix_spec.trace import Watch


@pytest.fixture(scope="module")
def pool():
    """Four gloo workers that play the block."""
    driver = PoolDriver("suite_testing.block:Block", 4)
    yield driver
    driver.close()


def outputs(pool, event, config):
    """What each of the pool's ranks answers to an event."""
    _, (_, answers), _ = pool.play(config, frozenset(), [event], Watch())
    return [torch.from_numpy(as_array(answer.outcome.output)) for answer in answers]


@pytest.mark.holds("ATT-1", "MAP-1")
@pytest.mark.parametrize(("tp", "cp"), [(1, 4), (2, 2), (4, 1)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_attention_with_its_projections(pool, tp, cp, dtype):
    """Four processes, with real groups of a DeviceMesh, are the block on one rank."""
    config = block.config(tp, cp, dtype)
    answers = outputs(pool, Release(0), config)
    assert block.Setting(config).right(answers)


def test_ffn_on_the_same_ranks(pool):
    """Two groups of experts over the ranks of tp 2 x cp 2 are the FFN on one rank."""
    answers = outputs(pool, Release(1), block.config(2, 2, "float32"))
    expected, bound = block.Experts("float32").expected(2, 2)
    assert len(answers) == 4
    for answer in answers:
        assert ((answer - expected).abs() <= bound).all()
