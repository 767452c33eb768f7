"""Criteria for the units of width axes: neurons, query heads, key/value groups, channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Text, backward, check_state, forward
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.scoring.unit_scores import UnitScores
from shearling.scoring.units.gradient import taylor
from shearling.scoring.units.listening import observe
from shearling.scoring.units.places import STREAM, Tap, check_axes, scored_axis, tap, unit_axes
from shearling.scoring.units.statistics import OBSERVED, Inlet, geometric_mean
from shearling.scoring.units.weights import chance, magnitude

UNIT_CRITERIA = (
    "fisher-energy",
    "fisher",
    "energy",
    "obs",
    "flap",
    "wanda-sp",
    "activation",
    "taylor",
    "taylor-element",
    "magnitude-l1",
    "magnitude-l2",
    "random",
)
# Criteria that need no text.
TEXTLESS = ("magnitude-l1", "magnitude-l2", "random")
# Criteria that need no gradients.
FORWARD = ("energy", "obs", "flap", "wanda-sp", "activation")
_MIXED = {"fisher-energy": ("fisher", "energy")}

Rows = dict[str, list[Tensor]]


def score_units(
    stream: BlockStream,
    by: str,
    ids_NS: Tensor,
    axes: Sequence[str],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, UnitScores]:
    """Score the units of some axes, all in one walk through the model.

    Forward-only criteria read each block's weights once, those with gradients twice; memory is
    that of one block and the states, which a streamed model keeps on disk.

    Args:
        stream: the model.
        by: one of ``UNIT_CRITERIA``.
        ids_NS: calibration tokens (N, S); not looked at by the criteria in ``TEXTLESS``.
        axes: some of ``mlp``, ``heads``, ``kv_heads``, ``hidden``, as the architecture has them.
        seed: of ``random``.
        progress: told how far the work is.

    Returns:
        Scores by axis. Those of a key/value group are the sums of its heads', but for ``obs``,
        ``taylor`` and ``magnitude``, which are of the whole group.

    Raises:
        ShearlingError: an unknown criterion, an axis without units to score, sequences without
            a token to predict where gradients are needed, or weights, activations or gradients
            that are not finite.
    """
    layout, axes = stream.checkpoint.layout, tuple(dict.fromkeys(axes))
    if by not in UNIT_CRITERIA:
        raise ShearlingError(
            f"criterion {by!r} is not known; choose one of {', '.join(UNIT_CRITERIA)}."
        )
    check_axes(layout, axes)
    if by == "random":
        rows = chance(layout, stream.checkpoint.shape, axes, seed)
    elif by.startswith("magnitude"):
        power = 1 if by == "magnitude-l1" else 2
        rows = magnitude(stream.checkpoint, axes, power=power, progress=progress)
    else:
        _check_tokens(by, ids_NS)
        with stream.place.running():
            if by.startswith("taylor"):
                element = by == "taylor-element"
                rows = taylor(stream, ids_NS, axes, element=element, progress=progress)
            else:
                rows = _observed(stream, by, ids_NS, axes, progress)
    return {
        axis: UnitScores(by, axis, tuple(tuple(row.tolist()) for row in rows[axis]))
        for axis in axes
    }


def _observed(
    stream: BlockStream, by: str, ids_NS: Tensor, axes: Sequence[str], progress: Progress
) -> Rows:
    """Criteria that follow from sums over tokens of what enters a matrix."""
    checkpoint, layout = stream.checkpoint, stream.checkpoint.layout
    parts = _MIXED.get(by, (by,))
    wanted = frozenset(name for part in parts for name in OBSERVED[part].wanted)
    source = {axis: scored_axis(layout, axis) for axis in axes}
    taps = {axis: tap(checkpoint, axis) for axis in (*axes, *source.values())}
    listened = [taps[axis] for axis in dict.fromkeys(source.values())]
    # A group's removal is costed whole by obs; otherwise it is worth what its heads are.
    width = {axis: taps[axis if by == "obs" else source[axis]].width for axis in axes}
    parts_by_block: dict[int, dict[str, list[Tensor]]] = {}
    for index, inlets in _observations(stream, by, ids_NS, listened, wanted, progress):
        parts_by_block[index] = {
            axis: [
                _sum([OBSERVED[part].value(inlet, width[axis]) for inlet in inlets[source[axis]]])
                for part in parts
            ]
            for axis in axes
        }
    rows: Rows = {}
    for axis in axes:
        by_block = [parts_by_block[index][axis] for index in range(stream.depth)]
        if axis == STREAM:
            by_block = [[_sum(each) for each in zip(*by_block, strict=True)]]
        mixed = [geometric_mean(*parts) if len(parts) == 2 else parts[0] for parts in by_block]
        # The heads of a group stand together.
        rows[axis] = [row.view(checkpoint.shape[axis], -1).sum(1) for row in mixed]
    return rows


def _observations(
    stream: BlockStream,
    by: str,
    ids_NS: Tensor,
    taps: Sequence[Tap],
    wanted: frozenset[str],
    progress: Progress,
) -> Iterator[tuple[int, dict[str, list[Inlet]]]]:
    """A walk forward, or forward and backward where a sum takes gradients."""
    stage = f"scoring units by {by}"
    if "fisher" not in wanted:
        with States(stream.place) as states:
            text = Text(stream, states).begin(stream.batches(ids_NS))
            yield from observe(forward(text, stage, progress), taps, wanted)
        return
    walk = backward(stream, ids_NS, stage, weights=False, tell=progress, forward_check=check_state)
    # The walk's loss is the mean NLL of the predicted tokens, the Fisher information's their sum.
    predicted = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
    yield from observe(walk, taps, wanted, gradient_scale=predicted)


def _sum(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)).sum(0)


def _check_tokens(by: str, ids_NS: Tensor) -> None:
    if ids_NS.ndim != 2 or ids_NS.shape[0] < 1 or ids_NS.shape[1] < 2:
        raise ShearlingError(
            f"criterion {by} runs the model on text, but was given tokens of shape "
            f"{tuple(ids_NS.shape)}; give at least one sequence of at least 2 tokens."
        )


__all__ = ["TEXTLESS", "UNIT_CRITERIA", "UnitScores", "score_units", "unit_axes"]
