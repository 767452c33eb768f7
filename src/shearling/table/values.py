"""Sizes of a model, and what a cut leaves of it: Shape, Keep, Selection, Cut.

The table (:mod:`shearling.table.axes`) works out the one from the other. Sizes count units,
indices are positions on an axis.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from shearling.table.axes import Row

Indices = tuple[int, ...]


class Shape(Mapping[str, int]):
    """Size by axis; immutable."""

    __slots__ = ("_sizes",)

    def __init__(self, sizes: Mapping[str, int]) -> None:
        """Copy ``sizes``."""
        self._sizes = MappingProxyType(dict(sizes))

    def __getitem__(self, axis: str) -> int:
        """The size of ``axis``."""
        return self._sizes[axis]

    def __iter__(self) -> Iterator[str]:
        """Axis names."""
        return iter(self._sizes)

    def __len__(self) -> int:
        """Number of axes."""
        return len(self._sizes)

    def __hash__(self) -> int:
        """By value."""
        return hash(frozenset(self._sizes.items()))

    def __repr__(self) -> str:
        """Like ``layers=24, hidden=576``."""
        return ", ".join(f"{axis}={size}" for axis, size in self._sizes.items())

    def with_(self, **sizes: int) -> Shape:
        """A new shape with some sizes replaced."""
        return Shape({**self._sizes, **sizes})


@dataclass(frozen=True, slots=True)
class Keep:
    """Surviving indices, in the source's numbering and order; an absent axis is whole.

    Attributes:
        model: axis -> indices, for axes the whole model shares (``layers``, ``hidden``).
        blocks: axis -> one tuple of indices for each *surviving* block, in order, for axes that
            every block has its own units on (``mlp``, ``heads``, ``kv_heads``).
    """

    model: Mapping[str, Indices] = field(default_factory=dict)
    blocks: Mapping[str, tuple[Indices, ...]] = field(default_factory=dict)

    def as_json(self) -> dict[str, object]:
        """Plain lists by axis, as in a manifest."""
        return {
            **{axis: list(indices) for axis, indices in self.model.items()},
            **{axis: [list(each) for each in blocks] for axis, blocks in self.blocks.items()},
        }


@dataclass(frozen=True, slots=True)
class ByExpert:
    """What survives along a dimension of a tensor for all experts, where each keeps its own.

    Attributes:
        dim: the dimension, that of their neurons; the experts are dimension 0.
        indices: of every surviving expert the surviving flat indices, equally many.
    """

    dim: int
    indices: tuple[Indices, ...]


@dataclass(frozen=True, slots=True)
class Selection:
    """One tensor of the result: where it comes from and what of it survives.

    Attributes:
        target: name in the result.
        source: name in the source.
        indices: per dimension the surviving flat indices, or None where all survive.
        row: the line of the table that says so.
        by_expert: what survives along one dimension more, where that differs from expert to
            expert.
    """

    target: str
    source: str
    indices: tuple[Indices | None, ...]
    row: Row
    by_expert: ByExpert | None = None


@dataclass(frozen=True)
class Cut:
    """A Keep worked out once: views, repairs, writers and proofs of one cut share it.

    Attributes:
        keep: what survives, with what it implies for nested axes.
        before: sizes of the source.
        after: sizes of the result.
        selections: every tensor of the result: those outside the blocks, then block by block.
    """

    keep: Keep
    before: Shape
    after: Shape
    selections: tuple[Selection, ...]

    @property
    def layers(self) -> Indices:
        """The surviving blocks, in the source's numbering."""
        return self.keep.model.get("layers", tuple(range(self.before["layers"])))

    def of(self, target: int | None = None) -> Mapping[str, Indices]:
        """What survives by axis, outside the blocks or in block ``target`` of the result."""
        blocks = {} if target is None else self.keep.blocks
        return {**self.keep.model, **{axis: kept[target or 0] for axis, kept in blocks.items()}}

    @cached_property
    def by_target(self) -> Mapping[str, Selection]:
        """Selections by their name in the result."""
        return {selection.target: selection for selection in self.selections}

    @cached_property
    def by_source(self) -> Mapping[str, Selection]:
        """Selections by their name in the source; none of removed blocks."""
        return {selection.source: selection for selection in self.selections}
