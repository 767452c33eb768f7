"""What to cut: shapes as users write them, and shapes that meet a parameter budget.

Legal shapes only: sizes between 1 and the source's, and every rule of the family's.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from shearling.errors import ShearlingError, count_of
from shearling.files.amounts import COUNTS, amount, pointed
from shearling.model.checkpoint import Checkpoint
from shearling.pruning.preferences import DEFAULT_PREFERENCE, PREFERENCES
from shearling.table.families import legal
from shearling.table.values import Shape

AXES = (
    "layers", "hidden", "heads", "kv_heads", "linear_heads", "mlp", "experts", "expert_mlp",
    "vocab",
)  # fmt: skip
WIDTH_FLOOR = 0.5  # of the neurons stay; beyond, more blocks go
BUDGET_AXES = ("layers", "mlp", "experts", "expert_mlp", "vocab")
MULTIPLES = {"mlp": 8, "expert_mlp": 8, "experts": 1}  # of neurons: what matrix kernels like
_MOST = 10**15


def parse_shape(text: str, checkpoint: Checkpoint) -> Shape:
    """Read ``layers=24,mlp=1024`` as sizes after the cut; what is not named stays.

    Query heads follow when only groups of them are named, each group keeping all of its own.

    Raises:
        ShearlingError: not of that form, an axis named twice or unknown, or a shape that the
            architecture cannot express (the nearest that it can are named).
    """
    before = checkpoint.shape
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, sign, number = (piece.strip() for piece in part.partition("="))
        if not sign or not re.fullmatch("[0-9]{1,18}", number):
            raise ShearlingError(
                f"--shape {text!r} was given, but sizes such as layers=24,mlp=1024 were expected; "
                f"the axes are {', '.join(a for a in AXES if a in before)}."
            )
        if name in sizes:
            raise ShearlingError(f"--shape {text!r} names {name} twice; give each axis once.")
        sizes[name] = int(number)
    groups = sizes.get("kv_heads", 0)
    if "heads" not in sizes and 0 < groups <= before.get("kv_heads", 0):
        sizes["heads"] = groups * (before["heads"] // before["kv_heads"])
    after = Shape({**before, **sizes})
    checkpoint.family.check(checkpoint.config, after)
    return require_smaller(after, before)


def parse_layers(layers: int, checkpoint: Checkpoint) -> Shape:
    """The source's shape with fewer blocks (ShearlingError if there are not as many)."""
    from shearling.pruning.choose import check_layers

    check_layers(layers, checkpoint.shape["layers"])
    return checkpoint.shape.with_(layers=layers)


def require_smaller(after: Shape, before: Shape) -> Shape:
    """``after``, unless it is all of ``before`` (ShearlingError)."""
    if after == before:
        raise ShearlingError(
            f"the shape asked for is the model's own ({before}); name at least one smaller size."
        )
    return after


def parse_params(text: str, total: int, option: str = "--params") -> int:
    """Read ``0.8x`` (of ``total``), ``113M``, ``1.2B`` or ``90000000`` as parameters.

    Raises:
        ShearlingError: not of that form, or not fewer than the model has.
    """
    given = amount(text, {"x": total, **COUNTS})
    if given is None:
        raise ShearlingError(
            f"{option} {text!r} was given, but a share such as 0.8x or a number such as 113M "
            f"was expected{pointed(text)}."
        )
    number, unit = given
    if not unit and number.denominator > 1:
        raise ShearlingError(
            f"{option} {text} was read as a count of parameters, which is a whole number; a share "
            f"of the model's has an x behind it: {text.strip()}x."
        )
    wanted = int(number * (total if unit == "x" else COUNTS[unit]))
    if not 0 < wanted < total:
        raise ShearlingError(
            f"{option} {text} asks for {count_of(wanted, 'parameter')}, but the model has "
            f"{total:,}; give {'fewer' if wanted else 'more'}, such as 0.8x."
        )
    return wanted


def parse_active(text: str, checkpoint: Checkpoint) -> int:
    """The same of the parameters that one token meets (ShearlingError without experts)."""
    if not checkpoint.layout.routed:
        raise ShearlingError(
            f"--active-params {text} was given, but {checkpoint.name} has no experts, and a token "
            "meets all of its parameters; use --params."
        )
    active = checkpoint.layout.count(checkpoint.shape, active=True)
    return parse_params(text, active, "--active-params")


def parse_count(text: str, option: str) -> int:
    """Read ``200k``, ``1.5M``, ``2B`` or ``90000`` as a number of ``option``.

    Raises:
        ShearlingError: not of that form, or not above 0.
    """
    given = amount(text, COUNTS)
    if given is None:
        raise ShearlingError(
            f"{option} {text!r} was given, but a number such as 200k, 1.5M or 2B was expected"
            f"{pointed(text)}."
        )
    count = int(given[0] * COUNTS[given[1]])
    if count > _MOST:
        raise ShearlingError(
            f"{option} {text} is more than there is text for; give at most {_MOST // 10**9:,}B."
        )
    if count < 1:
        raise ShearlingError(f"{option} {text} is nothing; give a number such as 200k.")
    return count


@dataclass(frozen=True, slots=True)
class Spending:
    """How a budget is spread.

    Attributes:
        prefer: of :data:`shearling.pruning.preferences.PREFERENCES`.
        axes: what may shrink, of :data:`BUDGET_AXES`; None takes blocks and one width.
        start: sizes to begin with, where something else went already; None is the source's.
    """

    prefer: str = DEFAULT_PREFERENCE
    axes: tuple[str, ...] | None = None
    start: Shape | None = None

    def may_shrink(self, axis: str) -> bool:
        """Whether an axis is among those that may."""
        return self.axes is None or axis in self.axes

    @property
    def blocks_give(self) -> float:
        """The share of what goes that whole blocks give."""
        return PREFERENCES[self.prefer].blocks_give


def parse_axes(given: str | Sequence[str], checkpoint: Checkpoint) -> tuple[str, ...]:
    """Read ``layers,mlp,vocab`` as the axes that a budget may take from.

    Raises:
        ShearlingError: an axis that the model lacks, or that no budget takes from.
    """
    names = given.split(",") if isinstance(given, str) else given
    axes = tuple(dict.fromkeys(name.strip() for name in names))
    there = [axis for axis in BUDGET_AXES if axis in checkpoint.shape]
    for axis in axes:
        if axis not in there:
            raise ShearlingError(
                f"--axes {','.join(axes)} names {axis!r}, but a budget takes from "
                f"{', '.join(there)} of a {checkpoint.family.model_type} model; name some of these."
            )
    return axes


def shape_for(
    checkpoint: Checkpoint, params: int, *, active: bool = False, spending: Spending | None = None
) -> Shape:
    """The shape of at most ``params`` parameters that promises the least damage.

    Whole blocks give a third of what goes, or the share that is preferred, MLP neurons the rest;
    once half of the neurons are gone, more blocks. Of a mixture, experts give all, until half of
    them or as many as a token is sent to are left; of its active parameters, blocks and the neurons
    of its experts do as above. Every parameter of the result counts, tied ones once.

    Args:
        checkpoint: the source.
        params: parameters at most.
        active: they are those that one token meets.
        spending: how it is spread; by default as above.

    Raises:
        ShearlingError: not even one block of half its width fits.
    """
    spending = spending or Spending()
    source, before = checkpoint.shape, spending.start or checkpoint.shape
    layout = checkpoint.layout.heaviest(before, active=active)  # whichever blocks will go
    count = partial(layout.count, active=active)
    width = ("expert_mlp" if active else "experts") if layout.routed else "mlp"
    legality = checkpoint.family.legality(checkpoint.config)
    floor = width_floor(checkpoint, width, spending)
    block = count(before) - count(before.with_(layers=before["layers"] - 1))
    stays = layout.axis[width].rigid or not spending.may_shrink(width)
    give = 0.0 if width == "experts" else 1.0 if stays else spending.blocks_give
    few = max(0, round(give * (count(before) - params) / block))
    fewest = 0 if spending.may_shrink("layers") else before["layers"] - 1
    for layers in range(max(fewest + 1, before["layers"] - few), fewest, -1):
        most = _largest(count, before.with_(layers=layers), width, params)
        for size in range(most, floor - 1, -MULTIPLES[width]):
            shape = before.with_(layers=layers, **{width: size})
            if all(rule.holds(shape) for rule in legality):
                legal.check(checkpoint.family.model_type, layout, legality, source, shape)
                return require_smaller(shape, source)
            if width != "experts":
                break  # no rule is one of neurons alone
    least = count(before.with_(layers=fewest + 1, **{width: floor}))
    left = f"{'one block' if not fewest else 'all blocks'} and the embeddings alone have {least:,}"
    raise ShearlingError(
        f"{params:,} parameters were asked for, but {left}; ask for more, or cut the vocabulary "
        "or the hidden size as well with --shape."
    )


def blocks_gave(checkpoint: Checkpoint, after: Shape) -> float:
    """The share that whole blocks gave of what goes from blocks and the neurons of those that stay.

    Words and whole experts do not count; 0 where nothing else goes.
    """
    layout = checkpoint.layout.heaviest(checkpoint.shape)
    kept = {axis: after[axis] for axis in ("vocab", "experts") if axis in after}
    before = checkpoint.shape.with_(**kept)
    blocks = layout.count(before) - layout.count(before.with_(layers=after["layers"]))
    every = layout.count(before) - layout.count(after)
    return blocks / every if every else 0.0


def width_floor(checkpoint: Checkpoint, width: str, spending: Spending) -> int:
    """The fewest units that a budget leaves on an axis: all, where it may not shrink."""
    return _floor(checkpoint, width) if spending.may_shrink(width) else checkpoint.shape[width]


def _floor(checkpoint: Checkpoint, width: str) -> int:
    """The fewest units that a budget leaves on an axis."""
    size, multiple = checkpoint.shape[width], MULTIPLES[width]
    if checkpoint.layout.axis[width].rigid:
        return size
    half = min(math.ceil(size * WIDTH_FLOOR / multiple) * multiple, size)
    return max(half, checkpoint.layout.routed) if width == "experts" else half


def _largest(count: Callable[[Shape], int], shape: Shape, axis: str, params: int) -> int:
    """The most units of an axis with which ``shape`` has at most ``params`` parameters, or 0."""
    one = count(shape.with_(**{axis: 1}))
    each = count(shape.with_(**{axis: 2})) - one
    most = min(shape[axis], (params - one + each) // each)
    return most if most == shape[axis] else max(0, most // MULTIPLES[axis] * MULTIPLES[axis])
