"""What is said of a shape that is well below what was asked for, as sizes go in steps."""

from __future__ import annotations

from collections.abc import Callable

from shearling.model.checkpoint import Checkpoint
from shearling.pruning.plan import MULTIPLES
from shearling.table.values import Shape

WITHIN = 0.02  # of what was asked for, of which nothing is said
_UNITS = {"mlp": "neurons", "expert_mlp": "neurons of experts", "experts": "experts"}


def missed(
    source: Checkpoint,
    shape: Shape,
    asked: str,
    most: float,
    of: Callable[[Shape], float],
    named: Callable[[float], str],
) -> str | None:
    """A sentence on a shape that has at least 2 % less than it may have, or None.

    Args:
        source: the model.
        shape: that was chosen for it.
        asked: the option and what was given, such as ``"--params 0.8x"``.
        most: what that allows.
        of: what a shape has of it.
        named: such a number as the user would give it, where it is no share of the source's.
    """
    has = of(shape)
    if has >= (1 - WITHIN) * most:
        return None
    share = asked.rstrip().lower().endswith("x")
    said = f"{has / of(source.shape):.3g}x" if share else named(has)
    why = _step(source, shape, lambda larger: of(larger) > most)
    return f"{asked} was asked for, and the shape that keeps within it has {said}{why}."


def _step(source: Checkpoint, shape: Shape, exceeds: Callable[[Shape], bool]) -> str:
    """The step in which sizes go where the next larger one would be too large, or nothing."""
    rules = source.family.legality(source.config)
    for axis, noun in _UNITS.items():
        size, whole = shape.get(axis, 0), source.shape.get(axis, 0)
        larger = (shape.with_(**{axis: more}) for more in _larger(axis, size, whole))
        following = next((one for one in larger if all(rule.holds(one) for rule in rules)), None)
        if following is not None and exceeds(following):
            step = following[axis] - size
            return f", as {noun} go {'one' if step == 1 else step} at a time from every block"
    deeper = shape.with_(layers=shape["layers"] + 1)
    fewer = shape["layers"] < source.shape["layers"]
    return ", as blocks go whole" if fewer and exceeds(deeper) else ""


def _larger(axis: str, size: int, whole: int) -> list[int]:
    """Sizes that a budget may leave of an axis, above ``size``."""
    step = MULTIPLES[axis]
    return [*range((size // step + 1) * step, whole, step), whole] if size < whole else []
