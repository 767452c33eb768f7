"""Phi-3 and Phi-4 (dense): query, key and value in one tensor, gate and up in another."""

from __future__ import annotations

from typing import Any

from shearling.axes import Layout, Row
from shearling.families.base import (
    GROUPED_QUERY_AXES,
    GROUPED_QUERY_KEYS,
    Family,
    embedding_rows,
    head_dim,
    linear,
)


def _layout(config: Any) -> Layout:
    block = "model.layers.{}"
    query, key = "heads*head_dim", "kv_heads*head_dim"
    return Layout(
        GROUPED_QUERY_AXES,
        (
            *embedding_rows("model.embed_tokens.weight", config.tie_word_embeddings),
            *linear(
                f"{block}.self_attn.qkv_proj", f"{query} + {key} + {key}", "hidden", bias=False
            ),
            *linear(f"{block}.self_attn.o_proj", "hidden", query, bias=False),
            *linear(f"{block}.mlp.gate_up_proj", "mlp + mlp", "hidden", bias=False),
            *linear(f"{block}.mlp.down_proj", "hidden", "mlp", bias=False),
            Row.of(f"{block}.input_layernorm.weight", "norm", "hidden"),
            Row.of(f"{block}.post_attention_layernorm.weight", "norm", "hidden"),
            Row.of("model.norm.weight", "norm", "hidden"),
        ),
    )


PHI3 = Family("phi3", "model.layers", _layout, GROUPED_QUERY_KEYS, head_dim)
