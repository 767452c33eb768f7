"""OLMo 2 and OLMo 3: norms behind the branches alone, and over all heads' queries and keys.

Nothing norms the stream before it is read. The norms of queries and of keys take their mean square
over all heads together: with fewer heads it is taken over those that stay. `shearling learn` cannot
fade heads out one by one, therefore.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.llama_cpp import SILU, UNBIASED, UNTIED, WHOLE, LlamaCppFacts
from shearling.table.layout import Layout

POST = {"heads": "post_attention_layernorm", "mlp": "post_feedforward_layernorm"}


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    return gated_decoder(
        config, qkv_bias=bias, o_bias=bias, qk_norm="heads", norms=tuple(POST.values())
    )


def _olmo(model_type: str, llama_cpp: LlamaCppFacts, per_layer: tuple[str, ...] = ()) -> Family:
    return Family(
        model_type,
        "model.layers",
        _layout,
        GROUPED_QUERY_KEYS,
        head_dim,
        per_layer=per_layer,
        adapt=explicit_head_dim,
        post_norms=POST,
        llama_cpp=llama_cpp,
    )


_FACTS = LlamaCppFacts("olmo2", fixed=SILU, limits=(WHOLE, UNTIED, UNBIASED), reads=False)
OLMO2 = _olmo("olmo2", _FACTS)
OLMO3 = _olmo(
    "olmo3",
    replace(_FACTS, window="sliding_window", slides=True, period=4, listed=True),
    ("layer_types",),
)
