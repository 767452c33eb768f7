"""Damage curves: perplexity against the number of blocks removed, for several orders of removal."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from torch import Tensor

from shearling.engine.removals import removal_nll
from shearling.engine.stream import BlockStream
from shearling.evaluate.results import Curve
from shearling.files.progress import Progress, silent


def damage(
    stream: BlockStream,
    ids_NS: Tensor,
    orders: Mapping[str, Sequence[int]],
    counts: Sequence[int],
    *,
    progress: Progress = silent,
) -> tuple[Curve, ...]:
    """Perplexity of the model without the first k blocks of each order, nothing written.

    All points of all curves are one walk through the model: those that skip the same blocks so
    far share their states.

    Args:
        stream: the model.
        ids_NS: windows of held-out text.
        orders: criterion -> blocks, first removed first.
        counts: the values of k; those beyond an order's length are left out of its curve.
        progress: told how far the work is.

    Returns:
        A curve for each order.
    """
    removed = {
        name: [tuple(order[:k]) for k in counts if k <= len(order)]
        for name, order in orders.items()
    }
    flat = [frozenset(blocks) for each in removed.values() for blocks in each]
    nll = iter(
        removal_nll(stream, ids_NS, flat, progress=progress, stage="measuring damage curves")
    )
    return tuple(
        Curve(name, tuple(each), tuple(math.exp(min(next(nll), 700.0)) for _ in each))
        for name, each in removed.items()
    )
