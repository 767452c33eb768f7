"""Qwen 3.5: Qwen 3 Next's blocks of two kinds, with an MLP or with experts.

Linear attention has a matrix each for what it reads, and the tensors of experts may be stored
stacked. Heads that predict tokens further ahead (`mtp.`) are not copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shearling.table.families.base import GROUPED_QUERY_KEYS, Family, gated_decoder
from shearling.table.families.delta import DELTA_KEYS, LLAMA_CPP, adapt, apart, delta_sizes, hybrid
from shearling.table.families.experts import EXPERT_KEYS, expert_rules, stacks
from shearling.table.families.llama_cpp_rows import delta_apart
from shearling.table.families.qwen2_moe import MIXTURE_KEYS, MODULES
from shearling.table.families.qwen3_next import mixture, mixture_sizes
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    plain = gated_decoder(config, qkv_bias=bias, o_bias=bias, qk_norm="head")
    return hybrid(plain, config, apart)


QWEN3_5 = Family(
    "qwen3_5_text",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS | DELTA_KEYS,
    delta_sizes,
    per_layer=("layer_types",),
    predicting="mtp_num_hidden_layers",
    predictors="mtp.",
    adapt=adapt,
    gain_offset=1.0,
    llama_cpp=replace(LLAMA_CPP, architecture="qwen35", stored=delta_apart),
)
QWEN3_5_MOE = Family(
    "qwen3_5_moe_text",
    "model.layers",
    lambda config: hybrid(mixture(config), config, apart),
    EXPERT_KEYS | DELTA_KEYS | MIXTURE_KEYS,
    mixture_sizes,
    per_layer=("layer_types",),
    stacked=stacks("mlp.experts"),
    mixture=MODULES,
    rules=lambda config: expert_rules(config, config.moe_intermediate_size),
    predicting="mtp_num_hidden_layers",
    predictors="mtp.",
    adapt=adapt,
    gain_offset=1.0,
    llama_cpp=replace(LLAMA_CPP, architecture="qwen35moe", stored=delta_apart),
)
