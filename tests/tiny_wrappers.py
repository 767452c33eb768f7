"""Tiny random models with a language model inside, one for every kind of wrapper we know."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

_TEXT: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "intermediate_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_EYE: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 28,
    "patch_size": 14,
}
_QWEN_EYE: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 16,
    "num_heads": 2,
    "intermediate_size": 24,
    "out_hidden_size": 36,
    "patch_size": 14,
}
_QWEN_IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "vision_start_token_id": 92,
    "vision_end_token_id": 93,
}

_DELTA = {
    "head_dim": 8, "linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 5,
    "linear_value_head_dim": 7, "linear_conv_kernel_dim": 3, "mtp_num_hidden_layers": 1,
    "layer_types": [f"{kind}_attention" for kind in ("linear", "full", "linear", "full", "linear")],
}  # fmt: skip


_GEMMA4_KINDS = ("sliding", "full", "sliding", "full", "full")
_GEMMA4_TEXT = (
    _TEXT
    | {"head_dim": 6, "global_head_dim": 8, "num_global_key_value_heads": 1}
    | {"attention_k_eq_v": True, "sliding_window": 7, "hidden_size_per_layer_input": 0}
    | {"use_bidirectional_attention": "vision", "final_logit_softcapping": 3.0}
    | {"layer_types": [f"{kind}_attention" for kind in _GEMMA4_KINDS]}
)
_GEMMA4_IDS = {
    "image_token_id": 90,
    "video_token_id": 91,
    "audio_token_id": 92,
    "boi_token_id": 93,
    "eoi_token_id": 94,
}


def _rope(**more: Any) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 1], **more}


_EXPERTS = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_QWEN3_VL_TEXT = _TEXT | {"head_dim": 6, "rope_parameters": _rope(mrope_interleaved=True)}
_QWEN3_VL_EYE = _QWEN_EYE | {"num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}

# name -> (config class, arguments, model type of the language model as it stands alone)
WRAPPED: dict[str, tuple[str, dict[str, Any], str]] = {
    "gemma3": (
        "Gemma3Config",
        {
            "text_config": _TEXT
            | {"head_dim": 6, "sliding_window": 7, "query_pre_attn_scalar": 6}
            | {"sliding_window_pattern": 3},
            "vision_config": _EYE,
            "mm_tokens_per_image": 4,
            "image_token_index": 90,
        },
        "gemma3_text",
    ),
    "gemma4": (
        "Gemma4Config",
        {
            "text_config": _GEMMA4_TEXT,
            "vision_config": _EYE
            | {"num_key_value_heads": 2, "head_dim": 8, "patch_size": 2}
            | {"position_embedding_size": 24, "num_hidden_layers": 1},
            **_GEMMA4_IDS,
        },
        "gemma4_text",
    ),
    "gemma4-experts": (  # without an eye
        "Gemma4Config",
        {
            "text_config": _GEMMA4_TEXT
            | {"enable_moe_block": True, "num_experts": 5, "top_k_experts": 2}
            | {"moe_intermediate_size": 16},
            "vision_config": None,
            **_GEMMA4_IDS,
        },
        "gemma4_text",
    ),
    "mistral3": (
        "Mistral3Config",
        {
            "text_config": _TEXT | {"model_type": "mistral", "head_dim": 6, "sliding_window": 7},
            "vision_config": _EYE | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": 90,
            "tie_word_embeddings": False,
        },
        "mistral",
    ),
    "mistral3-ministral3": (
        "Mistral3Config",
        {
            "text_config": _TEXT | {"model_type": "ministral3", "head_dim": 6},
            "vision_config": _EYE | {"model_type": "pixtral", "head_dim": 8},
            "image_token_index": 90,
        },
        "ministral3",
    ),
    "llava": (
        "LlavaConfig",
        {
            "text_config": _TEXT | {"model_type": "llama"},
            "vision_config": _EYE | {"model_type": "clip_vision_model", "projection_dim": 8},
            "image_token_index": 90,
            "tie_word_embeddings": False,
        },
        "llama",
    ),
    "idefics3": (
        "Idefics3Config",
        {
            "text_config": _TEXT | {"model_type": "llama", "head_dim": 6},
            "vision_config": _EYE,
            "image_token_id": 90,
            "scale_factor": 2,
        },
        "llama",
    ),
    "smolvlm": (
        "SmolVLMConfig",
        {
            "text_config": _TEXT | {"model_type": "llama", "head_dim": 6},
            "vision_config": _EYE,
            "image_token_id": 90,
            "scale_factor": 2,
            "tie_word_embeddings": True,
        },
        "llama",
    ),
    "internvl": (
        "InternVLConfig",
        {
            "text_config": _TEXT | {"model_type": "qwen3", "head_dim": 6},
            "vision_config": _EYE,
            "image_token_id": 90,
        },
        "qwen3",
    ),
    "qwen2_5_vl": (
        "Qwen2_5_VLConfig",
        {
            "text_config": _TEXT
            | {"hidden_size": 54, "rope_parameters": _rope()},  # heads of three pairs
            "vision_config": _QWEN_EYE
            | {"out_hidden_size": 54, "window_size": 28, "fullatt_block_indexes": [1]},
            **_QWEN_IDS,
        },
        "qwen2",
    ),
    "qwen3_vl": (
        "Qwen3VLConfig",
        {
            "text_config": _QWEN3_VL_TEXT,
            "vision_config": _QWEN3_VL_EYE,
            "tie_word_embeddings": True,
            **_QWEN_IDS,
        },
        "qwen3",
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoeConfig",
        {"text_config": _QWEN3_VL_TEXT | _EXPERTS, "vision_config": _QWEN3_VL_EYE, **_QWEN_IDS},
        "qwen3_moe",
    ),
    "qwen3_vl_moe-mixed": (
        "Qwen3VLMoeConfig",
        {
            "text_config": _QWEN3_VL_TEXT
            | _EXPERTS
            | {"mlp_only_layers": [1, 3], "attention_bias": True},
            "vision_config": _QWEN3_VL_EYE,
            "tie_word_embeddings": True,
            **_QWEN_IDS,
        },
        "qwen3_moe",
    ),
    "qwen3_5": (
        "Qwen3_5Config",
        {
            "text_config": _TEXT | _DELTA,
            "vision_config": _QWEN_EYE | {"num_position_embeddings": 16},
            "tie_word_embeddings": True,
            **_QWEN_IDS,
        },
        "qwen3_5_text",
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeConfig",
        {
            "text_config": _TEXT | _DELTA | _EXPERTS | {"shared_expert_intermediate_size": 12},
            "vision_config": _QWEN_EYE | {"num_position_embeddings": 16},
            **_QWEN_IDS,
        },
        "qwen3_5_moe_text",
    ),
}


def inputs_first(path: Path) -> None:
    """Turn the matrices of experts round in place, as hubs hold those of Qwen3-VL."""
    tensors = load_file(path / "model.safetensors")
    turned = {n: t.mT.contiguous() for n, t in tensors.items() if ".mlp.experts." in n}
    save_file(tensors | turned, path / "model.safetensors", metadata={"format": "pt"})


def tiny_wrapper(name: str) -> Any:
    """A model whose every parameter is random, norms and biases included."""
    import transformers
    from transformers import AutoModelForImageTextToText

    kind, arguments, _ = WRAPPED[name]
    config = getattr(transformers, kind)(**arguments)
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model
