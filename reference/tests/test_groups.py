"""Cache groups: replicated groups, windows and shared pools (SPEC.md sections 4.2 and 5.7)."""

import random

import pytest

from helix_reference.groups import GroupsModel
from helix_reference.model import Model
from helix_reference.state import GONE
from helix_spec.config import CacheGroup, Config
from helix_spec.events import Accept, Admit, Decode, Event, Fork, Preempt, Release, Resume
from helix_spec.layouts import LAYOUT_NAMES, NAMED_LAYOUTS

ALL = CacheGroup(name="all", layers=[0])
LAYOUTS = [
    f"{name}/1:C=2,T=2" + (",I=1" if NAMED_LAYOUTS[name].prompt == "interleave" else "")
    for name in LAYOUT_NAMES
    if name != "custom"
]


def near(**fields: object) -> CacheGroup:
    """A cache group of layer 0 with a window."""
    return CacheGroup(**({"name": "near", "layers": [0], "window": 3} | fields))


def events(choices: random.Random, model: GroupsModel) -> Event:
    """Return an event that may be accepted."""
    ids, g = list(model.requests), choices.randint(1, 3)
    live = [id for id in ids if not model.requests[id].preempted]
    kind = choices.choice("adddddddcccfrpu")
    if kind == "a" or not ids:
        return Admit(choices.randrange(4), choices.randint(1, 9))
    if kind == "d" and live:
        batch = choices.sample(live, choices.randint(1, len(live)))
        return Decode(batch, [choices.randint(1, 3) for _ in batch])
    if kind == "f":
        return Fork(choices.choice(ids), choices.randrange(6))
    id = choices.choice(ids)
    return {"c": Accept(id, g), "r": Release(id), "p": Preempt(id)}.get(kind, Resume(id))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_group_of_all_layers_is_a_cache_without_groups(layout):
    """Its outcomes and views are those of the model, event by event."""
    config = Config(layout=layout, pages=[9, 7], max_len=30)
    grouped = Config(layout=layout, pages=[9, 7], max_len=30, groups=[ALL])
    choices, model, groups = random.Random(layout), Model(config), GroupsModel(grouped)
    for _ in range(300):
        event = events(choices, groups)
        reason = model.apply(event)
        assert groups.apply(event) == reason
        for rank in range(2):
            assert groups.outcome(rank, reason).of_group("all") == model.outcome(rank, reason)
            assert groups.view(rank).of_group("all") == model.view(rank)


@pytest.mark.parametrize("placement", ["sharded", "replicated"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_pages_go_back_when_no_query_can_see_them_and_not_before(layout, placement):
    """Every visible token is in a held page; a full page that is held has one to be seen."""
    for window in (1, 2, 3, 7):
        group = near(window=window, placement=placement, tokens_per_block=2)
        config = Config(layout=layout, pages=[11, 11], max_len=40, groups=[group])
        choices, model = random.Random(f"{layout} {window}"), GroupsModel(config)
        for _ in range(400):
            model.apply(events(choices, model))
            for one in model.all:
                for request in one.requests.values():
                    least = len(request.tokens) - max(0, request.open_group - 1)
                    for positions, table in zip(request.ranks, request.tables, strict=True):
                        seen = [p > least - window for p in positions]
                        pages = [seen[i : i + 2] for i in range(0, len(seen), 2)]
                        gone = table.count(GONE)
                        assert not any(any(page) for page in pages[:gone])
                        if one.layout.pages == "lazy":
                            assert all(any(p) or len(p) < 2 for p in pages[gone:])
                        assert all(page is not GONE for page in table[gone:])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_groups_of_one_pool_share_its_pages(layout):
    """Free pages and those that the groups hold make up each pool, of distinct numbers."""
    groups = [ALL, near(placement="replicated"), near(name="far", pool="far", window=None)]
    config = Config(layout=layout, pages=[9, 8], max_len=40, groups=groups, pools={"far": [7, 9]})
    choices, model = random.Random(layout), GroupsModel(config)
    refused = 0
    for _ in range(400):
        refused += model.apply(events(choices, model)) == "out_of_pages"
        for rank in range(2):
            view = model.view(rank)
            for names, free, size in (
                (("all", "near"), view.free_pages, config.pages[rank]),
                (("far",), view.pools["far"], config.pools["far"][rank]),
            ):
                held = [
                    {page for table in view.groups[name].block_tables.values() for page in table}
                    - {-1}
                    for name in names
                ]
                assert len(set.union(*held)) == sum(map(len, held)) == size - free
    assert refused > 9


def test_the_worked_example():
    """SPEC.md, 11.12."""
    groups = [ALL, near(placement="replicated")]
    model = GroupsModel(Config(layout="pr17866/1:C=2,T=2", pages=[5, 5], max_len=9, groups=groups))
    assert model.apply(Admit(0, 5)) is None
    assert [model.pools["main"][rank].free for rank in range(2)] == [1, 1]
    assert model.apply(Decode([0], [2])) is None
    outcomes = [model.outcome(rank, None) for rank in range(2)]
    assert [o.groups["all"].visible for o in outcomes] == [[4, 4], [2, 3]]
    assert [o.groups["near"].visible for o in outcomes] == [[3, 3], [3, 3]]
    tables = [model.view(rank).groups["near"].block_tables[0] for rank in range(2)]
    assert [[page == -1 for page in table] for table in tables] == [[True, True, False, False]] * 2
    small = GroupsModel(Config(layout="pr17866/1:C=2,T=2", pages=[4, 9], max_len=9, groups=groups))
    assert small.apply(Admit(0, 5)) == "out_of_pages"


def test_a_slot_is_that_of_the_page_that_was_written():
    """With a window of 1 a group's first token is behind it when the event ends; not before."""
    group = near(window=1, tokens_per_block=1)
    config = Config(layout="pr9757/1:C=1,T=1", pages=[9], max_len=9, groups=[group])
    model = GroupsModel(config)
    model.apply(Admit(0, 2))
    reason = model.apply(Decode([0], [3]))
    slots = model.outcome(0, reason).groups["near"].slots
    assert model.view(0).groups["near"].block_tables[0] == [-1, -1, -1, *slots[1:]]
    assert min(slots) >= 0
    assert len(set(slots)) == 3
