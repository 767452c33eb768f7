"""From scores, or a user's list, to the blocks that stay."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from shearling.errors import ShearlingError
from shearling.scoring.scores import Scores
from shearling.table.values import Keep


def check_layers(layers: int, depth: int) -> None:
    """Raise ShearlingError unless ``layers`` of ``depth`` blocks can be kept."""
    if not 1 <= layers < depth:
        raise ShearlingError(
            f"--layers {layers} was given, but the model has {depth} blocks; "
            f"keep between 1 and {depth - 1}."
        )


def keep_layers(scores: Scores, layers: int) -> Keep:
    """Remove the blocks that matter least until ``layers`` are left.

    Raises:
        ShearlingError: ``layers`` out of range, or too many blocks protected.
    """
    depth = len(scores.values)
    check_layers(layers, depth)
    removable = scores.order
    if depth - layers > len(removable):
        raise ShearlingError(
            f"--layers {layers} would remove {depth - layers} of {depth} blocks, but only "
            f"{len(removable)} are not protected; keep at least {depth - len(removable)}, "
            "or protect fewer."
        )
    return without(removable[: depth - layers], depth)


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
            f"{len(removed)} of {depth} blocks were named for removal; name between 1 "
            f"and {depth - 1}."
        )
    return Keep({"layers": tuple(block for block in range(depth) if block not in removed)})
