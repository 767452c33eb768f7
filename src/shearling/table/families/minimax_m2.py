"""MiniMax M2: Mixtral's names, norms over all queries and over all keys, and a sigmoid router.

A block hands its router the bias that experts are chosen with. Rotary positions turn half of a
head. The hub has its weights in eight bits, which stock transformers turns back.
"""

from __future__ import annotations

from typing import Any

from shearling.table.axes import EXPERTS, Row
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
from shearling.table.families.llama_cpp import SILU, UNTIED, LlamaCppFacts
from shearling.table.families.llama_cpp_rows import score_bias
from shearling.table.layout import Layout

_BLOCK = "model.layers.{}"
_MODULE, _MATRICES = "block_sparse_moe.experts", ("w1", "w3", "w2")
_ROUTER = f"{_BLOCK}.block_sparse_moe.gate.weight"
_BIAS = f"{_BLOCK}.block_sparse_moe.e_score_correction_bias"


def _layout(config: Any) -> Layout:
    rows = (
        Row.of(_ROUTER, "linear", EXPERTS, "hidden"),
        Row.of(_BIAS, "bias", EXPERTS),
        *expert_rows(_MODULE, _MATRICES),
    )
    return with_experts(gated_decoder(config, qk_norm="heads"), config, rows)


def _told(config: Any) -> dict[str, Any]:
    share = config.rope_parameters.get("partial_rotary_factor", 1.0)
    return {"scoring_func": "sigmoid", "rotary_dim": int(config.head_dim * share)}


MINIMAX_M2 = Family(
    "minimax_m2",
    "model.layers",
    _layout,
    EXPERT_KEYS | {"experts": "num_local_experts", "expert_mlp": "intermediate_size"},
    head_dim,
    per_layer=("attn_type_list",),
    renamed={
        _ROUTER: f"{_BLOCK}.mlp.gate.weight",
        _BIAS: f"{_BLOCK}.mlp.e_score_correction_bias",
    },
    stacked=stacks(_MODULE, _MATRICES),
    mixture=ExpertModules(handed="mlp.e_score_correction_bias"),
    rules=lambda config: expert_rules(config, config.intermediate_size),
    predicting="num_mtp_modules",
    adapt=explicit_head_dim,
    llama_cpp=LlamaCppFacts(
        "minimax-m2", fixed=SILU, limits=(UNTIED,), told=_told, stored=score_bias, reads=False
    ),
)
