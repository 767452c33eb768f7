"""Taylor expansions: what the loss would change by if a unit's weights were zero.

LLM-Pruner, arXiv 2305.11627, first order. The weights that go with a unit are
those of its coupled group (see weights.py); for the residual channels those inside the blocks.

Shapes: U units of an axis.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from shearling.engine.stream import BlockStream
from shearling.engine.walk import backward, check_state
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.scoring.registry import criterion
from shearling.scoring.units.places import STREAM, Slot, slots, unit_sums
from shearling.table.families import Home


@criterion(
    "taylor", of="units", reads=("text",), backward=True, order=80,
    says="sum of abs(weight x gradient) over the coupled weights, by matrix",
    work="LLM-Pruner", paper="2305.11627",
)  # fmt: skip
def taylor(
    stream: BlockStream, ids_NS: Tensor, axes: Sequence[str], *, progress: Progress = silent
) -> dict[str, list[Tensor]]:
    """Sum over a unit's matrices of |sum of w dL/dw|."""
    return _expansion(stream, ids_NS, axes, element=False, progress=progress)


@criterion(
    "taylor-element", of="units", reads=("text",), backward=True, order=90,
    says="sum of abs(weight x gradient) over the coupled weights, one by one",
    work="LLM-Pruner", paper="2305.11627",
)  # fmt: skip
def taylor_element(
    stream: BlockStream, ids_NS: Tensor, axes: Sequence[str], *, progress: Progress = silent
) -> dict[str, list[Tensor]]:
    """Sum over a unit's weights of |w dL/dw|."""
    return _expansion(stream, ids_NS, axes, element=True, progress=progress)


def _expansion(
    stream: BlockStream,
    ids_NS: Tensor,
    axes: Sequence[str],
    *,
    element: bool,
    progress: Progress = silent,
) -> dict[str, list[Tensor]]:
    """Sum over a unit's matrices of |sum of w dL/dw|, or of |w dL/dw| element by element.

    L is the mean NLL over the calibration tokens, and gradients are summed over them before any
    absolute value. Matrices fused into one tensor one after the other count as several; a bias
    counts as a matrix.

    Returns:
        By axis, a row (U) for each block, or one for ``hidden``.

    Raises:
        ShearlingError: activations or gradients that are not finite; names the block.
    """
    checkpoint = stream.checkpoint
    layout, shape = checkpoint.layout, checkpoint.shape
    places = {axis: [s for s in slots(layout, shape, axis) if s.row.in_block] for axis in axes}
    rows = {axis: [torch.zeros(shape[axis]).double()] * stream.depth for axis in axes}
    stage = "scoring units by Taylor expansion"
    walk = backward(stream, ids_NS, stage, weights=True, tell=progress, forward_check=check_state)
    for step in walk:
        step.finish()
        index = step.index
        homes, weights = checkpoint.block_homes(index), dict(step.block.named_parameters())
        for axis in axes:
            parts = [
                _part(weights[homes[name].parameter], homes[name], slot, element=element)
                for slot in places[axis]
                for name in slot.row.names(index, shape)
                if name in homes
            ]
            if not parts:  # a block of a kind without such units
                continue
            rows[axis][index] = torch.stack(parts).sum(0)
            if not bool(rows[axis][index].isfinite().all()):
                raise ShearlingError(
                    f"block {index} has gradients that are not finite numbers; the model's "
                    "weights hold NaN or infinity, or overflow: fetch the checkpoint again."
                )
    return {
        axis: [torch.stack(sums).sum(0)] if axis == STREAM else sums for axis, sums in rows.items()
    }


def _part(weight: Tensor, home: Home, slot: Slot, *, element: bool) -> Tensor:
    assert weight.grad is not None, slot.row.name
    product = home.of(weight.detach()) * home.of(weight.grad)
    return unit_sums(product, slot, torch.abs) if element else unit_sums(product, slot).abs()
