"""GLM-4 (0414, dense): norms before and behind both halves of a block, gate and up in one tensor.

Biases on query, key and value; rotary positions turn half of a head, in neighbouring pairs.
"""

from __future__ import annotations

from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import SILU, LlamaCppFacts
from shearling.table.layout import Layout

_POST = {"heads": "post_self_attn_layernorm", "mlp": "post_mlp_layernorm"}
_NORMS = ("input_layernorm", _POST["heads"], "post_attention_layernorm", _POST["mlp"])


def _layout(config: Any) -> Layout:
    return gated_decoder(config, qkv_bias=config.attention_bias, fused_mlp=True, norms=_NORMS)


GLM4 = Family(
    "glm4",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    adapt=explicit_head_dim,
    post_norms=_POST,
    llama_cpp=LlamaCppFacts("glm4", fixed=SILU, reads=False),
)
