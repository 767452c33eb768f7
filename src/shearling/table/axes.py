"""Axes, and what a checkpoint's tensors say about them: Axis, Dim, Row.

Every prunable unit is an index on a named axis, and every tensor declares on which axis each of
its dimensions lies. A dimension is written as a small formula::

    "hidden"                                      one axis
    "heads*head_dim"                              an axis times a rigid width
    "heads*3*head_dim"                            query, key and value interleaved per head
    "heads*head_dim + kv_heads*head_dim + ..."    segments one after the other (fused weights)

A tensor that every block has, or every expert of every block, is one row of the table, with a
``{}`` in its name for the number of the block and a second one for that of the expert.

Exact counts, legal shapes and every cut follow from these formulas, in
:mod:`shearling.table.layout`; nothing else in the package knows how a tensor is laid out. Sizes and
choices, which these speak of, are in :mod:`shearling.table.values`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shearling.table.values import Indices, Shape

Role = Literal["linear", "conv", "bias", "norm", "embedding", "head"]
EXPERTS, EXPERT_MLP = "experts", "expert_mlp"
# Units of the half of a block that mixes tokens: query heads, or heads of linear attention.
MIXERS = ("heads", "linear_heads")
# Units of the other half: neurons, of one MLP or of experts, and what a router chooses among.
MLPS = ("mlp", EXPERTS, EXPERT_MLP, "shared_mlp")


@dataclass(frozen=True, slots=True)
class Axis:
    """A named set of units.

    Attributes:
        name: as in shapes and formulas.
        per_block: every block has units of its own on this axis (heads, neurons), so each block
            keeps its own indices, though equally many; otherwise one choice holds for the model.
        rigid: the size cannot be changed (rotary pairs, learned positions).
        inside: the axis whose units each hold equally many units of this one, in order
            (query heads inside key/value groups).
        of_each: its size is that of one unit of ``inside`` (neurons of one expert), and not that
            of all of them; a choice still counts the units of a block through.
    """

    name: str
    per_block: bool = False
    rigid: bool = False
    inside: str | None = None
    of_each: bool = False


@dataclass(frozen=True, slots=True)
class Dim:
    """One dimension of a tensor: a sum of segments, each a product of axes and constants."""

    segments: tuple[tuple[str | int, ...], ...]

    @staticmethod
    def parse(formula: str) -> Dim:
        """Read a formula such as ``"heads*head_dim + 2"``."""
        return Dim(
            tuple(
                tuple(int(f) if f.strip().isdigit() else f.strip() for f in segment.split("*"))
                for segment in formula.split("+")
            )
        )

    def renamed(self, names: Mapping[str, str]) -> Dim:
        """The same on other axes, by the names of those that change."""
        return Dim(
            tuple(
                tuple(names.get(f, f) if isinstance(f, str) else f for f in segment)
                for segment in self.segments
            )
        )

    @property
    def axes(self) -> frozenset[str]:
        """Names of the axes this dimension lies on."""
        return frozenset(f for segment in self.segments for f in segment if isinstance(f, str))

    def size(self, shape: Shape) -> int:
        """Number of entries under ``shape``."""
        return sum(self._sizes(segment, shape)[1] for segment in self.segments)

    def select(self, kept: Mapping[str, Indices], shape: Shape) -> Indices | None:
        """Flat source indices that survive, or None when all do.

        Args:
            kept: surviving indices per axis; an absent axis is whole.
            shape: sizes before the cut.
        """
        if not self.axes & kept.keys():
            return None
        flat: list[int] = []
        offset = 0
        for segment in self.segments:
            sizes, total = self._sizes(segment, shape)
            chosen = [0]
            for factor, size in zip(segment, sizes, strict=True):
                units = kept.get(factor) if isinstance(factor, str) else None
                units = range(size) if units is None else units
                chosen = [outer * size + unit for outer in chosen for unit in units]
            flat.extend(offset + index for index in chosen)
            offset += total
        return tuple(flat)

    @staticmethod
    def _sizes(segment: tuple[str | int, ...], shape: Shape) -> tuple[list[int], int]:
        sizes = [shape[f] if isinstance(f, str) else f for f in segment]
        return sizes, math.prod(sizes)


@dataclass(frozen=True, slots=True)
class Row:
    """One line of the table: a tensor, or one tensor a block.

    Attributes:
        name: name in the checkpoint; ``{}`` stands for the block's number, a second one for the
            expert's.
        dims: axes of each dimension, in the order of the stored tensor.
        role: ``linear`` (a matrix product), ``conv`` (a convolution over neighbouring tokens,
            every channel by itself), ``bias`` (and whatever else is one number a unit),
            ``norm``, ``embedding`` (a look-up) or ``head`` (the product onto the vocabulary).
        tied_to: name of the tensor whose storage this one shares; it is then counted, read and
            written there, once.
        bare: nothing is stored under this name, and yet something reduces over these axes: a
            norm without parameters.
        kind: the kind of block that has it; None for all.
        stacked: which dimension is that of the output, in a tensor that holds a matrix of every
            expert of a block, the experts being its first dimension; 0 elsewhere.
    """

    name: str
    dims: tuple[Dim, ...]
    role: Role
    tied_to: str | None = None
    bare: bool = False
    kind: str | None = None
    stacked: int = 0

    @staticmethod
    def of(
        name: str, role: Role, *formulas: str, tied_to: str | None = None, bare: bool = False,
        kind: str | None = None, stacked: int = 0,
    ) -> Row:  # fmt: skip
        """A row from formulas: ``Row.of("lm_head.weight", "head", "vocab", "hidden")``."""
        dims = tuple(Dim.parse(formula) for formula in formulas)
        return Row(name, dims, role, tied_to, bare, kind, stacked)

    @property
    def output(self) -> Dim:
        """Where the result lies: the columns of a look-up, the rows of everything else."""
        if self.stacked:
            return self.dims[self.stacked]
        return self.dims[-1] if self.role == "embedding" else self.dims[0]

    @property
    def in_block(self) -> bool:
        """Whether blocks have such a tensor."""
        return "{}" in self.name

    @property
    def of_experts(self) -> bool:
        """Whether it is what experts compute with, in a tensor for each or in one for all."""
        return self.in_expert or bool(self.stacked)

    @property
    def in_expert(self) -> bool:
        """Whether every expert of a block has one."""
        return self.name.count("{}") > 1

    def names(self, block: int, shape: Shape) -> list[str]:
        """Names of the tensors that a block has of it, which are several for experts alone."""
        if not self.in_expert:
            return [self.name.format(block)]
        return [self.name.format(block, expert) for expert in range(shape[EXPERTS])]


def units_of(axis: str, sizes: Mapping[str, int]) -> int | None:
    """Units of an axis in a block of a model of these sizes; None if it has no such axis."""
    size = sizes.get(axis)
    return size * sizes.get(EXPERTS, 1) if size is not None and axis == EXPERT_MLP else size
