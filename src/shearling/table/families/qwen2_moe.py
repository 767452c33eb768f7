"""Qwen 1.5 and 2 with experts, one of which every token meets, at a weight of its own."""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Axis, Row
from shearling.table.families.base import ExpertModules, Family, gated_decoder
from shearling.table.families.experts import (
    EXPERT_KEYS,
    SPARSE,
    dense_width,
    expert_rows,
    expert_rules,
    mlp_rows,
    stacks,
    with_experts,
)
from shearling.table.families.legal import whole_heads
from shearling.table.families.llama_cpp import SILU, UNTIED, LlamaCppFacts, router
from shearling.table.families.qwen3_moe import EVERYWHERE, kinds, renumbered
from shearling.table.layout import Layout

_MLP = "model.layers.{}.mlp"
SHARED_MLP = Axis("shared_mlp", rigid=True)
MIXTURE_ROWS = (
    Row.of(f"{_MLP}.gate.weight", "linear", "experts", "hidden", kind=SPARSE),
    *expert_rows("mlp.experts", kind=SPARSE),
    *mlp_rows("mlp.shared_expert", "shared_mlp", kind=SPARSE),
    Row.of(f"{_MLP}.shared_expert_gate.weight", "linear", "1", "hidden", kind=SPARSE),
)
MIXTURE_KEYS = {"experts": "num_experts", "expert_mlp": "moe_intermediate_size"}
MODULES = ExpertModules(shared="mlp.shared_expert.down_proj", shared_gate="mlp.shared_expert_gate")


def _layout(config: Any) -> Layout:
    dense = gated_decoder(config, qkv_bias=config.qkv_bias)
    return with_experts(dense, config, MIXTURE_ROWS, kinds=kinds(config), shared=SHARED_MLP)


def _rigid(config: Any) -> dict[str, int]:
    sizes = {
        "head_dim": config.hidden_size // config.num_attention_heads,
        "shared_mlp": config.shared_expert_intermediate_size,
    }
    return sizes | dense_width(config, kinds(config))


QWEN2_MOE = Family(
    "qwen2_moe",
    "model.layers",
    _layout,
    EXPERT_KEYS | MIXTURE_KEYS,
    _rigid,
    per_layer=("layer_types",),
    stacked=stacks("mlp.experts"),
    mixture=MODULES,
    rules=lambda config: (
        whole_heads("Qwen2-MoE"),
        *expert_rules(config, config.moe_intermediate_size),
    ),
    adapt_layers=renumbered,
    llama_cpp=LlamaCppFacts(
        "qwen2moe", fixed=SILU, limits=(EVERYWHERE, UNTIED, router(normed=False)), reads=False
    ),
)
