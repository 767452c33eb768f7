"""From scores, or a user's list, to the blocks and units that stay."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shearling.errors import ShearlingError, count_of
from shearling.pruning.nested import Within, removal_order
from shearling.pruning.pattern import Pattern, removal_words
from shearling.scoring.scores import Scores
from shearling.table.axes import Axis
from shearling.table.kinds import described, one_by_one
from shearling.table.layout import Layout
from shearling.table.values import Indices, Keep, Shape

Rows = tuple[tuple[float, ...], ...]


def check_layers(layers: int, depth: int) -> None:
    """Raise ShearlingError unless ``layers`` of ``depth`` blocks can be kept."""
    if not 1 <= layers < depth:
        raise ShearlingError(
            f"--layers {layers} was given, but the model has {count_of(depth, 'block')}; "
            + (f"keep between 1 and {depth - 1}." if depth > 1 else "none of them can go.")
        )


def keep_layers(
    scores: Scores,
    layers: int,
    pattern: Pattern | None = None,
    *,
    kinds: Sequence[str] = (),
    gone: Indices = (),
) -> Keep:
    """Remove the blocks that matter least until ``layers`` are left, and one of each kind.

    With a ``pattern``, among the removals that keep it: the one that costs least in sum, of scores
    or, where a criterion gives an order of removal, of places in that order. Blocks ``gone`` go
    whatever they cost, as a larger cut has removed them.

    Raises:
        ShearlingError: ``layers`` out of range, too many blocks protected, or no such removal.
    """
    depth = len(scores.values)
    check_layers(layers, depth)
    removable = [*gone, *one_by_one(kinds, removal_order(scores, gone), gone)]
    if depth - layers > len(removable):
        why = (
            "not protected"
            if len(removable) == len(scores.order)
            else f"neither protected nor the last of their kind ({described(kinds)})"
        )
        raise ShearlingError(
            f"--layers {layers} would remove {depth - layers} of {depth} blocks, but only "
            f"{_are(len(removable))} {why}; keep at least {depth - len(removable)}, "
            "or protect fewer."
        )
    if pattern is None:
        return without(removable[: depth - layers], depth)
    costs = [math.inf] * depth
    for place, block in enumerate(removable):
        costs[block] = float(place) if scores.removal_order else scores.values[block]
    least = -1.0 - sum(abs(cost) for cost in costs if math.isfinite(cost))
    for block in gone:
        costs[block] = least
    kept = pattern.cheapest(costs, layers)
    if kept is None:
        raise ShearlingError(
            f"no {depth - layers} of {depth} blocks that are not protected can go and leave the "
            "others in the pattern that llama.cpp counts; protect fewer, or leave out "
            "--keep-pattern."
        )
    return Keep({"layers": kept})


def _are(number: int) -> str:
    return f"{number} {'is' if number == 1 else 'are'}"


def check_pattern(pattern: Pattern, layers: int, removed: Sequence[int] | None = None) -> None:
    """Refuse a removal that breaks a pattern of blocks, or a number that none leaves in order.

    Args:
        pattern: of the source's blocks.
        layers: how many are to stay.
        removed: the blocks that go, if they are named.

    Raises:
        ShearlingError: it does; removals that keep the pattern are named.
    """
    depth = len(pattern.kinds)
    ways = pattern.removals(depth - layers) if layers < depth else [()]
    if not ways:
        depths = pattern.depths()
        near = sorted(depths, key=lambda other: (abs(other - layers), -other))[:3]
        instead = f"keep {' or '.join(map(str, near))}" if near else "leave out --keep-pattern"
        raise ShearlingError(
            f"--keep-pattern was given, but no {depth - layers} of {depth} blocks can go and leave "
            f"the others in the pattern that llama.cpp counts; {instead}."
        )
    kept = [block for block in range(depth) if block not in (removed or ())]
    if removed is not None and not pattern.holds(kept):
        raise ShearlingError(
            f"--remove {','.join(map(str, removed))} breaks the pattern that --keep-pattern keeps; "
            f"remove {removal_words(ways)} instead."
        )


def account(keep: Keep, depth: int, scores: Scores | None = None) -> dict[str, Any]:
    """How a choice of blocks came about, for the manifest."""
    return {
        "layers": len(keep.model["layers"]),
        "removed": [block for block in range(depth) if block not in keep.model["layers"]],
        "criterion": scores.criterion if scores else None,
        "scores": list(scores.values) if scores else None,
        "calibration": scores.details.get("calibration") if scores else None,
    }


def without(removed: Iterable[int], depth: int) -> Keep:
    """Keep all blocks but those named.

    Raises:
        ShearlingError: a number out of range or named twice, or nothing removed or left.
    """
    removed = tuple(removed)
    if any(not 0 <= block < depth for block in removed):
        raise ShearlingError(
            f"--remove {','.join(map(str, removed))} was given, but the model's blocks are "
            f"numbered 0 to {depth - 1}."
        )
    if len(set(removed)) != len(removed):
        raise ShearlingError(f"--remove {','.join(map(str, removed))} names a block twice.")
    if not removed or len(removed) == depth:
        raise ShearlingError(
            f"{len(removed)} of {count_of(depth, 'block')} "
            f"{'was' if len(removed) == 1 else 'were'} named for removal; "
            + (f"name between 1 and {depth - 1}." if depth > 1 else "the only one cannot go.")
        )
    return Keep({"layers": tuple(block for block in range(depth) if block not in removed)})


def keep_units(
    scores: Mapping[str, Scores],
    layout: Layout,
    shape: Shape,
    after: Shape,
    layers: tuple[int, ...],
    within: Keep | None = None,
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
        within: what a larger cut keeps, of which this one is to be a part.

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
    allowed = Within(within, shape["layers"])
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
                (row,) = _of(scores, axis.name, layout, shape).rows
                among = allowed.among(axis.name, range(len(row)))
                model[axis.name] = _best(row, among, after[axis.name])
        elif axis.inside is None or layout.axis[axis.inside].rigid:
            inner = next((each for each in layout.axes if each.inside == axis.name), None)
            if inner is not None and inner.rigid:
                inner = None
            if inner is not None and not inner.of_each:
                _check_nesting(inner.name, axis.name, shape, after)
            nest = _Nest(axis, inner, layout, shape, after, layers, allowed)
            blocks |= nest.keep(scores)
    return layout.complete(Keep(model, blocks), shape)


def group_sums(row: Sequence[float], groups: int) -> tuple[float, ...]:
    """Sums over ``groups`` runs of equally many neighbours."""
    each = len(row) // groups
    return tuple(math.fsum(row[g * each : (g + 1) * each]) for g in range(groups))


@dataclass(frozen=True, slots=True)
class _Nest:
    """Units of every surviving block, and those that they hold, if they hold any."""

    outer: Axis
    inner: Axis | None
    layout: Layout
    shape: Shape
    after: Shape
    layers: tuple[int, ...]
    allowed: Within

    def keep(self, scores: Mapping[str, Scores]) -> dict[str, tuple[Indices, ...]]:
        """Choices by axis, a row for each surviving block."""
        outer, inner, shape, layers = self.outer, self.inner, self.shape, self.layers
        size, left = shape[outer.name], self.after[outer.name]
        fixed = shape[outer.inside] if outer.inside else 1  # groups of it that all stay
        kept: dict[str, tuple[Indices, ...]] = {}
        chosen = {layer: tuple(range(size)) for layer in layers}
        if left < size:
            values = _outer_rows(scores, outer, inner, self.layout, shape)
            chosen = {
                layer: tuple(
                    index
                    for ends in range(size // fixed, size + 1, size // fixed)
                    for index in self._best(
                        values, outer, layer, range(ends - size // fixed, ends), left // fixed
                    )
                )
                for layer in layers
            }
            kept[outer.name] = tuple(chosen.values())
        if inner is None:
            return kept
        groups_after, groups_before = (1, 1) if inner.of_each else (left, size)
        each, most = self.after[inner.name] // groups_after, shape[inner.name] // groups_before
        if each < most:
            values = _of(scores, inner.name, self.layout, shape).rows
            kept[inner.name] = tuple(
                tuple(
                    index
                    for group in groups
                    for index in self._best(
                        values, inner, layer, range(group * most, (group + 1) * most), each
                    )
                )
                for layer, groups in chosen.items()
            )
        return kept

    def _best(self, values: Rows, axis: Axis, layer: int, among: range, count: int) -> Indices:
        return _best(values[layer], self.allowed.among(axis.name, among, layer), count)


def _outer_rows(
    scores: Mapping[str, Scores], outer: Axis, inner: Axis | None, layout: Layout, shape: Shape
) -> Rows:
    if outer.name in scores or inner is None or inner.name not in scores:
        return _of(scores, outer.name, layout, shape).rows
    values = _of(scores, inner.name, layout, shape).rows
    return tuple(group_sums(row, shape[outer.name]) for row in values)


def _of(scores: Mapping[str, Scores], axis: str, layout: Layout, shape: Shape) -> Scores:
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


def _best(row: Sequence[float], among: Sequence[int], count: int) -> Indices:
    """The ``count`` highest of ``among``, in order; ties go to the lower index."""
    return tuple(sorted(sorted(among, key=lambda i: (-row[i], i))[:count]))
