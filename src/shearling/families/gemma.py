"""Gemma 2 and Gemma 3 (text): norms before and after both halves of a block, tied embeddings
scaled by the square root of the hidden size, block types that alternate.
"""

from __future__ import annotations

from typing import Any

from shearling.axes import Layout
from shearling.families.base import GROUPED_QUERY_KEYS, Family, gated_decoder, head_dim

_NORMS = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)


def _gemma2(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, norms=_NORMS)


def _gemma3(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, norms=_NORMS, qk_norm=True)


GEMMA2 = Family(
    "gemma2", "model.layers", _gemma2, GROUPED_QUERY_KEYS, head_dim, per_layer=("layer_types",)
)
GEMMA3 = Family(
    "gemma3_text", "model.layers", _gemma3, GROUPED_QUERY_KEYS, head_dim, per_layer=("layer_types",)
)
