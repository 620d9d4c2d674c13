"""SGLang 0.5.23, told that there is no GPU: to be imported before any of it."""

from __future__ import annotations

import os
import sys
from typing import Any
from unittest.mock import MagicMock

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

from transformers.utils import import_utils

from helix_adapters import triton_on_cpu

# Configurations of models of pictures import torchvision, whose wheel is of CUDA. transformers
# is to find out first that it is not there.
import_utils.is_torchvision_available()
for name in ("", ".io", ".transforms", ".transforms.functional", ".transforms.v2"):
    sys.modules.setdefault(f"torchvision{name}", MagicMock(__spec__=None))

triton_on_cpu.mend()

from sglang.srt.platforms import current_platform
from sglang.srt.runtime_context import get_context
from sglang.srt.utils import common

# Its collectives are torch operators, registered for CUDA where no other device is found.
register = common.sglang_lib.impl
common.sglang_lib.impl = lambda name, function, key, **more: register(
    name, function, "CPU" if key == "CUDA" else key, **more
)

get_context().override_server_args(
    device="cpu",
    attention_backend="triton",
    triton_attention_num_kv_splits=8,
    chunked_prefill_size=-1,
).install()


def launch_triton(launch: bool) -> None:
    """Let SGLang choose its Triton kernels, as on a GPU, or else its torch ones."""
    platform: Any = type(current_platform)
    capabilities = current_platform.capabilities
    platform.capabilities = type(capabilities)(supports_triton=launch)
