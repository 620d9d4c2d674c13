"""The traces of which vectors are made, each with the reason why it is there."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from helix_conformance.expect.notation import parse_events
from helix_spec.config import CacheGroup, Config, LatentShape, ModelShape
from helix_spec.events import Event
from helix_spec.layouts import layout_name, parse_layout


class Case(msgspec.Struct, frozen=True, kw_only=True):
    """A trace, what it exercises, and how deep its expectations go.

    Parameters
    ----------
    name
        Name of the case, and of its vector's file.
    config
        What every rank is started with; it may be illegal.
    events
        The trace.
    invariants
        Numbers of the invariants that it exercises.
    notes
        Sentences for whoever reads the vector.
    depth
        What the vector shows: lengths and block tables; cached rows too; outputs too.

    Examples
    --------
    >>> config = Config(layout="pr9757/1:C=2,T=2", pages=[9] * 2, max_len=100)
    >>> Case(name="tiny", config=config).plays("admit 0 3; decode 0", "OWN-3", "One step.").events
    [Admit(id=0, prompt_len=3), Decode(ids=[0], query_lens=[1], pad=0)]
    """

    name: str
    config: Config
    events: list[Event] = []
    invariants: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    depth: Literal["pages", "cache", "attention"] = "pages"
    rows: bool = True
    """Whether cached rows are written down where the depth has them."""
    state_every: int = 1
    """State is written down after every so many events."""

    def shows_state(self, count: int) -> bool:
        """Return whether state is written down after the first `count` events."""
        return count % self.state_every == 0 or count == len(self.events)

    def plays(self, events: str, invariants: str, *notes: str) -> Case:
        """Return this case with the trace that it plays.

        Parameters
        ----------
        events
            The trace, as `parse_events` reads it.
        invariants
            Numbers of the invariants that it exercises, with spaces between them.
        *notes
            Sentences for whoever reads the vector.

        Returns
        -------
        Case
            A new case; this one is not changed.

        Raises
        ------
        ValueError
            When a part of the trace is no event.
        """
        return msgspec.structs.replace(
            self, events=parse_events(events), invariants=tuple(invariants.split()), notes=notes
        )


def _case(name: str, identifier: str, pages: int | list[int] = 20, **settings: Any) -> Case:
    """Return a case that has no trace yet.

    Parameters
    ----------
    name
        Name of the case; `{layout}` in it stands for the name of the layout.
    identifier
        Identifier of the layout.
    pages
        Pool size of all ranks, or one for each cp_rank.
    **settings
        Fields of `Case`, `Config` and `ModelShape` by name. Without them there are two query heads
        for each rank and a `max_len` of 2000, and all else is as these types have it.
    """
    layout = parse_layout(identifier)
    settings = {"max_len": 2000, "q_heads": 2 * layout.cp_size, **settings}

    def taken(kind: type[msgspec.Struct]) -> dict[str, Any]:
        return {field: settings.pop(field) for field in kind.__struct_fields__ if field in settings}

    config = Config(
        layout=layout,
        pages=[pages] * layout.cp_size if isinstance(pages, int) else pages,
        model=ModelShape(**taken(ModelShape)),
        **taken(Config),
    )
    return Case(name=name.format(layout=layout_name(layout)), config=config, **settings)


def _cache(name: str, identifier: str, pages: int = 6, **settings: Any) -> Case:
    return _case(name, identifier, pages, depth="cache", **{"head_dim": 4, **settings})


def _attention(name: str, identifier: str, pages: int = 6, **settings: Any) -> Case:
    return _case(name, identifier, pages, depth="attention", **settings)


_BFLOAT16: dict[str, Any] = {"dtype": "bfloat16", "partial_dtype": "bfloat16"}
_set = msgspec.structs.replace
_ALL = CacheGroup(name="all", layers=[0])
_NEAR = CacheGroup(name="near", layers=[0], placement="replicated", window=3)
_TRTLLM = ("pr9757/1:C=2,T=2", "pr13180/1:C=2,T=2", "pr17866/1:C=2,T=2")

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
    "custom/1:prompt=contiguous,owner=position,pages=lazy,start=rank_zero,C=3,T=2": (
        "contiguous prompt, decode owner by position"
    ),
    "custom/1:prompt=contiguous,owner=interleave(1),pages=lazy,start=rotated,C=3,T=2": (
        "interleaved decode, rotated"
    ),
    "custom/1:prompt=interleave(1),owner=step,pages=lazy,start=rank_zero,C=3,T=2": (
        "interleaved prompt, decode owner by step"
    ),
    "custom/1:prompt=round_robin,owner=position,pages=lockstep,start=rotated,C=3,T=2": (
        "lockstep with rotated starts"
    ),
}
"""Layouts that are walked through, with what is particular about each."""


def _walk(identifier: str, particular: str) -> Case:
    layout = parse_layout(identifier)
    t, turn = layout.tokens_per_block, layout.tokens_per_block * layout.cp_size
    # The case is named after the identifier, with hyphens for whatever no file name should hold.
    words = identifier.removeprefix("custom/1:").replace("/1:", ",").replace(",C=", ",C").lower()
    name = "walk-" + re.sub("[^a-z0-9_]+", "-", words)
    return _case(name, identifier, max_len=40).plays(
        f"admit 0 1; admit 1 {turn + 1}; admit 2 {2 * turn - 1}; admit 3 {t}; "
        f"decode 0 1 2 *{turn + 1}; release 1; admit 1 {turn}; decode 3 1 *{t + 1}; "
        f"release 0; decode 1 *{t}",
        "OWN-1 OWN-2 OWN-3 LEN-1 LEN-2 LEN-3 POS-1 BAL-1 BAL-2 GROW-1 PAGE-1 PAGE-2 PAGE-3 PAGE-4",
        f"A walk through a layout: {particular}.",
        "Prompts of one token, of a super-block and one more, of nearly two, of a page; "
        "a turn of all ranks; an id and its pages used again.",
    )


def _start(name: str, why: str, identifier: str = "pr9757/1:C=2,T=2", **settings: Any) -> Case:
    case = _case(f"start-{name}", identifier, **settings)
    return case.plays("", "REF-1 REF-2", f"No engine may start: {why}.")


MERGES = [
    _case("merge-spec-11-11", "pr9757/1:C=2,T=1", 1).plays(
        "merge 0 null order 1 0",
        "ATT-3 MAP-1",
        "SPEC.md, example 11.11: one partial is of no keys.",
    ),
    _case("merge-unequal", "pr9757/1:C=2,T=1", 1, seed=1).plays(
        "merge 0,3,-9 12,3,-8",
        "ATT-1 ATT-4 MAP-1",
        "Weights from 1 to e^12: a mean of partials is far off.",
    ),
    _case("merge-empty", "pr9757/1:C=3,T=1", 1, q_heads=3, kv_heads=1, seed=2).plays(
        "merge null,0,null null,null,5 null,0,null",
        "ATT-3",
        "Partials of no keys count for nothing; where all are, the output is 0.",
    ),
    _case("merge-orders", "pr9757/1:C=3,T=1", 1, q_heads=3, kv_heads=1, seed=3).plays(
        "merge 0,2 1,null -1,2; merge 0,2 1,null -1,2 order 2 0 1; "
        "merge 0,2 1,null -1,2 order 1 2 0; merge 0,2 1,null -1,2 order 2 1 0",
        "ATT-1 ATT-2 MAP-1",
        "It does not matter which rank is handed which partial.",
    ),
    _case("merge-again", "pr9757/1:C=2,T=1", 1, seed=4).plays(
        "merge 0,2 1,3 *3", "ATT-2", "The same merge gives the same bits."
    ),
    _case("merge-large-levels", "pr9757/1:C=2,T=1", 1, seed=5).plays(
        "merge 20000,-20000,89 20001,-20001,null",
        "ATT-1 ATT-4",
        "Exponentials of these log-sum-exps overflow, their differences not.",
    ),
    _case("merge-bfloat16", "pr9757/1:C=2,T=1", 1, **_BFLOAT16, seed=6).plays(
        "merge 0,1 1,1", "ATT-1 ATT-4", "Partials travel in 16 bits, log-sum-exps do not."
    ),
    _case("merge-one-rank", "pr9757/1:C=1,T=1", 1, kv_heads=1, seed=7).plays(
        "merge 0,1,-3", "ATT-1", "One rank hands its own partial back, every row of it."
    ),
    _case("merge-tp-and-cp", "pr9757/1:C=2,T=1", 1, q_heads=8, tp_size=2, seed=8).plays(
        "merge 0,2 1,null order 1 0",
        "MAP-1 ATT-1 ATT-3",
        "Each tensor-parallel shard merges its own heads.",
    ),
]
"""Traces of merges alone, which need the profile `merge`."""

CASES: Sequence[Case] = [
    # Walks through layouts.
    *(_walk(layout, particular) for layout, particular in WALKED.items()),
    # Examples of SPEC.md section 11.
    *(
        _case("spec-11-1-{layout}", f"{name}/1:C=4,T=100", 9, state_every=50).plays(
            "admit 0 400; decode 0 *400",
            "OWN-1 OWN-2 OWN-3 LEN-1 LEN-2 POS-1 BAL-2 PAGE-1",
            "SPEC.md, example 11.1: 400 prompt tokens and 400 steps, as pull request 9757 has "
            f"them {when}.",
            "State is written down every 50 events.",
        )
        for name, when in (("before_9757", "before"), ("pr9757", "after"))
    ),
    *(
        _case(f"spec-11-2-{name}", layout).plays(
            "admit 0 13; decode 0 *8",
            "OWN-3 LEN-1 LEN-2 BAL-1",
            f"SPEC.md, example {which}: 13 tokens in pages of 2 on 4 ranks, {how}.",
        )
        for name, layout, which, how in (
            ("contiguous", "pr9757/1:C=4,T=2", "11.2", "contiguous, owner by step"),
            ("step", "pr13180/1:C=4,T=2", "11.2", "round-robin, owner by step"),
            ("position", "pr17866/1:C=4,T=2", "11.2 and 11.3", "round-robin, owner by position"),
        )
    ),
    _case("spec-11-4-capacity", "pr17866/1:C=4,T=32", 3).plays(
        "admit 0 385; admit 0 384; decode 0; release 0; admit 1 384",
        "PAGE-1 REF-2 PAGE-5",
        "SPEC.md, example 11.4: 3 pages of 32 on 4 ranks hold 384 global tokens, not 400.",
    ),
    _case("spec-11-4-capacity-four-pages", "pr17866/1:C=4,T=32", 4).plays(
        "admit 0 401; decode 0; release 0; admit 1 513; admit 1 512",
        "PAGE-1 REF-2",
        "SPEC.md, example 11.4: 401 global tokens need 4 pages on each rank.",
    ),
    _case("spec-11-5-rotated-start", "balanced/1:C=4,T=2").plays(
        "admit 0 3; admit 1 3; admit 2 3; admit 3 3; decode 0 1 2 3; admit 4 3; decode 4",
        "BAL-3 OWN-3 LEN-1",
        "SPEC.md, example 11.5: four equal requests put 4 tokens on each rank.",
    ),
    _case("spec-11-6-group-over-a-boundary", "vllm_dcp/1:C=2,T=4,I=2").plays(
        "admit 7 5; decode 7:4; accept 7 2; decode 7",
        "OWN-2 LEN-3 PAGE-1",
        "SPEC.md, example 11.6: a group that straddles ranks and pages, half kept.",
    ),
    _case("spec-11-7-copy-on-write", "pr9757/1:C=2,T=4", 3).plays(
        "admit 0 2; fork 0 1; fork 0 2; decode 2 0 1",
        "PAGE-2 GROW-1 PAGE-3",
        "SPEC.md, example 11.7: two holders copy, the last writes in place.",
    ),
    _case("spec-11-7-copy-refused", "pr9757/1:C=2,T=4", [2, 9]).plays(
        "admit 0 2; fork 0 1; fork 0 2; decode 2 0 1; decode 2 0; decode 2",
        "REF-2 PAGE-5 PAGE-3",
        "SPEC.md, example 11.7 with one free page: the batch is refused whole, and nobody has "
        "copied. One copy alone still fits.",
    ),
    _cache(
        "spec-11-8-identities-and-values", "pr9757/1:C=2,T=16", 2, layers=2, max_len=17, seed=7
    ).plays(
        "admit 4 16; admit 4 9; admit 5 3; decode 5:2 4",
        "OWN-1 POS-2",
        "SPEC.md, example 11.8: which token is which, and what its row holds.",
    ),
    _attention("spec-11-9-heads", "pr9757/1:C=2,T=2", 20, q_heads=8, kv_heads=4, tp_size=2).plays(
        "admit 0 3; decode 0",
        "MAP-1 ATT-1 ATT-4 OWN-1",
        "SPEC.md, example 11.9: which rank caches, attends and holds which heads.",
    ),
    _case("spec-11-10-which-reason", "pr9757/1:C=1,T=4").plays(
        "admit 1 3; decode 1; admit 2 2; preempt 2; decode 3 2; decode 2 3; decode 3 3; "
        "decode 3 3:0; accept 3 0; accept 3 1; accept 1 2; accept 1 1 *2; admit 2 0; resume 1; "
        "sampled",
        "REF-2",
        "SPEC.md, example 11.10: which of several reasons is given.",
    ),
    # Refusals.
    _case("refusals", "pr9757/1:C=2,T=2", max_len=6).plays(
        "decode 0; release 0; admit 0 0; admit 0 7; admit 0 6; decode 0; skip 0; admit 0 7; "
        "admit 0 0; decode; decode 0:; decode 0:0; decode 0:-1; decode 0 pad -1; decode 0 0; "
        "decode 0 9; skip 9; skip; release 0; decode 0; admit 0 5; decode 0",
        "REF-1 REF-2 PAGE-5",
        "Every reason that needs no feature, before and after a request is known.",
    ),
    _case("refusals-out-of-pages", "pr9757/1:C=2,T=2", [1, 2], max_len=50).plays(
        "admit 0 7; admit 0 4; admit 1 1; decode 0; skip 0; release 0; admit 1 1; decode 1 *5",
        "REF-1 REF-2 PAGE-3 PAGE-5 POS-1",
        "One rank's pool is smaller: all ranks refuse when it alone is short.",
        "A refused step takes nothing and advances nothing.",
    ),
    _case("refusals-retried", "pr9757/1:C=2,T=1", 3).plays(
        "admit 0 2; admit 1 3; decode 0 *3; release 1; decode 0 *4",
        "OWN-3 POS-1 REF-2",
        "A step that was refused for want of pages is taken later, as if never tried.",
    ),
    _case("refusals-with-unlike-pools", "pr9757/1:C=2,T=2", [4, 1]).plays(
        "admit 0 8; admit 0 4; decode 0 *3; release 0; admit 0 1; decode 0 *5",
        "REF-1 REF-2",
        "Room on rank 0 says nothing of the others.",
    ),
    _case("refusals-to-the-last-page", "pr9757/1:C=2,T=1", [10, 12]).plays(
        "admit 0 18; decode 0 *4; release 0; admit 0 1; decode 0 *19",
        "REF-1 REF-2 PAGE-3",
        "The last page of a pool is used; 1 - 9/10 is less than 1/10 in floats.",
    ),
    _case("near-max-len-in-lockstep", "vllm_dcp/1:C=2,T=2,I=1", 9, max_len=7).plays(
        "admit 0 4; admit 1 3; decode 0; decode 1; decode 0 *2; decode 1 *3; decode 0",
        "PAGE-2 GROW-1 REF-2",
        "max_len is not a whole number of super-blocks: the last one needs room, too.",
    ),
    _case("refusals-take-no-admission-number", "balanced/1:C=3,T=2", 2).plays(
        "admit 0 0; admit 0 3 *2; admit 1 20; admit 1 3; decode 1",
        "LEN-1 REF-2",
        "Only accepted admissions move the start on.",
    ),
    _case("refusals-lockstep", "vllm_dcp/1:C=2,T=2,I=1", [2, 3]).plays(
        "admit 0 3; decode 0 *6; release 0; admit 1 9; admit 1 8",
        "REF-1 REF-2 PAGE-1",
        "Under lockstep all ranks need a page when one does.",
    ),
    _case("refusals-of-features", "pr9757/1:C=2,T=2", 4, max_len=12).plays(
        "admit 0 2; accept 0 1; decode 0:3; accept 0 4; accept 0 0; fork 0 0; fork 9 1; fork 9 0; "
        "resume 0; resume 9; preempt 9; fork 0 1; accept 0 1; accept 1 1; preempt 1 *2; fork 1 2; "
        "decode 1; skip 1; accept 1 1; decode 0:8; decode 0:7; release 1 *2",
        "REF-2 PAGE-5",
        "Reasons around groups, forks and preemption.",
    ),
    _case("refusals-large-ids", "pr9757/1:C=2,T=2").plays(
        f"admit 0 3; admit {2**32} 5; decode {2**32} 0; release 0; admit {2**53} 2; "
        f"decode {2**53} {2**32}",
        "REF-2 LEN-1",
        "Ids beyond 32 bits are other requests than their low bits.",
    ),
    # Configurations with which no engine may start.
    _start(
        "lockstep-with-step",
        "lockstep with these rules leaves a rank without a page that it needs",
        "custom/1:prompt=round_robin,owner=step,pages=lockstep,start=rank_zero,C=2,T=2",
    ),
    _start(
        "lockstep-with-two-interleaves",
        "under lockstep prompt and decode must interleave alike",
        "custom/1:prompt=interleave(1),owner=interleave(2),pages=lockstep,start=rank_zero,C=2,T=2",
    ),
    _start(
        "interleave-does-not-divide", "3 tokens do not divide pages of 4", "vllm_dcp/1:C=2,T=4,I=3"
    ),
    _start(
        "interleave-exceeds-the-page",
        "an interleave of 8 tokens is larger than a page of 4",
        "vllm_dcp/1:C=2,T=4,I=8",
    ),
    _start("a-pool-too-few", "pages lists one pool for two ranks", pages=[5]),
    _start("an-empty-pool", "a pool holds no page", pages=[5, 0]),
    _start("query-heads", "3 query heads do not divide over 2 ranks", q_heads=3, kv_heads=3),
    _start("kv-heads", "3 KV heads do not divide 4 query heads", kv_heads=3),
    _start("head-dim", "RoPE turns pairs", head_dim=15),
    _start("rope-base", "rope_base is not above 1", rope_base=1.0),
    # Steps, batches and speculative groups.
    _case("skip", "pr9757/1:C=2,T=1", 4).plays(
        "admit 0 3; skip 0 *2; decode 0; skip 0; decode 0 *2",
        "OWN-3 POS-1 PAGE-3 PAGE-5",
        "A step that is prepared and never runs changes nothing.",
    ),
    _case("batch-order", "pr13180/1:C=2,T=2", 6).plays(
        "admit 0 2; admit 1 3; admit 2 4; decode 2 0 1; decode 1; decode 0 1 2; decode 2 1",
        "LEN-2 POS-1 OWN-3",
        "Columns follow the order of the batch; requests keep steps of their own.",
    ),
    *(
        _case("groups-{layout}", layout, 9).plays(
            "admit 0 3; admit 1 1; decode 0:5 1:2; accept 0 3; decode 1:3 0:4; accept 0 4; "
            "accept 1 1; skip 0:6; decode 0; accept 0 1; decode 0:7 1; decode 0",
            "OWN-2 OWN-3 LEN-3 PAGE-1 PAGE-3 POS-1",
            "Speculative groups over ownership and page boundaries, kept in part, whole, or closed "
            "by the next decode; pages of rewound tokens go back.",
        )
        for layout in (
            "pr9757/1:C=2,T=2",
            "pr17866/1:C=2,T=2",
            "vllm_dcp/1:C=3,T=2,I=1",
            "balanced/1:C=2,T=2",
        )
    ),
    _case("groups-and-skip", "pr9757/1:C=2,T=2", 9).plays(
        "admit 0 3; decode 0:3; skip 0; accept 0 1; decode 0",
        "REF-2",
        "A skipped step does not close the group before it.",
    ),
    # Forks.
    *(
        _case("fork-{layout}", layout, 9).plays(
            "admit 0 3; decode 0; fork 0 1; fork 1 2; decode 1; decode 0 2; release 0; "
            "decode 1 2; admit 0 4; release 1; decode 2 0; release 2",
            "PAGE-1 PAGE-2 PAGE-3 GROW-1",
            "Forks share pages, whoever writes first copies, a parent's release frees nothing that "
            "a child still holds.",
        )
        for layout in (
            "pr9757/1:C=2,T=4",
            "pr17866/1:C=2,T=2",
            "vllm_dcp/1:C=2,T=4,I=1",
            "balanced/1:C=2,T=4",
        )
    ),
    _case("fork-of-a-full-page", "pr9757/1:C=2,T=2", 4).plays(
        "admit 0 2; fork 0 1; decode 0 1 *2",
        "PAGE-2 PAGE-3 GROW-1",
        "Where the shared page is full, nothing is copied.",
    ),
    _case("fork-then-sole-holder", "pr9757/1:C=2,T=4", 4).plays(
        "admit 0 2; fork 0 1; release 1; decode 0; fork 0 2; release 0; decode 2",
        "GROW-1 PAGE-3",
        "A page that nobody else holds any more is written in place.",
    ),
    _case("fork-keeps-the-shift", "balanced/1:C=3,T=1").plays(
        "admit 0 1; admit 1 1; fork 1 2; admit 3 1; decode 2 3 1",
        "OWN-3 LEN-1",
        "A child starts where its parent did and takes no admission number.",
    ),
    _case("fork-and-groups", "pr9757/1:C=2,T=4", 9).plays(
        "admit 0 2; decode 0:2; fork 0 1; decode 0:3; accept 0 1; decode 1:3; accept 1 2; "
        "decode 0 1",
        "PAGE-1 PAGE-2 PAGE-3 GROW-1",
        "A page that was copied stays copied when its tokens are rewound.",
    ),
    _case("fork-and-preempt", "pr9757/1:C=2,T=4", 9).plays(
        "admit 0 6; fork 0 1; preempt 0; decode 1; resume 0; decode 0 1; preempt 1; release 1; "
        "decode 0",
        "PAGE-2 PAGE-3",
        "Preempting a parent leaves the child its pages; resumed, it shares none.",
    ),
    # Preemption.
    *(
        _case("preempt-{layout}", layout, 9).plays(
            "admit 0 3; admit 1 2; decode 0 *3; preempt 0; decode 1; resume 0; decode 0 *3; "
            "preempt 0; resume 0; admit 2 1; decode 0 2 1",
            "OWN-3 LEN-1 POS-1 PAGE-3 BAL-2",
            "A resumed request is placed as a prompt of all its tokens; its steps begin anew, its "
            "positions go on.",
        )
        for layout in (*_TRTLLM, "vllm_dcp/1:C=2,T=2,I=1", "balanced/1:C=3,T=1")
    ),
    _case("preempt-for-want-of-pages", "pr9757/1:C=2,T=2", 2).plays(
        "admit 0 5; preempt 0; admit 1 4; resume 0; decode 0; release 1; resume 0; decode 0; "
        "preempt 0; release 0; admit 0 2",
        "REF-2 PAGE-3 PAGE-5",
        "Refused for want of pages, a request stays preempted; so it may be released.",
    ),
    # One step ahead of sampling.
    _case("overlap", "pr9757/1:C=2,T=2", 9, overlap=True).plays(
        "admit 0 3; sampled 0; decode 0 *3; skip 0; sampled 0; decode 0; sampled 0 *3; decode 0; "
        "sampled; sampled 0 0; sampled 9; sampled 0; decode 0",
        "POS-1 OWN-3 OWN-1 REF-2",
        "One step ahead of sampling: nothing depends on when tokens are learned.",
    ),
    _case("overlap-batches", "pr13180/1:C=2,T=1", 9, overlap=True).plays(
        "admit 0 2; admit 1 1; decode 0 1; decode 1; sampled 1; decode 0 1; sampled 0 1; "
        "decode 0 1; release 0; sampled 1; decode 1",
        "POS-1 OWN-3",
        "Each request is as far behind as its own decodes.",
    ),
    _case("overlap-groups", "pr9757/1:C=2,T=2", 9, overlap=True).plays(
        "admit 0 3; decode 0:3; accept 0 2; sampled 0; accept 0 2 *2; decode 0:2 *2; sampled 0; "
        "accept 0 1; sampled 0; accept 0 1; decode 0",
        "REF-2 POS-1",
        "A group is kept or rewound once all decodes of its request are sampled.",
    ),
    _case("overlap-preempt-and-fork", "pr9757/1:C=2,T=2", 9, overlap=True).plays(
        "admit 0 3; decode 0; fork 0 1; sampled 1; decode 1; preempt 0; sampled 0; resume 0; "
        "sampled 0; decode 0 1; sampled 0 1",
        "REF-2",
        "A fork's child has nothing outstanding; preempting forgets what is.",
    ),
    # Dummy requests.
    _case("padding", "pr9757/1:C=2,T=2", 4).plays(
        "admit 0 3; admit 1 2; decode 0 pad 3; decode 1 0 pad 1; decode 0 pad 2; decode 0",
        "DUM-1 PAGE-3 POS-1",
        "Dummy requests fill the batch and change nothing.",
    ),
    _case("padding-in-a-full-pool", "vllm_dcp/1:C=2,T=2,I=1", 2).plays(
        "admit 0 3; admit 1 4; decode 0 pad 7; decode 1 pad 7; release 0; decode 1 pad 7",
        "DUM-1 PAGE-3 REF-2",
        "Dummies need no page, not even where none is free.",
    ),
    # Cache groups.
    *(
        _case("cache-groups-{layout}", layout, 12, groups=[_ALL, _NEAR]).plays(
            "admit 0 5; decode 0 *3; decode 0:3; accept 0 1; decode 0 *4; release 0; admit 0 1; "
            "decode 0 *6",
            "REP-1 POOL-1 WIN-1 WIN-2 PAGE-1 LEN-3",
            "A sharded group beside a replicated one with a window of 3, in one pool.",
            "While a group of tokens is open its rewind decides which pages are behind the window.",
        )
        for layout in (*_TRTLLM, "vllm_dcp/1:C=2,T=2,I=1", "balanced/1:C=2,T=2")
    ),
    _case(
        "cache-groups-sharded-window",
        "pr9757/1:C=2,T=2",
        9,
        groups=[_set(_NEAR, placement="sharded", window=5)],
    ).plays(
        "admit 0 9; decode 0 *4; fork 0 1; decode 0 1 *3; preempt 0; resume 0; decode 1:4 0; "
        "accept 1 2; decode 1",
        "WIN-1 WIN-2 PAGE-2 PAGE-3 GROW-1",
        "Each rank gives a page back when its own last row is behind the window.",
        "Forks share what is left; a resume places all tokens anew.",
    ),
    _case(
        "cache-groups-lockstep-window",
        "vllm_dcp/1:C=2,T=2,I=1",
        9,
        groups=[_set(_NEAR, placement="sharded", window=4)],
    ).plays(
        "admit 0 7; decode 0 *6; decode 0:3; accept 0 1; decode 0",
        "WIN-1 WIN-2 PAGE-1",
        "Under lockstep the pages of a super-block go back on all ranks at once.",
    ),
    _case(
        "cache-groups-of-two-windows",
        "pr13180/1:C=2,T=2",
        12,
        groups=[_NEAR, _set(_NEAR, name="far", placement="sharded", window=5)],
    ).plays(
        "admit 0 7; decode 0 *5; decode 0:2; accept 0 1; decode 0",
        "WIN-1 WIN-2",
        "Each group has a window of its own.",
    ),
    _case(
        "cache-groups-resumed-for-want-of-pages",
        "pr9757/1:C=2,T=2",
        4,
        groups=[_set(_NEAR, placement="sharded", window=1)],
    ).plays(
        "admit 0 13; preempt 0; admit 1 1; resume 0; release 1; resume 0; decode 0",
        "REF-2 PAGE-3",
        "A resume takes pages for all tokens, also for those that the window leaves behind.",
    ),
    _case(
        "cache-groups-of-two-pools",
        "pr17866/1:C=2,T=2",
        [4, 3],
        layers=2,
        groups=[_ALL, _set(_NEAR, layers=[1], pool="second", tokens_per_block=4)],
        pools={"second": [3, 4]},
    ).plays(
        "admit 0 5; admit 1 9; decode 0 *4; admit 1 3; decode 0 1; release 0; admit 2 12; "
        "admit 2 4",
        "POOL-1 PAGE-1 PAGE-3 REF-2",
        "Each pool has sizes of its own; an event is refused for want of pages in either.",
    ),
    _case(
        "cache-groups-that-exhaust-a-pool",
        "pr13180/1:C=2,T=2",
        [6, 5],
        groups=[_ALL, _set(_NEAR, window=None)],
    ).plays(
        "admit 0 5; decode 0:2; admit 1 3; decode 0; release 0; admit 1 6; decode 1",
        "POOL-1 REF-2 PAGE-5",
        "The need of an event is that of all groups of the pool together.",
    ),
    _case("start-a-group-without-a-layer", "pr9757/1:C=2,T=2", layers=2, groups=[_ALL]).plays(
        "", "REF-2", "No cache group names layer 1."
    ),
    _case(
        "start-a-pool-that-is-not-there", "pr9757/1:C=2,T=2", groups=[_set(_ALL, pool="second")]
    ).plays("", "REF-2", "A cache group names a pool of which no sizes are given."),
    # Cached rows.
    _cache("cache-of-turns", "pr9757/1:C=2,T=2").plays(
        "admit 0 5; decode 0 *6; release 0; admit 0 3; decode 0",
        "OWN-1 POS-2 PAGE-4",
        "Rows hold the very tokens, turned by their global positions.",
        "An id that is admitted again has other values.",
    ),
    *(
        _cache("cache-of-{layout}", layout).plays(
            "admit 0 1; admit 1 7; decode 0 1; decode 1 0; decode 1",
            "OWN-1 POS-2 PAGE-4",
            "Contents follow the same split as lengths.",
        )
        for layout in (*_TRTLLM[1:], "vllm_dcp/1:C=2,T=4,I=2", "balanced/1:C=2,T=2")
    ),
    _cache("cache-in-bfloat16", "pr9757/1:C=2,T=2", head_dim=8, dtype="bfloat16", seed=3).plays(
        "admit 0 5; decode 0", "OWN-1 POS-2", "Entries are rounded once to the type of the cache."
    ),
    _cache("cache-of-groups", "pr9757/1:C=2,T=2").plays(
        "admit 0 3; decode 0:5; accept 0 1; decode 0:2; accept 0 2; decode 0:3",
        "OWN-1 PAGE-4",
        "A position that is decoded again after a rewind holds another token.",
    ),
    _cache("cache-of-forks", "pr9757/1:C=2,T=4").plays(
        "admit 0 2; fork 0 1; fork 0 2; decode 2 0; decode 1; release 0; decode 1 2",
        "OWN-1 PAGE-2",
        "A copied page has the earlier tokens; the others keep what they had.",
    ),
    _cache("cache-of-lockstep-forks", "vllm_dcp/1:C=2,T=4,I=1").plays(
        "admit 0 3; fork 0 1; decode 1; decode 0 1",
        "OWN-1 PAGE-2",
        "Under lockstep every rank copies its page of the super-block.",
    ),
    _cache("cache-of-a-resumed-request", "pr13180/1:C=2,T=2").plays(
        "admit 0 3; decode 0 *2; preempt 0; admit 1 2; resume 0; decode 0 *2",
        "OWN-1 POS-2",
        "Resumed tokens keep identity and position, and lie where a prompt's would.",
    ),
    _cache("cache-beside-dummies", "pr9757/1:C=2,T=2", 3).plays(
        "admit 0 1; admit 1 2; decode 0 pad 3; decode 1 pad 2; release 0; admit 2 2; "
        "decode 2 pad 1",
        "DUM-1 PAGE-4 OWN-1",
        "Dummy requests write into no request's slots.",
    ),
    _cache("cache-one-step-ahead", "pr9757/1:C=2,T=2", overlap=True).plays(
        "admit 0 3; decode 0 *2; sampled 0; decode 0; sampled 0",
        "OWN-1 POS-1 POS-2",
        "With overlap no position and no slot is used twice.",
    ),
    # Attention.
    _attention("attention-empty-ranks", "pr9757/1:C=3,T=2", kv_heads=1).plays(
        "admit 0 1; decode 0 *3",
        "ATT-1 ATT-3 ATT-4 LEN-3 LIVE-1",
        "Ranks without keys count for nothing, whatever their memory holds.",
        "They take part in the exchange like any other.",
    ),
    _attention("attention-unequal-ranks", "pr9757/1:C=2,T=8").plays(
        "admit 0 9; decode 0 *2",
        "ATT-1 ATT-4 MAP-1",
        "Eight and more keys against one: a mean of partials is far off.",
    ),
    _attention("attention-of-a-longer-sequence", "pr9757/1:C=2,T=32", rows=False).plays(
        "admit 0 60; decode 0 *2",
        "ATT-1",
        "More keys than are gathered at a time.",
        "Cached rows are not written down.",
    ),
    _attention(
        "attention-in-two-layers", "pr9757/1:C=2,T=2", layers=2, q_heads=2, kv_heads=1
    ).plays("admit 0 1; decode 0 *2", "OWN-1 ATT-1", "Every layer is appended to, and attends."),
    _attention("attention-many-heads-each", "pr13180/1:C=2,T=2", kv_heads=4).plays(
        "admit 0 3; admit 1 4; decode 1 0",
        "ATT-1 MAP-1",
        "As many KV heads as query heads; probes alternate with the position.",
    ),
    _attention("attention-of-a-group", "pr9757/1:C=2,T=2").plays(
        "admit 0 3; decode 0:3; accept 0 1; decode 0:2",
        "LEN-3 ATT-1",
        "Each query of a group sees its own past alone.",
    ),
    _attention("attention-in-bfloat16", "pr9757/1:C=2,T=2", **_BFLOAT16).plays(
        "admit 0 6; decode 0 *2",
        "ATT-1 ATT-4",
        "The bound is that of the types, partial outputs rounded for the wire.",
    ),
    _attention("attention-partials-in-float32", "pr9757/1:C=2,T=2", seed=1).plays(
        "admit 0 12; decode 0",
        "ATT-4",
        "Partials that travel in less than the declared type are outside the bound.",
    ),
    _attention("attention-on-one-rank", "pr9757/1:C=1,T=2", kv_heads=1).plays(
        "admit 0 3; admit 1 1; decode 0 1",
        "ATT-1 LEN-3",
        "With one rank the merge is that rank's own output, for every request.",
    ),
    _attention("attention-tp-and-cp", "vllm_dcp/1:C=2,T=2,I=1", tp_size=2).plays(
        "admit 0 2; decode 0 *2", "MAP-1 ATT-1 OWN-2", "cp_rank varies fastest."
    ),
    _attention("attention-beside-dummies", "pr9757/1:C=2,T=2").plays(
        "admit 0 3; admit 1 2; decode 0 1; decode 1 pad 3; decode 0 pad 1",
        "DUM-1 ATT-1",
        "Dummy requests change no output.",
    ),
    _attention("attention-after-a-fork", "pr17866/1:C=2,T=2").plays(
        "admit 0 3; fork 0 1; decode 0 1", "ATT-1 PAGE-2", "Parent and child see their own tokens."
    ),
    _attention(
        "attention-of-eighteen-heads", "pr9757/1:C=2,T=2", q_heads=18, kv_heads=1, head_dim=4
    ).plays(
        "admit 0 5; decode 0",
        "ATT-1",
        "More query heads than the sixteen for which some kernels write a log-sum-exp.",
    ),
    _attention("attention-of-a-batch-with-empty-ranks", "pr9757/1:C=2,T=4", head_dim=8).plays(
        "admit 0 2; admit 1 7; admit 2 1; decode 0 1 2",
        "ATT-1 ATT-3",
        "Rows without keys on a rank stand before, and behind, one that has some.",
    ),
    _attention("attention-with-a-scale", "pr9757/1:C=2,T=2", head_dim=8, scale=0.75).plays(
        "admit 0 4; decode 0", "ATT-1", "The factor of the scores is given, and not 1/sqrt(8)."
    ),
    _attention("attention-with-sinks", "pr9757/1:C=2,T=2", head_dim=8, sinks=True).plays(
        "admit 0 1; decode 0 *3",
        "ATT-1",
        "Each query head's sink counts once: not on every rank, nor on an empty one.",
    ),
    _attention("attention-without-rope", "pr9757/1:C=2,T=2", head_dim=8, rope=None).plays(
        "admit 0 3; decode 0 *2",
        "POS-2 OWN-1 ATT-1",
        "Q and K are supplied as they are cached: nobody rotates them.",
    ),
    _attention(
        "attention-of-a-latent-alone",
        "pr9757/1:C=2,T=2",
        kv_heads=1,
        latent=LatentShape(latent_dim=8, rope_dim=0),
    ).plays(
        "admit 0 3; decode 0 *2",
        "OWN-1 ATT-1",
        "A latent without a part to rotate; each token is written by one rank.",
    ),
    # Merges.
    *MERGES,
]
"""All cases, in the order in which they are best read."""
