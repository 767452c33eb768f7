"""Cuts of one model that lie within one another: each keeps only what the larger one keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.scoring.scores import Scores
from shearling.table.values import Indices, Keep, Shape


@dataclass(frozen=True)
class Within:
    """What another cut keeps, by axis and block of the source.

    Attributes:
        keep: what it keeps; all, if that is None.
        depth: blocks of the source.
    """

    keep: Keep | None
    depth: int

    def among(self, axis: str, candidates: range, layer: int | None = None) -> Sequence[int]:
        """Those of some units, of a block if the axis is of blocks, that it keeps."""
        if self.keep is None:
            return candidates
        if layer is None:
            kept = self.keep.model.get(axis)
        else:
            layers = self.keep.model.get("layers", tuple(range(self.depth)))
            rows = self.keep.blocks.get(axis)
            kept = None if rows is None else rows[layers.index(layer)]
        return candidates if kept is None else sorted(set(kept) & set(candidates))


def removal_order(scores: Scores, gone: Indices) -> tuple[int, ...]:
    """The order in which blocks go behind those that are gone already.

    A criterion that scores whole runs of blocks names the best run that holds what is gone.
    """
    if not gone:
        return scores.order
    first = _run_around(scores, gone) or scores.order
    return tuple(dict.fromkeys(block for block in (*first, *scores.order) if block not in gone))


def _run_around(scores: Scores, gone: Indices) -> tuple[int, ...]:
    """The best of the runs tried that hold some blocks; none if no run was tried that does."""
    length = len(scores.removal_order)
    values = {int(start): value for start, value in (scores.details.get("runs") or {}).items()}
    holding = [start for start in values if set(gone) <= set(range(start, start + length))]
    if not holding:
        return ()
    best = min(holding, key=lambda start: values[start])
    return tuple(range(best, best + length))


def require_nested(keep: Keep, within: Keep, source: Checkpoint, after: Shape) -> None:
    """Raise ShearlingError unless a cut keeps only what a larger one keeps.

    Args:
        keep: what it keeps.
        within: what the larger one keeps.
        source: the model both are cut from.
        after: the cut's sizes.
    """
    depth = source.shape["layers"]
    smaller, larger = (one.model.get("layers", tuple(range(depth))) for one in (keep, within))
    outside = {
        axis
        for axis, kept in within.model.items()
        if not set(_model(keep, axis, source)) <= {*kept}
    }
    if set(smaller) <= set(larger):
        for axis, rows in within.blocks.items():
            own = keep.blocks.get(axis)
            wide = [
                layer for number, layer in enumerate(smaller)
                if own is None or not set(own[number]) <= set(rows[larger.index(layer)])
            ]  # fmt: skip
            outside |= {axis} if wide else set()
    if outside:
        raise ShearlingError(
            f"--nested: the cut to {_sizes(after, source.shape)} cannot lie within the next larger "
            f"one, which keeps too few of {', '.join(sorted(outside))}; ask for sizes further "
            "apart, for shapes none of whose axes is larger, or leave out --nested."
        )


def check_shapes(shapes: Sequence[tuple[str, Shape]]) -> None:
    """Refuse sizes that cannot be nested: on some axis, a smaller one is the larger.

    Args:
        shapes: names and sizes, the largest first.

    Raises:
        ShearlingError: there are such; the axis is named.
    """
    for (above, larger), (below, smaller) in pairwise(shapes):
        for axis in smaller:
            if smaller[axis] > larger[axis]:
                raise ShearlingError(
                    f"--nested: {below} would keep {axis}={smaller[axis]}, but the larger {above} "
                    f"keeps {larger[axis]}; ask for sizes further apart, or name shapes none of "
                    "whose axes is larger."
                )


def _model(keep: Keep, axis: str, source: Checkpoint) -> Sequence[int]:
    return keep.model.get(axis, range(source.shape[axis]))


def _sizes(after: Shape, before: Shape) -> str:
    return ",".join(f"{axis}={after[axis]}" for axis in after if after[axis] < before[axis])
