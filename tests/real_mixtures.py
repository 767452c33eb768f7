"""Configurations of mixtures of experts on hubs, as :mod:`real_configs` has those of others."""

from __future__ import annotations

from typing import Any

from real_configs import _OLD, _QWEN_EYE, _QWEN_IDS, _SILU, _SIZES, Published, _raw

_EXPERTS = {"num_experts_per_tok": 2, "output_router_logits": False}
_ROUTED = {"n_routed_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
_DEEPSEEK: dict[str, Any] = _SILU | _ROUTED | {
    "attention_bias": False, "ep_size": 1, "first_k_dense_replace": 1, "initializer_range": 0.02,
    "kv_lora_rank": 8, "moe_layer_freq": 1, "norm_topk_prob": True, "num_key_value_heads": 9,
    "qk_nope_head_dim": 6, "qk_rope_head_dim": 4, "v_head_dim": 5, "scoring_func": "sigmoid",
    "tie_word_embeddings": False, "topk_method": "noaux_tc", "torch_dtype": "bfloat16",
    "use_cache": True, "pretraining_tp": 1, "auto_map": {
        "AutoConfig": "configuration_deepseek.DeepseekV3Config",
        "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM",
    },
}  # fmt: skip

PUBLISHED_MIXTURES: dict[str, Published] = {
    "mistralai/Mixtral-8x7B-v0.1": Published(
        _raw("mixtral", "MixtralForCausalLM", _OLD, _SILU, _EXPERTS, num_local_experts=5,
             intermediate_size=16, rms_norm_eps=1e-05, rope_theta=1000000.0,
             router_aux_loss_coef=0.02, sliding_window=None, tie_word_embeddings=False,
             torch_dtype="bfloat16"),
        shard_bytes=20_000,
    ),
    "Qwen/Qwen3-30B-A3B": Published(
        _raw("qwen3_moe", "Qwen3MoeForCausalLM", _OLD, _SILU, _EXPERTS, num_experts=5,
             attention_bias=False, decoder_sparse_step=1, head_dim=6, max_window_layers=5,
             mlp_only_layers=[], moe_intermediate_size=16, norm_topk_prob=True, rms_norm_eps=1e-06,
             rope_scaling=None, rope_theta=1000000.0, router_aux_loss_coef=0.001,
             sliding_window=None, tie_word_embeddings=False, torch_dtype="bfloat16",
             use_sliding_window=False),
    ),
    "Qwen/Qwen3-VL-30B-A3B-Instruct": Published(
        {"architectures": ["Qwen3VLMoeForConditionalGeneration"], "model_type": "qwen3_vl_moe",
         "tie_word_embeddings": False, "transformers_version": "4.57.0.dev0", **_QWEN_IDS,
         "text_config": {"attention_bias": False, "bos_token_id": 1, "decoder_sparse_step": 1,
                         "dtype": "bfloat16", "eos_token_id": 2, "head_dim": 6,
                         "initializer_range": 0.02, "mlp_only_layers": [],
                         "model_type": "qwen3_vl_moe_text", "moe_intermediate_size": 16,
                         "norm_topk_prob": True, "num_experts": 5, "num_experts_per_tok": 2,
                         "rms_norm_eps": 1e-06, "rope_theta": 5000000, "use_cache": True,
                         "rope_scaling": {"mrope_interleaved": True, "mrope_section": [1, 1, 1],
                                          "rope_type": "default"},
                         **_SILU, **_SIZES},
         "vision_config": _QWEN_EYE | {"deepstack_visual_indexes": [0, 1],
                                       "hidden_act": "gelu_pytorch_tanh",
                                       "initializer_range": 0.02, "model_type": "qwen3_vl_moe",
                                       "num_position_embeddings": 16}},
        inputs_first=True,
    ),
    "Qwen/Qwen1.5-MoE-A2.7B": Published(
        _raw("qwen2_moe", "Qwen2MoeForCausalLM", _OLD, _SILU, _EXPERTS, num_experts=5,
             decoder_sparse_step=1, max_window_layers=21, moe_intermediate_size=16,
             norm_topk_prob=False, rms_norm_eps=1e-06, rope_theta=1000000.0,
             router_aux_loss_coef=0.001, shared_expert_intermediate_size=24, sliding_window=32768,
             tie_word_embeddings=False, torch_dtype="bfloat16", use_sliding_window=False),
    ),
    "allenai/OLMoE-1B-7B-0924": Published(
        _raw("olmoe", "OlmoeForCausalLM", _OLD, _SILU, _EXPERTS, num_experts=5,
             attention_bias=False, clip_qkv=None, intermediate_size=16, norm_topk_prob=False,
             num_key_value_heads=9, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=10000.0,
             router_aux_loss_coef=0.01, tie_word_embeddings=False, torch_dtype="bfloat16"),
    ),
    "moonshotai/Moonlight-16B-A3B": Published(
        _raw("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK, aux_loss_alpha=0.001, n_group=1,
             n_shared_experts=2, num_nextn_predict_layers=0, q_lora_rank=None, rms_norm_eps=1e-05,
             rope_theta=50000.0, routed_scaling_factor=2.446, seq_aux=True, topk_group=1,
             transformers_version="4.48.0"),
    ),
    "unsloth/DeepSeek-V3-bf16": Published(
        _raw("deepseek_v3", "DeepseekV3ForCausalLM", _DEEPSEEK, aux_loss_alpha=0.001, n_group=4,
             n_routed_experts=16, n_shared_experts=1, num_nextn_predict_layers=1, q_lora_rank=12,
             rms_norm_eps=1e-06, rope_theta=10000, routed_scaling_factor=2.5, topk_group=2,
             rope_scaling={"beta_fast": 32, "beta_slow": 1, "factor": 4, "mscale": 1.0,
                           "mscale_all_dim": 1.0, "original_max_position_embeddings": 16,
                           "type": "yarn"},
             transformers_version="4.33.1"),
        buffers=("model.layers.5.mlp.experts.{}.down_proj.weight",),
    ),
    "zai-org/GLM-4.5-Air": Published(
        _raw("glm4_moe", "Glm4MoeForCausalLM", _SILU, _ROUTED, attention_bias=True,
             first_k_dense_replace=1, head_dim=8, initializer_range=0.02, n_group=1,
             n_shared_experts=1, norm_topk_prob=True, num_nextn_predict_layers=1,
             partial_rotary_factor=0.5, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=1000000,
             routed_scaling_factor=1.0, tie_word_embeddings=False, topk_group=1,
             torch_dtype="bfloat16", transformers_version="4.54.0", use_cache=True,
             use_qk_norm=False, eos_token_id=[2, 3, 4]),
        buffers=("model.layers.5.enorm.{}.weight",),
    ),
    "zai-org/GLM-4.7-Flash": Published(
        _raw("glm4_moe_lite", "Glm4MoeLiteForCausalLM", _SILU, _ROUTED, attention_bias=False,
             dtype="bfloat16", eos_token_id=[2, 3, 4], first_k_dense_replace=1, kv_lora_rank=8,
             n_group=1, n_shared_experts=1, norm_topk_prob=True, num_key_value_heads=9,
             num_nextn_predict_layers=1, partial_rotary_factor=1.0, q_lora_rank=12,
             qk_nope_head_dim=6, qk_rope_head_dim=4, v_head_dim=5, rms_norm_eps=1e-05,
             rope_scaling=None, rope_theta=1000000, routed_scaling_factor=1.8,
             tie_word_embeddings=False, topk_group=1, topk_method="noaux_tc",
             transformers_version="5.0.0rc0"),
        buffers=("model.layers.5.enorm.{}.weight",),
    ),
    "baidu/ERNIE-4.5-21B-A3B-PT": Published(
        _raw("ernie4_5_moe", "Ernie4_5_MoeForCausalLM", hidden_act="silu", moe_capacity=[64, 64],
             moe_gate="topk", moe_intermediate_size=16, moe_k=2, moe_layer_end_index=4,
             moe_layer_interval=1, moe_layer_start_index=1, moe_norm_min=1e-12, moe_num_experts=5,
             moe_num_shared_experts=2, moe_use_aux_free=True, num_nextn_predict_layers=1,
             rms_norm_eps=1e-05, rope_scaling=None, rope_theta=500000.0, tie_word_embeddings=True,
             torch_dtype="bfloat16", use_bias=False, use_cache=True),
        buffers=("model.mtp_block.{}.input_layernorm.weight",),
    ),
    "MiniMaxAI/MiniMax-M2, dequantised": Published(
        _raw("minimax_m2", "MiniMaxM2ForCausalLM", attention_dropout=0.0, attn_type_list=[1] * 5,
             auto_map={"AutoConfig": "configuration_minimax_m2.MiniMaxM2Config",
                       "AutoModelForCausalLM": "modeling_minimax_m2.MiniMaxM2ForCausalLM"},
             head_dim=8, hidden_act="silu", initializer_range=0.02, intermediate_size=16,
             layernorm_full_attention_beta=1.0, max_model_len=64, mtp_transformer_layers=1,
             num_experts_per_tok=2, num_local_experts=5, num_mtp_modules=3,
             output_router_logits=False, qk_norm_type="per_layer", rms_norm_eps=1e-06,
             rope_theta=5000000, rotary_dim=4, router_aux_loss_coef=0.001,
             router_jitter_noise=0.0, scoring_func="sigmoid", shared_intermediate_size=0,
             sliding_window=None, tie_word_embeddings=False, transformers_version="4.46.1",
             use_cache=True, use_mtp=True, use_qk_norm=True, use_routing_bias=True,
             torch_dtype="bfloat16"),
    ),
    "ibm-granite/granite-3.1-1b-a400m-instruct": Published(
        _raw("granitemoe", "GraniteMoeForCausalLM", _OLD, _SILU, _EXPERTS, num_local_experts=5,
             attention_bias=False, attention_multiplier=0.25, embedding_multiplier=12.0,
             intermediate_size=16, logits_scaling=6.0, residual_multiplier=0.22, rms_norm_eps=1e-06,
             rope_scaling=None, rope_theta=1500000.0, router_aux_loss_coef=0.0,
             tie_word_embeddings=True, torch_dtype="bfloat16"),
    ),
    "openai/gpt-oss-20b, dequantised": Published(
        _raw("gpt_oss", "GptOssForCausalLM", attention_bias=True, attention_dropout=0.0,
             experts_per_token=2, head_dim=6, hidden_act="silu", initial_context_length=16,
             initializer_range=0.02, intermediate_size=16, num_experts_per_tok=2,
             num_local_experts=5, output_router_logits=False, rms_norm_eps=1e-05,
             layer_types=["sliding_attention", "full_attention", "sliding_attention",
                          "full_attention", "sliding_attention"],
             rope_scaling={"beta_fast": 32.0, "beta_slow": 1.0, "factor": 4.0,
                           "original_max_position_embeddings": 16, "rope_type": "yarn",
                           "truncate": False},
             rope_theta=150000, router_aux_loss_coef=0.9, sliding_window=7, swiglu_limit=7.0,
             tie_word_embeddings=False, transformers_version="4.55.0.dev0", use_cache=True),
    ),
}  # fmt: skip
