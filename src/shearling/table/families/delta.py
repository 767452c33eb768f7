"""What hybrids of attention and gated DeltaNet have in common: blocks of two kinds.

A head of linear attention is a key head with the value heads that read its keys; its width and
how many of these it has stay. The attention of the other blocks has a gate beside each query.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from shearling.table.axes import Axis, Row
from shearling.table.families.base import explicit_head_dim, head_dim, linear
from shearling.table.families.llama_cpp import SILU, UNBIASED, LlamaCppFacts, LlamaCppLimit
from shearling.table.layout import Layout
from shearling.table.values import Shape

FULL, LINEAR = "full_attention", "linear_attention"
DELTA_KEYS = {"linear_heads": "linear_num_key_heads"}
_AT = "model.layers.{}.linear_attn"
_HEADS = "linear_heads"
_KEYS, _VALUES = f"{_HEADS}*linear_key_dim", f"{_HEADS}*linear_value_dim"
_AXES = (
    Axis(_HEADS, per_block=True),
    Axis("linear_key_dim", rigid=True),
    Axis("linear_value_dim", rigid=True),
)


LLAMA_CPP = LlamaCppFacts(
    "",
    # Its code norms queries and keys of linear attention with the epsilon of the other norms.
    fixed=SILU | {"rms_norm_eps": 1e-6},
    limits=(
        UNBIASED,
        LlamaCppLimit(
            "keys and values of linear attention equally wide",
            lambda config, shape: config.linear_key_head_dim == config.linear_value_head_dim,
        ),
    ),
    ahead=True,
    reads=False,
)


def delta_sizes(config: Any) -> dict[str, int]:
    """Widths inside both kinds of attention: those of a head's keys, and of all its values."""
    return head_dim(config) | {
        "linear_key_dim": config.linear_key_head_dim,
        "linear_value_dim": each_key(config) * config.linear_value_head_dim,
    }


def each_key(config: Any) -> int:
    """How many value heads read the keys of one key head."""
    return config.linear_num_value_heads // config.linear_num_key_heads


def joined(config: Any) -> tuple[Row, ...]:
    """Inputs of linear attention: queries, keys, values and gates of a head side by side."""
    key, value = (delta_sizes(config)[f"linear_{name}_dim"] for name in ("key", "value"))
    return (
        *linear(f"{_AT}.in_proj_qkvz", f"{_HEADS}*{2 * (key + value)}", "hidden", bias=False),
        *linear(f"{_AT}.in_proj_ba", f"{_HEADS}*{2 * each_key(config)}", "hidden", bias=False),
    )


def apart(config: Any) -> tuple[Row, ...]:
    """The same, each with a matrix of its own; queries, keys and values one above the other."""
    each = f"{_HEADS}*{each_key(config)}"
    mixed = f"{_KEYS} + {_KEYS} + {_VALUES}"
    return (
        *linear(f"{_AT}.in_proj_qkv", mixed, "hidden", bias=False),
        *linear(f"{_AT}.in_proj_z", _VALUES, "hidden", bias=False),
        *linear(f"{_AT}.in_proj_b", each, "hidden", bias=False),
        *linear(f"{_AT}.in_proj_a", each, "hidden", bias=False),
    )


def hybrid(plain: Layout, config: Any, inputs: Callable[[Any], tuple[Row, ...]]) -> Layout:
    """A table whose blocks have attention or linear attention, as ``layer_types`` says.

    Args:
        plain: the table of the same model with attention everywhere.
        config: resolved by transformers.
        inputs: how linear attention stores what reads the stream.
    """
    each = f"{_HEADS}*{each_key(config)}"
    rows = (
        *inputs(config),
        Row.of(f"{_AT}.conv1d.weight", "conv", f"{_KEYS} + {_KEYS} + {_VALUES}", "1",
               str(config.linear_conv_kernel_dim)),
        Row.of(f"{_AT}.A_log", "bias", each),
        Row.of(f"{_AT}.dt_bias", "bias", each),
        Row.of(f"{_AT}.norm.weight", "norm", str(config.linear_value_head_dim)),
        *linear(f"{_AT}.out_proj", "hidden", _VALUES, bias=False),
    )  # fmt: skip
    return replace(
        plain,
        axes=(*plain.axes, *_AXES),
        rows=(*map(_attention, plain.rows), *(replace(row, kind=LINEAR) for row in rows)),
        kinds=tuple(config.layer_types),
    )


def _attention(row: Row) -> Row:
    """A row of the plain table in the hybrid one."""
    if ".self_attn." not in row.name:
        return row
    if ".q_proj." in row.name:  # a query and its gate, head by head
        gated = Row.of("", "linear", "heads*2*head_dim").dims
        row = replace(row, dims=(*gated, *row.dims[1:]))
    return replace(row, kind=FULL)


def adapt(raw: dict[str, Any], config: Any, shape: Shape) -> dict[str, Any]:
    """Value heads go with their key heads."""
    raw = explicit_head_dim(raw, config, shape)
    if shape[_HEADS] == config.linear_num_key_heads:
        return raw
    return {**raw, "linear_num_value_heads": each_key(config) * shape[_HEADS]}
