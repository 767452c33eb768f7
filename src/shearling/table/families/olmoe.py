"""OLMoE: experts in every block, and norms over all queries and over all keys of a token."""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Row
from shearling.table.families.base import ExpertModules, Family, gated_decoder
from shearling.table.families.experts import (
    EXPERT_KEYS,
    expert_rows,
    expert_rules,
    stacks,
    with_experts,
)
from shearling.table.families.legal import Rule, whole_heads
from shearling.table.families.llama_cpp import (
    SILU,
    UNBIASED,
    UNTIED,
    LlamaCppFacts,
    LlamaCppLimit,
    router,
)
from shearling.table.layout import Layout


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    dense = gated_decoder(config, qkv_bias=bias, o_bias=bias, qk_norm="heads")
    router = Row.of("model.layers.{}.mlp.gate.weight", "linear", "experts", "hidden")
    return with_experts(dense, config, (router, *expert_rows("mlp.experts")))


def _rules(config: Any) -> tuple[Rule, ...]:
    return whole_heads("OLMoE"), *expert_rules(config, config.intermediate_size)


OLMOE = Family(
    "olmoe",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "num_experts", "expert_mlp": "intermediate_size"},
    lambda config: {"head_dim": config.hidden_size // config.num_attention_heads},
    stacked=stacks("mlp.experts"),
    mixture=ExpertModules(),
    rules=_rules,
    llama_cpp=LlamaCppFacts(
        "olmoe",
        fixed=SILU | {"rms_norm_eps": 1e-5},
        limits=(
            LlamaCppLimit(
                "as many key heads as heads, which are {kv_heads} and {heads} here",
                lambda config, shape: shape["heads"] == shape["kv_heads"],
                axes=("heads", "kv_heads"),
            ),
            UNTIED,
            UNBIASED,
            router(normed=False),
        ),
        reads=False,
    ),
)
