"""Cache groups over a configuration: random sets, and those of models as they ship."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

import msgspec

from helix_conformance.generate.choices import Choices
from helix_spec.capabilities import Box, outside
from helix_spec.config import MAIN_POOL, CacheGroup, Config, config_problem

GROUPED: Final = 4
"""One trace in so many has cache groups, of an engine that declares them."""
MAX_REQUEST: Final = 2000
"""Longer requests have none, for time."""
_TRIES: Final = 5


def with_groups(choices: Choices, config: Config, features: Collection[str], box: Box) -> Config:
    """Return a configuration with one to three cache groups; the same where none are inside.

    Parameters
    ----------
    choices : Choices
        What makes the choices.
    config : Config
        A legal configuration without cache groups.
    features : collection of str
        Windows are drawn only with `window` among them.
    box : Box
        Where the engine works.

    Returns
    -------
    Config
        One inside the box.

    Examples
    --------
    >>> from helix_conformance.generate.choices import Seeded
    >>> plain = Config(layout="pr9757/1:C=2,T=4", pages=[9, 9], max_len=24)
    >>> config = with_groups(Seeded("3"), plain, ["window"], Box())
    >>> config_problem(config), 1 <= len(config.groups) <= 3
    (None, True)
    """
    if config.max_len > MAX_REQUEST:
        return config
    for _ in range(_TRIES):
        drawn = _drawn(choices, config, windows="window" in features)
        if config_problem(drawn) is None and not outside(box, drawn):
            return drawn
    return config


def _drawn(choices: Choices, config: Config, *, windows: bool) -> Config:
    kind = choices.pick((_any_groups, _any_groups, _any_groups, _hybrid))
    layers, groups = kind(choices, config, windows)
    groups = _with_bases(choices, groups)
    groups[0]["pool"] = MAIN_POOL
    sizes = {
        pool: _sizes(choices, config, sum(group["pool"] == pool for group in groups))
        for pool in sorted({group["pool"] for group in groups})
    }
    return msgspec.structs.replace(
        config,
        model=msgspec.structs.replace(config.model, layers=layers),
        groups=[CacheGroup(**group) for group in groups],
        pages=sizes.pop(MAIN_POOL),
        pools=sizes,
    )


def _any_groups(
    choices: Choices, config: Config, windows: bool
) -> tuple[int, list[dict[str, Any]]]:
    """Groups of any kind over at most three layers; some layers read several."""
    layers = max(config.model.layers, choices.integer(1, 3))
    groups: list[dict[str, Any]] = [
        {
            "name": name,
            "layers": [layer for layer in range(layers) if choices.one_in(2)],
            "placement": choices.pick(("sharded", "replicated", "sharded")),
            "window": _window(choices, config) if windows else None,
            "tokens_per_block": _page(choices, config),
            "pool": choices.pick((MAIN_POOL, MAIN_POOL, "second")),
        }
        for name in ("a", "b", "c")[: choices.integer(1, 3)]
    ]
    for group in groups:
        group["layers"] = group["layers"] or [choices.integer(0, layers - 1)]
    read = {layer for group in groups for layer in group["layers"]}
    groups[0]["layers"] = sorted({*groups[0]["layers"], *(set(range(layers)) - read)})
    return layers, groups


def _hybrid(choices: Choices, config: Config, windows: bool) -> tuple[int, list[dict[str, Any]]]:
    """Window layers and full ones as they ship: 5 to 1 (Gemma 3), or in turn (GPT-OSS)."""
    layers, every = choices.pick(((6, 6), (2, 2)))
    full = list(range(every - 1, layers, every))
    near = [layer for layer in range(layers) if layer not in full]
    return layers, [
        {"name": "full", "layers": full, "pool": MAIN_POOL},
        {
            "name": "near",
            "layers": near,
            "placement": choices.pick(("replicated", "sharded")),
            "window": _window(choices, config, always=True) if windows else None,
            "pool": choices.pick((MAIN_POOL, "second")),
        },
    ]


def _page(choices: Choices, config: Config) -> int | None:
    """Tokens in a page of a group: mostly those of the layout."""
    times = choices.pick((None, None, None, 1, 2, 3))
    return times and times * config.layout.tokens_per_block


def _window(choices: Choices, config: Config, *, always: bool = False) -> int | None:
    """A window that ends on a page or beside one, on a super-block or beside it, or a small one."""
    t, c = config.layout.tokens_per_block, config.layout.cp_size
    edges = (1, 2, 3, t, t + 1, 2 * t - 1, t * c, t * c + 1, 7, 40)
    return choices.pick(edges if always else (None, None, *edges))


def _with_bases(choices: Choices, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The groups, those that share no layer with a RoPE base of their own now and then."""
    for group in groups:
        others = {layer for one in groups if one is not group for layer in one["layers"]}
        if others.isdisjoint(group["layers"]) and choices.one_in(3):
            group["rope_base"] = 1_000_000.0
    return groups


def _sizes(choices: Choices, config: Config, groups: int) -> list[int]:
    """Sizes of a pool from which so many groups take pages: like those of the configuration."""
    return [pages * choices.pick((groups, groups, 1)) for pages in config.pages]
