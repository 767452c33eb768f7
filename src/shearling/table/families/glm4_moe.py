"""GLM 4.5 and later with experts: GLM's attention, and DeepSeek's mixture."""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    ExpertModules,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.experts import (
    EXPERT_KEYS,
    fewer_leading,
    sigmoid_mixture,
    sigmoid_rules,
    sigmoid_sizes,
    stacks,
)
from shearling.table.families.llama_cpp import SILU, LlamaCppFacts
from shearling.table.families.llama_cpp_rows import score_bias
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    dense = gated_decoder(
        config, qkv_bias=config.attention_bias, qk_norm="head" if config.use_qk_norm else None
    )
    return sigmoid_mixture(dense, config)


GLM4_MOE = Family(
    "glm4_moe",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "n_routed_experts"},
    lambda config: head_dim(config) | sigmoid_sizes(config),
    stacked=stacks("mlp.experts"),
    mixture=ExpertModules(shared="mlp.shared_experts.down_proj"),
    rules=sigmoid_rules,
    predicting="num_nextn_predict_layers",
    adapt=explicit_head_dim,
    adapt_layers=fewer_leading,
    llama_cpp=LlamaCppFacts(
        "glm4moe",
        fixed=SILU,
        stated={"routed_scaling_factor": "expert_weights_scale"},
        ahead=True,
        stored=score_bias,
        reads=False,
    ),
)
