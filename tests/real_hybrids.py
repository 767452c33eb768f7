"""Configurations of hybrids on hubs, as :mod:`real_configs` has those of others."""

from __future__ import annotations

from typing import Any

from real_configs import _QWEN_EYE, _QWEN_IDS, _SILU, _SIZES, Published, _raw

_LINEAR, _FULL = "linear_attention", "full_attention"
_DELTA: dict[str, Any] = {
    "full_attention_interval": 4, "head_dim": 8, "initializer_range": 0.02,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 4, "linear_num_key_heads": 3,
    "linear_num_value_heads": 6, "linear_value_head_dim": 4, "mlp_only_layers": [],
    "rms_norm_eps": 1e-06, "use_cache": True, "attention_bias": False,
}  # fmt: skip
_EXPERTS = {
    "moe_intermediate_size": 16, "num_experts": 5, "num_experts_per_tok": 2,
    "output_router_logits": False, "router_aux_loss_coef": 0.001,
    "shared_expert_intermediate_size": 16,
}  # fmt: skip
_QWEN3_5: dict[str, Any] = _SIZES | _SILU | _DELTA | {
    "attn_output_gate": True, "dtype": "bfloat16", "eos_token_id": 2,
    "layer_types": [_LINEAR, _LINEAR, _LINEAR, _FULL, _LINEAR], "mamba_ssm_dtype": "float32",
    "mtp_num_hidden_layers": 1, "mtp_use_dedicated_embeddings": False,
    "rope_parameters": {"mrope_interleaved": True, "mrope_section": [1, 0, 0],
                        "partial_rotary_factor": 0.25, "rope_theta": 10000000,
                        "rope_type": "default"},
}  # fmt: skip
_MTP = ("mtp.layers.{}.input_layernorm.weight",)


_GEMMA4: dict[str, Any] = _SIZES | {
    "attention_bias": False, "attention_dropout": 0.0, "attention_k_eq_v": True,
    "bos_token_id": 2, "dtype": "bfloat16", "enable_moe_block": False, "eos_token_id": 1,
    "final_logit_softcapping": 30.0, "global_head_dim": 8, "head_dim": 6,
    "hidden_activation": "gelu_pytorch_tanh", "hidden_size_per_layer_input": 0,
    "initializer_range": 0.02, "layer_types": ["sliding_attention", _FULL] * 2 + [_FULL],
    "model_type": "gemma4_text", "moe_intermediate_size": None, "num_experts": None,
    "num_global_key_value_heads": 1, "num_kv_shared_layers": 0, "pad_token_id": 0,
    "rms_norm_eps": 1e-06, "sliding_window": 7, "tie_word_embeddings": True,
    "rope_parameters": {
        _FULL: {"partial_rotary_factor": 0.25, "rope_theta": 1000000.0,
                "rope_type": "proportional"},
        "sliding_attention": {"rope_theta": 10000.0, "rope_type": "default"},
    },
    "top_k_experts": None, "use_bidirectional_attention": "vision", "use_cache": True,
    "use_double_wide_mlp": False, "vocab_size_per_layer_input": 101,
}  # fmt: skip


def _wrapped(model_type: str, name: str, text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": [name], "model_type": model_type, "tie_word_embeddings": False,
        "transformers_version": "4.57.0.dev0", "text_config": text, **_QWEN_IDS,
        "vision_config": _QWEN_EYE | {"deepstack_visual_indexes": [], "initializer_range": 0.02,
                                      "hidden_act": "gelu_pytorch_tanh", "model_type": model_type,
                                      "num_position_embeddings": 16},
    }  # fmt: skip


def _gemma4(text: dict[str, Any]) -> dict[str, Any]:
    return {
        "architectures": ["Gemma4ForConditionalGeneration"], "model_type": "gemma4",
        "audio_config": None, "audio_token_id": 92, "boa_token_id": 95, "boi_token_id": 93,
        "dtype": "bfloat16", "eoa_token_index": 96, "eoi_token_id": 94, "eos_token_id": [1, 106],
        "image_token_id": 90, "initializer_range": 0.02, "tie_word_embeddings": True,
        "transformers_version": "5.5.0.dev0", "video_token_id": 91, "text_config": text,
        "vision_config": {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
                          "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8,
                          "model_type": "gemma4_vision", "patch_size": 2, "pooling_kernel_size": 3,
                          "position_embedding_size": 24, "standardize": True,
                          "hidden_activation": "gelu_pytorch_tanh", "rms_norm_eps": 1e-06},
    }  # fmt: skip


PUBLISHED_HYBRIDS: dict[str, Published] = {
    "Qwen/Qwen3-Next-80B-A3B-Instruct": Published(
        _raw("qwen3_next", "Qwen3NextForCausalLM", _SILU, _DELTA, _EXPERTS, decoder_sparse_step=1,
             norm_topk_prob=True, partial_rotary_factor=0.25, rope_scaling=None,
             rope_theta=10000000, tie_word_embeddings=False, torch_dtype="bfloat16",
             transformers_version="4.57.0.dev0", use_sliding_window=False),
        buffers=_MTP,
    ),
    "Qwen/Qwen3.5-9B": Published(
        _wrapped("qwen3_5", "Qwen3_5ForConditionalGeneration",
                 _QWEN3_5 | {"model_type": "qwen3_5_text", "tie_word_embeddings": False}),
        buffers=_MTP,
    ),
    "Qwen/Qwen3.5-35B-A3B": Published(
        _wrapped("qwen3_5_moe", "Qwen3_5MoeForConditionalGeneration",
                 {key: value for key, value in _QWEN3_5.items() if key != "intermediate_size"}
                 | _EXPERTS | {"model_type": "qwen3_5_moe_text"}),
        buffers=_MTP,
    ),
    "google/gemma-4-31B-it": Published(_gemma4(_GEMMA4)),
    "google/gemma-4-26B-A4B-it": Published(
        _gemma4(_GEMMA4 | {"enable_moe_block": True, "moe_intermediate_size": 16, "num_experts": 5,
                           "top_k_experts": 2}),
    ),
}  # fmt: skip
