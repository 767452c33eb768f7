"""Qwen 3 Next: gated DeltaNet in most blocks, gated attention in the others, experts in all.

One expert more is met by every token, at a weight of its own. Heads that predict tokens further
ahead (`mtp.`) are not copied.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shearling.errors import ShearlingError
from shearling.table.families.base import Family, gated_decoder
from shearling.table.families.delta import DELTA_KEYS, LLAMA_CPP, adapt, delta_sizes, hybrid, joined
from shearling.table.families.experts import DENSE, EXPERT_KEYS, expert_rules, stacks, with_experts
from shearling.table.families.llama_cpp_rows import delta_joined
from shearling.table.families.qwen2_moe import MIXTURE_KEYS, MIXTURE_ROWS, MODULES, SHARED_MLP
from shearling.table.families.qwen3_moe import kinds
from shearling.table.layout import Layout


def mixture(config: Any) -> Layout:
    """The table of such a mixture with attention everywhere."""
    bias = config.attention_bias
    dense = gated_decoder(config, qkv_bias=bias, o_bias=bias, qk_norm="head")
    return with_experts(dense, config, MIXTURE_ROWS, shared=SHARED_MLP)


def _layout(config: Any) -> Layout:
    if DENSE in kinds(config):
        raise ShearlingError(
            "a Qwen 3 Next whose blocks do not all have experts was given, which shearling does "
            "not know yet; give one with decoder_sparse_step=1 and no mlp_only_layers."
        )
    return hybrid(mixture(config), config, joined)


def mixture_sizes(config: Any) -> dict[str, int]:
    """Sizes that a cut leaves alone."""
    return delta_sizes(config) | {"shared_mlp": config.shared_expert_intermediate_size}


QWEN3_NEXT = Family(
    "qwen3_next",
    "model.layers",
    _layout,
    EXPERT_KEYS | DELTA_KEYS | MIXTURE_KEYS,
    mixture_sizes,
    per_layer=("layer_types",),
    stacked=stacks("mlp.experts"),
    mixture=MODULES,
    rules=lambda config: expert_rules(config, config.moe_intermediate_size),
    predictors="mtp.",
    adapt=adapt,
    gain_offset=1.0,
    llama_cpp=replace(LLAMA_CPP, architecture="qwen3next", stored=delta_joined),
)
