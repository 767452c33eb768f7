"""Qwen 2 and 2.5: biases on query, key and value; sliding windows in the upper blocks."""

from __future__ import annotations

from typing import Any

from shearling.axes import Layout
from shearling.families.base import GROUPED_QUERY_KEYS, Family, gated_decoder, head_dim


def _layout(config: Any) -> Layout:
    return gated_decoder(config, qkv_bias=True)


QWEN2 = Family(
    "qwen2", "model.layers", _layout, GROUPED_QUERY_KEYS, head_dim, per_layer=("layer_types",)
)
