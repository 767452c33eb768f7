"""Mistral: Llama's table without biases, and heads whose width need not follow the hidden size."""

from __future__ import annotations

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import PAIRED, SILU, LlamaCppFacts

MISTRAL = Family(
    "mistral",
    "model.layers",
    gated_decoder,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts("llama", fixed=SILU, paired=PAIRED, window="sliding_window"),
)
