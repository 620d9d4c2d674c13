"""Plans on paper agree with published sizes and relations, and say what they cannot plan."""

import json

import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_planner.plans import (
    HARDWARE,
    MODELS,
    Hardware,
    Load,
    PlanError,
    best,
    kv_row,
    parameters,
    plan,
    rank_weights,
    read_card,
    splits,
)
from helix_spec.layouts import named_layout

LLAMA, DEEPSEEK = MODELS["llama-405b"], MODELS["deepseek-r1"]
GB200 = HARDWARE["gb200"]
MILLION = Load(batch=8, prompt_len=2**20)


def planned(model=LLAMA, *, name="pr9757", tp=1, cp=8, load=MILLION, t=64, hardware=GB200):
    """A plan of a named layout."""
    layout = named_layout(name, cp_size=cp, tokens_per_block=t)
    return plan(model, hardware, layout, load, tp)


@pytest.mark.parametrize(("model", "published"), [(LLAMA, 405e9), (DEEPSEEK, 671e9)])
def test_published_parameter_counts(model, published):
    """The cards of Llama 3.1 405B and DeepSeek-R1 have the published numbers of parameters."""
    assert published == pytest.approx(parameters(model), rel=0.005)


def test_one_rank_holds_all_weights():
    """On one rank lie the weights of the whole model."""
    assert parameters(LLAMA) == rank_weights(LLAMA, 1, 1)
    assert parameters(DEEPSEEK) == pytest.approx(rank_weights(DEEPSEEK, 1, 1))


def test_a_step_reads_all_experts_only_with_a_large_batch():
    """Experts that nobody visits are not read: 8 of 256 for one token, nearly all for 1,000."""
    per_expert = 3 * 7168 * 2048 * 58
    one, many, all_of_them = (rank_weights(DEEPSEEK, 1, 1, batch) for batch in (1, 1000, 10**6))
    assert 248 * per_expert == pytest.approx(all_of_them - one)
    assert many == pytest.approx(all_of_them)


def test_layer_reads_what_appendix_a_says():
    """A dense layer with cp = 1 reads ((2HQ/TPA + 2H ceil(K/TPA)) Hsz + 3HF/TPF) weights."""
    h, q, k, size, f, n = 16384, 128, 8, 128, 53248, 8
    layer = (2 * h * q / n + 2 * h * -(-k // n)) * size + 3 * h * f / n
    output_head = 128256 * h / n
    assert 126 * layer + output_head == rank_weights(LLAMA, n, 1, batch=1)


def test_kv_read_is_appendix_a():
    """A step reads B * 2 * ceil(K/TPA) * Hsz * S/KVP numbers of cache in each layer."""
    numbers = 126 * 8 * 2 * (8 // 2) * 128 * 2**20 / 4
    assert numbers / GB200.memory_bandwidth == pytest.approx(planned(tp=2, cp=4).kv)


def test_more_tp_than_kv_heads_reads_no_less():
    """Beyond tp = K every rank still reads a whole KV head: why Helix shards along the context."""
    assert [kv_row(LLAMA, tp) for tp in (1, 2, 8, 16, 64)] == [2048, 1024, 256, 256, 256]
    assert {tp for tp, _ in splits(LLAMA, 32)} == {8, 4, 2, 1}
    assert splits(DEEPSEEK, 64) == [(1, 64)]


def test_exchange_does_not_depend_on_the_context():
    """Partials are as large after a thousand tokens as after a hundred million."""
    plans = [planned(load=Load(batch=8, prompt_len=n)) for n in (1000, 10**6, 10**8)]
    assert len({(one.exchange, one.merge, one.reduce) for one in plans}) == 1
    assert pytest.approx(plans[2].kv / plans[1].kv, rel=1e-3) == 100


@pytest.mark.parametrize("cp", [2, 8, 32])
def test_sharding_multiplies_what_fits(cp):
    """Ranks hold cp times the tokens of one: a cp-fold batch, up to 32 times, at one latency."""
    one, many = (
        planned(DEEPSEEK, cp=c, hardware=Hardware(1e15, 8e12, 9e11, 1e-5)) for c in (1, cp)
    )
    assert cp == pytest.approx(many.largest_batch / one.largest_batch, rel=0.02)
    assert cp == pytest.approx(one.kv / many.kv)


@pytest.mark.parametrize("decoded", [0, 250_000, 500_000])
@pytest.mark.parametrize("c", [2, 8])
def test_last_rank_is_slower_as_the_closed_form_says(c, decoded):
    """Before pull request 9757 the fullest rank reads (1+C*x)/(1+x) times its share."""
    load = Load(batch=8, prompt_len=1_000_000, decoded=decoded)
    before, after = (planned(name=name, cp=c, load=load).kv for name in ("before_9757", "balanced"))
    x = decoded / 1_000_000
    assert (1 + c * x) / (1 + x) == pytest.approx(before / after, rel=1e-3)


def test_rotated_start_spreads_short_requests():
    """Requests of one block fill rank 0 under `rank_zero` and all ranks alike under `rotated`."""
    load = Load(batch=80, prompt_len=64)
    assert (planned(name="pr9757", load=load).pages, planned(load=load).tokens) == (80, 80 * 64)
    assert planned(name="balanced", load=load).pages == 10


@pytest.mark.parametrize("name", ["pr9757", "pr17866", "vllm_dcp", "balanced"])
def test_largest_sizes_are_the_largest(name):
    """The largest batch and context fit, and one more does not."""
    small = Hardware(120e9, 8e12, 9e11, 1e-5)

    def fits(load):
        return planned(name=name, load=load, hardware=small).fits

    one = planned(name=name, hardware=small)
    batch, context = one.largest_batch, one.largest_context
    assert batch > 0 < context
    assert [fits(Load(batch=b, prompt_len=2**20)) for b in (batch, batch + 1)] == [True, False]
    assert [fits(Load(batch=8, prompt_len=n)) for n in (context, context + 1)] == [True, False]


def test_best_fits():
    """The best plan is the fastest of those that fit, and there is none when none does."""
    plans = [planned(tp=tp, cp=32 // tp) for tp, _ in splits(LLAMA, 32)]
    assert min(one.step for one in plans if one.fits) == best(plans).step
    assert best([planned(load=Load(batch=1000, prompt_len=10**8))]) is None


def test_steps_count_what_a_layer_costs_anyway():
    """A fixed cost of each layer is added to every step."""
    slow = Hardware(*[getattr(GB200, name) for name in GB200.__struct_fields__[:4]], 1e-3)
    assert pytest.approx(planned(hardware=slow).step - planned().step) == 0.126


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--ranks", "72"], "72 ranks do not divide 128 query heads; 1, 2, 4"),
        (["--model", "gpt"], "'gpt' is neither llama-405b, deepseek-r1 nor a readable JSON file"),
        (["--context", "10", "--decoded", "10"], "10 tokens decoded of a context of 10"),
    ],
)
def test_refusals_are_sentences(arguments, said):
    """What cannot be planned is refused with status 2 and a sentence."""
    result = CliRunner().invoke(main, ["plan", *arguments])
    assert (result.exit_code, said in result.output) == (2, True)


def test_cards_from_files(tmp_path):
    """A file describes a model or hardware; a field too many or too few is named."""
    path = tmp_path / "mine.json"
    path.write_text('{"memory": 1e9, "memory_bandwidth": 1e9, "link_bandwidth": 1e9}')
    with pytest.raises(PlanError, match="link_latency"):
        read_card(Hardware, str(path), HARDWARE)
    path.write_text(
        '{"memory": 1e9, "memory_bandwidth": 2e9, "link_bandwidth": 1e9, "link_latency": 1}'
    )
    assert Hardware(1e9, 2e9, 1e9, 1) == read_card(Hardware, str(path), HARDWARE)


@pytest.mark.parametrize("context", [1_000_000, 100_000_000])
def test_command_prints_and_writes_every_split(tmp_path, context):
    """`plan` shows each legal split from 1M to 100M tokens, and writes the same as JSON."""
    path = tmp_path / "plan.json"
    result = CliRunner().invoke(
        main, ["plan", "--ranks", "64", "--context", str(context), "--json", str(path)]
    )
    written = json.loads(path.read_text())
    assert result.exit_code == 0
    assert [[p["tp"], p["cp"]] for p in written["plans"]] == [[1, 64], [2, 32], [4, 16], [8, 8]]
    assert (context == 1_000_000) == (written["best"] is not None)
    assert all(f"{p['tp']} x {p['cp']}" in result.output for p in written["plans"])
