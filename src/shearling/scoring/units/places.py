"""Where the units of an axis lie in a model, read off the table and nothing else.

Shapes: U units of an axis; R, C rows and columns of a weight.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.table.axes import EXPERT_MLP, EXPERTS, Dim, Row
from shearling.table.layout import Layout
from shearling.table.values import Shape

STREAM = "hidden"
_CHUNK = 2**24  # entries of a matrix that are looked at together


@dataclass(frozen=True, slots=True)
class Slot:
    """A stretch of one dimension of a tensor that lies on an axis.

    Its entries, reshaped to (outer, size, inner), belong to the unit that the middle index says.
    A dimension that joins several matrices (``mlp + mlp``) holds a slot for each.

    Attributes:
        row: the tensor.
        dim: which of its dimensions.
        start: first entry of the stretch.
        outer, size, inner: its factors; ``size`` is the number of units.
    """

    row: Row
    dim: int
    start: int
    outer: int
    size: int
    inner: int


@dataclass(frozen=True, slots=True)
class Tap:
    """Modules of a block whose inputs hold the units of an axis, unit after unit.

    For an axis of the blocks this is the *writer*: the matrix whose columns lie on the axis and
    whose rows lie on the residual stream (down_proj, o_proj). For the stream itself these are
    its *readers*: matrices whose columns lie on it, which see it normed; those of experts, which
    not every token meets, are left out.

    Attributes:
        axis: the axis.
        paths: the modules, by path inside the block.
        width: columns a unit has.
    """

    axis: str
    paths: tuple[str, ...]
    width: int

    def within(self, block: nn.Module) -> Tap:
        """What of it a block has: not every kind of block has all."""
        there = {name for name, _ in block.named_modules()}
        return replace(self, paths=tuple(path for path in self.paths if path in there))


def unit_axes(layout: Layout) -> tuple[str, ...]:
    """Axes whose units criteria of units score: of the blocks, but for experts; the stream."""
    return tuple(
        axis.name
        for axis in layout.axes
        if not axis.rigid
        and (axis.per_block or axis.name == STREAM)
        and axis.name not in (EXPERTS, EXPERT_MLP)
    )


def check_axes(layout: Layout, axes: tuple[str, ...]) -> None:
    """Raise ShearlingError unless all of ``axes`` can be scored, and there are any."""
    known = ", ".join(unit_axes(layout))
    if not axes:
        raise ShearlingError(f"no axis was named to score; name some of {known}.")
    for axis in axes:
        if axis not in unit_axes(layout):
            raise ShearlingError(f"axis {axis!r} has no units to score here; choose of {known}.")


def scored_axis(layout: Layout, axis: str) -> str:
    """The axis whose units are measured for ``axis``: for a group, what it holds."""
    return next((inner.name for inner in layout.axes if inner.inside == axis), axis)


def slots(layout: Layout, shape: Shape, axis: str) -> Iterator[Slot]:
    """Everything that goes with the units of ``axis``; with a group go the units it holds."""
    for row in layout.stored:
        for dim, formula in enumerate(row.dims):
            yield from _slots(row, dim, formula, layout, shape, axis)


def tap(checkpoint: Checkpoint, axis: str) -> Tap:
    """Where the units of ``axis`` can be heard."""
    layout, prefix = checkpoint.layout, f"{checkpoint.family.blocks}.{{}}."
    # From the stream's side every in-block matrix that reads it; from a block's, what writes it.
    writers = [
        slot
        for slot in slots(layout, checkpoint.shape, axis)
        if slot.row.role == "linear"
        and slot.row.in_block
        and not slot.row.of_experts
        and slot.dim == 1
        and (axis == STREAM or slot.row.output.axes == {STREAM})
    ]
    assert writers, f"nothing writes from {axis}"
    assert {(slot.start, slot.outer, slot.inner) for slot in writers} == {(0, 1, writers[0].inner)}
    paths = [slot.row.name.removeprefix(prefix).rpartition(".")[0] for slot in writers]
    return Tap(axis, tuple(paths), writers[0].inner)


def unit_sums(
    tensor: Tensor, slot: Slot, entry: Callable[[Tensor], Tensor] = lambda x: x
) -> Tensor:
    """Sum of ``entry`` of a tensor's values over each unit (U), in double precision.

    A large matrix is looked at in parts, so that no second one of its size is made.
    """
    length = slot.outer * slot.size * slot.inner
    part = tensor.narrow(slot.dim, slot.start, length).movedim(slot.dim, -1).reshape(-1, length)
    total = tensor.new_zeros(length, dtype=torch.float64)
    for rows_RC in part.split(max(1, _CHUNK // length)):
        total += entry(rows_RC.float()).sum(0, dtype=torch.float64)
    return total.view(slot.outer, slot.size, slot.inner).sum((0, 2))


def _slots(
    row: Row, dim: int, formula: Dim, layout: Layout, shape: Shape, axis: str
) -> Iterator[Slot]:
    start = 0
    for segment in formula.segments:
        sizes = [shape[factor] if isinstance(factor, str) else factor for factor in segment]
        for at, factor in enumerate(segment):
            outer, inner = math.prod(sizes[:at]), math.prod(sizes[at + 1 :])
            if factor == axis:
                yield Slot(row, dim, start, outer, sizes[at], inner)
            elif isinstance(factor, str) and layout.axis[factor].inside == axis:
                groups = shape[axis]
                yield Slot(row, dim, start, outer, groups, sizes[at] // groups * inner)
        start += math.prod(sizes)
