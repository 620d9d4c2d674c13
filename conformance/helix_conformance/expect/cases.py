"""The traces of which vectors are made, each with the reason why it is there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import msgspec

from helix_spec.config import Config, ModelShape
from helix_spec.events import (
    Accept,
    Admit,
    Decode,
    Event,
    Fork,
    Merge,
    Preempt,
    Release,
    Resume,
    Sampled,
    Skip,
)
from helix_spec.layouts import parse_layout


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A trace, what it is there for, and how deep its expectations go."""

    name: str
    config: Config
    events: list[Event] = []
    invariants: tuple[str, ...]
    notes: tuple[str, ...]
    depth: Literal["pages", "cache", "attention"] = "pages"
    rows: bool = True
    """Whether cached rows are written down where the depth has them."""
    state_every: int = 1
    """State is written down after every so many events."""

    def shows_state(self, count: int) -> bool:
        """Whether state is written down after so many events."""
        return count % self.state_every == 0 or count == len(self.events)


SMALL = ModelShape(q_heads=4, kv_heads=2, head_dim=4)
"""For cached rows: few dims, few numbers."""


def _config(layout: str, pages: int | list[int] = 20, **more: object) -> Config:
    cp_size = int(layout.partition("C=")[2].partition(",")[0])
    fields = {"max_len": 2000, "model": ModelShape(q_heads=2 * cp_size, kv_heads=2)} | more
    pools = [pages] * cp_size if isinstance(pages, int) else pages
    return Config(layout=parse_layout(layout), pages=pools, **fields)  # type: ignore[arg-type]


def _steps(id: int, count: int) -> list[Event]:
    return [Decode([id], [1])] * count


WALKED = {
    "before_9757/1:C=3,T=2": "last_rank: rank 2 alone decodes",
    "pr9757/1:C=3,T=2": "contiguous prompt, decode owner by step",
    "pr13180/1:C=3,T=2": "round-robin prompt, decode owner by step",
    "pr17866/1:C=3,T=2": "round-robin prompt, decode owner by position, pages in lockstep",
    "vllm_dcp/1:C=3,T=4,I=2": "interleave of 2 in pages of 4",
    "vllm_dcp/1:C=3,T=4,I=1": "interleave of 1 in pages of 4",
    "vllm_dcp/1:C=2,T=2,I=2": "interleave of whole pages",
    "balanced/1:C=3,T=2": "each admission starts one rank further on",
    "pr9757/1:C=1,T=2": "one rank holds everything",
    "pr9757/1:C=4,T=1": "pages of one token",
    "custom/1:prompt=contiguous,owner=position,pages=lazy,start=rank_zero,C=3,T=2":
        "contiguous prompt, decode owner by position",
    "custom/1:prompt=contiguous,owner=interleave(1),pages=lazy,start=rotated,C=3,T=2":
        "interleaved decode, rotated",
    "custom/1:prompt=interleave(1),owner=step,pages=lazy,start=rank_zero,C=3,T=2":
        "interleaved prompt, decode owner by step",
    "custom/1:prompt=round_robin,owner=position,pages=lockstep,start=rotated,C=3,T=2":
        "lockstep with rotated starts",
}  # fmt: skip
"""Layouts that are walked through, with what is particular about each."""


def _walks() -> Iterator[Case]:
    for layout, particular in WALKED.items():
        config = _config(layout, max_len=40)
        t, c = config.layout.tokens_per_block, config.layout.cp_size
        turn = t * c
        words = layout.split("/")[0]
        if words == "custom":
            words = layout.partition(":")[2].partition(",C=")[0]
        sizes = layout.partition("C=")[2]
        name = "".join(x if x.isalnum() or x == "_" else "-" for x in f"walk-{words}-c{sizes}")
        yield Case(
            name=name.replace("--", "-").lower(),
            config=config,
            events=[
                Admit(0, 1),
                Admit(1, turn + 1),
                Admit(2, 2 * turn - 1),
                Admit(3, t),
                *[Decode([0, 1, 2], [1, 1, 1])] * (turn + 1),
                Release(1),
                Admit(1, turn),
                *[Decode([3, 1], [1, 1])] * (t + 1),
                Release(0),
                *_steps(1, t),
            ],
            invariants=(
                *("OWN-1", "OWN-2", "OWN-3", "LEN-1", "LEN-2", "LEN-3", "POS-1"),
                *("BAL-1", "BAL-2", "GROW-1", "PAGE-1", "PAGE-2", "PAGE-3", "PAGE-4"),
            ),
            notes=(
                f"A walk through a layout: {particular}.",
                "Prompts of one token, of a super-block and one more, of nearly two, of a page; "
                "a turn of all ranks; an id and its pages used again.",
            ),
        )


EXAMPLES = [
    *(
        Case(
            name=f"spec-11-1-{name}",
            config=_config(f"{name}/1:C=4,T=100", 9),
            events=[Admit(0, 400), *_steps(0, 400)],
            invariants=("OWN-1", "OWN-2", "OWN-3", "LEN-1", "LEN-2", "POS-1", "BAL-2", "PAGE-1"),
            notes=(
                "SPEC.md, example 11.1: 400 prompt tokens and 400 steps, as pull request 9757 has "
                f"them {when}.",
                "State is written down every 50 events.",
            ),
            state_every=50,
        )
        for name, when in (("before_9757", "before"), ("pr9757", "after"))
    ),
    *(
        Case(
            name=f"spec-11-2-{name}",
            config=_config(layout),
            events=[Admit(0, 13), *_steps(0, 8)],
            invariants=("OWN-3", "LEN-1", "LEN-2", "BAL-1"),
            notes=(f"SPEC.md, example {which}: 13 tokens in pages of 2 on 4 ranks, {how}.",),
        )
        for name, layout, which, how in (
            ("contiguous", "pr9757/1:C=4,T=2", "11.2", "contiguous, owner by step"),
            ("step", "pr13180/1:C=4,T=2", "11.2", "round-robin, owner by step"),
            ("position", "pr17866/1:C=4,T=2", "11.2 and 11.3", "round-robin, owner by position"),
        )
    ),
    Case(
        name="spec-11-4-capacity",
        config=_config("pr17866/1:C=4,T=32", 3),
        events=[Admit(0, 385), Admit(0, 384), Decode([0], [1]), Release(0), Admit(1, 384)],
        invariants=("PAGE-1", "REF-2", "PAGE-5"),
        notes=("SPEC.md, example 11.4: 3 pages of 32 on 4 ranks hold 384 global tokens, not 400.",),
    ),
    Case(
        name="spec-11-4-capacity-four-pages",
        config=_config("pr17866/1:C=4,T=32", 4),
        events=[Admit(0, 401), Decode([0], [1]), Release(0), Admit(1, 513), Admit(1, 512)],
        invariants=("PAGE-1", "REF-2"),
        notes=("SPEC.md, example 11.4: 401 global tokens need 4 pages on each rank.",),
    ),
    Case(
        name="spec-11-5-rotated-start",
        config=_config("balanced/1:C=4,T=2"),
        events=[
            *[Admit(id, 3) for id in range(4)],
            Decode([0, 1, 2, 3], [1, 1, 1, 1]),
            Admit(4, 3),
            Decode([4], [1]),
        ],
        invariants=("BAL-3", "OWN-3", "LEN-1"),
        notes=("SPEC.md, example 11.5: four equal requests put 4 tokens on each rank.",),
    ),
    Case(
        name="spec-11-6-group-over-a-boundary",
        config=_config("vllm_dcp/1:C=2,T=4,I=2"),
        events=[Admit(7, 5), Decode([7], [4]), Accept(7, 2), Decode([7], [1])],
        invariants=("OWN-2", "LEN-3", "PAGE-1"),
        notes=("SPEC.md, example 11.6: a group that straddles ranks and pages, half kept.",),
    ),
    Case(
        name="spec-11-7-copy-on-write",
        config=_config("pr9757/1:C=2,T=4", 3),
        events=[Admit(0, 2), Fork(0, 1), Fork(0, 2), Decode([2, 0, 1], [1, 1, 1])],
        invariants=("PAGE-2", "GROW-1", "PAGE-3"),
        notes=("SPEC.md, example 11.7: two holders copy, the last writes in place.",),
    ),
    Case(
        name="spec-11-7-copy-refused",
        config=_config("pr9757/1:C=2,T=4", [2, 9]),
        events=[
            Admit(0, 2),
            Fork(0, 1),
            Fork(0, 2),
            Decode([2, 0, 1], [1, 1, 1]),
            Decode([2, 0], [1, 1]),
            Decode([2], [1]),
        ],
        invariants=("REF-2", "PAGE-5", "PAGE-3"),
        notes=(
            "SPEC.md, example 11.7 with one free page: the batch is refused whole, and nobody has "
            "copied. One copy alone still fits.",
        ),
    ),
    Case(
        name="spec-11-8-identities-and-values",
        config=_config(
            "pr9757/1:C=2,T=16", 2, max_len=17, seed=7,
            model=ModelShape(layers=2, q_heads=4, kv_heads=2, head_dim=4),
        ),
        events=[Admit(4, 16), Admit(4, 9), Admit(5, 3), Decode([5, 4], [2, 1])],
        invariants=("OWN-1", "POS-2"),
        notes=("SPEC.md, example 11.8: which token is which, and what its row holds.",),
        depth="cache",
    ),
    Case(
        name="spec-11-9-heads",
        config=_config(
            "pr9757/1:C=2,T=2", tp_size=2, model=ModelShape(q_heads=8, kv_heads=4, head_dim=16)
        ),
        events=[Admit(0, 3), Decode([0], [1])],
        invariants=("MAP-1", "ATT-1", "ATT-4", "OWN-1"),
        notes=("SPEC.md, example 11.9: which rank caches, attends and holds which heads.",),
        depth="attention",
    ),
    Case(
        name="spec-11-10-which-reason",
        config=_config("pr9757/1:C=1,T=4"),
        events=[
            Admit(1, 3),
            Decode([1], [1]),
            Admit(2, 2),
            Preempt(2),
            Decode([3, 2], [1, 1]),
            Decode([2, 3], [1, 1]),
            Decode([3, 3], [1, 1]),
            Decode([3, 3], [1, 0]),
            Accept(3, 0),
            Accept(3, 1),
            Accept(1, 2),
            Accept(1, 1),
            Accept(1, 1),
            Admit(2, 0),
            Resume(1),
            Sampled([]),
        ],
        invariants=("REF-2",),
        notes=("SPEC.md, example 11.10: which of several reasons is given.",),
    ),
]  # fmt: skip

REFUSALS = [
    Case(
        name="refusals",
        config=_config("pr9757/1:C=2,T=2", max_len=6),
        events=[
            Decode([0], [1]),
            Release(0),
            Admit(0, 0),
            Admit(0, 7),
            Admit(0, 6),
            Decode([0], [1]),
            Skip([0], [1]),
            Admit(0, 7),
            Admit(0, 0),
            Decode([], []),
            Decode([0], []),
            Decode([0], [0]),
            Decode([0], [-1]),
            Decode([0], [1], -1),
            Decode([0, 0], [1, 1]),
            Decode([0, 9], [1, 1]),
            Skip([9], [1]),
            Skip([], []),
            Release(0),
            Decode([0], [1]),
            Admit(0, 5),
            Decode([0], [1]),
        ],
        invariants=("REF-1", "REF-2", "PAGE-5"),
        notes=("Every reason that needs no feature, before and after a request is known.",),
    ),
    Case(
        name="refusals-out-of-pages",
        config=_config("pr9757/1:C=2,T=2", [1, 2], max_len=50),
        events=[
            Admit(0, 7),
            Admit(0, 4),
            Admit(1, 1),
            Decode([0], [1]),
            Skip([0], [1]),
            Release(0),
            Admit(1, 1),
            Decode([1], [1]),
            Decode([1], [1]),
            Decode([1], [1]),
            Decode([1], [1]),
            Decode([1], [1]),
        ],
        invariants=("REF-1", "REF-2", "PAGE-3", "PAGE-5", "POS-1"),
        notes=(
            "One rank's pool is smaller: all ranks refuse when it alone is short.",
            "A refused step takes nothing and advances nothing.",
        ),
    ),
    Case(
        name="refusals-retried",
        config=_config("pr9757/1:C=2,T=1", [3, 3]),
        events=[
            Admit(0, 2),
            Admit(1, 3),
            Decode([0], [1]),
            Decode([0], [1]),
            Decode([0], [1]),
            Release(1),
            *_steps(0, 4),
        ],
        invariants=("OWN-3", "POS-1", "REF-2"),
        notes=("A step that was refused for want of pages is taken later, as if never tried.",),
    ),
    Case(
        name="refusals-with-unlike-pools",
        config=_config("pr9757/1:C=2,T=2", [4, 1]),
        events=[Admit(0, 8), Admit(0, 4), Decode([0], [1]), Decode([0], [1]), Decode([0], [1]),
                Release(0), Admit(0, 1), *_steps(0, 5)],
        invariants=("REF-1", "REF-2"),
        notes=("Room on rank 0 says nothing of the others.",),
    ),
    Case(
        name="refusals-to-the-last-page",
        config=_config("pr9757/1:C=2,T=1", [10, 12]),
        events=[Admit(0, 18), *_steps(0, 4), Release(0), Admit(0, 1), *_steps(0, 19)],
        invariants=("REF-1", "REF-2", "PAGE-3"),
        notes=("The last page of a pool is used; 1 - 9/10 is less than 1/10 in floats.",),
    ),
    Case(
        name="near-max-len-in-lockstep",
        config=_config("vllm_dcp/1:C=2,T=2,I=1", 9, max_len=7),
        events=[Admit(0, 4), Admit(1, 3), Decode([0], [1]), Decode([1], [1]), *_steps(0, 2),
                *_steps(1, 3), Decode([0], [1])],
        invariants=("PAGE-2", "GROW-1", "REF-2"),
        notes=("max_len is not a whole number of super-blocks: the last one needs room, too.",),
    ),
    Case(
        name="refusals-take-no-admission-number",
        config=_config("balanced/1:C=3,T=2", [2, 2, 2]),
        events=[Admit(0, 0), Admit(0, 3), Admit(0, 3), Admit(1, 20), Admit(1, 3), Decode([1], [1])],
        invariants=("LEN-1", "REF-2"),
        notes=("Only accepted admissions move the start on.",),
    ),
    Case(
        name="refusals-lockstep",
        config=_config("vllm_dcp/1:C=2,T=2,I=1", [2, 3]),
        events=[Admit(0, 3), *_steps(0, 6), Release(0), Admit(1, 9), Admit(1, 8)],
        invariants=("REF-1", "REF-2", "PAGE-1"),
        notes=("Under lockstep all ranks need a page when one does.",),
    ),
    Case(
        name="refusals-of-features",
        config=_config("pr9757/1:C=2,T=2", 4, max_len=12),
        events=[
            Admit(0, 2),
            Accept(0, 1),
            Decode([0], [3]),
            Accept(0, 4),
            Accept(0, 0),
            Fork(0, 0),
            Fork(9, 1),
            Fork(9, 0),
            Resume(0),
            Resume(9),
            Preempt(9),
            Fork(0, 1),
            Accept(0, 1),
            Accept(1, 1),
            Preempt(1),
            Preempt(1),
            Fork(1, 2),
            Decode([1], [1]),
            Skip([1], [1]),
            Accept(1, 1),
            Decode([0], [8]),
            Decode([0], [7]),
            Release(1),
            Release(1),
        ],
        invariants=("REF-2", "PAGE-5"),
        notes=("Reasons around groups, forks and preemption.",),
    ),
    Case(
        name="refusals-large-ids",
        config=_config("pr9757/1:C=2,T=2"),
        events=[Admit(0, 3), Admit(2**32, 5), Decode([2**32, 0], [1, 1]), Release(0),
                Admit(2**53, 2), Decode([2**53, 2**32], [1, 1])],
        invariants=("REF-2", "LEN-1"),
        notes=("Ids beyond 32 bits are other requests than their low bits.",),
    ),
]  # fmt: skip

_TWO = "pr9757/1:C=2,T=2"
STARTS = [
    Case(
        name=f"start-{name}",
        config=config,
        invariants=("REF-1", "REF-2"),
        notes=(f"No engine may start: {why}.",),
    )
    for name, config, why in (
        ("lockstep-with-step",
         _config("custom/1:prompt=round_robin,owner=step,pages=lockstep,start=rank_zero,C=2,T=2"),
         "lockstep with these rules leaves a rank without a page that it needs"),
        ("lockstep-with-two-interleaves",
         _config("custom/1:prompt=interleave(1),owner=interleave(2),pages=lockstep,"
                 "start=rank_zero,C=2,T=2"),
         "under lockstep prompt and decode must interleave alike"),
        ("interleave-does-not-divide", _config("vllm_dcp/1:C=2,T=4,I=3"),
         "3 tokens do not divide pages of 4"),
        ("interleave-exceeds-the-page", _config("vllm_dcp/1:C=2,T=4,I=8"),
         "an interleave of 8 tokens is larger than a page of 4"),
        ("a-pool-too-few", _config(_TWO, [5]), "pages lists one pool for two ranks"),
        ("an-empty-pool", _config(_TWO, [5, 0]), "a pool holds no page"),
        ("query-heads", _config(_TWO, model=ModelShape(q_heads=3, kv_heads=3)),
         "3 query heads do not divide over 2 ranks"),
        ("kv-heads", _config(_TWO, model=ModelShape(q_heads=4, kv_heads=3)),
         "3 KV heads do not divide 4 query heads"),
        ("head-dim", _config(_TWO, model=ModelShape(head_dim=15)), "RoPE turns pairs"),
        ("rope-base", _config(_TWO, model=ModelShape(rope_base=1.0)), "rope_base is not above 1"),
    )
]  # fmt: skip

STEPS = [
    Case(
        name="skip",
        config=_config("pr9757/1:C=2,T=1", 4),
        events=[
            Admit(0, 3),
            Skip([0], [1]),
            Skip([0], [1]),
            Decode([0], [1]),
            Skip([0], [1]),
            Decode([0], [1]),
            Decode([0], [1]),
        ],
        invariants=("OWN-3", "POS-1", "PAGE-3", "PAGE-5"),
        notes=("A step that is prepared and never runs changes nothing.",),
    ),
    Case(
        name="batch-order",
        config=_config("pr13180/1:C=2,T=2", 6),
        events=[
            Admit(0, 2),
            Admit(1, 3),
            Admit(2, 4),
            Decode([2, 0, 1], [1, 1, 1]),
            Decode([1], [1]),
            Decode([0, 1, 2], [1, 1, 1]),
            Decode([2, 1], [1, 1]),
        ],
        invariants=("LEN-2", "POS-1", "OWN-3"),
        notes=("Columns follow the order of the batch; requests keep steps of their own.",),
    ),
    *(
        Case(
            name=f"groups-{layout.split('/')[0]}",
            config=_config(layout, 9),
            events=[
                Admit(0, 3),
                Admit(1, 1),
                Decode([0, 1], [5, 2]),
                Accept(0, 3),
                Decode([1, 0], [3, 4]),
                Accept(0, 4),
                Accept(1, 1),
                Skip([0], [6]),
                Decode([0], [1]),
                Accept(0, 1),
                Decode([0, 1], [7, 1]),
                Decode([0], [1]),
            ],
            invariants=("OWN-2", "OWN-3", "LEN-3", "PAGE-1", "PAGE-3", "POS-1"),
            notes=(
                "Speculative groups over ownership and page boundaries, kept in part, whole, or "
                "closed by the next decode; pages of rewound tokens go back.",
            ),
        )
        for layout in ("pr9757/1:C=2,T=2", "pr17866/1:C=2,T=2", "vllm_dcp/1:C=3,T=2,I=1",
                       "balanced/1:C=2,T=2")
    ),
    Case(
        name="groups-and-skip",
        config=_config("pr9757/1:C=2,T=2", 9),
        events=[Admit(0, 3), Decode([0], [3]), Skip([0], [1]), Accept(0, 1), Decode([0], [1])],
        invariants=("REF-2",),
        notes=("A skipped step does not close the group before it.",),
    ),
]  # fmt: skip

FORKS = [
    *(
        Case(
            name=f"fork-{layout.split('/')[0]}",
            config=_config(layout, 9),
            events=[
                Admit(0, 3),
                Decode([0], [1]),
                Fork(0, 1),
                Fork(1, 2),
                Decode([1], [1]),
                Decode([0, 2], [1, 1]),
                Release(0),
                Decode([1, 2], [1, 1]),
                Admit(0, 4),
                Release(1),
                Decode([2, 0], [1, 1]),
                Release(2),
            ],
            invariants=("PAGE-1", "PAGE-2", "PAGE-3", "GROW-1"),
            notes=(
                "Forks share pages, whoever writes first copies, a parent's release frees nothing "
                "that a child still holds.",
            ),
        )
        for layout in ("pr9757/1:C=2,T=4", "pr17866/1:C=2,T=2", "vllm_dcp/1:C=2,T=4,I=1",
                       "balanced/1:C=2,T=4")
    ),
    Case(
        name="fork-of-a-full-page",
        config=_config("pr9757/1:C=2,T=2", 4),
        events=[Admit(0, 2), Fork(0, 1), Decode([0, 1], [1, 1]), Decode([0, 1], [1, 1])],
        invariants=("PAGE-2", "PAGE-3", "GROW-1"),
        notes=("Where the shared page is full, nothing is copied.",),
    ),
    Case(
        name="fork-then-sole-holder",
        config=_config("pr9757/1:C=2,T=4", 4),
        events=[Admit(0, 2), Fork(0, 1), Release(1), Decode([0], [1]), Fork(0, 2), Release(0),
                Decode([2], [1])],
        invariants=("GROW-1", "PAGE-3"),
        notes=("A page that nobody else holds any more is written in place.",),
    ),
    Case(
        name="fork-keeps-the-shift",
        config=_config("balanced/1:C=3,T=1"),
        events=[Admit(0, 1), Admit(1, 1), Fork(1, 2), Admit(3, 1), Decode([2, 3, 1], [1, 1, 1])],
        invariants=("OWN-3", "LEN-1"),
        notes=("A child starts where its parent did and takes no admission number.",),
    ),
    Case(
        name="fork-and-groups",
        config=_config("pr9757/1:C=2,T=4", 9),
        events=[
            Admit(0, 2),
            Decode([0], [2]),
            Fork(0, 1),
            Decode([0], [3]),
            Accept(0, 1),
            Decode([1], [3]),
            Accept(1, 2),
            Decode([0, 1], [1, 1]),
        ],
        invariants=("PAGE-1", "PAGE-2", "PAGE-3", "GROW-1"),
        notes=("A page that was copied stays copied when its tokens are rewound.",),
    ),
    Case(
        name="fork-and-preempt",
        config=_config("pr9757/1:C=2,T=4", 9),
        events=[Admit(0, 6), Fork(0, 1), Preempt(0), Decode([1], [1]), Resume(0),
                Decode([0, 1], [1, 1]), Preempt(1), Release(1), Decode([0], [1])],
        invariants=("PAGE-2", "PAGE-3"),
        notes=("Preempting a parent leaves the child its pages; resumed, it shares none.",),
    ),
]  # fmt: skip

PREEMPTIONS = [
    *(
        Case(
            name=f"preempt-{layout.split('/')[0]}",
            config=_config(layout, 9),
            events=[
                Admit(0, 3),
                Admit(1, 2),
                *_steps(0, 3),
                Preempt(0),
                Decode([1], [1]),
                Resume(0),
                *_steps(0, 3),
                Preempt(0),
                Resume(0),
                Admit(2, 1),
                Decode([0, 2, 1], [1, 1, 1]),
            ],
            invariants=("OWN-3", "LEN-1", "POS-1", "PAGE-3", "BAL-2"),
            notes=(
                "A resumed request is placed as a prompt of all its tokens; its steps begin "
                "anew, its positions go on.",
            ),
        )
        for layout in ("pr9757/1:C=2,T=2", "pr13180/1:C=2,T=2", "pr17866/1:C=2,T=2",
                       "vllm_dcp/1:C=2,T=2,I=1", "balanced/1:C=3,T=1")
    ),
    Case(
        name="preempt-for-want-of-pages",
        config=_config("pr9757/1:C=2,T=2", 2),
        events=[Admit(0, 5), Preempt(0), Admit(1, 4), Resume(0), Decode([0], [1]), Release(1),
                Resume(0), Decode([0], [1]), Preempt(0), Release(0), Admit(0, 2)],
        invariants=("REF-2", "PAGE-3", "PAGE-5"),
        notes=("Refused for want of pages, a request stays preempted; so it may be released.",),
    ),
]  # fmt: skip

OVERLAPS = [
    Case(
        name="overlap",
        config=_config("pr9757/1:C=2,T=2", 9, overlap=True),
        events=[
            Admit(0, 3),
            Sampled([0]),
            Decode([0], [1]),
            Decode([0], [1]),
            Decode([0], [1]),
            Skip([0], [1]),
            Sampled([0]),
            Decode([0], [1]),
            Sampled([0]),
            Sampled([0]),
            Sampled([0]),
            Decode([0], [1]),
            Sampled([]),
            Sampled([0, 0]),
            Sampled([9]),
            Sampled([0]),
            Decode([0], [1]),
        ],
        invariants=("POS-1", "OWN-3", "OWN-1", "REF-2"),
        notes=("One step ahead of sampling: nothing depends on when tokens are learned.",),
    ),
    Case(
        name="overlap-batches",
        config=_config("pr13180/1:C=2,T=1", 9, overlap=True),
        events=[
            Admit(0, 2),
            Admit(1, 1),
            Decode([0, 1], [1, 1]),
            Decode([1], [1]),
            Sampled([1]),
            Decode([0, 1], [1, 1]),
            Sampled([0, 1]),
            Decode([0, 1], [1, 1]),
            Release(0),
            Sampled([1]),
            Decode([1], [1]),
        ],
        invariants=("POS-1", "OWN-3"),
        notes=("Each request is as far behind as its own decodes.",),
    ),
    Case(
        name="overlap-groups",
        config=_config("pr9757/1:C=2,T=2", 9, overlap=True),
        events=[
            Admit(0, 3),
            Decode([0], [3]),
            Accept(0, 2),
            Sampled([0]),
            Accept(0, 2),
            Accept(0, 2),
            Decode([0], [2]),
            Decode([0], [2]),
            Sampled([0]),
            Accept(0, 1),
            Sampled([0]),
            Accept(0, 1),
            Decode([0], [1]),
        ],
        invariants=("REF-2", "POS-1"),
        notes=("A group is kept or rewound once all decodes of its request are sampled.",),
    ),
    Case(
        name="overlap-preempt-and-fork",
        config=_config("pr9757/1:C=2,T=2", 9, overlap=True),
        events=[
            Admit(0, 3),
            Decode([0], [1]),
            Fork(0, 1),
            Sampled([1]),
            Decode([1], [1]),
            Preempt(0),
            Sampled([0]),
            Resume(0),
            Sampled([0]),
            Decode([0, 1], [1, 1]),
            Sampled([0, 1]),
        ],
        invariants=("REF-2",),
        notes=("A fork's child has nothing outstanding; preempting forgets what is.",),
    ),
]  # fmt: skip

PADDING = [
    Case(
        name="padding",
        config=_config("pr9757/1:C=2,T=2", 4),
        events=[Admit(0, 3), Admit(1, 2), Decode([0], [1], 3), Decode([1, 0], [1, 1], 1),
                Decode([0], [1], 2), Decode([0], [1])],
        invariants=("DUM-1", "PAGE-3", "POS-1"),
        notes=("Dummy requests fill the batch and change nothing.",),
    ),
    Case(
        name="padding-in-a-full-pool",
        config=_config("vllm_dcp/1:C=2,T=2,I=1", 2),
        events=[Admit(0, 3), Admit(1, 4), Decode([0], [1], 7), Decode([1], [1], 7),
                Release(0), Decode([1], [1], 7)],
        invariants=("DUM-1", "PAGE-3", "REF-2"),
        notes=("Dummies need no page, not even where none is free.",),
    ),
]  # fmt: skip

CACHES = [
    Case(
        name="cache-of-turns",
        config=_config("pr9757/1:C=2,T=2", 6, model=SMALL),
        events=[Admit(0, 5), *_steps(0, 6), Release(0), Admit(0, 3), Decode([0], [1])],
        invariants=("OWN-1", "POS-2", "PAGE-4"),
        notes=(
            "Rows hold the very tokens, turned by their global positions.",
            "An id that is admitted again has other values.",
        ),
        depth="cache",
    ),
    *(
        Case(
            name=f"cache-of-{layout.split('/')[0]}",
            config=_config(layout, 6, model=SMALL),
            events=[Admit(0, 1), Admit(1, 7), Decode([0, 1], [1, 1]), Decode([1, 0], [1, 1]),
                    Decode([1], [1])],
            invariants=("OWN-1", "POS-2", "PAGE-4"),
            notes=("Contents follow the same split as lengths.",),
            depth="cache",
        )
        for layout in ("pr13180/1:C=2,T=2", "pr17866/1:C=2,T=2", "vllm_dcp/1:C=2,T=4,I=2",
                       "balanced/1:C=2,T=2")
    ),
    Case(
        name="cache-in-bfloat16",
        config=_config(
            "pr9757/1:C=2,T=2", 6, seed=3,
            model=ModelShape(q_heads=4, kv_heads=2, head_dim=8, dtype="bfloat16"),
        ),
        events=[Admit(0, 5), Decode([0], [1])],
        invariants=("OWN-1", "POS-2"),
        notes=("Entries are rounded once to the type of the cache.",),
        depth="cache",
    ),
    Case(
        name="cache-of-groups",
        config=_config("pr9757/1:C=2,T=2", 6, model=SMALL),
        events=[Admit(0, 3), Decode([0], [5]), Accept(0, 1), Decode([0], [2]), Accept(0, 2),
                Decode([0], [3])],
        invariants=("OWN-1", "PAGE-4"),
        notes=("A position that is decoded again after a rewind holds another token.",),
        depth="cache",
    ),
    Case(
        name="cache-of-forks",
        config=_config("pr9757/1:C=2,T=4", 6, model=SMALL),
        events=[Admit(0, 2), Fork(0, 1), Fork(0, 2), Decode([2, 0], [1, 1]), Decode([1], [1]),
                Release(0), Decode([1, 2], [1, 1])],
        invariants=("OWN-1", "PAGE-2"),
        notes=("A copied page has the earlier tokens; the others keep what they had.",),
        depth="cache",
    ),
    Case(
        name="cache-of-lockstep-forks",
        config=_config("vllm_dcp/1:C=2,T=4,I=1", 6, model=SMALL),
        events=[Admit(0, 3), Fork(0, 1), Decode([1], [1]), Decode([0, 1], [1, 1])],
        invariants=("OWN-1", "PAGE-2"),
        notes=("Under lockstep every rank copies its page of the super-block.",),
        depth="cache",
    ),
    Case(
        name="cache-of-a-resumed-request",
        config=_config("pr13180/1:C=2,T=2", 6, model=SMALL),
        events=[Admit(0, 3), *_steps(0, 2), Preempt(0), Admit(1, 2), Resume(0), *_steps(0, 2)],
        invariants=("OWN-1", "POS-2"),
        notes=("Resumed tokens keep identity and position, and lie where a prompt's would.",),
        depth="cache",
    ),
    Case(
        name="cache-beside-dummies",
        config=_config("pr9757/1:C=2,T=2", 3, model=SMALL),
        events=[Admit(0, 1), Admit(1, 2), Decode([0], [1], 3), Decode([1], [1], 2), Release(0),
                Admit(2, 2), Decode([2], [1], 1)],
        invariants=("DUM-1", "PAGE-4", "OWN-1"),
        notes=("Dummy requests write into no request's slots.",),
        depth="cache",
    ),
    Case(
        name="cache-one-step-ahead",
        config=_config("pr9757/1:C=2,T=2", 6, overlap=True, model=SMALL),
        events=[Admit(0, 3), *_steps(0, 2), Sampled([0]), Decode([0], [1]), Sampled([0])],
        invariants=("OWN-1", "POS-1", "POS-2"),
        notes=("With overlap no position and no slot is used twice.",),
        depth="cache",
    ),
]  # fmt: skip

ATTENTIONS = [
    Case(
        name="attention-empty-ranks",
        config=_config("pr9757/1:C=3,T=2", 6, model=ModelShape(q_heads=6, kv_heads=1)),
        events=[Admit(0, 1), Decode([0], [1]), Decode([0], [1]), Decode([0], [1])],
        invariants=("ATT-1", "ATT-3", "ATT-4", "LEN-3", "LIVE-1"),
        notes=(
            "Ranks without keys count for nothing, whatever their memory holds.",
            "They take part in the exchange like any other.",
        ),
        depth="attention",
    ),
    Case(
        name="attention-unequal-ranks",
        config=_config("pr9757/1:C=2,T=8", 6, model=ModelShape(q_heads=4, kv_heads=2)),
        events=[Admit(0, 9), Decode([0], [1]), Decode([0], [1])],
        invariants=("ATT-1", "ATT-4", "MAP-1"),
        notes=("Eight and more keys against one: a mean of partials is far off.",),
        depth="attention",
    ),
    Case(
        name="attention-of-a-longer-sequence",
        config=_config("pr9757/1:C=2,T=32", 6, model=ModelShape(q_heads=4, kv_heads=2)),
        events=[Admit(0, 60), Decode([0], [1]), Decode([0], [1])],
        invariants=("ATT-1",),
        notes=("More keys than are gathered at a time.", "Cached rows are not written down."),
        depth="attention",
        rows=False,
    ),
    Case(
        name="attention-in-two-layers",
        config=_config("pr9757/1:C=2,T=2", 6, model=ModelShape(layers=2, q_heads=2, kv_heads=1)),
        events=[Admit(0, 1), Decode([0], [1]), Decode([0], [1])],
        invariants=("OWN-1", "ATT-1"),
        notes=("Every layer is appended to, and attends.",),
        depth="attention",
    ),
    Case(
        name="attention-many-heads-each",
        config=_config("pr13180/1:C=2,T=2", 6, model=ModelShape(q_heads=4, kv_heads=4)),
        events=[Admit(0, 3), Admit(1, 4), Decode([1, 0], [1, 1])],
        invariants=("ATT-1", "MAP-1"),
        notes=("As many KV heads as query heads; probes alternate with the position.",),
        depth="attention",
    ),
    Case(
        name="attention-of-a-group",
        config=_config("pr9757/1:C=2,T=2", 6, model=ModelShape(q_heads=4, kv_heads=2)),
        events=[Admit(0, 3), Decode([0], [3]), Accept(0, 1), Decode([0], [2])],
        invariants=("LEN-3", "ATT-1"),
        notes=("Each query of a group sees its own past alone.",),
        depth="attention",
    ),
    Case(
        name="attention-in-bfloat16",
        config=_config(
            "pr9757/1:C=2,T=2", 6,
            model=ModelShape(q_heads=4, kv_heads=2, dtype="bfloat16", partial_dtype="bfloat16"),
        ),
        events=[Admit(0, 6), Decode([0], [1]), Decode([0], [1])],
        invariants=("ATT-1", "ATT-4"),
        notes=("The bound is that of the types, partial outputs rounded for the wire.",),
        depth="attention",
    ),
    Case(
        name="attention-partials-in-float32",
        config=_config(
            "pr9757/1:C=2,T=2", 6, seed=1, model=ModelShape(q_heads=4, kv_heads=2),
        ),
        events=[Admit(0, 12), Decode([0], [1])],
        invariants=("ATT-4",),
        notes=("Partials that travel in less than the declared type are outside the bound.",),
        depth="attention",
    ),
    Case(
        name="attention-on-one-rank",
        config=_config("pr9757/1:C=1,T=2", 6, model=ModelShape(q_heads=2, kv_heads=1)),
        events=[Admit(0, 3), Admit(1, 1), Decode([0, 1], [1, 1])],
        invariants=("ATT-1", "LEN-3"),
        notes=("With one rank the merge is that rank's own output, for every request.",),
        depth="attention",
    ),
    Case(
        name="attention-tp-and-cp",
        config=_config(
            "vllm_dcp/1:C=2,T=2,I=1", 6, tp_size=2, model=ModelShape(q_heads=4, kv_heads=2)
        ),
        events=[Admit(0, 2), Decode([0], [1]), Decode([0], [1])],
        invariants=("MAP-1", "ATT-1", "OWN-2"),
        notes=("cp_rank varies fastest.",),
        depth="attention",
    ),
    Case(
        name="attention-beside-dummies",
        config=_config("pr9757/1:C=2,T=2", 6, model=ModelShape(q_heads=4, kv_heads=2)),
        events=[Admit(0, 3), Admit(1, 2), Decode([0, 1], [1, 1]), Decode([1], [1], 3),
                Decode([0], [1], 1)],
        invariants=("DUM-1", "ATT-1"),
        notes=("Dummy requests change no output.",),
        depth="attention",
    ),
    Case(
        name="attention-after-a-fork",
        config=_config("pr17866/1:C=2,T=2", 6, model=ModelShape(q_heads=4, kv_heads=2)),
        events=[Admit(0, 3), Fork(0, 1), Decode([0, 1], [1, 1])],
        invariants=("ATT-1", "PAGE-2"),
        notes=("Parent and child see their own tokens.",),
        depth="attention",
    ),
]  # fmt: skip

_HEADS = ModelShape(q_heads=4, kv_heads=2)
MERGES = [
    Case(
        name=f"merge-{name}",
        config=_config(layout, 1, model=model, **more),
        events=list(events),
        invariants=invariants,
        notes=(note,),
    )
    for name, layout, model, more, events, invariants, note in (
        ("spec-11-11", "pr9757/1:C=2,T=1", _HEADS, {}, [Merge([[0], [None]], [1, 0])],
         ("ATT-3", "MAP-1"), "SPEC.md, example 11.11: one partial is of no keys."),
        ("unequal", "pr9757/1:C=2,T=1", _HEADS, {"seed": 1},
         [Merge([[0, 3, -9], [12, 3, -8]], [0, 1])],
         ("ATT-1", "ATT-4", "MAP-1"), "Weights from 1 to e^12: a mean of partials is far off."),
        ("empty", "pr9757/1:C=3,T=1", ModelShape(q_heads=3, kv_heads=1), {"seed": 2},
         [Merge([[None, 0, None], [None, None, 5], [None, 0, None]], [0, 1, 2])],
         ("ATT-3",), "Partials of no keys count for nothing; where all are, the output is 0."),
        ("orders", "pr9757/1:C=3,T=1", ModelShape(q_heads=3, kv_heads=1), {"seed": 3},
         [Merge([[0, 2], [1, None], [-1, 2]], order)
          for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0], [2, 1, 0])],
         ("ATT-1", "ATT-2", "MAP-1"), "It does not matter which rank is handed which partial."),
        ("again", "pr9757/1:C=2,T=1", _HEADS, {"seed": 4},
         [Merge([[0, 2], [1, 3]], [0, 1])] * 3,
         ("ATT-2",), "The same merge gives the same bits."),
        ("large-levels", "pr9757/1:C=2,T=1", _HEADS, {"seed": 5},
         [Merge([[20000, -20000, 89], [20001, -20001, None]], [0, 1])],
         ("ATT-1", "ATT-4"), "Exponentials of these log-sum-exps overflow, their differences not."),
        ("bfloat16", "pr9757/1:C=2,T=1",
         ModelShape(q_heads=4, kv_heads=2, dtype="bfloat16", partial_dtype="bfloat16"),
         {"seed": 6}, [Merge([[0, 1], [1, 1]], [0, 1])],
         ("ATT-1", "ATT-4"), "Partials travel in 16 bits, log-sum-exps do not."),
        ("one-rank", "pr9757/1:C=1,T=1", ModelShape(q_heads=2, kv_heads=1), {"seed": 7},
         [Merge([[0, 1, -3]], [0])],
         ("ATT-1",), "One rank hands its own partial back, every row of it."),
        ("tp-and-cp", "pr9757/1:C=2,T=1", ModelShape(q_heads=8, kv_heads=2),
         {"seed": 8, "tp_size": 2}, [Merge([[0, 2], [1, None]], [1, 0])],
         ("MAP-1", "ATT-1", "ATT-3"), "Each tensor-parallel shard merges its own heads."),
    )
]  # fmt: skip

CASES: Sequence[Case] = [
    *_walks(),
    *EXAMPLES,
    *REFUSALS,
    *STARTS,
    *STEPS,
    *FORKS,
    *PREEMPTIONS,
    *OVERLAPS,
    *PADDING,
    *CACHES,
    *ATTENTIONS,
    *MERGES,
]
"""All cases, in the order in which they are best read."""
