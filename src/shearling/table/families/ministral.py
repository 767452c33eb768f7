"""Ministral (windows by block) and Ministral 3 (queries scaled by position): Mistral's table."""

from __future__ import annotations

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)

MINISTRAL = Family(
    "ministral",
    "model.layers",
    gated_decoder,
    GROUPED_QUERY_KEYS,
    head_dim,
    per_layer=("layer_types",),
    adapt=explicit_head_dim,
)
MINISTRAL3 = Family(
    "ministral3",
    "model.layers",
    gated_decoder,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
)
