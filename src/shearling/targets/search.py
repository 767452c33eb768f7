"""The shape with the least predicted damage that keeps within every limit.

Damage is what makes a budget of parameters alone give blocks the share that is preferred
(:data:`shearling.pruning.preferences.PREFERENCES`): where blocks give the share b of all
parameters, neurons the share n, and s is the share preferred,

    damage = (1 - s) b^2 + s n^2,

which among all b + n of one sum is least at b / (b + n) = s. Small cuts cost little and each
further one costs more, as in docs/one_shot.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.missed import missed
from shearling.pruning.plan import MULTIPLES, Spending, width_floor
from shearling.table.values import Shape

_DIGITS = 9  # more than usual, at most


@dataclass(frozen=True, slots=True)
class Limit:
    """What a shape may cost at most.

    Attributes:
        option: as the user knows it.
        asked: what the user gave.
        most: of the unit that ``of`` counts in.
        of: what a shape costs; no larger shape costs less.
        named: a cost as the user would have given it, with so many digits more than usual.
    """

    option: str
    asked: str
    most: float
    of: Callable[[Shape], float]
    named: Callable[[float, int], str]

    def holds(self, shape: Shape) -> bool:
        """Whether a shape keeps within it."""
        return self.of(shape) <= self.most

    def short(self, source: Checkpoint, shape: Shape) -> str | None:
        """A sentence on a shape that stays well below, or None."""
        asked = f"{self.option} {self.asked}"
        return missed(source, shape, asked, self.most, self.of, lambda cost: self.named(cost, 0))

    def missed_by(self, shape: Shape) -> str:
        """What a shape costs that does not hold, in as many digits as tell it from the limit."""
        cost = self.of(shape)
        for more in range(_DIGITS):
            if (said := self.named(cost, more)) not in (self.named(self.most, more), self.asked):
                return said
        return self.named(cost, _DIGITS)


@dataclass(frozen=True, slots=True)
class SearchSpace:
    """Where shapes are looked for.

    Attributes:
        source: the model.
        width: the axis that shrinks beside blocks: ``mlp``, or ``experts`` or ``expert_mlp``.
        spending: how damage is spread, what may shrink, and what went already.
    """

    source: Checkpoint
    width: str
    spending: Spending

    @property
    def start(self) -> Shape:
        """The largest shape."""
        return self.spending.start or self.source.shape

    def depths(self) -> range:
        """Numbers of blocks, the most first."""
        most = self.start["layers"]
        return range(most, 0 if self.spending.may_shrink("layers") else most - 1, -1)

    def sizes(self) -> list[int]:
        """Sizes of the width, the largest first: all, and what kernels like of fewer."""
        size, step = self.start[self.width], MULTIPLES[self.width]
        floor = width_floor(self.source, self.width, self.spending)
        return [size, *range((size - 1) // step * step, floor - 1, -step)]

    def damage(self, shape: Shape) -> tuple[float, float]:
        """What is predicted, and the share of all parameters that go: of equals the larger stays.

        Blocks are counted whole, and what is narrower in those that stay.
        """
        layout, start = self.source.layout.heaviest(self.start), self.start
        whole, left = layout.count(start), layout.count(start.with_(layers=shape["layers"]))
        blocks = (whole - left) / whole
        neurons = (left - layout.count(shape)) / whole
        share = self.spending.blocks_give
        return (1 - share) * blocks**2 + share * neurons**2, blocks + neurons

    def legal(self) -> Callable[[Shape], bool]:
        """Whether the architecture can express a shape."""
        rules = self.source.family.legality(self.source.config)
        return lambda shape: all(rule.holds(shape) for rule in rules)


def search(space: SearchSpace, limits: Sequence[Limit]) -> Shape:
    """The legal shape of least damage within all limits.

    At each depth it is the widest that fits, since damage only grows with what goes.

    Raises:
        ShearlingError: none fits; the nearest that can be met is named with its figures.
    """
    best = min(_widest(space, limits), key=space.damage, default=None)
    if best is None:
        raise _unreachable(space, limits)
    return best


def _widest(space: SearchSpace, limits: Sequence[Limit]) -> Iterator[Shape]:
    """The widest legal shape within the limits at each depth that has one."""
    sizes, legal = space.sizes(), space.legal()
    for layers in space.depths():
        shapes = [space.start.with_(layers=layers, **{space.width: size}) for size in sizes]
        low, high = 0, len(shapes)
        while low < high:  # the first that fits
            middle = (low + high) // 2
            if all(limit.holds(shapes[middle]) for limit in limits):
                high = middle
            else:
                low = middle + 1
        fitting = next(filter(legal, shapes[low:]), None)
        if fitting is not None:
            yield fitting


def _unreachable(space: SearchSpace, limits: Sequence[Limit]) -> ShearlingError:
    """What the smallest shapes would give instead."""
    legal = space.legal()
    smallest = [
        space.start.with_(layers=layers, **{space.width: size})
        for layers in reversed(space.depths())
        for size in reversed(space.sizes())
    ]
    least = next(filter(legal, smallest), space.start)
    missed = [limit for limit in limits if not limit.holds(least)]
    asked = " and ".join(f"{limit.option} {limit.asked}" for limit in missed)
    given = " and ".join(f"{limit.option} {limit.missed_by(least)}" for limit in missed)
    changed = ", ".join(f"{axis}={least[axis]}" for axis in ("layers", space.width, "vocab"))
    left = space.source.layout.heaviest(least).count(least)
    return ShearlingError(
        f"{asked} cannot be met: the smallest shape that may be cut here ({changed}; {left:,} "
        f"parameters) gives {given}, which is the nearest; ask for no more, or cut hidden or heads "
        "as well with --shape."
    )
