"""Placement rules read from a checkout: our own stand-ins for its files, and the real ones.

The stand-ins have the names that TensorRT-LLM's files have, and bodies of ours. The real files are
taken from the checkout that TRTLLM_SOURCE names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helix_conformance.drivers.local import LocalDriver
from helix_conformance.engines.trtllm import FOLDER, SourceError, engine_of
from helix_conformance.known import Known
from helix_conformance.protocol import EngineSpecError, load_engine
from helix_conformance.runs import Tally, check_trace, layout_traces, random_traces
from helix_spec.configs import Config
from helix_spec.events import Admit, Decode
from helix_spec.traces import Trace

PROFILES = frozenset({"placement", "lengths"})

IMPORTS = "import tensorrt_llm.bindings  # compiled: importing it would fail\n"
CONTIGUOUS = """
def partition_context_for_helix(input_token_ids: List[int], cp_rank, cp_size, tokens_per_block):
    t, total = tokens_per_block, len(input_token_ids)
    blocks = [range(first, min(first + t, total)) for first in range(0, total, t)]
    share, longer = divmod(len(blocks), cp_size)
    first = cp_rank * share + min(cp_rank, longer)
    mine = [p for block in blocks[first : first + share + (cp_rank < longer)] for p in block]
    return [input_token_ids[p] for p in mine], mine, total, 0
"""
ROUND_ROBIN = """
def partition_context_for_helix(input_token_ids: List[int], cp_rank, cp_size, tokens_per_block):
    mine = [p for p in range(len(input_token_ids)) if p // tokens_per_block % cp_size == cp_rank]
    return [input_token_ids[p] for p in mine], mine, len(input_token_ids), 0
"""
SHORT_REFUSED = CONTIGUOUS.replace(
    "    share,",
    "    if len(blocks) < cp_size:\n        raise ValueError('too few blocks')\n    share,",
)
GATE = """
class KVCacheManager(BaseResourceManager):
    @nvtx_range("prepare")
    def prepare_resources(self, scheduled_batch: ScheduledRequests):
        for req in scheduled_batch.context_requests:
            self.impl.add_sequence(req)
        for req in scheduled_batch.generation_requests:
            if self.mapping.has_cp_helix():
                turn = (req.py_decoding_iter - 1) // self.tokens_per_block
                req.py_helix_is_inactive_rank = turn % self.mapping.cp_size != self.mapping.cp_rank
                if req.py_helix_is_inactive_rank:
                    continue
                req.seqlen_this_rank_cp += 1
            self.impl.add_token(req.py_request_id)
"""
POSITIONS = """
class PyTorchModelEngine(ModelEngine):
    def _prepare_tp_inputs(self, scheduled_requests):
        for request in scheduled_requests.generation_requests:
            position_id = past_seen_token_num = request.max_beam_num_tokens - 1
            if self.mapping.has_cp_helix():
                position_id = request.total_input_len_cp + request.py_decoding_iter - 1
                past_seen_token_num = request.seqlen_this_rank_cp
                if not request.py_helix_is_inactive_rank:
                    past_seen_token_num -= 1
"""


@pytest.fixture
def checkout(tmp_path):
    """Writes stand-ins for the three files; returns the checkout's place."""

    def write(partition=CONTIGUOUS, gate=GATE, positions=POSITIONS):
        (tmp_path / FOLDER).mkdir(parents=True)
        names = ("request_utils.py", "resource_manager.py", "model_engine.py")
        for name, text in zip(names, (partition, gate, positions), strict=True):
            (tmp_path / FOLDER / name).write_text(IMPORTS + text)
        return str(tmp_path)

    return write


OLDER = """
class ExecutorRequestQueue:
    def _merge_helix_requests(self, new_requests: list[RequestQueueItem], tokens_per_block: int):
        made = []
        for item in new_requests:
            ids, positions, _, _ = dealt(item.request.input_token_ids, self.dist, tokens_per_block)
            exclude = self._should_exclude_last_generation_logits()
            made.append(executor_request_to_llm_request(
                req_id=item.id, executor_request=item.request, child_req_ids=item.child_req_ids,
                exclude_last_generation_logits=exclude, input_token_ids=ids, position_ids=positions,
            ))
        return made
"""
LAST_RANK = GATE.replace(
    "turn % self.mapping.cp_size != self.mapping.cp_rank",
    "self.mapping.cp_rank != self.mapping.cp_size - 1",
)


def failure_of(engine, layout, known=None):
    """What random traces of a layout find, beside what is known."""
    driver = LocalDriver(engine)
    strategy = layout_traces(driver, layout, PROFILES, cp_sizes=(1, 2, 3, 4))
    return random_traces(
        driver, strategy, PROFILES, examples=40, seed=1, tally=Tally(), known=known
    )


@pytest.mark.parametrize(
    ("parts", "layout"),
    [
        ({"partition": CONTIGUOUS}, "pr9757"),
        ({"partition": ROUND_ROBIN}, "pr13180"),
        ({"partition": CONTIGUOUS, "gate": LAST_RANK}, "before_9757"),
    ],
)
def test_right_rules_pass_under_the_layout_that_goes_with_them(checkout, parts, layout):
    """The rules that are found pick the layout, are named, and pass on random traces."""
    place = checkout(**parts)
    engine = load_engine(f"trtllm:{place}")
    assert layout == engine.settings["layout"]
    assert None is failure_of(engine, layout)


def test_the_older_method_is_read_where_the_function_is_missing(checkout):
    """Before the function there was a method; what it makes requests of is the same."""
    place = Path(checkout(partition=""))
    # The method deals by itself there; here by the stand-in above, put into its body.
    body = CONTIGUOUS.replace("partition_context_for_helix", "partition").replace(
        "List[int]", "list"
    )
    indented = "".join(f"        {line}\n" for line in body.strip().splitlines())
    method = OLDER.replace("        made = []\n", indented + "        made = []\n").replace(
        "dealt(item.request.input_token_ids, self.dist, tokens_per_block)",
        "partition(item.request.input_token_ids, self.dist.cp_rank, self.dist.cp_size, "
        "tokens_per_block)",
    )
    (place / FOLDER / "executor_request_queue.py").write_text(IMPORTS + method)
    engine = engine_of(str(place))
    assert "_merge_helix_requests" in engine.settings["prompt"]
    assert None is failure_of(engine, "pr9757")


def test_a_short_prompt_that_is_refused_is_named(checkout):
    """A checkout that refuses a prompt of fewer blocks than ranks breaks REF-2, in one event."""
    failure = failure_of(engine_of(checkout(SHORT_REFUSED)), "pr9757")
    assert failure is not None
    assert {"REF-2"} == {violation.invariant for violation in failure.violations}
    assert [Admit(0, 1)] == failure.trace.events


def test_a_count_off_by_one_is_named(checkout):
    """A rank that counts the token in flight on inactive ranks too breaks LEN-1."""
    gate = GATE.replace(
        "                if req.py_helix_is_inactive_rank:\n                    continue\n"
        "                req.seqlen_this_rank_cp += 1\n",
        "                req.seqlen_this_rank_cp += 1\n"
        "                if req.py_helix_is_inactive_rank:\n                    continue\n",
    )
    assert gate != GATE
    config = Config(layout="pr9757/1:C=2,T=2", pages=[9, 9], max_len=20)
    trace = Trace(config=config, events=[Admit(0, 3), Decode([0], [1])])
    driver = LocalDriver(engine_of(checkout(gate=gate)))
    failure = check_trace(driver, trace, PROFILES)
    assert failure is not None
    assert "LEN-1" in {violation.invariant for violation in failure.violations}


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"partition": "x = 1"}, "has neither partition_context_for_helix"),
        ({"partition": ROUND_ROBIN, "gate": LAST_RANK}, "No layout has round_robin prompts and"),
        ({"partition": "def broken("}, "is not Python"),
        ({"partition": ROUND_ROBIN.replace("== cp_rank", "!= cp_rank")}, "neither contiguous nor"),
        ({"gate": "x = 1"}, "has no loop in prepare_resources"),
        ({"gate": GATE.replace("// self.tokens_per_block", "")}, "neither the step rule nor"),
        ({"positions": "x = 1"}, "does not compute positions"),
        ({"positions": POSITIONS.replace("py_decoding_iter - 1", "py_decoding_iter")}, "known is"),
        ({"positions": POSITIONS.replace("iter - 1", "iter - offset")}, "reads something else"),
    ],
)
def test_what_is_not_recognised_is_refused_before_any_work(checkout, parts, sentence):
    """A missing or changed rule is a sentence that names it, when the engine is loaded."""
    place = checkout(**parts)
    with pytest.raises(SourceError, match=sentence):
        engine_of(place)
    with pytest.raises(EngineSpecError, match=sentence):
        load_engine(f"trtllm:{place}")


def test_no_checkout_is_refused(tmp_path):
    """A folder that is no checkout is named."""
    with pytest.raises(SourceError, match="PATH must be a checkout of TensorRT-LLM"):
        engine_of(str(tmp_path))


@pytest.mark.skipif(
    "TRTLLM_SOURCE" not in os.environ,
    reason="No wheel of TensorRT-LLM is in the package index: TRTLLM_SOURCE names a checkout.",
)
def test_the_real_rules_place_every_token():
    """The rules of a real checkout are recognised, and wrong in nothing but short prompts."""
    engine = engine_of(str(Path(os.environ["TRTLLM_SOURCE"])))
    known = Known.read(Path(__file__).parents[1] / "known" / "trtllm.toml")
    assert None is failure_of(engine, engine.settings["layout"], known)
