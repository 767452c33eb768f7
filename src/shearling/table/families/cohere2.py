"""Cohere 2 (Command R7B): attention and MLP side by side behind one LayerNorm without a shift.

Blocks that attend to everything have no positions; logits are multiplied by ``logit_scale``.
"""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import SILU, TIED, WHOLE, LlamaCppFacts
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, norms=("input_layernorm",))


COHERE2 = Family(
    "cohere2",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    per_layer=("layer_types",),
    adapt=explicit_head_dim,
    centred=True,
    llama_cpp=LlamaCppFacts(
        "cohere2",
        fixed=SILU,
        epsilon=("layer_norm_eps", "attention.layer_norm_epsilon"),
        window="sliding_window",
        slides=True,
        period=4,
        limits=(WHOLE, TIED),
        stated={"logit_scale": "logit_scale"},
        told=lambda config: {"rotary_pct": 1.0},
        reads=False,
    ),
)
