"""GPT-NeoX (Pythia): query, key and value interleaved head by head, LayerNorms, biases."""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Axis
from shearling.table.families.base import (
    HEAD_DIM,
    HIDDEN,
    LAYERS,
    MLP,
    VOCAB,
    Family,
    embedding_rows,
    head_dim,
    layer_norm,
    linear,
)
from shearling.table.families.legal import whole_heads
from shearling.table.families.llama_cpp import UNTIED, LlamaCppFacts, LlamaCppLimit
from shearling.table.layout import Layout

_HEAD = "embed_out.weight"


def _layout(config: Any) -> Layout:
    block = "gpt_neox.layers.{}"
    bias = config.attention_bias
    return Layout(
        (LAYERS, HIDDEN, VOCAB, Axis("heads", per_block=True), HEAD_DIM, MLP),
        (
            *embedding_rows("gpt_neox.embed_in.weight", config.tie_word_embeddings, head=_HEAD),
            *linear(f"{block}.attention.query_key_value", "heads*3*head_dim", "hidden", bias=bias),
            *linear(f"{block}.attention.dense", "hidden", "heads*head_dim", bias=bias),
            *linear(f"{block}.mlp.dense_h_to_4h", "mlp", "hidden", bias=True),
            *linear(f"{block}.mlp.dense_4h_to_h", "hidden", "mlp", bias=True),
            *layer_norm(f"{block}.input_layernorm"),
            *layer_norm(f"{block}.post_attention_layernorm"),
            *layer_norm("gpt_neox.final_layer_norm"),
        ),
    )


GPT_NEOX = Family(
    "gpt_neox",
    "gpt_neox.layers",
    _layout,
    {
        "layers": "num_hidden_layers",
        "hidden": "hidden_size",
        "vocab": "vocab_size",
        "heads": "num_attention_heads",
        "mlp": "intermediate_size",
    },
    head_dim,
    ignored=(".rotary_emb.inv_freq", ".attention.bias", ".attention.masked_bias"),
    renamed={_HEAD: "lm_head.weight"},
    rules=lambda config: (whole_heads("GPT-NeoX"),),
    llama_cpp=LlamaCppFacts(
        "gptneox",
        fixed={"hidden_act": "gelu"},
        biases={"attention_bias": "attn_output.bias"},
        epsilon=("layer_norm_eps", "attention.layer_norm_epsilon"),
        fused=("query_key_value",),
        partial=True,
        limits=(
            UNTIED,
            LlamaCppLimit(
                "biases in attention, where this model has none",
                lambda config, shape: bool(config.attention_bias),
            ),
        ),
        told=lambda config: {"rotary_pct": config.rope_parameters["partial_rotary_factor"]},
    ),
)
