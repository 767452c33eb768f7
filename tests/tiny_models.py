"""Tiny random models of odd geometry, one for every family and variant that changes its table."""

from __future__ import annotations

from typing import Any

_SHARED: dict[str, Any] = {
    "vocab_size": 101,
    "hidden_size": 36,
    "num_hidden_layers": 5,
    "num_attention_heads": 9,
    "intermediate_size": 50,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
}
_GROUPED = {**_SHARED, "num_key_value_heads": 3}
_KINDS = ("sliding", "full", "sliding", "full", "sliding")
_OPT = {k: v for k, v in _SHARED.items() if k != "intermediate_size"} | {"ffn_dim": 50}

# Outputs of linear attention are normed head by head: a larger epsilon keeps digits of small ones.
_DELTA = {
    "rms_norm_eps": 1e-2,
    "head_dim": 8, "linear_num_key_heads": 3, "linear_num_value_heads": 6, "linear_key_head_dim": 5,
    "linear_value_head_dim": 7, "linear_conv_kernel_dim": 3,
    "layer_types": [f"{kind}_attention" for kind in ("linear", "full", "linear", "full", "linear")],
}  # fmt: skip
_QWEN3_MOE = {
    "head_dim": 6, "num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20,
}  # fmt: skip

# name -> (config class, arguments). Windows are shorter than the sequences the tests run.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", _GROUPED | {"head_dim": 6}),
    "llama-tied": ("LlamaConfig", _GROUPED | {"tie_word_embeddings": True}),
    "llama-biases": ("LlamaConfig", _GROUPED | {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("MistralConfig", _GROUPED | {"head_dim": 8, "sliding_window": 7}),
    "qwen2": (
        "Qwen2Config",
        _GROUPED | {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 2},
    ),
    "qwen2-tied": ("Qwen2Config", _GROUPED | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3Config", _GROUPED | {"head_dim": 6, "attention_bias": True}),
    "gemma2": (
        "Gemma2Config",
        _GROUPED
        | {"head_dim": 6, "sliding_window": 7, "query_pre_attn_scalar": 6}
        | {"tie_word_embeddings": True},
    ),
    "gemma3": (
        "Gemma3TextConfig",
        _GROUPED
        | {"head_dim": 6, "sliding_window": 7, "query_pre_attn_scalar": 6}
        | {"tie_word_embeddings": True, "sliding_window_pattern": 3},
    ),
    "phi3": ("Phi3Config", _GROUPED | {"sliding_window": 7}),
    "smollm3": (
        "SmolLM3Config",
        _GROUPED
        | {"tie_word_embeddings": True, "no_rope_layers": [1, 0, 1, 1, 0]}
        | {"use_sliding_window": True, "sliding_window": 7},
    ),
    "ministral": (
        "MinistralConfig",
        _GROUPED
        | {"head_dim": 6, "sliding_window": 7}
        | {"layer_types": [f"{kind}_attention" for kind in _KINDS]},
    ),
    "ministral3": (
        "Ministral3Config",
        _GROUPED
        | {"head_dim": 6, "sliding_window": 7}
        | {
            "rope_parameters": {
                "type": "yarn",
                "rope_theta": 100.0,
                "factor": 4.0,
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.3,
            }
        },
    ),
    "olmo2": ("Olmo2Config", _GROUPED),
    "olmo3": ("Olmo3Config", _GROUPED | {"sliding_window": 7, "attention_bias": True}),
    "granite": (
        "GraniteConfig",
        _GROUPED
        | {"tie_word_embeddings": True, "embedding_multiplier": 3.0, "logits_scaling": 1.5}
        | {"residual_multiplier": 0.4, "attention_multiplier": 0.3},
    ),
    "granitemoehybrid": (
        "GraniteMoeHybridConfig",
        _GROUPED
        | {"embedding_multiplier": 3.0, "logits_scaling": 1.5, "residual_multiplier": 0.4}
        | {"attention_multiplier": 0.3, "num_local_experts": 0, "shared_intermediate_size": 50}
        | {"layer_types": ["attention"] * 5, "position_embedding_type": "rope"}
        | {"mamba_n_heads": 1, "intermediate_size": 44},
    ),
    "glm4": ("Glm4Config", _GROUPED | {"head_dim": 8}),
    "cohere2": (
        "Cohere2Config",
        _GROUPED | {"tie_word_embeddings": True, "sliding_window": 7, "logit_scale": 0.3},
    ),
    "exaone4": (
        "Exaone4Config",
        _GROUPED
        | {"head_dim": 6, "sliding_window": 7}
        | {"layer_types": [f"{kind}_attention" for kind in _KINDS]},
    ),
    "ernie4_5": ("Ernie4_5Config", _GROUPED | {"head_dim": 6, "use_bias": True}),
    "hunyuan_v1_dense": (
        "HunYuanDenseV1Config",
        _GROUPED
        | {"head_dim": 6, "tie_word_embeddings": True}
        | {
            "rope_parameters": {
                "rope_type": "dynamic",
                "factor": 1.0,
                "alpha": 7.0,
                "rope_theta": 100.0,
            }
        },
    ),
    "seed_oss": (
        "SeedOssConfig",
        _GROUPED | {"head_dim": 6, "attention_out_bias": True, "mlp_bias": True},
    ),
    "gpt_neox": ("GPTNeoXConfig", _SHARED | {"rotary_pct": 0.5}),
    "gpt_neox-serial": (
        "GPTNeoXConfig",
        _SHARED | {"use_parallel_residual": False, "attention_bias": False},
    ),
    "opt": ("OPTConfig", _OPT | {"tie_word_embeddings": True}),
    "opt-projected": (
        "OPTConfig",
        _OPT
        | {"tie_word_embeddings": True, "word_embed_proj_dim": 20, "do_layer_norm_before": False},
    ),
    "opt-bare": (
        "OPTConfig",
        _OPT | {"enable_bias": False, "layer_norm_elementwise_affine": False},
    ),
}


# What sets these apart from others here lies in transformers' own code and in the table. Tests of
# the table and of cuts try them as well; those that run models many times leave them out.
KIN = {
    "qwen2-tied": "llama-tied",
    "smollm3": "llama-tied",
    "ministral": "mistral",
    "ministral3": "mistral",
    "olmo3": "olmo2",
    "granitemoehybrid": "granite",
    "exaone4": "olmo2",
    "ernie4_5": "llama-biases",
    "hunyuan_v1_dense": "qwen3",
    "seed_oss": "llama-biases",
    "glm4_moe_lite": "deepseek_v3",
}
LEADING = {name: arguments for name, arguments in VARIANTS.items() if name not in KIN}

_DEEPSEEK = {
    "n_routed_experts": 12, "n_group": 3, "topk_group": 2, "num_experts_per_tok": 3,
    "n_shared_experts": 1, "moe_intermediate_size": 12, "first_k_dense_replace": 1,
    "kv_lora_rank": 10, "qk_rope_head_dim": 4, "qk_nope_head_dim": 6, "v_head_dim": 5,
    "routed_scaling_factor": 2.5,
}  # fmt: skip

# Heads of two widths, the last block always of the wider ones; they stay as they are.
_GEMMA4 = {
    "head_dim": 6, "global_head_dim": 8, "sliding_window": 7, "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 101, "final_logit_softcapping": 3.0, "tie_word_embeddings": True,
    "layer_types": [f"{kind}_attention" for kind in ("sliding", "full", "sliding", "full", "full")],
}  # fmt: skip

# Models with experts: fewer than a power of two, and rows of whole 16 bytes, as products of all
# experts at once want them.
MIXTURES: dict[str, tuple[str, dict[str, Any]]] = {
    "mixtral": (
        "MixtralConfig",
        _GROUPED | {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 20},
    ),
    "qwen3_moe": ("Qwen3MoeConfig", _GROUPED | _QWEN3_MOE | {"norm_topk_prob": True}),
    "qwen3_moe-mixed": (
        "Qwen3MoeConfig",
        _GROUPED | _QWEN3_MOE | {"mlp_only_layers": [0, 3], "tie_word_embeddings": True},
    ),
    "qwen2_moe": (
        "Qwen2MoeConfig",
        _GROUPED
        | {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
        | {"shared_expert_intermediate_size": 23, "decoder_sparse_step": 2},
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        _GROUPED | _DELTA | _QWEN3_MOE | {"shared_expert_intermediate_size": 23, "head_dim": 8},
    ),
    "gpt_oss": (
        "GptOssConfig",
        _GROUPED
        | {"head_dim": 6, "num_local_experts": 5, "num_experts_per_tok": 2}
        | {"intermediate_size": 20, "sliding_window": 7},
    ),
    "granitemoe": (
        "GraniteMoeConfig",
        _GROUPED
        | {"num_local_experts": 5, "num_experts_per_tok": 2, "intermediate_size": 20}
        | {"residual_multiplier": 0.4, "embedding_multiplier": 3.0, "logits_scaling": 2.0},
    ),
    "glm4_moe": (
        "Glm4MoeConfig",
        _GROUPED
        | {"head_dim": 8, "n_routed_experts": 5, "num_experts_per_tok": 2, "n_shared_experts": 2}
        | {"moe_intermediate_size": 20, "first_k_dense_replace": 2, "use_qk_norm": True},
    ),
    "deepseek_v3": ("DeepseekV3Config", _SHARED | _DEEPSEEK | {"q_lora_rank": 14}),
    "deepseek_v3-moonlight": (
        "DeepseekV3Config",
        _SHARED
        | _DEEPSEEK
        | {"q_lora_rank": None, "n_group": 1, "topk_group": 1, "n_routed_experts": 7},
    ),
    "glm4_moe_lite": (
        "Glm4MoeLiteConfig",
        _SHARED
        | _DEEPSEEK
        | {"q_lora_rank": 14, "n_group": 1, "topk_group": 1, "n_routed_experts": 5}
        | {"mlp_layer_types": ["dense", "dense", "sparse", "sparse", "sparse"]},
    ),
    "ernie4_5_moe": (
        "Ernie4_5_MoeConfig",
        _GROUPED
        | {"moe_num_experts": 5, "moe_k": 2, "moe_num_shared_experts": 2}
        | {"moe_intermediate_size": 12, "moe_layer_start_index": 1, "moe_layer_end_index": 3}
        | {"tie_word_embeddings": True},
    ),
    "minimax_m2": (
        "MiniMaxM2Config",
        _GROUPED
        | {"head_dim": 8, "num_local_experts": 5, "num_experts_per_tok": 2}
        | {"intermediate_size": 20, "rotary_dim": 4},
    ),
    "olmoe": (
        "OlmoeConfig",
        _GROUPED | {"num_experts": 7, "num_experts_per_tok": 3, "intermediate_size": 20},
    ),
    "gemma4-experts": (
        "Gemma4TextConfig",
        _GROUPED
        | _GEMMA4
        | {"attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True}
        | {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 20},
    ),
}

# Blocks of several kinds, each kind with a half of its own; one with experts is above.
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("Qwen3_5TextConfig", _GROUPED | _DELTA),
    "qwen3_5-tied": (
        "Qwen3_5TextConfig",
        _GROUPED
        | _DELTA
        | {"tie_word_embeddings": True, "attention_bias": True, "linear_num_value_heads": 3},
    ),
    "qwen3_5_moe": (
        "Qwen3_5MoeTextConfig",
        _GROUPED
        | _DELTA
        | _QWEN3_MOE
        | {"shared_expert_intermediate_size": 12, "head_dim": 8, "attention_bias": True}
        | {"linear_num_value_heads": 9, "tie_word_embeddings": True},
    ),
}


OF_TWO_WIDTHS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma4": (
        "Gemma4TextConfig",
        _GROUPED | _GEMMA4 | {"attention_k_eq_v": True, "num_global_key_value_heads": 1},
    ),
    "gemma4-values": ("Gemma4TextConfig", _GROUPED | _GEMMA4 | {"attention_bias": True}),
}


def tiny_config(variant: str) -> Any:
    import transformers

    kind, arguments = (VARIANTS | MIXTURES | HYBRIDS | OF_TWO_WIDTHS)[variant]
    return getattr(transformers, kind)(**arguments)


def tiny_model(variant: str, seed: int = 0) -> Any:
    """A model whose every parameter is random, norms and biases included."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(variant), dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.add_(0.3 * torch.randn_like(buffer))
    return model
