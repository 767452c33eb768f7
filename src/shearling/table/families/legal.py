"""Which shapes an architecture can be written in, and the nearest ones where it cannot."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches

from shearling.errors import ShearlingError
from shearling.table.kinds import described
from shearling.table.layout import Layout
from shearling.table.values import Shape

# Someone who asks for hidden=480 would rather lose a head than get another hidden size.
_ASKED_FOR = 8
_NAMED = 2


@dataclass(frozen=True, slots=True)
class Rule:
    """What every shape of an architecture must satisfy.

    Attributes:
        axes: those it speaks of.
        says: the rule in words, as they follow a colon.
        holds: whether a shape satisfies it.
    """

    axes: tuple[str, ...]
    says: str
    holds: Callable[[Shape], bool]


def whole_heads(name: str) -> Rule:
    """Heads whose width is nowhere written down: the hidden size must give it, exactly."""
    return Rule(
        ("hidden", "heads"),
        f"{name} computes the width of a head as hidden / heads, which must stay what it is",
        lambda shape: shape["hidden"] == shape["heads"] * shape["head_dim"],
    )


def divided_hidden(name: str) -> Rule:
    """Heads of an explicit width, in a config that wants hidden divisible by heads all the same."""
    return Rule(
        ("hidden", "heads"),
        f"{name}'s config refuses a hidden size that is not a multiple of heads",
        lambda shape: shape["hidden"] % shape["heads"] == 0,
    )


def frozen(axes: Mapping[str, str], before: Shape) -> Iterator[Rule]:
    """Axes that stay as they are, each with the reason."""
    for axis, why in axes.items():
        if axis in before:
            yield Rule(
                (axis,), why, lambda shape, axis=axis: shape.get(axis, before[axis]) == before[axis]
            )


def nesting(layout: Layout, before: Shape) -> Iterator[Rule]:
    """Units inside others, as query heads in groups, are spread evenly and move nowhere."""
    for axis in layout.axes:
        if axis.inside is None or axis.of_each:
            continue
        inner, outer = axis.name, axis.inside
        most = before[inner] // before[outer]
        yield Rule(
            (inner, outer),
            f"{inner} must be a multiple of {outer}, with at most the source's {most} in each",
            lambda shape, inner=inner, outer=outer, most=most: (
                shape[inner] % shape[outer] == 0 and shape[inner] // shape[outer] <= most
            ),
        )


def kinds(layout: Layout) -> Iterator[Rule]:
    """Of each kind of block one stays."""
    count = len(set(layout.kinds))
    if count > 1:
        yield Rule(
            ("layers",),
            f"its blocks are of {count} kinds ({described(layout.kinds)}), and one of each stays",
            lambda shape: shape["layers"] >= count,
        )


def check(name: str, layout: Layout, rules: tuple[Rule, ...], before: Shape, after: Shape) -> None:
    """Raise ShearlingError unless a ``name`` model of ``before`` can be cut to ``after``.

    Args:
        name: the architecture, for the message.
        layout: its table.
        rules: all that it must satisfy.
        before, after: sizes of the source and of the result.
    """
    for axis in after:
        if axis not in layout.axis:
            near = ", ".join(get_close_matches(axis, layout.axis, n=2, cutoff=0.5))
            raise ShearlingError(
                f"{axis}={after[axis]} was given, but a {name} model has no axis {axis!r}"
                f"{f' (nearest: {near})' if near else ''}; "
                f"it has {', '.join(layout.axis)}."
            )
    for axis in layout.axes:
        size, most = after.get(axis.name), before[axis.name]
        if axis.rigid and size != most:
            raise ShearlingError(
                f"{axis.name}={size} was given, but {axis.name} of a {name} model cannot be cut; "
                f"leave it at {most}."
            )
        if size is None or not 1 <= size <= most:
            raise ShearlingError(
                f"{axis.name}={size} was given, but a cut of this {name} model has between 1 and "
                f"the source's {most}; give one of these."
            )
    for rule in rules:
        if not rule.holds(after):
            axes = _bearing(rules, after)
            shapes = nearest(rules, before, after)
            legal = " or ".join(_sizes(shape, axes) for shape in shapes)
            raise ShearlingError(
                f"{_sizes(after, rule.axes)} cannot be written: {rule.says}; "
                f"{f'the nearest that can: {legal}' if legal else 'no smaller shape can'}."
            )


def nearest(
    rules: tuple[Rule, ...], before: Shape, after: Shape, count: int = _NAMED
) -> list[Shape]:
    """Legal shapes near ``after``, nearest first; only axes that bear on broken rules differ.

    The distance is the sum of the changes, each relative to the source's size; those of an axis
    whose size was asked for (it is not the source's) weigh eight times as much.
    """
    axes = _bearing(rules, after)
    weight = {
        axis: (_ASKED_FOR if after[axis] != before[axis] else 1) / before[axis] for axis in axes
    }
    start = tuple(after[axis] for axis in axes)
    queue, seen = [(0.0, start)], {start}
    found: list[Shape] = []
    while queue and len(found) < count:
        _, sizes = heapq.heappop(queue)
        shape = after.with_(**dict(zip(axes, sizes, strict=True)))
        if all(rule.holds(shape) for rule in rules):
            found.append(shape)
        # Every shape is reached by steps of one that lead away from the start on each axis.
        for i, axis in enumerate(axes):
            for step in (-1, 1):
                size = sizes[i] + step
                moved = (*sizes[:i], size, *sizes[i + 1 :])
                if (size - start[i]) * step > 0 and 1 <= size <= before[axis] and moved not in seen:
                    seen.add(moved)
                    heapq.heappush(queue, (_distance(axes, weight, start, moved), moved))
    return found


def _bearing(rules: tuple[Rule, ...], shape: Shape) -> tuple[str, ...]:
    """Axes of the rules that ``shape`` breaks, and of all that share one with these, and so on."""
    axes = [axis for rule in rules if not rule.holds(shape) for axis in rule.axes]
    for _ in rules:
        for rule in rules:
            if not set(rule.axes).isdisjoint(axes):
                axes += rule.axes
    return tuple(dict.fromkeys(axes))


def _distance(
    axes: tuple[str, ...],
    weight: dict[str, float],
    start: tuple[int, ...],
    sizes: tuple[int, ...],
) -> float:
    each = zip(axes, start, sizes, strict=True)
    return sum(weight[axis] * abs(a - b) for axis, a, b in each)


def _sizes(shape: Shape, axes: tuple[str, ...]) -> str:
    return ", ".join(f"{axis}={shape[axis]}" for axis in axes)
