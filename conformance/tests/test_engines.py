"""The engines of this project pass the suite, and the suite has really looked."""

import hypothesis
import msgspec
import pytest
from hypothesis.stateful import run_state_machine_as_test

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_trace, profiles_to_check
from helix_conformance.session import layout_traces, random_traces
from helix_conformance.testing import engine_machine
from helix_reference.engine import ReferenceEngine
from helix_spec.config import Config, ModelShape
from helix_spec.engine import PROFILES
from helix_spec.events import Accept, Admit, Decode, Fork, Preempt, Release, Resume, Sampled, Skip
from helix_spec.layouts import LAYOUT_NAMES
from helix_spec.trace import Trace
from suite_testing.marks import of_profiles

BOOKKEEPING = ("placement", "lengths", "pages")
FEATURES = ("speculative", "fork", "preempt", "padding", "overlap")


@pytest.mark.holds(*of_profiles([*BOOKKEEPING, *FEATURES]))
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
@pytest.mark.parametrize("engine", [ReferenceEngine, LedgerEngine])
def test_bookkeeping_of_every_layout(engine, layout):
    """Reference and ledger keep every bookkeeping invariant on random traces of each layout."""
    driver, tally = LocalDriver(engine), Tally()
    profiles = profiles_to_check(driver.profiles, [*BOOKKEEPING, *FEATURES])
    draw = layout_traces(driver, layout, profiles, cp_sizes=(1, 2, 3, 4, 8))
    assert random_traces(driver, draw, profiles, examples=30, seed=7, tally=tally) is None
    assert tally.traces >= 30
    assert tally.traces < tally.events


@pytest.mark.holds("OWN-1", "LEN-3", "POS-2", "ATT-1", "ATT-4", "MAP-1")
def test_reference_attends_exactly():
    """The reference's own caches and outputs pass, with every event, two layers and tp 2."""
    shape = ModelShape(layers=2, q_heads=4, kv_heads=2, head_dim=4, dtype="bfloat16")
    config = Config(
        layout="pr13180/1:C=2,T=2", pages=[9, 9], max_len=40, model=shape, tp_size=2, overlap=True
    )
    events = [
        Admit(0, 5),
        Decode([0], [3], 1),
        Sampled([0]),
        Accept(0, 2),
        Fork(0, 1),
        Decode([1, 0], [1, 2]),
        Skip([0], [1]),
        Preempt(0),
        Resume(0),
        Decode([0, 1], [1, 1]),
        Release(1),
    ]
    driver = LocalDriver(ReferenceEngine)
    assert check_trace(driver, Trace(config=config, events=events), driver.profiles) is None


@pytest.mark.holds(*of_profiles(PROFILES))
@pytest.mark.parametrize("layout", LAYOUT_NAMES)
def test_whole_implementation_on_gloo(gpu_pool, layout):
    """Four real ranks cache and attend exactly, with TP and CP; `make conform` plays more."""
    profiles, tally = profiles_to_check(gpu_pool.profiles, []), Tally()
    draw = layout_traces(gpu_pool, layout, profiles, cp_sizes=(1, 2, 3, 4, 4, 4), tp_sizes=(1, 2))
    assert random_traces(gpu_pool, draw, profiles, examples=6, seed=3, tally=tally) is None


@pytest.fixture
def pool_of(gpu_pool, monkeypatch):
    """The pool's workers with another engine, which uses the groups that they have."""

    def engine(name):
        monkeypatch.setattr(gpu_pool, "engine", name)
        return gpu_pool

    return engine


@pytest.mark.holds(*of_profiles(["attention", "merge"]))
@pytest.mark.parametrize(
    "engine", ["gpu-all-gather", "gpu-reduce-scatter", "gpu-push", "gpu-hop-b"]
)
def test_every_exchange_on_gloo(pool_of, engine):
    """However partials travel, four real ranks attend exactly, at cp 4 and at tp 2 x cp 2."""
    driver, tally = pool_of(engine), Tally()
    profiles = profiles_to_check(driver.profiles, [])
    for layout in ("pr9757", "balanced"):
        draw = layout_traces(driver, layout, profiles, cp_sizes=(2, 4), tp_sizes=(1, 2))
        assert random_traces(driver, draw, profiles, examples=4, seed=9, tally=tally) is None


@pytest.mark.holds("ATT-1")
@pytest.mark.parametrize("done", [2**31 - 5, 2**32 - 5])
def test_our_exchange_goes_on_after_billions(pool_of, monkeypatch, done):
    """Pushes between four ranks, about the place where 32 bits wrap."""
    driver, tally = pool_of("gpu-push"), Tally()
    monkeypatch.setattr(driver, "exchanges_done", done)
    profiles = profiles_to_check(driver.profiles, [])
    draw = layout_traces(driver, "pr9757", profiles, cp_sizes=(4,))
    assert random_traces(driver, draw, profiles, examples=3, seed=9, tally=tally) is None


@pytest.mark.holds(*of_profiles(PROFILES))
@pytest.mark.parametrize("layout", ["pr9757", "vllm_dcp", "custom"])
def test_prompts_computed_here_on_gloo(gpu_pool, layout):
    """With admission `prefill` the cache is the same, chunk by chunk, also after `resume`."""
    profiles, tally = profiles_to_check(gpu_pool.profiles, []), Tally()
    draw = layout_traces(gpu_pool, layout, profiles, cp_sizes=(1, 2, 4), tp_sizes=(1, 2))

    def prefilled(choices):
        trace = draw(choices)
        config = msgspec.structs.replace(trace.config, admission="prefill")
        return msgspec.structs.replace(trace, config=config)

    assert random_traces(gpu_pool, prefilled, profiles, examples=6, seed=5, tally=tally) is None


@pytest.mark.holds(*of_profiles([*BOOKKEEPING, *FEATURES]))
class TestReferenceMachine(engine_machine(ReferenceEngine, [*BOOKKEEPING, *FEATURES]).TestCase):
    """The reference's bookkeeping as a state machine, with every feature."""

    settings = hypothesis.settings(max_examples=40, stateful_step_count=30, deadline=None)


@pytest.mark.holds(*of_profiles(BOOKKEEPING))
class TestLedgerMachine(engine_machine(LedgerEngine).TestCase):
    """The ledger as a state machine."""

    settings = hypothesis.settings(max_examples=40, stateful_step_count=30, deadline=None)


def test_the_machine_catches_a_broken_engine():
    """Its failure names what is violated, and the rules that led there."""

    class Liar(LedgerEngine):
        def apply(self, event):
            outcome = super().apply(event)
            counted = [held + (self.rank == 1) for held in outcome.past_len or ()]
            return msgspec.structs.replace(outcome, past_len=counted) if counted else outcome

    machine = engine_machine(Liar, BOOKKEEPING, names=["pr9757"])
    settings = hypothesis.settings(
        max_examples=100, database=None, derandomize=True, phases=[hypothesis.Phase.generate]
    )
    with pytest.raises(AssertionError, match="LEN-2 violated at event") as caught:
        run_state_machine_as_test(machine, settings=settings)
    steps = "".join(getattr(caught.value, "__notes__", []))
    assert "state.act(action=" in steps
