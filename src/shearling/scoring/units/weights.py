"""Criteria that need no text: norms of a unit's weights, and chance.

The units of an axis go with everything that the table says lies on it: for a neuron its rows of
gate and up projection, their biases, and its column of the down projection; for a key/value
group its keys and values and all of its query heads (arXiv 2305.11627 calls these coupled
groups); for a residual channel every tensor of the model, tied ones once.

Shapes: U units of an axis.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shearling.files.progress import Progress, silent
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.registry import criterion
from shearling.scoring.units.places import STREAM, Slot, slots, unit_sums


@criterion(
    "magnitude-l1", of="units", reads=("weights",), order=100,
    says="sum of the coupled absolute weights", work="LLM-Pruner's groups", paper="2305.11627",
)  # fmt: skip
def magnitude_l1(
    checkpoint: Checkpoint, axes: Sequence[str], *, seed: int, progress: Progress = silent
) -> dict[str, list[Tensor]]:
    """L1 norm of all weights that go with a unit."""
    return _norms(checkpoint, axes, power=1, progress=progress)


@criterion(
    "magnitude-l2", of="units", reads=("weights",), order=110,
    says="Euclidean norm of the coupled weights", work="LLM-Pruner's groups", paper="2305.11627",
)  # fmt: skip
def magnitude_l2(
    checkpoint: Checkpoint, axes: Sequence[str], *, seed: int, progress: Progress = silent
) -> dict[str, list[Tensor]]:
    """L2 norm of all weights that go with a unit."""
    return _norms(checkpoint, axes, power=2, progress=progress)


@criterion("random", of="units", reads=("weights",), order=120, says="chance")
def chance(
    checkpoint: Checkpoint, axes: Sequence[str], *, seed: int, progress: Progress = silent
) -> dict[str, list[Tensor]]:
    """Independent uniform numbers; those of an axis do not depend on what else is asked for."""
    layout, shape = checkpoint.layout, checkpoint.shape
    rows = {}
    for axis in axes:
        draw = random.Random(f"{axis} {seed}")
        blocks = shape["layers"] if layout.axis[axis].per_block else 1
        rows[axis] = [
            torch.tensor([draw.random() for _ in range(shape[axis])], dtype=torch.float64)
            for _ in range(blocks)
        ]
    return rows


def _norms(
    checkpoint: Checkpoint, axes: Sequence[str], *, power: int, progress: Progress = silent
) -> dict[str, list[Tensor]]:
    """L1 (``power`` 1) or L2 (2) norm of all weights that go with a unit.

    Li et al., arXiv 1608.08710, over the coupled groups of LLM-Pruner, arXiv 2305.11627.

    Returns:
        By axis, a row (U) for each block, or one for ``hidden``.
    """
    layout, shape = checkpoint.layout, checkpoint.shape
    depth = shape["layers"]
    places = {axis: _by_name(slots(layout, shape, axis)) for axis in axes}
    rows = {
        axis: [
            torch.zeros(shape[axis], dtype=torch.float64)
            for _ in range(1 if axis == STREAM else depth)
        ]
        for axis in axes
    }

    def add(block: int, template: str, tensor: Tensor) -> None:
        for axis in axes:
            for slot in places[axis].get(template, ()):
                row = rows[axis][0 if axis == STREAM else block]
                row += unit_sums(tensor, slot, torch.abs if power == 1 else torch.square)

    for block in range(depth):
        tensors = layout.block_tensors(block, shape)
        templates = {name: row.name for name, row in tensors.items()}
        for name, tensor in checkpoint.read(templates):
            add(block, templates[name], tensor)
        progress("scoring units by magnitude", block + 1, depth)
    if STREAM in axes:
        for name, tensor in checkpoint.read(checkpoint.outer_names()):
            add(0, name, tensor)
    return {axis: [row ** (1 / power) for row in rows[axis]] for axis in axes}


def _by_name(places: Iterator[Slot]) -> dict[str, list[Slot]]:
    by_name: dict[str, list[Slot]] = {}
    for slot in places:
        by_name.setdefault(slot.row.name, []).append(slot)
    return by_name
