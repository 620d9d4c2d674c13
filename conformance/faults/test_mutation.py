"""What `make mutation` makes of mistakes that are known: it must notice them, and no others."""

from __future__ import annotations

import pytest

pytest.importorskip("cosmic_ray", reason="mutation testing comes with the extra `mutation`")

from faults import mutation

RIGHT = (mutation.PACKAGE / "transfer.py").read_text()


def mistake(was: str, becomes: str) -> mutation.Mistake:
    """This change of `transfer.py`."""
    assert was in RIGHT
    return mutation.Mistake("transfer", "ours", 0, was, becomes, RIGHT.replace(was, becomes))


def test_each_mistake_meets_its_fate() -> None:
    """What changes nothing survives; what is wrong, cannot be loaded, loops or hoards does not."""
    mistakes = [
        mistake("if left > tokens:", "if left != tokens:"),
        mistake("index + tokens", "index"),
        mistake("def transfer", "from nowhere import nothing\ndef transfer"),
        mistake("while giving:", "while True:\n        continue\n    while giving:"),
        mistake("moves = list[Move]()", "moves = [None] * 2**40"),
    ]
    trials = mutation.Trials("transfer", [])
    fates = {mistake.becomes: how for mistake, how in trials.of(mistakes)}
    assert [fates[m.becomes] for m in mistakes] == [None, "tests", "tests", "time", "tests"]
    assert trials.noticed.total() == 3


def test_a_run_goes_on_where_it_stopped(tmp_path: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fates that are kept are not tried again, unless what they were tried with has changed."""
    monkeypatch.setattr(mutation, "KEPT", mutation.Path(str(tmp_path), "kept", "fates.jsonl"))
    found = [mistake("while giving:", f"while giving:  # {number}") for number in range(3)]
    tried: list[mutation.Mistake] = []

    class Untried:
        def __init__(self, *_: object) -> None: ...

        def of(self, mistakes: list[mutation.Mistake]) -> list[tuple[mutation.Mistake, None]]:
            tried.extend(mistakes)
            return [(mistake, None) for mistake in mistakes]

    monkeypatch.setattr(mutation, "Trials", Untried)
    assert len(list(mutation.fates_of("transfer", found[:2], []))) == 2
    with mutation.KEPT.open("ab") as cut_off:
        cut_off.write(b'{"state": "0123')
    assert {*found} == {mistake for mistake, _ in mutation.fates_of("transfer", found, [])}
    assert found == tried
    monkeypatch.setattr(mutation, "state_of", lambda module: "other sources")
    list(mutation.fates_of("transfer", found, []))
    assert len(tried) == 6
