"""What a new token costs by shape, fitted to a few shapes that were timed.

    seconds = outside + vocab x word + layers x (block + width x unit)

No term is below zero. ``outside`` is what no cut changes (sampling, Python around the blocks),
``block`` a block with attention and norms and all but its neurons, ``unit`` one neuron of one
block. ``word`` is there only where shapes of several vocabularies were timed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from shearling.table.values import Shape


@dataclass(frozen=True, slots=True)
class TimedShape:
    """A shape and its time.

    Attributes:
        shape: sizes.
        seconds: of one decoding step of the whole batch.
        speed: the source's seconds over these, the median over rounds in which both ran in turns.
        slowest, fastest: of those rounds.
    """

    shape: Shape
    seconds: float
    speed: float = 1.0
    slowest: float = 1.0
    fastest: float = 1.0


@dataclass(frozen=True, slots=True)
class CostModel:
    """Seconds by part.

    Attributes:
        width: the axis whose units are counted.
        outside, word, block, unit: seconds, as above.
        factor: by which what was measured last differs from the sum.
    """

    width: str
    outside: float
    word: float
    block: float
    unit: float
    factor: float = 1.0

    def seconds(self, shape: Shape) -> float:
        """Predicted, of one decoding step."""
        blocks = shape["layers"] * (self.block + shape[self.width] * self.unit)
        return self.factor * (self.outside + shape["vocab"] * self.word + blocks)

    def corrected(self, timed: TimedShape) -> CostModel:
        """The same sum, times what makes it right for one shape: what is near it is then right."""
        plain = replace(self, factor=1.0)
        return replace(self, factor=timed.seconds / plain.seconds(timed.shape))


def fitted(timed: Sequence[TimedShape], width: str) -> CostModel:
    """The parts that come nearest to what was timed, relative errors squared; none is negative.

    Args:
        timed: at least three shapes that differ in depth and in width.
        width: the axis whose units are counted.
    """
    columns = [
        [1.0, shape["vocab"], shape["layers"], shape["layers"] * shape[width]]
        for shape in (one.shape for one in timed)
    ]
    seconds_N = np.array([one.seconds for one in timed])
    terms_NK = np.array(columns) / seconds_N[:, None]  # each shape's error counts relatively
    varied = [0, *(k for k in (1, 2, 3) if np.ptp(np.array(columns)[:, k]) > 0)]
    parts_K = np.zeros(4)
    parts_K[varied] = _least_squares(terms_NK[:, varied])
    outside, word, block, unit = (float(part) for part in parts_K)
    return CostModel(width, outside, word, block, unit)


def _least_squares(terms_NK: np.ndarray) -> np.ndarray:
    """The x >= 0 for which terms x is nearest to 1: the best of all sets of terms in use."""
    count = terms_NK.shape[1]
    scale_K = np.abs(terms_NK).max(0)
    best_K, least = np.zeros(count), np.inf
    for size in range(1, count + 1):
        for used in map(list, combinations(range(count), size)):
            scaled = terms_NK[:, used] / scale_K[used]
            solved, *_ = np.linalg.lstsq(scaled, np.ones(len(scaled)), rcond=None)
            error = float(np.square(scaled @ solved - 1).sum())
            if (solved >= 0).all() and error < least:
                best_K, least = np.zeros(count), error
                best_K[used] = solved / scale_K[used]
    return best_K
