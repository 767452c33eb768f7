"""Granite 3 and 4 (dense): Llama's table; multipliers at embeddings, branches, attention, logits.

The multipliers are settings that no size changes. What a half of a block writes joins the stream
times `residual_multiplier`. Granite 4 is an architecture of hybrids: its dense models have neither
Mamba blocks nor experts, and their MLP is what hybrids call a shared one.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shearling.errors import ShearlingError
from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.legal import Rule
from shearling.table.families.llama_cpp import DIVIDED, PAIRED, SILU, LlamaCppFacts, LlamaCppLimit
from shearling.table.families.llama_cpp_rows import halved_inputs
from shearling.table.layout import Layout
from shearling.table.values import Shape

MULTIPLIERS = {
    "attention_multiplier": "attention.scale",
    "embedding_multiplier": "embedding_scale",
    "residual_multiplier": "residual_scale",
    "logits_scaling": "logit_scale",
}
_NAMES = {
    "mlp.gate_up_proj": "shared_mlp.input_linear",
    "mlp.down_proj": "shared_mlp.output_linear",
}


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias)


def _layout4(config: Any) -> Layout:
    if config.num_local_experts or "linear_attention" in config.layers_block_type:
        raise ShearlingError(
            "a Granite 4 with Mamba blocks or experts was given, which shearling does not know "
            "yet; give a dense one, such as granite-4.0-micro."
        )
    bias = config.attention_bias
    layout = gated_decoder(config, qkv_bias=bias, o_bias=bias, fused_mlp=True)
    rows = []
    for row in layout.rows:
        ours = next((part for part in _NAMES if part in row.name), "")
        rows.append(replace(row, name=row.name.replace(ours, _NAMES[ours])) if ours else row)
    return replace(layout, rows=tuple(rows))


def _rules4(config: Any) -> tuple[Rule, ...]:
    """What the config wants of Mamba blocks, whether there are any or not."""
    expand, heads = config.mamba_expand, config.mamba_n_heads
    return (
        Rule(
            ("hidden",),
            f"Granite 4's config wants {expand} * hidden to be a multiple of mamba_n_heads={heads}",
            lambda shape: expand * shape["hidden"] % heads == 0,
        ),
    )


def _adapt4(raw: dict[str, Any], config: Any, shape: Shape) -> dict[str, Any]:
    raw = explicit_head_dim(raw, config, shape)
    changed = shape["hidden"] != config.hidden_size and "mamba_d_head" in raw
    return {**raw, "mamba_d_head": "auto"} if changed else raw


_FACTS = LlamaCppFacts(
    "granite", fixed=SILU, paired=PAIRED, limits=(DIVIDED,), stated=MULTIPLIERS, reads=False
)
_ROTATED = LlamaCppLimit(
    "rotary positions, which this model does without",
    lambda config, shape: config.position_embedding_type == "rope",
)
GRANITE = Family(
    "granite",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
    branch_scale=lambda config: config.residual_multiplier,
    llama_cpp=_FACTS,
)
GRANITE4 = Family(
    "granitemoehybrid",
    "model.layers",
    _layout4,
    GROUPED_QUERY_KEYS | {"mlp": "shared_intermediate_size"},
    head_dim,
    per_layer=("layer_types",),
    rules=_rules4,
    adapt=_adapt4,
    branch_scale=lambda config: config.residual_multiplier,
    llama_cpp=replace(
        _FACTS,
        limits=(*_FACTS.limits, _ROTATED),
        # transformers 5 calls blocks otherwise than the converter does, and counts experts of none;
        # a cut has no width of heads for blocks that there are not.
        told=lambda config: {
            "layer_types": ["attention"] * config.num_hidden_layers,
            "num_experts_per_tok": 0,
            "mamba_d_head": 1,
            "intermediate_size": config.shared_intermediate_size,
        },
        stored=halved_inputs,
    ),
)
