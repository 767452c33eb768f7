"""Qwen 2 and 2.5: biases on query, key and value; sliding windows in the upper blocks."""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
    odd_heads,
)
from shearling.table.families.llama_cpp import SILU, WHOLE, LlamaCppFacts
from shearling.table.layout import Layout
from shearling.table.values import Shape


def _layout(config: Any) -> Layout:
    return gated_decoder(config, qkv_bias=True)


def _remarks(config: Any, shape: Shape) -> list[str]:
    if not odd_heads(shape):
        return []
    return [
        f"transformers reads head_dim={shape['head_dim']} from Qwen 2's config, but vLLM's code "
        "for Qwen 2 may take it to be hidden / heads."
    ]


QWEN2 = Family(
    "qwen2",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    per_layer=("layer_types",),
    adapt=explicit_head_dim,
    remarks=_remarks,
    llama_cpp=LlamaCppFacts("qwen2", fixed=SILU, limits=(WHOLE,)),
)
