"""Lists of tokens, short ones against plain lists and long ones against the closed forms."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from helix_reference.model import Model
from helix_reference.tokens import Positions, Tokens
from helix_spec import placement
from helix_spec.config import Config
from helix_spec.events import Accept, Admit, Decode, Preempt, Resume

FAR = 2**24


@given(
    lengths=st.lists(st.integers(1, 4), max_size=4),
    gaps=st.lists(st.integers(1, 3), max_size=6),
    rewound=st.integers(0, 30),
    part=st.slices(20),
)
def test_positions_read_like_the_list_that_they_stand_for(
    lengths: list[int], gaps: list[int], rewound: int, part: slice
) -> None:
    """Length, entries, slices, order and copies are those of a list, whatever the pieces are."""
    pieces = [range(9 * n, 9 * n + length) for n, length in enumerate(lengths)]
    plain = [position for piece in pieces for position in piece]
    positions, prompt_len = Positions(pieces), 9 * len(pieces)
    for gap in gaps:
        plain.append(max(prompt_len, plain[-1] if plain else 0) + gap)
        positions.append(plain[-1])
    copied = positions.copy()
    positions.rewind(prompt_len + rewound)
    kept = [position for position in plain if position < prompt_len + rewound]
    assert (positions, len(positions), positions[part]) == (kept, len(kept), kept[part])
    assert [positions[place] for place in range(-len(kept), len(kept))] == kept + kept
    assert copied == plain
    with pytest.raises(IndexError):
        positions[len(kept)]


@given(prompt_len=st.integers(1, 5), decoded=st.integers(0, 5), kept=st.integers(0, 5))
def test_tokens_read_like_the_list_that_they_stand_for(
    prompt_len: int, decoded: int, kept: int
) -> None:
    """Identities of a prompt are made from its event; decoded ones are kept, until a rewind."""
    tokens = Tokens(3, prompt_len)
    for place in range(decoded):
        tokens.append((5, place))
    plain = [(3, place) for place in range(prompt_len)] + [(5, place) for place in range(decoded)]
    copied = tokens.copy()
    tokens.rewind(prompt_len + kept)
    assert (tokens, len(tokens)) == (plain[: prompt_len + kept], prompt_len + min(decoded, kept))
    assert tokens[-1] == plain[: prompt_len + kept][-1]
    assert copied == plain


@pytest.mark.holds("OWN-1", "OWN-3", "LEN-1", "PAGE-1")
@pytest.mark.parametrize(
    "layout",
    [
        "pr9757/1:C=3,T=256",
        "pr17866/1:C=3,T=256",
        "vllm_dcp/1:C=3,T=256,I=64",
        "custom/1:prompt=interleave(64),owner=step,pages=lazy,start=rotated,C=3,T=256",
    ],
)
def test_positions_beyond_24_bits(layout: str) -> None:
    """A prompt of 2^24 tokens, decoded, rewound and placed anew, lies where closed forms say."""
    model = Model(Config(layout=layout, pages=[2**16] * 3, max_len=2 * FAR))
    for event in (Admit(0, FAR - 1), Decode([0], [300]), Accept(0, 259), Preempt(0), Resume(0)):
        assert model.apply(event) is None
    assert model.apply(Decode([0], [300])) is None
    request = model.requests[0]
    assert (len(request.tokens), request.tokens[FAR], request.tokens[FAR - 2]) == (
        FAR + 558, (1, 1), (0, FAR - 2)
    )  # fmt: skip
    of_request = model.layout, request.prompt_len, request.steps
    for rank, (positions, table) in enumerate(zip(request.ranks, request.tables, strict=True)):
        assert len(positions) == placement.local_len(*of_request, rank)
        assert len(table) == placement.pages_needed(*of_request, rank)
    for position in (FAR - 1, FAR, FAR + 1, FAR + 255, FAR + 256, FAR + 259, FAR + 557):
        owner = placement.owner(model.layout, request.prompt_len, position)
        index = placement.local_index(model.layout, request.prompt_len, position)
        assert request.ranks[owner][index] == position
