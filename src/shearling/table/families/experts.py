"""What families with experts have in common: axes, rows, and what their sizes must satisfy.

transformers' models hold the matrices of all experts of a block in one parameter; checkpoints hold
one for each, most of them under the names that Qwen's and DeepSeek's have.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from shearling.table.axes import EXPERT_MLP, EXPERTS, Axis, Row
from shearling.table.families.base import GROUPED_QUERY_KEYS, MLP
from shearling.table.families.legal import Rule
from shearling.table.layout import Layout
from shearling.table.values import Shape

ROW = 8  # numbers of two bytes in 16
DENSE, SPARSE = "dense", "sparse"
EXPERT_AXES = (
    Axis(EXPERTS, per_block=True),
    Axis(EXPERT_MLP, per_block=True, inside=EXPERTS, of_each=True),
)
GROUPS = Axis("expert_groups", per_block=True, rigid=True)
EXPERT_KEYS = {axis: key for axis, key in GROUPED_QUERY_KEYS.items() if axis != "mlp"}
# Names of an expert's matrices: the gate, what it gates, and what writes into the stream.
MATRICES = ("gate_proj", "up_proj", "down_proj")
_BLOCK = "model.layers.{}"


def mlp_rows(
    module: str, width: str, matrices: tuple[str, str, str] = MATRICES, *, kind: str | None = None
) -> tuple[Row, ...]:
    """The matrices of a gated MLP of ``width`` neurons at ``module``, a path inside a block."""
    gate, up, down = (f"{_BLOCK}.{module}.{name}.weight" for name in matrices)
    return (
        Row.of(gate, "linear", width, "hidden", kind=kind),
        Row.of(up, "linear", width, "hidden", kind=kind),
        Row.of(down, "linear", "hidden", width, kind=kind),
    )


def expert_rows(
    module: str, matrices: tuple[str, str, str] = MATRICES, *, kind: str | None = None
) -> tuple[Row, ...]:
    """The matrices of every expert in ``module``."""
    return mlp_rows(f"{module}.{{}}", EXPERT_MLP, matrices, kind=kind)


def stacks(
    module: str, matrices: tuple[str, str, str] = MATRICES
) -> dict[str, tuple[str, int, int]]:
    """Where transformers' model holds the matrices of :func:`expert_rows`."""
    gate, up, down = (f"{_BLOCK}.{module}.{{}}.{name}.weight" for name in matrices)
    joined, written = (f"{_BLOCK}.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj"))
    return {gate: (joined, 0, 2), up: (joined, 1, 2), down: (written, 0, 1)}


def with_experts(
    dense: Layout,
    config: Any,
    rows: Sequence[Row],
    *,
    kinds: tuple[str, ...] = (),
    grouped: bool = False,
    rigid: bool = False,
    shared: Axis | None = None,
) -> Layout:
    """A table whose blocks, or those of the kind ``sparse``, have experts for their MLP.

    Args:
        dense: the table of the same model without experts.
        config: resolved by transformers.
        rows: what stands in the MLP's place.
        kinds: of every block; none if all have experts. The width of a dense block's MLP is then
            left as it is.
        grouped: whether the router picks groups of experts first, which must stay even.
        rigid: whether the neurons of an expert stay as many as they are.
        shared: the neurons of a shared expert, where they are an axis of their own.
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
    axes += (GROUPS, replace(experts, inside=GROUPS.name)) if grouped else (experts,)
    return Layout(
        (*axes, replace(neurons, rigid=rigid), *((shared,) if shared else ())),
        (*others, *rows),
        kinds=kinds if mixed else (),
        routed=config.num_experts_per_tok,
    )


def dense_width(config: Any, kinds: tuple[str, ...]) -> dict[str, int]:
    """The width of the MLP of blocks without experts, if there are such blocks."""
    return {"mlp": config.intermediate_size} if DENSE in kinds else {}


def leading_kinds(config: Any) -> tuple[str, ...]:
    """Blocks of a config that lists their kinds, or says how many of the first have no experts."""
    listed = getattr(config, "mlp_layer_types", None)
    if listed is not None:
        return tuple(listed)
    first = config.first_k_dense_replace
    return tuple(DENSE if block < first else SPARSE for block in range(config.num_hidden_layers))


def fewer_leading(
    raw: dict[str, Any], config: Any, shape: Shape, layers: tuple[int, ...]
) -> dict[str, Any]:
    """Say how many of the blocks without experts are left."""
    kinds = leading_kinds(config)
    return {**raw, "first_k_dense_replace": sum(kinds[block] == DENSE for block in layers)}


def sigmoid_mixture(dense: Layout, config: Any) -> Layout:
    """The table of a mixture as DeepSeek-V3 has it, and GLM after it.

    The router weights experts by sigmoids and chooses with a bias added to these, groups first;
    shared experts are one wide MLP; the first blocks have no experts.
    """
    module, kind = "mlp", SPARSE
    rows = (
        Row.of(f"{_BLOCK}.{module}.gate.weight", "linear", EXPERTS, "hidden", kind=kind),
        Row.of(f"{_BLOCK}.{module}.gate.e_score_correction_bias", "bias", EXPERTS, kind=kind),
        *expert_rows(f"{module}.experts", kind=kind),
        *mlp_rows(f"{module}.shared_experts", f"{config.n_shared_experts}*{EXPERT_MLP}", kind=kind),
    )
    # The config gives the shared experts' width as so many times that of one expert.
    return with_experts(
        dense, config, rows, kinds=leading_kinds(config), grouped=config.n_group > 1, rigid=True
    )


def sigmoid_rules(config: Any) -> tuple[Rule, ...]:
    """What such a mixture must satisfy: a group is judged by its two best experts."""
    groups, best, picked = config.n_group, config.topk_group, config.num_experts_per_tok
    grouped = Rule(
        (EXPERTS,),
        f"the router picks {best} of {groups} groups by their best 2 experts and {picked} of "
        "the experts in these",
        lambda shape: shape[EXPERTS] // groups >= max(2, math.ceil(picked / best)),
    )
    return (*expert_rules(config, config.moe_intermediate_size), grouped)


def sigmoid_sizes(config: Any) -> dict[str, int]:
    """Sizes of such a mixture's axes that a cut leaves alone."""
    sizes = {EXPERT_MLP: config.moe_intermediate_size}
    sizes |= dense_width(config, leading_kinds(config))
    return sizes | ({GROUPS.name: config.n_group} if config.n_group > 1 else {})


def expert_rules(config: Any, neurons: int, picked: int | None = None) -> tuple[Rule, ...]:
    """What every mixture must satisfy, given the ``neurons`` of one of its experts.

    The router picks as many as ever, ``picked`` where the config has another key for that. The
    grouped products with which transformers and vLLM run all experts at once take rows of whole 16
    bytes only.
    """
    picked = picked or config.num_experts_per_tok
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
