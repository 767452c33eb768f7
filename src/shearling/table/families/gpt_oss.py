"""gpt-oss: sinks beside the keys of each head, experts with biases, gate and up interleaved.

One tensor holds the matrices of all experts, inputs first. The files of the hub hold them in four
bits, which stock transformers turns back: the model that it then saves is what is read here.
"""

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
from shearling.table.families.llama_cpp import UNTIED, LlamaCppFacts, LlamaCppLimit
from shearling.table.families.llama_cpp_rows import interleaved_experts
from shearling.table.layout import Layout

_BLOCK = "model.layers.{}"
_EXPERTS = f"{_BLOCK}.mlp.experts"


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    rows = (
        Row.of(f"{_BLOCK}.self_attn.sinks", "bias", "heads"),
        Row.of(f"{_BLOCK}.mlp.router.weight", "linear", "experts", "hidden"),
        Row.of(f"{_BLOCK}.mlp.router.bias", "bias", "experts"),
        Row.of(
            f"{_EXPERTS}.gate_up_proj", "linear", "experts", "hidden", "expert_mlp*2", stacked=2
        ),
        Row.of(f"{_EXPERTS}.gate_up_proj_bias", "bias", "experts", "expert_mlp*2", stacked=1),
        Row.of(f"{_EXPERTS}.down_proj", "linear", "experts", "expert_mlp", "hidden", stacked=2),
        Row.of(f"{_EXPERTS}.down_proj_bias", "bias", "experts", "hidden", stacked=1),
    )
    dense = gated_decoder(config, qkv_bias=bias, o_bias=bias)
    return with_experts(dense, config, rows)


GPT_OSS = Family(
    "gpt_oss",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "num_local_experts", "expert_mlp": "intermediate_size"},
    head_dim,
    per_layer=("layer_types",),
    mixture=ExpertModules(router="mlp.router"),
    rules=lambda config: expert_rules(config, config.intermediate_size),
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts(
        "gpt-oss",
        fixed={"swiglu_limit": 7.0},
        window="sliding_window",
        slides=True,
        period=2,
        limits=(
            UNTIED,
            LlamaCppLimit(
                "biases in attention, where this model has none",
                lambda config, shape: bool(config.attention_bias),
            ),
        ),
        stored=interleaved_experts,
        reads=False,
    ),
)
