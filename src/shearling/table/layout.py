"""All axes and rows of a model's table: what it counts, and what a choice does to every tensor."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise

from shearling.errors import ShearlingError
from shearling.table.axes import EXPERT_MLP, EXPERTS, Axis, Dim, Row, units_of
from shearling.table.kinds import lost
from shearling.table.values import ByExpert, Cut, Indices, Keep, Selection, Shape


@dataclass(frozen=True)
class Layout:
    """The table of one architecture: its axes, and a row for every tensor.

    Attributes:
        axes: every axis.
        rows: every tensor.
        kinds: the kind of each block, where blocks are not all alike.
        routed: how many experts a token is sent to; 0 without experts.
    """

    axes: tuple[Axis, ...]
    rows: tuple[Row, ...]
    kinds: tuple[str, ...] = ()
    routed: int = 0

    def __post_init__(self) -> None:
        """Refuse axes that no row uses and names that no axis declares: both are our mistakes."""
        used = {name for row in self.rows for dim in row.dims for name in dim.axes} | {"layers"}
        used |= {axis.inside for axis in self.axes if axis.inside}
        declared = {axis.name for axis in self.axes}
        assert used == declared, f"axes used {sorted(used)} but declared {sorted(declared)}"
        names = {row.name for row in self.stored}
        assert all(row.tied_to is None or row.tied_to in names for row in self.rows)

    @cached_property
    def axis(self) -> Mapping[str, Axis]:
        """Axes by name."""
        return {axis.name: axis for axis in self.axes}

    @cached_property
    def stored(self) -> tuple[Row, ...]:
        """Rows with storage of their own."""
        return tuple(row for row in self.rows if row.tied_to is None and not row.bare)

    def block_rows(self, block: int | None = None) -> tuple[Row, ...]:
        """Rows that blocks have, or that one block has."""
        rows = tuple(row for row in self.stored if row.in_block)
        if block is None or not self.kinds:
            return rows
        return tuple(row for row in rows if row.kind in (None, self._kind(block)))

    def _kind(self, block: int) -> str | None:
        return self.kinds[block] if self.kinds else None

    def block_tensors(self, block: int, shape: Shape) -> dict[str, Row]:
        """Name -> its row, of every tensor that is stored for a block."""
        return {name: row for row in self.block_rows(block) for name in row.names(block, shape)}

    def places(self, shape: Shape) -> dict[str, tuple[Row, int | None]]:
        """Name -> its row, and the block that it is in, of all rows that are no other's twin."""
        return {
            name: (row, block)
            for row in self.rows
            if row.tied_to is None
            for block in self._blocks(row, shape)
            for name in ([row.name] if block is None else row.names(block, shape))
        }

    def tensors(self, shape: Shape) -> dict[str, tuple[int, ...]]:
        """Name -> sizes of every stored tensor of a model of ``shape``."""
        return {
            name: tuple(dim.size(shape) for dim in row.dims)
            for name, (row, _) in self.places(shape).items()
            if not row.bare
        }

    def blocks_with(self, axis: str, shape: Shape) -> int:
        """How many of the first ``layers`` blocks have units on an axis."""
        having = {row.kind for row in self.block_rows() if any(axis in d.axes for d in row.dims)}
        if None in having:
            return shape["layers"]
        return sum(kind in having for kind in self.kinds[: shape["layers"]])

    def heaviest(self, shape: Shape, *, active: bool = False) -> Layout:
        """The same blocks in the order in which the first few have most parameters.

        One of each kind first, as these stay whatever goes; counts of fewer blocks are then bounds.
        """
        if not self.kinds:
            return self
        size = {kind: self._count_kind(kind, shape, active=active) for kind in set(self.kinds)}
        rest = sorted(self.kinds, key=lambda kind: -size[kind])
        first = list(dict.fromkeys(rest))
        for kind in first:
            rest.remove(kind)
        return replace(self, kinds=(*first, *rest))

    def after(self, cut: Cut) -> Layout:
        """The table of what a cut leaves."""
        return self.keeping(cut.layers)

    def keeping(self, blocks: Sequence[int]) -> Layout:
        """The table of some of the blocks."""
        if not self.kinds:
            return self
        return replace(self, kinds=tuple(self.kinds[block] for block in blocks))

    def count(self, shape: Shape, *, active: bool = False) -> int:
        """Parameters of a model of ``shape``, tied ones once: an exact integer.

        Of blocks of several kinds, the first ``layers`` are counted.

        Args:
            shape: sizes.
            active: only those that one token meets: of its experts, and not of all.
        """
        return sum(self.numbers(row, shape, active=active) for row in self.stored)

    def numbers(self, row: Row, shape: Shape, *, active: bool = False) -> int:
        """Numbers that all tensors of a row hold, or those of them that one token meets."""
        return self._numel(row, shape, active=active) * len(self._blocks(row, shape))

    def count_block(self, shape: Shape) -> int:
        """Parameters of one block, the largest where they differ."""
        return max(self._count_kind(kind, shape) for kind in dict.fromkeys(self.kinds) or (None,))

    def _count_kind(self, kind: str | None, shape: Shape, *, active: bool = False) -> int:
        rows = (row for row in self.block_rows() if row.kind in (None, kind))
        return sum(self._numel(row, shape, active=active) for row in rows)

    def _blocks(self, row: Row, shape: Shape) -> Sequence[int | None]:
        """Numbers of the blocks that have such a tensor; one None for what is outside of them."""
        if not row.in_block:
            return [None]
        blocks = range(shape["layers"])
        return [b for b in blocks if row.kind in (None, self._kind(b))] if row.kind else blocks

    def check(self, shape: Shape) -> None:
        """Raise ShearlingError unless ``shape`` has every axis, positive sizes and whole groups."""
        for axis in self.axes:
            if axis.name not in shape or shape[axis.name] < 1:
                raise ShearlingError(
                    f"shape ({shape}) has {axis.name}={shape.get(axis.name)}, "
                    f"but {axis.name} must be at least 1."
                )
        for axis in self.axes:
            if axis.inside and not axis.of_each and shape[axis.name] % shape[axis.inside]:
                raise ShearlingError(
                    f"{axis.name}={shape[axis.name]} cannot be spread evenly over "
                    f"{axis.inside}={shape[axis.inside]}; give a multiple of {shape[axis.inside]}."
                )

    def cut(self, keep: Keep | Cut, shape: Shape) -> Cut:
        """What ``keep`` leaves of a model of ``shape``, every tensor's share worked out once.

        Args:
            keep: what survives; a cut of this layout and shape is given back as it is.
            shape: sizes before the cut.

        Raises:
            ShearlingError: as :meth:`complete`.
        """
        if isinstance(keep, Cut):
            assert keep.before == shape, f"a cut of ({keep.before}) is none of ({shape})"
            return keep
        whole = self.complete(keep, shape)
        sizes = {axis: len(indices) for axis, indices in whole.model.items()}
        sizes |= {axis: len(blocks[0]) for axis, blocks in whole.blocks.items()}
        for axis in self.axes:
            if axis.of_each and axis.inside and axis.name in sizes:
                sizes[axis.name] //= sizes.get(axis.inside, shape[axis.inside])
        after = shape.with_(**sizes)
        return Cut(whole, shape, after, tuple(self._select(whole, shape)))

    def complete(self, keep: Keep, shape: Shape) -> Keep:
        """Validate ``keep`` and fill in what it implies for nested axes.

        Surviving groups keep all their inner units unless told otherwise.

        Raises:
            ShearlingError: an index out of range or out of order, a rigid or unknown axis,
                blocks that keep unequal numbers, groups that keep unequal numbers.
        """
        for name, indices in keep.model.items():
            self._check_axis(name, per_block=False)
            _check_indices(name, indices, shape[name])
        kept = keep.model.get("layers", tuple(range(shape["layers"])))
        self._check_kinds(kept)
        layers = len(kept)
        for name, blocks in keep.blocks.items():
            self._check_axis(name, per_block=True)
            if len(blocks) != layers or len({len(indices) for indices in blocks}) != 1:
                raise ShearlingError(
                    f"{name} must keep equally many units in each of the {layers} surviving "
                    f"blocks, but was given {[len(indices) for indices in blocks]}."
                )
            for indices in blocks:
                _check_indices(name, indices, units_of(name, shape) or 0)
        return Keep(keep.model, self._complete_nested(keep.blocks, shape))

    def _select(self, whole: Keep, shape: Shape) -> Iterator[Selection]:
        """Every tensor of the result: those outside the blocks, then block by block."""
        dims = {dim for row in self.stored for dim in row.dims}
        own = {dim for dim in dims if dim.axes & whole.blocks.keys()}  # a block's own choice
        shared = _chosen(dims - own, whole.model, shape)
        for row in self.stored:
            if not row.in_block:
                yield Selection(row.name, row.name, tuple(shared[dim] for dim in row.dims), row)
        layers = whole.model.get("layers", tuple(range(shape["layers"])))
        for target, source in enumerate(layers):
            kept = {axis: blocks[target] for axis, blocks in whole.blocks.items()}
            chosen = shared | _chosen(own, {**whole.model, **kept}, shape)
            for row in self.block_rows(source):
                if row.in_expert:
                    yield from self._select_experts(row, (target, source), chosen, kept, shape)
                    continue
                indices = tuple(chosen[dim] for dim in row.dims)
                names = row.name.format(target), row.name.format(source)
                if row.stacked:
                    yield self._select_stacked(row, names, indices, kept, shape)
                    continue
                yield Selection(*names, indices, row)

    def _select_experts(
        self,
        row: Row,
        block: tuple[int, int],
        chosen: Mapping[Dim, Indices | None],
        kept: Mapping[str, Indices],
        shape: Shape,
    ) -> Iterator[Selection]:
        """A tensor of each surviving expert; ``block`` is its number after the cut and before."""
        for target, (expert, within) in enumerate(_inside_experts(kept, shape)):
            own = dict(chosen)
            if within is not None:
                inner = {EXPERT_MLP: within}
                own |= {d: d.select(inner, shape) for d in row.dims if EXPERT_MLP in d.axes}
            names = row.name.format(block[0], target), row.name.format(block[1], expert)
            yield Selection(*names, tuple(own[dim] for dim in row.dims), row)

    def _select_stacked(
        self,
        row: Row,
        names: tuple[str, str],
        indices: tuple[Indices | None, ...],
        kept: Mapping[str, Indices],
        shape: Shape,
    ) -> Selection:
        """A tensor that holds a matrix of every expert, each of which keeps neurons of its own."""
        inner = [dim for dim, formula in enumerate(row.dims) if EXPERT_MLP in formula.axes]
        if EXPERT_MLP not in kept or not inner:
            return Selection(*names, indices, row)
        (dim,) = inner
        own = tuple(
            row.dims[dim].select({EXPERT_MLP: within or ()}, shape) or ()
            for _, within in _inside_experts(kept, shape)
        )
        whole = tuple(None if at == dim else some for at, some in enumerate(indices))
        return Selection(*names, whole, row, ByExpert(dim, own))

    def _complete_nested(
        self, blocks: Mapping[str, tuple[Indices, ...]], shape: Shape
    ) -> dict[str, tuple[Indices, ...]]:
        whole = dict(blocks)
        for axis in self.axes:
            if not axis.inside or not {axis.name, axis.inside} & whole.keys():
                continue
            if axis.of_each and axis.name not in whole:
                continue  # whole experts keep all of their neurons; that need not be listed
            each = shape[axis.name] // (1 if axis.of_each else shape[axis.inside])
            count = len(whole.get(axis.name) or whole[axis.inside])
            groups = whole.get(axis.inside) or (tuple(range(shape[axis.inside])),) * count
            if axis.name not in whole:
                whole[axis.name] = tuple(
                    tuple(g * each + i for g in chosen for i in range(each)) for chosen in groups
                )
            for chosen, inner in zip(groups, whole[axis.name], strict=True):
                held = {g: sum(i // each == g for i in inner) for g in chosen}
                if sum(held.values()) != len(inner) or len(set(held.values())) != 1:
                    raise ShearlingError(
                        f"each kept unit of {axis.inside} {list(chosen)} must hold equally many "
                        f"of {axis.name}, but {axis.name} {list(inner)} was given "
                        f"({each} in each before the cut)."
                    )
        return whole

    def _check_kinds(self, kept: Indices) -> None:
        kind = lost(self.kinds, set(range(len(self.kinds))) - set(kept))
        if kind is not None:
            raise ShearlingError(
                f"blocks {list(kept)} were to be kept, but one block of the kind {kind} has to "
                f"stay; keep one of {[b for b, k in enumerate(self.kinds) if k == kind]}."
            )

    def _check_axis(self, name: str, *, per_block: bool) -> None:
        axis = self.axis.get(name)
        if axis is None:
            raise ShearlingError(
                f"axis {name!r} is not one of this architecture's: {', '.join(self.axis)}."
            )
        if axis.rigid:
            raise ShearlingError(f"axis {name!r} is rigid: its size cannot be changed.")
        assert axis.per_block == per_block, f"{name} is kept in the wrong half of Keep"

    def _numel(self, row: Row, shape: Shape, *, active: bool = False) -> int:
        """Numbers that a block, or what is outside, stores of a row."""
        if active and row.of_experts:
            shape = shape.with_(**{EXPERTS: self.routed})
        count = math.prod(dim.size(shape) for dim in row.dims)
        return count * shape[EXPERTS] if row.in_expert else count


def _chosen(
    dims: Iterable[Dim], kept: Mapping[str, Indices], shape: Shape
) -> dict[Dim, Indices | None]:
    """What survives along each of some dimensions."""
    return {dim: dim.select(kept, shape) for dim in dims}


def _inside_experts(
    kept: Mapping[str, Indices], shape: Shape
) -> Iterator[tuple[int, Indices | None]]:
    """Every surviving expert of a block, and which of its neurons survive; None if all do."""
    experts, units = kept.get(EXPERTS, tuple(range(shape[EXPERTS]))), kept.get(EXPERT_MLP)
    for number, expert in enumerate(experts):
        if units is None:
            yield expert, None
            continue
        count, first = len(units) // len(experts), expert * shape[EXPERT_MLP]
        yield expert, tuple(unit - first for unit in units[number * count : (number + 1) * count])


def _check_indices(axis: str, indices: Indices, size: int) -> None:
    if not indices:
        raise ShearlingError(f"nothing would be left of {axis}; keep at least one of its {size}.")
    if any(a >= b for a, b in pairwise(indices)) or indices[0] < 0 or indices[-1] >= size:
        raise ShearlingError(
            f"indices to keep of {axis} must be increasing and lie in 0..{size - 1}, "
            f"but {list(indices)} was given."
        )
