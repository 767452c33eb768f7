"""Granite 3 with experts: Granite's multipliers, and one tensor for the matrices of all experts."""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Row
from shearling.table.families.base import (
    ExpertModules,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.experts import EXPERT_KEYS, expert_rules, with_experts
from shearling.table.families.granite import MULTIPLIERS
from shearling.table.families.llama_cpp import DIVIDED, PAIRED, SILU, LlamaCppFacts
from shearling.table.families.llama_cpp_rows import halved_inputs
from shearling.table.layout import Layout

_MODULE = "model.layers.{}.block_sparse_moe"
_ROUTER = f"{_MODULE}.router.layer.weight"
_INPUT, _OUTPUT = f"{_MODULE}.input_linear.weight", f"{_MODULE}.output_linear.weight"


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    rows = (
        Row.of(_ROUTER, "linear", "experts", "hidden"),
        Row.of(_INPUT, "linear", "experts", "expert_mlp + expert_mlp", "hidden", stacked=1),
        Row.of(_OUTPUT, "linear", "experts", "hidden", "expert_mlp", stacked=1),
    )
    dense = gated_decoder(config, qkv_bias=bias, o_bias=bias)
    return with_experts(dense, config, rows)


GRANITEMOE = Family(
    "granitemoe",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "num_local_experts", "expert_mlp": "intermediate_size"},
    head_dim,
    renamed={
        _ROUTER: f"{_MODULE}.router.weight",
        _INPUT: f"{_MODULE}.experts.gate_up_proj",
        _OUTPUT: f"{_MODULE}.experts.down_proj",
    },
    mixture=ExpertModules(
        "block_sparse_moe", "block_sparse_moe.router", "block_sparse_moe.experts"
    ),
    rules=lambda config: expert_rules(config, config.intermediate_size),
    adapt=explicit_head_dim,
    branch_scale=lambda config: config.residual_multiplier,
    llama_cpp=LlamaCppFacts(
        "granitemoe",
        fixed=SILU,
        paired=PAIRED,
        limits=(DIVIDED,),
        stated=MULTIPLIERS,
        stored=halved_inputs,
        reads=False,
    ),
)
