"""Pools and memory that run out, and messages that arrive broken: nothing leaks, all is named."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest
import torch

from helix_conformance.drive.driver import EngineFailure
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.drive.process import PoolDriver
from helix_conformance.drive.threads import ThreadDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.expect.recorder import Recorder
from helix_conformance.judge.judge import Judge
from helix_conformance.judge.play import check_trace
from helix_gpu.cache import HelixCache
from helix_spec.config import Config, ModelShape
from helix_spec.events import Admit, Decode, Event, Fork, Preempt, Reason, Release, Resume
from helix_spec.layouts import NAMED_LAYOUTS
from helix_spec.trace import Trace, Watch
from suite_testing.faulty import BitFlipped, OutOfMemory
from suite_testing.sabotage import DEADLINE_S, long_trace

SHAPE = ModelShape(q_heads=8, kv_heads=2)


def whole(cache: HelixCache, pages: int) -> bool:
    """PAGE-3 of one rank: every page is free or in a block table, none twice."""
    used = [page for id in cache.request_ids for page in cache.block_table(id)]
    return cache.free_pages + len(set(used)) == pages and len(set(used)) == len(used)


@pytest.mark.parametrize("layout", [f"{name}/1:C=4,T=2" for name in NAMED_LAYOUTS])
@pytest.mark.parametrize("short", range(4))
def test_a_pool_exhausted_on_one_rank_only(layout: str, short: int) -> None:
    """All ranks refuse alike, nothing has changed (PAGE-5), and after a release it fits again."""
    if layout.startswith("vllm_dcp"):
        layout += ",I=1"
    pages = [40] * 4
    pages[short] = 3
    config = Config(layout=layout, pages=pages, max_len=400, model=SHAPE)
    events: list[Event] = [Admit(0, 9)]
    events += [Decode([0], [1]) for _ in range(40)]
    events += [Admit(1, 16), Fork(0, 2), Decode([2, 0], [1, 1]), Preempt(0), Admit(3, 8)]
    events += [Resume(0), Release(0), Release(2), Release(3), Admit(4, 8), Release(1), Release(4)]
    driver, refused = LocalDriver(LedgerEngine), 0
    recorder, judge = Recorder(config, driver.profiles), Judge(config, driver.profiles)
    before: list[Any] = []
    played = driver.play(config, driver.profiles, events, Watch())
    assert judge.started(next(played)[1]) == []
    for event, answers in played:
        if event is None:
            assert judge.finished(answers) == []
            assert [answer.view.free_pages for answer in answers if answer.view] == pages
            break
        expected = recorder.next(event)
        assert judge.event(expected, answers) == []  # REF-1, PAGE-3, PAGE-5 and all others
        views = [answer.view for answer in answers]
        if expected.refused == Reason.OUT_OF_PAGES:
            refused += 1
            assert views == before
        before = views
    assert refused


def test_a_pool_exhausted_on_one_rank_of_a_real_pool(pool: PoolDriver) -> None:
    """The same on four gloo ranks, with contents: refusals are equal and nothing is written."""
    trace = long_trace(20)
    config = msgspec.structs.replace(trace.config, pages=[60, 60, 6, 60])
    trace = msgspec.structs.replace(trace, config=config)
    assert check_trace(pool, trace, pool.profiles) is None


def test_out_of_memory_in_the_middle_of_an_append() -> None:
    """The failure names the rank; no page is lost on any rank, and all of them come back."""
    config = Config(
        layout="pr9757/1:C=4,T=2",
        pages=[9] * 4,
        max_len=90,
        model=ModelShape(q_heads=8, kv_heads=2, layers=2),
    )
    events: list[Event] = [Admit(0, 13), Admit(1, 3), Fork(0, 2), Decode([0, 1], [1, 1], 1)]
    OutOfMemory.made.clear()
    driver = ThreadDriver(OutOfMemory)
    with pytest.raises(EngineFailure, match="Rank 1 raised OutOfMemoryError") as failure:
        list(driver.play(config, driver.profiles, events, Watch()))
    driver.close()
    assert failure.value.event == 3
    assert len(OutOfMemory.made) == 4
    for engine in OutOfMemory.made:
        book = engine.cache.book
        held = {page for id in book.request_ids for page in book.block_table(id)}
        assert book.free_pages + len(held) == 9
        for id in book.request_ids:
            engine.cache.release(id)
        assert book.free_pages == 9
        assert book.ledger.free.tolist() == [9] * 4


def test_out_of_memory_before_an_admission_changes_nothing() -> None:
    """The prompt's KV is asked for before pages are taken: a failure there leaves no trace."""
    config = Config(layout="pr9757/1:C=1,T=2", pages=[9], max_len=90, model=SHAPE)
    cache = HelixCache(config, rank=0)

    def failing(positions: torch.Tensor) -> Any:
        raise torch.OutOfMemoryError("so to speak")

    def prompt_kv(positions: torch.Tensor) -> Any:
        shape = (1, len(positions), 2, 16)
        return torch.zeros(shape), torch.zeros(shape)

    for _ in range(20):
        with pytest.raises(torch.OutOfMemoryError):
            cache.admit(0, 7, failing)
        assert cache.request_ids == []
        assert cache.free_pages == 9
    cache.admit(0, 7, prompt_kv)
    cache.preempt(0)
    for _ in range(20):
        with pytest.raises(torch.OutOfMemoryError):
            cache.resume(0, failing)
        assert cache.preempted_ids == [0]
        assert cache.free_pages == 9
    cache.resume(0, prompt_kv)
    assert whole(cache, 9)


def test_a_bit_that_turns_over_in_the_exchange() -> None:
    """What a peer's partial is not, shows in the output: ATT-1."""
    config = Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=90, model=SHAPE)
    trace = Trace(config=config, events=[Admit(0, 5), Decode([0], [1])])
    driver = ThreadDriver(BitFlipped)
    failure = check_trace(driver, trace, driver.profiles)
    driver.close()
    assert failure is not None
    assert "ATT-1" in {violation.invariant for violation in failure.violations}


@pytest.mark.parametrize("pad", [1, 2, 3])
def test_a_broken_message_on_the_control_channel(pad: int) -> None:
    """Rubbish, a line that does not end and bytes that are no text: rank 1 is named, in time."""
    config = Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=90, model=SHAPE)
    trace = Trace(config=config, events=[Admit(0, 5), Decode([0], [1], pad)])
    driver = PoolDriver("suite_testing.faulty:Garbled", 2, deadline_s=DEADLINE_S)
    failure = check_trace(driver, trace, driver.profiles)
    driver.close()
    assert failure is not None
    assert failure.engine_failure is not None
    print(f"\n{failure.engine_failure}")
    assert failure.engine_failure.startswith("Rank 1 ")
