"""Gemma 4 (text): Gemma 3's blocks, with heads of two widths, and a factor behind every block.

Blocks of full attention have wider heads, fewer of keys and values, and may take the keys for
values; the last block is always one of these. What a block leaves is multiplied by a number of its
own. Models that hand on more than the stream are refused: those whose last blocks read the keys of
earlier ones, or that have embeddings for each block (E2B, E4B), and those with experts (26B-A4B).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

from shearling.errors import ShearlingError
from shearling.table.axes import Axis, Row
from shearling.table.families.base import (
    GROUPED_QUERY_KEYS,
    HEADS,
    KV_HEADS,
    Family,
    gated_decoder,
)
from shearling.table.families.gemma import (
    AFTER_ATTENTION,
    AFTER_MLP,
    NORMS,
    rescaled,
    rescaling_remarks,
)
from shearling.table.layout import Layout
from shearling.table.values import Shape

FULL, SLIDING = "full_attention", "sliding_attention"
LAST = f"last_{FULL}"  # a kind of its own: one of each kind stays
_AT = "model.layers.{}.self_attn"
_GLOBAL = {"kv_heads": "global_kv_heads", "head_dim": "global_head_dim"}
_WHY = (
    "blocks of full attention have heads of another width, and other heads of keys and values, "
    "than those that slide"
)
# Config key of what blocks hand to one another beside the stream -> what it is.
_BESIDE = {
    "num_kv_shared_layers": "whose last blocks read the keys of earlier ones",
    "hidden_size_per_layer_input": "whose blocks each have embeddings of their own",
    "enable_moe_block": "with experts beside the MLP, behind norms of their own,",
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
    factor = Row.of("model.layers.{}.layer_scalar", "bias", "1")
    axes = tuple(
        replace(axis, rigid=True) if axis in (HEADS, KV_HEADS) else axis for axis in plain.axes
    )
    wider = (
        Axis(_GLOBAL["kv_heads"], per_block=True, rigid=True),
        Axis(_GLOBAL["head_dim"], rigid=True),
    )
    return Layout((*axes, *wider), (*rows, factor), kinds=kinds)


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
    return {
        "kv_heads": sliding.num_key_value_heads,
        "head_dim": sliding.head_dim,
        _GLOBAL["kv_heads"]: full.num_key_value_heads,
        _GLOBAL["head_dim"]: full.head_dim,
    }


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
    adapt_layers=_renumbered,
    remarks=rescaling_remarks,
    frozen={"heads": _WHY, "kv_heads": _WHY},
    rescale=partial(rescaled, offset=0.0),
    post_norms={"heads": AFTER_ATTENTION, "mlp": AFTER_MLP},
    additive=lambda config: False,
)
