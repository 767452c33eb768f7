"""What to cut: shapes as users write them, and shapes that meet a parameter budget.

Legal shapes only: sizes between 1 and the source's, and every rule of the family's.
"""

from __future__ import annotations

import math
import re
from fractions import Fraction

from shearling.errors import ShearlingError
from shearling.model.checkpoint import Checkpoint
from shearling.table.families import legal
from shearling.table.values import Shape

AXES = ("layers", "hidden", "heads", "kv_heads", "mlp", "experts", "expert_mlp", "vocab")
# Of what a budget takes away, whole blocks give this share and MLP neurons the rest, as long as so
# many neurons stay: on SmolLM2 better than a sixth, a half, all or nothing (LOG.md).
BLOCKS_GIVE = 1 / 3
MLP_FLOOR = 0.5
MULTIPLE = 8  # of neurons: what matrix kernels like
_NUMBER = re.compile(r"([0-9]{1,18}(?:\.[0-9]{1,18})?)\s*([xXkKmMbB]?)")
_MOST = 10**15
_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9}


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


def parse_params(text: str, total: int) -> int:
    """Read ``0.8x`` (of ``total``), ``113M``, ``1.2B`` or ``90000000`` as parameters.

    Raises:
        ShearlingError: not of that form, or not fewer than the model has.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None:
        raise ShearlingError(
            f"--params {text!r} was given, but a share such as 0.8x or a number such as 113M "
            "was expected."
        )
    unit = match[2].upper()
    wanted = int(Fraction(match[1]) * (total if unit == "X" else _UNITS[unit]))
    if not 0 < wanted < total:
        raise ShearlingError(
            f"--params {text} asks for {wanted:,} parameters, but the model has {total:,}; "
            "give fewer, such as 0.8x."
        )
    return wanted


def parse_count(text: str, option: str) -> int:
    """Read ``200k``, ``1.5M``, ``2B`` or ``90000`` as a number of ``option``.

    Raises:
        ShearlingError: not of that form, or not above 0.
    """
    match = _NUMBER.fullmatch(text.strip())
    if match is None or match[2].upper() == "X":
        raise ShearlingError(
            f"{option} {text!r} was given, but a number such as 200k, 1.5M or 2B was expected."
        )
    count = int(Fraction(match[1]) * _UNITS[match[2].upper()])
    if count > _MOST:
        raise ShearlingError(
            f"{option} {text} is more than there is text for; give at most {_MOST // 10**9:,}B."
        )
    if count < 1:
        raise ShearlingError(f"{option} {text} is nothing; give a number such as 200k.")
    return count


def shape_for(checkpoint: Checkpoint, params: int) -> Shape:
    """The shape of at most ``params`` parameters that promises the least damage.

    Whole blocks give a third of what goes, MLP neurons the rest; once half of the neurons are
    gone, more blocks. Every parameter of the result counts, tied ones once.

    Raises:
        ShearlingError: not even one block with half its neurons fits.
    """
    layout, before = checkpoint.layout, checkpoint.shape
    legality = checkpoint.family.legality(checkpoint.config)
    floor = min(math.ceil(before["mlp"] * MLP_FLOOR / MULTIPLE) * MULTIPLE, before["mlp"])
    block = layout.count(before) - layout.count(before.with_(layers=before["layers"] - 1))
    few = round(BLOCKS_GIVE * (layout.count(before) - params) / block)
    for layers in range(max(1, before["layers"] - few), 0, -1):
        mlp = _largest(checkpoint, before.with_(layers=layers), params)
        shape = before.with_(layers=layers, mlp=mlp) if mlp >= floor else None
        if shape is not None and all(rule.holds(shape) for rule in legality):
            legal.check(checkpoint.family.model_type, layout, legality, before, shape)
            return require_smaller(shape, before)
    least = layout.count(before.with_(layers=1, mlp=floor))
    raise ShearlingError(
        f"{params:,} parameters were asked for, but one block and the embeddings alone have "
        f"{least:,}; ask for more, or cut the vocabulary or the hidden size as well with --shape."
    )


def _largest(checkpoint: Checkpoint, shape: Shape, params: int) -> int:
    """The most neurons with which ``shape`` has at most ``params`` parameters; 0 if none."""
    count = checkpoint.layout.count
    each = count(shape.with_(mlp=2)) - count(shape.with_(mlp=1))
    room = params - count(shape.with_(mlp=1)) + each
    most = min(shape["mlp"], room // each)
    return most if most == shape["mlp"] else max(0, most // MULTIPLE * MULTIPLE)
