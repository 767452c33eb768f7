"""Seed-OSS: Llama's table; output projection and MLP have biases of their own settings."""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import PLAIN_MLP, SILU, LlamaCppFacts, LlamaCppLimit
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    return gated_decoder(
        config,
        qkv_bias=config.attention_bias,
        o_bias=config.attention_out_bias,
        mlp_bias=config.mlp_bias,
    )


_PLAIN_OUTPUT = LlamaCppLimit(
    "no bias on what attention writes, where this model has one",
    lambda config, shape: not config.attention_out_bias,
)
SEED_OSS = Family(
    "seed_oss",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts("seed_oss", fixed=SILU, limits=(_PLAIN_OUTPUT, PLAIN_MLP), reads=False),
)
