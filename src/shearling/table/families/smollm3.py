"""SmolLM 3: Llama's table; every fourth block has no rotary positions."""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import PAIRED, PLAIN_MLP, SILU, UNBIASED, LlamaCppFacts
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias)


SMOLLM3 = Family(
    "smollm3",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    per_layer=("no_rope_layers", "layer_types"),
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts(
        "smollm3",
        fixed=SILU,
        paired=PAIRED,
        unrotated=4,
        limits=(UNBIASED, PLAIN_MLP),
        reads=False,
    ),
)
