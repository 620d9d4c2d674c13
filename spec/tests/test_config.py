"""Configurations: which ones an engine must refuse to start with (SPEC.md section 4)."""

import msgspec
import pytest

from helix_spec.config import CacheGroup, Config, LatentShape, ModelShape, config_problem

GOOD = Config(layout="pr9757/1:C=2,T=4", pages=[3, 5], max_len=64, tp_size=2)
NEAR = CacheGroup(name="near", layers=[0], placement="replicated", window=4)


def _near(**changes: object) -> CacheGroup:
    return msgspec.structs.replace(NEAR, **changes)


def test_a_good_configuration_has_no_problem() -> None:
    """A legal layout, a pool for each cp_rank and heads that divide may start."""
    assert config_problem(GOOD) is None
    assert GOOD.world_size == 4
    far = _near(name="far", placement="sharded", window=None, pool="far", tokens_per_block=2)
    groups = msgspec.structs.replace(GOOD, groups=[NEAR, far], pools={"far": [1, 1]})
    assert config_problem(groups) is None


def test_a_latent_is_cached_by_every_tensor_parallel_rank() -> None:
    """MLA: one latent that is not split, queries as wide as its rows, the scale of head_dim."""
    model = ModelShape(q_heads=8, kv_heads=1, head_dim=191, latent=LatentShape())
    config = msgspec.structs.replace(GOOD, model=model, tp_size=4)
    assert config_problem(config) is None
    assert [config.kv_heads_of(tp_rank) for tp_rank in range(4)] == [range(1)] * 4
    assert (model.key_dim, model.value_dim, model.rope_dim) == (576, 512, 64)
    assert model.softmax_scale == 191**-0.5


def test_kv_heads_are_dealt_in_order() -> None:
    """Without a latent each tensor-parallel rank caches its own consecutive heads."""
    config = msgspec.structs.replace(GOOD, model=ModelShape(q_heads=8, kv_heads=4))
    assert [config.kv_heads_of(tp_rank) for tp_rank in range(2)] == [range(2), range(2, 4)]


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        (
            {"layout": "vllm_dcp/1:C=2,T=4,I=3"},
            "The prompt split interleaves 3 tokens, which does not divide tokens_per_block 4.",
        ),
        (
            {"pages": [3]},
            "pages lists 1 pool sizes for cp_size 2; it must list one for each cp_rank.",
        ),
        (
            {"pages": [3, 0]},
            "The pool of cp_rank 1 has 0 pages; it must hold at least one.",
        ),
        (
            {"model": ModelShape(q_heads=6, kv_heads=4)},
            "6 query heads do not divide into 4 KV heads; the KV heads must divide the query "
            "heads.",
        ),
        (
            {"tp_size": 4},
            "tp_size 4 is above the 2 KV heads; a KV head cannot be split, so tp_size may be at "
            "most their number.",
        ),
        (
            {"model": ModelShape(q_heads=12, kv_heads=3)},
            "tp_size 2 does not divide the 3 KV heads.",
        ),
        (
            {"model": ModelShape(q_heads=2, kv_heads=2)},
            "2 query heads do not divide by tp_size * cp_size = 2 * 2; after the exchange each "
            "rank holds an equal slice of them.",
        ),
        (
            {"model": ModelShape(head_dim=15)},
            "head_dim is 15; RoPE rotates pairs, so it must be even.",
        ),
        (
            {"model": ModelShape(latent=LatentShape())},
            "The model has 2 KV heads and a latent cache; all heads read the one latent, so "
            "kv_heads must be 1.",
        ),
        (
            {"model": ModelShape(kv_heads=1, latent=LatentShape(rope_dim=7))},
            "rope_dim is 7; RoPE rotates pairs, so it must be even.",
        ),
        (
            {"model": ModelShape(kv_heads=1, latent=LatentShape(latent_dim=15))},
            "latent_dim is 15; it must be even, so that what travels in 16 bits fills whole words.",
        ),
        (
            {"model": ModelShape(rope_base=1.0)},
            "rope_base is 1.0; it must lie between 1 and 1e12.",
        ),
        (
            {"model": ModelShape(rope_base=float("nan"))},
            "rope_base is nan; it must lie between 1 and 1e12.",
        ),
        # What JSON refuses, as Python's constructors take it.
        (
            {"model": ModelShape(cache_dtype="int8")},
            "model.cache_dtype is 'int8'; it must be one of float8_e4m3fn.",
        ),
        (
            {"model": ModelShape(dtype="float64")},
            "model.dtype is 'float64'; it must be one of float32, float16, bfloat16.",
        ),
        ({"model": ModelShape(layers=0)}, "model.layers is 0; it must be an integer >= 1."),
        ({"model": ModelShape(head_dim=0)}, "model.head_dim is 0; it must be an integer >= 1."),
        ({"model": ModelShape(q_heads=0)}, "model.q_heads is 0; it must be an integer >= 1."),
        ({"model": ModelShape(kv_heads=0)}, "model.kv_heads is 0; it must be an integer >= 1."),
        (
            {"model": ModelShape(kv_heads=1, latent=LatentShape(latent_dim=0))},
            "model.latent.latent_dim is 0; it must be an integer >= 1.",
        ),
        ({"model": ModelShape(latent=3)}, "model.latent is 3; it must be a LatentShape or None."),
        ({"model": 3}, "model is 3; it must be a ModelShape."),
        ({"max_len": 1e5}, "max_len is 100000.0; it must be an integer."),
        ({"max_len": True}, "max_len is True; it must be an integer."),
        ({"pages": 64}, "pages is 64; it must be a list."),
        ({"pages": [3, 5.0]}, "pages is [3, 5.0]; it must be an integer at [1]."),
        (
            {"pages": [3, 2**31]},
            "pages is [3, 2147483648]; it must be an integer <= 2147483647 at [1].",
        ),
        ({"tp_size": 0}, "tp_size is 0; it must be an integer >= 1."),
        # Cache groups and their pools (section 4.2).
        (
            {"groups": [NEAR, NEAR]},
            "Two cache groups are named near; each must have a name of its own.",
        ),
        (
            {"groups": [_near(layers=[1])]},
            "The cache group near names the layers [1]; they must be rising numbers from 0 to 0.",
        ),
        (
            {"groups": [_near(layers=[])]},
            "The cache group near names the layers []; they must be rising numbers from 0 to 0.",
        ),
        (
            {"layout": "vllm_dcp/1:C=2,T=4,I=4", "groups": [_near(tokens_per_block=2)]},
            "The cache group near cannot be placed: The prompt split interleaves 4 tokens, which "
            "does not divide tokens_per_block 2.",
        ),
        (
            {"groups": [NEAR], "model": ModelShape(layers=2)},
            "No cache group names layer 1; every layer must read at least one.",
        ),
        (
            {"groups": [NEAR, _near(name="far", rope_base=1e6)]},
            "The cache groups of layer 0 have other bases of RoPE; their keys meet one query, so "
            "rope_base must be the same.",
        ),
        (
            {"groups": [_near(rope_base=0.5)]},
            "The cache group near has the rope_base 0.5; it must lie between 1 and 1e12.",
        ),
        (
            {"groups": [_near(pool="far")]},
            "The cache group near takes pages from the pool far, of which pools tells no sizes.",
        ),
        (
            {"groups": [NEAR], "pools": {"far": [1, 1]}},
            "No cache group takes pages from the pool far; leave it out or name it.",
        ),
        (
            {"groups": [_near(pool="far")], "pools": {"far": [1, 1]}},
            "No cache group takes pages from the pool main; leave it out or name it.",
        ),
        (
            {"groups": [NEAR, _near(name="far", pool="far")], "pools": {"far": [1, 0]}},
            "The pool far lists the sizes [1, 0]; it must list at least one page for each of 2 "
            "cp_ranks.",
        ),
        (
            {"groups": [NEAR], "pools": {"main": [1, 1]}},
            "pools names the pool main, whose sizes are those of pages.",
        ),
        (
            {"pools": {"far": [1, 1]}},
            "No cache group takes pages from the pool far; leave it out or name it.",
        ),
        ({"groups": [_near(window=0)]}, "groups[0].window is 0; it must be an integer >= 1."),
        (
            {"groups": [_near(name="Near")]},
            "groups[0].name is 'Near'; it must be up to 31 lower-case letters, digits and _, a "
            "letter first.",
        ),
        ({"poison": 1}, "poison is 1; it must be true or false."),
        ({"admission": "sent"}, "admission is 'sent'; it must be one of transfer, prefill."),
        ({"layout": 3}, "layout is 3; it must be a Layout."),
        (
            {"layout": GOOD.layout.replace(cp_size=2.0)},
            "layout.cp_size is 2.0; it must be an integer.",
        ),
        (
            {"layout": GOOD.layout.replace(prompt="dealt")},
            "layout.prompt is 'dealt'; it must be one of contiguous, round_robin, interleave.",
        ),
    ],
)
def test_a_bad_configuration_is_explained(changes: dict[str, object], problem: str) -> None:
    """Each reason for `bad_config` has its own sentence."""
    assert config_problem(msgspec.structs.replace(GOOD, **changes)) == problem


@pytest.mark.parametrize("kind", [Config, ModelShape, LatentShape])
def test_every_field_is_checked(kind: type[msgspec.Struct]) -> None:
    """A value of a type that no field has is a problem in each field, and names it."""
    whole = msgspec.structs.replace(
        GOOD, model=ModelShape(kv_heads=1, latent=LatentShape()), tp_size=1
    )
    assert config_problem(whole) is None
    parts = {Config: whole, ModelShape: whole.model, LatentShape: whole.model.latent}
    inside = {Config: "", ModelShape: "model.", LatentShape: "model.latent."}[kind]
    for name in kind.__struct_fields__:
        wrong = msgspec.structs.replace(parts[kind], **{name: object})
        if kind is LatentShape:
            wrong = msgspec.structs.replace(whole.model, latent=wrong)
        if kind is not Config:
            wrong = msgspec.structs.replace(whole, model=wrong)
        assert str(config_problem(wrong)).startswith(f"{inside}{name} is <class 'object'>; it must")


def test_nothing_is_rotated_where_rope_is_none_or_the_latent_has_no_such_part() -> None:
    """The row keeps its width, and the part to rotate is empty."""
    rotated_already = ModelShape(head_dim=64, rope=None)
    assert (rotated_already.key_dim, rotated_already.rope_dim) == (64, 0)
    plain = ModelShape(q_heads=8, kv_heads=1, latent=LatentShape(latent_dim=512, rope_dim=0))
    assert (plain.key_dim, plain.value_dim, plain.rope_dim) == (512, 512, 0)
    of_both = ModelShape(kv_heads=1, latent=LatentShape(latent_dim=64, rope_dim=16), rope=None)
    assert (of_both.key_dim, of_both.rope_dim) == (80, 0)
    layout = {"layout": "pr9757/1:C=1,T=4", "pages": [3], "max_len": 8}
    for model in (rotated_already, plain, of_both):
        assert config_problem(Config(**layout, model=model)) is None
