"""`helix-conformance probe`: what it proposes is where the engine works."""

from __future__ import annotations

import json
from typing import Any, ClassVar

import msgspec
import pytest
from click.testing import CliRunner

from helix_conformance.cli import main
from helix_conformance.drive.in_process import LocalDriver
from helix_conformance.engines.gpu import LedgerEngine
from helix_conformance.probe import NothingStartsError, beyond, probe, proposal
from helix_spec.capabilities import Box, boxes_around, boxes_of
from helix_spec.config import Config
from helix_spec.engine import Outcome
from helix_spec.events import Admit, Event, Reason


class Undeclared(LedgerEngine):
    """Refuses what `limits` leave out, and does not say so."""

    limits: ClassVar[Any] = None

    def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
        inside = boxes_around(boxes_of(self.limits), config)
        return super().start(config, profiles) if inside else Outcome(reason=Reason.BAD_CONFIG)


def proposed(limits: Any, around: Config | None = None) -> list[dict[str, Any]]:
    """The proposal for an engine with these limits, as JSON."""
    engine = type("Limited", (Undeclared,), {"limits": limits})
    driver = LocalDriver(engine)
    boxes = proposal(probe(driver, around))
    assert beyond(driver, boxes) == []
    return [msgspec.to_builtins(box) for box in boxes]


def test_an_engine_without_limits_needs_no_declaration() -> None:
    """One box, empty."""
    assert proposed(None) == [{}]


def test_what_is_refused_is_found() -> None:
    """Dimension by dimension, as the engine would have declared it."""
    limits = {
        "layouts": ["vllm_dcp", "balanced"],
        "cp_size": [2, 4],
        "tokens_per_block": [64],
        "interleave": [1],
        "head_dim": [128],
    }
    assert proposed(limits) == [limits]


def test_the_chunks_that_are_refused_are_found() -> None:
    """Prompts are computed as the engine cuts them, or in two or four tokens at a time."""

    class Cutting(LedgerEngine):
        def apply(self, event: Event) -> Outcome:
            if isinstance(event, Admit) and event.chunk not in (0, 2, 4):
                return Outcome(reason=Reason.UNSUPPORTED)
            return super().apply(event)

    [probed] = probe(
        LocalDriver(Cutting), Config(layout="pr9757/1:C=2,T=4", pages=[9] * 2, max_len=40)
    )
    assert probed.box() == Box(attention=["gqa"], chunk=[2, 4])


def test_two_kinds_of_attention_may_have_other_limits() -> None:
    """A box each."""
    both = [
        {"attention": ["gqa"], "tokens_per_block": [16]},
        {"attention": ["latent"], "tokens_per_block": [64]},
    ]
    assert proposed(both) == both


def test_an_engine_that_never_starts_is_told_so() -> None:
    """With the reason, and with what helps."""

    class Never(LedgerEngine):
        def start(self, config: Config, profiles: frozenset[str]) -> Outcome:
            return Outcome(reason=Reason.BAD_CONFIG)

    with pytest.raises(NothingStartsError, match=r"bad_config.*--around TRACE\.json"):
        probe(LocalDriver(Never))


def test_the_command_prints_a_declaration() -> None:
    """What was tried, and JSON that can be taken over."""
    result = CliRunner().invoke(main, ["probe", "--engine", "gpu", "--driver", "local"])
    assert result.exit_code == 0
    assert "tokens_per_block: works with 1, 2" in result.output
    [declaration] = [line for line in result.output.splitlines() if line.startswith("[")]
    assert boxes_of(json.loads(declaration)) == boxes_of([{}])
