"""What an engine works with: single changes around a configuration with which it starts.

The proposal is a declaration of capabilities (SPEC.md, 10.4). It says what was tried and worked,
and nothing about whether answers are right.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, get_args

import msgspec

from helix_conformance.drive.driver import Driver, EngineFailure
from helix_conformance.generate.choices import Seeded
from helix_conformance.generate.configs import draw_config
from helix_conformance.generate.narrowing import NothingInsideError
from helix_conformance.generate.sizes import REAL_SHAPES, SIZES, both
from helix_spec.capabilities import Box, values_of
from helix_spec.config import Admission, CacheDType, Config, DType
from helix_spec.engine import CUMULATIVE
from helix_spec.events import FEATURES, Admit, Decode, Event, Merge
from helix_spec.layouts import LAYOUT_NAMES, layout_name
from helix_spec.trace import EVERYTHING

TRIED: Final[dict[str, tuple[Any, ...]]] = {
    **{name: SIZES[name] for name in ("cp_size", "tp_size", "tokens_per_block")},
    "interleave": (1, 2, 4, 8, 16, 32, 64),
    "kv_heads": (1, 2, 3, 4, 8),
    **{name: SIZES[name] for name in ("q_heads_per_kv_head", "head_dim", "latent", "layers")},
    "dtype": get_args(DType),
    "cache_dtype": get_args(CacheDType),
    "product_dtype": get_args(DType),
    "partial_dtype": get_args(DType),
    "rope": ("half", "none"),
    "scale": ("default", "given"),
    "sinks": (False, True),
    "max_len": SIZES["max_len"],
    "overlap": (False, True),
    "admission": get_args(Admission),
    "query_len": (1, 2, 5, 8),
    "batch": (1, 2, 8, 64, 130),
    "chunk": (1, 2, 3, 4, 8),
}
"""What single changes are made to."""
_FOLLOWING: Final = {
    "cp_size": ("q_heads", "kv_heads", "q_heads_per_kv_head"),
    "tp_size": ("q_heads", "kv_heads", "q_heads_per_kv_head"),
    "kv_heads": ("q_heads", "q_heads_per_kv_head"),
    "q_heads_per_kv_head": ("q_heads",),
    "tokens_per_block": ("interleave",),
    "dtype": ("cache_dtype", "product_dtype", "partial_dtype"),
}
"""What may have to change with a dimension, the least to be expected first."""
ROOM: Final = 2 * max(TRIED["batch"])
"""Pages of each pool."""
_DRAWN: Final = 12
"""Configurations of one layout and shape that are tried until one works, and inside the result."""


class NothingStartsError(ValueError):
    """No configuration was found with which the engine starts."""


@dataclass
class Probed:
    """What single changes around one configuration showed.

    Parameters
    ----------
    config
        The configuration.
    worked, refused
        By dimension, the values with which the engine works, and with which it does not.
    """

    config: Config
    worked: dict[str, list[Any]] = field(default_factory=dict)
    refused: dict[str, list[Any]] = field(default_factory=dict)

    def box(self) -> Box:
        """Return the declaration: a dimension is left out where all that was tried works."""
        kind = values_of(self.config)["attention"]
        limits = {name: self.worked[name] for name, values in self.refused.items() if values}
        return Box(attention=kind, **limits)


def probe(
    driver: Driver, around: Config | None = None, tried: Callable[[], None] = lambda: None
) -> list[Probed]:
    """Start an engine on single changes around configurations that work.

    Parameters
    ----------
    driver
        The engine.
    around
        A configuration that works; None to look for one of each kind of attention. Where larger
        pools work too they are taken, so that they limit nothing.
    tried
        Called after each configuration.

    Returns
    -------
    list of Probed
        At least one.

    Raises
    ------
    NothingStartsError
        When no configuration works.

    Examples
    --------
    >>> from helix_conformance.drive.in_process import LocalDriver
    >>> from helix_conformance.engines import load_engine
    >>> [probed] = probe(LocalDriver(load_engine("gpu-ledger")), Config(
    ...     layout="pr9757/1:C=2,T=4", pages=[100, 100], max_len=200))
    >>> probed.refused["tokens_per_block"], probed.worked["dtype"]
    ([], ['float32', 'float16', 'bfloat16'])
    """
    trial = _Trial(driver, tried)
    if around is not None:
        if not trial.works(around):
            raise NothingStartsError(
                f"The engine does not start with the configuration given: {trial.why}."
            )
        roomy = msgspec.structs.replace(around, pages=[ROOM] * len(around.pages))
        return [trial.changed(roomy if trial.works(roomy) else around)]
    kinds = [config for kind in ("gqa", "latent") for config in trial.first(kind)]
    if not kinds:
        raise NothingStartsError(
            f"With none of {trial.count} configurations the engine starts, admits a prompt and "
            f"decodes a token ({trial.why}). Give one that works: --around TRACE.json."
        )
    return [trial.changed(config) for config in kinds]


def proposal(probed: Sequence[Probed]) -> list[Box]:
    """Return the declaration: one box where all kinds of attention have the same limits.

    Parameters
    ----------
    probed
        What `probe` returned.
    """
    boxes = [one.box() for one in probed]
    free = [msgspec.structs.replace(box, attention=None) for box in boxes]
    return free[:1] if len(free) > 1 and free[0] == free[1] else boxes


def beyond(driver: Driver, boxes: Sequence[Box]) -> list[Config]:
    """Return configurations inside a proposal with which the engine does not work after all.

    Single changes do not show what does not go together.

    Parameters
    ----------
    driver
        The engine.
    boxes
        The proposal.
    """
    trial = _Trial(driver)
    drawn = (trial.drawn(name, box, n) for box in boxes for name in LAYOUT_NAMES for n in range(4))
    return [config for config in drawn if config is not None and not trial.works(config)]


def probe_text(
    found: Sequence[Probed], boxes: Sequence[Box], failing: Sequence[Config]
) -> Iterator[str]:
    """Yield what was tried, and the declaration as JSON.

    Parameters
    ----------
    found
        What `probe` returned.
    boxes
        The proposal.
    failing
        Configurations inside it with which the engine does not work.

    Yields
    ------
    str
        A line.
    """
    for one in found:
        yield f"Around {one.config.layout}, {values_of(one.config)['attention'][0]}:"
        for name, refused in one.refused.items():
            worked = ", ".join(map(str, one.worked[name])) or "nothing else"
            but = f"; not with {', '.join(map(str, refused))}" if refused else ""
            yield f"  {name}: works with {worked}{but}"
    yield "Proposed capabilities, for `ready` as they stand and for a class attribute in Python:"
    yield msgspec.json.encode(list(boxes)).decode()
    if failing:
        yield (
            f"Single changes do not tell all: with {len(failing)} configurations inside the engine "
            f"does not work, {failing[0].layout} with head_dim {failing[0].model.head_dim} for one."
        )


class _Trial:
    """Configurations tried on one engine."""

    def __init__(self, driver: Driver, tried: Callable[[], None] = lambda: None) -> None:
        self.driver = driver
        self.tried = tried
        self.count = 0
        self.why = "nothing was tried"
        """Why the last one that did not work did not."""
        self.features = [feature for feature in FEATURES if feature in driver.profiles]

    def works(self, config: Config, events: Sequence[Event] | None = None) -> bool:
        """Whether the engine starts, admits a prompt and decodes a token, with no look at them."""
        self.count += 1
        self.tried()
        if events is None:
            events = [Admit(0, 5), Decode([0], [1])]
        if not set(CUMULATIVE) & self.driver.profiles:
            c = config.layout.cp_size
            events = [Merge([[0]] * c, list(range(c)))]
        try:
            for _, answers in self.driver.play(config, self.driver.profiles, events, EVERYTHING):
                reasons = [one.outcome.reason for one in answers if one.outcome.reason]
                if reasons:
                    self.why = f"the last one was refused with {reasons[0]}"
                    return False
        except EngineFailure as error:
            self.why = f"at the last one {str(error).rstrip('.').lower()}"
            if not self.driver.survives_failure:
                raise
            return False
        return True

    def drawn(self, layout: str, box: Box, number: int) -> Config | None:
        """A configuration of this layout inside the box; None where there is none."""
        world = self.driver.largest_world
        sizes = [size for size in SIZES["cp_size"] if world is None or size <= world]
        try:
            config = draw_config(
                Seeded(f"probe {layout} {number}"),
                names=[layout],
                cp_sizes=sizes,
                tp_sizes=SIZES["tp_size"],
                max_world=world or 16,
                features=self.features,
                box=box,
            )
        except NothingInsideError:
            return None
        return msgspec.structs.replace(config, pages=[ROOM] * len(config.pages))

    def first(self, kind: str) -> Iterator[Config]:
        """The first configuration of a kind of attention that works, if any does."""
        of_kind = Box(attention=[kind])  # type: ignore[list-item]
        sizes = [Box(interleave=[1], tokens_per_block=[t]) for t in (64, 16, 1, 4, 32, 128, 256)]
        plain = [both(of_kind, size) for size in (*sizes, Box(interleave=[1]))]
        real = [both(of_kind, shape) for shape in REAL_SHAPES]
        shapes = [*plain, *(shape and both(shape, Box(interleave=[1])) for shape in real), *real]
        for number in range(_DRAWN):
            for shape in shapes:
                for layout in LAYOUT_NAMES:
                    config = None if shape is None else self.drawn(layout, shape, number)
                    if config is not None and self.works(config):
                        yield config
                        return

    def changed(self, config: Config) -> Probed:
        """What single changes of a configuration that works show."""
        probed = Probed(config)
        own = layout_name(config.layout)
        for dimension, values in {"layouts": LAYOUT_NAMES, **TRIED}.items():
            worked, refused = list[Any](), list[Any]()
            for value in values:
                found = self._with(config, own, dimension, value)
                if found is not None:
                    (worked if found else refused).append(value)
            probed.worked[dimension], probed.refused[dimension] = worked, refused
        return probed

    def _with(self, config: Config, own: str, dimension: str, value: Any) -> bool | None:
        """Whether the engine works with one change; None where no configuration has it."""
        if dimension == "layouts":
            other = self._near(config, value, {}, ("interleave",))
            return None if other is None else self.works(other)
        if dimension == "query_len":
            if value > 1 and "speculative" not in self.driver.profiles:
                return None
            return self.works(config, [Admit(0, 1), Decode([0], [value])])
        if dimension == "batch":
            admits = [Admit(id, 1) for id in range(value)]
            return self.works(config, [*admits, Decode([*range(value)], [1] * value)])
        if dimension == "chunk":
            computed = self._near(config, own, {"admission": ["prefill"]}, ())
            if computed is None or not self.works(computed):
                return None
            return self.works(computed, [Admit(0, 5, value), Decode([0], [1])])
        if dimension == "latent" and config.model.latent is None:
            return None
        other = self._near(config, own, {dimension: [value]}, _FOLLOWING.get(dimension, ()))
        return None if other is None else self.works(other)

    def _near(
        self, config: Config, layout: str, change: dict[str, Any], following: Sequence[str]
    ) -> Config | None:
        """The configuration with a change, and with as few others as it needs."""
        pinned: dict[str, Any] = {name: given for name, given in values_of(config).items() if given}
        pinned.pop("pages")
        for freed in range(len(following) + 1):
            limits = {k: v for k, v in pinned.items() if k not in following[:freed]}
            found = self.drawn(layout, Box(**limits | change), 0)
            if found is not None:
                return found
        return None
