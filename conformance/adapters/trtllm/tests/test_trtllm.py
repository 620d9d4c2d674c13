"""Placement rules read from a checkout: our own stand-ins for its files, and the real ones.

The stand-ins have the names that TensorRT-LLM's files have, and bodies of ours. The real files are
taken from the checkout that TRTLLM_SOURCE names.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines import EngineSpecError, load_engine
from helix_conformance.judge.coverage import Tally
from helix_conformance.judge.play import check_trace
from helix_conformance.judge.xfail import Known
from helix_conformance.session import layout_traces, random_traces
from helix_spec.config import Config
from helix_spec.events import Admit, Decode
from helix_spec.trace import Trace
from helix_trtllm.engines import FOLDER, SourceError, engine_of

PROFILES = frozenset({"placement", "lengths"})
OVERLAP = PROFILES | {"overlap"}

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
                if request_has_previous_tensor:
                    position_id += 1
                past_seen_token_num = request.seqlen_this_rank_cp
                if not request.py_helix_is_inactive_rank:
                    past_seen_token_num -= 1
"""

V2_FILE = "kv_cache/kv_cache_manager_v2.py"
V2 = """
class KVCacheManagerV2(BaseResourceManager):
    def __init__(self, kv_cache_config: KvCacheConfig, mapping: Mapping):
        self.impl = tensorrt_llm.bindings.make(kv_cache_config)

    def _helix_local_len(self, global_len: int) -> int:
        t, before = self.tokens_per_block, self._helix_cp_rank * self.tokens_per_block
        blocks = range(0, global_len, self._ledger_tokens_per_block)
        return sum(min(t, max(0, global_len - first - before)) for first in blocks)

    def _set_helix_rank_fields(self, req: LlmRequest) -> None:
        position = req.total_input_len_cp + req.py_helix_decode_group_index
        owner = position // self.tokens_per_block % self._helix_cp_size
        req.py_helix_is_inactive_rank = owner != self._helix_cp_rank
        held = self._helix_local_len(position)
        req.seqlen_this_rank_cp = held if req.py_helix_is_inactive_rank else held + 1

    def try_allocate_generation(self, req: LlmRequest) -> bool:
        cache = self.kv_cache_map[req.py_request_id]
        helix = self._has_cp_helix and not req.is_dummy_request
        if helix:
            self._set_helix_rank_fields(req)
        if not cache.resize(self._required_gen_capacity(req, cache.capacity)):
            return False
        self._allocated_draft_lens[req.py_request_id] = self._effective_draft_len(req)
        if helix:
            req.py_helix_decode_group_index += 1
        return True

    def revert_allocate_generation(self, req: LlmRequest) -> None:
        cache = self.kv_cache_map[req.py_request_id]
        cache.resize(cache.capacity - 1 - self._allocated_draft_lens.pop(req.py_request_id))
        req.py_helix_decode_group_index -= 1
"""
NO_HELIX_V2 = """
class KVCacheManagerV2(BaseResourceManager):
    def try_allocate_generation(self, req):
        return self.kv_cache_map[req.py_request_id].resize(1)
"""
COUNTED_BY_ITERATION = V2.replace(
    "req.py_helix_decode_group_index\n        owner",
    "max(1, req.py_decoding_iter) - 1\n        owner",
)


@pytest.fixture
def checkout(tmp_path):
    """Writes stand-ins for the files; returns the checkout's place."""

    def write(partition=CONTIGUOUS, gate=GATE, positions=POSITIONS, v2=None, v2_file=V2_FILE):
        texts = {
            "request_utils.py": partition,
            "resource_manager.py": gate,
            "model_engine.py": positions,
            v2_file: v2,
        }
        for name, text in texts.items():
            if text is not None:
                path = tmp_path / FOLDER / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text(IMPORTS + text)
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
LAGGING = POSITIONS.replace("position_id += 1", "pass")
LAST_RANK = GATE.replace(
    "turn % self.mapping.cp_size != self.mapping.cp_rank",
    "self.mapping.cp_rank != self.mapping.cp_size - 1",
)


def failure_of(engine, layout, known=None, profiles=PROFILES):
    """What random traces of a layout find, beside what is known."""
    driver = LocalDriver(engine)
    draw = layout_traces(driver, layout, profiles, cp_sizes=(1, 2, 3, 4))
    return random_traces(driver, draw, profiles, examples=40, seed=1, tally=Tally(), known=known)


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
    assert failure_of(engine, layout) is None


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
    assert failure_of(engine, "pr9757") is None


def test_a_short_prompt_that_is_refused_is_named(checkout):
    """A checkout that refuses a prompt of fewer blocks than ranks breaks REF-2, in one event."""
    failure = failure_of(engine_of(checkout(SHORT_REFUSED)), "pr9757")
    assert failure is not None
    assert {violation.invariant for violation in failure.violations} == {"REF-2"}
    assert failure.trace.events == [Admit(0, 1)]


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


@pytest.mark.parametrize("v2_file", [V2_FILE, "kv_cache_manager_v2.py"])
def test_the_newer_manager_decides_where_it_knows_helix(checkout, v2_file):
    """KVCacheManagerV2 is read at both its places, and passes with steps skipped and overlapped."""
    engine = load_engine(f"trtllm:{checkout(ROUND_ROBIN, v2=V2, v2_file=v2_file)}")
    assert engine.settings["layout"] == "pr17866"
    assert "position, by KVCacheManagerV2.try_alloc" in engine.settings["owner"]
    assert failure_of(engine, "pr17866", profiles=OVERLAP) is None


def test_a_newer_manager_without_helix_leaves_the_rule_to_the_older(checkout):
    """A KVCacheManagerV2 of before Helix came to it is passed over."""
    engine = engine_of(checkout(v2=NO_HELIX_V2))
    assert "prepare_resources" in engine.settings["owner"]


@pytest.mark.parametrize(
    ("right", "wrong", "invariant"),
    [
        ("held + 1", "held", "LEN-1"),
        ("else held + 1", "else held + 2", "LEN-2"),
        ("% self._helix_cp_size", "% 2", "OWN-3"),
        ("        req.py_helix_decode_group_index -= 1\n", "", "LEN-2"),
        ("global_len - first - before", "global_len - first - before + 1", "LEN-1"),
    ],
)
def test_a_broken_newer_manager_is_named(checkout, right, wrong, invariant):
    """A KVCacheManagerV2 that counts, deals or gives back wrongly breaks what says so."""
    assert right in V2
    engine = engine_of(checkout(ROUND_ROBIN, v2=V2.replace(right, wrong)))
    failure = failure_of(engine, "pr17866")
    assert failure is not None
    assert invariant in {violation.invariant for violation in failure.violations}


@pytest.mark.parametrize(
    ("parts", "layout", "invariants"),
    [
        ({"partition": ROUND_ROBIN, "v2": COUNTED_BY_ITERATION}, "pr17866", {"OWN-1", "LEN-2"}),
        ({"partition": ROUND_ROBIN, "v2": V2, "positions": LAGGING}, "pr17866", {"POS-1"}),
        ({}, "pr9757", {"OWN-3"}),
    ],
)
def test_a_counter_that_lags_under_the_overlap_scheduler_is_named(
    checkout, parts, layout, invariants
):
    """py_decoding_iter is one behind before sampling; without overlap who reads it passes."""
    engine = engine_of(checkout(**parts))
    assert failure_of(engine, layout) is None
    failure = failure_of(engine, layout, profiles=OVERLAP)
    assert failure is not None
    assert invariants <= {violation.invariant for violation in failure.violations}
    assert len(failure.trace.events) == 3


@pytest.mark.parametrize(
    ("parts", "sentence"),
    [
        ({"partition": "x = 1"}, "has neither partition_context_for_helix"),
        ({"partition": ROUND_ROBIN, "gate": LAST_RANK}, "No layout has round_robin prompts and"),
        ({"partition": "def broken("}, "is not Python"),
        ({"partition": ROUND_ROBIN.replace("== cp_rank", "!= cp_rank")}, "neither contiguous nor"),
        ({"gate": "x = 1"}, "has no loop in prepare_resources"),
        ({"gate": GATE.replace("// self.tokens_per_block", "")}, "is no rule of these"),
        ({"positions": "x = 1"}, "does not compute positions"),
        ({"positions": POSITIONS.replace("py_decoding_iter - 1", "py_decoding_iter")}, "known is"),
        ({"positions": POSITIONS.replace("iter - 1", "iter - offset")}, "reads something else"),
        ({"positions": POSITIONS.replace("id += 1", "id += lag")}, "reads something else"),
        ({"v2": V2}, "No layout has contiguous prompts and position"),
        ({"v2": V2.replace("def revert", "def undo")}, "has no revert_allocate_generation"),
        ({"v2": V2.replace("_ledger_tokens", "_super_tokens")}, "reads something else"),
        ({"v2": V2.replace("-= 1", "-= lag")}, "reads something else"),
        ({"v2": "def broken("}, "is not Python"),
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
    known = Known.read(Path(__file__).parents[1] / "xfail.toml")
    layout = engine.settings["layout"]
    assert failure_of(engine, layout, known, OVERLAP - known.left_out(layout)) is None
