"""Small random models of the real classes of `transformers`, alike on all ranks."""

from __future__ import annotations

from typing import Any, Final

import torch
import transformers

VOCABULARY: Final = 211
WINDOW: Final = 9
_COMMON: Final[dict[str, Any]] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_hidden_layers": 3,
    "max_position_embeddings": 512,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": 0,
}
_LINEAR: Final = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_EXPERTS: Final = {"num_experts_per_tok": 2}
FAMILIES: Final[dict[str, tuple[str, dict[str, Any]]]] = {
    # The heads of SmolLM2, which divide over three ranks alone.
    "llama": (
        "Llama",
        {"hidden_size": 72, "head_dim": 8, "num_attention_heads": 9, "num_key_value_heads": 3},
    ),
    "qwen3": ("Qwen3", {"num_key_value_heads": 4}),
    "mixtral": ("Mixtral", _EXPERTS | {"num_local_experts": 4}),
    "gemma3": (
        "Gemma3",
        {"sliding_window": WINDOW, "num_hidden_layers": 4, "query_pre_attn_scalar": 24}
        | {"tie_word_embeddings": False}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "gpt_oss": (
        "GptOss",
        _EXPERTS
        | {"num_local_experts": 4, "sliding_window": WINDOW, "num_hidden_layers": 4}
        | {"layer_types": ["sliding_attention", "full_attention"] * 2},
    ),
    "deepseek_v3": (
        "DeepseekV3",
        _EXPERTS
        | {"num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 12}
        | {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "first_k_dense_replace": 1}
        | {"n_routed_experts": 8, "n_group": 2, "topk_group": 1, "moe_intermediate_size": 32},
    ),
    "qwen3_next": (
        "Qwen3Next",
        _EXPERTS
        | _LINEAR
        | {"num_experts": 4, "moe_intermediate_size": 32, "shared_expert_intermediate_size": 32}
        | {"num_hidden_layers": 4, "layer_types": ["linear_attention", "full_attention"] * 2},
    ),
}
"""The prefix of the classes, and what differs from `_COMMON`."""


def small_model(family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Return a random model of a family, in evaluation.

    Weights are large enough that what attends to what decides the next token.
    """
    prefix, given = FAMILIES[family]
    config_class = f"{prefix}TextConfig" if family == "gemma3" else f"{prefix}Config"
    given = _COMMON | given | changes
    if family == "deepseek_v3":
        given = {name: value for name, value in given.items() if name != "head_dim"}
    config = getattr(transformers, config_class)(**given)
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" not in name:
                parameter.normal_(std=0.2 if parameter.ndim > 1 else 1.0)
    return model.eval().to(dtype)


def prompt_of(tokens: int, seed: int = 0) -> torch.Tensor:
    """Return a prompt, int64 [1, tokens], without token 0, which pads."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    return torch.randint(1, VOCABULARY, (1, tokens), generator=generator)


def padded(prompts: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return prompts of several lengths as a batch, padded on the left, with its mask."""
    width = max(prompt.shape[1] for prompt in prompts)

    def left(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.pad(x, (width - x.shape[1], 0))

    return {
        "input_ids": torch.cat([left(prompt) for prompt in prompts]),
        "attention_mask": torch.cat([left(torch.ones_like(prompt)) for prompt in prompts]),
    }
