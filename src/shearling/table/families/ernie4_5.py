"""ERNIE 4.5 (dense): Llama's table; one setting gives all projections biases."""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import SILU, LlamaCppFacts, LlamaCppLimit
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    bias = bool(config.use_bias)
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=bias)


_PLAIN = LlamaCppLimit(
    "no biases, which this model has (use_bias)", lambda config, shape: not config.use_bias
)
ERNIE4_5 = Family(
    "ernie4_5",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts("ernie4_5", fixed=SILU, limits=(_PLAIN,), reads=False),
)
