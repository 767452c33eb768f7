"""Llama 1-3 and whatever shares its architecture (SmolLM2, TinyLlama, Vicuna, Yi)."""

from __future__ import annotations

from typing import Any

from shearling.axes import Layout
from shearling.families.base import GROUPED_QUERY_KEYS, Family, gated_decoder, head_dim


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias)


LLAMA = Family("llama", "model.layers", _layout, GROUPED_QUERY_KEYS, head_dim)
