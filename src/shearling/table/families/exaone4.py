"""EXAONE 4: norms behind the branches alone, as in OLMo 2, and on each head's queries and keys.

Where some blocks slide, those that attend to everything have no rotary positions.
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
from shearling.table.families.llama_cpp import SILU, WHOLE, LlamaCppFacts, LlamaCppLimit
from shearling.table.families.olmo2 import POST
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    return gated_decoder(config, qk_norm="head", norms=tuple(POST.values()))


_COUNTED = LlamaCppLimit(
    "64 blocks where some slide, and lets none slide otherwise; this model has {layers}",
    lambda config, shape: not config.sliding_window or shape["layers"] == 64,
    axes=("layers",),
)
EXAONE4 = Family(
    "exaone4",
    "model.layers",
    _layout,
    GROUPED_QUERY_KEYS,
    head_dim,
    per_layer=("layer_types",),
    adapt=explicit_head_dim,
    post_norms=POST,
    llama_cpp=LlamaCppFacts(
        "exaone4",
        fixed=SILU,
        window="sliding_window",
        slides=True,
        limits=(WHOLE, _COUNTED),
        reads=False,
    ),
)
