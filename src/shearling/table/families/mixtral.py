"""Mixtral: Mistral's attention, and experts that are chosen by a softmax over the best few."""

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
    EXPERT_KEYS,
    expert_rows,
    expert_rules,
    stacks,
    with_experts,
)
from shearling.table.families.llama_cpp import PAIRED, SILU, LlamaCppFacts
from shearling.table.layout import Layout

_MODULE, _MATRICES = "block_sparse_moe.experts", ("w1", "w3", "w2")
_ROUTER = "model.layers.{}.block_sparse_moe.gate.weight"


def _layout(config: Any) -> Layout:
    router = Row.of(_ROUTER, "linear", "experts", "hidden")
    return with_experts(gated_decoder(config), config, (router, *expert_rows(_MODULE, _MATRICES)))


MIXTRAL = Family(
    "mixtral",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "num_local_experts", "expert_mlp": "intermediate_size"},
    head_dim,
    renamed={_ROUTER: "model.layers.{}.mlp.gate.weight"},
    stacked=stacks(_MODULE, _MATRICES),
    mixture=ExpertModules(),
    rules=lambda config: expert_rules(config, config.intermediate_size),
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts("llama", fixed=SILU, paired=PAIRED, reads=False),
)
