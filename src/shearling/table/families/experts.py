"""What families with experts have in common: axes, rows, and what their sizes must satisfy.

transformers' models hold the matrices of all experts of a block in one parameter; checkpoints hold
one for each, most of them under the names that Qwen's and DeepSeek's have.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shearling.table.axes import EXPERT_MLP, EXPERTS, Axis, Layout, Row
from shearling.table.families.base import GROUPED_QUERY_AXES, GROUPED_QUERY_KEYS, MLP
from shearling.table.families.legal import Rule

ROW = 8  # numbers of two bytes in 16
DENSE, SPARSE = "dense", "sparse"
EXPERT_AXES = (
    Axis(EXPERTS, per_block=True),
    Axis(EXPERT_MLP, per_block=True, inside=EXPERTS, of_each=True),
)
EXPERT_KEYS = {axis: key for axis, key in GROUPED_QUERY_KEYS.items() if axis != "mlp"}
# Names of an expert's matrices: the gate, what it gates, and what writes into the stream.
MATRICES = ("gate_proj", "up_proj", "down_proj")
_BLOCK = "model.layers.{}"


def expert_rows(
    module: str, matrices: tuple[str, str, str] = MATRICES, *, kind: str | None = None
) -> tuple[Row, ...]:
    """The matrices of every expert in ``module``, a path inside a block."""
    gate, up, down = (f"{_BLOCK}.{module}.{{}}.{name}.weight" for name in matrices)
    return (
        Row.of(gate, "linear", "expert_mlp", "hidden", kind=kind),
        Row.of(up, "linear", "expert_mlp", "hidden", kind=kind),
        Row.of(down, "linear", "hidden", "expert_mlp", kind=kind),
    )


def stacks(
    module: str, matrices: tuple[str, str, str] = MATRICES, held_in: str = "mlp.experts"
) -> dict[str, tuple[str, int, int]]:
    """Where transformers' model holds the matrices of :func:`expert_rows`."""
    gate, up, down = (f"{_BLOCK}.{module}.{{}}.{name}.weight" for name in matrices)
    joined, written = (f"{_BLOCK}.{held_in}.{name}" for name in ("gate_up_proj", "down_proj"))
    return {gate: (joined, 0, 2), up: (joined, 1, 2), down: (written, 0, 1)}


def with_experts(
    dense: Layout,
    config: Any,
    rows: Sequence[Row],
    *,
    kinds: tuple[str, ...] = (),
    groups: Axis | None = None,
) -> Layout:
    """A table whose blocks, or those of the kind ``sparse``, have experts for their MLP.

    Args:
        dense: the table of the same model without experts.
        config: resolved by transformers.
        rows: what stands in the MLP's place.
        kinds: of every block; none if all have experts. The width of a dense block's MLP is then
            left as it is.
        groups: what experts are inside of, where the router picks groups of them first.
    """
    mixed = DENSE in kinds
    mlp = tuple(
        replace(row, kind=DENSE) for row in dense.rows if any("mlp" in d.axes for d in row.dims)
    )
    others = tuple(row for row in dense.rows if all("mlp" not in d.axes for d in row.dims))
    rows = (*mlp, *rows) if mixed else tuple(replace(row, kind=None) for row in rows)
    experts, neurons = EXPERT_AXES
    axes = (*(axis for axis in dense.axes if axis.name != MLP.name),)
    axes += (replace(MLP, rigid=True),) if mixed else ()
    axes += (groups, replace(experts, inside=groups.name)) if groups else (experts,)
    return Layout(
        (*axes, neurons),
        (*others, *rows),
        kinds=kinds if mixed else (),
        routed=config.num_experts_per_tok,
    )


def expert_rules(config: Any, neurons: int) -> tuple[Rule, ...]:
    """What every mixture must satisfy, given the ``neurons`` of one of its experts.

    The router picks as many as ever. The grouped products with which transformers and vLLM run
    all experts at once take rows of whole 16 bytes only.
    """
    picked = config.num_experts_per_tok
    enough = Rule(
        (EXPERTS,),
        f"the router sends every token to {picked} experts, so that at least {picked} must stay",
        lambda shape: shape[EXPERTS] >= picked,
    )
    sizes = {"hidden": config.hidden_size, "expert_mlp": neurons}
    whole = (
        Rule(
            (axis,),
            f"grouped products of experts want {axis} to be a multiple of {ROW}",
            lambda shape, axis=axis, size=size: shape[axis] == size or shape[axis] % ROW == 0,
        )
        for axis, size in sizes.items()
    )
    return enough, *whole


__all__ = [
    "DENSE",
    "EXPERT_AXES",
    "EXPERT_KEYS",
    "GROUPED_QUERY_AXES",
    "SPARSE",
    "expert_rows",
    "expert_rules",
    "stacks",
    "with_experts",
]  # fmt: skip
