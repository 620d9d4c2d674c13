"""The profile `merge`: right merges pass, and each broken one is called by its name."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.expect import arrays as numbers
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_trace
from helix_conformance.session import layout_traces, random_traces
from helix_gpu.attention.merge import merge
from helix_reference import attention
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config, ModelShape
from helix_spec.engine import Outcome, RankView
from helix_spec.events import Merge
from helix_spec.trace import Trace
from suite_testing.marks import of_profiles

DTYPES = ("float32", "float16", "bfloat16")
JUST_MERGE = frozenset({"merge"})


class Merging:
    """An engine that merges all partials by itself, as its class attribute says."""

    profiles = JUST_MERGE
    needs_processes = False
    merges: Callable = staticmethod(lambda outputs, lses: merge(outputs, lses)[0])

    def __init__(self, rank):
        self.rank = rank

    def start(self, config, profiles):
        self.config = config
        self.cp_rank = self.rank % config.layout.cp_size
        return Outcome()

    def apply(self, event):
        peers = range(self.config.layout.cp_size)
        handed = [
            numbers.partial_of(self.config, event, self.rank - self.cp_rank + p) for p in peers
        ]
        outputs, lses = (torch.from_numpy(np.stack(parts)) for parts in zip(*handed, strict=True))
        merged = self.merges(outputs, lses).to(getattr(torch, self.config.model.dtype))
        return Outcome(output=self.slice_of(merged).float().numpy())

    def slice_of(self, merged):
        return merged.chunk(self.config.layout.cp_size, dim=1)[self.cp_rank]

    def observe(self, ids=None):
        return RankView({})


def weighted(outputs, lses, top=None):
    """The textbook merge without care for what may be empty."""
    weights = (lses - (lses.amax(0) if top is None else top)).exp()
    return (weights[..., None] * outputs).sum(0) / weights.sum(0)[..., None]


def careful(outputs, lses, weights):
    """These weights, without a partial of weight 0 and without a sum of 0."""
    total = weights.sum(0).where(weights.sum(0) != 0, 1)
    return ((weights / total)[..., None] * outputs).where(weights[..., None] != 0, 0).sum(0)


def softmax(lses):
    """Right weights: those of partials without keys are 0."""
    return (lses - lses.amax(0).nan_to_num(neginf=0)).exp()


class NaNThroughEmpty(Merging):
    """An empty partial's memory is multiplied by its weight of 0."""

    merges = staticmethod(weighted)


class NothingFromNothing(Merging):
    """All partials empty: 0 / 0."""

    merges = staticmethod(lambda o, lses: weighted(o.nan_to_num(), lses))


class EmptyWeighsOne(Merging):
    """The log-sum-exp of an empty partial is taken for 0."""

    merges = staticmethod(lambda o, lses: merge(o.nan_to_num(), lses.nan_to_num(neginf=0))[0])


class BaseMixed(Merging):
    """A natural log-sum-exp is merged with powers of 2."""

    merges = staticmethod(lambda o, lses: merge(o, lses * np.log(2))[0])


class Unnormalised(Merging):
    """The weighted sum is not divided by the sum of the weights."""

    merges = staticmethod(
        lambda o, lses: (softmax(lses)[..., None] * o).where(lses[..., None] > -torch.inf, 0).sum(0)
    )


class Mean(Merging):
    """The partials with keys count alike."""

    merges = staticmethod(lambda o, lses: careful(o, lses, lses.isfinite().float()))


class Overflows(Merging):
    """The exponentials of the log-sum-exps themselves, without the largest taken off."""

    merges = staticmethod(lambda o, lses: careful(o, lses, lses.exp()))


class NarrowLse(Merging):
    """The log-sum-exp travels in bfloat16."""

    merges = staticmethod(lambda o, lses: merge(o, lses.bfloat16().float())[0])


class AnotherSlice(Merging):
    """A rank keeps the heads of its neighbour."""

    def slice_of(self, merged):
        c = self.config.layout.cp_size
        return merged.chunk(c, dim=1)[(self.cp_rank + 1) % c]


class FirstRow(Merging):
    """With one rank nothing is merged, and the row of token 0 is all that comes back."""

    def slice_of(self, merged):
        return merged[0] if self.config.layout.cp_size == 1 else super().slice_of(merged)


class NeedsFirst(Merging):
    """The ranks up to the first without keys are merged: right where empty ranks come last."""

    merges = staticmethod(
        lambda o, lses: merge(o, lses.where((lses > -torch.inf).cummin(0).values, -torch.inf))[0]
    )


class ByArrival(Merging):
    """Every second merge adds the ranks in the other direction."""

    def start(self, config, profiles):
        self.back = False
        return super().start(config, profiles)

    def merges(self, outputs, lses):
        self.back = not self.back
        return merge(outputs.flip(0), lses.flip(0))[0] if self.back else merge(outputs, lses)[0]


def failure_of(engine, seed=3, examples=150):
    """What random merges find wrong with an engine."""
    driver = LocalDriver(engine)
    draw = layout_traces(driver, "vllm_dcp", JUST_MERGE, cp_sizes=(1, 2, 3, 4))
    return random_traces(driver, draw, JUST_MERGE, examples=examples, seed=seed, tally=Tally())


@pytest.mark.holds(*of_profiles(JUST_MERGE))
@pytest.mark.parametrize("engine", [ReferenceEngine, Merging])
def test_right_merges_pass(engine):
    """Random merges of every type, poisoned and not, are right where nothing is wrong."""
    assert failure_of(engine, examples=30) is None


BROKEN = {
    NaNThroughEmpty: {"ATT-1", "ATT-3", "ATT-4"},
    NothingFromNothing: {"ATT-1", "ATT-3", "ATT-4"},
    EmptyWeighsOne: {"ATT-1", "ATT-3", "ATT-4"},
    BaseMixed: {"ATT-1", "ATT-4"},
    Unnormalised: {"ATT-1", "ATT-4"},
    Mean: {"ATT-1", "ATT-4"},
    Overflows: {"ATT-1", "ATT-4"},
    NarrowLse: {"ATT-1", "ATT-4"},
    AnotherSlice: {"ATT-1", "ATT-4", "MAP-1"},
    FirstRow: {"ATT-1"},
    NeedsFirst: {"ATT-1", "ATT-3", "ATT-4"},
    ByArrival: {"ATT-2"},
}


@pytest.mark.parametrize(
    "engine",
    [
        pytest.param(engine, id=engine.__name__, marks=pytest.mark.holds(*sorted(expected)))
        for engine, expected in BROKEN.items()
    ],
)
def test_broken_merges_are_named(engine):
    """Each broken merge fails by the invariants that it breaks alone, in one event or two."""
    failure = failure_of(engine)
    assert failure is not None
    assert BROKEN[engine] == {violation.invariant for violation in failure.violations}
    assert (2 if engine is ByArrival else 1) == len(failure.trace.events)


@pytest.mark.parametrize(
    ("engine", "levels", "order", "named"),
    [
        pytest.param(engine, levels, order, set(numbers), marks=pytest.mark.holds(*numbers))
        for engine, levels, order, *numbers in [
            (BaseMixed, [[0, 3], [None, 0]], [0, 1], "ATT-1", "ATT-4"),
            (BaseMixed, [[0], [3]], [1, 0], "ATT-1", "ATT-4"),
            (NaNThroughEmpty, [[0], [None]], [1, 0], "ATT-1", "ATT-3", "ATT-4"),
            (NeedsFirst, [[0], [None]], [1, 0], "ATT-1", "ATT-2", "ATT-3", "ATT-4"),
            (NeedsFirst, [[0], [None]], [0, 1]),
        ]
    ],
)
def test_empty_ranks_and_their_order_are_named_when_they_matter(engine, levels, order, named):
    """ATT-3 is named where filling the empty ranks helps, ATT-2 where the ranks' own order does."""
    config = Config(layout="vllm_dcp/1:C=2,T=1,I=1", pages=[1, 1], max_len=9)
    trace = Trace(config=config, events=[Merge(levels, order)])
    failure = check_trace(LocalDriver(engine), trace, JUST_MERGE)
    found = [] if failure is None else failure.violations
    assert named == {violation.invariant for violation in found}


@pytest.mark.holds("ATT-1", "ATT-3", "ATT-4")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("levels", [[[0], [3], [None]], [[1000], [1000], [990]], [[None], [None]]])
def test_exact_merge_is_the_references(dtype, levels):
    """Output and bound of the arrays agree with the reference's, to float64's rounding."""
    c = len(levels)
    shape = ModelShape(q_heads=c, kv_heads=1, head_dim=8, dtype=dtype, partial_dtype=dtype)
    config = Config(
        layout=f"vllm_dcp/1:C={c},T=1,I=1", pages=[1] * c, max_len=9, model=shape, seed=5
    )
    event = Merge(levels, list(range(c)))
    outputs, bounds = numbers.exact_merge(
        shape, *numbers.supplied_partials(config, event, range(c))
    )
    for head in range(c):
        partials = [
            attention.supplied(shape, 5, number, 0, head, row[0])
            for number, row in enumerate(levels)
        ]
        expected, bound = attention.merge_bound(shape, partials)
        np.testing.assert_allclose(outputs[0, head], expected, atol=1e-12)
        np.testing.assert_allclose(bounds[0, head], bound, rtol=1e-9)


@pytest.mark.holds(*of_profiles(JUST_MERGE))
def test_the_implementation_merges_on_gloo(gpu_pool):
    """Four real ranks exchange and merge supplied partials, with TP and CP, in every type."""
    draw = layout_traces(gpu_pool, "custom", JUST_MERGE, cp_sizes=(1, 2, 3, 4, 4), tp_sizes=(1, 2))
    tally = Tally()
    assert random_traces(gpu_pool, draw, JUST_MERGE, examples=12, seed=3, tally=tally) is None
    assert 12 <= tally.traces < tally.events
