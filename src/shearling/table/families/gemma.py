"""Gemma 2 and Gemma 3 (text): norms before and after both halves of a block, tied embeddings
scaled by the square root of the hidden size, block types that alternate.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from shearling.table.axes import Row
from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Affine,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.legal import divided_hidden
from shearling.table.families.llama_cpp import TIED, UNBIASED, LlamaCppFacts
from shearling.table.layout import Layout
from shearling.table.values import Shape

AFTER_ATTENTION, AFTER_MLP = "post_attention_layernorm", "post_feedforward_layernorm"
NORMS = ("input_layernorm", AFTER_ATTENTION, "pre_feedforward_layernorm", AFTER_MLP)


def _gemma2(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, norms=NORMS)


def _gemma3(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(config, qkv_bias=bias, o_bias=bias, norms=NORMS, qk_norm="head")


def rescaled(row: Row, before: Shape, after: Shape, *, offset: float = 1.0) -> Affine | None:
    """Let blocks write as much less into the stream as embeddings do.

    The stock code multiplies embeddings by the square root of whatever the hidden size is; they
    may be tied to the head, and cannot make up for it. What reads the stream divides by its size
    first, up to epsilon, so that all of it may be scaled by c = sqrt(after / before): the norms
    through which blocks write, weights w used as ``offset`` + w, become c(offset + w) - offset.
    """
    if not row.name.endswith((f"{AFTER_ATTENTION}.weight", f"{AFTER_MLP}.weight")):
        return None
    if before["hidden"] == after["hidden"]:
        return None
    scale = math.sqrt(after["hidden"] / before["hidden"])
    return Affine(scale, offset * (scale - 1))


def rescaling_remarks(config: Any, shape: Shape) -> list[str]:
    """What a user is told of :func:`rescaled`."""
    if config.hidden_size == shape["hidden"]:
        return []
    return [
        f"Gemma scales embeddings by the square root of the hidden size, so the norms after "
        f"attention and MLP are scaled by sqrt({shape['hidden']}/{config.hidden_size}) to match."
    ]


def _gemma(
    model_type: str, name: str, layout: Callable[[Any], Layout], llama_cpp: LlamaCppFacts
) -> Family:
    return Family(
        model_type,
        "model.layers",
        layout,
        GROUPED_QUERY_KEYS,
        head_dim,
        per_layer=("layer_types",),
        rules=lambda config: (divided_hidden(name),),
        adapt=explicit_head_dim,
        remarks=rescaling_remarks,
        rescale=rescaled,
        post_norms={"heads": AFTER_ATTENTION, "mlp": AFTER_MLP},
        gain_offset=1.0,
        llama_cpp=llama_cpp,
    )


_FIXED = {"hidden_activation": "gelu_pytorch_tanh"}
_BIASES = {"attention_bias": "attn_output.bias"}
_SCALAR = "query_pre_attn_scalar"
_FINAL, _ATTENTION = "final_logit_softcapping", "attn_logit_softcapping"

GEMMA2 = _gemma(
    "gemma2",
    "Gemma 2",
    _gemma2,
    LlamaCppFacts(
        "gemma2", fixed=_FIXED, biases=_BIASES, window="sliding_window", slides=True, period=2,
        widest=4096, scalar=_SCALAR, scaled_depth=46, limits=(TIED, UNBIASED),
        softcaps={_ATTENTION: (_ATTENTION, 50.0), _FINAL: (_FINAL, 30.0)},
    ),
)  # fmt: skip
GEMMA3 = _gemma(
    "gemma3_text",
    "Gemma 3",
    _gemma3,
    LlamaCppFacts(
        "gemma3", fixed=_FIXED, biases=_BIASES, window="sliding_window", slides=True, period=6,
        local_theta=10000.0, scalar=_SCALAR, scaled_depth=62, softcaps={_FINAL: (_FINAL, None)},
        limits=(UNBIASED,),
    ),
)  # fmt: skip
