"""Qwen 3 Next: gated DeltaNet in most blocks, gated attention in the others, experts in all.

One expert more is met by every token, at a weight of its own. Heads that predict tokens further
ahead (`mtp.`) are not copied.
"""

from __future__ import annotations

from typing import Any

from shearling.errors import ShearlingError
from shearling.table.axes import Axis, Layout, Row
from shearling.table.families.base import ExpertModules, Family, gated_decoder
from shearling.table.families.delta import DELTA_KEYS, adapt, delta_sizes, hybrid, joined
from shearling.table.families.experts import (
    DENSE,
    EXPERT_KEYS,
    expert_rows,
    expert_rules,
    mlp_rows,
    stacks,
    with_experts,
)
from shearling.table.families.qwen3_moe import kinds

_MLP = "model.layers.{}.mlp"
SHARED = ExpertModules(shared="mlp.shared_expert.down_proj", shared_gate="mlp.shared_expert_gate")
MIXTURE_KEYS = {**EXPERT_KEYS, **DELTA_KEYS} | {
    "experts": "num_experts", "expert_mlp": "moe_intermediate_size",
}  # fmt: skip


def mixture(config: Any) -> Layout:
    """The table of such a mixture with attention everywhere."""
    rows = (
        Row.of(f"{_MLP}.gate.weight", "linear", "experts", "hidden"),
        *expert_rows("mlp.experts"),
        *mlp_rows("mlp.shared_expert", "shared_mlp"),
        Row.of(f"{_MLP}.shared_expert_gate.weight", "linear", "1", "hidden"),
    )
    bias = config.attention_bias
    dense = gated_decoder(config, qkv_bias=bias, o_bias=bias, qk_norm="head")
    return with_experts(dense, config, rows, shared=Axis("shared_mlp", rigid=True))


def mixture_sizes(config: Any) -> dict[str, int]:
    """Sizes that a cut leaves alone."""
    return delta_sizes(config) | {"shared_mlp": config.shared_expert_intermediate_size}


def _layout(config: Any) -> Layout:
    if DENSE in kinds(config):
        raise ShearlingError(
            "a Qwen 3 Next whose blocks do not all have experts was given, which shearling does "
            "not know yet; give one with decoder_sparse_step=1 and no mlp_only_layers."
        )
    return hybrid(mixture(config), config, joined)


QWEN3_NEXT = Family(
    "qwen3_next",
    "model.layers",
    _layout,
    MIXTURE_KEYS,
    mixture_sizes,
    per_layer=("layer_types",),
    stacked=stacks("mlp.experts"),
    mixture=SHARED,
    rules=lambda config: expert_rules(config, config.moe_intermediate_size),
    predictors="mtp.",
    adapt=adapt,
    gain_offset=1.0,
)
