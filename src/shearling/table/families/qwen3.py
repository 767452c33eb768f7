"""Qwen 3 (dense): norms on each head's queries and keys, heads of explicit width."""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import SILU, UNBIASED, LlamaCppFacts
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, qk_norm="head")


_BIASES = {"attention_bias": "attn_output.bias"}
QWEN3 = Family(
    "qwen3",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    per_layer=("layer_types",),
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts("qwen3", fixed=SILU, biases=_BIASES, limits=(UNBIASED,)),
)
