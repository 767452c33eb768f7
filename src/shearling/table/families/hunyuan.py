"""Hunyuan (dense): Llama's table, and norms on queries and keys behind rotary positions."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.layout import Layout

_NORMS = {"q_norm": "query_layernorm", "k_norm": "key_layernorm"}


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    layout = gated_decoder(config, qkv_bias=bias, o_bias=bias, qk_norm="head")
    rows = []
    for row in layout.rows:
        parts = [_NORMS.get(part, part) for part in row.name.split(".")]
        rows.append(replace(row, name=".".join(parts)))
    return replace(layout, rows=tuple(rows))


HUNYUAN_DENSE = Family(
    "hunyuan_v1_dense",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
)
