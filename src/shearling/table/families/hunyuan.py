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
from shearling.table.families.llama_cpp import SILU, UNBIASED, LlamaCppFacts, LlamaCppLimit
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


def _stretched_as_published(config: Any) -> bool:
    """Whether llama.cpp's converter takes the rotary positions, if they are stretched by alpha."""
    rope, longest = config.rope_parameters, config.max_position_embeddings
    plain = rope["rope_type"] != "dynamic"
    return plain or (rope["rope_theta"] == 10000.0 and longest in (2**15, 2**18))


_STRETCHED = LlamaCppLimit(
    "rope_theta=10000 and 32,768 or 262,144 positions where alpha stretches these",
    lambda config, shape: _stretched_as_published(config),
)
HUNYUAN_DENSE = Family(
    "hunyuan_v1_dense",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts(
        "hunyuan-dense", fixed=SILU, limits=(UNBIASED, _STRETCHED), reads=False
    ),
)
