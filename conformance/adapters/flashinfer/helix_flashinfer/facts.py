"""What FlashInfer answers to single calls: `python -m helix_flashinfer.facts GROUP`.

Each call is a line of JSON: its name and its answer, or its error. The groups are `merge`, `decode`
and `mla`, for processes of their own: an illegal access ends a process's use of the device.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Final

import flashinfer
import torch
from torch import Tensor

from helix_flashinfer import DEVICE, EMPTY
from helix_flashinfer.attending import WORKSPACE_BYTES

INF: Final = math.inf
HEAD_DIM: Final = 64


def merge_pair(a: float, b: float, *, garbage: bool = False) -> list[float]:
    """`merge_state` of outputs 1 and 2 with these log-sum-exps: its output and log-sum-exp."""
    (v_a, s_a), (v_b, s_b) = _state(1.0, a), _state(math.nan if garbage else 2.0, b)
    return _first(*flashinfer.merge_state(v_a, s_a, v_b, s_b))


def merge_all(lses: list[float], outputs: list[float], tokens: int = 1) -> list[float]:
    """`merge_states` of these: its output and log-sum-exp."""
    states = [_state(output, lse, tokens) for output, lse in zip(outputs, lses, strict=True)]
    v = torch.stack([v for v, _ in states], dim=1)
    return _first(*flashinfer.merge_states(v, torch.stack([s for _, s in states], dim=1)))


def merge_heads(heads: int, dim: int, *, together: bool) -> str:
    """Merge two states of 3 tokens, of so many heads: what is far from right."""
    v = torch.ones(3, 2, heads, dim, dtype=torch.float16, device=DEVICE)
    s = torch.zeros(3, 2, heads, device=DEVICE)
    if together:
        merged = flashinfer.merge_states(v, s)[0]
    else:
        (v_a, v_b), (s_a, s_b) = ([part.contiguous() for part in x.unbind(1)] for x in (v, s))
        merged = flashinfer.merge_state(v_a, s_a, v_b, s_b)[0]
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    return "right" if bool((merged == 1).all()) else "wrong"


def decode(lengths: list[int], heads: int, *, tensor_cores: bool, factor: float = 1.0) -> Any:
    """Paged decode of requests of these lengths: each row's first output and log-sum-exp.

    Keys and values are all 1, queries `factor`, so log-sum-exps are known: log2(length) more than
    the score, which is factor * sqrt(HEAD_DIM) * log2(e).
    """
    page, kv_heads = 16, 1
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        _workspace(), "NHD", use_tensor_cores=tensor_cores
    )
    counts = [-(-length // page) for length in lengths]
    starts = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)
    last = torch.tensor([(n - 1) % page + 1 if n else 0 for n in lengths], dtype=torch.int32)
    pages = sum(counts)
    wrapper.plan(
        starts.to(DEVICE), torch.arange(pages, dtype=torch.int32, device=DEVICE), last.to(DEVICE),
        heads, kv_heads, HEAD_DIM, page, q_data_type=torch.float16, kv_data_type=torch.float16,
    )  # fmt: skip
    pool = torch.ones(pages + 1, 2, page, kv_heads, HEAD_DIM, dtype=torch.float16, device=DEVICE)
    q = torch.full((len(lengths), heads, HEAD_DIM), factor, dtype=torch.float16, device=DEVICE)
    output, lse = wrapper.run(q, pool, return_lse=True)
    return [_first(o[None], s[None]) for o, s in zip(output, lse, strict=True)]


def mla(lengths: list[int], kernels: str, *, natural: bool = False, factor: float = 1.0) -> Any:
    """The same by MLA, 16 heads: scores are factor * 512, at a scale of 1 / 512."""
    page, heads = 16, 16
    wrapper = flashinfer.mla.BatchMLAPagedAttentionWrapper(_workspace(), backend=kernels)
    counts = [-(-length // page) for length in lengths]
    starts = torch.tensor([sum(counts[:i]) for i in range(len(counts) + 1)], dtype=torch.int32)
    pages = sum(counts)
    wrapper.plan(
        torch.arange(len(lengths) + 1, dtype=torch.int32, device=DEVICE), starts.to(DEVICE),
        torch.arange(pages, dtype=torch.int32, device=DEVICE),
        torch.tensor(lengths, dtype=torch.int32, device=DEVICE),
        heads, 512, 64, page, False, 1 / 512, torch.bfloat16, torch.bfloat16,
    )  # fmt: skip

    def filled(value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, dtype=torch.bfloat16, device=DEVICE)

    output, lse = wrapper.run(
        filled(factor, len(lengths), heads, 512), filled(0, len(lengths), heads, 64),
        filled(1, pages + 1, page, 512), filled(0, pages + 1, page, 64),
        return_lse=True, **({"return_lse_base_on_e": True} if natural else {}),
    )  # fmt: skip
    return [_first(o[None], s[None]) for o, s in zip(output, lse, strict=True)]


MLA_CALLS: Final[list[tuple[str, list[int], dict[str, Any]]]] = [
    ("lengths 3 and 0", [3, 0], {}),
    ("lengths 3 and 0, base e", [3, 0], {"natural": True}),
    ("length 0 alone", [0], {}),
    ("lengths 0, 5000, 0 and 40", [0, 5000, 0, 40], {}),
    ("score -4e4", [4], {"factor": -40000}),
    ("score -1e5", [4], {"factor": -100000}),
    ("score 1e5", [4], {"factor": 100000}),
]
GROUPS: Final[dict[str, dict[str, Callable[[], Any]]]] = {
    "merge": {
        "merge_state, log-sum-exps 1 and 0 (base 2: output 1.333)": lambda: merge_pair(1, 0),
        "merge_state, -inf and 0": lambda: merge_pair(-INF, 0),
        "merge_state, -inf and -inf": lambda: merge_pair(-INF, -INF),
        "merge_state, -5e4 and -5e4": lambda: merge_pair(EMPTY, EMPTY),
        "merge_state, 0 and an empty one of NaN and -inf": lambda: merge_pair(
            0, -INF, garbage=True
        ),
        "merge_state, 0 and an empty one of NaN and -5e4": lambda: merge_pair(
            0, EMPTY, garbage=True
        ),
        "merge_state, +inf and 0": lambda: merge_pair(INF, 0),
        "merge_states, one, -inf": lambda: merge_all([-INF], [2]),
        "merge_states, -inf and -inf": lambda: merge_all([-INF, -INF], [0, 0]),
        "merge_states, -inf and -inf, 3 tokens": lambda: merge_all([-INF] * 2, [0, 0], 3),
        "merge_states, -inf and 0": lambda: merge_all([-INF, 0], [0, 2]),
        "merge_states, NaN of -inf and 0": lambda: merge_all([-INF, 0], [math.nan, 2]),
        "merge_states, NaN of -5e4 and 0": lambda: merge_all([EMPTY, 0], [math.nan, 2]),
        "merge_states, -6e4 and -6e4, of keys": lambda: merge_all([-6e4, -6e4], [2, 2]),
        "merge_states, -6e4 and -6e4, 3 tokens": lambda: merge_all([-6e4, -6e4], [2, 2], 3),
        "merge_states, -5e4 and -5e4, of keys": lambda: merge_all([EMPTY, EMPTY], [2, 2]),
        "merge_states, -5e4 and -5e4, of keys, 3 tokens": lambda: merge_all([EMPTY] * 2, [2, 2], 3),
        "merge_state, -6e4 and -6e4, of keys": lambda: merge_pair(-6e4, -6e4),
        "merge_state, -6e4 and an empty one of -5e4": lambda: merge_pair(-6e4, EMPTY),
        "merge_states, 2e5 and 2e5 + 1": lambda: merge_all([2e5, 2e5 + 1], [1, 4]),
        "merge_states, 32 heads of 512": lambda: merge_heads(32, 512, together=True),
        "merge_states, 33 heads of 512": lambda: merge_heads(33, 512, together=True),
        "merge_states, 128 heads of 512": lambda: merge_heads(128, 512, together=True),
        "merge_state, 128 heads of 512": lambda: merge_heads(128, 512, together=False),
        "merge_state, 65 heads of 128": lambda: merge_heads(65, 128, together=False),
    },
    "decode": {
        "decode, lengths 3 and 0": lambda: decode([3, 0], 2, tensor_cores=False),
        "decode, length 0 alone": lambda: decode([0], 2, tensor_cores=False),
        "decode, length 4": lambda: decode([4], 2, tensor_cores=False),
        "decode, score -8e3": lambda: decode([4], 2, tensor_cores=False, factor=-1000),
        "decode, score -4e4": lambda: decode([4], 2, tensor_cores=False, factor=-5000),
        "decode, score -8e4": lambda: decode([4], 2, tensor_cores=False, factor=-10000),
        "decode, score 4e5": lambda: decode([4], 2, tensor_cores=False, factor=50000),
    },
    "mla": {
        f"MLA {kernels}, {name}": partial(mla, lengths, kernels, **options)
        for kernels in ("fa2", "fa3")
        for name, lengths, options in MLA_CALLS
    },
}


def _state(output: float, lse: float, tokens: int = 1) -> tuple[Tensor, Tensor]:
    v = torch.full((tokens, 1, HEAD_DIM), output, dtype=torch.float16, device=DEVICE)
    return v, torch.full((tokens, 1), lse, dtype=torch.float32, device=DEVICE)


def _first(output: Tensor, lse: Tensor) -> list[float]:
    return [float(output.flatten()[0]), float(lse.flatten()[0])]


def _workspace() -> Tensor:
    return torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=DEVICE)


def main(group: str) -> None:
    """Print what every call of a group answers."""
    for name, call in GROUPS[group].items():
        try:
            answer: Any = call()
        except Exception as error:
            answer = f"{type(error).__name__}: {error}"[:400]
        # repr: JSON has no names for infinities and NaN.
        print(json.dumps({"call": name, "answers": repr(answer)}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
