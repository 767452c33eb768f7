"""ERNIE 4.5 with experts: a softmax router that chooses with a bias added, and shared experts.

The first blocks, and where the config says so the last, have an MLP in place of experts. Heads that
predict tokens further ahead (`model.mtp_`) are not copied.
"""

from __future__ import annotations

from typing import Any

from shearling.errors import ShearlingError
from shearling.table.axes import EXPERT_MLP, EXPERTS, Row
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
    mlp_rows,
    stacks,
    with_experts,
)
from shearling.table.families.llama_cpp import SILU, LlamaCppFacts, LlamaCppLimit
from shearling.table.families.llama_cpp_rows import score_bias
from shearling.table.layout import Layout
from shearling.table.values import Shape

_MLP = "model.layers.{}.mlp"
_BIAS = "moe_statics.e_score_correction_bias"


def _kinds(config: Any) -> tuple[str, ...]:
    """Which blocks have experts."""
    first, last = config.moe_layer_start_index, config.moe_layer_end_index
    return tuple(
        SPARSE if first <= block <= last else DENSE for block in range(config.num_hidden_layers)
    )


def _layout(config: Any) -> Layout:
    shared = config.moe_num_shared_experts
    if config.moe_layer_interval != 1 or config.use_bias or not shared:
        raise ShearlingError(
            f"an ERNIE 4.5 with moe_layer_interval={config.moe_layer_interval}, "
            f"use_bias={config.use_bias} and moe_num_shared_experts={shared} was given, but "
            "shearling knows 1, false and at least 1; give one such as ERNIE-4.5-21B-A3B-PT."
        )
    rows = (
        Row.of(f"{_MLP}.gate.weight", "linear", EXPERTS, "hidden", kind=SPARSE),
        Row.of(f"{_MLP}.{_BIAS}", "bias", "1", EXPERTS, kind=SPARSE),
        *expert_rows("mlp.experts", kind=SPARSE),
        *mlp_rows("mlp.shared_experts", f"{shared}*{EXPERT_MLP}", kind=SPARSE),
    )
    # The config gives the shared experts' width as so many times that of one expert.
    return with_experts(gated_decoder(config), config, rows, kinds=_kinds(config), rigid=True)


def _sizes(config: Any) -> dict[str, int]:
    width = {EXPERT_MLP: config.moe_intermediate_size}
    return head_dim(config) | width | dense_width(config, _kinds(config))


def _between(
    raw: dict[str, Any], config: Any, shape: Shape, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Say between which of the surviving blocks those with experts lie."""
    left = [_kinds(config)[block] for block in layers]
    first = left.index(SPARSE)
    last = first + left.count(SPARSE) - 1
    if last == len(left) - 1 and raw.get("moe_layer_end_index", -1) == -1:
        last = -1
    return {**raw, "moe_layer_start_index": first, "moe_layer_end_index": last}


_LIMITS = (
    LlamaCppLimit(
        "all blocks without experts before those with",
        lambda config, shape: sorted(_kinds(config)) == [*_kinds(config)],
    ),
    LlamaCppLimit(  # so its converter works it out
        "shared experts as wide as intermediate_size / kv_heads, which takes as many kv_heads as "
        "the model came with; this one has {kv_heads}",
        lambda config, shape: (
            config.intermediate_size // shape["kv_heads"]
            == config.moe_num_shared_experts * shape[EXPERT_MLP]
        ),
        axes=("kv_heads", EXPERT_MLP),
    ),
)
ERNIE4_5_MOE = Family(
    "ernie4_5_moe",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "moe_num_experts"},
    _sizes,
    renamed={f"{_MLP}.{_BIAS}": f"{_MLP}.gate.{_BIAS}"},
    stacked=stacks("mlp.experts"),
    mixture=ExpertModules(shared="mlp.shared_experts.down_proj"),
    rules=lambda config: expert_rules(config, config.moe_intermediate_size),
    predicting="num_nextn_predict_layers",
    predictors="model.mtp_",
    adapt=explicit_head_dim,
    adapt_layers=_between,
    llama_cpp=LlamaCppFacts(
        "ernie4_5-moe", fixed=SILU, limits=_LIMITS, stored=score_bias, reads=False
    ),
)
