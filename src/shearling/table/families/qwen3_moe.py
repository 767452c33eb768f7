"""Qwen 3 with experts: all blocks, or every so many of them, have experts for their MLP."""

from __future__ import annotations

from typing import Any

from shearling.table.axes import Row
from shearling.table.families.base import (
    ExpertModules,
    Family,
    explicit_head_dim,
    gated_decoder,
    head_dim,
)
from shearling.table.families.experts import (
    DENSE,
    EXPERT_KEYS,
    SPARSE,
    dense_width,
    expert_rows,
    expert_rules,
    stacks,
    with_experts,
)
from shearling.table.families.llama_cpp import SILU, UNBIASED, LlamaCppFacts, LlamaCppLimit, router
from shearling.table.layout import Layout
from shearling.table.values import Shape

_ROUTER = Row.of("model.layers.{}.mlp.gate.weight", "linear", "experts", "hidden", kind=SPARSE)


def kinds(config: Any) -> tuple[str, ...]:
    """Which blocks have experts, as transformers reads it from a config of Qwen's."""
    step, dense = config.decoder_sparse_step, config.mlp_only_layers or ()
    return tuple(
        SPARSE
        if block not in dense and config.num_experts > 0 and (block + 1) % step == 0
        else DENSE
        for block in range(config.num_hidden_layers)
    )


def _layout(config: Any) -> Layout:
    bias = config.attention_bias
    dense = gated_decoder(config, qkv_bias=bias, o_bias=bias, qk_norm="head")
    rows = (_ROUTER, *expert_rows("mlp.experts", kind=SPARSE))
    return with_experts(dense, config, rows, kinds=kinds(config))


def _rigid(config: Any) -> dict[str, int]:
    return head_dim(config) | dense_width(config, kinds(config))


def renumbered(
    raw: dict[str, Any], config: Any, shape: Shape, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Name the blocks without experts by their new numbers."""
    before = kinds(config)
    if DENSE not in before:
        return raw
    dense = [target for target, source in enumerate(layers) if before[source] == DENSE]
    return {**raw, "decoder_sparse_step": 1, "mlp_only_layers": dense}


EVERYWHERE = LlamaCppLimit(
    "experts in every block, where this model has some without",
    lambda config, shape: DENSE not in kinds(config),
)

QWEN3_MOE = Family(
    "qwen3_moe",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "num_experts", "expert_mlp": "moe_intermediate_size"},
    _rigid,
    per_layer=("layer_types",),
    stacked=stacks("mlp.experts"),
    mixture=ExpertModules(),
    rules=lambda config: expert_rules(config, config.moe_intermediate_size),
    adapt=explicit_head_dim,
    adapt_layers=renumbered,
    llama_cpp=LlamaCppFacts(
        "qwen3moe", fixed=SILU, limits=(EVERYWHERE, UNBIASED, router(normed=True)), reads=False
    ),
)
