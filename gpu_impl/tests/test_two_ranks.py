"""Two gloo ranks that are told different things, or wrong ones: a sentence on both, or it is right.

`two_ranks` is what each of them does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

SENTENCES = {"Refused", "StepError", "ValueError", "RanksDisagree"}
FAILURES = {"OSError", "MemoryError"}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found. Both end by themselves, in time, and are not aborted."""
    folder = tmp_path_factory.mktemp("ranks")
    program = Path(__file__).with_name("two_ranks.py")
    ranks = [
        subprocess.Popen(
            [sys.executable, program, str(rank), folder], stderr=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    try:
        errors = [rank.communicate(timeout=100)[1] for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    assert [rank.returncode for rank in ranks] == [0, 0], "\n".join(errors)
    results = [json.loads((folder / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, result in enumerate(results):
        result["exit"] = (folder / f"{rank}.exit").read_text()
    return results


CONFIGURED = "differs between the ranks in "


@pytest.mark.parametrize(
    ("what", "sentence"),
    [
        (
            "mesh of two layouts",
            "What helix_mesh is given differs between the ranks in layout (rank 0: "
            "pr9757/1:C=2,T=2; rank 1: pr17866/1:C=2,T=2).",
        ),
        (
            "caches of two lengths",
            "What HelixCache.on is given differs between the ranks in max_len (rank 0: 40; rank "
            "1: 41).",
        ),
        (
            "caches of two ropes",
            "What HelixCache.on is given differs between the ranks in rope (rank 0: config; rank "
            "1: None).",
        ),
        (
            "prompts of two lengths",
            "What the ranks do next differs between the ranks in call (rank 0: admit(0, 7); rank "
            "1: admit(0, 8)).",
        ),
        (
            "ids in two orders",
            "What the ranks do next differs between the ranks in call (rank 0: begin([0, 1], None, "
            "0); rank 1: begin([1, 0], None, 0)).",
        ),
        (
            "two batches",
            "What the ranks do next differs between the ranks in call (rank 0: begin([0], None, "
            "0); rank 1: begin([1, 0], None, 0)).",
        ),
        (
            "two calls",
            "What the ranks do next differs between the ranks in call (rank 0: fork(0, 2); rank "
            "1: release(0)).",
        ),
    ],
)
def test_what_differs_is_named_on_both(
    what: str, sentence: str, found: list[dict[str, Any]]
) -> None:
    """The point in which they differ, and which rank says what."""
    for rank in found:
        assert rank["disagreements"][what] == {"error": "RanksDisagree", "text": sentence}


@pytest.mark.parametrize(
    ("what", "own", "text"),
    [
        ("mesh of a wrong configuration", "Refused", "pages is 64; it must be a list."),
        ("a prompt that one rank cannot have", "OSError", "the peer is gone."),
        ("a resumption that one rank cannot have", "OSError", "the peer is gone."),
        ("a wrong tensor", "ValueError", "Q is torch.float32 (2, 2, 3, 8); it must be"),
        ("an error in the middle", "MemoryError", "no memory here."),
    ],
)
def test_an_error_of_one_rank_ends_the_call_on_both(
    what: str, own: str, text: str, found: list[dict[str, Any]]
) -> None:
    """The rank raises its own error, its peer one that names the rank and quotes it."""
    first, second = (rank["disagreements"][what] for rank in found)
    assert first["error"] == "RanksDisagree"
    assert f"rank 1: {own}: {text}" in first["text"]
    expected = "RanksDisagree" if what.startswith("mesh") else own
    assert (second["error"], text in second["text"]) == (expected, True)


def test_after_a_disagreement_all_goes_on(found: list[dict[str, Any]]) -> None:
    """Nothing has changed on either rank, and the right call is done."""
    for rank in found:
        said = rank["disagreements"]
        assert said["unchanged by admissions"]
        assert said["unchanged by a resumption"]
        assert said["unchanged by calls"]
        assert said["afterwards"] == {"error": None, "text": ""}


@pytest.mark.holds("REF-1", "REF-2", "ATT-1")
def test_random_calls_are_refused_or_right(found: list[dict[str, Any]]) -> None:
    """Whatever is called: the same on both ranks, a sentence that changes nothing, or it is right.

    Where one rank is told something else, or fails, no rank does anything.
    """
    done = 0
    for first, second in zip(*(rank["calls"] for rank in found), strict=True):
        for result in (first, second):
            if result["error"] is None:
                done += 1
                continue
            assert result["error"] in SENTENCES | FAILURES, result
            assert result["text"].endswith("."), result
            assert result["unchanged"] or result["name"] == "layers", result
        assert (first["error"] is None) == (second["error"] is None), (first, second)
        if first["twist"] is None:
            assert (first["error"], first["text"]) == (second["error"], second["text"])
    assert done > len(found[0]["calls"]) // 3


@pytest.mark.holds("OWN-1")
def test_after_random_calls_each_request_has_its_own_tokens(found: list[dict[str, Any]]) -> None:
    """Each token of each request is on one rank, with its own K and V."""
    seen = 0
    for (mine, lens), (theirs, _) in zip(*(rank["places"] for rank in found), strict=True):
        assert mine.keys() == theirs.keys()
        for id in mine:
            assert sorted(mine[id] + theirs[id]) == list(range(lens[id]))
            seen += lens[id]
    assert seen > 50


@pytest.mark.holds("ATT-1", "REP-1", "WIN-1", "WIN-2")
def test_cache_groups_attend_on_gloo(found: list[dict[str, Any]]) -> None:
    """Sharded, replicated and windowed groups, whose layers exchange what is sharded alone."""
    assert [rank["groups"] for rank in found] == [{"error": None, "text": ""}] * 2


def test_a_cache_in_a_circle_lets_its_group_go(found: list[dict[str, Any]]) -> None:
    """At the end of the program at the latest, though nobody closed it; torch may abort else."""
    assert [rank["exit"] for rank in found] == ["[[None, None]]"] * 2
