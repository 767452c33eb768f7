"""Phi-3 and Phi-4 (dense): query, key and value in one tensor, gate and up in another."""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Row
from shearling.table.families.base import (
    GROUPED_QUERY_AXES,
    GROUPED_QUERY_KEYS,
    Family,
    embedding_rows,
    explicit_head_dim,
    head_dim,
    linear,
    odd_heads,
)
from shearling.table.families.legal import Rule
from shearling.table.families.llama_cpp import SILU, WHOLE, LlamaCppFacts
from shearling.table.layout import Layout
from shearling.table.values import Shape


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


def _rules(config: Any) -> tuple[Rule, ...]:
    """Phi3Config checks the long-context factors against hidden / heads, not head_dim."""
    rope = config.rope_parameters or {}
    factors, share = rope.get("short_factor"), rope.get("partial_rotary_factor", 1.0)
    if factors is None:
        return ()
    pairs = len(factors)
    return (
        Rule(
            ("hidden", "heads"),
            f"Phi-3's config wants as many long-context factors as int(hidden // heads * {share}) "
            f"// 2 gives, and there are {pairs}",
            lambda shape: int(shape["hidden"] // shape["heads"] * share) // 2 == pairs,
        ),
    )


def _remarks(config: Any, shape: Shape) -> list[str]:
    if not odd_heads(shape):
        return []
    return [
        f"transformers and vLLM read head_dim={shape['head_dim']} from Phi-3's config, but "
        "llama.cpp takes it to be hidden / heads."
    ]


PHI3 = Family(
    "phi3",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    rules=_rules,
    adapt=explicit_head_dim,
    remarks=_remarks,
    llama_cpp=LlamaCppFacts(
        "phi3", fixed=SILU, partial=True, window="sliding_window", limits=(WHOLE,)
    ),
)
