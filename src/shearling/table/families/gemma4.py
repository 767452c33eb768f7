"""Gemma 4 (text): Gemma 3's blocks, with heads of two widths, and a factor behind every block.

Blocks of full attention have wider heads, fewer of keys and values, and may take the keys for
values; the last block is always one of these. What a block leaves is multiplied by a number of its
own. Where there are experts (26B-A4B), every block has an MLP as well: both read the stream through
norms of their own, and what they give is normed each by itself, added up, and normed again. Models
that hand on more than the stream are refused: those whose last blocks read the keys of earlier
ones, or that have embeddings for each block (E2B, E4B).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from shearling.errors import ShearlingError
from shearling.table.axes import Axis, Row
from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    HEADS,
    KV_HEADS,
    Affine,
    ExpertModules,
    Family,
    gated_decoder,
)
from shearling.table.families.experts import EXPERT_AXES, expert_rules
from shearling.table.families.gemma import (
    AFTER_ATTENTION,
    AFTER_MLP,
    NORMS,
    rescaled,
    rescaling_remarks,
)
from shearling.table.families.legal import Rule
from shearling.table.layout import Layout
from shearling.table.values import Shape

FULL, SLIDING = "full_attention", "sliding_attention"
LAST = f"last_{FULL}"  # a kind of its own: one of each kind stays
_BLOCK = "model.layers.{}"
_GLOBAL = {"kv_heads": "global_kv_heads", "head_dim": "global_head_dim"}
_WHY = (
    "blocks of full attention have heads of another width, and other heads of keys and values, "
    "than those that slide"
)
# Norms of a block with experts: behind the MLP, before the experts, behind the experts.
_AFTER_DENSE, _BEFORE_EXPERTS, _AFTER_EXPERTS = (
    "post_feedforward_layernorm_1",
    "pre_feedforward_layernorm_2",
    "post_feedforward_layernorm_2",
)
_SCALE = f"{_BLOCK}.router.scale"
_MIXTURE = (
    *(
        Row.of(f"{_BLOCK}.{norm}.weight", "norm", "hidden")
        for norm in (_AFTER_DENSE, _BEFORE_EXPERTS, _AFTER_EXPERTS)
    ),
    Row.of(f"{_BLOCK}.router.norm.weight", "norm", "hidden", bare=True),
    Row.of(_SCALE, "bias", "hidden"),
    Row.of(f"{_BLOCK}.router.proj.weight", "linear", "experts", "hidden"),
    Row.of(f"{_BLOCK}.router.per_expert_scale", "bias", "experts"),
    Row.of(
        f"{_BLOCK}.experts.gate_up_proj", "linear", "experts", "expert_mlp + expert_mlp", "hidden",
        stacked=1,
    ),
    Row.of(f"{_BLOCK}.experts.down_proj", "linear", "experts", "hidden", "expert_mlp", stacked=1),
)  # fmt: skip
_EXPERT_KEYS = {"experts": "num_experts", "expert_mlp": "moe_intermediate_size"}
# Config key of what blocks hand to one another beside the stream -> what it is.
_BESIDE = {
    "num_kv_shared_layers": "whose last blocks read the keys of earlier ones",
    "hidden_size_per_layer_input": "whose blocks each have embeddings of their own",
}


def _require(config: Any) -> None:
    """Refuse the models of the same type that are built in another way."""
    for key, what in _BESIDE.items():
        if getattr(config, key, None):
            raise ShearlingError(
                f"a Gemma 4 {what} was given ({key}={getattr(config, key)}), which shearling "
                f"does not cut; give one with {key}=0, such as Gemma 4 31B, or a gemma3_text."
            )
    if SLIDING not in config.layer_types or set(config.layer_types) != {FULL, SLIDING}:
        raise ShearlingError(
            f"a Gemma 4 with blocks of {', '.join(sorted(set(config.layer_types)))} was given, "
            f"which shearling does not cut; give one with blocks of {FULL} and {SLIDING}."
        )


def _kinds(config: Any) -> tuple[str, ...]:
    return (*config.layer_types[:-1], LAST)


def _layout(config: Any) -> Layout:
    _require(config)
    bias = config.attention_bias
    plain = gated_decoder(config, qkv_bias=bias, o_bias=bias, norms=NORMS, qk_norm="head")
    kinds = _kinds(config)
    rows = tuple(found for row in plain.rows for found in _rows(row, kinds, config))
    factor = Row.of(f"{_BLOCK}.layer_scalar", "bias", "1")
    axes = tuple(
        replace(axis, rigid=True) if axis in (HEADS, KV_HEADS) else axis for axis in plain.axes
    )
    wider = (
        Axis(_GLOBAL["kv_heads"], per_block=True, rigid=True),
        Axis(_GLOBAL["head_dim"], rigid=True),
    )
    if not config.enable_moe_block:
        return Layout((*axes, *wider), (*rows, factor), kinds=kinds)
    axes, rows = (*axes, *wider, *EXPERT_AXES), (*rows, factor, *_MIXTURE)
    return Layout(axes, rows, kinds=kinds, routed=config.top_k_experts)


def _rows(row: Row, kinds: tuple[str, ...], config: Any) -> Iterator[Row]:
    """A row of a plain decoder's, or one for each kind of block where these differ."""
    if ".self_attn." not in row.name:
        yield row
        return
    for kind in dict.fromkeys(kinds):
        if kind == SLIDING:
            yield replace(row, kind=kind)
        elif not (config.attention_k_eq_v and ".v_proj." in row.name):
            yield replace(row, kind=kind, dims=tuple(dim.renamed(_GLOBAL) for dim in row.dims))


def _sizes(config: Any) -> dict[str, int]:
    sliding, full = (config.per_layer_config[config.layer_types.index(k)] for k in (SLIDING, FULL))
    of_experts = _EXPERT_KEYS if config.enable_moe_block else {}
    return {
        "kv_heads": sliding.num_key_value_heads,
        "head_dim": sliding.head_dim,
        _GLOBAL["kv_heads"]: full.num_key_value_heads,
        _GLOBAL["head_dim"]: full.head_dim,
        **{axis: getattr(config, key) for axis, key in of_experts.items()},
    }


def _adapt(raw: dict[str, Any], config: Any, shape: Shape) -> dict[str, Any]:
    """Write the experts' sizes down where there are experts: all configs have keys for them."""
    return raw | {key: shape[axis] for axis, key in _EXPERT_KEYS.items() if axis in shape}


def _rules(config: Any) -> tuple[Rule, ...]:
    if not config.enable_moe_block:
        return ()
    return expert_rules(config, config.moe_intermediate_size, config.top_k_experts)


def _rescaled(row: Row, before: Shape, after: Shape) -> Affine | None:
    """As in other Gemmas; the router divides what it reads by the root of the hidden size, too."""
    if row.name == _SCALE and before["hidden"] != after["hidden"]:
        return Affine(math.sqrt(after["hidden"] / before["hidden"]), 0.0)
    return rescaled(row, before, after, offset=0.0)


def _renumbered(
    raw: dict[str, Any], config: Any, shape: Shape, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Name the blocks that differ from the first by their new numbers."""
    before = raw.get("per_layer_config")
    if not before:
        return raw
    own = {int(block): sizes for block, sizes in before.items()}
    after = {str(new): own[old] for new, old in enumerate(layers) if old in own}
    return {**raw, "per_layer_config": after}


GEMMA4 = Family(
    "gemma4_text",
    "model.layers",
    _layout,
    {axis: key for axis, key in GROUPED_QUERY_KEYS.items() if axis != "kv_heads"},
    _sizes,
    per_layer=("layer_types",),
    mixture=ExpertModules(
        "experts", "router", "experts", rows="proj.weight", common=("scale",),
        norm=_AFTER_EXPERTS, beside=_AFTER_DENSE,
    ),
    rules=_rules,
    adapt=_adapt,
    adapt_layers=_renumbered,
    remarks=rescaling_remarks,
    frozen={"heads": _WHY, "kv_heads": _WHY},
    rescale=_rescaled,
    post_norms={"heads": AFTER_ATTENTION, "mlp": AFTER_MLP},
    additive=lambda config: False,
)  # fmt: skip
