"""Llama 1-3 and whatever shares its architecture (SmolLM2, TinyLlama, Vicuna, Yi)."""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.legal import Rule, divided_hidden
from shearling.table.families.llama_cpp import PAIRED, SILU, LlamaCppFacts
from shearling.table.layout import Layout
from shearling.table.values import Shape


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, mlp_bias=config.mlp_bias)


def _rules(config: Any) -> tuple[Rule, ...]:
    """With biases there is no writing it as Mistral."""
    biased = config.attention_bias or config.mlp_bias
    return (divided_hidden("Llama"),) if biased else ()


def _is_mistral(shape: Shape) -> bool:
    """Whether transformers refuses the shape as Llama, where it takes the same as Mistral."""
    return shape["hidden"] % shape["heads"] != 0


def _adapt(raw: dict[str, Any], config: Any, shape: Shape) -> dict[str, Any]:
    raw = explicit_head_dim(raw, config, shape)
    if not _is_mistral(shape):
        return raw
    # Whatever the two configs have different defaults for is written down.
    return {
        **raw,
        "model_type": "mistral",
        "architectures": ["MistralForCausalLM"],
        "max_position_embeddings": config.max_position_embeddings,
        "sliding_window": None,
        **{key: shape[axis] for axis, key in GROUPED_QUERY_KEYS.items()},
    }


def _remarks(config: Any, shape: Shape) -> list[str]:
    if not _is_mistral(shape):
        return []
    return [
        f"Llama's config refuses hidden={shape['hidden']} with heads={shape['heads']}, so the "
        "model is written as Mistral, which computes the same."
    ]


LLAMA = Family(
    "llama",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    rules=_rules,
    adapt=_adapt,
    remarks=_remarks,
    llama_cpp=LlamaCppFacts(
        "llama",
        fixed=SILU,
        biases={"attention_bias": "attn_output.bias", "mlp_bias": "ffn_down.bias"},
        paired=PAIRED,
        divides=True,
    ),
)
