"""FlashInfer's code as engines of the conformance suite, on a GPU.

- `merging`: `merge_state` and `merge_states`, which cascades are merged by;
- `attending`: paged decode and MLA with log-sum-exps, over pages of `helix_gpu`;
- `facts`: what it answers to single calls that no trace of the suite reaches;
- `conform`: all of it, in one run with a deadline.
"""

from typing import Final

import torch

DEVICE: Final = "cuda" if torch.cuda.is_available() else "cpu"
"""Where FlashInfer works; its stand-in of the tests works on a CPU."""
LOG_2_E: Final = 1.4426950408889634
"""FlashInfer's log-sum-exps are to base 2: this many for one of ours."""
EMPTY: Final = -5e4
"""`math::inf` of its kernels, negative: their log-sum-exp of no keys."""
