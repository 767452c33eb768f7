"""Configurations of checkpoints on hubs, as they are written there: every key but names of authors.

Sizes are shrunk, lists to match, and token ids to the smaller vocabulary; all else (old and new
spellings, types, what only other programs read) is as published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

_SIZES: dict[str, Any] = {
    "hidden_size": 36, "intermediate_size": 50, "num_hidden_layers": 5, "num_attention_heads": 9,
    "num_key_value_heads": 3, "vocab_size": 101, "max_position_embeddings": 64,
}  # fmt: skip
_IDS: dict[str, Any] = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
_OLD = {"initializer_range": 0.02, "use_cache": True, "transformers_version": "4.40.0"}
_SILU = {"hidden_act": "silu", "attention_dropout": 0.0}
_EYE = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "image_size": 28, "patch_size": 14,
}  # fmt: skip
_PIXTRAL = _EYE | {
    "model_type": "pixtral", "head_dim": 8, "num_channels": 3, "rope_theta": 10000.0,
    "hidden_act": "silu", "attention_dropout": 0.0, "initializer_range": 0.02,
}  # fmt: skip
_QWEN_EYE = {
    "depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "in_channels": 3,
    "out_hidden_size": 36, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2,
}  # fmt: skip
_QWEN_IDS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92,
             "vision_end_token_id": 93}  # fmt: skip
_SLIDING, _FULL = "sliding_attention", "full_attention"


@dataclass(frozen=True)
class Published:
    """A checkpoint: its configuration, and what else is unusual about its files.

    Attributes:
        raw: config.json.
        dtype: that it is stored in.
        buffers: names of tensors that old checkpoints carry, a block's number in braces.
        shard_bytes: largest size of a weight file.
        inputs_first: whether experts' matrices are stored the other way round than transformers
            writes them.
    """

    raw: dict[str, Any]
    dtype: str = "bfloat16"
    buffers: tuple[str, ...] = ()
    shard_bytes: int = 10**9
    inputs_first: bool = False


def _raw(model_type: str, name: str, *parts: dict[str, Any], **more: Any) -> dict[str, Any]:
    merged: dict[str, Any] = {"architectures": [name], "model_type": model_type, **_SIZES, **_IDS}
    for part in parts:
        merged |= part
    return merged | more


PUBLISHED: dict[str, Published] = {
    "meta-llama/Llama-2-7b-hf": Published(
        _raw("llama", "LlamaForCausalLM", _OLD, hidden_act="silu", num_key_value_heads=9,
             pretraining_tp=1, rms_norm_eps=1e-05, rope_scaling=None, torch_dtype="float16",
             tie_word_embeddings=False),
        "float16", ("model.layers.{}.self_attn.rotary_emb.inv_freq",), 20_000,
    ),
    "meta-llama/Llama-3.2-1B": Published(
        _raw("llama", "LlamaForCausalLM", _OLD, _SILU, attention_bias=False, mlp_bias=False,
             head_dim=4, pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=500000.0,
             rope_scaling={"factor": 32.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                           "original_max_position_embeddings": 16, "rope_type": "llama3"},
             tie_word_embeddings=True, torch_dtype="bfloat16"),
    ),
    "mistralai/Mistral-7B-v0.1": Published(
        _raw("mistral", "MistralForCausalLM", _OLD, hidden_act="silu", rms_norm_eps=1e-05,
             rope_theta=10000.0, sliding_window=7, tie_word_embeddings=False,
             torch_dtype="bfloat16"),
        shard_bytes=10_000,
    ),
    "mistralai/Ministral-8B-Instruct-2410": Published(
        _raw("mistral", "MistralForCausalLM", _OLD, _SILU, head_dim=6, rms_norm_eps=1e-05,
             rope_theta=100000000.0, sliding_window=32, tie_word_embeddings=False,
             torch_dtype="bfloat16"),
    ),
    "Qwen/Qwen2.5-0.5B": Published(
        _raw("qwen2", "Qwen2ForCausalLM", _OLD, _SILU, max_window_layers=4, rms_norm_eps=1e-06,
             rope_theta=1000000.0, sliding_window=32, tie_word_embeddings=True,
             use_mrope=False, use_sliding_window=False, torch_dtype="bfloat16"),
    ),
    "Qwen/Qwen3-4B": Published(
        _raw("qwen3", "Qwen3ForCausalLM", _OLD, _SILU, attention_bias=False, head_dim=6,
             max_window_layers=5, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=1000000,
             sliding_window=None, tie_word_embeddings=True, use_sliding_window=False,
             torch_dtype="bfloat16"),
    ),
    "google/gemma-2-2b": Published(
        _raw("gemma2", "Gemma2ForCausalLM", _OLD, attention_bias=False, attention_dropout=0.0,
             attn_logit_softcapping=50.0, final_logit_softcapping=30.0,
             cache_implementation="hybrid", head_dim=6,
             hidden_act="gelu_pytorch_tanh", hidden_activation="gelu_pytorch_tanh",
             query_pre_attn_scalar=6, rms_norm_eps=1e-06, rope_theta=10000.0, sliding_window=7,
             torch_dtype="float32"),
        "float32",
    ),
    "google/gemma-3-1b-pt": Published(
        _raw("gemma3_text", "Gemma3ForCausalLM", _OLD, attention_bias=False,
             attention_dropout=0.0, attn_logit_softcapping=None, cache_implementation="hybrid",
             final_logit_softcapping=None, head_dim=6, hidden_activation="gelu_pytorch_tanh",
             query_pre_attn_scalar=6, rms_norm_eps=1e-06, rope_local_base_freq=10000,
             rope_scaling=None, rope_theta=1000000, sliding_window=7, sliding_window_pattern=3,
             torch_dtype="bfloat16"),
    ),
    "microsoft/Phi-4-mini-instruct": Published(
        _raw("phi3", "Phi3ForCausalLM", _OLD, attention_bias=False, attention_dropout=0.0,
             auto_map={"AutoConfig": "configuration_phi3.Phi3Config",
                       "AutoModelForCausalLM": "modeling_phi3.Phi3ForCausalLM"},
             embd_pdrop=0.0, full_attn_mod=1, hidden_act="silu", interpolate_factor=1,
             lm_head_bias=False, mlp_bias=False, original_max_position_embeddings=16,
             partial_rotary_factor=0.75, resid_pdrop=0.0, rms_norm_eps=1e-05,
             rope_scaling={"long_factor": [1.5], "short_factor": [1.0], "type": "longrope"},
             rope_theta=10000.0, sliding_window=64, tie_word_embeddings=True,
             torch_dtype="bfloat16"),
    ),
    "EleutherAI/pythia-410m": Published(
        {key: value for key, value in _raw(
            "gpt_neox", "GPTNeoXForCausalLM", _OLD, hidden_act="gelu", layer_norm_eps=1e-05,
            rotary_emb_base=10000, rotary_pct=0.5, tie_word_embeddings=False,
            use_parallel_residual=True, torch_dtype="float16").items()
         if key not in ("num_key_value_heads", "pad_token_id")},
        "float16",
        ("gpt_neox.layers.{}.attention.bias", "gpt_neox.layers.{}.attention.masked_bias",
         "gpt_neox.layers.{}.attention.rotary_emb.inv_freq"),
    ),
    "facebook/opt-125m": Published(
        {"_name_or_path": "facebook/opt-125m", "activation_dropout": 0.0,
         "activation_function": "relu", "architectures": ["OPTForCausalLM"],
         "attention_dropout": 0.0, "do_layer_norm_before": True, "dropout": 0.1, "ffn_dim": 50,
         "hidden_size": 36, "init_std": 0.02, "layerdrop": 0.0, "max_position_embeddings": 64,
         "model_type": "opt", "num_attention_heads": 9, "num_hidden_layers": 5, "prefix": "</s>",
         "torch_dtype": "float16", "use_cache": True, "vocab_size": 101,
         "word_embed_proj_dim": 36, **_IDS},
        "float16",
    ),
    "HuggingFaceTB/SmolLM3-3B": Published(
        _raw("smollm3", "SmolLM3ForCausalLM", _OLD, _SILU, attention_bias=False,
             layer_types=[_FULL] * 5, max_window_layers=28, mlp_bias=False,
             no_rope_layer_interval=4, no_rope_layers=[1, 1, 1, 0, 1], pretraining_tp=2,
             rms_norm_eps=1e-06, rope_scaling=None, rope_theta=5000000.0, sliding_window=None,
             tie_word_embeddings=True, torch_dtype="bfloat16", use_sliding_window=False),
    ),
    "allenai/OLMo-2-1124-7B": Published(
        _raw("olmo2", "Olmo2ForCausalLM", _OLD, _SILU, attention_bias=False,
             num_key_value_heads=9, rms_norm_eps=1e-06, rope_scaling=None, rope_theta=500000,
             tie_word_embeddings=False, torch_dtype="float32"),
        "float32", shard_bytes=30_000,
    ),
    "allenai/Olmo-3-1025-7B": Published(
        _raw("olmo3", "Olmo3ForCausalLM", _OLD, _SILU, attention_bias=False,
             num_key_value_heads=9, layer_types=[_SLIDING, _SLIDING, _SLIDING, _FULL, _SLIDING],
             rms_norm_eps=1e-06, rope_theta=500000, sliding_window=7,
             rope_scaling={"attention_factor": 1.2079441541679836, "beta_fast": 32.0,
                           "beta_slow": 1.0, "factor": 8.0,
                           "original_max_position_embeddings": 8, "rope_type": "yarn"},
             tie_word_embeddings=False, torch_dtype="bfloat16"),
    ),
    "ibm-granite/granite-3.3-2b-instruct": Published(
        _raw("granite", "GraniteForCausalLM", _OLD, hidden_act="silu", attention_bias=False,
             attention_dropout=0.0, attention_multiplier=0.015625, embedding_multiplier=12.0,
             logits_scaling=8.0, mlp_bias=False, residual_multiplier=0.22, rms_norm_eps=1e-05,
             rope_scaling=None, rope_theta=10000000.0, tie_word_embeddings=True,
             torch_dtype="bfloat16"),
    ),
    "ibm-granite/granite-4.0-micro": Published(
        _raw("granitemoehybrid", "GraniteMoeHybridForCausalLM", _OLD, hidden_act="silu",
             attention_bias=False, attention_dropout=0.0, attention_multiplier=0.015625,
             embedding_multiplier=12, init_method="mup", layer_types=["attention"] * 5,
             logits_scaling=10, mamba_chunk_size=256, mamba_conv_bias=True, mamba_d_conv=4,
             mamba_d_head=18, mamba_d_state=256, mamba_expand=2, mamba_n_groups=1,
             mamba_n_heads=4, mamba_proj_bias=False, normalization_function="rmsnorm",
             num_experts_per_tok=0, num_local_experts=0, output_router_logits=False,
             position_embedding_type="rope", residual_multiplier=0.22, rms_norm_eps=1e-05,
             rope_scaling=None, rope_theta=10000000, router_aux_loss_coef=0.01,
             shared_intermediate_size=50, tie_word_embeddings=True, torch_dtype="bfloat16"),
    ),
    "THUDM/GLM-4-9B-0414": Published(
        _raw("glm4", "Glm4ForCausalLM", _OLD, attention_bias=True, attention_dropout=0.0,
             head_dim=8, hidden_act="silu", num_key_value_heads=3, partial_rotary_factor=0.5,
             rms_norm_eps=1e-05, rope_theta=10000.0, tie_word_embeddings=False,
             torch_dtype="bfloat16", eos_token_id=[2, 3, 4]),
    ),
    "CohereLabs/c4ai-command-r7b-12-2024": Published(
        _raw("cohere2", "Cohere2ForCausalLM", _OLD, _SILU, attention_bias=False,
             cache_implementation="hybrid", head_dim=4, layer_norm_eps=1e-05, layer_switch=4,
             logit_scale=0.25, order_of_interleaved_layers="local_attn_first",
             position_embedding_type="rope_gptj", rope_scaling=None, rope_theta=50000,
             rotary_pct=1.0, sliding_window=7, sliding_window_pattern=4, torch_dtype="float16",
             use_embedding_sharing=True, use_gated_activation=True, use_parallel_block=True,
             use_parallel_embedding=False, use_qk_norm=False),
        "float16",
    ),
    "LGAI-EXAONE/EXAONE-4.0-32B": Published(
        _raw("exaone4", "Exaone4ForCausalLM", _OLD, _SILU, head_dim=6, rms_norm_eps=1e-05,
             layer_types=[_SLIDING, _SLIDING, _SLIDING, _FULL, _SLIDING],
             rope_scaling={"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                           "original_max_position_embeddings": 8, "rope_type": "llama3"},
             rope_theta=1000000, sliding_window=7, sliding_window_pattern="LLLG",
             tie_word_embeddings=False, torch_dtype="bfloat16"),
    ),
    "LGAI-EXAONE/EXAONE-4.0-1.2B": Published(
        _raw("exaone4", "Exaone4ForCausalLM", _OLD, _SILU, head_dim=6, rms_norm_eps=1e-05,
             layer_types=[_FULL] * 5, rope_theta=1000000, sliding_window=None,
             rope_scaling={"factor": 16.0, "high_freq_factor": 4.0, "low_freq_factor": 1.0,
                           "original_max_position_embeddings": 8, "rope_type": "llama3"},
             sliding_window_pattern=None, tie_word_embeddings=True, torch_dtype="bfloat16"),
    ),
    "baidu/ERNIE-4.5-0.3B-PT": Published(
        _raw("ernie4_5", "Ernie4_5ForCausalLM", head_dim=6, hidden_act="silu",
             initializer_range=0.02, rms_norm_eps=1e-05, rope_scaling=None, rope_theta=500000.0,
             tie_word_embeddings=True, torch_dtype="bfloat16", use_bias=False, use_cache=False),
    ),
    "tencent/Hunyuan-1.8B-Instruct": Published(
        _raw("hunyuan_v1_dense", "HunYuanDenseV1ForCausalLM", _OLD, _SILU, attention_bias=False,
             attention_head_dim=6, cla_share_factor=2, eod_token_id=3, head_dim=6, mlp_bias=False,
             norm_type="rms", pretraining_tp=1, rms_norm_eps=1e-05, rope_theta=10000.0,
             rope_scaling={"alpha": 1000.0, "beta_fast": 32, "beta_slow": 1, "factor": 1.0,
                           "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"},
             tie_word_embeddings=True, torch_dtype="bfloat16", use_cla=False, use_qk_norm=True,
             use_rotary_pos_emb=True),
    ),
    "ByteDance-Seed/Seed-OSS-36B-Base": Published(
        _raw("seed_oss", "SeedOssForCausalLM", _OLD, attention_bias=True, attention_dropout=0.1,
             attention_out_bias=False, head_dim=6, hidden_act="silu", mlp_bias=False,
             residual_dropout=0.1, rms_norm_eps=1e-06, rope_scaling={"rope_type": "default"},
             rope_theta=10000000.0, tie_word_embeddings=False, torch_dtype="bfloat16"),
    ),
    "llava-hf/llava-1.5-7b-hf": Published(
        {"architectures": ["LlavaForConditionalGeneration"], "ignore_index": -100,
         "image_token_index": 90, "model_type": "llava", "pad_token_id": 0,
         "projector_hidden_act": "gelu", "tie_word_embeddings": False, "torch_dtype": "float16",
         "transformers_version": "4.36.0.dev0", "vision_feature_layer": -2,
         "vision_feature_select_strategy": "default",
         "text_config": {"_name_or_path": "lmsys/vicuna-7b-v1.5", "model_type": "llama",
                         "architectures": ["LlamaForCausalLM"], "rms_norm_eps": 1e-05,
                         "torch_dtype": "float16", **_SIZES},
         "vision_config": _EYE | {"model_type": "clip_vision_model", "projection_dim": 8,
                                  "vocab_size": 32000}},
        "float16", shard_bytes=30_000,
    ),
    "HuggingFaceTB/SmolVLM-256M-Instruct": Published(
        {"architectures": ["Idefics3ForConditionalGeneration"], "image_token_id": 90,
         "model_type": "idefics3", "scale_factor": 4, "tie_word_embeddings": False,
         "torch_dtype": "bfloat16", "transformers_version": "4.46.0", "use_cache": True,
         "text_config": {"_flash_attn_2_enabled": True, "architectures": ["VLlama3ForCausalLM"],
                         "head_dim": 4, "is_llama_config": True, "model_type": "llama",
                         "neftune_noise_alpha": 0.0, "pad_token_id": 2, "pixel_shuffle_factor": 4,
                         "rms_norm_eps": 1e-05, "rope_interleaved": False, "rope_theta": 100000,
                         "tie_word_embeddings": False, "torch_dtype": "bfloat16",
                         "use_resampler": False, **_SIZES},
         "vision_config": _EYE | {"max_image_size": {"longest_edge": 28}, "model_type": "idefics3",
                                  "size": {"longest_edge": 112}, "tie_word_embeddings": False},
         "vocab_size": 101},
    ),
    "HuggingFaceTB/SmolVLM2-2.2B-Instruct": Published(
        {"architectures": ["SmolVLMForConditionalGeneration"], "image_token_id": 90,
         "model_type": "smolvlm", "scale_factor": 3, "tie_word_embeddings": False,
         "torch_dtype": "float32", "transformers_version": "4.47.1", "use_cache": False,
         "text_config": {"architectures": ["VLlama3ForCausalLM"], "head_dim": 4,
                         "model_type": "llama", "pad_token_id": 2, "rms_norm_eps": 1e-05,
                         "rope_theta": 130000.0, "torch_dtype": "bfloat16", "use_cache": False,
                         **_SIZES},
         "vision_config": _EYE | {"max_image_size": {"longest_edge": 28},
                                  "model_type": "smolvlm_vision", "tie_word_embeddings": False},
         "vocab_size": 101},
        "float32",
    ),
    "OpenGVLab/InternVL3-1B-hf": Published(
        {"architectures": ["InternVLForConditionalGeneration"], "downsample_ratio": 0.5,
         "image_seq_length": 4, "image_token_id": 90, "model_type": "internvl",
         "projector_hidden_act": "gelu", "torch_dtype": "bfloat16",
         "transformers_version": "4.52.0.dev0", "vision_feature_layer": -1,
         "vision_feature_select_strategy": "default",
         "text_config": {"architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0,
                         "hidden_act": "silu", "initializer_range": 0.02, "max_window_layers": 70,
                         "model_type": "qwen2", "rms_norm_eps": 1e-06, "rope_theta": 1000000.0,
                         "rope_scaling": {"factor": 2.0, "rope_type": "dynamic", "type": "dynamic"},
                         "sliding_window": None, "torch_dtype": "bfloat16", "use_cache": False,
                         "use_sliding_window": False, **_SIZES},
         "vision_config": _EYE | {"attention_bias": True, "attention_dropout": 0.0,
                                  "hidden_act": "gelu", "image_size": [28, 28],
                                  "initializer_range": 0.02, "layer_norm_eps": 1e-06,
                                  "layer_scale_init_value": 0.1, "model_type": "internvl_vision",
                                  "norm_type": "layer_norm", "num_channels": 3,
                                  "patch_size": [14, 14], "use_mean_pooling": True}},
    ),
    "google/gemma-3-4b-it": Published(
        {"architectures": ["Gemma3ForConditionalGeneration"], "boi_token_index": 91,
         "eoi_token_index": 92, "eos_token_id": [2, 3], "image_token_index": 90,
         "initializer_range": 0.02, "mm_tokens_per_image": 4, "model_type": "gemma3",
         "text_config": {"model_type": "gemma3_text", "head_dim": 6, **_SIZES,
                         "rope_scaling": {"factor": 8.0, "rope_type": "linear"},
                         "query_pre_attn_scalar": 6, "sliding_window": 7},
         "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
         "vision_config": _EYE | {"model_type": "siglip_vision_model",
                                  "vision_use_head": False}},
    ),
    "mistralai/Mistral-Small-3.1-24B-Instruct-2503": Published(
        {"architectures": ["Mistral3ForConditionalGeneration"], "image_token_index": 90,
         "model_type": "mistral3", "multimodal_projector_bias": False,
         "projector_hidden_act": "gelu", "spatial_merge_size": 2,
         "text_config": {"attention_dropout": 0.0, "head_dim": 6, "hidden_act": "silu",
                         "initializer_range": 0.02, "model_type": "mistral",
                         "rms_norm_eps": 1e-05, "rope_theta": 1000000000.0,
                         "sliding_window": None, "use_cache": True, **_SIZES},
         "torch_dtype": "bfloat16", "transformers_version": "4.50.0.dev0",
         "vision_config": _PIXTRAL, "vision_feature_layer": -1},
        shard_bytes=30_000,
    ),
    "mistralai/Ministral-3-8B-Base-2512": Published(
        {"architectures": ["Mistral3ForConditionalGeneration"], "dtype": "bfloat16",
         "image_token_index": 90, "model_type": "mistral3", "multimodal_projector_bias": False,
         "projector_hidden_act": "gelu", "spatial_merge_size": 2,
         "text_config": {"attention_dropout": 0.0, "head_dim": 6, "hidden_act": "silu",
                         "initializer_range": 0.02, "model_type": "ministral3",
                         "rms_norm_eps": 1e-05, "sliding_window": None, "use_cache": True,
                         "tie_word_embeddings": False, **_SIZES,
                         "rope_parameters": {
                             "beta_fast": 32.0, "beta_slow": 1.0, "factor": 8.0,
                             "llama_4_scaling_beta": 0.1, "mscale": 1.0, "mscale_all_dim": 1.0,
                             "original_max_position_embeddings": 8, "rope_theta": 1000000.0,
                             "rope_type": "yarn", "type": "yarn"}},
         "tie_word_embeddings": False, "transformers_version": "5.0.0.dev0",
         "vision_config": _PIXTRAL, "vision_feature_layer": -1},
    ),
    "Qwen/Qwen2.5-VL-3B-Instruct": Published(
        _raw("qwen2_5_vl", "Qwen2_5_VLForConditionalGeneration", _OLD, _SILU, _QWEN_IDS,
             max_window_layers=5, rms_norm_eps=1e-06, rope_theta=1000000.0, sliding_window=32,
             hidden_size=54, tie_word_embeddings=True, use_sliding_window=False,
             vision_token_id=94, torch_dtype="bfloat16",
             rope_scaling={"type": "mrope", "mrope_section": [1, 1, 1]},
             vision_config={"depth": 2, "hidden_act": "silu", "hidden_size": 16,
                            "intermediate_size": 24, "num_heads": 2, "in_chans": 3,
                            "out_hidden_size": 54, "patch_size": 14, "spatial_merge_size": 2,
                            "spatial_patch_size": 14, "window_size": 28,
                            "fullatt_block_indexes": [1], "tokens_per_second": 2,
                            "temporal_patch_size": 2}),
    ),
    "Qwen/Qwen3-VL-4B-Instruct": Published(
        {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl",
         "tie_word_embeddings": True, "transformers_version": "4.57.0.dev0", **_QWEN_IDS,
         "text_config": {"attention_bias": False, "bos_token_id": 1, "dtype": "bfloat16",
                         "eos_token_id": 2, "head_dim": 6, "initializer_range": 0.02,
                         "model_type": "qwen3_vl_text", "rms_norm_eps": 1e-06,
                         "rope_scaling": {"mrope_interleaved": True, "mrope_section": [1, 1, 1],
                                          "rope_type": "default"},
                         "rope_theta": 5000000, "tie_word_embeddings": True, "use_cache": True,
                         **_SILU, **_SIZES},
         "vision_config": _QWEN_EYE | {"deepstack_visual_indexes": [0, 1],
                                       "hidden_act": "gelu_pytorch_tanh",
                                       "model_type": "qwen3_vl", "num_position_embeddings": 16}},
    ),
}  # fmt: skip
