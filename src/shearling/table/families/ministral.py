"""Ministral (windows by block) and Ministral 3 (queries scaled by position): Mistral's table."""

from __future__ import annotations

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import PAIRED, SILU, LlamaCppFacts, LlamaCppLimit

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
    llama_cpp=LlamaCppFacts(
        "mistral3",
        fixed=SILU,
        paired=PAIRED,
        window="sliding_window",
        limits=(
            LlamaCppLimit(
                "rope_parameters of the type yarn with mscale_all_dim and llama_4_scaling_beta",
                lambda config, shape: (
                    config.rope_parameters["rope_type"] == "yarn"
                    and {"mscale_all_dim", "llama_4_scaling_beta"} <= config.rope_parameters.keys()
                ),
            ),
        ),
        reads=False,
    ),
)
