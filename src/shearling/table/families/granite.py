"""Granite 3 (dense): Llama's table; embeddings, branches, attention and logits are multiplied.

The multipliers are settings that no size changes. What a half of a block writes joins the stream
times ``residual_multiplier``.
"""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Layout
from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias)


GRANITE = Family(
    "granite",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
    branch_scale=lambda config: config.residual_multiplier,
)
