"""Scores of the units of a width axis, and the choice of units that they lead to.

A block has neurons, query heads and key/value groups of its own, and each block keeps equally
many, the highest-scored; the channels of the residual stream are chosen once for the model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from shearling.errors import ShearlingError
from shearling.table.axes import Axis, Layout
from shearling.table.values import Indices, Keep, Shape

Rows = tuple[tuple[float, ...], ...]
_FIELDS = ("kind", "criterion", "axis", "scores")


@dataclass(frozen=True, slots=True)
class UnitScores:
    """Importance by block and unit; the lowest of a block is removed first.

    Attributes:
        criterion: name as in ``UNIT_CRITERIA``.
        axis: what is scored: ``mlp``, ``heads``, ``kv_heads`` or ``hidden``.
        values: one row for each block of the source; a single row for ``hidden``, which the
            blocks share. Only numbers within a row are comparable.
        details: further facts for the file: model, calibration, seconds.
    """

    criterion: str
    axis: str
    values: Rows
    details: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Refuse rows of unequal length and numbers that are not finite (ShearlingError)."""
        if not self.values or len({len(row) for row in self.values}) != 1 or not self.values[0]:
            raise ShearlingError(
                f"scores of {self.axis} must be rows of equally many numbers, but were given as "
                f"rows of {[len(row) for row in self.values]}."
            )
        for block, row in enumerate(self.values):
            if not all(map(math.isfinite, row)):
                where = f"in block {block}" if len(self.values) > 1 else "of the model"
                raise ShearlingError(
                    f"{self.criterion} gives scores that are not finite numbers to {self.axis} "
                    f"{where}; its weights hold NaN or infinity, or overflow."
                )

    def with_details(self, **details: Any) -> UnitScores:
        """A copy with more facts."""
        return replace(self, details={**self.details, **details})

    def geometric_mean(self, other: UnitScores, criterion: str) -> UnitScores:
        """Scores of the same units under two criteria joined into one, called ``criterion``.

        Each is divided by its mean over a row first; one that is zero for all units of a row
        leaves the choice there to the other.
        """
        import torch

        from shearling.scoring.units.statistics import geometric_mean

        rows = tuple(
            tuple(geometric_mean(torch.tensor(a).double(), torch.tensor(b).double()).tolist())
            for a, b in zip(self.values, other.values, strict=True)
        )
        return UnitScores(criterion, self.axis, rows, self.details)

    def require(self, layout: Layout, shape: Shape) -> UnitScores:
        """These scores, if they are of as many blocks and units as a model has (ShearlingError)."""
        axis = layout.axis.get(self.axis)
        blocks = shape["layers"] if axis is not None and axis.per_block else 1
        found = (len(self.values), len(self.values[0]))
        if axis is None or found != (blocks, shape[self.axis]):
            has = "no such axis" if axis is None else f"{blocks} x {shape[self.axis]}"
            raise ShearlingError(
                f"scores were given for {found[0]} x {found[1]} units of {self.axis}, but the "
                f"model has {has}; score this model."
            )
        return self

    def as_json(self) -> dict[str, Any]:
        """As in docs/files.md."""
        return {
            "kind": "unit-scores",
            "criterion": self.criterion,
            "axis": self.axis,
            "scores": [list(row) for row in self.values],
            **{key: value for key, value in self.details.items() if key not in _FIELDS},
        }

    @staticmethod
    def load(path: Path) -> UnitScores:
        """Read what ``as_json`` gave.

        Raises:
            ShearlingError: not such a file, or scores that are not finite.
        """
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["kind"] != "unit-scores":
                raise ValueError(f"its kind is {data['kind']!r}")
            criterion, axis = str(data["criterion"]), str(data["axis"])
            values = tuple(tuple(float(value) for value in row) for row in data["scores"])
            details = {key: value for key, value in data.items() if key not in _FIELDS}
        except (OSError, ValueError, KeyError, TypeError, AttributeError, OverflowError) as error:
            reason = f"it has no {error}" if isinstance(error, KeyError) else error
            raise ShearlingError(
                f"{path} is not a file of unit scores ({reason}); score the model again."
            ) from error
        try:
            return UnitScores(criterion, axis, values, details)
        except ShearlingError as error:
            raise ShearlingError(f"{path} cannot be used: {error}") from error


def keep_units(
    scores: Mapping[str, UnitScores],
    layout: Layout,
    shape: Shape,
    after: Shape,
    layers: tuple[int, ...],
) -> Keep:
    """Keep the highest-scored units of every width axis that shrinks; ties to the lower index.

    Whole key/value groups are chosen first, by their own scores or else by the sum of their
    heads'; inside each kept group, equally many query heads by theirs.

    Args:
        scores: by axis; axes that do not shrink need none.
        layout: the table of the architecture.
        shape: sizes of the source.
        after: sizes wanted; ``vocab`` and rigid axes are not looked at.
        layers: surviving blocks in the source's numbering.

    Returns:
        What survives, nested axes filled in; the choice of the vocabulary is left to others.

    Raises:
        ShearlingError: scores missing for an axis that shrinks, or not of this model; sizes that
            are not between 1 and the source's, or spread unevenly over groups; blocks out of
            order or not as many as ``after`` says.
    """
    if len(layers) != after["layers"]:
        raise ShearlingError(
            f"{len(layers)} surviving blocks were named, but layers={after['layers']} was asked "
            f"for; name as many blocks."
        )
    layout.check(after)
    whole = tuple(layers) == tuple(range(shape["layers"]))
    model: dict[str, Indices] = {} if whole else {"layers": tuple(layers)}
    layout.complete(Keep(model), shape)  # blocks in order and in range, before they are indices
    blocks: dict[str, tuple[Indices, ...]] = {}
    for axis in layout.axes:
        if axis.rigid or axis.name in ("layers", "vocab"):
            continue
        _check_size(axis.name, shape, after)
        if not axis.per_block:
            if after[axis.name] < shape[axis.name]:
                (row,) = _of(scores, axis.name, layout, shape).values
                model[axis.name] = _best(row, range(len(row)), after[axis.name])
        elif axis.inside is None:
            inner = next((each for each in layout.axes if each.inside == axis.name), None)
            if inner is not None:
                _check_nesting(inner.name, axis.name, shape, after)
            blocks |= _keep_nest(scores, axis, inner, layout, shape, after, layers)
    return layout.complete(Keep(model, blocks), shape)


def group_sums(row: Sequence[float], groups: int) -> tuple[float, ...]:
    """Sums over ``groups`` runs of equally many neighbours."""
    each = len(row) // groups
    return tuple(math.fsum(row[g * each : (g + 1) * each]) for g in range(groups))


def _keep_nest(
    scores: Mapping[str, UnitScores],
    outer: Axis,
    inner: Axis | None,
    layout: Layout,
    shape: Shape,
    after: Shape,
    layers: tuple[int, ...],
) -> dict[str, tuple[Indices, ...]]:
    """Choices, per surviving block, of units that hold others, and of those that they hold."""
    size, left = shape[outer.name], after[outer.name]
    found: dict[str, tuple[Indices, ...]] = {}
    chosen = {layer: tuple(range(size)) for layer in layers}
    if left < size:
        values = _outer_rows(scores, outer, inner, layout, shape)
        chosen = {layer: _best(values[layer], range(size), left) for layer in layers}
        found[outer.name] = tuple(chosen.values())
    if inner is None:
        return found
    each, most = after[inner.name] // left, shape[inner.name] // size
    if each < most:
        values = _of(scores, inner.name, layout, shape).values
        found[inner.name] = tuple(
            tuple(
                index
                for group in groups
                for index in _best(values[layer], range(group * most, (group + 1) * most), each)
            )
            for layer, groups in chosen.items()
        )
    return found


def _outer_rows(
    scores: Mapping[str, UnitScores], outer: Axis, inner: Axis | None, layout: Layout, shape: Shape
) -> Rows:
    if outer.name in scores or inner is None or inner.name not in scores:
        return _of(scores, outer.name, layout, shape).values
    values = _of(scores, inner.name, layout, shape).values
    return tuple(group_sums(row, shape[outer.name]) for row in values)


def _of(scores: Mapping[str, UnitScores], axis: str, layout: Layout, shape: Shape) -> UnitScores:
    if axis not in scores or scores[axis].axis != axis:
        raise ShearlingError(
            f"{axis} is to shrink, but there are no scores of {axis}; score that axis."
        )
    return scores[axis].require(layout, shape)


def _check_size(axis: str, shape: Shape, after: Shape) -> None:
    if after[axis] > shape[axis]:
        raise ShearlingError(
            f"{axis}={after[axis]} was asked for, but the model has only {shape[axis]}; "
            "ask for fewer."
        )


def _check_nesting(inner: str, outer: str, shape: Shape, after: Shape) -> None:
    each, most = after[inner] // after[outer], shape[inner] // shape[outer]
    if each > most:
        raise ShearlingError(
            f"{inner}={after[inner]} over {outer}={after[outer]} would put {each} in each, but the "
            f"model has {most} in each; ask for at most {most * after[outer]}."
        )


def _best(row: Sequence[float], among: range, count: int) -> Indices:
    """The ``count`` highest of ``among``, in order; ties go to the lower index."""
    return tuple(sorted(sorted(among, key=lambda i: (-row[i], i))[:count]))
