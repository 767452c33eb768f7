"""Scores of the units of width axes: neurons, query heads, key/value groups, channels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from shearling.engine.states import States
from shearling.engine.stream import BlockStream
from shearling.engine.walk import Text, backward, check_state, forward
from shearling.errors import ShearlingError
from shearling.files.progress import Progress, silent
from shearling.scoring.registry import Criterion, find
from shearling.scoring.scores import Scores
from shearling.scoring.units.listening import observe
from shearling.scoring.units.places import STREAM, Tap, check_axes, scored_axis, tap
from shearling.scoring.units.statistics import Inlet

Rows = dict[str, list[Tensor]]


def score_units(
    stream: BlockStream,
    by: str,
    ids_NS: Tensor,
    axes: Sequence[str],
    *,
    seed: int = 0,
    progress: Progress = silent,
) -> dict[str, Scores]:
    """Score the units of some axes, all in one walk through the model.

    Forward-only criteria read each block's weights once, those with gradients twice; memory is
    that of one block and the states, which a streamed model keeps on disk.

    Args:
        stream: the model.
        by: a criterion of units.
        ids_NS: calibration tokens (N, S); not looked at by criteria that read weights alone.
        axes: some of ``mlp``, ``heads``, ``kv_heads``, ``hidden``, as the architecture has them.
        seed: of ``random``.
        progress: told how far the work is.

    Returns:
        Scores by axis. Those of a key/value group are the sums of its heads', but for criteria
        that declare ``whole_groups``, and those that look at a group's own weights.

    Raises:
        ShearlingError: an unknown criterion, an axis without units to score, sequences without
            a token to predict where gradients are needed, or weights, activations or gradients
            that are not finite.
    """
    layout, axes = stream.checkpoint.layout, tuple(dict.fromkeys(axes))
    criterion = find(by, "units")
    check_axes(layout, axes)
    rows = _rows(criterion, stream, ids_NS, axes, seed, progress)
    return {
        axis: Scores(by, axis, tuple(tuple(row.tolist()) for row in rows[axis])).require_finite(
            stream.checkpoint.name
        )
        for axis in axes
    }


def _rows(
    criterion: Criterion, stream: BlockStream, ids_NS: Tensor, axes: Sequence[str], seed: int,
    progress: Progress,
) -> Rows:  # fmt: skip
    if criterion.textless:
        return criterion.function(stream.checkpoint, axes, seed=seed, progress=progress)
    _check_tokens(criterion.name, ids_NS)
    with stream.place.running():
        if criterion.sums:
            return _observed(stream, criterion, ids_NS, axes, progress)
        return criterion.function(stream, ids_NS, axes, progress=progress)


def _observed(
    stream: BlockStream,
    criterion: Criterion,
    ids_NS: Tensor,
    axes: Sequence[str],
    progress: Progress,
) -> Rows:
    """Criteria that follow from sums over tokens of what enters a matrix."""
    checkpoint, layout = stream.checkpoint, stream.checkpoint.layout
    parts = criterion.parts
    source = {axis: scored_axis(layout, axis) for axis in axes}
    taps = {axis: tap(checkpoint, axis) for axis in (*axes, *source.values())}
    listened = [taps[axis] for axis in dict.fromkeys(source.values())]
    # A group is costed whole where that is declared; otherwise it is worth what its heads are.
    width = {
        (part, axis): taps[axis if part.whole_groups else source[axis]].width
        for part in parts
        for axis in axes
    }
    parts_by_block: dict[int, dict[str, list[Tensor]]] = {}
    for index, inlets in _observations(stream, criterion, ids_NS, listened, progress):
        none = {axis: torch.zeros(checkpoint.shape[axis], dtype=torch.float64) for axis in axes}
        parts_by_block[index] = {
            axis: [
                _sum([part.function(i, width[part, axis]) for i in inlets[source[axis]]])
                if source[axis] in inlets  # some kinds of blocks have no such units
                else none[axis]
                for part in parts
            ]
            for axis in axes
        }
    rows: Rows = {}
    for axis in axes:
        by_block = [parts_by_block[index][axis] for index in range(stream.depth)]
        if axis == STREAM:
            by_block = [[_sum(each) for each in zip(*by_block, strict=True)]]
        joined = [criterion.function(*p) if criterion.joins else p[0] for p in by_block]
        # The heads of a group stand together.
        rows[axis] = [row.view(checkpoint.shape[axis], -1).sum(1) for row in joined]
    return rows


def _observations(
    stream: BlockStream,
    criterion: Criterion,
    ids_NS: Tensor,
    taps: Sequence[Tap],
    progress: Progress,
) -> Iterator[tuple[int, dict[str, list[Inlet]]]]:
    """A walk forward, or forward and backward where a sum takes gradients."""
    stage, wanted = f"scoring units by {criterion.name}", criterion.sums
    ranks = stream.place.ranks.of(len(ids_NS))
    if not criterion.gradients:
        with States(stream.place) as states:
            text = Text(stream, states).begin(stream.batches(ranks.share(ids_NS)))
            yield from observe(forward(text, stage, progress), taps, wanted, ranks=ranks)
        return
    walk = backward(stream, ids_NS, stage, weights=False, tell=progress, forward_check=check_state)
    # The walk's loss is the mean NLL of the predicted tokens, the Fisher information's their sum.
    predicted = ids_NS.shape[0] * (ids_NS.shape[1] - 1)
    yield from observe(walk, taps, wanted, ranks=ranks, gradient_scale=predicted)


def _sum(rows: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(rows)).sum(0)


def _check_tokens(by: str, ids_NS: Tensor) -> None:
    if ids_NS.ndim != 2 or ids_NS.shape[0] < 1 or ids_NS.shape[1] < 2:
        raise ShearlingError(
            f"criterion {by} runs the model on text, but was given tokens of shape "
            f"{tuple(ids_NS.shape)}; give at least one sequence of at least 2 tokens."
        )
